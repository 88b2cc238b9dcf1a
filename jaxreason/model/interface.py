"""The interface of a model: pure functions over nested dicts of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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

    Training passes no cache. With a cache, T > 1 is a prefill and T = 1 a decode step. Positions alone determine where keys are
    written and which keys a token sees; keys at positions outside the cache are not written. Rows of a cache may continue the
    prompts of `prefix` (see `model.cache.Prefix`). Positions then count from the prompt's first token, and cache positions from
    the first token after the prompt.
    """
    unembed: Callable
    """`unembed(params, hidden) -> logits`, float32. Separate from `apply`, so that `[B, T, V]` is never needed as a whole."""
    head: Callable
    """`head(params)` -> the part of the params that `unembed` reads, which it also accepts."""
    value: Callable | None
    """`value(params, hidden_BTD) -> value_BT`, float32; None without a value head."""
    merge: Callable
    """`merge(params) -> params` without adapters, for sampling and export. Params without adapters are returned unchanged."""
    by_layer: Callable
    """`by_layer(params) -> params` that `apply` also accepts, and whose gradient has one tree per layer.

    Such gradients can be added to a running sum layer by layer, so a second full gradient never exists beside the sum. The layers
    are copied. If `apply` scans its layers, or params have no layers, params are returned unchanged.
    """
    cast: Callable
    """`cast(params) -> params`, with the casts of every step done once; the results are the same."""
    init_cache: Callable
    """`init_cache(batch, cache_length, cache_dtype=None, stacked=False) -> cache`, empty; see `model.cache`.

    With a `stacked` cache `apply` scans over stacked params; otherwise it runs the layers one by one.
    """
    decode_layout: Callable
    """`decode_layout(params, send=...) -> params`, cast and in the layout that decoding reads fastest.

    Arrays that already have the right layout are not copied. `send(part)` moves a part of the params (a layer, or all others) to
    the devices that decode; by default they stay.

    `apply` and `unembed` accept both layouts, except that a stacked cache needs stacked params. Don't jit it as a whole: it is
    several small programs.
    """
    mesh: Any = None
    """The mesh whose devices share the rows of a batch; None: not known here."""
