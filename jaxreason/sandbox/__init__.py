"""A sandbox for Python that a model wrote: `Sandbox.run` runs a program and returns a
`Result`, whatever the program does; `Sandbox.session` is an interpreter that keeps its
names between calls.

Threat model: the program is hostile, and may read, compute and print whatever it likes
inside. With backend `bwrap` it must not read the user's files or environment, write
outside its own /tmp, reach a network or another process, outlive its time, or leave a
process or a file. It has no network, a read-only system, a /tmp of its own with limits
of size and of the number of files (one per 4 KB), no /proc, a session and a process
namespace of its own, no capability and no way to a further user namespace; a filter
refuses the system calls in `seccomp`; limits hold for CPU time, memory, processes, file
size and open files; its output is read with a bound.

Not held: faults of the kernel and of the processor (side channels); the load on a
shared machine within the limits (`processes` x `memory_mb` plus `files_mb` of memory,
`processes` cores until the deadline); and what /usr holds, which it may read. A hostile
program may also say whatever it likes: its output is a claim, not a measurement.

Backend `rlimits` is for machines where bubblewrap can't be had: see `Sandbox`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxreason.sandbox import bwrap
from jaxreason.sandbox.processes import Processes, start_group, start_namespace
from jaxreason.sandbox.session import Lost, Result, Session, start

__all__ = ["Lost", "Result", "Sandbox", "Session", "shared", "start_script"]

INSIDE = Path(__file__).with_name("inside.py").read_text()
NUMBERS = itertools.count()


class Sandbox:
    """A maker of sandboxes with the same limits; safe to use from several threads.

    `warm` sessions are started ahead, by a thread, so that a run or session begins at
    once.

    Backend `rlimits` sets the same limits on a child process in an empty folder with an
    empty environment, and kills its process group. It holds accidents: endless loops,
    memory, output. It does NOT stop a program from reading and writing the user's
    files, using the network, looking at or signalling the user's processes, or leaving
    a process that has made a session of its own. `processes` counts all processes of
    the user, and for root there is no such limit; files are limited one by one.

    Raises:
      ValueError: a limit that is not positive, a package that is not installed, or a
        backend that can't be had here.
    """

    def __init__(
        self,
        backend: str = "bwrap",  # or "rlimits"
        timeout_s: float = 5.0,  # wall time per run or call
        memory_mb: int = 512,  # address space per process
        processes: int = 8,  # at the same time, threads included
        files_mb: int = 64,  # in /tmp, and of one file
        max_output: int = 10_000,  # bytes that are kept of a run's output
        session_cpu_s: int = 600,  # CPU time per process over a session's whole life
        packages: tuple[str, ...] = (),  # importable besides the standard library: numpy
        warm: int = 0,  # sessions that are started ahead
    ):
        numbers = {"timeout_s": timeout_s, "memory_mb": memory_mb, "processes": processes, "files_mb": files_mb}
        for name, number in {**numbers, "max_output": max_output, "session_cpu_s": session_cpu_s}.items():
            if not number > 0:
                raise ValueError(f"sandbox got {name}={number}; allowed: above 0")
        bwrap.check(backend)
        self.backend, self.timeout_s, self.max_output, self._files_mb = backend, timeout_s, max_output, files_mb
        self._packages = {name: package_folders(name) for name in packages}
        self._options = {
            "memory_mb": memory_mb,
            "processes": processes if backend == "bwrap" else processes + used_processes(),
            "files_mb": files_mb,
            "session_cpu_s": session_cpu_s,
            "imports": list(packages),
            "alone": backend == "bwrap",
        }
        self._warm, self._ready, self._filling, self._lock, self._pid = warm, [], 0, threading.Lock(), os.getpid()
        self._fill()

    def run(self, code: str, stdin: str = "", timeout_s: float | None = None, max_output: int | None = None) -> Result:
        """Run a program in a fresh sandbox, as `python program.py < stdin` would."""
        session = self.session()
        try:
            session.max_output = self.max_output if max_output is None else max_output
            return session.result({"do": "run", "code": code, "stdin": stdin, "fork": True}, timeout_s)
        finally:
            session.close()

    def session(self) -> Session:
        """Return a new session, a warm one if there is one; the caller closes it.

        Raises:
          RuntimeError: it does not start.
        """
        if os.getpid() != self._pid:  # a fork must not use its parent's sessions
            self._ready, self._filling, self._lock, self._pid = [], 0, threading.Lock(), os.getpid()
        with self._lock:
            session = self._ready.pop() if self._ready else None
        self._fill()
        if session is not None and not session.ready:  # ended by someone else, as by the kernel when memory is short
            session.close()
            session = None
        return session if session is not None else self._start()

    def close(self) -> None:
        """End the sessions that wait."""
        with self._lock:
            self._warm, ready, self._ready = 0, self._ready, []
        for session in ready:
            session.close()

    def _fill(self) -> None:
        with self._lock:
            missing = self._warm - len(self._ready) - self._filling
            self._filling += max(0, missing)
        if missing > 0:
            try:
                threading.Thread(target=self._fill_now, args=(missing,), daemon=True, name="sandbox warm").start()
            except RuntimeError:  # no further thread now; the next session asks again
                with self._lock:
                    self._filling -= missing

    def _fill_now(self, count: int) -> None:
        for _ in range(count):
            session = None
            with contextlib.suppress(RuntimeError):  # who asks for a session will be told
                session = self._start()
            with self._lock:
                self._filling -= 1
                keep = session is not None and len(self._ready) < self._warm
                if keep:
                    self._ready.append(session)
            if session is not None and not keep:
                session.close()

    def _start(self) -> Session:
        held = self.backend == "bwrap"
        folders = [folder for some in self._packages.values() for folder in some]
        path = [bwrap.PACKAGES] if held else sorted({str(folder.parent) for folder in folders})
        options = {**self._options, "path": path if folders else [], "uid": bwrap.uid(next(NUMBERS)) if held else 0}

        binds = {str(folder): f"{bwrap.PACKAGES}/{folder.name}" for folder in folders}

        def begin(theirs: socket.socket, output: int) -> Processes:
            fd = theirs.fileno()
            arguments = ["-I", "-S", "-c", INSIDE, str(fd), json.dumps(options)]
            if held:
                return start_namespace(arguments, [fd], output, files_mb=self._files_mb, binds=binds)
            return start_group(arguments, [fd], output)

        return start(begin, self.timeout_s, self.max_output)


def start_script(
    script: Path,
    arguments: Sequence[str],
    pass_fds: Sequence[int],
    memory_mb: int,
    environment: Mapping[str, str],
) -> Processes:
    """Start a program of ours, which reads what a model wrote, in bwrap: with the
    packages of this Python, read-only, and no limit of CPU time. It ends when the other
    side of the first of `pass_fds`, a socket, is closed.

    Raises:
      OSError: it does not start.
    """
    folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages") and os.path.isdir(path)]
    binds = {path: f"{bwrap.PACKAGES}/{number}" for number, path in enumerate(folders)}
    there = f"{bwrap.PACKAGES}/{script.name}"
    options = {"memory_mb": memory_mb, "processes": 8, "files_mb": 16, "session_cpu_s": None}
    options |= {"alone": True, "uid": bwrap.uid(next(NUMBERS))}
    command = ["-I", "-S", "-c", INSIDE, str(pass_fds[0]), json.dumps(options), "-P", there, *arguments]
    shown = {"PYTHONPATH": ":".join(binds.values()), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    with open(os.devnull, "w") as output:
        return start_namespace(
            command, pass_fds, output.fileno(), files_mb=16, binds={**binds, str(script): there}, environment=shown
        )


def package_folders(name: str) -> list[Path]:
    """Return the folders of an installed package: its own and that of its libraries."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"sandbox got package {name!r}, which is not installed; pip install {name}")
    folder = Path(spec.submodule_search_locations[0])
    return [folder, *(path for path in [folder.with_name(f"{name}.libs")] if path.is_dir())]


def used_processes() -> int:
    """Count the processes and threads of this user."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            count += len(os.listdir(folder / "task")) if folder.stat().st_uid == os.getuid() else 0
    return count


@functools.cache
def shared(backend: str = "bwrap", **options) -> Sandbox:
    """Return the one sandbox with these settings, closed at exit."""
    sandbox = Sandbox(backend, **options)
    atexit.register(sandbox.close)
    return sandbox
