"""The processes of one sandbox: started, and ended to the last one.

One thread starts all of them: bwrap ends with the thread that started it
(`--die-with-parent`), and a caller's thread may end before the run does.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from jaxreason.sandbox import bwrap

START_S = 60.0  # for the first sign of life; on an idle machine it takes 50 ms
GONE_S = 10.0  # for the kernel to end all processes of a sandbox


class Processes:
    """Processes that end together: a process namespace, or else a process group with a
    folder, which is removed with it.
    """

    def __init__(self, popen: subprocess.Popen, first: int | None = None, folder: str = ""):
        self.popen, self.folder = popen, folder
        self._lock = threading.Lock()
        self._first = first  # descriptor of the namespace's first process, which ends after all the others

    def kill(self) -> None:
        """Send the signal that ends all; from any thread, and more than once."""
        with self._lock, contextlib.suppress(OSError):
            if self._first is not None:
                signal.pidfd_send_signal(self._first, signal.SIGKILL)
            elif self.folder and self.popen.returncode is None:
                os.killpg(self.popen.pid, signal.SIGKILL)

    def end(self) -> int:
        """End all, wait until they are gone, and return the exit status."""
        self.kill()
        with self._lock:
            first, self._first = self._first, None
        if first is not None:
            os.close(first)
            with contextlib.suppress(subprocess.TimeoutExpired):  # bwrap ends once it has reaped the first process
                return self.popen.wait(GONE_S)
        self.popen.kill()
        status = self.popen.wait()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
        return status

    def ran_out(self, wait_s: float) -> bool:
        """Tell whether the kernel ended it for its CPU time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self.popen.wait(wait_s)
            return any(status in (128 + number, -number) for number in (signal.SIGXCPU, signal.SIGPROF))
        return False


def start_namespace(arguments: Sequence[str], pass_fds: Sequence[int], output: int, **options) -> Processes:
    """Start Python in bwrap; `options` are those of `bwrap.argv`.

    Raises:
      OSError: it does not start.
    """
    filter_fd, (read, write) = bwrap.filter_file(), os.pipe()
    try:
        command = bwrap.argv(arguments, filter_fd, info_fd=write, **options)
        fds = [*pass_fds, filter_fd, write]
        popen = STARTER.popen(
            command, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        os.close(write)
        write = -1
        return Processes(popen, _first(read))
    finally:
        for fd in (filter_fd, read, write):
            if fd >= 0:
                os.close(fd)


def _first(info: int) -> int | None:
    """Return a descriptor of the process that bwrap says is the first; None if bwrap
    ends before it says so.
    """
    said = b""
    poll = select.poll()
    poll.register(info, select.POLLIN)
    while poll.poll(START_S * 1000) and (part := os.read(info, 4096)):
        said += part
    try:
        return os.pidfd_open(json.loads(said)["child-pid"])
    except (ValueError, KeyError, OSError, AttributeError):  # before Linux 5.3 there is no such descriptor
        return None


def start_group(arguments: Sequence[str], pass_fds: Sequence[int], output: int) -> Processes:
    """Start Python as a process group in a folder of its own, with no environment.

    Raises:
      OSError: it does not start.
    """
    folder = tempfile.mkdtemp(prefix="jaxreason-")
    try:
        popen = STARTER.popen(
            [os.path.realpath(sys.executable), *arguments],
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=folder,
            env={**bwrap.variables(), "HOME": folder, "TMPDIR": folder},
        )
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Processes(popen, folder=folder)


class Starter:
    """One thread that lives as long as this process."""

    def __init__(self):
        self._lock, self._calls = threading.Lock(), None

    def popen(self, command: Sequence[str], **options) -> subprocess.Popen:
        with self._lock:
            if self._calls is None:
                self._calls = queue.SimpleQueue()
                threading.Thread(target=self._work, args=(self._calls,), daemon=True, name="sandbox").start()
        future: Future = Future()
        self._calls.put((future, command, options))
        return future.result()

    @staticmethod
    def _work(calls: queue.SimpleQueue) -> None:
        while True:
            future, command, options = calls.get()
            try:
                future.set_result(subprocess.Popen(command, **options))
            except BaseException as error:
                future.set_exception(error)


STARTER = Starter()
os.register_at_fork(after_in_child=STARTER.__init__)  # a fork has none of its parent's threads
