"""The interface of a model: pure functions over nested dicts of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxreason.model.config import ModelConfig


class Model(NamedTuple):
    """The functions of a model. Its state is `params`, a nested dict of arrays with the
    layers stacked on axis 0.
    """

    config: ModelConfig
    init: Callable
    """`init(key) -> params`."""
    apply: Callable
    """`apply(params, tokens_BT, position_BT, segment_BT=None, cache=None, prefix=None) -> (hidden_BTD, cache)`.

    Without a cache it trains; with one it prefills (T > 1) or decodes (T = 1). Positions alone say where keys go and what
    may be seen; a position outside the cache is written nowhere. Rows of a cache may continue the prompts of `prefix` (see
    `model.cache.Prefix`): positions count from the prompt's first token, columns from the first one behind it.
    """
    unembed: Callable
    """`unembed(params, hidden) -> logits`, float32: apart from `apply`, so that `[B, T, V]` need never exist."""
    value: Callable | None
    """`value(params, hidden_BTD) -> value_BT`, float32; None without a value head."""
    merge: Callable
    """`merge(params) -> params` without adapters, for sampling and export; what has none comes back as it is."""
    by_layer: Callable
    """`by_layer(params) -> params` that `apply` takes too, and whose gradient has one tree a layer.

    Gradients that come layer by layer can be added to a sum as they come, without ever standing beside it whole. A copy of the
    layers. Where `apply` scans its layers, and where params have none, they come back as they are.
    """
    cast: Callable
    """`cast(params) -> params` with what every step would cast cast once: what is computed is the same."""
    init_cache: Callable
    """`init_cache(batch, columns, cache_dtype=None, stacked=False) -> cache`, empty; see `model.cache`.

    If its layers are `stacked`, `apply` scans stacked params over it; if not, it goes through them one by one.
    """
    decode_layout: Callable
    """`decode_layout(params, send=...) -> params` as decoding reads them fastest, `cast`, without copying what is right as it is.

    `send(part)` lays a part of the params, a layer or what is no layer, on the devices that decode; by default it stays.

    `apply` and `unembed` take either layout, but for a cache that is stacked. Not to be jitted as a whole: it is a few small
    programs.
    """
