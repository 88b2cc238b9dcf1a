"""A living interpreter in a sandbox, seen from outside: requests and answers over a
socket, output over a pipe. Both are read with a bound and a deadline, and nothing that
comes out of them is trusted.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxreason.sandbox.processes import START_S, Processes

LONGEST_FRAME = 8 << 20  # bytes of one answer; as hostile JSON it takes 20 times that in memory
FLOOD = 1000  # a program that prints this many times what is kept is ended
REASONS = ("", "error", "timeout", "out of memory", "crashed")  # that may come from inside


class Result(NamedTuple):
    """Result of a program; `reason` is "" if it ended well, else error (it raised),
    timeout, out of memory, crashed, or too much output.
    """

    stdout: str  # standard output and error, cut
    error: str  # the last line of the traceback, or ""
    reason: str


class Lost(Exception):
    """The interpreter is gone; the message is a reason of `Result`."""


class Session:
    """An interpreter in a sandbox, whose names are kept between calls. Made by
    `Sandbox.session`. One call runs at a time; `close` ends it from any thread.
    """

    def __init__(self, processes: Processes, control: socket.socket, output: int, timeout_s: float, max_output: int):
        self._processes, self._control, self._output = processes, control, output
        self.timeout_s, self.max_output = timeout_s, max_output
        self._heard, self._kept, self._printed, self.alive = bytearray(), bytearray(), 0, True
        self._lock = threading.RLock()
        control.setblocking(False)
        os.set_blocking(output, False)

    @property
    def ready(self) -> bool:
        """Tell whether its first process still runs."""
        return self.alive and self._processes.popen.poll() is None

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
            if not isinstance(error, str) or reason not in REASONS:
                raise self._lost("crashed")
        except Lost as lost:
            error, reason = "", str(lost)
        return Result(self._text(), error[: self.max_output], reason)

    def ask(
        self,
        request: dict[str, Any],
        timeout_s: float | None = None,
        answer: Callable[[dict], dict] | None = None,
    ) -> dict[str, Any]:
        """Send a request and return the reply; `answer` answers questions of `kind`
        "call" in between. `timeout_s` is wall time; a request may hold `cpu_s`, CPU
        time, by default the same.

        Raises:
          Lost: no answer; the sandbox is closed.
        """
        with self._lock:
            return self._ask(request, self.timeout_s if timeout_s is None else timeout_s, answer)

    def _ask(self, request: dict[str, Any], timeout_s: float, answer: Callable[[dict], dict] | None) -> dict[str, Any]:
        if not self.alive:
            raise Lost("crashed")
        deadline = time.monotonic() + timeout_s
        self._kept, self._printed = bytearray(), 0
        try:
            self._send({"cpu_s": timeout_s, **request}, deadline)
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
        self._processes.kill()  # ends a call in another thread
        with self._lock:
            if self.alive:
                self.alive = False
                self._processes.end()
                self._control.close()
                os.close(self._output)

    def _text(self) -> str:
        text = self._kept.decode(errors="replace")
        return text if self._printed <= self.max_output else f"{text}... ({self._printed} bytes, cut)"

    def _lost(self, reason: str) -> Lost:
        """Close the sandbox and make the exception that says so."""
        if reason == "crashed" and self.alive:
            reason = "timeout" if self._processes.ran_out(0.5) else reason  # it may have closed its socket and live on
            with contextlib.suppress(OSError, Lost):
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


def start(begin: Callable[[socket.socket, int], Processes], timeout_s: float, max_output: int) -> Session:
    """Start a session; `begin` starts its processes with their socket and output.

    Raises:
      RuntimeError: it does not start.
    """
    try:
        with contextlib.ExitStack() as lent, contextlib.ExitStack() as kept:
            ours, theirs = socket.socketpair()
            kept.callback(ours.close)
            lent.callback(theirs.close)
            read, write = os.pipe()
            kept.callback(os.close, read)
            lent.callback(os.close, write)
            processes = begin(theirs, write)
            kept.pop_all()
    except OSError as error:
        raise RuntimeError(f"a sandbox did not start: {error}") from None
    session = Session(processes, ours, read, timeout_s, max_output)
    try:
        session._receive(time.monotonic() + START_S)
    except (Lost, OSError, ValueError) as error:
        if session.alive:
            session._hear_output()
            session.close()
        said = " ".join(session._kept.decode(errors="replace").split())[-300:]
        raise RuntimeError(f"a sandbox did not start: {said or error}; are its limits too small?") from None
    return session
