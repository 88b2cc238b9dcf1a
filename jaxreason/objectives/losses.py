"""Token losses: (Outputs, Batch) -> (loss_BT, statistics of tokens).

A loss compares the policy that learns with the one that sampled, by the ratio r of
their probabilities of a token, and A is the advantage. At r = 1 each has the gradient
of `reinforce`, -A * grad log p.

A statistic is averaged over the trained tokens; one whose name ends in `_worst` is the
largest of them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

# exp(20) is a ratio that no objective tells from a larger one, and finite when squared.
LARGEST_LOG_RATIO = 20.0


def log_ratio(outputs, batch):
    """Return log r of each token, within bounds. An infinite one stays so: the
    learner then skips the batch.
    """
    gap_BT = outputs.logp_BT - batch.behaviour_logp_BT
    return jnp.where(jnp.isinf(gap_BT), gap_BT, jnp.clip(gap_BT, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))


def sum_over_rollout(x_BT, batch):
    """Give each token the sum of x over the trained tokens of its rollout, and their
    number, at least 1.

    A rollout is a run of equal numbers in `rollout_BT`, within one row.
    """
    T = x_BT.shape[1]
    run_BT = jnp.cumsum(jnp.diff(batch.rollout_BT, axis=1, prepend=0) != 0, axis=1)
    counted_BT = batch.weight_BT != 0

    def summed(x_T, run_T):
        return jax.ops.segment_sum(x_T, run_T, num_segments=T + 1)[run_T]

    sum_BT = jax.vmap(summed)(jnp.where(counted_BT, x_BT, 0.0), run_BT)
    return sum_BT, jnp.maximum(jax.vmap(summed)(counted_BT.astype(jnp.float32), run_BT), 1.0)


def ratio_statistics(log_ratio_BT, batch) -> dict:
    """Measure how far the policy that learns is from the one that sampled.

    `learner.name_metrics` makes the effective sample size of the first two.
    """
    size_BT = jnp.abs(jax.lax.stop_gradient(log_ratio_BT))
    ratio_BT = jnp.exp(jax.lax.stop_gradient(log_ratio_BT))
    return {
        "ratio": ratio_BT,
        "ratio_squared": ratio_BT**2,
        "log_ratio_worst": size_BT,
        "log_ratio_of_rollout_worst": jnp.abs(sum_over_rollout(jax.lax.stop_gradient(log_ratio_BT), batch)[0]),
    }


# --- without a ratio ---


def nll(outputs, batch):
    """Negative log-likelihood, times the advantage."""
    return -batch.advantage_BT * outputs.logp_BT, {}


def nll_where_imitated(token_loss, outputs, batch):
    """Return the batch, loss and statistics with the tokens of `imitated_BT` trained by
    `nll` and all others by `token_loss`.

    For `token_loss` it is as if the learner had sampled the imitated tokens: their
    ratio is 1.
    """
    own_BT = jax.lax.stop_gradient(outputs.logp_BT)
    batch = dataclasses.replace(batch, behaviour_logp_BT=jnp.where(batch.imitated_BT, own_BT, batch.behaviour_logp_BT))
    loss_BT, statistics = token_loss(outputs, batch)
    return batch, jnp.where(batch.imitated_BT, nll(outputs, batch)[0], loss_BT), statistics


def reinforce(outputs, batch):
    """Score-function gradient (Williams 1992). It has no importance ratio: for rollouts
    of another policy see `corrections`.
    """
    return -batch.advantage_BT * outputs.logp_BT, {}


# --- with the ratio of a token ---


def check_clip(low: float, high: float) -> None:
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"clip got {low} below 1 and {high} above; allowed: 0 to 1 below, 0 or more above")


def clipped(clip_low: float = 0.2, clip_high: float = 0.2, clip_dual: float | None = None):
    """Pessimistic clipped importance ratio, with separate clips below and above 1
    (Schulman et al. 2017, arXiv 1707.06347, eq. 7): -min(r A, clip(r) A).

    `clip_dual` bounds the ratio of tokens with a negative advantage as well, which
    otherwise has no upper limit: -max(min(r A, clip(r) A), c A) (Ye et al. 2020, arXiv
    1912.09729).
    """
    check_clip(clip_low, clip_high)
    if clip_dual is not None and clip_dual <= 1 + clip_high:
        raise ValueError(f"clip_dual got {clip_dual}; allowed: above 1 + clip_high, which is {1 + clip_high:g}, or None")

    def token_loss(outputs, batch):
        log_ratio_BT = log_ratio(outputs, batch)
        gain, free = clip(jnp.exp(log_ratio_BT), batch.advantage_BT, clip_low, clip_high)
        if clip_dual is not None:
            gain = jnp.where(batch.advantage_BT < 0, jnp.maximum(gain, clip_dual * batch.advantage_BT), gain)
        return -gain, {**ratio_statistics(log_ratio_BT, batch), "clip_fraction": gain != free}

    return token_loss


def clip(ratio, advantage, low: float, high: float):
    """Return the clipped gain min(r A, clip(r) A), and r A."""
    free = ratio * advantage
    return jnp.minimum(free, jnp.clip(ratio, 1 - low, 1 + high) * advantage), free


def clipped_weight(clip_low: float = 1.0, clip_high: float = 4.0):
    """REINFORCE with a clipped importance weight, through which no gradient flows:
    -stop(clip(r)) A log p, so every token keeps a gradient (MiniMax 2025, arXiv
    2506.13585, CISPO).
    """
    check_clip(clip_low, clip_high)

    def token_loss(outputs, batch):
        log_ratio_BT = log_ratio(outputs, batch)
        ratio = jax.lax.stop_gradient(jnp.exp(log_ratio_BT))
        weight = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
        loss_BT = -weight * batch.advantage_BT * outputs.logp_BT
        return loss_BT, {**ratio_statistics(log_ratio_BT, batch), "clip_fraction": weight != ratio}

    return token_loss


DIVERGENCES = ("tv", "kl")


def within_divergence(divergence: str = "tv", limit_low: float = 0.2, limit_high: float = 0.2, largest_ratio: float = 20.0):
    """REINFORCE with an importance weight, for tokens whose probability p has not yet
    moved too far from q, that of the sampling policy (Qi et al. 2026, arXiv 2602.04879,
    eq. 12, DPPO with the binary approximations of eq. 13 and 14).

    A token is left out if the update would move it on: A > 0, p > q and D > limit_high,
    or A < 0, p < q and D > limit_low. D is the divergence of "this token or another":
    |p - q| (tv), or q log(q / p) + (1 - q) log((1 - q) / (1 - p)) (kl). The weight is
    stop(min(r, largest_ratio)).
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence got {divergence!r}; allowed: {', '.join(DIVERGENCES)}")
    if min(limit_low, limit_high) < 0 or largest_ratio < 1:
        raise ValueError(
            f"got limits {limit_low} and {limit_high} and largest_ratio={largest_ratio}; allowed: limits of 0 or more, and a "
            "ratio of at least 1"
        )

    def token_loss(outputs, batch):
        log_ratio_BT, logp_BT, logq_BT = log_ratio(outputs, batch), outputs.logp_BT, batch.behaviour_logp_BT
        stopped = jax.lax.stop_gradient
        p, q = stopped(jnp.exp(logp_BT)), jnp.exp(logq_BT)
        distance = jnp.abs(p - q) if divergence == "tv" else binary_kl(q, p, stopped(log_ratio_BT))
        rises = batch.advantage_BT > 0
        leaves = jnp.where(rises, (p > q) & (distance > limit_high), (p < q) & (distance > limit_low))
        weight = jnp.where(leaves, 0.0, jnp.minimum(stopped(jnp.exp(log_ratio_BT)), largest_ratio))
        loss_BT = -weight * batch.advantage_BT * logp_BT
        return loss_BT, {**ratio_statistics(log_ratio_BT, batch), "clip_fraction": leaves}

    return token_loss


