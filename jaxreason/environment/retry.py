"""Further attempts within one rollout: the model hears that it was wrong, or only that
it should check its work, and writes again.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from jaxreason.environment.interface import Environment, Step, Turn
from jaxreason.environment.verdicts import verifier_failed
from jaxreason.types import Message, Task, Verdict

WRONG = "That is not right. Try again."
CHECK = "Check your work, then give your final answer."
TOLD = {"wrong": WRONG, "check": CHECK}


class Retries(NamedTuple):
    """State of a rollout with several attempts."""

    task: Task
    inner: Any  # state of the environment inside, new for each attempt
    verdicts: tuple[Verdict, ...] = ()  # of the attempts so far
    ends: tuple[int | None, ...] = ()  # tokens that were sampled up to the end of each
    begun: bool = False  # whether the model has written in this attempt


def retry(
    environment: Environment,
    attempts: int = 2,
    tell: str = "wrong",
    message: str | None = None,
    discount: float = 1.0,
    role: str = "user",
) -> Environment:
    """Let the model attempt a task up to `attempts` times in one rollout.

    The last attempt counts: its reward, times `discount` for each attempt before it.
    `Verdict.attempts` has the end and the reward of each, with the same factor, from
    which `source.credit=attempt` makes an advantage for each.
    The verdict's measures are tries; first_try_correct and last_try_correct;
    tries_wrong_then_right and tries_right_then_wrong, each 1 or 0. All other measures,
    such as the tool_calls of tools inside, are those of the last attempt. (What the
    model tries again by itself within one turn is in `tasks.behaviour`.)

    Args:
      environment: judges each attempt; it sees the attempt's text alone.
      attempts: at most.
      tell: "wrong" tells of a wrong attempt, and ends the rollout at a right one, so
        the answer's correctness reaches the model. "check" asks after every attempt
        but the last to check the work, so nothing does.
      message: what the model reads; None: a sentence for `tell`.
      discount: factor per further attempt, above 0 and at most 1.
      role: of the message in a chat; empty: the message continues the model's text.

    Raises:
      ValueError: a number or name that is not allowed.
    """
    if attempts < 1:
        raise ValueError(f"attempts got {attempts}; allowed: 1 or more")
    if tell not in TOLD:
        raise ValueError(f"tell got {tell!r}; allowed: {', '.join(TOLD)}")
    if not 0 < discount <= 1:
        raise ValueError(f"discount got {discount}; allowed: above 0, at most 1")
    text = TOLD[tell] if message is None else message
    if not text:
        raise ValueError("message is empty; allowed: a text that the model reads before it writes again")
    said = [Message(role, text)] if role else text

    def ended(state: Retries, turn: Turn) -> bool:
        last = state.verdicts[-1]
        return turn.final or len(state.verdicts) >= attempts or verifier_failed(last) or (tell == "wrong" and last.correct)

    def step(state: Retries, turn: Turn) -> tuple[Retries, Step]:
        if state.verdicts and turn.final and not turn.text and not state.begun:  # the message left no room for another attempt
            return state, Step(verdict=summary(state.verdicts, discount, state.ends))
        inner, made = environment.step(state.inner, turn)
        state = state._replace(inner=inner, begun=True)
        if made.verdict is None:
            return state, made
        state = state._replace(verdicts=(*state.verdicts, made.verdict), ends=(*state.ends, turn.tokens))
        if ended(state, turn):
            return state, made._replace(verdict=summary(state.verdicts, discount, state.ends))
        environment.close(state.inner)
        return state._replace(inner=environment.reset(state.task), begun=False), Step(observation=said)

    return environment._replace(
        reset=lambda task: Retries(task, environment.reset(task)),
        step=step,
        one_turn=False,
        close=lambda state: environment.close(state.inner),
    )


def summary(verdicts: tuple[Verdict, ...], discount: float, ends: tuple[int | None, ...] = ()) -> Verdict:
    """Return the last verdict, discounted, with the measures of all attempts, and with
    their ends and rewards if there are several of known ends.
    """
    first, last = verdicts[0], verdicts[-1]
    measures = {
        "tries": float(len(verdicts)),
        "first_try_correct": float(first.correct),
        "last_try_correct": float(last.correct),
        "tries_wrong_then_right": float(last.correct and not first.correct),
        "tries_right_then_wrong": float(first.correct and not last.correct),
    }
    rewards = [v.reward * discount**i if v.reward > 0 else v.reward for i, v in enumerate(verdicts)]
    known = len(verdicts) > 1 and ends and None not in ends
    attempts = tuple(zip(ends, rewards, strict=True)) if known else ()
    return dataclasses.replace(last, reward=rewards[-1], measures={**last.measures, **measures}, attempts=attempts)
