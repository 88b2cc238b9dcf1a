"""Rewards that a source pays for attempts: those of the verdicts, or others."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxreason.types import Group
from jaxreason.verify import canonical_answers

REWARDS = ("verdict", "random", "format", "majority")


def paid(groups: Sequence[Group], reward: str, key, same: Callable[[str, str], bool] | None = None) -> list[Group]:
    """Replace the rewards of verdicts by those that a source pays, one of `REWARDS`.

    `same` tells whether two answers are equivalent, for votes; None: equal texts are.
    """
    if reward == "verdict":
        return list(groups)
    if reward == "random":
        return shuffle_rewards(groups, key)
    if reward == "majority":
        return [pay(group, pay_majority(group, same)) for group in groups]
    return [pay(group, [float(r.verdict.parsed is not None) for r in group.attempts]) for group in groups]


def pay(group: Group, reward_G: Sequence[float]) -> Group:
    """Return a group with other rewards. Its verdicts still say what is correct."""
    pairs = zip(group.attempts, reward_G, strict=True)
    return Group(tuple(dataclasses.replace(r, verdict=dataclasses.replace(r.verdict, reward=x)) for r, x in pairs))


def pay_majority(group: Group, same: Callable[[str, str], bool] | None = None) -> list[float]:
    """Return 1 for attempts whose answer is the most frequent one of their group, and 0
    for others: test-time reinforcement learning (Zuo et al. 2025, arXiv 2504.16084).

    Answers are those that the verifier read. Of answers that are equally frequent the
    first one counts. Without any answer nobody is paid.
    """
    answers = canonical_answers([r.verdict.parsed for r in group.attempts], same)
    votes = Counter(answer for answer in answers if answer is not None)
    elected = votes.most_common(1)[0][0] if votes else None
    return [float(elected is not None and answer == elected) for answer in answers]


def shuffle_rewards(groups: Sequence[Group], key) -> list[Group]:
    """Shuffle the rewards over the attempts of all groups.

    As many attempts are rewarded as before, but at random.
    """
    reward_R = [r.verdict.reward for group in groups for r in group.attempts]
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 2**32 - 1), len(reward_R)))
    dealt = iter([reward_R[i] for i in order])
    return [pay(group, [next(dealt) for _ in group.attempts]) for group in groups]
