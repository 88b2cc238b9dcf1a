"""Draw a token from logits: temperature, filters, and one draw per row from two
uniforms.

The noise of a token is keyed by its attempt and its position and by nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Filter(NamedTuple):
    """The tokens that may be drawn, after the temperature.

    The `top_k` likeliest (0: all); of these the fewest whose share is at least `top_p`
    (Holtzman et al. 2019, arXiv 1904.09751); of these the ones at least `min_p` times
    as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082).
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


ALL = Filter()


def uniforms(key_S, position_S):
    """Two uniforms for the token at a position of each rollout, [S, 2]; `key_S` are the
    key data of (problem, attempt).
    """
    keys_S = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_S), position_S)
    return jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_S)


def sample(logits_SV, u_S2, temperature, filter: Filter = ALL):
    """Sample a token a row by its two uniforms, and its log-prob under the tempered and
    filtered distribution.

    Temperature 0 takes the most likely token; the log-prob is then that of temperature
    1.
    """
    greedy = temperature <= 0
    scaled_SV = logits_SV / jnp.where(greedy, 1.0, temperature)
    highest_S = jnp.max(scaled_SV, axis=-1)
    p_SV = kept(jnp.exp(scaled_SV - highest_S[:, None]), filter)
    # The likeliest has exactly 1. An argmax over the vocabulary would cost a fourteenth
    # of a decode step, used or not.
    token_S = draw(jnp.where(greedy, p_SV == 1, p_SV), jnp.where(greedy, 0.0, u_S2)).astype(jnp.int32)
    chosen_S = jnp.take_along_axis(scaled_SV, token_S[:, None], axis=1)[:, 0]
    return token_S, chosen_S - highest_S - jnp.log(jnp.sum(p_SV, axis=-1))


def kept(p_SV, filter: Filter):
    """Set to zero what a filter leaves out. `p_SV` need not sum to one. Words equally
    likely are kept or left together.
    """
    if filter.top_k:
        kth_S1 = jax.lax.top_k(p_SV, min(filter.top_k, p_SV.shape[1]))[0][:, -1:]
        p_SV = jnp.where(p_SV >= kth_S1, p_SV, 0)
    if filter.top_p < 1:
        falling_SV = -jnp.sort(-p_SV, axis=-1)
        before_SV = jnp.cumsum(falling_SV, axis=-1) - falling_SV  # share of what is likelier
        needed_SV = before_SV < filter.top_p * jnp.sum(p_SV, axis=-1, keepdims=True)
        least_S1 = jnp.min(jnp.where(needed_SV, falling_SV, jnp.inf), axis=-1, keepdims=True)
        p_SV = jnp.where(p_SV >= least_S1, p_SV, 0)
    if filter.min_p:
        p_SV = jnp.where(p_SV >= filter.min_p * jnp.max(p_SV, axis=-1, keepdims=True), p_SV, 0)
    return p_SV


def draw(p_SV, u_S2, width: int = 128):
    """Draw an index a row in proportion to `p_SV`, which need not sum to one: the
    inverse of its cumulative sum at two uniforms.

    One picks a block of `width` tokens, the other a token in it; two zeros pick the
    first that is not 0. Gumbel noise, one number per token, took a quarter of a decode
    step on a CPU (jaxreason/bench/README.md).
    """
    p_SNW = split_blocks(p_SV, width)
    block_S = invert(jnp.sum(p_SNW, axis=-1), u_S2[:, 0])
    return block_S * width + invert(take_block(p_SNW, block_S), u_S2[:, 1])


def invert(p_SV, u_S, width: int = 16):
    """Return the first index of each row at which the cumulative sum is above the share
    `u_S` of the whole.

    First the block of `width` that it is in: two short cumulative sums take less time
    than a long one.
    """
    p_SNW = split_blocks(p_SV, width)
    sum_SN = jnp.sum(p_SNW, axis=-1)
    block_S, left_S = first_above(sum_SN, u_S * jnp.sum(sum_SN, axis=-1))
    word_S, _ = first_above(take_block(p_SNW, block_S), left_S)
    return block_S * width + word_S


def first_above(p_SV, target_S):
    """Return the first index of each row at which the cumulative sum is above the
    target, and the target less what is before it.

    If by rounding there is none: the last index that is not 0.
    """
    _, V = p_SV.shape
    index_V, possible_SV = jnp.arange(V), p_SV > 0
    sum_SV = jnp.cumsum(p_SV, axis=-1)
    # A sum made in parallel may rise by a rounding where p is 0.
    first_S = jnp.min(jnp.where(possible_SV & (sum_SV > target_S[:, None]), index_V, V), axis=-1)
    index_S = jnp.minimum(first_S, jnp.max(jnp.where(possible_SV, index_V, 0), axis=-1))
    before_S = jnp.take_along_axis(sum_SV - p_SV, index_S[:, None], axis=1)[:, 0]
    return index_S, target_S - before_S


def split_blocks(p_SV, width: int):
    """Split each row into N blocks of `width`, the last filled up with zeros: [S, N,
    W].
    """
    S, V = p_SV.shape
    return jnp.pad(p_SV, ((0, 0), (0, -V % width))).reshape(S, -1, width)


def take_block(p_SNW, block_S):
    """Return one block of each row, [S, W]."""
    return jnp.take_along_axis(p_SNW, block_S[:, None, None], axis=1)[:, 0]
