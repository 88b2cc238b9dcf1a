"""Adapter for environments with `reset`, `step` and `state`, such as those of OpenEnv:
their rewards are the verdict. The problems are those of `tasks.openenv`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxreason.environment.interface import Environment, Failures, Step, Turn
from jaxreason.environment.verdicts import VERIFIER_ERROR, failed, told, traceback_of
from jaxreason.options import own
from jaxreason.tasks.openenv import close, observation_of, shower
from jaxreason.types import Message, Task, Verdict


class Episode(NamedTuple):
    """State of a rollout."""

    inner: Any  # the environment, of this rollout alone
    reward: float = 0.0  # the sum so far
    steps: int = 0


def openenv(
    maker: str,
    action: str | None = None,
    show: str | None = None,
    max_steps: int = 16,
    right: float = 1.0,
    role: str = "user",
    deadline_s: float | None = 60.0,
) -> Environment:
    """Play an environment with `reset(seed=...)`, `step(action)` and `state` (OpenEnv,
    https://github.com/meta-pytorch/OpenEnv).

    The reward is the sum over the episode; the answer is correct if it is at least
    `right`. An error in `step` ends the rollout as a verifier's would.

    Args:
      maker: module:function that returns a new environment; each rollout has its own.
      action: module:function from the model's text to an action; None: the text itself.
      show: module:function from an observation to text; None: see
        `tasks.openenv.text_of`.
      max_steps: steps of an episode, at most.
      right: the sum of rewards from which on the answer is correct.
      role: of the observation's message in a chat; empty: it continues the text.
      deadline_s: seconds per step.

    Raises:
      ValueError: a number out of range, or a function that can't be imported.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps got {max_steps}; allowed: 1 or more")
    make, to_text = own("environment", maker), shower(show)
    to_action: Callable[[str], Any] = (lambda text: text) if action is None else own("function", action)

    def reset(task: Task) -> Episode:
        environment = make()
        observation_of(environment.reset(seed=task.data["seed"]))
        return Episode(environment)

    def act(state: Episode, turn: Turn) -> tuple[Episode, Step]:
        result = state.inner.step(to_action(turn.text))
        observation = observation_of(result)
        reward = state.reward + float(getattr(result, "reward", None) or 0.0)
        state = state._replace(reward=reward, steps=state.steps + 1)
        if getattr(result, "done", False) or turn.final or state.steps >= max_steps:
            verdict = Verdict(reward, reward >= right, None, "done", {"env_steps": float(state.steps)})
            return state, Step(verdict=verdict)
        text = to_text(observation)
        return state, Step(observation=[Message(role, text)] if role else text)

    def step(state: Episode, turn: Turn) -> tuple[Episode, Step]:
        try:
            return act(state, turn)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return state, Step(verdict=failed(VERIFIER_ERROR, maker, told(error)), failure=traceback_of(error))

    return Environment(
        reset, step, deadline_s=deadline_s, failures=Failures(maker), name=maker, close=lambda state: close(state.inner)
    )
