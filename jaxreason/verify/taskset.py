"""Verifier that scores with a task's own `score`, as in the package `verifiers`."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
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
    make_trace = bare_trace if trace is None else own("function", trace)

    def verify(text: str, task: Task) -> Verdict:
        if "of_taskset" not in task.data:
            raise ValueError(f"verifier 'taskset' needs tasks of the family 'taskset'; got task {task.id!r}")
        one = task.data["of_taskset"]
        made = make_trace(one, text)
        scored = one.score(made)
        if inspect.isawaitable(scored):
            asyncio.run(awaited(scored))
        rewards = {name: value for name, value in made.rewards.items() if value is not None}
        reward = float(sum(rewards.values()))
        return Verdict(
            reward, reward >= right, None, "scored", {f"reward_{name}": float(value) for name, value in rewards.items()}
        )

    return verify


async def awaited(value: Any) -> Any:
    return await value


def bare_trace(one: Any, text: str) -> SimpleNamespace:
    """Make what most scores read of a trace: the last reply, rewards and metrics."""
    message = SimpleNamespace(role="assistant", content=text)
    task = SimpleNamespace(data=getattr(one, "data", one))
    return SimpleNamespace(last_reply=text, task=task, rewards={}, metrics={}, messages=[message], assistant_messages=[message])
