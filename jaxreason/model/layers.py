"""One block of the decoder, as `flax.nnx` modules: RMSNorm, rotary positions, grouped-query attention, gated MLP.

Nothing here is stateful: a key/value cache goes in as an argument and comes back as a result. Weights are kept in the
dtype they were made in and cast to the dtype of the activations where they are used, so master weights stay float32
under bfloat16 compute. Sums that lose digits (norms, softmax, rotations) run in float32 whatever the dtype.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxreason.model.config import ModelConfig

MASKED = -1e30  # finite: a row that may see nothing (padding) gives a uniform softmax, never NaN


class Norm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size))

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return scaled(x32.astype(x.dtype), self.scale[...].astype(x.dtype))


@jax.custom_vjp
def scaled(x, scale_D):
    """`x * scale_D`, whose gradient by the scale is a matrix product with ones.

    XLA:CPU would sum into a row of the stacked scales, [1, D], one number at a time: 128 x 576 in 0.23 ms, and so in 0.04 ms (one
    core of a Zen 5 EPYC, 2026-11-26).
    """
    return x * scale_D


def scaled_forward(x, scale_D):
    return x * scale_D, (x, scale_D)


def scaled_backward(kept, gradient):
    x, scale_D = kept
    products_RD = (gradient * x).reshape(-1, x.shape[-1])
    ones_R = jnp.ones(len(products_RD), x.dtype)
    by_scale_D = jnp.matmul(ones_R, products_RD, precision="highest", preferred_element_type=jnp.float32)
    return gradient * scale_D, by_scale_D.astype(scale_D.dtype)


scaled.defvjp(scaled_forward, scaled_backward)


class Projection(nnx.Module):
    """A linear map from the last `inputs` axes to `outputs` axes, drawn from a normal of variance gain^2 / fan-in.

    With `transposed`, its kernel is a matrix of [outputs, inputs] (see `from_left`).
    """

    def __init__(self, inputs: tuple, outputs: tuple, *, gain: float = 1.0, bias: bool = False, rngs: nnx.Rngs):
        fan_in = math.prod(inputs)
        self.inputs, self.outputs, self.transposed = inputs, outputs, False
        self.scale = 0.0  # of the adapters a and b, for those who add them
        self.kernel = nnx.Param(gain * fan_in**-0.5 * jax.random.normal(rngs.params(), (*inputs, *outputs)))
        # A bias starts at zero, as in every published model that has one: its gradient does not vanish with it.
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x):
        lead = x.shape[: x.ndim - len(self.inputs)]
        kernel, whole, x = self.kernel[...].astype(x.dtype), x, x.reshape(*lead, -1)
        if self.transposed:
            y = from_left(kernel, x)
        else:
            y = product(x, kernel.reshape(math.prod(self.inputs), math.prod(self.outputs)))
        y = y.reshape(*lead, *self.outputs)
        if self.scale:
            y += self.scale * self.b(self.a(whole))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


@jax.custom_vjp
def product(x, kernel_IO):
    """`x @ kernel_IO`, whose gradient by the kernel comes as [I, O].

    jax gives it as [O, I] and turned, for which XLA:CPU copies the wider factor and takes its slower product: 60 to 75 GFLOP/s of
    130 to 168, 128 to 512 wide (tiny; one core of a Zen 5 EPYC, 2026-11-26).
    """
    return x @ kernel_IO


def product_forward(x, kernel_IO):
    return x @ kernel_IO, (x, kernel_IO)


def product_backward(kept, gradient):
    x, kernel_IO = kept
    rows = tuple(range(x.ndim - 1))
    by_kernel_IO = jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())))
    return gradient @ kernel_IO.T, by_kernel_IO


product.defvjp(product_forward, product_backward)


def from_left(kernel_OI, x, out_dtype=None):
    """`x @ kernel.T` with the kernel as the left factor, for the few rows of a decode step on a CPU.

    One EPYC core, 16 rows, float32, 30 matrices of 576 x 1536 (2026-11-24): 62 GFLOP/s so, 42 for x @ kernel, 40 for
    x @ kernel.T. The barriers keep XLA from folding the transposes away, back into x @ kernel.T.
    """
    x_IR = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    y_OR = jax.lax.optimization_barrier(jnp.matmul(kernel_OI, x_IR, preferred_element_type=out_dtype))
    return y_OR.T.reshape(*x.shape[:-1], -1)


def rotate(x_BTNH, cos_BTH, sin_BTH):
    """Rotate each head's halves by position (Su et al. 2021, arXiv 2104.09864, in the two-halves order of Llama)."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    x32 = jnp.concatenate([first, second], axis=-1)
    return (x32 * cos_BTH[:, :, None] + turned * sin_BTH[:, :, None]).astype(x_BTNH.dtype)


