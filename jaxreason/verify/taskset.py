"""Verifier that scores with a task's own `score`, as in the package `verifiers`."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from jaxreason.options import own
from jaxreason.types import Task, Verdict


def taskset(
    right: float = 1.0,  # sum of the rewards from which on an answer is correct
    trace: str | None = None,  # module:function (task, text) -> trace for the task's score; None: one with last_reply alone
) -> Callable[[str, Task], Verdict]:
    """Score an answer with the `score(trace)` of its task (family `taskset`).

    The reward is the sum of the trace's rewards after scoring; each is a measure as
    well. Scores that need a runtime, such as a container, are not supported.

    Raises:
      ValueError: a task of another family.
    """
    make_trace = Trace if trace is None else own("function", trace)

    def verify(text: str, task: Task) -> Verdict:
        if "of_taskset" not in task.data:
            raise ValueError(f"verifier 'taskset' needs tasks of the family 'taskset'; got task {task.id!r}")
        one = task.data["of_taskset"]
        made = make_trace(one, text)
        scored = one.score(made)
        if inspect.isawaitable(scored):
            asyncio.run(awaited(scored))
        rewards = {name: weighted(value) for name, value in made.rewards.items() if value is not None}
        reward = sum(rewards.values())
        measures = {re.sub(r"\W", "_", f"reward_{name}", flags=re.ASCII)[:60]: value for name, value in rewards.items()}
        return Verdict(reward, reward >= right, None, "scored", measures)

    return verify


async def awaited(value: Any) -> Any:
    return await value


def weighted(value: Any) -> float:
    """Return a reward as a number: itself, or its score times its weight."""
    return float(value.score) * float(value.weight) if hasattr(value, "score") else float(value)


class Trace:
    """The part of a trace in `verifiers` that most scores use: the last reply, and
    rewards and metrics by name.
    """

    def __init__(self, task: Any, text: str):
        self.task, self.last_reply = task, text.strip()
        self.messages = self.assistant_messages = [SimpleNamespace(role="assistant", content=text)]
        self.rewards: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}

    def record_metric(self, name: str, value: float) -> None:
        self.metrics[name] = float(value)

    def record_metrics(self, values: Mapping[str, float]) -> None:
        self.metrics |= {name: float(value) for name, value in values.items()}

    def record_reward(self, name: str, value: float, weight: float = 1.0) -> None:
        self.rewards[name] = float(value) * float(weight)
