"""Objectives: the training target of a batch, as three small pure functions that never
see the model.

    advantage(reward_PG)                     how good each attempt was in its group
    weigh(length_PG, advantage_PG, limit)    the weight of each token of each rollout
    token_loss(outputs, batch)               the loss and the statistics of each token

`batching` calls the first two once, over the whole batch, before any split. The loss of
a batch is `sum(weight_BT * loss_BT)`. It has no denominator that a micro-batch, a shard
or a packed row could get wrong. A named algorithm is one line: one entry of each of
three short lists, so an ablation is their cross product. `corrections`, `penalties` and
`wrappers` wrap any of them.

    name               advantage        weight           token loss          arXiv
    lm, sft            ones             per_token        nll
    expert_iteration   keep_positive    per_kept_token   nll                 1705.08439
    reinforce          centre_batch     token_sum        reinforce
    reinforce_pp       zscore_batch     per_token        clipped             2501.03262
    rloo               leave_one_out    token_sum        reinforce           2402.14740
    maxrl              divide_by_mean   token_sum        reinforce           2602.02710
    pass_at_k          best_of(k)       token_sum        reinforce           2505.15201
    grpo               zscore_group     per_sequence     clipped             2402.03300
    gdpo               normalise_each   per_sequence     clipped             2601.05242
    dr_grpo            centre_group     per_max_length   clipped             2503.20783
    dapo               zscore_group     per_token        clipped (0.28)      2503.14476
    gspo               zscore_group     per_sequence     clipped_sequence    2507.18071
    cispo              zscore_group     per_token        clipped_weight      2506.13585
    dppo               centre_group     per_max_length   within_divergence   2602.04879
    sapo               zscore_group     per_sequence     soft_gate           2511.20347
    ppo                rewards, GAE     per_token        clipped, value      1707.06347
    distil             ones             per_token        distilled           2306.13649
    self_distil        ones             per_token        distilled           2601.19897

Losses `reinforce` get the ratio of learner and sampler, truncated at 2, unless
`correct` says otherwise. gdpo's advantage takes measures of the verdicts, reward_PGN.
To any of them can be added:

    field                    what it adds                               arXiv
    kl_coefficient           KL divergence to the reference policy      2512.02556
    kl_in=reward             the same as a reward of each token         2203.02155
    kl_target                its coefficient adapts to a target         1909.08593
    entropy_coefficient      a reward for entropy
    entropy_target           its coefficient adapts to a target         2505.22312
    entropy_top              only tokens of high entropy are learned    2506.01939
    covariance               tokens of high covariance are restrained   2505.22617
    correct, stale_limit     for rollouts of another policy             2512.02556
    source.credit=attempt    each attempt of `retry` has an advantage

`Objective.prepare` are functions of the whole batch, run before its first update
(`penalties`, `selection`), and `Objective.controls` state that updates change
(`controls`).
"""

from __future__ import annotations

from jaxreason.objectives import corrections
from jaxreason.objectives.advantages import (
    ADVANTAGES,
    EQUAL_REWARDS,
    GROUP_BASELINES,
    best_of,
    centre_batch,
    centre_group,
    centre_group_scale_batch,
    divide_by_mean,
    keep_positive,
    leave_one_out,
    normalise_each,
    ones,
    rewards,
    scale_negative,
    zscore_batch,
    zscore_group,
)
from jaxreason.objectives.interface import Objective
from jaxreason.objectives.losses import clipped, clipped_sequence, clipped_weight, nll, reinforce, soft_gate, within_divergence
from jaxreason.objectives.named import (
    OBJECTIVES,
    cispo,
    dapo,
    distil,
    dppo,
    dr_grpo,
    expert_iteration,
    gdpo,
    grpo,
    gspo,
    lm,
    maxrl,
    pass_at_k,
    ppo,
    reinforce_batch,
    reinforce_pp,
    rloo,
    sapo,
    self_distil,
    sft,
)
from jaxreason.objectives.penalties import KL_ESTIMATORS
from jaxreason.objectives.weights import (
    WEIGHTINGS,
    per_kept_token,
    per_max_length,
    per_mixed_prompt,
    per_prompt,
    per_sequence,
    per_token,
    token_sum,
)
from jaxreason.objectives.wrappers import (
    KL_IN,
    adapt_kl,
    with_correction,
    with_covariance,
    with_entropy,
    with_entropy_target,
    with_kl,
    with_kl_in_reward,
    with_parts,
    with_top_entropy,
)
from jaxreason.options import call_with_section, find, unknown_name_message

__all__ = [
    "ADVANTAGES",
    "CUT",
    "EQUAL_REWARDS",
    "GROUP_BASELINES",
    "KL_ESTIMATORS",
    "KL_IN",
    "OBJECTIVES",
    "WEIGHTINGS",
    "Objective",
    "best_of",
    "centre_batch",
    "centre_group",
    "centre_group_scale_batch",
    "cispo",
    "clipped",
    "clipped_sequence",
    "clipped_weight",
    "dapo",
    "distil",
    "divide_by_mean",
    "dppo",
    "dr_grpo",
    "expert_iteration",
    "gdpo",
    "grpo",
    "gspo",
    "keep_positive",
    "leave_one_out",
    "lm",
    "make",
    "maxrl",
    "nll",
    "normalise_each",
    "ones",
    "pass_at_k",
    "per_kept_token",
    "per_max_length",
    "per_mixed_prompt",
    "per_prompt",
    "per_sequence",
    "per_token",
    "ppo",
    "reinforce",
    "reinforce_batch",
    "reinforce_pp",
    "rewards",
    "rloo",
    "sapo",
    "scale_negative",
    "self_distil",
    "sft",
    "soft_gate",
    "token_sum",
    "with_correction",
    "with_entropy",
    "with_kl",
    "within_divergence",
    "zscore_batch",
    "zscore_group",
]

