"""Parts that are added to an objective: adapted coefficients, the KL divergence in the
reward, and selections of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxreason.objectives import controls, penalties, selection
from jaxreason.objectives.losses import nll
from jaxreason.options import unknown_name_message

if TYPE_CHECKING:
    from jaxreason.objectives import Objective

KL_IN = ("loss", "reward")


def with_entropy_target(objective: Objective, start: float, target: float, delta: float, highest: float) -> Objective:
    """Reward entropy with a coefficient that keeps it at a target or above, see
    `controls.entropy_control`.
    """
    control = controls.entropy_control(start, target, delta, highest)
    token_loss = penalties.add_entropy(objective.token_loss, controls.entropy_coefficient(target))
    return objective._replace(token_loss=token_loss, controls=(*objective.controls, control))


def kl_coefficient(objective: Objective, start: float, target: float | None, gain: float) -> tuple:
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
