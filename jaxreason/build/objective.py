"""Checks that a phase gives its objective all that it needs, before anything is
compiled.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason import batching, verify
from jaxreason.build.tasks import Parts
from jaxreason.objectives import Objective, controls, credit
from jaxreason.objectives.losses import nll
from jaxreason.options import lines_of
from jaxreason.types import Batch, Outputs

PROBED = 2**10  # attempts at a problem, above which an advantage is not tried: it may compare all pairs
NO_REWARDS = ("corpus", "demonstrations")  # sources whose tokens nobody judged


def check_objective(
    objective: Objective, *, name: str, what: str, where: str, source: Mapping, updates_per_batch: int, parts: Parts
) -> None:
    """Check that a phase and its source give an objective what it needs. `name` is that
    of the phase, `what` that of the objective and `where` that of the source's section.

    Raises:
      ValueError: they do not.
    """
    kind, group = source.get("name"), source.get("group", 1)
    if objective.needs_group and (kind in NO_REWARDS or group < 2):
        raise ValueError(
            f"config.{name}: objective {what!r} compares the attempts at a problem, but there is {group} of each; set "
            f"{where}.group to 2 or more, or choose reinforce, lm or sft"
        )
    if objective.critic is not None and parts.model.value is None:
        raise ValueError(
            f"config.{name}: objective {what!r} needs values, and the model has no value head; set model.value_head=True, or "
            "choose an objective without a critic, such as grpo"
        )
    if objective.critic is not None and kind in NO_REWARDS:
        raise ValueError(f"config.{name}: objective {what!r} needs rewards; allowed with the source rollouts")
    if objective.needs_rollouts and kind in NO_REWARDS:
        raise ValueError(
            f"config.{name}.objective compares log-probs with those of the policy that sampled (kl_in='reward', kl_estimator="
            f"'k3_weighted', covariance, correct, stale_limit), and source {kind!r} samples nothing; allowed: none of these "
            "(kl_estimator='exact', kl_in='loss'), or the source rollouts"
        )
    check_demonstrations(objective, what=what, where=f"config.{name}", source=source)
    if objective.on_policy and (source.get("lag") or updates_per_batch > 1):
        got = f"{where}.lag got {source['lag']}" if source.get("lag") else f"{name}.updates_per_batch got {updates_per_batch}"
        raise ValueError(
            f"config.{got}, but the objective has no importance ratio, so its gradient would be biased; allowed: "
            f"{0 if source.get('lag') else 1}, {name}.objective.correct='token' or 'sequence', or an objective with a ratio: "
            "grpo, dr_grpo, dapo"
        )
    if source.get("credit") == "attempt":
        try:
            credit.check_credit(objective, what)
        except ValueError as error:
            raise ValueError(f"config.{name}.{error}") from None
    if kind == "rollouts" and 1 <= group <= PROBED and not objective.measures:
        objective.advantage(np.zeros((1, group)))  # raises if it needs more attempts, as pass_at_k does
    if objective.measures:
        check_measures(objective, name, what, source, parts)


def check_demonstrations(objective: Objective, *, what: str, where: str, source: Mapping) -> None:
    """Check that something is learned from demonstrations, each of which is a group of
    its own with the reward 1. `where` names the objective.

    Raises:
      ValueError: the advantage compares them with each other.
    """
    kind = source.get("name")
    if kind in (*NO_REWARDS, "kept_rollouts") and objective.needs_group and objective.token_loss is nll:
        raise ValueError(
            f"{where}: objective {what!r} has an advantage that compares the attempts at a problem, but each demonstration of "
            f"source {kind!r} is alone; allowed: advantage=None"
        )
    if kind not in NO_REWARDS or objective.critic is not None or objective.needs_group or objective.measures:
        return
    if not objective.learns_cut:
        raise ValueError(f"{where}: cut got 'out', but source {kind!r} has no attempts that were cut off; allowed: 'in'")
    if not np.all(objective.advantage(np.ones((2, 1)))):
        raise ValueError(
            f"{where}: objective {what!r} learns from differences between rewards, but source {kind!r} has none, so nothing "
            "would be learned; allowed: lm, sft or distil, without another advantage, or the source rollouts"
        )


def check_own(objective: Objective, *, where: str, what: str, group: int) -> None:
    """Try a user's own objective on two groups and on a row of abstract tokens, so that
    a mistake in it ends the command at once and not after the phases before it.

    Raises:
      ValueError: one of its functions raises, or returns another shape.
    """
    reward = np.arange(2 * group, dtype=np.float32).reshape(2, group) % 2
    if objective.measures:
        reward = np.repeat(reward[..., None], len(objective.measures), -1)
    found = f"{where}: objective {what!r}"
    with lines_of(f"{found}: advantage or weigh"):
        batching.advantage_and_weight(objective, reward, np.full((2, group), 4), 8)
    outputs, batch = abstract_batch(objective, 2, 8)
    with lines_of(f"{found}: token_loss"):
        result = jax.eval_shape(objective.token_loss, outputs, batch)
    allowed = "allowed: a pair of loss_BT, shape [B, T], and a dict of statistics {name: value_BT}, which may be empty"
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        got = "one array" if isinstance(result, jax.ShapeDtypeStruct) else f"a {type(result).__name__} of another form"
        raise ValueError(f"{found}: token_loss returned {got}; {allowed}")
    if (shape := getattr(result[0], "shape", None)) != batch.tokens_BT.shape:
        raise ValueError(f"{found}: token_loss returned a loss of shape {shape} for tokens of {batch.tokens_BT.shape}; {allowed}")


def abstract_batch(objective: Objective, B: int, T: int) -> tuple[Outputs, Batch]:
    """Return shapes and dtypes of what the token loss of an objective is given."""
    x_BT = jax.ShapeDtypeStruct((B, T), jnp.float32)
    number_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
    refers, values = objective.needs_reference or None, objective.critic is not None or None
    outputs = Outputs(x_BT, x_BT, value_BT=values and x_BT, divergence_BT=x_BT if objective.divergence is not None else None)
    batch = Batch(
        number_BT,
        number_BT,
        number_BT,
        *[x_BT] * 4,
        rollout_BT=number_BT,
        reference_logp_BT=refers and x_BT,
        value_BT=values and x_BT,
        return_BT=values and x_BT,
        entropy_BT=x_BT if objective.needs_entropy else None,
        chosen_BT=jax.ShapeDtypeStruct((B, T), bool) if objective.chooses else None,
        control=controls.begin(objective.controls),
    )
    return outputs, batch


def check_measures(objective: Objective, name: str, what: str, source: Mapping, parts: Parts) -> None:
    """Check that the verdicts will have the measures that an objective takes."""
    paid = source.get("reward", "verdict")
    if paid != "verdict":
        raise ValueError(
            f"config.{name}.source.reward got {paid!r}, but objective {what!r} takes its rewards from the measures of the "
            "verdicts; allowed: 'verdict'"
        )
    there = verify.reward_measures(parts.verifier)
    environment = (parts.environment or {}).get("name") or ""
    if there is None or ":" in environment or environment == "openenv":
        return  # what a user's own code measures is seen only in its verdicts
    if lost := [measure for measure in objective.measures if measure.startswith("reward_") and measure not in there]:
        allowed = f"allowed: {', '.join(there)}" if there else "it has no parts; choose verifier 'weighted', with parts in `of`"
        raise ValueError(
            f"config.{name}.objective.rewards has {lost[0]!r}, a reward that verifier {parts.verifier['name']!r} lacks; {allowed}"
        )


def check_distillation(name: str, section: Mapping, objective: Objective, source: Mapping) -> None:
    """Check that the source gives what an objective that distils needs, and that no
    other objective gets a hint.
    """
    kind, hint = source.get("name"), source.get("hint", "none")
    if objective.needs_hint and hint == "none":
        raise ValueError(
            f"config.{name}: objective {section['name']!r} needs a hint for its teacher; set {name}.source.hint (of the source "
            "rollouts), or choose distil with a checkpoint as its reference"
        )
    if kind == "mix" and any(part.get("hint", "none") != "none" for part in source.get("of", {}).values()):
        raise ValueError(f"config.{name}.source.of has a part with a hint, which a mix can't show; allowed: hint='none'")
    if hint != "none" and not objective.distils:
        raise ValueError(
            f"config.{name}.source.hint got {hint!r}, but objective {section['name']!r} does not learn from a teacher; allowed: "
            "none, or the objectives self_distil and distil"
        )
    if objective.distils and objective.divergence is None and kind in NO_REWARDS:
        raise ValueError(
            f"config.{name}: over='token' estimates the divergence from tokens that the policy sampled, not those of {kind}; "
            "allowed: over='vocabulary', or the source rollouts"
        )
