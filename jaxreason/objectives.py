"""Objectives: the training target of a batch, as three small pure functions that never
see the model.

    advantage(reward_PG)                   how good each attempt was in its group
    weigh(length_R, advantage_R, limit)    the weight of each token of each rollout
    token_loss(outputs, batch)             the loss and the metrics of each token

`batching` calls the first two once, over the whole batch, before any split. The loss of
a batch is `sum(weight_BT * loss_BT)`. It has no denominator that a micro-batch, a shard
or a packed row could get wrong. A named algorithm is one line: one entry of each of
three short lists, so an ablation is their cross product. `with_kl` and `with_entropy`
wrap any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.options import call_with_section, find, unknown_name_message

# A group whose rewards differ by less than this counts as a group of equal rewards:
# dividing by std must not amplify rounding errors.
EQUAL_REWARDS = 1e-6


class Objective(NamedTuple):
    """Three pure functions and their requirements.

    `needs_reference`: the batch must carry log-probs of a reference policy.
    `needs_group`: attempts at one problem are compared, so there must be at least two.
    `on_policy`: there is no importance ratio, so the rollouts must be the current
    policy's.
    """

    advantage: Callable  # reward_PG -> advantage_PG, numpy
    weigh: Callable  # (length_R, advantage_R, limit) -> weight_R of one token, numpy
    token_loss: Callable  # (Outputs, Batch) -> (loss_BT, {name: value_BT})
    needs_reference: bool = False
    needs_group: bool = False
    on_policy: bool = False


# --- advantages: numpy, [P, G] -> [P, G] ---


def ones(reward_PG):
    """Give every rollout the advantage 1: imitation."""
    return np.ones_like(reward_PG)


def centre_batch(reward_PG):
    """Subtract the mean reward of the batch (Williams 1992, with a baseline)."""
    return reward_PG - reward_PG.mean()


def centre_group(reward_PG):
    """Subtract the mean reward of the group, as `dr_grpo` (Liu et al. 2025, arXiv
    2503.20783).
    """
    advantage_PG = reward_PG - reward_PG.mean(axis=1, keepdims=True)
    return np.where(np.ptp(reward_PG, axis=1, keepdims=True) < EQUAL_REWARDS, 0.0, advantage_PG)


def leave_one_out(reward_PG):
    """Subtract the mean reward of the *other* attempts (Kool et al. 2019; Ahmadian et
    al. 2024, arXiv 2402.14740, RLOO).
    """
    G = reward_PG.shape[1]
    return centre_group(reward_PG) * G / (G - 1)


def zscore_group(reward_PG, eps: float = 1e-6):
    """Subtract the mean reward of the group and divide by its (population) standard
    deviation (Shao et al. 2024, arXiv 2402.03300).
    """
    return centre_group(reward_PG) / (reward_PG.std(axis=1, keepdims=True) + eps)


def keep_positive(reward_PG):
    """Give 1 to a positive reward and 0 to others, to imitate the former (Anthony et
    al. 2017, arXiv 1705.08439).
    """
    return (reward_PG > 0).astype(reward_PG.dtype)


# --- weightings: numpy, [R] -> weight of one token of each rollout ---


def token_sum(length_R, advantage_R, limit):
    """Sum over the tokens of each rollout, mean over rollouts.

    With the score function this is an unbiased gradient of the expected reward, as in
    Williams 1992 and Ahmadian et al. 2024 (arXiv 2402.14740): the log-prob of a rollout
    is the sum of the log-probs of its tokens.
    """
    return np.full(len(length_R), 1.0 / len(length_R))


def per_sequence(length_R, advantage_R, limit):
    """Mean over the tokens of each rollout, then over rollouts (arXiv 2402.03300, eq.
    3).

    Biased as a gradient of the expected reward: dividing by the length makes long wrong
    rollouts cost less, and long right ones earn less (arXiv 2503.20783, sec. 3.1).
    """
    return 1.0 / (len(length_R) * np.maximum(length_R, 1))


def per_token(length_R, advantage_R, limit):
    """Mean over all tokens of the batch: every token weighs the same.

    DAPO's eq. 8 (Yu et al. 2025, arXiv 2503.14476) takes this mean inside each group
    and then averages the groups; over the whole batch, as TRL and verl do, a group of
    long rollouts weighs more.
    """
    return np.full(len(length_R), 1.0 / max(length_R.sum(), 1))


def per_kept_token(length_R, advantage_R, limit):
    """Mean over the tokens of rollouts with a nonzero advantage; others weigh 0."""
    kept_R = advantage_R != 0
    return kept_R / max((length_R * kept_R).sum(), 1)


def per_max_length(length_R, advantage_R, limit):
    """Sum over tokens, divided by the longest allowed length: no length bias (arXiv
    2503.20783).
    """
    return np.full(len(length_R), 1.0 / (len(length_R) * limit))


# --- token losses ---


def nll(outputs, batch):
    """Negative log-likelihood, times the advantage."""
    return -batch.advantage_BT * outputs.logp_BT, {}


def reinforce(outputs, batch):
    """Score-function gradient (Williams 1992). On-policy only: no importance ratio."""
    return -batch.advantage_BT * outputs.logp_BT, {}


def clipped(clip_low: float = 0.2, clip_high: float = 0.2):
    """Pessimistic clipped importance ratio, with separate clips below and above 1
    (Schulman et al. 2017, arXiv 1707.06347, eq. 7).
    """
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(f"clip got {clip_low} below 1 and {clip_high} above; allowed: 0 to 1 below, 0 or more above")

    def token_loss(outputs, batch):
        ratio = jnp.exp(outputs.logp_BT - batch.behaviour_logp_BT)
        bounded = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
        gain = jnp.minimum(ratio * batch.advantage_BT, bounded * batch.advantage_BT)
        return -gain, {"ratio": ratio, "clip_fraction": gain < ratio * batch.advantage_BT}

    return token_loss


# --- wrappers ---


def kl_k1(logp, reference_logp):
    """Estimate the KL by log p - log q (k1), with a gradient added.

    Its value is unbiased. Its own gradient through a loss has expectation zero, so the
    score term is added: the value stays k1, and on-policy the expected gradient is that
    of the KL.
    """
    difference = logp - reference_logp
    return jax.lax.stop_gradient(difference) * (1.0 + logp - jax.lax.stop_gradient(logp))


def kl_k2(logp, reference_logp):
    """Estimate the KL by (log p - log q)^2 / 2 (Schulman 2020,
    http://joschu.net/blog/kl-approx.html): a biased value, but the exact KL gradient.
    """
    return 0.5 * (logp - reference_logp) ** 2


def kl_k3(logp, reference_logp):
    """Estimate the KL by q/p - 1 - log q/p, as GRPO does (arXiv 2402.03300, eq. 4).

    Its value is unbiased and never negative. On-policy its gradient is that of the
    *reverse* direction, KL(q || p).
    """
    log_ratio = reference_logp - logp
    return jnp.exp(log_ratio) - 1.0 - log_ratio


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def with_kl(objective: Objective, coefficient: float, estimator: str = "k3") -> Objective:
    """Add `coefficient` times the KL divergence to the reference policy, per token."""
    if estimator not in KL_ESTIMATORS:
        raise ValueError(unknown_name_message("KL estimator", estimator, KL_ESTIMATORS))
    kl = KL_ESTIMATORS[estimator]

    def token_loss(outputs, batch):
        loss_BT, stats = objective.token_loss(outputs, batch)
        kl_BT = kl(outputs.logp_BT, batch.reference_logp_BT)
        return loss_BT + coefficient * kl_BT, {**stats, "kl": kl_BT}

    return objective._replace(token_loss=token_loss, needs_reference=True)


def with_entropy(objective: Objective, coefficient: float) -> Objective:
    """Reward entropy with `coefficient` per nat (Williams and Peng 1991)."""

    def token_loss(outputs, batch):
        loss_BT, stats = objective.token_loss(outputs, batch)
        return loss_BT - coefficient * outputs.entropy_BT, stats

    return objective._replace(token_loss=token_loss)


# --- the named algorithms ---


def lm():
    """Next-token prediction."""
    return Objective(ones, per_token, nll)


def sft():
    """Imitation of worked solutions: next-token prediction on completions."""
    return Objective(ones, per_token, nll)


def reinforce_batch():
    """REINFORCE with the mean reward of the batch as its baseline (Williams 1992)."""
    return Objective(centre_batch, token_sum, reinforce, on_policy=True)


def rloo():
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740)."""
    return Objective(leave_one_out, token_sum, reinforce, needs_group=True, on_policy=True)


def grpo(
    clip_low: float = 0.2,  # clip of the importance ratio below 1: at 1 - clip_low
    clip_high: float = 0.2,  # clip of the importance ratio above 1: at 1 + clip_high
):
    """Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300, eq.
    3).
    """
    return Objective(zscore_group, per_sequence, clipped(clip_low, clip_high), needs_group=True)


def dr_grpo(
    clip_low: float = 0.2,  # clip of the importance ratio below 1: at 1 - clip_low
    clip_high: float = 0.2,  # clip of the importance ratio above 1: at 1 + clip_high
):
    """GRPO without its two normalisations (Liu et al. 2025, arXiv 2503.20783, sec.
    3.2).
    """
    return Objective(centre_group, per_max_length, clipped(clip_low, clip_high), needs_group=True)


def dapo(
    clip_low: float = 0.2,  # clip of the importance ratio below 1: at 1 - clip_low
    clip_high: float = 0.28,  # clip of the importance ratio above 1: at 1 + clip_high
):
    """Clip-higher and token-level loss (Yu et al. 2025, arXiv 2503.14476, eq. 8).

    The mean over tokens is over the whole batch, not inside each group as in eq. 8 (see
    `per_token`). Dynamic sampling is a field of the source. Overlong reward shaping is
    left out.
    """
    return Objective(zscore_group, per_token, clipped(clip_low, clip_high), needs_group=True)


def expert_iteration():
    """Imitation of rollouts with a positive reward (Anthony et al. 2017, arXiv
    1705.08439).
    """
    return Objective(keep_positive, per_kept_token, nll)


OBJECTIVES = {
    "lm": lm,
    "sft": sft,
    "reinforce": reinforce_batch,
    "rloo": rloo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "expert_iteration": expert_iteration,
}
ADVANTAGES = {
    "ones": ones,
    "centre_batch": centre_batch,
    "centre_group": centre_group,
    "leave_one_out": leave_one_out,
    "zscore_group": zscore_group,
    "keep_positive": keep_positive,
}
WEIGHTINGS = {
    "token_sum": token_sum,
    "per_sequence": per_sequence,
    "per_token": per_token,
    "per_kept_token": per_kept_token,
    "per_max_length": per_max_length,
}
GROUP_BASELINES = (centre_group, leave_one_out, zscore_group)


def make(
    name: str,  # one of the objectives, or module:maker of your own
    *,
    advantage: str | None = None,  # replaces the objective's advantage: centre_group, leave_one_out, zscore_group, ...
    weigh: str | None = None,  # replaces the loss aggregation: token_sum, per_sequence, per_token, per_max_length, ...
    kl_coefficient: float = 0.0,  # weight of the KL divergence to the params at the start of the phase; 0: none
    kl_estimator: str = "k3",  # k1, k2 or k3
    entropy_coefficient: float = 0.0,  # reward per nat of entropy
    **kwargs,
) -> Objective:
    """Make a named objective, or a user's `module:maker`.

    `advantage` and `weigh` replace those of the objective by name; `kwargs` are the
    algorithm's own numbers.

    Raises:
      ValueError: an unknown name or a number out of range.
    """
    objective = call_with_section(find("objective", name, OBJECTIVES), kwargs, f"objective {name!r}")
    if not isinstance(objective, Objective):
        raise ValueError(f"objective {name!r} made a {type(objective).__name__}; allowed: an objectives.Objective")
    if advantage is not None:
        if advantage not in ADVANTAGES:
            raise ValueError(unknown_name_message("advantage", advantage, ADVANTAGES))
        chosen = ADVANTAGES[advantage]
        objective = objective._replace(advantage=chosen, needs_group=chosen in GROUP_BASELINES)
    if weigh is not None:
        if weigh not in WEIGHTINGS:
            raise ValueError(unknown_name_message("weighting", weigh, WEIGHTINGS))
        objective = objective._replace(weigh=WEIGHTINGS[weigh])
    if kl_coefficient < 0:
        raise ValueError(f"kl_coefficient got {kl_coefficient}; allowed: 0 or more")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(unknown_name_message("KL estimator", kl_estimator, KL_ESTIMATORS))
    if entropy_coefficient:
        objective = with_entropy(objective, entropy_coefficient)
    if kl_coefficient:
        objective = with_kl(objective, kl_coefficient, kl_estimator)
    return objective
