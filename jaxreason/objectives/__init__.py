"""Objectives: the training target of a batch, as three small pure functions that never
see the model.

    advantage(reward_PG)                     how good each attempt was in its group
    weigh(length_PG, advantage_PG, limit)    the weight of each token of each rollout
    token_loss(outputs, batch)               the loss and the statistics of each token

`batching` calls the first two once, over the whole batch, before any split. The loss of
a batch is `sum(weight_BT * loss_BT)`. It has no denominator that a micro-batch, a shard
or a packed row could get wrong. A named algorithm is one line: one entry of each of
three short lists, so an ablation is their cross product. `corrections` and `penalties`
wrap any of them.

    name               advantage        weight           token loss          arXiv
    lm, sft            ones             per_token        nll
    expert_iteration   keep_positive    per_kept_token   nll                 1705.08439
    reinforce          centre_batch     token_sum        reinforce
    reinforce_pp       zscore_batch     per_token        clipped             2501.03262
    rloo               leave_one_out    token_sum        reinforce           2402.14740
    maxrl              divide_by_mean   token_sum        reinforce           2602.02710
    pass_at_k          best_of(k)       token_sum        reinforce           2505.15201
    grpo               zscore_group     per_sequence     clipped             2402.03300
    dr_grpo            centre_group     per_max_length   clipped             2503.20783
    dapo               zscore_group     per_token        clipped (0.28)      2503.14476
    gspo               zscore_group     per_sequence     clipped_sequence    2507.18071
    cispo              zscore_group     per_token        clipped_weight      2506.13585
    dppo               centre_group     per_max_length   within_divergence   2602.04879
    sapo               zscore_group     per_sequence     soft_gate           2511.20347
    ppo                rewards, GAE     per_token        clipped, value      1707.06347
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxreason.objectives import corrections, penalties
from jaxreason.objectives import critic as critics
from jaxreason.objectives.advantages import (
    ADVANTAGES,
    EQUAL_REWARDS,
    GROUP_BASELINES,
    best_of,
    centre_batch,
    centre_group,
    divide_by_mean,
    keep_positive,
    leave_one_out,
    ones,
    rewards,
    scale_negative,
    zscore_batch,
    zscore_group,
)
from jaxreason.objectives.critic import Critic
from jaxreason.objectives.losses import (
    clipped,
    clipped_sequence,
    clipped_weight,
    nll,
    reinforce,
    soft_gate,
    within_divergence,
)
from jaxreason.objectives.penalties import KL_ESTIMATORS
from jaxreason.objectives.weights import WEIGHTINGS, per_kept_token, per_max_length, per_sequence, per_token, token_sum
from jaxreason.options import call_with_section, find, unknown_name_message

__all__ = ["ADVANTAGES", "EQUAL_REWARDS", "GROUP_BASELINES", "KL_ESTIMATORS", "OBJECTIVES", "WEIGHTINGS", "Objective", "make"]


class Objective(NamedTuple):
    """Three pure functions and their requirements.

    `needs_reference`: the batch must carry log-probs of a reference policy.
    `needs_group`: attempts at one problem are compared, so there must be at least two.
    `on_policy`: there is no importance ratio, so the rollouts must be the current
    policy's.
    """

    advantage: Callable  # reward_PG -> advantage_PG, numpy
    weigh: Callable  # (length_PG, advantage_PG, limit) -> weight_PG of one token, numpy
    token_loss: Callable  # (Outputs, Batch) -> (loss_BT, {name: value_BT})
    needs_reference: bool = False
    needs_group: bool = False
    on_policy: bool = False
    learns_cut: bool = True  # whether rollouts that were cut off at their limit are trained on
    critic: Critic | None = None  # makes advantages of single tokens from the rewards and the model's values

    @property
    def passes(self) -> int:
        """Count the forward passes over a batch that come before its first update."""
        by_values = self.critic is not None
        return self.needs_reference + by_values + (by_values and self.critic.trace_clip is not None)


def with_kl(objective: Objective, coefficient: float, estimator: str = "k3_weighted") -> Objective:
    """Add `coefficient` times the KL divergence to the reference policy, per token."""
    if estimator not in KL_ESTIMATORS:
        raise ValueError(unknown_name_message("KL estimator", estimator, KL_ESTIMATORS))
    token_loss = penalties.add_kl(objective.token_loss, coefficient, estimator)
    return objective._replace(token_loss=token_loss, needs_reference=True)


def with_entropy(objective: Objective, coefficient: float) -> Objective:
    """Reward entropy with `coefficient` per nat (Williams and Peng 1991)."""
    return objective._replace(token_loss=penalties.add_entropy(objective.token_loss, coefficient))


def with_correction(objective: Objective, level: str, how: str = "truncate", low: float = 0.0, high: float = 2.0) -> Objective:
    """Correct for rollouts of another policy than the one that learns: see
    `corrections`.

    An objective without an importance ratio gets the bounded ratio as a weight. One
    that has a ratio would count it twice, so tokens can only be masked.

    Raises:
      ValueError: an unknown level or way, wrong bounds, or truncation of a ratio that
        the objective has itself.
    """
    corrections.check(level, how, low, high)
    if level == "none":
        return objective
    if objective.on_policy:
        token_loss = corrections.weigh_by_ratio(objective.token_loss, level, how, low, high)
        return objective._replace(token_loss=token_loss, on_policy=False)
    if how != "mask":
        raise ValueError(
            f"correct={level!r} with correct_by={how!r}, but the objective has an importance ratio already; allowed: "
            "correct_by='mask', or correct='none'"
        )
    return objective._replace(token_loss=corrections.mask_by_ratio(objective.token_loss, level, low, high))


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


def reinforce_pp(
    clip_low: float = 0.2,  # clip of the importance ratio below 1: at 1 - clip_low
    clip_high: float = 0.2,  # clip of the importance ratio above 1: at 1 + clip_high
):
    """REINFORCE++: the rewards of the batch, normalised together (Hu et al. 2025, arXiv
    2501.03262v2, eq. 10), and a clipped ratio.

    The mean is over the tokens of the batch; eq. 1 takes that of each rollout first,
    which is `weigh=per_sequence`. The KL term in the reward (eq. 8 and 9) is left out.
    """
    return Objective(zscore_batch, per_token, clipped(clip_low, clip_high))


def maxrl():
    """Maximum likelihood RL: the mean reward of the group is baseline and divisor
    (Tajwar et al. 2026, arXiv 2602.02710).
    """
    return Objective(divide_by_mean, token_sum, reinforce, needs_group=True, on_policy=True)


def pass_at_k(
    k: int = 2,  # the expected best reward of k attempts is maximised
):
    """REINFORCE of the best of k attempts (Walder and Karkhanis 2025, arXiv
    2505.15201).
    """
    return Objective(best_of(k), token_sum, reinforce, needs_group=True, on_policy=True)


def grpo(
    clip_low: float = 0.2,  # clip of the importance ratio below 1: at 1 - clip_low
    clip_high: float = 0.2,  # clip of the importance ratio above 1: at 1 + clip_high
    clip_dual: float | None = None,  # bound of the ratio where the advantage is negative, such as 3; None: none
):
    """Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300, eq. 3).

    The paper gives no value of its clip; 0.2 is that of PPO. Its KL term is
    `kl_coefficient=0.04, kl_estimator=k3_reverse` (eq. 4, sec. 4.2).
    """
    return Objective(zscore_group, per_sequence, clipped(clip_low, clip_high, clip_dual), needs_group=True)


def dr_grpo(
    clip_low: float = 0.2,  # clip of the importance ratio below 1: at 1 - clip_low
    clip_high: float = 0.2,  # clip of the importance ratio above 1: at 1 + clip_high
):
    """GRPO without its two normalisations (Liu et al. 2025, arXiv 2503.20783, sec.
    3.2; clip of table 6).
    """
    return Objective(centre_group, per_max_length, clipped(clip_low, clip_high), needs_group=True)


def dapo(
    clip_low: float = 0.2,  # clip of the importance ratio below 1: at 1 - clip_low
    clip_high: float = 0.28,  # clip of the importance ratio above 1: at 1 + clip_high
):
    """Clip-higher and token-level loss (Yu et al. 2025, arXiv 2503.14476, eq. 8 and
    12).

    The mean over tokens is over the whole batch, as in TRL and verl, not inside each
    group as in eq. 12, which is `weigh=per_prompt`. Dynamic sampling is a field of the
    source. Overlong reward shaping is the verifier `length_shaped`.
    """
    return Objective(zscore_group, per_token, clipped(clip_low, clip_high), needs_group=True)


def gspo(
    clip_low: float = 3e-4,  # clip of the ratio of a rollout below 1: at 1 - clip_low
    clip_high: float = 4e-4,  # clip of the ratio of a rollout above 1: at 1 + clip_high
):
    """Group sequence policy optimisation: one ratio per rollout (Zheng et al. 2025,
    arXiv 2507.18071, eq. 5 and 7; clips of sec. 5.1).

    Khatri et al. 2025 (arXiv 2510.13786, A.17.3) found clips of 4e-3 and more better
    for a dense model of 8B.
    """
    return Objective(zscore_group, per_sequence, clipped_sequence(clip_low, clip_high), needs_group=True)


def cispo(
    clip_low: float = 1.0,  # lowest weight: 1 - clip_low; 1: no lower bound, as in the paper
    clip_high: float = 4.0,  # highest weight: 1 + clip_high
):
    """Clipped importance weights that keep every token's gradient (MiniMax 2025, arXiv
    2506.13585, eq. 4 and 5).

    The paper does not give its upper bound. Khatri et al. 2025 (arXiv 2510.13786,
    A.17.2) found 4, 5 and 8 alike; 5 is `clip_high=4`.
    """
    return Objective(zscore_group, per_token, clipped_weight(clip_low, clip_high), needs_group=True)


def dppo(
    divergence: str = "tv",  # tv or kl, of the sampled token against all others
    limit_low: float = 0.2,  # divergence from which tokens that lose probability are left out
    limit_high: float = 0.2,  # divergence from which tokens that gain probability are left out
    largest_ratio: float = 20.0,  # bound of the importance weight
):
    """Divergence proximal policy optimisation: a trust region of probabilities, not of
    their ratio (Qi et al. 2026, arXiv 2602.04879, eq. 12). Limits and bound are verl's;
    for `kl` the paper tries limits of 0.05 to 0.15 (fig. 19).
    """
    token_loss = within_divergence(divergence, limit_low, limit_high, largest_ratio)
    return Objective(centre_group, per_max_length, token_loss, needs_group=True)


def sapo(
    tau_positive: float = 1.0,  # steepness of the gate where the advantage is positive
    tau_negative: float = 1.05,  # and where it is negative
):
    """Soft adaptive policy optimisation: a smooth gate in the place of a clip (Gao et
    al. 2025, arXiv 2511.20347).
    """
    return Objective(zscore_group, per_sequence, soft_gate(tau_positive, tau_negative), needs_group=True)


def ppo(
    clip_low: float = 0.2,  # clip of the importance ratio below 1: at 1 - clip_low
    clip_high: float = 0.2,  # clip of the importance ratio above 1: at 1 + clip_high
    clip_dual: float | None = None,  # bound of the ratio where the advantage is negative, such as 3; None: none
    discount: float = 1.0,  # gamma: what a reward one token later is worth
    decay: float = 0.95,  # lambda: 1 trusts rewards alone, 0 values alone
    normalise: bool = True,  # normalise advantages over the batch
    trace_clip: float | None = None,  # V-trace for rollouts of older params: bound of its ratios, such as 1; None: without
    value_coefficient: float = 0.5,  # weight of the loss of values
    value_clip: float | None = 0.2,  # distance from the old value beyond which an error still counts; None: no clip
):
    """Proximal policy optimisation with a value head (Schulman et al. 2017, arXiv
    1707.06347, eq. 7 and 9) and generalised advantages (eq. 11; arXiv 1506.02438, eq.
    16).

    The numbers, the halved error of values and its clip are those of `ppo2` of OpenAI's
    baselines, without discount. The paper has no such clip and no half.
    """
    critic = Critic(discount, decay, normalise, trace_clip)
    critics.check(critic)
    token_loss = critics.add_value_loss(clipped(clip_low, clip_high, clip_dual), value_coefficient, value_clip)
    return Objective(rewards, per_token, token_loss, critic=critic)


def expert_iteration():
    """Imitation of rollouts with a positive reward (Anthony et al. 2017, arXiv
    1705.08439).
    """
    return Objective(keep_positive, per_kept_token, nll)


OBJECTIVES = {
    "lm": lm,
    "sft": sft,
    "expert_iteration": expert_iteration,
    "reinforce": reinforce_batch,
    "reinforce_pp": reinforce_pp,
    "rloo": rloo,
    "maxrl": maxrl,
    "pass_at_k": pass_at_k,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "dppo": dppo,
    "sapo": sapo,
    "ppo": ppo,
}


CUT = ("in", "out")


def make(
    name: str,  # one of the objectives, or module:maker of your own
    *,
    advantage: str | None = None,  # replaces the objective's advantage: centre_group, leave_one_out, zscore_group, ...
    negative_scale: float = 1.0,  # factor of negative advantages: below 1, wrong attempts count less
    weigh: str | None = None,  # replaces the loss aggregation: token_sum, per_sequence, per_token, per_max_length, ...
    cut: str = "in",  # in or out: rollouts that were cut off at their limit; out, they weigh 0 but stay in baselines
    correct: str = "none",  # none, token or sequence: weigh or mask by the ratio of learner and sampler
    correct_by: str = "truncate",  # truncate or mask ratios outside the bounds
    correct_low: float = 0.0,  # lower bound of the ratio
    correct_high: float = 2.0,  # upper bound of the ratio
    stale_limit: float | None = None,  # mean log(sampler / learner) above which wrong rollouts are left out; None: never
    kl_coefficient: float = 0.0,  # weight of the KL divergence to the params at the start of the phase; 0: none
    kl_estimator: str = "k3_weighted",  # k1, k2, k3_weighted, or k3_reverse as in GRPO, whose gradient is that of KL(q || p)
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
    if negative_scale != 1:
        objective = objective._replace(advantage=scale_negative(objective.advantage, negative_scale))
    if weigh is not None:
        if weigh not in WEIGHTINGS:
            raise ValueError(unknown_name_message("weighting", weigh, WEIGHTINGS))
        objective = objective._replace(weigh=WEIGHTINGS[weigh])
    if cut not in CUT:
        raise ValueError(f"cut got {cut!r}; allowed: {', '.join(CUT)}")
    objective = objective._replace(learns_cut=cut == "in")
    if kl_coefficient < 0:
        raise ValueError(f"kl_coefficient got {kl_coefficient}; allowed: 0 or more")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(unknown_name_message("KL estimator", kl_estimator, KL_ESTIMATORS))
    objective = with_correction(objective, correct, correct_by, correct_low, correct_high)
    if stale_limit is not None:
        if stale_limit < 0:
            raise ValueError(f"stale_limit got {stale_limit}; allowed: 0 or more, or None")
        objective = objective._replace(token_loss=corrections.mask_stale_negatives(objective.token_loss, stale_limit))
    if entropy_coefficient:
        objective = with_entropy(objective, entropy_coefficient)
    if kl_coefficient:
        objective = with_kl(objective, kl_coefficient, kl_estimator)
    return objective
