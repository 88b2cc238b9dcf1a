"""Environments: they answer a model's text with a verdict or an observation.

An environment takes and returns text, not tokens, and its state is used once.
`Environment(reset, step)`: `reset(task) -> state`; `step(state, turn) -> (state,
Step)`. A step either ends the rollout with a verdict or continues it with an
observation, which the rollout loop appends as forced tokens.

A verifier that fails costs its attempt the reward and is counted. It stops the run only
if it fails all the time: see `Failures`.
"""

from __future__ import annotations

import contextlib
import math
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from jaxreason.types import Task, Verdict

VERIFIER_ERROR = "verifier error"
VERIFIER_TIMEOUT = "verifier timeout"
IN_A_ROW = 10  # consecutive failures of a verifier that stop the run
STUCK = 32  # calls of a verifier past their deadline and still running that stop the run
# Name of a count -> prefixes of the verdict reasons that it counts. Prefixes after the
# first come from child processes.
COUNTED = {
    "verifier_errors": (VERIFIER_ERROR, "crashed", "out of memory"),
    "verifier_timeouts": (VERIFIER_TIMEOUT, "timeout"),
    "bad_keys": ("bad key",),
}


class Turn(NamedTuple):
    """Text that the model wrote since the last observation."""

    text: str
    stop: str  # why it stopped, one of sampler.STOPS
    final: bool  # no room is left for an observation: the step must give a verdict


class Step(NamedTuple):
    """Result of a turn; exactly one of `verdict` and `observation` is set."""

    verdict: Verdict | None = None
    observation: str | None = None
    failure: str = ""  # the traceback, if a verifier failed


class VerifierFailed(Exception):
    """A verifier failed all the time; `traceback` is that of the first failure in a
    row.
    """

    def __init__(self, message: str, traceback: str):
        super().__init__(message)
        self.traceback = traceback


class Failures:
    """Failure counts of one environment's verifier; raises VerifierFailed on too many.

    Too many is `IN_A_ROW` consecutive failed steps, or `STUCK` calls that were given up
    but still run, since Python can't end their threads.
    """

    def __init__(self, name: str):
        self.name, self.in_a_row, self.first = f"verifier {name!r}" if name else "the verifier", 0, ""
        self.stuck: list[threading.Thread] = []

    def hear(self, step: Step) -> None:
        self.in_a_row = self.in_a_row + 1 if step.failure else 0
        if self.in_a_row == 1:
            self.first = step.failure
        if self.in_a_row >= IN_A_ROW:
            raise VerifierFailed(
                f"{self.name} failed {self.in_a_row} times in a row, last with {step.verdict.reason!r}", self.first
            )

    def give_up(self, thread: threading.Thread) -> None:
        self.stuck = [other for other in self.stuck if other.is_alive()] + [thread]
        if len(self.stuck) >= STUCK:
            raise VerifierFailed(f"{len(self.stuck)} calls of {self.name} run without end", stack(thread))


class Environment(NamedTuple):
    """`step` is called from several threads at once, each with its own rollout."""

    reset: Callable[[Task], Any]
    step: Callable[[Any, Turn], tuple[Any, Step]]
    one_turn: bool = False  # every step gives a verdict, so a slot is free once its text is handed over
    deadline_s: float | None = None  # seconds per step; a later attempt is given up with reward 0
    failures: Failures | None = None
    name: str = ""  # of its verifier


