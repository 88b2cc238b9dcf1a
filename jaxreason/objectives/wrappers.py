"""Parts that are added to an objective: another advantage or weight, KL divergences,
rewards for entropy, corrections of the sampler, and selections of tokens.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxreason.objectives import controls, corrections, penalties, selection
from jaxreason.objectives.advantages import ADVANTAGES, GROUP_BASELINES, NEVER_NEGATIVE, scale_negative
from jaxreason.objectives.divergence import Divergence
from jaxreason.objectives.interface import Objective
from jaxreason.objectives.losses import nll
from jaxreason.objectives.penalties import KL_ESTIMATORS
from jaxreason.objectives.weights import READ_ADVANTAGES, WEIGHTINGS
from jaxreason.options import unknown_name_message

KL_IN = ("loss", "reward")


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


def with_entropy_target(objective: Objective, start: float, target: float, delta: float, highest: float) -> Objective:
    """Reward entropy with a coefficient that keeps it at a target or above, see
    `controls.entropy_control`.
    """
    control = controls.entropy_control(start, target, delta, highest)
    token_loss = penalties.add_entropy(objective.token_loss, controls.entropy_coefficient(target))
    return objective._replace(token_loss=token_loss, controls=(*objective.controls, control))


def adapt_kl(objective: Objective, start: float, target: float | None, gain: float) -> tuple:
    """Return the objective and the coefficient of its KL divergence: a number or, with
    a target, a function of the batch whose state the objective has.
    """
    if target is None:
        return objective, start
    return objective._replace(controls=(*objective.controls, controls.kl_control(start, target, gain))), controls.kl_coefficient


def with_kl_in_reward(objective: Objective, coefficient) -> Objective:
    """Pay each token `-coefficient` * (log p - log q), p the policy that sampled it and
    q the reference.

    With a critic these are rewards of single steps in generalised advantages (Ouyang et
    al. 2022, arXiv 2203.02155, eq. 2). Without one each token's advantage gets the sum
    of its rollout's from there on (Hu 2025, arXiv 2501.03262); baselines and
    normalisation of the advantage are those of the verdicts' rewards alone, where the
    paper normalises the sum and RLOO (arXiv 2402.14740) compares it.

    Raises:
      ValueError: an objective that imitates, whose tokens nobody sampled.
    """
    if objective.token_loss is nll:
        raise ValueError("kl_in got 'reward', but the objective imitates and so has no reward; allowed: 'loss'")
    token_loss = penalties.count_kl(objective.token_loss, coefficient)
    objective = objective._replace(token_loss=token_loss, needs_reference=True, needs_rollouts=True)
    if objective.critic is not None:
        return objective._replace(critic=objective.critic._replace(kl_coefficient=coefficient))
    return objective._replace(prepare=(*objective.prepare, penalties.kl_to_go(coefficient)))


def with_top_entropy(objective: Objective, fraction: float) -> Objective:
    """Learn from the tokens of highest entropy alone, see `selection.top_entropy`."""
    return objective._replace(prepare=(*objective.prepare, selection.top_entropy(fraction)), needs_entropy=True)


def with_covariance(objective: Objective, how: str, fraction: float, low: float, high: float, coefficient: float) -> Objective:
    """Restrain the tokens whose covariance of log-prob and advantage is high: see
    `selection.clip_covariance` and `selection.choose_covariance`.

    Raises:
      ValueError: an unknown way, or numbers out of range.
    """
    if how not in selection.COVARIANCES:
        raise ValueError(unknown_name_message("covariance", how, selection.COVARIANCES))
    if how == "none":
        return objective
    if how == "clip":
        chosen, token_loss = selection.clip_covariance(fraction, low, high), selection.count_chosen(objective.token_loss)
    else:
        if coefficient <= 0:
            raise ValueError(f"covariance_coefficient got {coefficient}; allowed: above 0")
        chosen = selection.choose_covariance(fraction)
        token_loss = selection.add_chosen_penalty(objective.token_loss, coefficient)
    prepare = (*objective.prepare, chosen)
    return objective._replace(token_loss=token_loss, prepare=prepare, needs_rollouts=True, chooses=True)
