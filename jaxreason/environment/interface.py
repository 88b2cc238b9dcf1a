"""The contract between the rollout loop and environments: a turn of the model goes in,
a verdict or an observation comes out.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxreason.types import Message, Task, Verdict

IN_A_ROW = 10  # consecutive failures of a verifier or a tool that stop the run
STUCK = 32  # calls past their deadline and still running that stop the run


class Turn(NamedTuple):
    """Text that the model wrote since the last observation."""

    text: str
    stop: str  # why it stopped, one of sampler.STOPS
    final: bool  # no room is left for an observation: the step must give a verdict
    tokens: int | None = None  # tokens that the model has sampled in the rollout so far; None: unknown


class Step(NamedTuple):
    """Result of a turn; exactly one of `verdict` and `observation` is set.

    An observation that is a text continues the model's own turn. Messages are turns of
    others, which the format renders with the chat template's role markers; the model
    then begins a new turn.
    """

    verdict: Verdict | None = None
    observation: str | Sequence[Message] | None = None
    failure: str = ""  # the traceback, if a verifier or a tool failed


class Stop(NamedTuple):
    """A text that ends the model's turn and remains in it."""

    text: str
    after: str = ""  # if given, only where `after` has been opened since the last `text`: "=" after "["

    def ends(self, turn: str) -> bool:
        """Tell whether it has ended a turn, given the turn's text."""
        if not self.after:
            return self.text in turn
        start = turn.find(self.after)
        return start >= 0 and self.text in turn[start + len(self.after) :]


class VerifierFailed(Exception):
    """A verifier failed all the time; `traceback` is that of the first failure in a
    row.
    """

    def __init__(self, message: str, traceback: str):
        super().__init__(message)
        self.traceback = traceback


class Failures:
    """Failure counts of one environment's verifier and tools; raises VerifierFailed on
    too many.

    Too many is `IN_A_ROW` consecutive failed steps, or `STUCK` calls that were given up
    but still run, since Python can't end their threads.
    """

    def __init__(self, name: str):
        self.name = f"verifier {name!r}" if name else "the verifier"
        self.in_a_row: dict[str, list[str]] = {}  # who failed -> tracebacks of its failures in a row
        self.stuck: list[threading.Thread] = []

    def hear(self, step: Step) -> None:
        who = self.name if step.verdict is not None else "a tool"
        failed = self.in_a_row[who] = [*self.in_a_row.get(who, []), step.failure] if step.failure else []
        if len(failed) >= IN_A_ROW:
            last = step.verdict.reason if step.verdict is not None else step.failure.strip().rpartition("\n")[2]
            raise VerifierFailed(f"{who} failed {len(failed)} times in a row, last with {last!r}", failed[0])

    def give_up(self, thread: threading.Thread) -> None:
        self.stuck = [other for other in self.stuck if other.is_alive()] + [thread]
        if len(self.stuck) >= STUCK:
            raise VerifierFailed(f"{len(self.stuck)} calls of {self.name} run without end", stack(thread))


def stack(thread: threading.Thread) -> str:
    """Return the current stack of a thread as text."""
    frame = sys._current_frames().get(thread.ident)
    return "".join(traceback.format_stack(frame)) if frame is not None else "the thread has ended\n"


def nothing_to_close(state: Any) -> None:
    """Close nothing: the default of `Environment.close`."""


class Environment(NamedTuple):
    """`step` is called from several threads at once, each with its own rollout."""

    reset: Callable[[Task], Any]
    step: Callable[[Any, Turn], tuple[Any, Step]]
    one_turn: bool = False  # every step gives a verdict, so a slot is free once its text is handed over
    deadline_s: float | None = None  # seconds per step; a later attempt is given up with reward 0
    failures: Failures | None = None
    name: str = ""  # of its verifier
    stops: tuple[Stop, ...] = ()  # what ends a turn besides the end-of-sequence token
    close: Callable[[Any], None] = nothing_to_close  # called once per rollout with the last state, at its end or at the run's
