"""Params laid out for decoding: one tree per layer, products of one input fused,
kernels transposed where a CPU is faster so. Made once per update.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxreason.model.config import ModelConfig
from jaxreason.model.layers import Block, Projection, from_columns, from_left, of_few_rows


def cast_used(config: ModelConfig, params):
    """Cast params to the dtype of the computation, but for norms and the value head.

    These are small, and not all of their use is in that dtype.
    """
    dtype = jnp.dtype(config.dtype)

    def cast(path, x):
        used = path[-1].key in ("kernel", "embedding") and path[0].key != "value"
        return x.astype(dtype) if used and x.dtype != dtype else x

    return jax.tree_util.tree_map_with_path(cast, params)


def decode_layout(config: ModelConfig, params, send=lambda part: part):
    """Lay params out for decoding: one tree per layer, products of one input fused."""
    params, few_rows = cast_used(config, params), not config.scan_layers  # on a CPU they decide how a product is made
    # Sent layer by layer: the whole stack is never beside the layers.
    layers = tuple(
        decode_layer(send({"layers": cut_layer(params["layers"], i)})["layers"], few_rows) for i in range(config.layers)
    )
    params = {**send({name: part for name, part in params.items() if name != "layers"}), "layers": layers}
    if few_rows and not config.tied_embeddings:
        params["unembed"] = {"kernel": params["unembed"]["kernel"].T}
    return params


def in_decode_layout(params) -> bool:
    """Whether params are as `decode_layout` gives them: one tree a layer, products of
    the same input fused.
    """
    return isinstance(params["layers"], tuple) and "qkv" in params["layers"][0]["attention"]


def for_few_rows(block: Block) -> Block:
    """Make the projections of a block take their kernels as `decode_layout` lays them
    out for a CPU.
    """
    for path, module in nnx.iter_graph(block):
        if isinstance(module, Projection):
            module.product = of_few_rows(path[-1], math.prod(module.inputs) * math.prod(module.outputs))
    return block


@jax.jit
def cut_layer(layers, i):
    """Cut layer i out of stacked layers: a stack of one."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), layers)


@functools.partial(jax.jit, static_argnums=1)
def decode_layer(stack_of_one, few_rows: bool):
    """Fuse products of the same input (see `Block`), and turn kernels that are better
    so for `few_rows`: [outputs, inputs].

    A program of its own, run once per layer: all layers in one take long to compile.
    """
    layer = jax.tree.map(lambda x: x[0], stack_of_one)
    attention, mlp = dict(layer["attention"]), dict(layer["mlp"])
    q, k, v = (attention.pop(name) for name in "qkv")

    def by_key_head(name):
        """Of each key head: its queries, its key, its value."""
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
        inputs = 2 if path[-2].key == "o" else 1  # attention's output reads heads x head size
        x = x.reshape(math.prod(x.shape[:inputs]), -1)
        product = of_few_rows(path[-2].key, x.size)
        if product is from_left:
            return x.T
        # A row of a whole number of pages would have all rows share a few lines of the
        # processor's cache.
        pad = 16 if product is from_columns and x.shape[1] * x.dtype.itemsize % 4096 == 0 else 0
        return jnp.pad(x, ((0, 0), (0, pad)))

    return jax.tree_util.tree_map_with_path(turn, layer) if few_rows else layer
