"""The processes of one sandbox: started, and ended to the last one.

If this process dies, the first process of the namespace sees that its socket is closed
and ends (`inside.be_first`). bwrap's `--die-with-parent` is not used: it ends a sandbox
with the thread that started it, and leaves a process if the parent dies while bwrap
starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

from jaxreason.sandbox import bwrap
from jaxreason.sandbox.inside import empty

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
            remove(self.folder)
        return status

    def ran_out(self, wait_s: float) -> bool:
        """Tell whether the kernel ended it for its CPU time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self.popen.wait(wait_s)
            return any(status in (128 + number, -number) for number in (signal.SIGXCPU, signal.SIGPROF))
        return False


def remove(folder: str) -> None:
    """Remove a folder in which a program has worked. What can't be removed is left."""
    with contextlib.suppress(OSError):
        os.chmod(folder, 0o700)
        empty(folder)
        os.rmdir(folder)


def start_namespace(arguments: Sequence[str], pass_fds: Sequence[int], output: int, **options) -> Processes:
    """Start Python in bwrap; `options` are those of `bwrap.argv`.

    Raises:
      OSError: it does not start.
    """
    with contextlib.ExitStack() as opened:
        opened.callback(os.close, filter_fd := bwrap.filter_file())
        info = os.memfd_create("info")  # of a pipe bwrap could die while it starts, if we do
        opened.callback(os.close, info)
        command = bwrap.argv(arguments, filter_fd, info_fd=info, **options)
        fds = [*pass_fds, filter_fd, info]
        popen = subprocess.Popen(
            command, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            return Processes(popen, _first(info, popen))
        except BaseException:
            popen.kill()  # the caller closes the socket, at which the first process of the namespace ends
            popen.wait()
            raise


def _first(info: int, popen: subprocess.Popen) -> int | None:
    """Return a descriptor of the process that bwrap says is the first; None if bwrap
    ends before it says so.

    Raises:
      OSError: too many descriptors are open.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        ended = popen.poll() is not None
        with contextlib.suppress(ValueError, KeyError):  # nothing or not all is written
            try:
                return os.pidfd_open(json.loads(os.pread(info, 4096, 0))["child-pid"])
            except (ProcessLookupError, AttributeError):  # it has ended; before Linux 5.3 there is no such descriptor
                return None
        if ended:
            return None
        time.sleep(0.001)
    return None


def start_group(arguments: Sequence[str], pass_fds: Sequence[int], output: int) -> Processes:
    """Start Python as a process group in a folder of its own, with no environment.

    Raises:
      OSError: it does not start.
    """
    folder = tempfile.mkdtemp(prefix="jaxreason-")
    try:
        popen = subprocess.Popen(
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
        os.rmdir(folder)  # it is empty; to list it would take a descriptor, which may be what is missing
        raise
    return Processes(popen, folder=folder)
