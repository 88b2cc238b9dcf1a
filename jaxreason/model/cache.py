"""A key/value cache: a dict of arrays with the layers stacked on axis 0, or a tuple of one dict a layer.

`k` is [B, K, H, C], keys in columns as attention multiplies them; `v` is [B, K, C, H]. An int8 cache also has `k_scale` and
`v_scale`, float32 [B, K, 1, C]: a column is its integers times its scale.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


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


def by_layer(function, cache):
    """Apply `function(layer, i)` to each layer of a tuple, or `function(cache, None)` to stacked layers.

    What moves columns is a small program for one layer, run once a layer: all layers in one take as many times longer to compile.
    """
    return function(cache, None) if isinstance(cache, dict) else tuple(function(layer, i) for i, layer in enumerate(cache))


def resize(layer, columns: int):
    """Give a layer, or stacked layers, another number of columns: new ones at the end, or the last ones dropped."""

    def of(path, x):
        axis = _columns_axis(path, x)
        if columns <= x.shape[axis]:
            return jax.lax.slice_in_dim(x, 0, columns, axis=axis)
        return jnp.pad(x, [(0, columns - x.shape[axis] if a == axis else 0) for a in range(x.ndim)])

    return jax.tree_util.tree_map_with_path(of, layer)


def take_rows(layer, row_R):
    """Keep some rows of a layer, or of stacked layers, in this order."""
    return jax.tree.map(lambda x: jnp.take(x, row_R, axis=x.ndim - 4), layer)


def copy_rows(layer, stacked, i, to_R, row_R, count):
    """Write rows `row_R[:count]` of layer i of a stacked cache into rows `to_R[:count]`, as many columns as both have.

    With i None, of all layers into stacked layers.
    """

    def of(path, into, x):
        x = x if i is None else jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        axis = _columns_axis(path, x)
        x = jax.lax.slice_in_dim(x, 0, min(x.shape[axis], into.shape[axis]), axis=axis)
        rows_axis = x.ndim - 4

        def copy(r, into):
            row = jax.lax.dynamic_slice_in_dim(x, row_R[r], 1, axis=rows_axis)
            return jax.lax.dynamic_update_slice_in_dim(into, row, to_R[r], axis=rows_axis)

        return jax.lax.fori_loop(0, count, copy, into)

    return jax.tree_util.tree_map_with_path(of, layer, stacked)


def _columns_axis(path, x) -> int:
    return x.ndim - (2 if path[-1].key == "v" else 1)
