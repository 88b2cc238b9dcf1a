"""Run commands of other programs, or print them.

A command is a list of words, never text for a shell, so no quoting is ours except that
of the scripts in `remote`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import IO, NamedTuple

TIMEOUT_S = 900.0
COLOURS = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\))")  # and other signs to a terminal
COPY_TIMEOUT_S = 24 * 3600.0  # a run's folder may be large


class Result(NamedTuple):
    """Exit code and output of a command."""

    code: int  # 124: it did not end in time; 127: there is no such program
    out: str
    err: str

    @property
    def said(self) -> str:
        """Its last line of errors, else of output."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}"


class Shell(NamedTuple):
    """Runs commands. `looks` are commands that change nothing and cost nothing."""

    run: Callable[..., Result]  # (words, timeout_s=) -> Result
    look: Callable[..., Result]
    dry: bool = False


def run(words: Sequence[str], timeout_s: float = TIMEOUT_S) -> Result:
    """Run a command to its end, without input.

    The command has its own process group and writes to files, so Ctrl-C ends the wait
    and not the command: half a creation of a machine would be worse than a whole one.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            keywords = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, "start_new_session": True}
            process = subprocess.Popen(list(words), **keywords)
        except FileNotFoundError:
            return Result(127, "", f"{words[0]}: not installed")
        except (OSError, ValueError) as error:  # not to be executed, or its words are too long
            return Result(126, "", f"{words[0]}: {error}")
        try:
            code = process.wait(timeout_s)  # not subprocess.run, which kills the command at Ctrl-C
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # gcloud starts ssh
            process.wait()
            return Result(124, "", f"{words[0]} did not end in {timeout_s:g} s")
        return Result(code, text_of(out), text_of(err))


def text_of(file: IO[bytes]) -> str:
    file.seek(0)
    return COLOURS.sub("", file.read().decode(errors="replace").replace("\r\n", "\n"))


def real() -> Shell:
    return Shell(run, run)


def printing(say: Callable[[str], None]) -> Shell:
    """Make a shell that prints what would be run, and runs nothing."""

    def show(words: Sequence[str], timeout_s: float = TIMEOUT_S) -> Result:
        say(shlex.join(words))
        return Result(0, "", "")

    return Shell(show, show, dry=True)
