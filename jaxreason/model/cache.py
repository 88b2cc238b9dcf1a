"""A key/value cache: a tuple of one dict of arrays a layer, or one dict with the layers
stacked on axis 0.

`k` is [B, K, H, C], keys in columns as attention multiplies them; `v` is [B, K, C, H].
An int8 cache also has `k_scale` and `v_scale`, float32 [B, K, 1, C]: a column is its
integers times its scale.

Rows of a cache may continue prompts that lie in another, each there once for all rows
that continue it (`Prefix`): attempts at one problem then read its prompt once a step,
not once each. Hydragen (Juravsky et al. 2024, arXiv 2402.05099) does the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Members(NamedTuple):
    """The rows B of a cache that continue each of R prompts, at most M of them.

    Rows and prompts may be split over D devices, in order; a row continues a prompt of
    its own device. Indices count from the first of the device, so that gathering never
    leaves it.
    """

    slot_DRM: jax.Array  # int32: the rows that continue each prompt; 0 where there are fewer
    member_DB: jax.Array  # int32: which of those of its device, prompt x M + place, each row is
    belongs_B: jax.Array  # bool: whether it continues a prompt at all
    length_R: jax.Array  # int32: tokens that stand in each prompt's columns

    def gather(self, x_BKQH):
        """[B, K, Q, H] -> [R, K, M * Q, H]: side by side what reads the same prompt."""
        D, R, M = self.slot_DRM.shape
        _, K, Q, H = x_BKQH.shape
        x = jax.vmap(lambda x, slot: x[slot])(x_BKQH.reshape(D, -1, K, Q, H), self.slot_DRM)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(D * R, K, M * Q, H)

    def scatter(self, x_RKQH):
        """The other way round: [R, K, M * Q, H] -> [B, K, Q, H]."""
        D, R, M = self.slot_DRM.shape
        _, K, Q, H = x_RKQH.shape
        x = x_RKQH.reshape(D, R, K, M, Q // M, H).swapaxes(2, 3).reshape(D, R * M, K, Q // M, H)
        x = jax.vmap(lambda x, member: x[member])(x, self.member_DB)
        return x.reshape(-1, K, Q // M, H)

    def row_DB(self):
        """The prompt, among those of its device, that each row continues; 0 if none."""
        return self.member_DB // self.slot_DRM.shape[2]

    def begins_B(self):
        """Tokens that stand before the first column of each row: those of its
        prompt.
        """
        length_DR = self.length_R.reshape(self.slot_DRM.shape[:2])
        return jnp.where(self.belongs_B, jnp.take_along_axis(length_DR, self.row_DB(), axis=1).reshape(-1), 0)


def members(row_B, length_R, most: int, devices: int = 1) -> Members:
    """Say who continues what: row b the prompt `row_B[b]`, or none if that is negative.

    No more than `most` may continue one: the next would read another's.
    """
    R, belongs_B = len(length_R) // devices, row_B >= 0
    row_DB = row_B.reshape(devices, -1) - R * jnp.arange(devices)[:, None]
    earlier_BB = jnp.tril(jnp.ones((row_DB.shape[1],) * 2, bool), -1)
    place_DB = jnp.sum((row_DB[:, :, None] == row_DB[:, None]) & earlier_BB, axis=-1)
    row_DB = jnp.where(belongs_B.reshape(devices, -1), row_DB, R)  # past the end: dropped

    def slots(row_B, place_B):
        return jnp.zeros((R, most), jnp.int32).at[row_B, place_B].set(jnp.arange(len(row_B)), mode="drop")

    member_DB = jnp.where(row_DB < R, row_DB * most + place_DB, 0)
    return Members(jax.vmap(slots)(row_DB, place_DB), member_DB, belongs_B, length_R)


class Prefix(NamedTuple):
    """Prompts that the rows of a cache continue. They are only read."""

    layers: Any  # a cache of the same layers
    members: Members


def make(batch: int, columns: int, kv_heads: int, head_size: int, dtype, stacked: int | None = None) -> dict:
    """Make an empty cache of one layer, or of `stacked` layers."""
    lead = (batch, kv_heads) if stacked is None else (stacked, batch, kv_heads)
    cache = {"k": jnp.zeros((*lead, head_size, columns), dtype), "v": jnp.zeros((*lead, columns, head_size), dtype)}
    if jnp.dtype(dtype) == jnp.int8:
        cache |= {name: jnp.zeros((*lead, 1, columns), jnp.float32) for name in ("k_scale", "v_scale")}
    return cache


def columns_of(cache) -> int:
    """C of a cache, stacked or not."""
    return (cache if isinstance(cache, dict) else cache[0])["v"].shape[-2]


def by_layer(function, cache: tuple) -> tuple:
    """Apply `function(layer, i)` to each layer.

    What moves columns is a small program for one layer, run once a layer: all layers in
    one take as many times longer to compile.
    """
    return tuple(function(layer, i) for i, layer in enumerate(cache))


def layer(cache, i: int):
    """Layer i of a tuple; all of stacked layers, of which `copy_rows` takes its own."""
    return cache if isinstance(cache, dict) else cache[i]


def resize(layer: dict, columns: int) -> dict:
    """Give a layer another number of columns: new ones at the end, or the last ones
    dropped.
    """

    def of(path, x):
        axis = _columns_axis(path, x)
        if columns <= x.shape[axis]:
            return jax.lax.slice_in_dim(x, 0, columns, axis=axis)
        return jnp.pad(x, [(0, columns - x.shape[axis] if a == axis else 0) for a in range(x.ndim)])

    return jax.tree_util.tree_map_with_path(of, layer)


def take_rows(layer: dict, row_R) -> dict:
    """Keep some rows of a layer, in this order."""
    return jax.tree.map(lambda x: jnp.take(x, row_R, axis=0), layer)


def copy_rows(layer: dict, source: dict, i, to_R, row_R, count) -> dict:
    """Write rows `row_R[:count]` of a layer, or of layer i of stacked ones, into rows
    `to_R[:count]`: columns that both have.
    """

    def of(path, into, x):
        x = jax.lax.dynamic_index_in_dim(x, i, keepdims=False) if x.ndim > into.ndim else x
        axis = _columns_axis(path, x)
        x = jax.lax.slice_in_dim(x, 0, min(x.shape[axis], into.shape[axis]), axis=axis)

        def copy(r, into):
            row = jax.lax.dynamic_slice_in_dim(x, row_R[r], 1)
            return jax.lax.dynamic_update_slice_in_dim(into, row, to_R[r], axis=0)

        return jax.lax.fori_loop(0, count, copy, into)

    return jax.tree_util.tree_map_with_path(of, layer, source)


def _columns_axis(path, x) -> int:
    return x.ndim - (2 if path[-1].key == "v" else 1)
