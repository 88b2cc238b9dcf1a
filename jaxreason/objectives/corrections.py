"""Correction of the difference between the policy that sampled and the one that learns:
another numerical precision, other kernels, or params of some updates ago.

Two choices, as in Yao et al. 2025 ("Your efficient RL framework secretly brings you
off-policy RL training", fengyao.notion.site/off-policy-rl): the ratio of a token or of
its whole rollout, and ratios outside of two bounds are truncated to them or masked
(weight 0; for tokens Ling Team 2025, arXiv 2510.18855, IcePop). On-policy all ratios
are 1 up to rounding, and nothing changes. So objectives without a ratio of their own
truncate that of each token at 2 unless told otherwise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxreason.objectives.losses import log_ratio, ratio_statistics, sum_over_rollout

LEVELS = ("none", "token", "sequence")
HOWS = ("truncate", "mask")


def check(level: str, how: str, low: float, high: float) -> None:
    if level not in LEVELS:
        raise ValueError(f"correct got {level!r}; allowed: {', '.join(LEVELS)}")
    if how not in HOWS:
        raise ValueError(f"correct_by got {how!r}; allowed: {', '.join(HOWS)}")
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"correct_low got {low} and correct_high {high}; allowed: 0 to 1, and 1 or more")


def ratio_weight(log_ratio_BT, batch, level: str, how: str, low: float, high: float):
    """Return the weight of each token, and whether its ratio was outside the bounds."""
    if level == "sequence":
        log_ratio_BT = sum_over_rollout(log_ratio_BT, batch)[0]
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratio_BT))
    outside = (ratio < low) | (ratio > high)
    return (jnp.clip(ratio, low, high) if how == "truncate" else jnp.where(outside, 0.0, ratio)), outside


def weigh_by_ratio(token_loss, level: str, how: str, low: float, high: float):
    """Multiply a loss that has no ratio by the bounded ratio."""

    def corrected(outputs, batch):
        loss_BT, statistics = token_loss(outputs, batch)
        log_ratio_BT = log_ratio(outputs, batch)
        weight, outside = ratio_weight(log_ratio_BT, batch, level, how, low, high)
        return weight * loss_BT, {**statistics, **ratio_statistics(log_ratio_BT, batch), "corrected": outside}

    return corrected


def mask_by_ratio(token_loss, level: str, low: float, high: float):
    """Leave out tokens whose ratio is outside the bounds, from a loss that has the
    ratio itself.
    """

    def masked(outputs, batch):
        loss_BT, statistics = token_loss(outputs, batch)
        _, outside = ratio_weight(log_ratio(outputs, batch), batch, level, "mask", low, high)
        return jnp.where(outside, 0.0, loss_BT), {**statistics, "corrected": outside}

    return masked


def mask_stale_negatives(token_loss, limit: float):
    """Leave out rollouts with a negative advantage that the policy has moved away from:
    mean log(q / p) over their tokens above `limit`, q the sampling policy (DeepSeek-AI
    2025, arXiv 2512.02556, sec. 3.1, off-policy sequence masking).
    """

    def masked(outputs, batch):
        loss_BT, statistics = token_loss(outputs, batch)
        sum_BT, count_BT = sum_over_rollout(jax.lax.stop_gradient(log_ratio(outputs, batch)), batch)
        stale = (batch.advantage_BT < 0) & (-sum_BT / count_BT > limit)
        return jnp.where(stale, 0.0, loss_BT), {**statistics, "stale": stale}

    return masked
