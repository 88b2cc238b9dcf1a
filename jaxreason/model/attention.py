"""Attention of T tokens to each other, computed by one of `KERNELS`.
`ModelConfig.attention` selects it.

    xla      two batched matrix products around a softmax: any device, any dtype; it
             computes slightly more than half of the scores [B, N, T, T]
    cudnn    cuDNN's flash attention (`jax.nn.dot_product_attention`): NVIDIA GPUs,
             bfloat16
    splash   the flash kernel for TPUs that comes with jax
             (`jax.experimental.pallas.ops.tpu.splash_attention`)

The kernels differ only in speed, memory and rounding: in each, a token sees itself and
the earlier tokens of its segment. Only xla supports branches of a segment (`causal`),
with which attempts share a prompt.

The kernels compute attention without a cache (training, log-probs). With a cache,
attention uses plain XLA products: a decode step has one query per row, so there is no
square of scores for a flash kernel to avoid, and each prompt is prefilled once for all
of its attempts. One exception: with `cudnn`, a decode step uses `decode_attention`, one
kernel that skips empty cache positions.

Measurements are in jaxreason/bench/README.md (GPUs) and jaxreason/plan/README.md
(programs for TPUs). splash has not been timed.

Not used: tokamax (0.0.12). Its public attention has no segments, and on a TPU accepts
no mask that differs between rows. Its TPU kernel is related to splash.
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
from jaxreason.model.layers import MASKED, by_key_head, by_token, for_each_query, read, rotate
from jaxreason.model.tpu import product_by_head, rotate_by_product
from jaxreason.sharding import ROWS

LANES = 128  # block sizes of a TPU kernel are multiples of this
PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}
ATTENDED = "attended"  # checkpoint name of what splash returns, which the remat "dots" keeps


class Kernel(NamedTuple):
    """One implementation of attention without a cache."""

    see: Callable
    """`see(position_BT, segment_BT) -> seen`: the mask or segments that `attend` takes; made once for all layers."""
    attend: Callable
    """`attend(q_BTNH, k_BTKH, v_BTKH, seen) -> mixed_BTNH`."""
    rotate: Callable = rotate
    """`rotate(x_BTNH, cos_BTH, sin_BTH) -> x_BTNH`, without a cache."""
    project: Callable | None = None
    """`project(x_BTD, kernel_DNH) -> x_BTNH`, without a cache; None: as every projection."""
    read: Callable = read
    """`read(q_BTNH, k_BTKH, v_BTKH, own, prompts, seen) -> (mixed_BTNH, own)`, with a cache; see `layers.read`."""


def causal(position_BT, segment_BT):
    """Return the mask, bool [B, T, T]: each token sees itself and the earlier tokens of
    its segment.

    Within a segment, a branch begins at each token whose position is not the previous
    position plus 1. A branch sees itself, and earlier tokens whose position is below
    its own first position. Several attempts can thus follow a single copy of their
    prompt in one row.
    """
    B, T = position_BT.shape
    earlier_TT = jnp.tril(jnp.ones((T, T), bool))
    if segment_BT is None:
        return jnp.broadcast_to(earlier_TT, (B, T, T))
    follows_BT = (jnp.diff(position_BT, axis=1, prepend=-1) == 1) & (jnp.diff(segment_BT, axis=1, prepend=-1) == 0)
    branch_BT = jax.lax.cummax(jnp.where(follows_BT, 0, jnp.arange(T)), axis=1)  # index in the row at which the branch begins
    first_BT = jnp.take_along_axis(position_BT, branch_BT, axis=1)
    same_BTT = segment_BT[:, :, None] == segment_BT[:, None, :]
    branch_BTT = branch_BT[:, :, None] == branch_BT[:, None, :]
    return earlier_TT & same_BTT & (branch_BTT | (position_BT[:, None, :] < first_BT[:, :, None]))


def xla(config: ModelConfig, mesh=None) -> Kernel:
    """Make the plain kernel. The compiler partitions it over any mesh.

    Queries are processed in parts, so that early queries are not multiplied with later
    keys (jaxreason/bench/README.md).
    """

    def see(position_BT, segment_BT):
        """Make the bias that is added to scores, float32 [B, T, T].

        Selecting between scores and `MASKED` is slower on a CPU.
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
    """Return the parts (first, end) in which the plain kernel processes its queries:
    128 to 256 tokens each, or an eighth of the queries if that is more.

    Parts of 64 tokens are no faster and take longer to compile.
    """
    count = min(max(1, tokens // 128), 8)
    return list(itertools.pairwise(tokens * i // count for i in range(count + 1)))


@jax.custom_vjp
def mix(q_BKQH, k_BKHT, v_BKTH, bias):
    """Compute softmax attention, with a hand-written gradient.

    The sum in the softmax gradient runs over H, as `sum(gradient * mixed)` (Dao et al.
    2022, arXiv 2205.14135, eq. 4), and not over T, which is slow on XLA:CPU. The
    weights are kept in the dtype of the queries.
    """
    return mix_forward(q_BKQH, k_BKHT, v_BKTH, bias)[0]


def mix_forward(q_BKQH, k_BKHT, v_BKTH, bias):
    scores = jnp.matmul(q_BKQH * q_BKQH.shape[-1] ** -0.5, k_BKHT, preferred_element_type=jnp.float32) + bias
    weights_BKQT = jax.nn.softmax(scores, axis=-1).astype(q_BKQH.dtype)
    mixed_BKQH = jnp.matmul(weights_BKQT, v_BKTH)
    return mixed_BKQH, (q_BKQH, k_BKHT, v_BKTH, weights_BKQT, mixed_BKQH)


def mix_backward(kept, gradient_BKQH):
    # Each product multiplies rows by columns, which is faster on a CPU; only narrow
    # arrays are transposed for it.
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
    """Make cuDNN's kernel; with `implementation="xla"` the same call runs anywhere.

    jax's public function can pass segments to cuDNN only as a bias of [B, 1, T, T],
    shared by all heads. With segments it thus stores one matrix [T, T] per row instead
    of N, and without segments none.
    """

    def see(position_BT, segment_BT):
        if segment_BT is None:
            return None
        segment_BT = pad_tokens(segment_BT, 2)
        return segment_BT[:, None, :, None] == segment_BT[:, None, None, :]

    def attend_cudnn(q_BTNH, k_BTKH, v_BTKH, same_B1TT):
        T = q_BTNH.shape[1]
        q, k, v = (pad_tokens(x, 2) for x in (q_BTNH, k_BTKH, v_BTKH))  # jax refuses the gradient of cuDNN's at an odd T
        mixed = jax.nn.dot_product_attention(q, k, v, mask=same_B1TT, is_causal=True, implementation=implementation)
        return mixed[:, :T]

    step = decode_attention.on_each_device(mesh, interpret=implementation == "xla")

    def read_cudnn(q_BTNH, k_BTKH, v_BTKH, own, prompts, seen):
        one_token = q_BTNH.shape[1] == 1 and decode_attention.fits(own)
        return (step if one_token else read)(q_BTNH, k_BTKH, v_BTKH, own, prompts, seen)

    return Kernel(see, split(attend_cudnn, config, mesh), read=read_cudnn)


def splash(config: ModelConfig, mesh=None, *, interpret: bool = False) -> Kernel:
    """Make the TPU kernel; with `interpret` it runs anywhere, slowly."""

    def attend_splash(q_BTNH, k_BTKH, v_BTKH, segment_BT):
        # Imported here because pallas for TPUs takes 0.1 s to load.
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        _, T, N, H = q_BTNH.shape
        q, k, v = (pad_tokens(x, LANES).swapaxes(1, 2) for x in (q_BTNH * H**-0.5, k_BTKH, v_BTKH))
        padded = q.shape[2]
        # The largest block size that divides the padded T, at most 512: a block of
        # scores and its operands must fit the core's memory.
        block = next(size for size in (512, 256, LANES) if padded % size == 0)
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([masks.CausalMask((padded, padded))] * N),
            block_sizes=kernels.BlockSizes(*[block] * 8),  # forward and both backward passes
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=ATTENDED,
            interpret=interpret,
        )
        segments = None
        if segment_BT is not None:
            segment_BT = pad_tokens(segment_BT, LANES)
            segments = kernels.SegmentIds(segment_BT, segment_BT)
        return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)[:, :T]

    def see(position_BT, segment_BT):
        return segment_BT

    return Kernel(see, split(attend_splash, config, mesh), rotate=rotate_by_product, project=product_by_head)


KERNELS = {"xla": xla, "cudnn": cudnn, "splash": splash}


def pad_tokens(x_BT, multiple: int):
    """Pad axis 1 with zeros to a multiple. The padding follows all tokens, so no token
    sees it.
    """
    return jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % multiple), *[(0, 0)] * (x_BT.ndim - 2)))


def split(attend, config: ModelConfig, mesh):
    """Run a kernel on each device's own rows and heads. The compiler can't partition
    such a kernel by itself.

    Without a mesh the kernel runs on one device.

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
    # check_vma needs to know over which axes the results vary, and these kernels do not
    # declare it.
    return jax.shard_map(attend, mesh=mesh, in_specs=(by_head, by_head, by_head, by_row), out_specs=by_head, check_vma=False)


def check_platform(config: ModelConfig, platform: str) -> None:
    """Refuse a kernel that the devices can't run. `platform` is the platform compiled
    for: "cpu", "gpu" or "tpu".

    Raises:
      ValueError: the kernel needs another platform.
    """
    needed = PLATFORMS.get(config.attention, platform)
    if platform != needed:
        raise ValueError(
            f"attention={config.attention!r} got devices of platform {platform!r}; allowed: {needed!r}; use attention='xla', or "
            f"pip install 'jaxreason[{needed}]' on a machine that has one"
        )
