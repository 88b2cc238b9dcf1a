"""A Python interpreter for the model, in a sandbox; names are kept within a rollout.

Code that fails, hangs or leaves gives the model one line of words. An interpreter that
is lost starts anew at the next call, without its names.
"""

from __future__ import annotations

import threading

from jaxreason import sandbox as sandboxes
from jaxreason.tools.interface import Session, Tool, shortened
from jaxreason.types import Task

HELP = "Run Python; prints and the value of a last expression come back, and names are kept."
LOST = "; the names of this interpreter are lost"
EXPLAINED = {
    "timeout": "no answer in {timeout_s:g} s" + LOST,
    "too much output": "it printed without end" + LOST,
    "crashed": "the interpreter ended" + LOST,
    "out of memory": "out of memory",
    "error": "error",
}


class Interpreter:
    """The interpreter of one rollout. `close` may be called while a call runs, which it
    then ends.
    """

    def __init__(self, sandbox: sandboxes.Sandbox, max_chars: int):
        self._sandbox, self._max_chars = sandbox, max_chars
        self._session: sandboxes.Session | None = None
        self._closed, self._lock = False, threading.Lock()

    def call(self, text: str) -> str:
        """Run code and return what it printed, or the last line of its error, or both.

        Raises:
          RuntimeError: this machine can't start a sandbox; no text is the cause.
        """
        result = self._open().run(unfenced(text))
        error = result.error or ("" if not result.reason else EXPLAINED[result.reason])
        lines = [result.stdout.rstrip("\n"), error.format(timeout_s=self._sandbox.timeout_s) if not result.error else error]
        return shortened("\n".join(line for line in lines if line), self._max_chars) or "(no output)"

    def close(self) -> None:
        with self._lock:
            self._closed, session = True, self._session
        if session is not None:
            session.close()

    def _open(self) -> sandboxes.Session:
        if self._session is None or not self._session.alive:
            session = self._sandbox.session()
            with self._lock:
                self._session = session
                if self._closed:
                    session.close()
        return self._session


def open_session(
    sandbox: str = "bwrap",  # or "rlimits", which holds accidents but no attacker: see `sandbox.Sandbox`
    timeout_s: float = 5.0,  # wall time per call
    memory_mb: int = 512,  # address space per process
    max_chars: int = 2000,  # of an answer; a longer one is cut in its middle
    packages: tuple[str, ...] = (),  # importable besides the standard library, such as numpy
    warm: int = 2,  # interpreters that are started ahead
) -> Interpreter:
    """Open an interpreter for a rollout. Those with the same settings share one supply
    of warm interpreters.

    Raises:
      ValueError: a limit that is not positive, a package that is not installed, or a
        sandbox that can't be had here.
    """
    if max_chars < 1:
        raise ValueError(f"tool 'python' got max_chars={max_chars}; allowed: 1 or more")
    options = {"timeout_s": timeout_s, "memory_mb": memory_mb, "packages": tuple(packages), "warm": warm}
    return Interpreter(sandboxes.shared(sandbox, max_output=8 * max_chars, **options), max_chars)


def python(
    sandbox: str = "bwrap",  # or rlimits, which holds accidents but no attacker: see `sandbox.Sandbox`
    timeout_s: float = 5.0,  # seconds per call
    memory_mb: int = 512,  # address space per process
    max_chars: int = 2000,  # of a result; a longer one is cut in its middle
    packages: tuple[str, ...] = (),  # importable besides the standard library, such as numpy
    warm: int = 2,  # interpreters that are started ahead
    as_name: str = "python",  # as the model calls it
) -> Tool:
    """Run Python in a sandbox; an interpreter keeps its names within a rollout.

    Raises:
      ValueError: a limit that is not positive, a package that is not installed, or a
        sandbox that can't be had here.
    """
    settings = (sandbox, timeout_s, memory_mb, max_chars, tuple(packages), warm)
    open_session(*settings).close()  # raises before the run begins

    def opened(task: Task) -> Session:
        interpreter = open_session(*settings)
        return Session(lambda code: interpreter.call(code), interpreter.close)

    return Tool(as_name, HELP, opened, {"code": "Python code"}, timeout_s, keeps_time=True, max_chars=max_chars)


def unfenced(text: str) -> str:
    """Return the code in a fenced block, if the whole text is one."""
    lines = text.strip().splitlines()
    if len(lines) >= 2 and lines[0].startswith("```") and lines[-1].strip() == "```":
        return "\n".join(lines[1:-1])
    return text