def binary_kl(q, p, log_ratio):
    """Return KL(q || p) of two coins; `log_ratio` is log p - log q."""
    smallest = jnp.finfo(jnp.float32).tiny
    tails = jnp.log(jnp.maximum(1 - q, smallest)) - jnp.log(jnp.maximum(1 - p, smallest))
    return -q * log_ratio + (1 - q) * tails


def soft_gate(tau_positive: float = 1.0, tau_negative: float = 1.05):
    """A smooth gate in the place of a clip: -(4 / tau) sigmoid(tau (r - 1)) A, with a
    tau for each sign of the advantage (Gao et al. 2025, arXiv 2511.20347, SAPO).

    Its gradient is that of the ratio times 4 s (1 - s), s the sigmoid: 1 at r = 1, and
    0 far from it.
    """
    if min(tau_positive, tau_negative) <= 0:
        raise ValueError(f"got tau_positive={tau_positive}, tau_negative={tau_negative}; allowed: above 0")

    def token_loss(outputs, batch):
        log_ratio_BT = log_ratio(outputs, batch)
        tau = jnp.where(batch.advantage_BT > 0, tau_positive, tau_negative)
        gate = jax.nn.sigmoid(tau * (jnp.exp(log_ratio_BT) - 1.0))
        statistics = {**ratio_statistics(log_ratio_BT, batch), "gate": 4.0 * jax.lax.stop_gradient(gate * (1.0 - gate))}
        return -(4.0 / tau) * gate * batch.advantage_BT, statistics

    return token_loss


# --- with the ratio of a rollout ---


def clipped_sequence(clip_low: float = 3e-4, clip_high: float = 4e-4):
    """The clipped loss of one ratio per rollout, the geometric mean of those of its
    tokens (Zheng et al. 2025, arXiv 2507.18071, GSPO).

    Each token has the whole rollout's ratio, so it goes with `per_sequence`.
    """
    check_clip(clip_low, clip_high)

    def token_loss(outputs, batch):
        log_ratio_BT = log_ratio(outputs, batch)
        sum_BT, count_BT = sum_over_rollout(log_ratio_BT, batch)
        gain, free = clip(jnp.exp(sum_BT / count_BT), batch.advantage_BT, clip_low, clip_high)
        return -gain, {**ratio_statistics(log_ratio_BT, batch), "clip_fraction": gain != free}

    return token_loss
