"""Rows of a batch cut into chunks, whose logits are computed one chunk after the other.

Scored tokens are moved to the front of each row, so that chunks without any are
skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxreason import sharding
from jaxreason.objectives.divergence import Divergence


class Limits(NamedTuple):
    """Number of logits that may exist at most on all devices of a mesh."""

    at_once: int  # while a chunk is computed
    kept: int  # between forward and backward pass
    tile: Tile | None = None  # on each device, if there are more than `kept`; None: no tiles


class Tile(NamedTuple):
    """Number of logits that a device computes at a time if it tiles the vocabulary."""

    rows: int
    symbols: int  # of the vocabulary, at most


class Scoring(NamedTuple):
    """The static arguments of `scored`."""

    unembed: Callable  # (head, hidden) -> logits
    vocabulary: int
    limits: Limits  # of one device, on a mesh
    dtype: Any  # of the products with the head
    tile: Tile | None = None  # None: each chunk has the whole vocabulary
    on_mesh: bool = False  # inside a shard_map over data and fsdp
    divergence: Divergence | None = None
    refer: Callable | None = None  # (head, hidden) -> logits of the reference


class Rows(NamedTuple):
    """Hidden states and the tokens that they predict, in rows [B, T] or in chunks
    [C, R].
    """

    wanted: Any  # whether the token is scored
    hidden: Any  # [..., D]
    target: Any
    temperature: Any


def whole(how: Scoring, head):
    """Return the whole head on each device; on a mesh in the dtype of its products, in
    which it is sent.
    """
    return sharding.gather_over_fsdp(jax.tree.map(lambda x: x.astype(how.dtype), head)) if how.on_mesh else head


def each_chunk(first: int, wanted_CR, function, state):
    """Set state to function(i, state) for each chunk i >= `first` with wanted
    tokens.
    """

    def step(i, state):
        return jax.lax.cond(jnp.any(wanted_CR[i]), functools.partial(function, i), lambda state: state, state)

    return jax.lax.fori_loop(first, len(wanted_CR), step, state)


def in_chunks(how: Scoring, rows: Rows):
    """Return `cut` and `uncut` of `chunks`, and the number of logits of all rows."""
    logits = rows.wanted.size * how.vocabulary * (1 if how.divergence is None else 2)
    count = -(-logits // how.limits.at_once) if how.tile is None else -(-rows.wanted.size // how.tile.rows)
    # At least two chunks: if half of a batch is prompts, one of them is skipped.
    return *chunks(rows.wanted, max(2, count)), logits


def chunks(wanted_BT, count: int):
    """Make `cut` and `uncut`, which split [B, T] into about `count` chunks and join it.

    `cut` maps [B, T, ...] to chunks [C, R, ...] and `uncut` is its inverse. A chunk has
    some columns of all rows or, if that is too much, one column of some rows. Wanted
    tokens come in the first chunks; the last chunk may be filled up with copies of the
    last column, or with 0 (`fill` "constant").
    """
    B, T = wanted_BT.shape
    width = -(-T // min(count, T))
    columns = -(-T // width)
    padded = columns * width
    rows = next(r for r in range(min(-(-count // columns), B), B + 1) if B % r == 0)
    order_BT = jnp.argsort(~wanted_BT, axis=1, stable=True)

    def in_order(x, order_BT):
        return jnp.take_along_axis(x, order_BT.reshape(B, T, *[1] * (x.ndim - 2)), axis=1)

    def cut(x, fill="edge"):  # the copies: no temperature of 0
        x = jnp.pad(in_order(x, order_BT), ((0, 0), (0, padded - T), *[(0, 0)] * (x.ndim - 2)), mode=fill)
        x = x.reshape(B // rows, rows, columns, width, *x.shape[2:])
        return jnp.moveaxis(x, (2, 1), (0, 1)).reshape(columns * rows, -1, *x.shape[4:])

    def uncut(x):
        x = x.reshape(columns, rows, B // rows, width, *x.shape[2:])
        x = jnp.moveaxis(x, (0, 1), (2, 1)).reshape(B, padded, *x.shape[4:])[:, :T]
        return in_order(x, jnp.argsort(order_BT, axis=1))

    return cut, uncut