def single_turn(
    verify: Callable[[str, Task], Verdict],
    must_finish: bool = False,
    deadline_s: float | None = 60.0,
    name: str = "",
) -> Environment:
    """Make an environment in which the model writes once and is judged.

    A verifier that fails costs its attempt a wrong verdict, not the run. It fails if it
    raises (`sys.exit` too), returns anything but a Verdict with a finite reward, or
    takes more than `deadline_s` seconds. Use None for a verifier that enforces its own
    limit. A late verifier keeps running in its thread, which Python can't end. The
    deadline can't interrupt C code that holds the interpreter lock, such as a regular
    expression that backtracks forever (verifier `format` runs those in a child
    process).

    With `must_finish` an attempt that was cut off at its limit is wrong. Otherwise a
    verifier that falls back on the last number of a text would reward the number at
    which the cut happened.

    Raises:
      ValueError: the deadline is not above 0.
    """
    if deadline_s is not None and not deadline_s > 0:
        raise ValueError(f"verifier.deadline_s got {deadline_s}; allowed: seconds above 0, or None for no deadline")

    def step(task, turn):
        if must_finish and turn.stop == "limit":
            return task, Step(verdict=Verdict(0.0, False, None, "cut off"))
        try:
            return task, Step(verdict=checked(verify(turn.text, task)))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit in a verifier must not end the run in silence
            return task, Step(verdict=failed(VERIFIER_ERROR, name, told(error)), failure=traceback_of(error))

    return Environment(lambda task: task, step, one_turn=True, deadline_s=deadline_s, failures=Failures(name), name=name)


def failed(what: str, name: str, why: str) -> Verdict:
    """Make the verdict of an attempt whose verifier failed; `name` may be empty."""
    return Verdict(0.0, False, None, f"{what} of {name!r}: {why}" if name else f"{what}: {why}")


def checked(verdict: Any) -> Verdict:
    """Return a verdict with plain Python values.

    Raises:
      TypeError, ValueError: not a Verdict, a field of the wrong type, or a reward that
        is not finite or above `LARGEST`.
    """
    if not isinstance(verdict, Verdict):
        raise TypeError(f"returned a {type(verdict).__name__}; allowed: a jaxreason.types.Verdict")
    allowed = {"reward": (int, float, np.number), "correct": (bool, np.bool_), "parsed": (str, type(None)), "reason": (str,)}
    for field, types in allowed.items():
        if not isinstance(value := getattr(verdict, field), types) or (field == "reward" and isinstance(value, bool)):
            raise TypeError(f"returned a Verdict whose {field} is a {type(value).__name__}; allowed: {types[0].__name__}")
    reward = float(verdict.reward)
    if not math.isfinite(reward) or abs(reward) > LARGEST:
        raise ValueError(f"returned a Verdict whose reward is {reward}; allowed: a finite number of at most {LARGEST:g}")
    return Verdict(reward, bool(verdict.correct), verdict.parsed, verdict.reason)


LARGEST = 1e9  # largest reward; its square is far below the largest float32


def told(error: BaseException) -> str:
    """Describe an error in one short line, even if its `str` raises."""
    try:
        words = " ".join(str(error).split())[:300]
    except BaseException:
        words = "an error without words"
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def traceback_of(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except BaseException:
        return told(error)


def stack(thread: threading.Thread) -> str:
    """Return the current stack of a thread as text."""
    frame = sys._current_frames().get(thread.ident)
    return "".join(traceback.format_stack(frame)) if frame is not None else "the thread has ended\n"


def late(environment: Environment, thread: threading.Thread) -> Step:
    """Make the step of an attempt whose environment missed its deadline.

    Also record its thread, which still runs, with the environment's failures.
    """
    where = stack(thread)
    if environment.failures is not None:
        environment.failures.give_up(thread)
    verdict = failed(VERIFIER_TIMEOUT, environment.name, f"no verdict in {environment.deadline_s:g} s")
    return Step(verdict=verdict, failure=f"{verdict.reason}; it was here:\n{where}")


def count_failures(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Count the verdicts that come from a failure, not from the answer.

    The counts are those of `COUNTED`.
    """
    reasons = [verdict.reason for verdict in verdicts]
    return {name: sum(reason.startswith(starts) for reason in reasons) for name, starts in COUNTED.items()}


def verifier_failed(verdict: Verdict) -> bool:
    counts = count_failures([verdict])
    return bool(counts["verifier_errors"] or counts["verifier_timeouts"])


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
