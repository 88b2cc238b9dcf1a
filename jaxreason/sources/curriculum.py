"""Which tasks of a shuffled stream to pass over, by the success rates of earlier
attempts at them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from jaxreason.options import call_with_section, unknown_name_message
from jaxreason.types import Group, Prompted, Task


class SuccessRate(NamedTuple):
    """Pass over tasks whose last success rate was below `least`, or was `most` or more.

    With least=0, most=0.9 and revisit=0 these are the prompts that Khatri et al. 2025
    (arXiv 2510.13786, "no positive resampling") remove: those with a pass rate of 0.9
    or more. There it is for good; here a task is attempted again `revisit` epochs after
    it was measured, if that is above 0.
    """

    least: float
    most: float
    revisit: int  # epochs; 0: never
    epoch: int  # tasks per epoch of the stream


def success_rate(
    *,
    epoch: int,
    least: float = 0.0,  # pass over tasks whose last success rate was lower
    most: float = 0.9,  # pass over tasks whose last success rate was this or higher
    revisit: int = 0,  # epochs after which such a task is attempted again; 0: never
) -> SuccessRate:
    """Pass over tasks whose last success rate was too low or too high."""
    if not 0 <= least < most:
        raise ValueError(f"curriculum.least got {least} with most={most}; allowed: 0 or more, below most")
    if not most <= 1:
        raise ValueError(
            f"curriculum.most got {most}; allowed: above least, to 1 (1: only tasks solved every time are passed over)"
        )
    if revisit < 0:
        raise ValueError(f"curriculum.revisit got {revisit}; allowed: 0 (never), or epochs")
    return SuccessRate(least, most, revisit, epoch)


CURRICULA = {"success_rate": success_rate}


def make_curriculum(
    *,
    name: str,  # success_rate
    epoch: int,
    **section,
) -> SuccessRate:
    """Make the named curriculum of a stream with `epoch` tasks per epoch.

    Raises:
      ValueError: an unknown name, or a rate that is impossible.
    """
    if name not in CURRICULA:
        raise ValueError(unknown_name_message("curriculum", name, CURRICULA))
    return call_with_section(CURRICULA[name], section, f"curriculum {name!r}", epoch=epoch)


class Picked(NamedTuple):
    """Positions of a stream that a batch attempts."""

    positions: list[int]  # in order
    end: int  # position after the last one that was looked at
    filled: int = 0  # positions taken although they should be passed over


def pick(curriculum: SuccessRate, measured: Mapping[str, int], tasks: Sequence[Prompted], start: int, count: int) -> Picked:
    """Pick the next `count` tasks from a position on that are not passed over.

    `measured` is that of `measure`. At most one epoch of the stream is looked at; if it
    has too few such tasks, the first ones that were passed over fill the batch, so that
    a model that has solved everything still gets batches.
    """
    taken, passed, at = [], [], start
    while len(taken) < count and at < start + max(curriculum.epoch, count):
        (passed if is_passed_over(curriculum, measured, tasks[at].task, at) else taken).append(at)
        at += 1
    filled = count - len(taken)
    return Picked(sorted(taken + passed[:filled]), at, filled)


def is_passed_over(curriculum: SuccessRate, measured: Mapping[str, int], task: Task, position: int) -> bool:
    epoch = measured.get(key_of_task(task))
    return epoch is not None and not 0 < curriculum.revisit <= position // curriculum.epoch - epoch


def measure(curriculum: SuccessRate, measured: Mapping[str, int], groups: Sequence[Group], reward: str) -> dict[str, int]:
    """Return the tasks to pass over, each with the epoch in which it was measured,
    after attempts at more tasks. Tasks within the range are not in it.
    """
    found = dict(measured)
    for group in groups:
        key = key_of_task(group.task)
        if curriculum.least <= rate_of(group, reward) < curriculum.most:
            found.pop(key, None)
        else:
            found[key] = group.problem // curriculum.epoch
    return found


def rate_of(group: Group, reward: str) -> float:
    """Return the share of right attempts or, for a source that pays another reward than
    the verdict's, the mean reward: no answer key may leak into such a run.
    """
    return float(np.mean([r.verdict.correct if reward == "verdict" else r.verdict.reward for r in group.attempts]))


def key_of_task(task: Task) -> str:
    """Return the id of a task, or a digest of its question if it has none."""
    return task.id or blake2b(task.question.encode(errors="surrogatepass"), digest_size=8).hexdigest()
