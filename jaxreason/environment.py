"""Environments: what a model's text leads to. Text in and text out, no tokens, single-use.

`Environment(reset, step)`: `reset(task) -> state`; `step(state, turn) -> (state, Step)`. A step either ends the rollout with a
verdict or goes on with an observation, which the rollout loop appends as forced tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxreason.types import Task, Verdict

VERIFIER_ERROR = "verifier error"


class Turn(NamedTuple):
    """What the model wrote since the last observation."""

    text: str
    stop: str  # why it stopped, one of sampler.STOPS
    final: bool  # there is no room for an observation: the step must judge


class Step(NamedTuple):
    """Exactly one of the two is set."""

    verdict: Verdict | None = None
    observation: str | None = None


class Environment(NamedTuple):
    """`step` is called from several threads at once, each on a rollout of its own."""

    reset: Callable[[Task], Any]
    step: Callable[[Any, Turn], tuple[Any, Step]]
    one_turn: bool = False  # every step gives a verdict: a slot is free as soon as its text has left it


def single_turn(verify: Callable[[str, Task], Verdict], must_finish: bool = False) -> Environment:
    """The model writes once and is judged. A verifier that raises, a bug of its author, costs a wrong verdict and not the run.

    With `must_finish` an attempt that was cut off at its limit is wrong, whatever it says so far: a verifier that falls back on
    the last number of a text would otherwise pay for whichever number the cut happened to leave there.
    """

    def step(task, turn):
        if must_finish and turn.stop == "limit":
            return task, Step(verdict=Verdict(0.0, False, None, "cut off"))
        try:
            verdict = verify(turn.text, task)
        except Exception as error:
            verdict = Verdict(0.0, False, None, f"{VERIFIER_ERROR}: {type(error).__name__}: {error}")
        return task, Step(verdict=verdict)

    return Environment(reset=lambda task: task, step=step, one_turn=True)
