"""Groups of earlier batches that are learned from again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxreason.objectives import Objective
from jaxreason.types import Group

OF_REPLAY = 2**32 - 2  # folded into the key of a phase; batches fold in their number


class Kept(NamedTuple):
    """A group that may be learned from again."""

    batch: int  # number of the batch that it was sampled for
    group: Group

    @property
    def name(self) -> tuple[int, int]:
        return self.batch, self.group.problem


def keep(kept: Sequence[Kept], groups: Sequence[Group], batch: int, age: int) -> tuple[Kept, ...]:
    """Add the groups of a batch, and drop those that are over `age` batches old when
    the next batch is made.
    """
    new = (Kept(batch, group) for group in groups)
    return tuple(one for one in (*kept, *new) if batch + 1 - one.batch <= age)


def draw_kept(kept: Sequence[Kept], count: int, batch: int, key) -> tuple[Kept, ...]:
    """Draw up to `count` different groups at random for a batch; keep their order."""
    seed = np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, OF_REPLAY), batch)))
    order = np.argsort(np.random.PCG64(seed.tolist()).random_raw(len(kept)), kind="stable")  # the same in every numpy
    return tuple(kept[i] for i in sorted(order[:count]))


def check_replay(replay: int, age: int, problems: int, group: int, objective: Objective) -> None:
    """Raise ValueError for a replay that is impossible, or biased."""
    if not 0 <= replay < problems:
        raise ValueError(f"source.replay got {replay}; allowed: 0 (off) to {problems - 1}, fewer than source.problems={problems}")
    if age < 1:
        raise ValueError(f"source.replay_age got {age}; allowed: 1 or more batches")
    if replay and group < 2:
        raise ValueError(
            f"source.replay got {replay} with source.group={group}, but only groups with different rewards are replayed; "
            "allowed: 0, or source.group of 2 or more"
        )
    if replay and objective.on_policy:
        raise ValueError(
            f"source.replay got {replay}, but the objective has no importance ratio, so its gradient would be biased; "
            "allowed: 0, or an objective with a ratio: grpo, dr_grpo, dapo"
        )
