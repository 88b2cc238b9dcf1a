"""The decoder-only transformer behind the `Model` interface: layers as a scan or a
loop, rematerialisation, value head.

Layers are defined with `flax.nnx` and merged inside `apply`; only nested dicts of
arrays cross the interface, with the layers stacked on axis 0. `ModelConfig.scan_layers`
selects `lax.scan` over the stack (compile time independent of depth, for accelerators)
or an unrolled loop (twice as fast on a CPU at 3 layers). Decoding is always unrolled,
because a scan copies each layer's cache out of the stack and back
(jaxreason/bench/README.md).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxreason import sharding
from jaxreason.model import cache as kv
from jaxreason.model import lora
from jaxreason.model.attention import ATTENDED, KERNELS
from jaxreason.model.config import LORA_TARGETS, Lora, ModelConfig, rope_frequencies
from jaxreason.model.cpu import from_left
from jaxreason.model.decode_layout import cast_used, decode_layout, for_few_rows, in_decode_layout
from jaxreason.model.interface import Model
from jaxreason.model.layers import Block, Norm, Projection, Seen, read, read_then_write
from jaxreason.model.tpu import contract
from jaxreason.platforms import platform_of

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    # A flash kernel's result takes less memory than those of the projections, and costs
    # more to compute again.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(ATTENDED)
    ),
}


def transformer(config: ModelConfig, mesh=None) -> Model:
    """Make the functions of a decoder-only transformer.

    `mesh` is for attention kernels that the compiler can't partition: all but "xla".
    """
    dtype, (head_dtype, head_precision) = jnp.dtype(config.dtype), head_of(config)
    # Keep only the structure of the modules, without arrays; `apply` merges it with
    # params.
    kernel = KERNELS[config.attention](config, mesh)
    if platform_of(mesh).write_after and kernel.read is read:
        kernel = kernel._replace(read=read_then_write)
    block = nnx.graphdef(nnx.eval_shape(lambda: contracted(Block(config, rngs=nnx.Rngs(0)), kernel.project)))
    adapted_block = nnx.eval_shape(lambda: contracted(adapted(Block(config, rngs=nnx.Rngs(0)), config.lora), kernel.project))
    adapted_block = nnx.graphdef(adapted_block)
    decode_block = nnx.eval_shape(lambda: Block(config, fused=True, rngs=nnx.Rngs(0)))
    decode_block = nnx.graphdef(contracted(decode_block, contract) if config.scan_layers else for_few_rows(decode_block))
    final_norm = nnx.graphdef(nnx.eval_shape(lambda: Norm(config.width, config.norm_eps)))

    def run(block, x_BTD, layer, rotations, seen, cache):
        if cache is None:
            layer = sharding.gather_weights(layer, mesh, "layers", layer=True)
        x_BTD, cache = nnx.merge(block, layer)(x_BTD, rotations, seen, cache, kernel)
        return (x_BTD if cache is not None else sharding.keep_rows(x_BTD, mesh)), cache

    # With jit, one trace serves all layers, which halves the tracing time.
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
        x_BTD = sharding.look_up(params["embed"], tokens_BT, dtype, mesh if cache is None else None)
        rotations = rotation(config, position_BT)
        seen = kernel.see(position_BT, segment_BT) if cache is None else Seen(*cache_positions(position_BT, prefix))
        layers = params["layers"] if adapters is None else lora.beside(params["layers"], adapters)
        assert prefix is None or isinstance(cache, tuple)
        if isinstance(cache, dict) or (config.scan_layers and cache is None and not in_decode_layout(params)):
            x_BTD, cache = forward_scan(run_block, x_BTD, layers, rotations, seen, cache)
        else:
            run_layer = run_decode if in_decode_layout(params) else run_block
            layers = layers if isinstance(layers, tuple) else unstack(layers, config.layers)
            x_BTD, cache = forward_layers(run_layer, x_BTD, layers, rotations, seen, cache, prefix)
        return nnx.merge(final_norm, params["final_norm"])(x_BTD.astype(head_dtype)), cache

    def unembed(params, hidden):
        params = params.get("frozen", params)
        hidden = hidden.astype(head_dtype)
        if in_decode_layout(params) and not config.scan_layers:
            kernel_VD = params["embed"]["embedding"] if config.tied_embeddings else params["unembed"]["kernel"]
            return from_left(hidden, kernel_VD.astype(hidden.dtype), jnp.float32, head_precision)
        kernel = params["embed"]["embedding"].T if config.tied_embeddings else params["unembed"]["kernel"]
        kernel = kernel.astype(hidden.dtype)
        return jnp.matmul(hidden, kernel, precision=head_precision, preferred_element_type=jnp.float32)

    def value(params, hidden):
        return hidden.astype(jnp.float32) @ params["value"]["kernel"].astype(jnp.float32)

    def init_cache(batch, cache_length, cache_dtype=None, stacked=False):
        make = functools.partial(kv.make, batch, cache_length, config.kv_heads, config.head_size, cache_dtype or dtype)
        if stacked:
            return make(stacked=config.layers)
        return tuple(make() for _ in range(config.layers))

    def by_layer(params):
        if config.scan_layers or "layers" not in params:
            return params
        return {**params, "layers": unstack(params["layers"], config.layers)}

    return Model(
        config=config,
        init=functools.partial(init_params, config),
        apply=apply,
        unembed=unembed,
        head=functools.partial(head_params, config),
        value=value if config.value_head else None,
        merge=functools.partial(lora.merge, lora=config.lora),
        by_layer=by_layer,
        cast=functools.partial(cast_used, config),
        init_cache=init_cache,
        decode_layout=functools.partial(decode_layout, config),
        mesh=mesh,
    )


def head_of(config: ModelConfig) -> tuple:
    """Return the dtype of the factors of the output projection, and its precision.

    A head in float32 (MiniMax 2025, arXiv 2506.13585, sec. 3.2) is at full precision:
    a TPU would multiply float32 in bfloat16, and a GPU in TF32.
    """
    return jnp.dtype(config.head_dtype or config.dtype), "highest" if config.head_dtype == "float32" else None


def head_params(config: ModelConfig, params):
    """Return the part of the params that makes logits."""
    name = "embed" if config.tied_embeddings else "unembed"
    return {name: params.get("frozen", params)[name]}


def init_params(config: ModelConfig, key):
    """Draw random params, with layers stacked on axis 0."""
    dtype = jnp.dtype(config.param_dtype)
    base_dtype = jnp.dtype((config.lora and config.lora.base_dtype) or config.param_dtype)

    def one_layer(key):
        return nnx.to_pure_dict(nnx.state(Block(config, rngs=nnx.Rngs(params=key)), nnx.Param))

    def cast(params, dtype=dtype):
        return jax.tree.map(lambda x: x.astype(dtype), params)

    embed_key, layers_key, unembed_key, _ = jax.random.split(key, 4)  # the fourth is kept for the numbers of earlier versions
    std = config.width**-0.5
    params = {
        "embed": {"embedding": std * jax.random.normal(embed_key, (config.vocab_size, config.width))},
        "layers": jax.vmap(one_layer)(jax.random.split(layers_key, config.layers)),
        "final_norm": {"scale": jnp.ones(config.width)},
    }
    if not config.tied_embeddings:
        params["unembed"] = {"kernel": std * jax.random.normal(unembed_key, (config.width, config.vocab_size))}
    if config.value_head:
        params["value"] = {"kernel": jnp.zeros(config.width)}  # 0 everywhere: noise would be the critic's first advice
    if config.lora is not None:
        # Adapters have their own key, so the base equals that of the same seed without
        # adapters.
        adapters = lora.init(jax.random.fold_in(key, 1), params["layers"], config.lora)
        value = {"value": params.pop("value")} if config.value_head else {}  # the value head is trained, like the adapters
        return {"frozen": cast(params, base_dtype), "lora": cast(adapters), **cast(value)}
    return cast(params)


def forward_scan(run_block, x_BTD, layers, rotations, seen, cache):
    """Run stacked layers with a scan."""

    def step(x_BTD, layer_and_cache):
        layer, layer_cache = layer_and_cache
        return run_block(x_BTD, layer, rotations, seen, None if layer_cache is None else (layer_cache, None))

    return jax.lax.scan(step, x_BTD, (layers, cache))


def forward_layers(run_layer, x_BTD, layers: tuple, rotations, seen, cache, prefix):
    """Run layers one after the other."""
    nothing = (None,) * len(layers)
    caches = nothing if cache is None else zip(cache, nothing if prefix is None else prefix.layers, strict=True)
    new_caches = []
    for layer, layer_cache in zip(layers, caches, strict=True):
        x_BTD, layer_cache = run_layer(x_BTD, layer, rotations, seen, layer_cache)
        new_caches.append(layer_cache)
    return x_BTD, None if cache is None else tuple(new_caches)


def adapted(block: Block, adapters: Lora | None) -> Block:
    """Add adapters to the chosen projections of a block."""
    for target in () if adapters is None else adapters.targets:
        module = getattr(getattr(block, LORA_TARGETS[target]), target)
        module.scale = adapters.scale
        module.a = Projection(module.inputs, (adapters.rank,), rngs=nnx.Rngs(0))
        module.b = Projection((adapters.rank,), module.outputs, rngs=nnx.Rngs(0))
    return block


def contracted(block: Block, product) -> Block:
    """Make the projections to several axes, as of heads, use `product`, if it is not
    None.
    """
    for _, module in nnx.iter_graph(block):
        if isinstance(module, Projection) and len(module.outputs) > 1:
            module.contract = product
    return block


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstack(layers, count: int) -> tuple:
    """Split stacked layers into a tuple of one tree per layer.

    Its gradient stacks the layers' gradients. The gradient of plain indexing would add
    up `count` arrays that are zero except in one layer.
    """
    return tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count))


def unstack_forward(layers, count: int):
    return unstack(layers, count), None


def unstack_backward(count: int, _, gradients):
    return (jax.tree.map(lambda *x: jnp.stack(x), *gradients),)


unstack.defvjp(unstack_forward, unstack_backward)


def rotation(config: ModelConfig, position_BT):
    """Return the cosines and sines of every position, float32, each [B, T, H]."""
    inverse, attention_factor = rope_frequencies(config)
    angle = position_BT[..., None].astype(jnp.float32) * inverse
    # Both are computed in one array. XLA:CPU would recompute two separate arrays in
    # every fusion that reads them: for each layer's queries and again for its keys.
    halves_BTH = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1) * attention_factor
    cos, sin = jnp.split(halves_BTH, 2, axis=-1)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, sin], axis=-1)


def cache_positions(position_BT, prefix) -> tuple:
    """Return the cache position of each token, and the assignment of rows to prompts.

    A row's cache is written in order of position. Positions after a token's own hold
    only remains of an earlier rollout or padding, and the token must not see them.
    """
    if prefix is None:
        return position_BT, None
    return jnp.where(position_BT < 0, -1, position_BT - prefix.members.begins_B()[:, None]), prefix.members
