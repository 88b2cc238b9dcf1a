"""Batches that need no model: windows of text, and worked solutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxreason import batching
from jaxreason.objectives import Objective
from jaxreason.runtime import processes
from jaxreason.sources.interface import NextBatch, Source
from jaxreason.types import Task


def corpus(batches: Sequence, objective: Objective, *, rows: int) -> Source:
    """Draw windows of a token stream.

    `batches[i]`, for any i, is an int array of shape [rows, T].
    """
    lengths = (np.shape(batches[0])[1],)

    def next(state, params, key):
        tokens_BT = np.asarray(batches[state["position"]], np.int32)
        metrics = {"train/tokens": (float(tokens_BT.size), 1.0)}
        return {"position": state["position"] + 1}, NextBatch(batching.from_windows(tokens_BT, objective), metrics)

    return Source(lambda: {"position": 0}, next, rows, lengths=lengths)


def demonstrations(
    tasks: Sequence[Task],
    encode: Callable[[Task], tuple[list[int], list[bool]]],
    objective: Objective,
    *,
    rows: int,
    buckets: Sequence[int],
    pack: bool = False,
    microbatches: int = 1,
) -> Source:
    """Draw worked solutions in the order of `tasks`, an endless random-access sequence.

    `encode` returns (ids, trainable).
    """

    def next(state, params, key):
        start = state["position"]
        mine = range(jax.process_index(), rows, jax.process_count())
        shares = processes.gather([encode(tasks[start + i]) for i in mine])
        pairs = [shares[i % len(shares)][i // len(shares)] for i in range(rows)]
        batch = batching.from_demonstrations(pairs, objective, buckets=buckets, pack=pack, microbatches=microbatches)
        tokens = float(sum(min(len(ids), buckets[-1]) for ids, _ in pairs))
        metrics = {
            "train/tokens": (tokens, 1.0),
            "train/cut": (float(sum(len(ids) > buckets[-1] for ids, _ in pairs)), float(rows)),
            "train/packing_efficiency": (tokens, float(batching.computed_tokens(batch, microbatches))),
        }
        return {"position": start + rows}, NextBatch(batch, metrics)

    return Source(lambda: {"position": 0}, next, rows, lengths=buckets)
