"""Attention of a decode step on a GPU, as one Pallas kernel for Triton that reads only
filled cache positions.

A cache is as long as its longest rollout needs, and the plain products of `layers.read`
read all of its positions in all rows. Here one program per row and key head writes the
new key and value into the cache, then loops over the row's prompt and its own positions
with the softmax of flash attention (Dao et al. 2022, arXiv 2205.14135): running
maximum, running sum. Rows that share a prompt mostly run at the same time, so the
prompt is mostly in the GPU's cache. Not supported: head sizes below 16 or not a power
of two, and int8.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxreason.model.layers import MASKED, Seen, by_key_head, by_token
from jaxreason.sharding import ROWS

BLOCK = 64  # cache positions that a program reads at a time
QUERIES = 16  # rows of a tensor core's smallest product


def fits(own: dict) -> bool:
    """Return whether the kernel supports this cache."""
    H = own["v"].shape[-1]
    return "v_scale" not in own and H >= 16 and H & (H - 1) == 0


def attend_cache(q_BKQH, k_BKH, v_BKH, own: dict, prompts: dict, cache_position_B, row_B, begins_B, *, interpret: bool = False):
    """Write one key and value per row at `cache_position_B` (negative: nowhere), and
    attend to the row's positions up to it.

    Row b also sees the first `begins_B[b]` positions of prompt `row_B[b]`. With
    `interpret` it runs anywhere, slowly. Returns mixed_BKQH and the cache.
    """
    # Imported here because it takes 0.1 s to load.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    B, K, Q, H = q_BKQH.shape
    (R, *_, P), C = prompts["k"].shape, own["v"].shape[2]
    rows = max(QUERIES, pl.next_power_of_2(Q))
    dtype = q_BKQH.dtype

    def kernel(position_ref, row_ref, begins_ref, q_ref, k_ref, v_ref, keys, values, prompt_keys, prompt_values, *out):
        mixed_ref, keys_out, values_out = out
        position, row, begins = position_ref[0], row_ref[0], begins_ref[0]
        asked = jnp.broadcast_to(jnp.arange(rows)[:, None] < Q, (rows, H))
        q = triton.load(q_ref, mask=asked, other=0)
        k_H, v_H = k_ref[...], v_ref[...]
        here = jnp.broadcast_to((position >= 0) & (position < C), (H,))
        at = jnp.clip(position, 0, C - 1)
        triton.store(keys_out.at[:, at], k_H, mask=here)
        triton.store(values_out.at[at, :], v_H, mask=here)

        def over(count, load_k, load_v, carry):
            """Continue the softmax over the first `count` positions of some keys and
            values.
            """

            def some(i, carry):
                mixed, highest, total = carry
                block = pl.ds(i * BLOCK, BLOCK)
                there = i * BLOCK + jnp.arange(BLOCK) < count
                k = load_k(block, jnp.broadcast_to(there[None], (H, BLOCK)))
                scores = jnp.dot(q, k.astype(dtype), preferred_element_type=jnp.float32) * H**-0.5
                scores = jnp.where(there[None], scores, MASKED)
                higher = jnp.maximum(highest, jnp.max(scores, axis=1))
                weights, back = jnp.exp(scores - higher[:, None]), jnp.exp(highest - higher)
                v = load_v(block, jnp.broadcast_to(there[:, None], (BLOCK, H)))
                more = jnp.dot(weights.astype(dtype), v.astype(dtype), preferred_element_type=jnp.float32)
                return mixed * back[:, None] + more, higher, total * back + jnp.sum(weights, axis=1)

            return jax.lax.fori_loop(0, pl.cdiv(count, BLOCK), some, carry)

        def load(ref, index):
            return lambda block, mask: triton.load(ref.at[index(block)], mask=mask, other=0)

        # Start with the token itself, so that every row has at least one key.
        alone = jnp.sum(q.astype(jnp.float32) * k_H.astype(jnp.float32)[None], axis=1) * H**-0.5
        carry = (jnp.broadcast_to(v_H.astype(jnp.float32)[None], (rows, H)), alone, jnp.ones(rows, jnp.float32))
        of_prompt = load(prompt_keys, lambda c: (row, slice(None), c)), load(prompt_values, lambda c: (row, c, slice(None)))
        carry = over(begins, *of_prompt, carry)
        of_own = load(keys, lambda c: (slice(None), c)), load(values, lambda c: (c, slice(None)))
        mixed, _, total = over(jnp.clip(position, 0, C), *of_own, carry)
        triton.store(mixed_ref, (mixed / total[:, None]).astype(dtype), mask=asked)

    def block(*shape):
        """Select the part of an array [B, K, *shape] for row b and key head k."""
        return pl.BlockSpec((None, None, *shape), lambda b, k: (b, k, *[0] * len(shape)))

    def of_all_rows(*shape):
        return pl.BlockSpec((R, None, *shape), lambda b, k: (0, k, *[0] * len(shape)))

    number = pl.BlockSpec((1,), lambda b, k: (b,))
    keys, values = own["k"], own["v"]
    mixed, keys, values = pl.pallas_call(
        kernel,
        grid=(B, K),
        in_specs=[
            *[number] * 3,
            *[block(rows, H), block(H), block(H)],
            *[block(H, C), block(C, H)],
            *[of_all_rows(H, P), of_all_rows(P, H)],
        ],
        out_specs=[block(rows, H), block(H, C), block(C, H)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BKQH, keys, values)],
        input_output_aliases={6: 1, 7: 2},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="attend_cache",
    )(
        *[x.astype(jnp.int32) for x in (cache_position_B, row_B, begins_B)],
        *[q_BKQH, k_BKH.astype(keys.dtype), v_BKH.astype(values.dtype)],
        *[keys, values, prompts["k"], prompts["v"]],
    )
    return mixed, {"k": keys, "v": values}


def on_each_device(mesh, *, interpret: bool = False):
    """Make a `read` for one token per row, which each device of a mesh runs on its own
    rows and heads (see `attention.Kernel`).
    """
    attend = functools.partial(attend_cache, interpret=interpret)
    if mesh is not None:
        by_head, by_row = jax.P(*ROWS, "tensor"), jax.P(*ROWS)
        specs = (*[by_head] * 5, *[by_row] * 3)
        # check_vma needs to know over which axes the results vary, and these kernels do
        # not declare it.
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=by_head, check_vma=False)

    def read(q_BTNH, k_BTKH, v_BTKH, own, prompts, seen: Seen):
        q_BKQH, cache_position_B = by_key_head(q_BTNH, own["v"].shape[1]), seen.cache_position_BT[:, 0]
        if prompts is None:
            # A placeholder of the right dtype, from which nothing is read. It can't be
            # `own` itself, which is written in place.
            prompts = {"k": own["k"][..., :1], "v": own["v"][:, :, :1]}
            row_B = begins_B = jnp.zeros_like(cache_position_B)
        else:
            row_B, begins_B = seen.members.row_DB().reshape(-1), seen.members.begins_B()
        mixed, own = attend(q_BKQH, k_BTKH[:, 0], v_BTKH[:, 0], own, prompts, cache_position_B, row_B, begins_B)
        return by_token(mixed, q_BTNH.shape), own

    return read
