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

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxreason.objectives import corrections, distillation, penalties
from jaxreason.objectives import critic as critics
from jaxreason.objectives.advantages import (
    ADVANTAGES,
    EQUAL_REWARDS,
    GROUP_BASELINES,
    NEVER_NEGATIVE,
    best_of,
    centre_batch,
    centre_group,
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
from jaxreason.objectives.controls import Control
from jaxreason.objectives.critic import Critic
from jaxreason.objectives.divergence import Divergence
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
from jaxreason.objectives.weights import (
    READ_ADVANTAGES,
    WEIGHTINGS,
    per_kept_token,
    per_max_length,
    per_sequence,
    per_token,
    token_sum,
)
from jaxreason.objectives.wrappers import (
    KL_IN,
    with_covariance,
    with_entropy_target,
    with_kl_in_reward,
    with_top_entropy,
)
from jaxreason.objectives.wrappers import (
    kl_coefficient as adapted,
)
from jaxreason.options import call_with_section, find, unknown_name_message

__all__ = ["ADVANTAGES", "EQUAL_REWARDS", "GROUP_BASELINES", "KL_ESTIMATORS", "OBJECTIVES", "WEIGHTINGS", "Objective", "make"]


class Objective(NamedTuple):
    """Three pure functions and their requirements.

    `needs_reference`: the batch must carry log-probs of a reference policy.
    `divergence`: that from a reference policy over the vocabulary, which the outputs
    must carry; the batch then has the reference's hidden states.
    `needs_group`: attempts at one problem are compared, so there must be at least two.
    `needs_entropy`: `prepare` reads `batch.entropy_BT`, which takes a pass of its own.
    `needs_rollouts`: log-probs of the policy that sampled are compared with others.
    `on_policy`: rollouts are scored without an importance ratio, so they must be the
    current policy's.
    """

    advantage: Callable  # reward_PG -> advantage_PG, numpy
    weigh: Callable  # (length_PG, advantage_PG, limit) -> weight_PG of one token, numpy
    token_loss: Callable  # (Outputs, Batch) -> (loss_BT, {name: value_BT})
    needs_reference: bool = False
    needs_group: bool = False
    on_policy: bool = False
    learns_cut: bool = True  # whether rollouts that were cut off at their limit are trained on
    critic: Critic | None = None  # makes advantages of single tokens from the rewards and the model's values
    divergence: Divergence | None = None
    distils: bool = False  # whether the loss is the distance from the reference, and not of the rewards
    needs_hint: bool = False  # whether the reference must be shown more than the policy
    reference: str = "start"  # the reference policy of a phase that names none: "start" or "current"
    controls: tuple[Control, ...] = ()  # state that the train step updates, and its rules
    prepare: tuple[Callable, ...] = ()  # Batch -> {field: value}, each once per batch, before its updates and any split
    needs_entropy: bool = False
    needs_rollouts: bool = False
    chooses: bool = False  # `prepare` makes `batch.chosen_BT`
    of_sets: bool = False  # the advantage is of sets of rollouts: attempts within one have none of their own
    measures: tuple[str, ...] = ()  # if given, `advantage` takes these measures of the verdicts, reward_PGN, and no reward_PG

    @property
    def refers(self) -> bool:
        """Whether there is a reference policy."""
        return self.needs_reference or self.divergence is not None

    @property
    def passes(self) -> int:
        """Number of forward passes over a batch before its first update."""
        by_trace = self.critic is not None and self.critic.trace_clip is not None
        return self.refers + (self.critic is not None) + by_trace + self.needs_entropy


def with_kl(objective: Objective, coefficient: float | Callable, estimator: str = "k3_weighted") -> Objective:
    """Add `coefficient` times the KL divergence to the reference policy, per token; a
    function of the batch for a coefficient that is adapted.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(unknown_name_message("KL estimator", estimator, KL_ESTIMATORS))
    if estimator == "exact":
        if objective.divergence is not None:
            raise ValueError(
                "kl_estimator got 'exact', but the objective is itself a divergence from the reference; allowed: "
                f"{', '.join(penalties.OF_TOKEN)}, or kl_coefficient=0"
            )
        token_loss = penalties.add_exact_kl(objective.token_loss, coefficient)
        return objective._replace(token_loss=token_loss, divergence=Divergence("reverse_kl"))
    token_loss = penalties.add_kl(objective.token_loss, coefficient, estimator)
    needs_rollouts = objective.needs_rollouts or estimator == "k3_weighted"
    return objective._replace(token_loss=token_loss, needs_reference=True, needs_rollouts=needs_rollouts)


def with_entropy(objective: Objective, coefficient: float) -> Objective:
    """Reward entropy with `coefficient` per nat (Williams and Peng 1991)."""
    return objective._replace(token_loss=penalties.add_entropy(objective.token_loss, coefficient))


def with_correction(objective: Objective, level: str, how: str = "truncate", low: float = 0.0, high: float = 2.0) -> Objective:
    """Correct for rollouts of another policy than the one that learns: see
    `corrections`.

    An objective without an importance ratio gets the bounded ratio as a weight. One
    that has a ratio would count it twice, so tokens can only be masked. Imitation wants
    no other policy's gradient, so there is nothing to correct.

    Raises:
      ValueError: an unknown level or way, wrong bounds, truncation of a ratio that the
        objective has itself, or an objective that imitates.
    """
    corrections.check(level, how, low, high)
    if level == "none":
        return objective
    if objective.token_loss is nll:
        raise ValueError(f"correct={level!r}, but the objective imitates the tokens of its batch; allowed: None or 'none'")
    if objective.on_policy:
        token_loss = corrections.weigh_by_ratio(objective.token_loss, level, how, low, high)
        return objective._replace(token_loss=token_loss, on_policy=False)
    if how != "mask":
        raise ValueError(
            f"correct={level!r} with correct_by={how!r}, but the objective has an importance ratio already; allowed: "
            "correct_by='mask', or correct='none'"
        )
    return objective._replace(token_loss=corrections.mask_by_ratio(objective.token_loss, level, low, high))


def with_parts(objective: Objective, name: str, advantage: str | None, negative_scale: float, weigh: str | None) -> Objective:
    """Replace the advantage and the weights of an objective by others, if any are
    given by name, and scale negative advantages.

    Raises:
      ValueError: an unknown name, or one that would change nothing or read advantages
        that are not there yet.
    """
    if advantage is not None:
        if advantage not in ADVANTAGES:
            raise ValueError(unknown_name_message("advantage", advantage, ADVANTAGES))
        chosen = ADVANTAGES[advantage]
        objective = objective._replace(advantage=chosen, needs_group=chosen in GROUP_BASELINES, measures=(), of_sets=False)
    if negative_scale != 1:
        if objective.critic is not None or objective.advantage in NEVER_NEGATIVE:
            why = "whose advantages a critic makes" if objective.critic is not None else "which has no negative advantages"
            raise ValueError(f"negative_scale got {negative_scale} with objective {name!r}, {why}; allowed: 1")
        objective = objective._replace(advantage=scale_negative(objective.advantage, negative_scale))
    if weigh is not None:
        if weigh not in WEIGHTINGS:
            raise ValueError(unknown_name_message("weighting", weigh, WEIGHTINGS))
        if objective.critic is not None and WEIGHTINGS[weigh] in READ_ADVANTAGES:
            raise ValueError(
                f"weigh got {weigh!r}, which leaves out advantages of 0, with objective {name!r}, whose advantages a critic "
                "makes later; allowed: per_token, per_sequence, per_prompt, per_max_length, token_sum"
            )
        objective = objective._replace(weigh=WEIGHTINGS[weigh])
    return objective


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
    which is `weigh=per_sequence`. Its KL term (eq. 8 and 9) is `kl_in=reward` with a
    `kl_coefficient`.
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
    return Objective(best_of(k), token_sum, reinforce, needs_group=True, on_policy=True, of_sets=True)


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


def gdpo(
    rewards: Sequence[str] = ("reward_number", "reward_format"),  # measures of the verdict, such as those of verifier weighted
    reward_weights: Sequence[float] | None = None,  # factor of each of them; None: 1
    clip_low: float = 0.2,  # clip of the importance ratio below 1: at 1 - clip_low
    clip_high: float = 0.2,  # clip of the importance ratio above 1: at 1 + clip_high
):
    """GRPO with several rewards, each of which is normalised in its group by itself
    (Liu et al. 2026, arXiv 2601.05242, GDPO).
    """
    weights = (1.0,) * len(rewards) if reward_weights is None else tuple(reward_weights)
    if not rewards or len(set(rewards)) < len(rewards):
        raise ValueError(f"rewards got {tuple(rewards)}; allowed: one or more different names of measures, such as reward_number")
    if len(weights) != len(rewards) or not all(math.isfinite(w) for w in weights) or not any(weights):
        allowed = "a finite number for each, not all 0, or None"
        raise ValueError(f"reward_weights got {weights} for {len(rewards)} rewards; allowed: {allowed}")
    token_loss = clipped(clip_low, clip_high)
    return Objective(normalise_each(weights), per_sequence, token_loss, needs_group=True, measures=tuple(rewards))


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


def distil(
    divergence: str = "reverse_kl",  # reverse_kl: KL(policy || reference), forward_kl: KL(reference || policy), or jensen_shannon
    beta: float = 0.5,  # weight of the reference in a jensen_shannon
    top_k: int = 0,  # tokens of the reference that count one by one, all others as one; 0: the whole vocabulary
    over: str = "vocabulary",  # vocabulary: all tokens that could follow; token: the sampled one, a noisier estimate
):
    """Distillation of a teacher, the phase's reference policy, on the policy's own
    attempts (Agarwal et al. 2024, arXiv 2306.13649) or on demonstrations.

    No reward is used, but with `advantage` each attempt's divergence counts times its
    advantage: with keep_positive, only right attempts are learned from. With
    over=vocabulary the divergence of each token is exact, but the texts before it are
    those of the sampling policy, which have no gradient. With over=token the loss is
    the score-function estimate of reverse_kl, with the advantage log q - log p of the
    token and discount 0.
    """
    how = Divergence(divergence, beta, top_k)
    distillation.check(how, over)
    if over == "vocabulary":
        return Objective(ones, per_token, distillation.distilled, divergence=how, distils=True)
    return Objective(ones, per_token, distillation.distilled_token, needs_reference=True, on_policy=True, distils=True)


def self_distil(
    divergence: str = "reverse_kl",  # reverse_kl: KL(policy || reference), forward_kl: KL(reference || policy), or jensen_shannon
    beta: float = 0.5,  # weight of the reference in a jensen_shannon
    top_k: int = 0,  # tokens of the reference that count one by one, all others as one; 0: the whole vocabulary
    over: str = "vocabulary",  # vocabulary: all tokens that could follow; token: the sampled one, a noisier estimate
):
    """Distillation of the same model, shown a hint that the policy does not see
    (Shenfeld et al. 2026, arXiv 2601.19897, SDFT; Huebotter et al. 2026, arXiv
    2601.20802, SDPO). The source's `hint` says which.

    In both papers the teacher is an average of the policy over updates (in SDPO, or
    mixed with the initial one); here it has the current params, or those of the start.
    """
    made = distil(divergence, beta, top_k, over)
    return made._replace(needs_hint=True, reference="current")


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
    "gdpo": gdpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "dppo": dppo,
    "sapo": sapo,
    "ppo": ppo,
    "distil": distil,
    "self_distil": self_distil,
}


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
        objective, coefficient = adapted(objective, kl_coefficient, kl_target, kl_gain)
        in_loss = kl_in == "loss"
        objective = with_kl(objective, coefficient, kl_estimator) if in_loss else with_kl_in_reward(objective, coefficient)
    numbers = covariance_fraction, covariance_low, covariance_high, covariance_coefficient
    objective = with_covariance(objective, covariance, *numbers)  # of all advantages, so before any is left out
    return with_top_entropy(objective, entropy_top) if entropy_top != 1 else objective
