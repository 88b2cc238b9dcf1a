"""The decoder-only transformer behind the `Model` seam: stack, scan or unroll,
rematerialisation, value head.

Layers are defined with `flax.nnx` and merged inside `apply`; only nested dicts of
arrays cross the seam, with the layers stacked on axis 0. `ModelConfig.scan_layers`
chooses between `lax.scan` over the stack (compile time flat in depth: for accelerators)
and an unrolled loop (twice as fast on a CPU at 3 layers). Decoding is unrolled
everywhere: a scan copies each layer's cache out of the stack and back
(jaxreason/bench/README.md).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxreason import sharding
from jaxreason.model import cache as kv
from jaxreason.model import lora
from jaxreason.model.attention import KERNELS
from jaxreason.model.config import LORA_TARGETS, Lora, ModelConfig, rope_frequencies
from jaxreason.model.layers import Block, Norm, Projection, Seen, from_columns, from_left, of_few_rows
from jaxreason.model.seam import Model

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def transformer(config: ModelConfig, mesh=None) -> Model:
    """Make the pure functions of a decoder-only transformer.

    A mesh is for the attention kernels that the compiler can't split by itself, which
    is all but "xla".
    """
    dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
    # Modules hold no arrays of their own here: only their structure is kept, to be
    # merged with params inside `apply`.
    block = nnx.graphdef(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))
    adapted_block = nnx.graphdef(nnx.eval_shape(lambda: adapted(Block(config, rngs=nnx.Rngs(0)), config.lora)))
    decode_block = nnx.eval_shape(lambda: Block(config, fused=True, rngs=nnx.Rngs(0)))
    decode_block = nnx.graphdef(decode_block if config.scan_layers else for_few_rows(decode_block))
    final_norm = nnx.graphdef(nnx.eval_shape(lambda: Norm(config.width, config.norm_eps)))

    base_dtype = jnp.dtype((config.lora and config.lora.base_dtype) or config.param_dtype)

    def cast(params, dtype=param_dtype):
        return jax.tree.map(lambda x: x.astype(dtype), params)

    def init(key):
        def one_layer(key):
            return nnx.to_pure_dict(nnx.state(Block(config, rngs=nnx.Rngs(params=key)), nnx.Param))

        embed_key, layers_key, unembed_key, value_key = jax.random.split(key, 4)
        std = config.width**-0.5
        params = {
            "embed": {"embedding": std * jax.random.normal(embed_key, (config.vocab_size, config.width))},
            "layers": jax.vmap(one_layer)(jax.random.split(layers_key, config.layers)),
            "final_norm": {"scale": jnp.ones(config.width)},
        }
        if not config.tied_embeddings:
            params["unembed"] = {"kernel": std * jax.random.normal(unembed_key, (config.width, config.vocab_size))}
        if config.value_head:
            params["value"] = {"kernel": std * jax.random.normal(value_key, (config.width,))}
        if config.lora is not None:
            # A key of their own: the base is that of the same seed without adapters.
            adapters = lora.init(jax.random.fold_in(key, 1), params["layers"], config.lora)
            value = {"value": params.pop("value")} if config.value_head else {}  # trained, like the adapters
            return {"frozen": cast(params, base_dtype), "lora": cast(adapters), **cast(value)}
        return cast(params)

    kernel = KERNELS[config.attention](config, mesh)

    def run(block, x_BTD, layer, rotations, seen, cache):
        if cache is None:
            layer = sharding.gather_weights(layer, mesh, "layers", layer=True)
        x_BTD, cache = nnx.merge(block, layer)(x_BTD, rotations, seen, cache, kernel)
        return (x_BTD if cache is not None else sharding.keep_rows(x_BTD, mesh)), cache

    # Traced once for all layers, which halves the time.
    run_decode = jax.jit(functools.partial(run, decode_block))
    run_plain, run_adapted = functools.partial(run, block), functools.partial(run, adapted_block)
    policy = REMAT[config.remat]
    remade = jax.checkpoint_policies.save_anything_except_these_names(sharding.GATHERED)
    if policy is None and mesh is not None and mesh.shape["fsdp"] > 1:
        policy = remade
    if policy is not None:
        run_plain, run_adapted = (jax.checkpoint(f, policy=policy) for f in (run_plain, run_adapted))

    def apply(params, tokens_BT, position_BT, segment_BT=None, cache=None, prefix=None):
        run_block, adapters = (run_adapted, params["lora"]) if "lora" in params else (run_plain, None)
        params = params.get("frozen", params)
        embed = params["embed"] if cache is not None else sharding.gather_weights(params["embed"], mesh, "embed")
        x_BTD = embed["embedding"][tokens_BT].astype(dtype)
        x_BTD = x_BTD if cache is not None else sharding.keep_rows(x_BTD, mesh)
        rotations = rotation(config, position_BT)
        seen = kernel.see(position_BT, segment_BT) if cache is None else Seen(*columns(position_BT, prefix))
        layers = params["layers"] if adapters is None else lora.beside(params["layers"], adapters)
        assert prefix is None or isinstance(cache, tuple)
        if isinstance(cache, dict) or (config.scan_layers and cache is None and not in_decode_layout(params)):

            def step(x_BTD, layer_and_cache):
                layer, layer_cache = layer_and_cache
                return run_block(x_BTD, layer, rotations, seen, None if layer_cache is None else (layer_cache, None))

            x_BTD, cache = jax.lax.scan(step, x_BTD, (layers, cache))
        else:
            run_layer = run_decode if in_decode_layout(params) else run_block
            layers = layers if isinstance(layers, tuple) else unstack(layers, config.layers)
            nothing = (None,) * config.layers
            caches = nothing if cache is None else zip(cache, nothing if prefix is None else prefix.layers, strict=True)
            new_caches = []
            for layer, layer_cache in zip(layers, caches, strict=True):
                x_BTD, layer_cache = run_layer(x_BTD, layer, rotations, seen, layer_cache)
                new_caches.append(layer_cache)
            cache = None if cache is None else tuple(new_caches)
        return nnx.merge(final_norm, params["final_norm"])(x_BTD), cache

    def unembed(params, hidden):
        params = params.get("frozen", params)
        if in_decode_layout(params) and not config.scan_layers:
            kernel_VD = params["embed"]["embedding"] if config.tied_embeddings else params["unembed"]["kernel"]
            return from_left(hidden, kernel_VD.astype(hidden.dtype), jnp.float32)
        name = "embed" if config.tied_embeddings else "unembed"
        used = sharding.gather_weights(params[name], mesh, name)
        kernel = used["embedding"].T if config.tied_embeddings else used["kernel"]
        return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def value(params, hidden):
        return hidden.astype(jnp.float32) @ params["value"]["kernel"].astype(jnp.float32)

    def init_cache(batch, columns, cache_dtype=None, stacked=False):
        make = functools.partial(kv.make, batch, columns, config.kv_heads, config.head_size, cache_dtype or dtype)
        if stacked:
            return make(stacked=config.layers)
        return tuple(make() for _ in range(config.layers))

    def cast_used(params):
        # Norms and the value head are small, and not all of their use is in `dtype`.
        def of(path, x):
            often = path[-1].key in ("kernel", "embedding") and path[0].key != "value"
            return x.astype(dtype) if often and x.dtype != dtype else x

        return jax.tree_util.tree_map_with_path(of, params)

    def decode_layout(params, send=lambda part: part):
        params, few_rows = cast_used(params), not config.scan_layers  # on a CPU they decide how a product is made
        # Sent layer by layer: never is the whole stack beside the layers.
        layers = tuple(
            decode_layer(send({"layers": cut_layer(params["layers"], i)})["layers"], few_rows) for i in range(config.layers)
        )
        params = {**send({name: part for name, part in params.items() if name != "layers"}), "layers": layers}
        if few_rows and not config.tied_embeddings:
            params["unembed"] = {"kernel": params["unembed"]["kernel"].T}
        return params

    def by_layer(params):
        if config.scan_layers or "layers" not in params:
            return params
        return {**params, "layers": unstack(params["layers"], config.layers)}

    return Model(
        config=config,
        init=init,
        apply=apply,
        unembed=unembed,
        value=value if config.value_head else None,
        merge=functools.partial(lora.merge, lora=config.lora),
        by_layer=by_layer,
        cast=cast_used,
        init_cache=init_cache,
        decode_layout=decode_layout,
    )


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


def adapted(block: Block, adapters: Lora | None) -> Block:
    """Give the chosen projections of a block their adapters."""
    for target in () if adapters is None else adapters.targets:
        module = getattr(getattr(block, LORA_TARGETS[target]), target)
        module.scale = adapters.scale
        module.a = Projection(module.inputs, (adapters.rank,), rngs=nnx.Rngs(0))
        module.b = Projection((adapters.rank,), module.outputs, rngs=nnx.Rngs(0))
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstack(layers, count: int) -> tuple:
    """Split stacked layers into a tuple of one tree a layer.

    Its gradient stacks. That of plain indexing adds up `count` arrays that are zero but
    for one layer.
    """
    return tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count))


def unstack_forward(layers, count: int):
    return unstack(layers, count), None


def unstack_backward(count: int, _, gradients):
    return (jax.tree.map(lambda *x: jnp.stack(x), *gradients),)


unstack.defvjp(unstack_forward, unstack_backward)


def rotation(config: ModelConfig, position_BT):
    """Cosines and sines of every position, float32, each [B, T, H]."""
    inverse, attention_factor = rope_frequencies(config)
    angle = position_BT[..., None].astype(jnp.float32) * inverse
    # Computed into one array and laid out from there: XLA:CPU would compute two arrays
    # anew in every fusion that reads them, for each layer's queries and again for its
    # keys.
    halves_BTH = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1) * attention_factor
    cos, sin = jnp.split(halves_BTH, 2, axis=-1)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, sin], axis=-1)


def columns(position_BT, prefix) -> tuple:
    """The column of its row's cache that each token has, and who continues which
    prompt.

    A row's columns are written in order, so what stands past a token's own is left from
    an earlier rollout or padding.
    """
    if prefix is None:
        return position_BT, None
    return jnp.where(position_BT < 0, -1, position_BT - prefix.members.begins_B()[:, None]), prefix.members
