"""One block of the decoder, as `flax.nnx` modules: RMSNorm, rotary positions,
grouped-query attention, gated MLP.

The modules are stateless: a key/value cache is an argument and a result. Weights keep
the dtype in which they were made and are cast to the dtype of the activations where
they are used, so master weights stay float32 under bfloat16 compute. Operations that
lose precision (norms, softmax, rotations) run in float32 under any dtype.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxreason.model.cache import Members
from jaxreason.model.config import ModelConfig
from jaxreason.model.cpu import product, scaled

MASKED = -1e30  # finite, so a row that sees nothing (padding) gets a uniform softmax and not NaN


class Norm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size))

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return scaled(x32.astype(x.dtype), self.scale[...].astype(x.dtype))


class Projection(nnx.Module):
    """A linear map from the last `inputs` axes to `outputs` axes. Weights are drawn
    from a normal of variance gain^2 / fan-in.

    `product` may be replaced (see `of_few_rows`); the kernel is then a matrix in the
    layout of the new product.
    """

    def __init__(self, inputs: tuple, outputs: tuple, *, gain: float = 1.0, bias: bool = False, rngs: nnx.Rngs):
        fan_in = math.prod(inputs)
        self.inputs, self.outputs, self.product = inputs, outputs, product
        self.contract = None  # a product that takes the kernel [D, ...] as it is, instead of `product`
        self.scale = 0.0  # scale of the adapters a and b, if they are added
        self.kernel = nnx.Param(gain * fan_in**-0.5 * jax.random.normal(rngs.params(), (*inputs, *outputs)))
        # A bias starts at zero, as in every published model with biases; its gradient
        # is not zero there.
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x):
        lead = x.shape[: x.ndim - len(self.inputs)]
        kernel = self.kernel[...].astype(x.dtype)
        if self.contract is not None:
            y = self.contract(x, kernel)
        else:
            if kernel.ndim > 2:
                kernel = kernel.reshape(math.prod(self.inputs), -1)
            y = self.product(x.reshape(*lead, -1), kernel)[..., : math.prod(self.outputs)]  # the kernel's rows may be padded
            y = y.reshape(*lead, *self.outputs)
        if self.scale:
            y += self.scale * self.b(self.a(x))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def rotate(x_BTNH, cos_BTH, sin_BTH):
    """Rotate the two halves of each head by position (RoPE; Su et al. 2021, arXiv
    2104.09864, in Llama's order of two halves).
    """
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    x32 = jnp.concatenate([first, second], axis=-1)
    return (x32 * cos_BTH[:, :, None] + turned * sin_BTH[:, :, None]).astype(x_BTNH.dtype)


def attend(q_BTNH, k_BKHC, v_BKCH, visible_BTC, k_scale_BK1C=None, v_scale_BK1C=None):
    """Compute softmax attention of grouped queries over C keys, as two plain batched
    matrix products.

    Keys and values may have another dtype than the queries; an int8 cache has a scale
    per cache position.

    The queries that share a key head become rows of one matrix, and keys are its
    columns: a CPU would otherwise transpose them at every step
    (jaxreason/bench/README.md).
    """
    q_BKQH = by_key_head(q_BTNH, v_BKCH.shape[1])
    scores = masked_scores(q_BKQH, k_BKHC, k_scale_BK1C, for_each_query(visible_BTC, q_BKQH))
    weights = jax.nn.softmax(scores, axis=-1)
    if v_scale_BK1C is not None:
        weights *= v_scale_BK1C
    return by_token(jnp.matmul(weights.astype(q_BTNH.dtype), v_BKCH.astype(q_BTNH.dtype)), q_BTNH.shape)


def by_key_head(q_BTNH, K: int):
    """Group queries by the key head that they share.

    [B, T, N, H] -> [B, K, N / K * T, H], the queries of one head side by side.
    """
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)


def by_token(x_BKQH, shape):
    """Invert `by_key_head`; `shape` is [B, T, N, H]."""
    B, T, N, H = shape
    K = x_BKQH.shape[1]
    return x_BKQH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def for_each_query(visible_BTC, q_BKQH):
    """Repeat a mask for each query, in the order of `by_key_head`.

    [B, T, C] -> [B, 1, Q, C].
    """
    B, T, C = visible_BTC.shape
    heads = q_BKQH.shape[2] // T
    return jnp.broadcast_to(visible_BTC[:, None], (B, heads, T, C)).reshape(B, 1, heads * T, C)


def masked_scores(q_BKQH, k_BKHC, k_scale_BK1C, visible):
    """Return scores, float32 [B, K, Q, C], with `MASKED` where `visible` is false.
    `visible` is broadcast to their shape.
    """
    q_BKQH *= q_BKQH.shape[-1] ** -0.5
    scores = jnp.matmul(q_BKQH, k_BKHC.astype(q_BKQH.dtype), preferred_element_type=jnp.float32)
    if k_scale_BK1C is not None:
        scores *= k_scale_BK1C
    return jnp.where(visible, scores, MASKED)


class Part(NamedTuple):
    """Attention over some of the keys, to be merged with attention over others. All
    arrays are float32.
    """

    mixed: jax.Array  # [B, K, Q, H], values weighted by exp(score - highest)
    highest: jax.Array  # [B, K, Q, 1]
    total: jax.Array  # [B, K, Q, 1], sum of the weights


def attend_part(q_BKQH, cache: dict, visible) -> Part:
    """Attend to a cache; `visible` is broadcast to [B, K, Q, C]."""
    scores = masked_scores(q_BKQH, cache["k"], cache.get("k_scale"), visible)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if "v_scale" in cache:
        weights *= cache["v_scale"]
    value = cache["v"].astype(q_BKQH.dtype)
    return Part(jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=jnp.float32), highest, total)


def join(a: Part, b: Part) -> Part:
    """Return the attention over the keys of both parts, as a part."""
    highest = jnp.maximum(a.highest, b.highest)
    to_a, to_b = jnp.exp(a.highest - highest), jnp.exp(b.highest - highest)
    return Part(a.mixed * to_a + b.mixed * to_b, highest, a.total * to_a + b.total * to_b)


def merge(a: Part, b: Part):
    """Return the attention over the keys of both parts."""
    both = join(a, b)
    return both.mixed / both.total


class Seen(NamedTuple):
    """The part of a cache that each token may see."""

    cache_position_BT: jax.Array  # cache position of the token's own key; it sees its row's positions up to this one
    members: Members | None  # the prompts that rows continue, which their tokens see too


def read(q_BTNH, k_BTKH, v_BTKH, own: dict, prompts: dict | None, seen: Seen) -> tuple:
    """Write keys and values into a cache, then attend to it and to the prompts that its
    rows continue.

    Each prompt is read once for all rows that continue it. Returns mixed_BTNH and the
    cache.
    """
    own = write(own, k_BTKH, v_BTKH, seen.cache_position_BT)
    visible_BTC = jnp.arange(own["v"].shape[2]) <= seen.cache_position_BT[..., None]
    if prompts is None:
        return attend(q_BTNH, own["k"], own["v"], visible_BTC, own.get("k_scale"), own.get("v_scale")), own
    q_BKQH = by_key_head(q_BTNH, own["v"].shape[1])
    near = attend_part(q_BKQH, own, for_each_query(visible_BTC, q_BKQH))
    mixed = merge(near, attend_prompts(q_BKQH, prompts, seen.members))
    return by_token(mixed.astype(q_BTNH.dtype), q_BTNH.shape), own


def read_then_write(q_BTNH, k_BTKH, v_BTKH, own: dict, prompts: dict | None, seen: Seen) -> tuple:
    """Do as `read`, but write the key and value of a decode step after attending to the
    cache, and to them apart.

    A TPU's compiler loads a layer's keys into vector memory to attend to them. If the
    step's key is written there, all keys are copied back (jaxreason/plan/README.md).
    """
    if q_BTNH.shape[1] > 1:
        return read(q_BTNH, k_BTKH, v_BTKH, own, prompts, seen)
    C, q_BKQH, at_BT = own["v"].shape[2], by_key_head(q_BTNH, own["v"].shape[1]), seen.cache_position_BT
    new = {name: x.swapaxes(1, 2) if name == "v" else x.transpose(0, 2, 3, 1) for name, x in entries(own, k_BTKH, v_BTKH).items()}
    near = attend_part(q_BKQH, own, for_each_query(jnp.arange(C) < at_BT[..., None], q_BKQH))
    near = join(near, attend_part(q_BKQH, new, for_each_query(((at_BT >= 0) & (at_BT < C))[..., None], q_BKQH)))
    mixed = near.mixed / near.total if prompts is None else merge(near, attend_prompts(q_BKQH, prompts, seen.members))
    mixed, own, k_BTKH, v_BTKH = jax.lax.optimization_barrier((mixed, own, k_BTKH, v_BTKH))
    return by_token(mixed.astype(q_BTNH.dtype), q_BTNH.shape), write(own, k_BTKH, v_BTKH, at_BT)


def attend_prompts(q_BKQH, prompts: dict, members: Members) -> Part:
    """Attend to the prompts that rows continue."""
    count_B = members.length_R
    far = attend_part(members.gather(q_BKQH), prompts, jnp.arange(prompts["v"].shape[2]) < count_B[:, None, None, None])
    far = Part(*(members.scatter(x) for x in far))
    # Rows without a shared prompt gathered an arbitrary prompt's scores; mask them out.
    return far._replace(highest=jnp.where(members.belongs_B[:, None, None, None], far.highest, MASKED))


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), with optional QK
    norm and biases.

    Without a cache the tokens attend to each other through `kernel.attend`; with a
    cache they attend to it through `kernel.read`. If `fused`, one product computes the
    queries, the key and the value of each key head.
    """

    def __init__(self, c: ModelConfig, *, fused: bool = False, rngs: nnx.Rngs):
        def projection(*outputs):
            return Projection((c.width,), outputs, bias=c.qkv_bias, rngs=rngs)

        K, H = c.kv_heads, c.head_size
        self.q, self.k, self.v = (None,) * 3 if fused else (projection(n, H) for n in (c.heads, K, K))
        self.qkv = projection(K, c.heads // K + 2, H) if fused else None
        self.o = Projection((c.heads, c.head_size), (c.width,), gain=(2 * c.layers) ** -0.5, rngs=rngs)
        self.q_norm = Norm(c.head_size, c.norm_eps) if c.qk_norm else None
        self.k_norm = Norm(c.head_size, c.norm_eps) if c.qk_norm else None

    def __call__(self, x_BTD, rotations, seen, cache, kernel):
        q, k, v = self.project(x_BTD)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        turn = kernel.rotate if cache is None else rotate
        q, k = turn(q, *rotations), turn(k, *rotations)
        if cache is None:
            return self.o(kernel.attend(q, k, v, seen)), None
        mixed, own = kernel.read(q, k, v, *cache, seen)
        return self.o(mixed), own

    def project(self, x_BTD) -> tuple:
        if self.qkv is None:
            return self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        y = self.qkv(x_BTD)
        return y[..., :-2, :].reshape(*x_BTD.shape[:2], -1, y.shape[-1]), y[..., -2, :], y[..., -1, :]


def write(cache: dict, k_BTKH, v_BTKH, cache_position_BT) -> dict:
    """Write keys and values at positions of a cache.

    Positions outside 0..C-1 are dropped, so padding and idle slots write nothing.
    """
    C = cache["v"].shape[2]
    row_B1 = jnp.arange(len(cache_position_BT))[:, None]
    cache_position_BT = jnp.where(cache_position_BT < 0, C, cache_position_BT)  # negative indices would wrap; C is dropped
    new = entries(cache, k_BTKH, v_BTKH)

    def write_array(name):
        into = cache[name]
        at = into.at[row_B1, :, cache_position_BT] if name == "v" else into.at[row_B1, :, :, cache_position_BT]
        return at.set(new[name], mode="drop")

    return {name: write_array(name) for name in cache}


def entries(cache: dict, k_BTKH, v_BTKH) -> dict:
    """Return keys and values as a cache holds them, with their scales if it is int8."""
    new = {"k": k_BTKH, "v": v_BTKH}
    if "k_scale" in cache:
        new["k"], new["k_scale"] = quantise(k_BTKH)
        new["v"], new["v_scale"] = quantise(v_BTKH)
    return {name: x.astype(cache[name].dtype) for name, x in new.items()}


def quantise(x_BTKH):
    """Round each head's vector to int8 with its own scale, float32 [B, T, K, 1]."""
    x32 = x_BTKH.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x32), axis=-1, keepdims=True), 1e-30) / 127
    return jnp.round(x32 / scale).astype(jnp.int8), scale


