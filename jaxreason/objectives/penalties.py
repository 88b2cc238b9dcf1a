"""Terms that are added to any objective: the KL divergence to a reference policy, and a
reward for entropy.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxreason.objectives.controls import at, statistic
from jaxreason.objectives.losses import log_ratio

# Estimators: (log p, log q, log r) -> estimate of KL(p || q) from a token of the
# sampling policy, where q is the reference and r the ratio of p to the sampling policy.


def kl_k1(logp, reference_logp, log_ratio):
    """Estimate the KL by log p - log q, q the reference (k1), with a gradient added.

    Its value is unbiased. Its own gradient through a loss has expectation zero, so the
    score term is added: the value stays k1, and on-policy the expected gradient is that
    of the KL.
    """
    difference = logp - reference_logp
    return jax.lax.stop_gradient(difference) * (1.0 + logp - jax.lax.stop_gradient(logp))


def kl_k2(logp, reference_logp, log_ratio):
    """Estimate the KL by (log p - log q)^2 / 2, q the reference (Schulman 2020,
    http://joschu.net/blog/kl-approx.html): a biased value, but on-policy the exact KL
    gradient.
    """
    return 0.5 * (logp - reference_logp) ** 2


def kl_k3_reverse(logp, reference_logp, log_ratio):
    """Estimate the KL by q/p - 1 - log q/p, q the reference, as GRPO does (the k3 of
    arXiv 2402.03300, eq. 4), with the gradient of KL(q || p).

    On-policy its value, of KL(p || q), is unbiased, and never negative; only its
    gradient is that of the other direction.
    """
    log_q_over_p = reference_logp - logp
    return jnp.exp(log_q_over_p) - 1.0 - log_q_over_p


def kl_k3_weighted(logp, reference_logp, log_ratio):
    """Estimate the KL by r times (q/p - 1 - log q/p), q the reference and r = p over
    the sampling policy, with a gradient through r as well (DeepSeek-AI 2025, arXiv
    2512.02556, sec. 3.1).

    Value and gradient are those of KL(p || q), for tokens of any sampling policy.
    """
    return jnp.exp(log_ratio) * kl_k3_reverse(logp, reference_logp, log_ratio)


OF_TOKEN = {"k1": kl_k1, "k2": kl_k2, "k3_reverse": kl_k3_reverse, "k3_weighted": kl_k3_weighted}


def add_kl(token_loss, coefficient: float | Callable, estimator: str):
    kl = OF_TOKEN[estimator]

    def with_kl(outputs, batch):
        loss_BT, statistics = token_loss(outputs, batch)
        kl_BT = kl(outputs.logp_BT, batch.reference_logp_BT, log_ratio(outputs, batch))
        statistics = {**statistics, "kl": kl_BT, **statistic("kl_coefficient", coefficient, batch, kl_BT)}
        return loss_BT + at(coefficient, batch) * kl_BT, statistics

    return with_kl


def kl_exact(outputs):
    """Compute KL(p || q), q the reference, over the vocabulary, of each token's
    distribution.

    Value and gradient are exact whoever sampled the tokens, without noise. The texts
    that a token follows are still those of the sampling policy: their distribution has
    no gradient, on-policy or not (nor has it with the estimators, of single tokens).
    """
    return outputs.divergence_BT


KL_ESTIMATORS = {**OF_TOKEN, "exact": kl_exact}


def add_exact_kl(token_loss, coefficient: float | Callable):
    def with_kl(outputs, batch):
        loss_BT, statistics = token_loss(outputs, batch)
        kl_BT = kl_exact(outputs)
        statistics = {**statistics, "kl": kl_BT, **statistic("kl_coefficient", coefficient, batch, kl_BT)}
        return loss_BT + at(coefficient, batch) * kl_BT, statistics

    return with_kl


def count_kl(token_loss, coefficient: float | Callable):
    """Measure log p - log q of a loss whose KL divergence is in the reward."""

    def counted(outputs, batch):
        loss_BT, statistics = token_loss(outputs, batch)
        kl_BT = jax.lax.stop_gradient(outputs.logp_BT) - batch.reference_logp_BT
        return loss_BT, {**statistics, "kl": kl_BT, **statistic("kl_coefficient", coefficient, batch, kl_BT)}

    return counted


def kl_rewards(coefficient: float | Callable, batch):
    """Return the reward of each trained token for staying near the reference:
    `-coefficient` * (log p - log q), p the policy that sampled it.
    """
    kl_BT = batch.behaviour_logp_BT - batch.reference_logp_BT
    return jnp.where(batch.weight_BT != 0, -at(coefficient, batch) * kl_BT, 0.0)


def kl_to_go(coefficient: float | Callable):
    """Make a function of the whole batch that adds to each token's advantage the
    `kl_rewards` of its rollout from there on.
    """

    def add(batch) -> dict:
        return {"advantage_BT": batch.advantage_BT + sum_to_go(kl_rewards(coefficient, batch), batch)}

    return add


def sum_to_go(x_BT, batch):
    """Return the sum of x over each token and the later ones of its rollout, 0 outside
    of rollouts.
    """

    def step(after, now):
        (later, later_rollout), (x, rollout) = after, now
        total = x + jnp.where(rollout == later_rollout, later, 0.0)
        return (total, rollout), total

    columns = x_BT.T, batch.rollout_BT.T
    start = jnp.zeros_like(columns[0][0]), jnp.full_like(columns[1][0], -1)
    return jnp.where(batch.rollout_BT > 0, jax.lax.scan(step, start, columns, reverse=True)[1].T, 0.0)


def add_entropy(token_loss, coefficient: float | Callable):
    def with_entropy(outputs, batch):
        loss_BT, statistics = token_loss(outputs, batch)
        statistics = {**statistics, **statistic("entropy_coefficient", coefficient, batch, loss_BT)}
        return loss_BT - at(coefficient, batch) * outputs.entropy_BT, statistics

    return with_entropy
