"""Selections of tokens over the whole batch, made before the update: (Batch) -> fields.

A threshold must not depend on how a batch is split, so these functions see all of it:
`learner.compile_completion` runs them once, before any micro-batch. A token that is not
selected gets the advantage 0. Its policy gradient is 0 then, and all else stays: the
denominator of the loss, the value loss of a critic, KL and entropy terms and metrics.
With a ratio of whole rollouts (gspo) the gradient of a selected token still reaches all
tokens of its rollout.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxreason.objectives.advantages import EQUAL_REWARDS

COVARIANCES = ("none", "clip", "kl")


def top_entropy(fraction: float):
    """Keep the `fraction` of the trained tokens of a batch with the highest entropy
    (Wang et al. 2025, arXiv 2506.01939, "forking tokens"; 0.2 there).

    Kept are those at or above the quantile 1 - `fraction`. The entropies are those of
    the policy before the update, in `batch.entropy_BT`.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"entropy_top got {fraction}; allowed: above 0, at most 1")

    def select(batch) -> dict:
        trained_BT = batch.weight_BT != 0
        others = jnp.maximum(jnp.sum(trained_BT) - 1, 0)
        count = jnp.floor(fraction * others.astype(jnp.float32)).astype(jnp.int32) + 1
        kept_BT = highest(batch.entropy_BT, trained_BT, count)
        return {"advantage_BT": jnp.where(kept_BT, batch.advantage_BT, 0.0)}

    return select


def clip_covariance(fraction: float, low: float, high: float):
    """Leave out `fraction` of the trained tokens, of those whose covariance of log-prob
    and advantage is between two bounds (Cui et al. 2025, arXiv 2505.22617, Clip-Cov).

    The paper draws them at random among the tokens in the band. Here a hash of the
    token's rollout, position and log-prob decides, so that a run that continues makes
    the same choice, in any layout of the batch. Log-probs are those of the policy that
    sampled, so the choice is made once per batch; the authors make it in each update,
    among the tokens that the ratio's own clip leaves.
    """
    check(fraction, low, high)

    def select(batch) -> dict:
        trained_BT = batch.weight_BT != 0
        covariance_BT = covariance(batch)
        band_BT = trained_BT & (covariance_BT > low) & (covariance_BT < high)
        chosen_BT = highest(drawn(batch), band_BT, count_of(fraction, trained_BT))
        return {"advantage_BT": jnp.where(chosen_BT, 0.0, batch.advantage_BT), "chosen_BT": chosen_BT}

    return select


def choose_covariance(fraction: float):
    """Choose the `fraction` of the trained tokens with the highest covariance, for a
    penalty of their own (Cui et al. 2025, arXiv 2505.22617, KL-Cov).

    Only covariances above 0 count. Where all advantages are equal, such as 0 because no
    attempt was right, the authors' code chooses any tokens of that number; here none.
    """
    check(fraction, 0.0, 1.0)

    def select(batch) -> dict:
        trained_BT, covariance_BT = batch.weight_BT != 0, covariance(batch)
        return {"chosen_BT": highest(covariance_BT, trained_BT & (covariance_BT > 0), count_of(fraction, trained_BT))}

    return select


def check(fraction: float, low: float, high: float) -> None:
    if not (0 < fraction <= 1 and low < high):
        raise ValueError(
            f"got covariance_fraction={fraction}, covariance_low={low}, covariance_high={high}; allowed: a fraction above 0, at "
            "most 1, and a lower bound below the upper one"
        )


def covariance(batch):
    """Return each token's part of the covariance of log-prob and advantage over the
    trained tokens of the batch: the product of their differences from the means; 0 if
    all advantages are equal, since rounding must not choose tokens.
    """
    trained_BT = batch.weight_BT != 0
    count = jnp.maximum(jnp.sum(trained_BT), 1)

    def centred(x_BT):
        return x_BT - jnp.sum(jnp.where(trained_BT, x_BT, 0.0)) / count

    least, most = (jnp.max(jnp.where(trained_BT, sign * batch.advantage_BT, -jnp.inf), initial=-jnp.inf) for sign in (-1, 1))
    differ = least + most > EQUAL_REWARDS
    return jnp.where(differ, centred(batch.advantage_BT) * centred(batch.behaviour_logp_BT), 0.0)


def count_of(fraction: float, trained_BT):
    """Return how many tokens a fraction of the trained ones is, at least 1."""
    return jnp.maximum(jnp.floor(fraction * jnp.sum(trained_BT).astype(jnp.float32)).astype(jnp.int32), 1)


def highest(score_BT, among_BT, count):
    """Return which tokens are the `count` highest among some; equal ones at the end are
    all in.
    """
    least = jnp.array(0 if jnp.issubdtype(score_BT.dtype, jnp.integer) else -jnp.inf, score_BT.dtype)
    sorted_N = jnp.sort(jnp.where(among_BT, score_BT, least).reshape(-1))
    threshold = sorted_N[jnp.maximum(sorted_N.size - count, 0)]
    return among_BT & (score_BT >= threshold)


def drawn(batch):
    """Return a 32-bit hash of each token's rollout, position and log-prob."""
    bits_BT = jax.lax.bitcast_convert_type(batch.behaviour_logp_BT.astype(jnp.float32), jnp.uint32)
    found_BT = jnp.zeros_like(bits_BT)
    for part_BT in (batch.rollout_BT, batch.position_BT, bits_BT):
        found_BT = mixed(found_BT ^ part_BT.astype(jnp.uint32))
    return found_BT


def mixed(x):
    """Mix the bits of 32-bit numbers, by the last steps of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def add_chosen_penalty(token_loss, coefficient: float):
    """Add `coefficient` times |log p - log q| of chosen tokens, q the policy that
    sampled, as the authors' code does for the KL divergence of KL-Cov.

    The rest of the loss keeps its own clip, which the paper's equation has not.
    """

    def penalised(outputs, batch):
        loss_BT, statistics = count_chosen(token_loss)(outputs, batch)
        moved_BT = jnp.abs(outputs.logp_BT - batch.behaviour_logp_BT)
        return loss_BT + jnp.where(batch.chosen_BT, coefficient * moved_BT, 0.0), statistics

    return penalised


def count_chosen(token_loss):
    """Add the fraction of chosen tokens to the statistics of a loss."""

    def counted(outputs, batch):
        loss_BT, statistics = token_loss(outputs, batch)
        return loss_BT, {**statistics, "covariance_chosen": batch.chosen_BT}

    return counted
