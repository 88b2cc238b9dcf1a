"""A key/value cache: a tuple with one dict of arrays per layer, or one dict with the
layers stacked on axis 0.

`k` is [B, K, H, C], the layout in which attention multiplies keys; `v` is [B, K, C, H].
An int8 cache also has `k_scale` and `v_scale`, float32 [B, K, 1, C]; the integers at a
cache position are multiplied by its scale.

Rows of a cache may continue prompts that another cache holds, each once for all rows
that continue it (`Prefix`). Attempts at one problem then read their prompt once per
step, not once per attempt. Hydragen (Juravsky et al. 2024, arXiv 2402.05099) does the
same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Members(NamedTuple):
    """The assignment of the rows B of a cache to R shared prompts, at most M rows per
    prompt.

    Rows and prompts may be split over D devices, in order; each row continues a prompt
    on its own device. Indices count from the first row or prompt of the device, so
    gathering never crosses devices.
    """

    slot_DRM: jax.Array  # int32, rows that continue each prompt of a device; 0 where there are fewer than M
    member_DB: jax.Array  # int32, place of each row among the members of its device: prompt x M + index in slot_DRM
    belongs_B: jax.Array  # bool, whether the row continues a prompt
    length_R: jax.Array  # int32, number of tokens in each prompt

    def gather(self, x_BKQH):
        """Gather the queries that read the same prompt side by side.

        [B, K, Q, H] -> [R, K, M * Q, H].
        """
        D, R, M = self.slot_DRM.shape
        _, K, Q, H = x_BKQH.shape
        x = jax.vmap(lambda x, slot: x[slot])(x_BKQH.reshape(D, -1, K, Q, H), self.slot_DRM)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(D * R, K, M * Q, H)

    def scatter(self, x_RKQH):
        """Invert `gather`: [R, K, M * Q, H] -> [B, K, Q, H]."""
        D, R, M = self.slot_DRM.shape
        _, K, Q, H = x_RKQH.shape
        x = x_RKQH.reshape(D, R, K, M, Q // M, H).swapaxes(2, 3).reshape(D, R * M, K, Q // M, H)
        x = jax.vmap(lambda x, member: x[member])(x, self.member_DB)
        return x.reshape(-1, K, Q // M, H)

    def row_DB(self):
        """Return the prompt that each row continues, as its index on the device; 0 if
        none.
        """
        return self.member_DB // self.slot_DRM.shape[2]

    def begins_B(self):
        """Return the number of tokens before the first cache position of each row: the
        length of its prompt, or 0.
        """
        length_DR = self.length_R.reshape(self.slot_DRM.shape[:2])
        return jnp.where(self.belongs_B, jnp.take_along_axis(length_DR, self.row_DB(), axis=1).reshape(-1), 0)


def members(row_B, length_R, most: int, devices: int = 1) -> Members:
    """Assign rows to prompts: row b continues prompt `row_B[b]`, or none if that is
    negative.

    At most `most` rows may continue a prompt; a further row would read another prompt.
    """
    R, belongs_B = len(length_R) // devices, row_B >= 0
    row_DB = row_B.reshape(devices, -1) - R * jnp.arange(devices)[:, None]
    earlier_BB = jnp.tril(jnp.ones((row_DB.shape[1],) * 2, bool), -1)
    place_DB = jnp.sum((row_DB[:, :, None] == row_DB[:, None]) & earlier_BB, axis=-1)
    row_DB = jnp.where(belongs_B.reshape(devices, -1), row_DB, R)  # past the end, so that `slots` drops it

    def slots(row_B, place_B):
        return jnp.zeros((R, most), jnp.int32).at[row_B, place_B].set(jnp.arange(len(row_B)), mode="drop")

    member_DB = jnp.where(row_DB < R, row_DB * most + place_DB, 0)
    return Members(jax.vmap(slots)(row_DB, place_DB), member_DB, belongs_B, length_R)


class Prefix(NamedTuple):
    """Prompts that the rows of a cache continue. They are never written."""

    layers: Any  # a cache of the same layers
    members: Members


def make(batch: int, cache_length: int, kv_heads: int, head_size: int, dtype, stacked: int | None = None) -> dict:
    """Make an empty cache of length `cache_length`, for one layer or for `stacked`
    layers.
    """
    lead = (batch, kv_heads) if stacked is None else (stacked, batch, kv_heads)
    cache = {"k": jnp.zeros((*lead, head_size, cache_length), dtype), "v": jnp.zeros((*lead, cache_length, head_size), dtype)}
    if jnp.dtype(dtype) == jnp.int8:
        cache |= {name: jnp.zeros((*lead, 1, cache_length), jnp.float32) for name in ("k_scale", "v_scale")}
    return cache


def length_of(cache) -> int:
    """Return the length C of a cache, stacked or not."""
    return (cache if isinstance(cache, dict) else cache[0])["v"].shape[-2]


def by_layer(function, cache: tuple) -> tuple:
    """Apply `function(layer, i)` to each layer.

    A function that moves cache entries is compiled for one layer and run once per
    layer. A program for all L layers would take L times as long to compile.
    """
    return tuple(function(layer, i) for i, layer in enumerate(cache))


def layer(cache, i: int):
    """Return layer i of a tuple. Stacked layers are returned whole, since `copy_rows`
    indexes them itself.
    """
    return cache if isinstance(cache, dict) else cache[i]


def resize(layer: dict, cache_length: int) -> dict:
    """Change the cache length of a layer: pad with zeros at the end, or drop the last
    positions.
    """

    def resize_array(path, x):
        axis = _length_axis(path, x)
        if cache_length <= x.shape[axis]:
            return jax.lax.slice_in_dim(x, 0, cache_length, axis=axis)
        return jnp.pad(x, [(0, cache_length - x.shape[axis] if a == axis else 0) for a in range(x.ndim)])

    return jax.tree_util.tree_map_with_path(resize_array, layer)


def take_rows(layer: dict, row_R) -> dict:
    """Select rows of a layer, in this order."""
    return jax.tree.map(lambda x: jnp.take(x, row_R, axis=0), layer)


def copy_rows(layer: dict, source: dict, i, to_R, row_R, count) -> dict:
    """Copy rows `row_R[:count]` of a layer, or of layer i of stacked layers, into rows
    `to_R[:count]`. Only cache positions that both have are copied.
    """

    def copy_array(path, into, x):
        x = jax.lax.dynamic_index_in_dim(x, i, keepdims=False) if x.ndim > into.ndim else x
        axis = _length_axis(path, x)
        x = jax.lax.slice_in_dim(x, 0, min(x.shape[axis], into.shape[axis]), axis=axis)

        def copy(r, into):
            row = jax.lax.dynamic_slice_in_dim(x, row_R[r], 1)
            return jax.lax.dynamic_update_slice_in_dim(into, row, to_R[r], axis=0)

        return jax.lax.fori_loop(0, count, copy, into)

    return jax.tree_util.tree_map_with_path(copy_array, layer, source)


def _length_axis(path, x) -> int:
    return x.ndim - (2 if path[-1].key == "v" else 1)
