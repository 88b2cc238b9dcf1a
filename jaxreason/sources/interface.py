"""Sources as pairs of functions, and the batches that they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxreason.types import Batch, Rollout


class NextBatch(NamedTuple):
    """A batch of numpy arrays with its metrics and rollouts."""

    batch: Batch
    metrics: dict  # name -> (sum, count)
    rollouts: Sequence[Rollout] = ()
    advantages: Sequence[float | None] = ()  # the objective's, of each rollout; None for one that is not in the batch


class Source(NamedTuple):
    """Stream of batches."""

    init: Callable[[], dict]
    next: Callable[..., tuple[dict, NextBatch]]
    rows: int  # rows per batch
    samples: bool = False  # whether it samples from the params that it is given
    save: Callable[[dict], dict] = dict
    lag: int = 0  # updates between the params that sample and those that learn
    replay: int = 0  # problems per batch that come from earlier batches, at most
    lengths: Sequence[int] = ()  # lengths that rows can have; empty: unknown
