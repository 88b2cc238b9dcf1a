"""Attempts that are kept as demonstrations for the model itself: rejection sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxreason.types import Group, Rollout


class Keep(NamedTuple):
    """Which attempts to keep."""

    correct: bool = True  # only right ones
    per_problem: int | None = None  # at most; None: all
    distinct: bool = True  # of equal texts only the first


def kept_attempts(group: Group, keep: Keep, reward: str = "verdict") -> list[Rollout]:
    """Return the attempts of a group that are kept, in their order.

    An attempt is right if its verdict says so or, for a source that pays another reward
    than the verdict's, if it was paid.
    """
    right_G = [r.verdict.correct if reward == "verdict" else r.verdict.reward > 0 for r in group.attempts]
    return [group.attempts[i] for i in choose(right_G, [r.text for r in group.attempts], keep)]


def choose(right_G: Sequence[bool], texts: Sequence[str], keep: Keep) -> list[int]:
    """Return which attempts at a problem are kept, given which are right, and their
    texts.
    """
    found: list[int] = []
    for i, (is_right, text) in enumerate(zip(right_G, texts, strict=True)):
        is_new = not keep.distinct or all(text != texts[other] for other in found)
        if (is_right or not keep.correct) and is_new:
            found.append(i)
    return found[: keep.per_problem]


def as_groups(groups: Sequence[Group], keep: Keep, reward: str) -> list[Group]:
    """Return the kept attempts, each as a group of its own."""
    return [Group((r,)) for group in groups for r in kept_attempts(group, keep, reward)]


def check_keep(keep: Keep) -> None:
    if keep.per_problem is not None and keep.per_problem < 1:
        raise ValueError(f"source.per_problem got {keep.per_problem}; allowed: 1 or more, or None (all)")
