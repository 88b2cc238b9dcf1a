"""Problems of environments with `reset`, `step` and `state`, such as those of OpenEnv.

The package `openenv` is not needed: any object with these methods will do. The question
of problem `i` is the observation that `reset(seed=i)` gives, so a user's environment
must give the same one each time. `environment.openenv` plays them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxreason.options import lines_of, own
from jaxreason.types import Task

NOT_SHOWN = ("done", "reward", "metadata")  # fields of an observation that are not for the model
TEST = 2**20  # first seed of the test split


def openenv(
    maker: str,  # module:function that returns a new environment, without arguments
    split: str = "train",  # train or test: other seeds
    size: int = 1000,  # problems, each of its own seed
    show: str | None = None,  # module:function from an observation to the model's text; None: its text, or its fields as JSON
) -> Sequence[Task]:
    """Make the problems of an environment with `reset`, `step` and `state` (OpenEnv).

    Raises:
      ValueError: an unknown split, a size below 1, or an environment that fails.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split of task 'openenv' got {split!r}; allowed: train, test")
    if not 1 <= size <= TEST:
        raise ValueError(f"size of task 'openenv' got {size}; allowed: 1 to {TEST:,}")
    make, to_text = own("environment", maker), shower(show)
    found = []
    with lines_of(f"environment {maker!r}"):
        environment = make()
        for seed in range(TEST * (split == "test"), TEST * (split == "test") + size):
            question = to_text(observation_of(environment.reset(seed=seed)))
            found.append(Task(question, "", id=f"openenv/{split}/{seed}", data={"seed": seed}))
        close(environment)
    return found


def shower(show: str | None) -> Callable[[Any], str]:
    return text_of if show is None else own("function", show)


def observation_of(result: Any) -> Any:
    """Return the observation of a result: a client's has it as a field, an
    environment's is it.

    Raises:
      ValueError: the method is asynchronous.
    """
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise ValueError("the environment is asynchronous; return its synchronous form from the maker: client.sync()")
    return getattr(result, "observation", result)


def text_of(observation: Any) -> str:
    """Write an observation as text: itself, its only text, or its fields as JSON."""
    if isinstance(observation, str):
        return observation
    if hasattr(observation, "model_dump"):
        observation = observation.model_dump(mode="json")
    elif not isinstance(observation, Mapping):
        observation = vars(observation)
    shown = {name: value for name, value in observation.items() if name not in NOT_SHOWN}
    texts = [value for value in shown.values() if isinstance(value, str)]
    return texts[0] if len(shown) == len(texts) == 1 else json.dumps(shown, ensure_ascii=False, default=str)


def close(environment: Any) -> None:
    if callable(closing := getattr(environment, "close", None)):
        closing()
