"""Environments: what a model's text leads to. Text in and text out, no tokens,
single-use.

`Environment(reset, step)`: `reset(task) -> state`; `step(state, turn) -> (state,
Step)`. A step either ends the rollout with a verdict or goes on with an observation,
which the rollout loop appends as forced tokens.

A verifier that misbehaves costs its attempt the reward, is counted, and stops the run
only if it does little else: see `Failures`.
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
IN_A_ROW = 10  # failures of a verifier that stop the run
STUCK = 32  # calls of a verifier that run without end, at which the run stops
# Name of a count -> how the reasons begin of the verdicts that it counts. The last of
# each are those of child processes.
COUNTED = {
    "verifier_errors": (VERIFIER_ERROR, "crashed", "out of memory"),
    "verifier_timeouts": (VERIFIER_TIMEOUT, "timeout"),
    "bad_keys": ("bad key",),
}


class Turn(NamedTuple):
    """Text that the model wrote since the last observation."""

    text: str
    stop: str  # why it stopped, one of sampler.STOPS
    final: bool  # there is no room for an observation: the step must judge


class Step(NamedTuple):
    """Exactly one of the first two is set."""

    verdict: Verdict | None = None
    observation: str | None = None
    failure: str = ""  # the traceback, if the verdict is there because a verifier failed


class VerifierFailed(Exception):
    """A verifier fails all the time; `traceback` is of the first failure in the row."""

    def __init__(self, message: str, traceback: str):
        super().__init__(message)
        self.traceback = traceback


class Failures:
    """The failures of one environment's verifier. Told of every step, it raises
    VerifierFailed when there are too many.

    Those are `IN_A_ROW` one after the other, or `STUCK` calls that are given up and
    still run: their threads can't be ended.
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
    """`step` is called from several threads at once, each on a rollout of its own."""

    reset: Callable[[Task], Any]
    step: Callable[[Any, Turn], tuple[Any, Step]]
    one_turn: bool = False  # every step gives a verdict: a slot is free as soon as its text has left it
    deadline_s: float | None = None  # of a step, after which its attempt is given up with a reward of 0
    failures: Failures | None = None
    name: str = ""  # of its verifier


def single_turn(
    verify: Callable[[str, Task], Verdict],
    must_finish: bool = False,
    deadline_s: float | None = 60.0,
    name: str = "",
) -> Environment:
    """The model writes once and is judged. A verifier that fails, a bug of its author,
    costs a wrong verdict and not the run.

    It fails if it raises (`sys.exit` too), returns anything but a Verdict with a finite
    reward, or takes more than `deadline_s` seconds; None is for one that keeps to a
    limit of its own. One that is too late is left to itself in its thread, which Python
    can't end; nor can it interrupt C code that keeps the interpreter's lock, such as a
    pattern that backtracks for ever (verifier `format` runs those in a process).

    With `must_finish` an attempt that was cut off at its limit is wrong, whatever it
    says so far: a verifier that falls back on the last number of a text would otherwise
    pay for whichever number the cut happened to leave there.

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
    """Return the verdict of an attempt whose verifier, with a name or without,
    failed.
    """
    return Verdict(0.0, False, None, f"{what} of {name!r}: {why}" if name else f"{what}: {why}")


def checked(verdict: Any) -> Verdict:
    """Return a verdict of plain Python values.

    Raises:
      TypeError, ValueError: it is none, or has a field that is none, or its reward is
        not finite.
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


LARGEST = 1e9  # reward; its square is far from the largest float32


def told(error: BaseException) -> str:
    """Describe an error in one short line; its own words may fail, too."""
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
    """Return where a thread is."""
    frame = sys._current_frames().get(thread.ident)
    return "".join(traceback.format_stack(frame)) if frame is not None else "the thread has ended\n"


def late(environment: Environment, thread: threading.Thread) -> Step:
    """Return the step of an attempt whose environment did not answer in time, and count
    its thread, which still runs.
    """
    where = stack(thread)
    if environment.failures is not None:
        environment.failures.give_up(thread)
    verdict = failed(VERIFIER_TIMEOUT, environment.name, f"no verdict in {environment.deadline_s:g} s")
    return Step(verdict=verdict, failure=f"{verdict.reason}; it was here:\n{where}")


def count_failures(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Count verdicts that say nothing of the answer: see `COUNTED`."""
    reasons = [verdict.reason for verdict in verdicts]
    return {name: sum(reason.startswith(starts) for reason in reasons) for name, starts in COUNTED.items()}


def verifier_failed(verdict: Verdict) -> bool:
    counts = count_failures([verdict])
    return bool(counts["verifier_errors"] or counts["verifier_timeouts"])


class Threads:
    """Threads that call functions; one whose call takes too long can be given up, and
    another takes its place.

    Unlike those of an executor they are daemons: the end of the program does not wait
    for them.
    """

    def __init__(self, count: int):
        self.calls: queue.SimpleQueue = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.workers: dict[Future, threading.Thread] = {}  # of the calls that run
        self.count = count
        for _ in range(count):
            self._start()

    def submit(self, function: Callable, *args) -> Future:
        """Queue a call; the future is `running()` from its start to its end."""
        future: Future = Future()
        self.calls.put((future, function, args))
        return future

    def give_up(self, future: Future) -> threading.Thread | None:
        """Replace the thread of a call and return it; None if the call has just
        ended.
        """
        with self.lock:
            thread = self.workers.pop(future, None)
        if thread is not None:
            self._start()
        return thread

    def close(self) -> None:
        """Forget the calls that have not begun and let the threads end, without waiting
        for them.
        """
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
                if self.workers.pop(future, None) is None:  # given up: another thread is in this one's place
                    return
                end(outcome)
