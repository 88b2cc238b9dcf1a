"""Environments: what a model's text leads to. Text in and text out, no tokens, single-use.

`Environment(reset, step)`: `reset(task) -> state`; `step(state, text, final) -> (state, Step)`, where `text` is what the model
wrote since the last observation. A step either ends the rollout with a verdict or goes on with an observation, which the
rollout loop appends as forced tokens; with `final` there is no room to go on, and the step must judge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxreason.types import Task, Verdict

VERIFIER_ERROR = "verifier error"


class Step(NamedTuple):
    """Exactly one of the two is set."""

    verdict: Verdict | None = None
    observation: str | None = None


class Environment(NamedTuple):
    reset: Callable[[Task], Any]
    step: Callable[[Any, str, bool], tuple[Any, Step]]


def single_turn(verify: Callable[[str, Task], Verdict]) -> Environment:
    """The model writes once and is judged. A verifier that raises, a bug of its author, costs a wrong verdict and not the run."""

    def step(task, text, final):
        try:
            verdict = verify(text, task)
        except Exception as error:
            verdict = Verdict(0.0, False, None, f"{VERIFIER_ERROR}: {type(error).__name__}: {error}")
        return task, Step(verdict=verdict)

    return Environment(reset=lambda task: task, step=step)
