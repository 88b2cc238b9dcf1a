"""A living interpreter in a sandbox, seen from outside.

One thread starts all sandboxes: bwrap ends with the thread that started it, and a
caller's thread may end before the run does.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

START_S = 60.0  # for the first sign of life; on an idle machine it takes 50 ms
LONGEST_FRAME = 64 << 20  # bytes of one answer of a program
FLOOD = 1000  # a program that prints this many times what is kept is ended
GONE_S = 10.0  # for the kernel to end all processes of a sandbox


class Result(NamedTuple):
    """What a program did; `reason` is "" if it ended well, else error (it raised),
    timeout, out of memory, crashed, or too much output.
    """

    stdout: str  # standard output and error, cut
    error: str  # the last line of the traceback, or ""
    reason: str


class Lost(Exception):
    """The interpreter is gone; the message is a reason of `Result`."""


class Session:
    """An interpreter in a sandbox, whose names are kept between calls. Made by
    `Sandbox.session`; used by one thread at a time.
    """

    def __init__(
        self, process: subprocess.Popen, control: socket.socket, output: int, timeout_s: float, max_output: int, folder: str
    ):
        self._process, self._control, self._output, self._folder = process, control, output, folder
        self.timeout_s, self.max_output = timeout_s, max_output
        self._heard, self._kept, self._printed, self.alive = bytearray(), bytearray(), 0, True
        control.setblocking(False)
        os.set_blocking(output, False)

    def run(self, code: str, timeout_s: float | None = None) -> Result:
        """Run code in the interpreter and print the value of a last expression, as a
        notebook does. Past its time, or if it ends its process, the session is lost.
        """
        return self.result({"do": "run", "code": code, "fork": False, "echo": True}, timeout_s)

    def result(
        self, request: dict[str, Any], timeout_s: float | None = None, answer: Callable[[dict], dict] | None = None
    ) -> Result:
        """Ask and return what came of it, whatever that is."""
        try:
            reply = self.ask(request, timeout_s, answer=answer)
            error, reason = reply.get("error"), reply.get("reason")
            if not (isinstance(error, str) and isinstance(reason, str)):
                raise self._lost("crashed")
        except Lost as lost:
            error, reason = "", str(lost)
        return Result(self._text(), error[: self.max_output], reason)

    def ask(
        self,
        request: dict[str, Any],
        timeout_s: float | None = None,
        cpu_s: float | None = None,
        answer: Callable[[dict], dict] | None = None,
    ) -> dict[str, Any]:
        """Send a request and return the reply; `answer` answers questions of `kind`
        "call" in between. `timeout_s` is wall time; `cpu_s` is CPU time, by default the
        same.

        Raises:
          Lost: no answer; the sandbox is closed.
        """
        if not self.alive:
            raise Lost("crashed")
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        self._kept, self._printed = bytearray(), 0
        try:
            self._send({"cpu_s": timeout_s if cpu_s is None else cpu_s, **request}, deadline)
            reply = self._receive(deadline)
            while answer is not None and reply.get("kind") == "call":
                self._send(answer(reply), deadline)
                reply = self._receive(deadline)
        except (OSError, ValueError, RecursionError):
            raise self._lost("crashed") from None
        except BaseException:
            self.close()
            raise
        with contextlib.suppress(OSError):
            self._hear_output()
        return reply

    def close(self) -> None:
        """End every process of the sandbox, and wait until they are gone."""
        if not self.alive:
            return
        self.alive = False
        _kill(self._process, group=bool(self._folder))
        self._process.wait()
        self._control.close()
        with contextlib.suppress(OSError):  # the first process of the namespace holds the output, and ends last
            deadline = time.monotonic() + (0.0 if self._folder else GONE_S)
            while time.monotonic() < deadline and self._hear_output():
                _wait([(self._output, select.POLLIN)], deadline)
        os.close(self._output)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _text(self) -> str:
        text = self._kept.decode(errors="replace")
        return text if self._printed <= self.max_output else f"{text}... ({self._printed} bytes, cut)"

    def _lost(self, reason: str) -> Lost:
        """Close the sandbox and make the exception that says so."""
        if reason == "crashed" and self.alive:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may have closed its socket and live on
                code = self._process.wait(0.5)
                reason = "timeout" if code in (128 + signal.SIGXCPU, -signal.SIGXCPU) else reason
            with contextlib.suppress(OSError):
                self._hear_output()
        self.close()
        return Lost(reason)

    def _send(self, message: dict[str, Any], deadline: float) -> None:
        body = json.dumps(message).encode()
        data = memoryview(len(body).to_bytes(4, "big") + body)
        while data:
            try:
                data = data[self._control.send(data) :]
            except BlockingIOError:
                self._listen(deadline, select.POLLOUT)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while True:
            length = int.from_bytes(self._heard[:4], "big") if len(self._heard) >= 4 else 0
            if length > LONGEST_FRAME:
                raise self._lost("too much output")
            if length and len(self._heard) >= 4 + length:
                frame = bytes(self._heard[4 : 4 + length])
                del self._heard[: 4 + length]
                message = json.loads(frame)
                if not isinstance(message, dict):
                    raise ValueError("a frame that is no object")
                return message
            self._listen(deadline, select.POLLIN)
            try:
                part = self._control.recv(1 << 20)
            except BlockingIOError:
                continue
            if not part:
                raise OSError("the socket is closed")
            self._heard += part

    def _listen(self, deadline: float, event: int) -> None:
        """Wait until the socket is ready; read the output meanwhile."""
        watched = [(self._control.fileno(), event), (self._output, select.POLLIN)]
        while True:
            ready = _wait(watched, deadline)
            if not ready:
                raise self._lost("timeout")
            if self._output in ready and not self._hear_output():
                watched = watched[:1]  # closed by the program
            if self._control.fileno() in ready:
                return
            if time.monotonic() > deadline:
                raise self._lost("timeout")

    def _hear_output(self) -> bool:
        """Read what is printed, keep its beginning; return False at its end.

        Raises:
          Lost: the program prints without end.
        """
        for _ in range(64):
            try:
                part = os.read(self._output, 1 << 16)
            except BlockingIOError:
                return True
            if not part:
                return False
            self._kept += part[: self.max_output - len(self._kept)]
            self._printed += len(part)
            if self._printed > FLOOD * max(self.max_output, 1000) and self.alive:
                raise self._lost("too much output")
        return True


def _wait(watched: Sequence[tuple[int, int]], deadline: float) -> list[int]:
    """Return the descriptors that are ready; none at the deadline."""
    poll = select.poll()
    for fd, event in watched:
        poll.register(fd, event)
    return [fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]


def _kill(process: subprocess.Popen, group: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL) if group else process.kill()


# --- the thread that starts sandboxes ---


class _Starter:
    """One thread that lives as long as this process."""

    def __init__(self):
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self._calls: queue.SimpleQueue | None = None

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


STARTER = _Starter()
os.register_at_fork(after_in_child=STARTER.__init__)  # a fork has no thread of its parent's


def start(
    command: Callable[[int], list[str]], pass_fds: Sequence[int], timeout_s: float, max_output: int, folder: str = ""
) -> Session:
    """Start a session; `command` makes the command line of the number of its socket.
    With a `folder` the session is a process group, and removes the folder at its end.

    Raises:
      RuntimeError: it does not start.
    """
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    try:
        process = STARTER.popen(
            command(theirs.fileno()),
            pass_fds=[theirs.fileno(), *pass_fds],
            stdin=subprocess.DEVNULL,
            stdout=write,
            stderr=write,
            start_new_session=True,
            **({"cwd": folder, "env": {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder}} if folder else {}),
        )
    except OSError as error:
        ours.close()
        os.close(read)
        raise RuntimeError(f"a sandbox did not start: {error}") from None
    finally:
        theirs.close()
        os.close(write)
    session = Session(process, ours, read, timeout_s, max_output, folder)
    try:
        ready = session._receive(time.monotonic() + START_S)
    except (Lost, OSError, ValueError) as error:
        session._kept += b""
        with contextlib.suppress(OSError, Lost):
            session._hear_output() if session.alive else None
        session.close()
        said = " ".join(session._kept.decode(errors="replace").split())[-300:]
        raise RuntimeError(f"a sandbox did not start: {said or error}; are its limits too small?") from None
    assert ready == {"kind": "ready"}
    return session
