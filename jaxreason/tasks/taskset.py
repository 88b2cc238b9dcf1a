"""Problems and scores of a taskset, such as those of the package `verifiers` (its
`Taskset` and `Task.score`): any iterable of tasks with `data` and `score` will do.

A task's `data` has `prompt_text` or `prompt`. `verify.taskset` scores answers with the
task's own `score(trace)`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

from jaxreason.options import lines_of, own
from jaxreason.types import Task


def taskset(
    maker: str,  # module:function that returns a taskset, without arguments
    split: str | None = None,  # passed to the maker, if given
    size: int = 1000,  # problems, at most
) -> Sequence[Task]:
    """Make the problems of a taskset of the package `verifiers`, or of anything alike.

    Raises:
      ValueError: a size below 1, a maker that fails, or a task without a prompt.
    """
    if size < 1:
        raise ValueError(f"size of task 'taskset' got {size}; allowed: 1 or more")
    return [as_task(one, f"taskset/{i}", maker, split, i) for i, one in enumerate(load(maker, split, size))]


@functools.lru_cache(maxsize=16)  # the verifier scores with the same tasks
def load(maker: str, split: str | None, size: int) -> tuple[Any, ...]:
    with lines_of(f"taskset {maker!r}"):
        made = own("taskset", maker)(*([] if split is None else [split]))
        return tuple(itertools.islice(made, size))


def as_task(one: Any, id: str, maker: str, split: str | None, index: int) -> Task:
    data = getattr(one, "data", one)
    prompt = getattr(data, "prompt_text", None) or getattr(data, "prompt", None)
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"taskset {maker!r}: task {index} has no text in data.prompt; allowed: tasks that begin with a prompt")
    return Task(prompt, str(getattr(data, "answer", "")), id=id, data={"of_taskset": one, "taskset": maker})
