"""Child processes for work that may hang, use too much memory or crash: each question
has a limit of CPU time, each child one of memory.

The child is the script `child.py`, run by its path: it imports neither this package
(hence not jax) nor the program's main module, as multiprocessing's spawn would, and
shares no lock with our threads, as its fork would. A pipe carries JSON both ways. No
signal is used on this side, so any thread may ask. A child that fails is killed and
another takes its place at the next question; a child whose parent is gone ends by
itself. CPU time is counted, because on a busy machine an answer may take any wall time.
A child that neither computes nor answers is given up after `PATIENCE` times the limit.

A pool may keep its children in the sandbox (see `jaxreason.sandbox`), with the packages
of this Python in it, read-only.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import queue
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, NamedTuple

from jaxreason import sandbox
from jaxreason.sandbox.processes import GONE_S, Processes

START_S = 600.0  # imports and a warm-up take two seconds on an idle machine
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # the order of a set of strings, on which some items of datasets depend
PATIENCE = 60  # wall time, in multiples of the limit of CPU time


class Failed(Exception):
    """A question without an answer; the message is the verdict's reason: timeout,
    crashed or out of memory.
    """


class Child(NamedTuple):
    processes: Processes
    pipe: Any

    @property
    def process(self) -> subprocess.Popen:
        return self.processes.popen


class Pool:
    """Up to `processes` children of one kind of `child.KINDS`, started when first
    needed; `timeout_s` is CPU time.
    """

    def __init__(self, kind: str, processes: int = 2, timeout_s: float = 5.0, memory_mb: int = 2048, held: bool = False):
        if processes < 1 or timeout_s <= 0 or memory_mb < 1:
            raise ValueError(
                f"got processes={processes}, timeout_s={timeout_s}, memory_mb={memory_mb}; allowed: positive numbers"
            )
        self._kind, self._timeout_s, self._memory_mb = kind, timeout_s, memory_mb
        self._held = held  # in the sandbox
        self._children: queue.LifoQueue[Child | None] = queue.LifoQueue()  # last in, first out: no more are started than needed
        for _ in range(processes):
            self._children.put(None)

    def ask(self, *question) -> Any:
        """Return the child's answer to a question of JSON values; wait for a free child
        if need be.

        Raises:
          Failed: no answer within the limits.
          RuntimeError: a child cannot be started.
        """
        child = self._children.get()
        try:
            child = child if child is not None and child.process.poll() is None else self._start()
            try:
                child.pipe.send_bytes(json.dumps(question).encode())
                if not child.pipe.poll(PATIENCE * self._timeout_s):
                    raise Failed("timeout")
                failure, answer = json.loads(child.pipe.recv_bytes())
                if failure:
                    raise Failed(failure)
                return answer
            except (OSError, EOFError):
                raise Failed("timeout" if child.processes.ran_out(GONE_S) else "crashed") from None
        except BaseException:  # also for KeyboardInterrupt: a late answer would be taken for the next question's
            child = _kill(child)
            raise
        finally:
            self._children.put(child)

    def close(self) -> None:
        """End the children that are not in use. A later question starts new ones."""
        for _ in range(self._children.qsize()):
            self._children.put(_kill(self._children.get_nowait()))

    def _start(self) -> Child:
        ours, theirs = Pipe()
        script = Path(__file__).with_name("child.py")
        options = [str(theirs.fileno()), self._kind, str(self._timeout_s), str(self._memory_mb)]
        try:
            if self._held:
                processes = sandbox.start_script(script, options, [theirs.fileno()], self._memory_mb, ENVIRONMENT)
            else:
                processes = _start_alone(script, options, [theirs.fileno()])
        finally:
            theirs.close()
        child = Child(processes, ours)
        try:
            ready = ours.recv_bytes().decode() if ours.poll(START_S) else f"no sign of life in {START_S:.0f} s"
        except (OSError, EOFError):
            ready = "it ended at once; is memory_mb too small?"
        if ready:
            _kill(child)
            raise RuntimeError(f"a {self._kind!r} verifier process did not start: {ready}")
        return child


@functools.cache
def shared(kind: str, processes: int = 2, timeout_s: float = 5.0, memory_mb: int = 2048, held: bool = False) -> Pool:
    """Return the one pool with these settings, closed at exit: two verifiers with the
    same settings share their children.
    """
    pool = Pool(kind, processes, timeout_s, memory_mb, held)
    atexit.register(pool.close)
    return pool


def _kill(child: Child | None) -> None:
    if child is not None:
        child.processes.end()
        child.pipe.close()


def _start_alone(script: Path, options: list[str], pass_fds: list[int]) -> Processes:
    process = subprocess.Popen(
        [sys.executable, "-P", str(script), *options],  # -P: no module of this folder may hide another one
        pass_fds=pass_fds,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **ENVIRONMENT},
        process_group=0,  # Ctrl-C must reach this process alone: a killed child would make a verdict wrong
    )
    return Processes(process)