CUT = ("in", "out")


def make(
    name: str,  # one of the objectives, or module:maker of your own
    *,
    advantage: str | None = None,  # replaces the objective's advantage: centre_group, leave_one_out, zscore_group, ...
    negative_scale: float = 1.0,  # factor of negative advantages: below 1, wrong attempts count less
    weigh: str | None = None,  # replaces the loss aggregation: token_sum, per_sequence, per_token, per_max_length, ...
    cut: str = "in",  # in or out: rollouts that were cut off at their limit; out, they weigh 0 but stay in baselines
    correct: str | None = None,  # none, token, sequence: weigh or mask by learner / sampler; None: token if the loss has no ratio
    correct_by: str = "truncate",  # truncate or mask ratios outside the bounds
    correct_low: float = 0.0,  # lower bound of the ratio
    correct_high: float = 2.0,  # upper bound of the ratio
    stale_limit: float | None = None,  # mean log(sampler / learner) above which wrong rollouts are left out; None: never
    kl_coefficient: float = 0.0,  # weight of the KL divergence to the reference policy (see the phase's `reference`); 0: none
    kl_estimator: str = "k3_weighted",  # k1, k2, k3_weighted, k3_reverse as in GRPO (gradient of KL(reference, policy)), exact
    kl_in: str = "loss",  # loss, or reward: of each token, by the log-probs of the policy that sampled
    kl_target: float | None = None,  # nats per token that the coefficient is adapted to; None: it is constant
    kl_gain: float = 0.1,  # share of the relative error, within 0.2, by which it changes per update
    entropy_coefficient: float = 0.0,  # reward per nat of entropy
    entropy_target: float | None = None,  # nats that the coefficient is adapted to; None: it is constant
    entropy_delta: float = 0.005,  # its change per update
    entropy_highest: float = 1.0,  # its upper bound
    entropy_top: float = 1.0,  # fraction of the batch's tokens, those of highest entropy, to learn from; 0.2 in the paper
    covariance: str = "none",  # none; clip or kl: leave out or restrain tokens with a high covariance of log-prob and advantage
    covariance_fraction: float = 2e-4,  # fraction of the batch's tokens
    covariance_low: float = 1.0,  # lower bound of the covariance of tokens that clip leaves out
    covariance_high: float = 5.0,  # and upper bound
    covariance_coefficient: float = 1.0,  # weight of the penalty of kl
    **kwargs,
) -> Objective:
    """Make a named objective, or a user's `module:maker`.

    `advantage` and `weigh` replace those of the objective by name, and an advantage by
    name takes the verdict's reward, whatever its measures; `kwargs` are the
    algorithm's own numbers. `correct` None is `token` for an objective that scores
    rollouts without an importance ratio (`on_policy`), and `none` for all others:
    on-policy the ratio is 1 up to rounding, and its inputs are computed anyway.

    Raises:
      ValueError: an unknown name or a number out of range.
    """
    objective = call_with_section(find("objective", name, OBJECTIVES), kwargs, f"objective {name!r}")
    if not isinstance(objective, Objective):
        raise ValueError(f"objective {name!r} made a {type(objective).__name__}; allowed: an objectives.Objective")
    objective = with_parts(objective, name, advantage, negative_scale, weigh)
    if cut not in CUT:
        raise ValueError(f"cut got {cut!r}; allowed: {', '.join(CUT)}")
    objective = objective._replace(learns_cut=cut == "in")
    if kl_coefficient < 0:
        raise ValueError(f"kl_coefficient got {kl_coefficient}; allowed: 0 or more")
    if kl_estimator not in KL_ESTIMATORS:
        which = "; the k3 of GRPO, TRL and verl is k3_reverse" if kl_estimator == "k3" else ""
        raise ValueError(unknown_name_message("KL estimator", kl_estimator, KL_ESTIMATORS) + which)
    level = correct if correct is not None else ("token" if objective.on_policy else "none")
    objective = with_correction(objective, level, correct_by, correct_low, correct_high)
    if correct not in (None, "none") or stale_limit is not None:
        objective = objective._replace(needs_rollouts=True)
    if stale_limit is not None:
        if stale_limit < 0:
            raise ValueError(f"stale_limit got {stale_limit}; allowed: 0 or more, or None")
        objective = objective._replace(token_loss=corrections.mask_stale_negatives(objective.token_loss, stale_limit))
    if kl_in not in KL_IN:
        raise ValueError(f"kl_in got {kl_in!r}; allowed: {', '.join(KL_IN)}")
    if kl_in == "reward" and kl_estimator == "exact":
        raise ValueError("kl_estimator got 'exact' with kl_in='reward', which is of sampled tokens; allowed: kl_in='loss'")
    if entropy_target is not None:
        objective = with_entropy_target(objective, entropy_coefficient, entropy_target, entropy_delta, entropy_highest)
    elif entropy_coefficient:
        objective = with_entropy(objective, entropy_coefficient)
    if kl_coefficient or kl_target is not None:
        objective, coefficient = adapt_kl(objective, kl_coefficient, kl_target, kl_gain)
        in_loss = kl_in == "loss"
        objective = with_kl(objective, coefficient, kl_estimator) if in_loss else with_kl_in_reward(objective, coefficient)
    numbers = covariance_fraction, covariance_low, covariance_high, covariance_coefficient
    objective = with_covariance(objective, covariance, *numbers)  # of all advantages, so before any is left out
    return with_top_entropy(objective, entropy_top) if entropy_top != 1 else objective
