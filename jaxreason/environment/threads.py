"""Threads that run environments, and what becomes of a step that takes too long."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

from jaxreason.environment.interface import Environment, Step, stack
from jaxreason.environment.verdicts import VERIFIER_TIMEOUT, failed


class Threads:
    """Worker threads; one whose call takes too long can be given up and is replaced.

    Unlike an executor's threads they are daemons: the program exits without waiting for
    them.
    """

    def __init__(self, count: int):
        self.calls: queue.SimpleQueue = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.workers: dict[Future, threading.Thread] = {}  # thread of each running call
        self.count = count
        for _ in range(count):
            self._start()

    def submit(self, function: Callable, *args) -> Future:
        """Queue a call; its future is `running()` from the call's start to its end."""
        future: Future = Future()
        self.calls.put((future, function, args))
        return future

    def give_up(self, future: Future) -> threading.Thread | None:
        """Replace and return the thread of a call; return None if it just ended."""
        with self.lock:
            thread = self.workers.pop(future, None)
        if thread is not None:
            self._start()
        return thread

    def close(self) -> None:
        """Drop the queued calls and let the threads end, without waiting for them."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.calls.get_nowait()
        for _ in range(self.count):
            self.calls.put(None)

    def _start(self) -> None:
        threading.Thread(target=self._work, daemon=True, name="environment").start()

    def _work(self) -> None:
        while call := self.calls.get():
            future, function, args = call
            with self.lock:
                self.workers[future] = threading.current_thread()
            future.set_running_or_notify_cancel()
            try:
                outcome, end = function(*args), future.set_result
            except BaseException as error:
                outcome, end = error, future.set_exception
            with self.lock:
                if self.workers.pop(future, None) is None:  # given up: another thread has replaced this one
                    return
                end(outcome)


def late(environment: Environment, thread: threading.Thread) -> Step:
    """Make the step of an attempt whose environment missed its deadline.

    Also record its thread, which still runs, with the environment's failures.
    """
    where = stack(thread)
    if environment.failures is not None:
        environment.failures.give_up(thread)
    verdict = failed(VERIFIER_TIMEOUT, environment.name, f"no verdict in {environment.deadline_s:g} s")
    return Step(verdict=verdict, failure=f"{verdict.reason}; it was here:\n{where}")
