"""A source that joins the batches of others into one, each with a weight."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from jaxreason import batching
from jaxreason import metrics as m
from jaxreason.sources.interface import NextBatch, Source

PER_STEP = ("train/tokens", "time/sample_s", "time/verify_s")  # amounts of a step: those of the parts add up


class Part(NamedTuple):
    """One part of a mix."""

    source: Source
    weight: float  # factor of its loss
    imitated: bool  # whether it is trained by plain negative log-likelihood, whatever the phase's token loss


def mix(parts: Mapping[str, Part], *, microbatches: int = 1) -> Source:
    """Join the batches of several sources.

    The loss is the sum of weight times loss over the parts: each part's advantages and
    token weights are made over its own rows, by its own objective, and then multiplied.
    A batch has the rows of all parts, in the order of their names, and the length of
    the longest part's batch, rounded up to one of a few lengths. Metrics are those of
    all parts together and, under `PART/`, those of each.
    """
    names = sorted(parts)
    lengths = [length for part in parts.values() for length in part.source.lengths]
    known = all(part.source.lengths for part in parts.values())
    buckets = batching.length_buckets(max(lengths)) if known else ()

    def next(state, params, key):
        after, drawn = {}, {}
        for name in names:
            after[name], drawn[name] = parts[name].source.next(state[name], params, key_of_part(key, name))
        batches = [drawn[name].batch for name in names]
        longest = max(batch.tokens_BT.shape[1] for batch in batches)
        batch = batching.join(
            batches,
            weights=[parts[name].weight for name in names],
            imitated=[parts[name].imitated for name in names],
            length=min((b for b in buckets if b >= longest), default=longest),
        )
        return after, NextBatch(
            batch,
            metrics_of_parts(drawn, batch, microbatches),
            [r for name in names for r in drawn[name].rollouts],
            [advantage for name in names for advantage in advantages_of(drawn[name])],
        )

    sources = [part.source for part in parts.values()]
    return Source(
        init=lambda: {name: parts[name].source.init() for name in names},
        next=next,
        rows=sum(source.rows for source in sources),
        samples=any(source.samples for source in sources),
        save=lambda state: {name: parts[name].source.save(state[name]) for name in names},
        lag=max(source.lag for source in sources),
        replay=sum(source.replay for source in sources),
        lengths=buckets,
    )


def key_of_part(key, name: str):
    """Return the random key of a part: two parts with the same tasks differ."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def advantages_of(drawn: NextBatch) -> Sequence[float | None]:
    return drawn.advantages if len(drawn.advantages) else [None] * len(drawn.rollouts)


def metrics_of_parts(drawn: Mapping[str, NextBatch], batch, microbatches: int) -> dict:
    """Return the metrics of all parts together, and those of each under its name."""
    whole = m.merge(*(one.metrics for one in drawn.values()))
    whole |= {name: (whole[name][0], 1.0) for name in PER_STEP if name in whole}
    if "train/packing_efficiency" in whole:
        computed = float(batching.computed_tokens(batch, microbatches))
        whole["train/packing_efficiency"] = (float((batch.segment_BT > 0).sum()), computed)
    return whole | {f"{part}/{name}": pair for part, one in drawn.items() for name, pair in one.metrics.items()}
