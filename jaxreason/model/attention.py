"""Attention of T tokens to each other by one of `KERNELS`, chosen by
`ModelConfig.attention`.

    xla      two batched matrix products around a softmax: any device, any dtype; it
             makes half of the scores [B, N, T, T] and somewhat more
    cudnn    cuDNN's flash attention (`jax.nn.dot_product_attention`): NVIDIA GPUs,
             bfloat16
    splash   the flash kernel for TPUs that comes with jax
             (`jax.experimental.pallas.ops.tpu.splash_attention`)

They differ in speed, memory and rounding only: with each, a token sees itself and what
came before it in its segment. Branches of a segment (`causal`), by which attempts share
a prompt, are for xla alone. They serve the path without a cache (training, log-probs).
With a cache it is XLA: a decode step has one query a row and no square of scores for a
flash kernel to save, and a prompt is prefilled once for all of its attempts; but with
`cudnn` a decode step goes by `decode_attention`, one kernel that leaves out columns
that hold nothing.

Figures: jaxreason/bench/README.md (GPUs) and jaxreason/plan/README.md (programs for
TPUs). splash has not been timed.

Left out: tokamax (0.0.12), whose public attention has no segments and, on a TPU, takes
no mask that differs from row to row; its TPU kernel is a relative of splash.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxreason.model import decode_attention
from jaxreason.model.config import ModelConfig
from jaxreason.model.layers import MASKED, by_key_head, by_token, for_each_query, read, rotate, rotate_by_product
from jaxreason.sharding import ROWS

LANES = 128  # a TPU kernel's blocks are whole multiples of them
PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}


class Kernel(NamedTuple):
    """One way to compute attention without a cache."""

    see: Callable
    """`see(position_BT, segment_BT) -> seen`: what may be seen, as `attend` takes it; made once for all layers."""
    attend: Callable
    """`attend(q_BTNH, k_BTKH, v_BTKH, seen) -> mixed_BTNH`."""
    rotate: Callable = rotate
    """`rotate(x_BTNH, cos_BTH, sin_BTH) -> x_BTNH`, without a cache."""
    read: Callable = read
    """`read(q_BTNH, k_BTKH, v_BTKH, own, prompts, seen) -> (mixed_BTNH, own)`, with a cache; see `layers.read`."""


def causal(position_BT, segment_BT):
    """Mask, bool [B, T, T]: each token may see itself and the earlier tokens of its
    segment.

    Where positions fall back within a segment a branch begins: it sees, of what came
    before it, positions before its own first. So attempts at a problem can stand one
    behind the other after a single copy of its prompt.
    """
    B, T = position_BT.shape
    earlier_TT = jnp.tril(jnp.ones((T, T), bool))
    if segment_BT is None:
        return jnp.broadcast_to(earlier_TT, (B, T, T))
    follows_BT = (jnp.diff(position_BT, axis=1, prepend=-1) == 1) & (jnp.diff(segment_BT, axis=1, prepend=-1) == 0)
    branch_BT = jax.lax.cummax(jnp.where(follows_BT, 0, jnp.arange(T)), axis=1)  # the column that it begins at
    first_BT = jnp.take_along_axis(position_BT, branch_BT, axis=1)
    same_BTT = segment_BT[:, :, None] == segment_BT[:, None, :]
    branch_BTT = branch_BT[:, :, None] == branch_BT[:, None, :]
    return earlier_TT & same_BTT & (branch_BTT | (position_BT[:, None, :] < first_BT[:, :, None]))


def xla(config: ModelConfig, mesh=None) -> Kernel:
    """Make the plain one; the compiler splits it over any mesh by itself.

    Queries are taken in parts, since early ones need not be multiplied with later keys
    (jaxreason/bench/README.md).
    """

    def see(position_BT, segment_BT):
        """Make the bias that is added to scores, float32 [B, T, T].

        A choice between scores and `MASKED` is slower on a CPU.
        """
        return jnp.where(causal(position_BT, segment_BT), jnp.float32(0), jnp.float32(MASKED))

    def attend_xla(q_BTNH, k_BTKH, v_BTKH, bias_BTT):
        k_BKHT, v_BKTH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.swapaxes(1, 2)

        def queries(first, stop):
            q = q_BTNH[:, first:stop]
            q_BKQH = by_key_head(q, k_BTKH.shape[2])
            bias = for_each_query(bias_BTT[:, first:stop, :stop], q_BKQH)
            return by_token(mix(q_BKQH, k_BKHT[..., :stop], v_BKTH[:, :, :stop], bias), q.shape)

        return jnp.concatenate([queries(*some) for some in query_parts(q_BTNH.shape[1])], axis=1)

    return Kernel(see, attend_xla)


def query_parts(tokens: int) -> list[tuple[int, int]]:
    """The parts in which the plain kernel takes its queries, first and end of each: 128
    to 256 tokens, or an eighth of them.

    Parts of 64 tokens are no faster and take longer to compile.
    """
    count = min(max(1, tokens // 128), 8)
    return list(itertools.pairwise(tokens * i // count for i in range(count + 1)))


@jax.custom_vjp
def mix(q_BKQH, k_BKHT, v_BKTH, bias):
    """Softmax attention, with its gradient written out.

    The sum in the gradient of a softmax is one over H here, `sum(gradient * mixed)`
    (Dao et al. 2022, arXiv 2205.14135, eq. 4), not over T, which XLA:CPU is slow at.
    The weights are kept in the dtype of the queries.
    """
    return mix_forward(q_BKQH, k_BKHT, v_BKTH, bias)[0]


def mix_forward(q_BKQH, k_BKHT, v_BKTH, bias):
    scores = jnp.matmul(q_BKQH * q_BKQH.shape[-1] ** -0.5, k_BKHT, preferred_element_type=jnp.float32) + bias
    weights_BKQT = jax.nn.softmax(scores, axis=-1).astype(q_BKQH.dtype)
    mixed_BKQH = jnp.matmul(weights_BKQT, v_BKTH)
    return mixed_BKQH, (q_BKQH, k_BKHT, v_BKTH, weights_BKQT, mixed_BKQH)


def mix_backward(kept, gradient_BKQH):
    # All products as row by column, which a CPU is faster at: what is turned for it is
    # narrow.
    q_BKQH, k_BKHT, v_BKTH, weights_BKQT, mixed_BKQH = kept
    by_v_BKHT = jnp.matmul(gradient_BKQH.swapaxes(-1, -2), weights_BKQT)
    by_weights_BKQT = jnp.matmul(gradient_BKQH, v_BKTH.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    sum_BKQ1 = jnp.sum(gradient_BKQH.astype(jnp.float32) * mixed_BKQH, axis=-1, keepdims=True)
    by_scores_BKQT = (weights_BKQT * (by_weights_BKQT - sum_BKQ1)).astype(q_BKQH.dtype)
    scale = q_BKQH.shape[-1] ** -0.5
    by_q_BKQH = jnp.matmul(by_scores_BKQT, k_BKHT.swapaxes(-1, -2)) * scale
    by_k_BKHT = jnp.matmul((q_BKQH * scale).swapaxes(-1, -2), by_scores_BKQT)
    return by_q_BKQH, by_k_BKHT, by_v_BKHT.swapaxes(-1, -2), None


mix.defvjp(mix_forward, mix_backward)


def cudnn(config: ModelConfig, mesh=None, *, implementation: str = "cudnn") -> Kernel:
    """Make cuDNN's; with `implementation="xla"` the same call runs anywhere.

    Segments reach cuDNN as a bias of [B, 1, T, T], once for all heads: jax's public
    function has no other way to say them. So it saves N - 1 of N squares of scores
    then, and all of them without segments.
    """

    def see(position_BT, segment_BT):
        if segment_BT is None:
            return None
        segment_BT = pad_tokens(segment_BT, 2)
        return segment_BT[:, None, :, None] == segment_BT[:, None, None, :]

    def attend_cudnn(q_BTNH, k_BTKH, v_BTKH, same_B1TT):
        T = q_BTNH.shape[1]
        q, k, v = (pad_tokens(x, 2) for x in (q_BTNH, k_BTKH, v_BTKH))  # jax refuses to differentiate cuDNN's at an odd T
        mixed = jax.nn.dot_product_attention(q, k, v, mask=same_B1TT, is_causal=True, implementation=implementation)
        return mixed[:, :T]

    step = decode_attention.on_each_device(mesh, interpret=implementation == "xla")

    def read_cudnn(q_BTNH, k_BTKH, v_BTKH, own, prompts, seen):
        one_token = q_BTNH.shape[1] == 1 and decode_attention.fits(own)
        return (step if one_token else read)(q_BTNH, k_BTKH, v_BTKH, own, prompts, seen)

    return Kernel(see, split(attend_cudnn, config, mesh), read=read_cudnn)


def splash(config: ModelConfig, mesh=None, *, interpret: bool = False) -> Kernel:
    """Make the TPU's; with `interpret` it runs anywhere, slowly."""

    def attend_splash(q_BTNH, k_BTKH, v_BTKH, segment_BT):
        # Imported where used: pallas for TPUs takes a tenth of a second to load.
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        _, T, N, H = q_BTNH.shape
        q, k, v = (pad_tokens(x, LANES).swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BTKH, v_BTKH))
        padded = q.shape[2]
        # The widest block that divides T, 512 at most: a block of scores and its
        # operands must fit a core's memory.
        block = next(size for size in (512, 256, LANES) if padded % size == 0)
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([masks.CausalMask((padded, padded))] * N),
            block_sizes=kernels.BlockSizes(*[block] * 8),  # forward and both backward passes
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        segments = None
        if segment_BT is not None:
            segment_BT = pad_tokens(segment_BT, LANES)
            segments = kernels.SegmentIds(segment_BT, segment_BT)
        return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)[:, :T]

    return Kernel(lambda position_BT, segment_BT: segment_BT, split(attend_splash, config, mesh), rotate=rotate_by_product)


