"""The named algorithms: for each an advantage, a weight and a token loss. Equations,
papers and defaults are in README.md beside this file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxreason.objectives import critic as critics
from jaxreason.objectives import distillation
from jaxreason.objectives.advantages import (
    best_of,
    centre_batch,
    centre_group,
    divide_by_mean,
    keep_positive,
    leave_one_out,
    normalise_each,
    ones,
    rewards,
    zscore_batch,
    zscore_group,
)
from jaxreason.objectives.critic import Critic
from jaxreason.objectives.divergence import Divergence
from jaxreason.objectives.interface import Objective
from jaxreason.objectives.losses import clipped, clipped_sequence, clipped_weight, nll, reinforce, soft_gate, within_divergence
from jaxreason.objectives.weights import per_kept_token, per_max_length, per_sequence, per_token, token_sum


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
