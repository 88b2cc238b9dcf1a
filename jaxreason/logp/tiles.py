"""Log-probs and entropies with logits of one tile at a time: some tokens x a part of
the vocabulary.

A tile of logits fits in the fast memory of a TPU, so that logits are never written to
its HBM. The normaliser is summed over the tiles beside a running maximum (Milakov and
Gimelshein 2018, arXiv 1805.02867). Tiles of the vocabulary are the outer loop and
chunks of tokens the inner one: the float32 gradient of the head, the largest array, is
then updated once per tile instead of once per chunk.

On a mesh each device gathers the part of the head that makes the next tile, while it
computes the first chunk of this one. That chunk is therefore computed even if nobody
wants it: a compiler moves no collective beside a loop or a condition.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxreason import sharding
from jaxreason.logp.chunks import Rows, Scoring, each_chunk, in_chunks, whole

FLOAT32_BYTES = 4
LANES = 128  # of a TPU's registers; the size of a tile is a multiple of it


class Tiles(NamedTuple):
    """The vocabulary in `count` tiles of `size` symbols.

    The last tile ends with the vocabulary, so it may begin inside the one before it.
    The symbols of both belong to that one.
    """

    vocabulary: int
    size: int
    count: int

    def start(self, t):
        return jnp.minimum(t * self.size, self.vocabulary - self.size)

    def symbols(self, t):
        """Return the numbers of the symbols of tile t, and which of them belong to
        it.
        """
        symbols_V = self.start(t) + jnp.arange(self.size)
        return symbols_V, symbols_V >= t * self.size

    def part(self, head, t):
        """Return the part of the head that makes the logits of tile t."""

        def cut(path, x):
            return jax.lax.dynamic_slice_in_dim(x, self.start(t), self.size, sharding.vocabulary_axis(path))

        return jax.tree_util.tree_map_with_path(cut, head)

    def add(self, by_head, by_part, t):
        """Add the gradient of the part of tile t to that of the head."""

        def added(x, before, more, axis):
            return jax.lax.dynamic_update_slice_in_dim(x, before + more, self.start(t), axis)

        axes = jax.tree_util.tree_map_with_path(lambda path, _: sharding.vocabulary_axis(path), by_head)
        return jax.tree.map(added, by_head, self.part(by_head, t), by_part, axes)


def tiles_of(vocabulary: int, most: int) -> Tiles:
    """Cut a vocabulary into tiles of at most `most` symbols, and of more than half as
    many. Of these sizes the one with the fewest symbols computed twice is taken.
    """
    if vocabulary <= most:
        return Tiles(vocabulary, vocabulary, 1)
    unit = math.gcd(LANES, most)
    sizes = range(most, most // 2, -unit)
    size = min(sizes, key=lambda size: -(-vocabulary // size) * size)
    return Tiles(vocabulary, size, -(-vocabulary // size))


def score(how: Scoring, head, rows: Rows, *, keep: bool = False):
    """Return log-probs and entropies, and what the backward pass needs: normalisers and
    entropies in chunks, and if `keep` the gathered parts of a head that is not too
    large.
    """
    cut, uncut, _ = in_chunks(how, rows)
    rows, tiles = jax.tree.map(cut, rows), tiles_of(how.vocabulary, how.tile.symbols)

    def score_tile(t, state):
        (part, sums, kept), (symbols_V, own_V) = state, tiles.symbols(t)
        following = whole_part(how, tiles, head, t + 1)
        kept = None if kept is None else jax.tree.map(lambda all, x: all.at[t].set(x), kept, part)

        def score_chunk(i, state):
            most_R, total_R, product_R, chosen_R = (all_CR[i] for all_CR in state)
            logits_RV = how.unembed(part, rows.hidden[i]) / rows.temperature[i, :, None]
            logits_RV = jnp.where(own_V, logits_RV, jnp.finfo(jnp.float32).min)
            higher_R = jnp.maximum(most_R, jnp.max(logits_RV, axis=-1))
            odds_RV, shrunk_R = jnp.exp(logits_RV - higher_R[:, None]), jnp.exp(most_R - higher_R)
            total_R = total_R * shrunk_R + jnp.sum(odds_RV, axis=-1)
            product_R = product_R * shrunk_R + jnp.sum(odds_RV * logits_RV, axis=-1)
            is_chosen_RV = own_V & (symbols_V == rows.target[i, :, None])
            chosen_R += jnp.sum(jnp.where(is_chosen_RV, logits_RV, 0.0), axis=-1)
            sums = higher_R, total_R, product_R, chosen_R
            return tuple(all_CR.at[i].set(x_R) for all_CR, x_R in zip(state, sums, strict=True))

        return following, each_chunk(1, rows.wanted, score_chunk, score_chunk(0, sums)), kept

    zeros_CR, part = jnp.zeros(rows.wanted.shape, jnp.float32), whole_part(how, tiles, head, 0)
    kept = jax.tree.map(lambda x: jnp.zeros((tiles.count, *x.shape), x.dtype), part) if keep and keeps(how, head) else None
    state = part, (zeros_CR - jnp.inf, zeros_CR, zeros_CR, zeros_CR), kept
    _, (most_CR, total_CR, product_CR, chosen_CR), kept = jax.lax.fori_loop(0, tiles.count, score_tile, state)
    scored_C1 = jnp.any(rows.wanted, axis=-1, keepdims=True).at[0].set(True)
    total_CR = jnp.where(scored_C1, total_CR, 1.0)
    log_total_CR = jnp.log(total_CR) + jnp.where(scored_C1, most_CR, 0.0)
    logp_CR, entropy_CR = chosen_CR - log_total_CR, log_total_CR - product_CR / total_CR
    return [uncut(logp_CR), uncut(entropy_CR)], (log_total_CR, entropy_CR, kept)


def keeps(how: Scoring, head) -> bool:
    """Tell whether the backward pass keeps the gathered head instead of gathering it
    again: if it takes no more memory than logits that are kept.
    """
    numbers = sum(x.size for x in jax.tree.leaves(head)) * jax.lax.axis_size("fsdp") if how.on_mesh else 0
    return how.on_mesh and jax.lax.axis_size("fsdp") > 1 and numbers * how.dtype.itemsize <= how.limits.kept * FLOAT32_BYTES


def gradient(how: Scoring, saved, gradients):
    """Return the gradients of the head and of the rows.

    Sums over tiles, chunks and devices are float32; the products cast their factors.
    """
    head, rows, _, (log_total_CR, entropy_CR, kept) = saved
    cut, uncut, _ = in_chunks(how, rows)
    # Columns that fill up the last chunk get no gradient.
    by_logp_CR, by_entropy_CR = (cut(x, "constant") for x in gradients)
    rows, tiles = jax.tree.map(cut, rows), tiles_of(how.vocabulary, how.tile.symbols)

    def part_of(t):
        return whole_part(how, tiles, head, t) if kept is None else jax.tree.map(lambda all: all[t], kept)

    def add_tile(t, state):
        (part, by_head, by_hidden_CRD), (symbols_V, own_V) = state, tiles.symbols(t)
        following = part_of(t + 1)

        def add_chunk(i, state):
            by_part, by_hidden_CRD = state
            temperature_R1 = rows.temperature[i, :, None]
            logits_RV, back = jax.vjp(how.unembed, in_float32(part), in_float32(rows.hidden[i]))
            all_logp_RV = logits_RV / temperature_R1 - log_total_CR[i, :, None]
            p_RV = jnp.exp(all_logp_RV)
            by_logits_RV = by_logp_CR[i, :, None] * ((symbols_V == rows.target[i, :, None]) - p_RV)
            by_logits_RV -= by_entropy_CR[i, :, None] * p_RV * (all_logp_RV + entropy_CR[i, :, None])
            more, by_hidden_RD = back(jnp.where(own_V, by_logits_RV / temperature_R1, 0.0))
            return jax.tree.map(jnp.add, by_part, more), by_hidden_CRD.at[i].add(by_hidden_RD)

        # The sum over chunks starts from 0, not from the head's gradient: where that is
        # not needed, as with adapters, the compiler can then drop it.
        sums = add_chunk(0, (zeros_like(part), by_hidden_CRD))
        by_part, by_hidden_CRD = each_chunk(1, rows.wanted, add_chunk, sums)
        by_part = sharding.scatter_over_fsdp(by_part) if how.on_mesh else by_part
        return following, tiles.add(by_head, by_part, t), by_hidden_CRD

    state = part_of(0), zeros_like(head), zeros_like(rows.hidden)
    _, by_head, by_hidden_CRD = jax.lax.fori_loop(0, tiles.count, add_tile, state)
    by_head = jax.tree.map(lambda g, x: g.astype(x.dtype), by_head, head)
    return by_head, Rows(None, uncut(by_hidden_CRD.astype(rows.hidden.dtype)), None, None)


def whole_part(how: Scoring, tiles: Tiles, head, t):
    """Return the part of the head of tile t, whole on each device and in the dtype of
    its products.
    """
    return whole(how, jax.tree.map(lambda x: x.astype(how.dtype), tiles.part(head, t)))


def in_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def zeros_like(tree):
    """Return float32 zeros, of the shapes of a tree."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)
