"""Recovery from a wrong step: an intervention on rollouts.

One intermediate result of a correct rollout is replaced by a wrong one, the model
continues from there, and the whole text is judged. A model that checks its work, or
that does not depend on what it wrote, still answers right. The control arm continues
from the same cut with the right result: its accuracy is what the cut itself leaves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxreason.draw import ALL, Filter
from jaxreason.environment import Environment, Turn
from jaxreason.estimators import wilson
from jaxreason.rollout import Completer, Request, collect_local, gather_groups
from jaxreason.sampler import Weights
from jaxreason.tasks.behaviour import Cut, Parser
from jaxreason.types import Rollout, Task

ARMS = ("corrupted", "control")


class Recovery(NamedTuple):
    """Outcome of the intervention on some rollouts.

    Compare `recovered` with `control`: the difference is the damage of one wrong step.
    """

    tried: int  # rollouts that were continued, once per arm: a correct one per problem
    recovered: int  # still correct after the wrong step
    noticed: int  # whose continuation shows that the step was wrong (see `Parser`)
    control: int  # correct in the control arm
    too_long: int  # rollouts left out because no prefix is a possible prompt
    without_step: int  # rollouts left out because no step can be corrupted
    rollouts: tuple[Rollout, ...] = ()  # the continued ones, an arm after the other; prefixes are forced tokens

    def measures(self) -> dict[str, float]:
        """Return counts, rates and 95 % Wilson intervals, by name; no rates if no
        rollout was tried.
        """
        found = {f"recovery_{name}": float(getattr(self, name)) for name in ("tried", "too_long", "without_step")}
        if self.tried:
            for name, count in (("recovered", self.recovered), ("noticed", self.noticed), ("control", self.control)):
                low, high = wilson(count, self.tried)
                found |= {f"recovery_{name}": count / self.tried, f"recovery_{name}_low": low, f"recovery_{name}_high": high}
        return found


def recovery(
    completer: Completer,
    weights: Weights,
    rollouts: Sequence[Rollout],
    environment: Environment,
    encode: Callable[[str], list[int]],
    parser: Parser,
    *,
    key,
    temperature: float,
    most: int | None = None,
    filter: Filter = ALL,
) -> Recovery:
    """Corrupt a random step of correct rollouts and let the model continue.

    The rollouts are attempts at the problems of one suite. The first correct one of
    each problem is used, so that the cases are independent, until there are `most`.
    `encode` encodes a text that continues another, such as `partial(tokenizer.encode,
    continues=True)`. All processes must call it, with the same rollouts.

    The prompt of a continuation is the prompt and the prefix, so a step is chosen among
    those whose prefix fits in `sampler.max_prompt_tokens`. A continuation has up to
    `completer.max_tokens` of its own, if the sampler is long enough. Where thinking has
    a budget, steps after its end are not corrupted, and the continuation has the whole
    budget.

    Raises:
      ValueError: the environment makes observations, which belong to turns that are cut
        here.
    """
    if not environment.one_turn:
        raise ValueError("recovery needs an environment in which the model writes once (one_turn=True); got one with turns")
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    chosen: list[tuple[Rollout, Cut]] = []
    too_long = without_step = 0
    first = {r.problem: r for r in reversed(rollouts) if r.verdict is not None and r.verdict.correct}
    for _, rollout in sorted(first.items()):
        if most is not None and len(chosen) >= most:
            break
        cut = parser.corrupt(rollout.text, rollout.task, rng, partial(fits, completer, encode, rollout.prompt))
        if cut is not None:
            chosen.append((rollout, cut))
        elif any(True for _ in parser.usable(rollout.text, rollout.task, parser.parse(rollout.text, rollout.task))):
            too_long += 1
        else:
            without_step += 1
    if not chosen:
        return Recovery(0, 0, 0, 0, too_long, without_step)
    wanted = [
        [Request(Prefixed(rollout.task, prefix), len(ARMS) * i + arm, rollout.attempt, extended(rollout.prompt, encode(prefix)))]
        for i, (rollout, cut) in enumerate(chosen)
        for arm, prefix in enumerate((cut.corrupted, cut.control))
    ]
    judged = continued(environment)
    options: dict[str, Any] = {"key": key, "temperature": temperature, "filter": filter}
    groups, _ = gather_groups(collect_local(completer, weights, wanted, judged, **options), wanted)
    made = [group.attempts[0] for group in groups]
    noticed = sum(parser.noticed(cut, r.text, rollout.task) for (rollout, cut), r in zip(chosen, made[::2], strict=True))
    recovered, control = (sum(r.verdict.correct for r in made[arm::2]) for arm in range(2))
    whole = [join(made[len(ARMS) * i + arm], rollout) for arm in range(len(ARMS)) for i, (rollout, _) in enumerate(chosen)]
    return Recovery(len(chosen), recovered, noticed, control, too_long, without_step, tuple(whole))


class Prefixed(NamedTuple):
    """Stands for a task in a request: a task whose completion has begun."""

    task: Task
    prefix: str


def fits(completer: Completer, encode: Callable[[str], list[int]], prompt: np.ndarray, prefix: str) -> bool:
    """Tell whether a prompt and a prefix are a prompt that leaves room to continue.

    A prefix that can't be encoded (the model wrote a token that its text does not give
    back) does not fit.
    """
    try:
        length = len(prompt) + len(encode(prefix))
    except ValueError:
        return False
    ended = completer.thinking is not None and completer.thinking.end.strip() in prefix
    return length <= completer.prompt_buckets[-1] and length < completer.sampler.length and not ended


def extended(prompt: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    return np.concatenate([prompt, np.asarray(ids, np.int32)])


def continued(environment: Environment) -> Environment:
    """Make an environment for `Prefixed` tasks that judges prefix and continuation
    together.
    """

    def reset(task: Prefixed):
        return task.prefix, environment.reset(task.task)

    def step(state, turn: Turn):
        prefix, inner = state
        return state, environment.step(inner, turn._replace(text=prefix + turn.text))[1]

    return environment._replace(reset=reset, step=step)


def join(made: Rollout, original: Rollout) -> Rollout:
    """Return a continuation as a rollout of the original prompt, whose first tokens
    were forced.
    """
    forced = len(made.prompt) - len(original.prompt)
    zeros = np.zeros(forced, np.float32)
    at_1 = made.logp_temperature_1
    return dataclasses.replace(
        made,
        task=original.task,
        problem=original.problem,
        prompt=original.prompt,
        tokens=np.concatenate([np.asarray(made.prompt[len(original.prompt) :], np.int32), made.tokens]),
        logp=np.concatenate([zeros, made.logp]),
        sampled=np.concatenate([np.zeros(forced, bool), made.sampled]),
        text=made.task.prefix + made.text,
        logp_temperature_1=None if at_1 is None else np.concatenate([zeros, at_1]),
        author="f" * forced + made.author,
    )


def judge_with(environment: Environment) -> Callable[[str, Task], bool]:
    """Make `correct(text, task)` of an environment, for the answers in a text (see
    `tasks.behaviour.lexical`).
    """

    def correct(text: str, task: Task) -> bool:
        verdict = environment.step(environment.reset(task), Turn(text, "eos", True))[1].verdict
        return verdict is not None and verdict.correct

    return correct
