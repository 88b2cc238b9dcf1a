"""Drawing tokens from logits: temperature, filters, and two uniforms per draw.

The uniforms of a token depend only on its attempt's key and its position.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Filter(NamedTuple):
    """Tokens that may be drawn, after the temperature.

    First the `top_k` likeliest tokens are kept (0: all). Of these, the fewest whose
    total probability is at least `top_p` are kept (Holtzman et al. 2019, arXiv
    1904.09751). Of these, the ones at least `min_p` times as likely as the likeliest
    are kept (Nguyen et al. 2024, arXiv 2407.01082).
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


ALL = Filter()
# Logits over a lower temperature are so large that subtracting the largest one, fused
# with the division, leaves a rounding error above 0, whose exponential may overflow.
LOWEST_TEMPERATURE = 1e-4
TEMPERATURES = f"0 (greedy), or {LOWEST_TEMPERATURE:g} and more, finite"  # in messages


def is_temperature(value: float) -> bool:
    return value == 0 or LOWEST_TEMPERATURE <= value < float("inf")


def uniforms(key_S, position_S):
    """Make two uniforms per slot for the token at its position, [S, 2].

    `key_S` is the key data of (problem, attempt).
    """
    keys_S = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_S), position_S)
    return jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_S)


def sample(logits_SV, u_S2, temperature, filter: Filter = ALL):
    """Sample one token per row from its two uniforms.

    Return the tokens and their log-probs under the tempered and filtered distribution.
    Temperature 0 takes the most likely token and returns its log-prob at temperature 1.
    """
    greedy = temperature <= 0
    scaled_SV = logits_SV / jnp.where(greedy, 1.0, temperature)
    highest_S = jnp.max(scaled_SV, axis=-1)
    p_SV = kept(jnp.exp(scaled_SV - highest_S[:, None]), filter)
    # The likeliest token has p exactly 1. An argmax over the vocabulary would cost a
    # fourteenth of a decode step even at temperatures above 0.
    token_S = draw(jnp.where(greedy, p_SV == 1, p_SV), jnp.where(greedy, 0.0, u_S2)).astype(jnp.int32)
    chosen_S = jnp.take_along_axis(scaled_SV, token_S[:, None], axis=1)[:, 0]
    return token_S, chosen_S - highest_S - jnp.log(jnp.sum(p_SV, axis=-1))


def kept(p_SV, filter: Filter):
    """Set the probabilities that a filter excludes to zero.

    `p_SV` need not sum to one. Equally likely tokens are kept or dropped together.
    """
    if filter.top_k:
        kth_S1 = jax.lax.top_k(p_SV, min(filter.top_k, p_SV.shape[1]))[0][:, -1:]
        p_SV = jnp.where(p_SV >= kth_S1, p_SV, 0)
    if filter.top_p < 1:
        falling_SV = -jnp.sort(-p_SV, axis=-1)
        before_SV = jnp.cumsum(falling_SV, axis=-1) - falling_SV  # mass of the likelier tokens
        needed_SV = before_SV < filter.top_p * jnp.sum(p_SV, axis=-1, keepdims=True)
        least_S1 = jnp.min(jnp.where(needed_SV, falling_SV, jnp.inf), axis=-1, keepdims=True)
        p_SV = jnp.where(p_SV >= least_S1, p_SV, 0)
    if filter.min_p:
        p_SV = jnp.where(p_SV >= filter.min_p * jnp.max(p_SV, axis=-1, keepdims=True), p_SV, 0)
    return p_SV


def draw(p_SV, u_S2, width: int = 128):
    """Draw one index per row in proportion to `p_SV`, which need not sum to one.

    This inverts the cumulative sum. The first uniform picks a block of `width` tokens,
    the second a token in the block; two zeros pick the first index with p above 0.
    Gumbel noise needs one number per token and was slower on a CPU
    (jaxreason/bench/README.md).
    """
    p_SNW = split_blocks(p_SV, width)
    block_S = invert(jnp.sum(p_SNW, axis=-1), u_S2[:, 0])
    return block_S * width + invert(take_block(p_SNW, block_S), u_S2[:, 1])


def invert(p_SV, u_S, width: int = 16):
    """Return per row the first index where the cumulative sum exceeds `u_S` of the
    total.

    It finds the block of `width` first: two short cumulative sums are faster than one
    long sum.
    """
    p_SNW = split_blocks(p_SV, width)
    sum_SN = jnp.sum(p_SNW, axis=-1)
    block_S, left_S = first_above(sum_SN, u_S * jnp.sum(sum_SN, axis=-1))
    word_S, _ = first_above(take_block(p_SNW, block_S), left_S)
    return block_S * width + word_S


def first_above(p_SV, target_S):
    """Return per row the first index where the cumulative sum exceeds the target.

    Also return the target minus the sum before that index. If rounding leaves no such
    index, return the last index with p above 0.
    """
    _, V = p_SV.shape
    index_V, possible_SV = jnp.arange(V), p_SV > 0
    sum_SV = jnp.cumsum(p_SV, axis=-1)
    # Rounding in a parallel sum may make it rise where p is 0.
    first_S = jnp.min(jnp.where(possible_SV & (sum_SV > target_S[:, None]), index_V, V), axis=-1)
    index_S = jnp.minimum(first_S, jnp.max(jnp.where(possible_SV, index_V, 0), axis=-1))
    before_S = jnp.take_along_axis(sum_SV - p_SV, index_S[:, None], axis=1)[:, 0]
    return index_S, target_S - before_S


def split_blocks(p_SV, width: int):
    """Split each row into N blocks of `width`, [S, N, W]; zeros fill the last block."""
    S, V = p_SV.shape
    return jnp.pad(p_SV, ((0, 0), (0, -V % width))).reshape(S, -1, width)


def take_block(p_SNW, block_S):
    """Return one block of each row, [S, W]."""
    return jnp.take_along_axis(p_SNW, block_S[:, None, None], axis=1)[:, 0]