KERNELS = {"xla": xla, "cudnn": cudnn, "splash": splash}


def pad_tokens(x_BT, multiple: int):
    """Lengthen axis 1 with zeros to a multiple. What is added stands after every token,
    so no token sees it.
    """
    return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % multiple), *[(0, 0)] * (x_BT.ndim - 2)))


def split(attend, config: ModelConfig, mesh):
    """Let each device of a mesh run a kernel on its own rows and heads: the compiler
    can't split one by itself.

    Without a mesh the kernel is for one device.

    Raises:
      ValueError: the heads do not divide over the mesh axis "tensor".
    """
    if mesh is None:
        return attend
    if config.kv_heads % mesh.shape["tensor"]:
        raise ValueError(
            f"attention={config.attention!r} got kv_heads {config.kv_heads}, which do not divide over tensor="
            f"{mesh.shape['tensor']}; choose a divisor, or attention='xla'"
        )
    by_head, by_row = P(*ROWS, None, "tensor"), P(*ROWS)
    # Kernels do not say over which axes their results vary, which is what check_vma
    # would check.
    return jax.shard_map(attend, mesh=mesh, in_specs=(by_head, by_head, by_head, by_row), out_specs=by_head, check_vma=False)


def check_platform(config: ModelConfig, platform: str) -> None:
    """Refuse a kernel that is not for these devices. `platform` is that of the devices
    compiled for: "cpu", "gpu" or "tpu".

    Raises:
      ValueError: the kernel is for others.
    """
    needed = PLATFORMS.get(config.attention, platform)
    if platform != needed:
        raise ValueError(
            f"attention={config.attention!r} got devices of platform {platform!r}; allowed: {needed!r}; use attention='xla', or "
            f"pip install 'jaxreason[{needed}]' on a machine that has one"
        )