class MLP(nnx.Module):
    """Gated feed-forward with SiLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, c: ModelConfig, *, fused: bool = False, rngs: nnx.Rngs):
        def projection(*outputs):
            return Projection((c.width,), outputs, rngs=rngs)

        self.gate, self.up = (None, None) if fused else (projection(c.feed_forward), projection(c.feed_forward))
        self.gate_up = projection(c.feed_forward, 2) if fused else None
        self.down = Projection((c.feed_forward,), (c.width,), gain=(2 * c.layers) ** -0.5, rngs=rngs)

    def __call__(self, x_BTD):
        if self.gate_up is None:
            gate, up = self.gate(x_BTD), self.up(x_BTD)
        else:
            gate, up = jnp.moveaxis(self.gate_up(x_BTD), -1, 0)
        return self.down(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """One pre-norm decoder layer. The output projections of attention and MLP start
    with a factor of 1/sqrt(2 L) (GPT-2), so depth adds no variance.

    If `fused`, projections of the same input are one product, which reads weights
    fastest when decoding (see `decode_layout.decode_layer`).
    """

    def __init__(self, c: ModelConfig, *, fused: bool = False, rngs: nnx.Rngs):
        self.attention_norm = Norm(c.width, c.norm_eps)
        self.attention = Attention(c, fused=fused, rngs=rngs)
        self.mlp_norm = Norm(c.width, c.norm_eps)
        self.mlp = MLP(c, fused=fused, rngs=rngs)

    def __call__(self, x_BTD, rotations, seen, cache, kernel):
        mixed, cache = self.attention(self.attention_norm(x_BTD), rotations, seen, cache, kernel)
        x_BTD = x_BTD + mixed
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache
