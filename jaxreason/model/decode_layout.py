"""Params laid out for decoding: one tree per layer, projections of the same input
fused, kernels transposed if that is faster on a CPU. The layout is made once per
update.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxreason.model.config import ModelConfig
from jaxreason.model.cpu import from_columns, from_left, of_few_rows
from jaxreason.model.layers import Block, Projection


def cast_used(config: ModelConfig, params):
    """Cast params to the dtype of the computation, and the output projection to
    `head_dtype`, except norms and the value head.

    These are small, and some of their uses are in another dtype.
    """
    head = "embed" if config.tied_embeddings else "unembed"

    def cast(path, x):
        used = path[-1].key in ("kernel", "embedding") and path[0].key != "value"
        dtype = jnp.dtype((config.head_dtype if path[0].key == head else None) or config.dtype)
        return x.astype(dtype) if used and x.dtype != dtype else x

    return jax.tree_util.tree_map_with_path(cast, params)


def decode_layout(config: ModelConfig, params, send=lambda part: part):
    """Lay params out for decoding: one tree per layer, projections of the same input
    fused.
    """
    params, few_rows = cast_used(config, params), not config.scan_layers  # CPUs run without scan_layers
    # Send layer by layer, so that the receiving devices never hold the whole stack
    # beside the layers.
    layers = tuple(
        decode_layer(send({"layers": cut_layer(params["layers"], i)})["layers"], few_rows) for i in range(config.layers)
    )
    params = {**send({name: part for name, part in params.items() if name != "layers"}), "layers": layers}
    if few_rows and not config.tied_embeddings:
        params["unembed"] = {"kernel": params["unembed"]["kernel"].T}
    return params


def in_decode_layout(params) -> bool:
    """Return whether params have the layout of `decode_layout`: one tree per layer,
    projections of the same input fused.
    """
    layers = params.get("layers")  # an unembedding alone has none
    return isinstance(layers, tuple) and "qkv" in layers[0]["attention"]


def for_few_rows(block: Block) -> Block:
    """Make the projections of a block take kernels in the CPU layout of
    `decode_layout`.
    """
    for path, module in nnx.iter_graph(block):
        if isinstance(module, Projection):
            module.product = of_few_rows(path[-1], math.prod(module.inputs) * math.prod(module.outputs))
    return block


@jax.jit
def cut_layer(layers, i):
    """Cut layer i out of stacked layers, as a stack of one."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), layers)


@functools.partial(jax.jit, static_argnums=1)
def decode_layer(stack_of_one, few_rows: bool):
    """Fuse projections of the same input (see `Block`), and for `few_rows` transpose
    kernels to [outputs, inputs] if that is faster.

    This program is compiled for one layer and run once per layer; a program for all
    layers takes long to compile.
    """
    layer = jax.tree.map(lambda x: x[0], stack_of_one)
    attention, mlp = dict(layer["attention"]), dict(layer["mlp"])
    q, k, v = (attention.pop(name) for name in "qkv")

    def by_key_head(name):
        """Concatenate the queries, the key and the value of each key head."""
        K, H = k[name].shape[-2:]
        lead = q[name].shape[:-2]
        parts = [q[name].reshape(*lead, K, -1, H), k[name][..., None, :], v[name][..., None, :]]
        return jnp.concatenate(parts, axis=-2)

    attention["qkv"] = {name: by_key_head(name) for name in q}
    mlp["gate_up"] = {"kernel": jnp.stack([mlp.pop("gate")["kernel"], mlp.pop("up")["kernel"]], axis=-1)}
    layer = {**layer, "attention": attention, "mlp": mlp}

    def turn(path, x):
        if path[-1].key != "kernel":
            return x
        inputs = 2 if path[-2].key == "o" else 1  # the input of o has two axes: heads and head size
        x = x.reshape(math.prod(x.shape[:inputs]), -1)
        product = of_few_rows(path[-2].key, x.size)
        if product is from_left:
            return x.T
        # If a row were a whole number of pages, all rows would compete for the same few
        # lines of the processor's cache.
        pad = 16 if product is from_columns and x.shape[1] * x.dtype.itemsize % 4096 == 0 else 0
        return jnp.pad(x, ((0, 0), (0, pad)))

    return jax.tree_util.tree_map_with_path(turn, layer) if few_rows else layer
