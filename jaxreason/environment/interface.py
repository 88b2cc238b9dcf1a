"""The contract between the rollout loop and environments: a turn of the model goes in,
a verdict or an observation comes out.
"""

from __future__ import annotations

import functools
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jaxreason.environment.verdicts import verifier_failed
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
    after: str = ""  # if given, only behind this text: "=" after "["
    barred: str = ""  # characters that may not be between them: a "]" closes the "["

    def end(self, turn: str) -> int | None:
        """Return where it is first complete in the text of a turn, None if nowhere."""
        found = pattern_of(self).search(turn)
        return None if found is None else found.end()


@functools.cache
def pattern_of(stop: Stop) -> re.Pattern:
    """Compile a stop. Each character is read once or twice, whatever the text."""
    if not stop.after:
        return re.compile(re.escape(stop.text))
    between = f"[^{re.escape(stop.barred)}]" if stop.barred else "."
    after = re.escape(stop.after)
    return re.compile(f"{after}(?:(?!{after}){between})*?{re.escape(stop.text)}", re.DOTALL)


def end_of_turn(stops: Iterable[Stop], turn: str) -> int | None:
    """Return where the first of some stops is complete in the text of a turn."""
    return min((end for stop in stops if (end := stop.end(turn)) is not None), default=None)


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
            told = step.verdict is not None and verifier_failed(step.verdict)
            last = step.verdict.reason if told else step.failure.strip().rpartition("\n")[2]
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
    """`reset`, `step` and `close` are called from several threads at once, each with
    its own rollout. An error in them costs the rollout its reward: see `Playing`.
    """

    reset: Callable[[Task], Any]
    step: Callable[[Any, Turn], tuple[Any, Step]]
    one_turn: bool = False  # every step gives a verdict, so a slot is free once its text is handed over
    deadline_s: float | None = None  # seconds per step, the first with its reset; a later attempt is given up with reward 0
    failures: Failures | None = None
    name: str = ""  # of its verifier
    stops: tuple[Stop, ...] = ()  # what ends a turn besides the end-of-sequence token
    # Called with the last state at the rollout's end or the run's: once, and again with
    # a newer state if a step or reset that was given up makes one later.
    close: Callable[[Any], None] = nothing_to_close


def check_environment(made: Environment) -> Environment:
    """Return an environment whose fields have the right types.

    Raises:
      ValueError: one has not.
    """
    for field in ("reset", "step", "close"):
        if not callable(value := getattr(made, field)):
            raise ValueError(f"{field} got {value!r:.80}; allowed: a function")
    if not isinstance(made.stops, tuple) or not all(isinstance(stop, Stop) and stop.text for stop in made.stops):
        raise ValueError(f"stops got {made.stops!r:.80}; allowed: a tuple of Stop(text), none of them empty")
    check_deadline("deadline_s", made.deadline_s)
    return made


def check_deadline(where: str, seconds: Any) -> None:
    """Raise ValueError for seconds that are not above 0; None is no deadline."""
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if seconds is not None and not (number and seconds > 0):
        raise ValueError(f"{where} got {seconds!r}; allowed: seconds above 0, or None for no deadline")