def attend(q_BTNH, k_BKHC, v_BKCH, visible_BTC, k_scale_BK1C=None, v_scale_BK1C=None):
    """Softmax attention of grouped queries over C keys, as two plain batched matrix products.

    Keys and values may be kept in another dtype than the queries; those of an int8 cache have a scale for each column.

    The queries that share a key head become rows of one matrix: 1.5 times faster on a CPU than five-index einsums. Keys stand
    in columns: a CPU transposes them otherwise, at every step (30 layers of 16 slots x 128 columns: 7 ms, and 46 ms in rows;
    one EPYC core, 2026-11-24).
    """
    B, T, N, H = q_BTNH.shape
    K, C = v_BKCH.shape[1:3]
    q = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)
    scores = jnp.matmul(q * H**-0.5, k_BKHC.astype(q.dtype), preferred_element_type=jnp.float32)
    if k_scale_BK1C is not None:
        scores *= k_scale_BK1C
    scores = scores.reshape(B, K, N // K, T, C)
    scores = jnp.where(visible_BTC[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).reshape(B, K, N // K * T, C)
    if v_scale_BK1C is not None:
        weights *= v_scale_BK1C
    mixed = jnp.matmul(weights.astype(q.dtype), v_BKCH.astype(q.dtype)).reshape(B, K, N // K, T, H)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), with QK norm and biases where the config has them.

    Without a cache the tokens attend to each other by `kernel(q_BTNH, k_BTKH, v_BTKH, seen)`; with one `seen` is visible_BTC.
    """

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        self.q = Projection((c.width,), (c.heads, c.head_size), bias=c.qkv_bias, rngs=rngs)
        self.k = Projection((c.width,), (c.kv_heads, c.head_size), bias=c.qkv_bias, rngs=rngs)
        self.v = Projection((c.width,), (c.kv_heads, c.head_size), bias=c.qkv_bias, rngs=rngs)
        self.o = Projection((c.heads, c.head_size), (c.width,), gain=(2 * c.layers) ** -0.5, rngs=rngs)
        self.q_norm = Norm(c.head_size, c.norm_eps) if c.qk_norm else None
        self.k_norm = Norm(c.head_size, c.norm_eps) if c.qk_norm else None

    def __call__(self, x_BTD, rotations, seen, position_BT, cache, kernel):
        q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rotations), rotate(k, *rotations)
        if cache is None:
            return self.o(kernel(q, k, v, seen)), None
        cache = write(cache, k, v, position_BT)
        return self.o(attend(q, cache["k"], cache["v"], seen, cache.get("k_scale"), cache.get("v_scale"))), cache


def write(cache: dict, k_BTKH, v_BTKH, position_BT) -> dict:
    """Put keys and values at their positions in a cache.

    A position outside 0..C-1 is dropped: this is how padding and idle slots leave no trace.
    """
    C = cache["v"].shape[2]
    row_B1 = jnp.arange(len(position_BT))[:, None]
    column_BT = jnp.where(position_BT < 0, C, position_BT)  # a negative index would wrap, one past the end is dropped
    new = {"k": k_BTKH, "v": v_BTKH}
    if "k_scale" in cache:
        new["k"], new["k_scale"] = quantise(k_BTKH)
        new["v"], new["v_scale"] = quantise(v_BTKH)

    def put(name):
        into = cache[name]
        at = into.at[row_B1, :, column_BT] if name == "v" else into.at[row_B1, :, :, column_BT]
        return at.set(new[name].astype(into.dtype), mode="drop")

    return {name: put(name) for name in cache}


def quantise(x_BTKH):
    """Round each head's vector to int8 of a scale of its own, float32 [B, T, K, 1]."""
    x32 = x_BTKH.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x32), axis=-1, keepdims=True), 1e-30) / 127
    return jnp.round(x32 / scale).astype(jnp.int8), scale


class MLP(nnx.Module):
    """Gated feed-forward with SiLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        self.gate = Projection((c.width,), (c.feed_forward,), rngs=rngs)
        self.up = Projection((c.width,), (c.feed_forward,), rngs=rngs)
        self.down = Projection((c.feed_forward,), (c.width,), gain=(2 * c.layers) ** -0.5, rngs=rngs)

    def __call__(self, x_BTD):
        return self.down(jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nnx.Module):
    """One pre-norm decoder layer. At the start its two outputs are scaled by 1/sqrt(2 L) (GPT-2), so depth adds no variance."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = Norm(c.width, c.norm_eps)
        self.attention = Attention(c, rngs=rngs)
        self.mlp_norm = Norm(c.width, c.norm_eps)
        self.mlp = MLP(c, rngs=rngs)

    def __call__(self, x_BTD, rotations, seen, position_BT, cache, kernel):
        mixed, cache = self.attention(self.attention_norm(x_BTD), rotations, seen, position_BT, cache, kernel)
        x_BTD = x_BTD + mixed
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache
