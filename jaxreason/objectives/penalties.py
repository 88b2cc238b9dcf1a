"""Terms that are added to any objective: the KL divergence to a reference policy, and a
reward for entropy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxreason.objectives.losses import log_ratio

# Estimators: (log p, log q, log r) -> estimate of KL(p || q) from a token of the
# sampling policy, where q is the reference and r the ratio of p to the sampling policy.


def kl_k1(logp, reference_logp, log_ratio):
    """Estimate the KL by log p - log q (k1), with a gradient added.

    Its value is unbiased. Its own gradient through a loss has expectation zero, so the
    score term is added: the value stays k1, and on-policy the expected gradient is that
    of the KL.
    """
    difference = logp - reference_logp
    return jax.lax.stop_gradient(difference) * (1.0 + logp - jax.lax.stop_gradient(logp))


def kl_k2(logp, reference_logp, log_ratio):
    """Estimate the KL by (log p - log q)^2 / 2 (Schulman 2020,
    http://joschu.net/blog/kl-approx.html): a biased value, but on-policy the exact KL
    gradient.
    """
    return 0.5 * (logp - reference_logp) ** 2


def kl_k3_reverse(logp, reference_logp, log_ratio):
    """Estimate the KL by q/p - 1 - log q/p, as GRPO does (arXiv 2402.03300, eq. 4).

    On-policy its value is unbiased, and never negative; its gradient is that of the
    *reverse* direction, KL(q || p).
    """
    log_q_over_p = reference_logp - logp
    return jnp.exp(log_q_over_p) - 1.0 - log_q_over_p


def kl_k3_weighted(logp, reference_logp, log_ratio):
    """Estimate the KL by r times (q/p - 1 - log q/p), with a gradient through r as well
    (DeepSeek-AI 2025, arXiv 2512.02556, sec. 3.1).

    Value and gradient are those of KL(p || q), for tokens of any sampling policy.
    """
    return jnp.exp(log_ratio) * kl_k3_reverse(logp, reference_logp, log_ratio)


OF_TOKEN = {"k1": kl_k1, "k2": kl_k2, "k3_reverse": kl_k3_reverse, "k3_weighted": kl_k3_weighted}


def add_kl(token_loss, coefficient: float, estimator: str):
    kl = OF_TOKEN[estimator]

    def with_kl(outputs, batch):
        loss_BT, statistics = token_loss(outputs, batch)
        kl_BT = kl(outputs.logp_BT, batch.reference_logp_BT, log_ratio(outputs, batch))
        return loss_BT + coefficient * kl_BT, {**statistics, "kl": kl_BT}

    return with_kl


def kl_exact(outputs):
    """Compute KL(p || q) over the vocabulary, of each token's distribution.

    Value and gradient are exact whoever sampled the tokens, without noise. The texts
    that a token follows are still those of the sampling policy: their distribution has
    no gradient, on-policy or not (nor has it with the estimators, of single tokens).
    """
    return outputs.divergence_BT


def add_exact_kl(token_loss, coefficient: float):
    def with_kl(outputs, batch):
        loss_BT, statistics = token_loss(outputs, batch)
        kl_BT = kl_exact(outputs)
        return loss_BT + coefficient * kl_BT, {**statistics, "kl": kl_BT}

    return with_kl


def add_entropy(token_loss, coefficient: float):
    def with_entropy(outputs, batch):
        loss_BT, statistics = token_loss(outputs, batch)
        return loss_BT - coefficient * outputs.entropy_BT, statistics

    return with_entropy


KL_ESTIMATORS = {**OF_TOKEN, "exact": kl_exact}
