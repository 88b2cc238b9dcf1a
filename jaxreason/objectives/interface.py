"""What an objective is: functions of a batch, and what they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxreason.objectives.controls import Control
from jaxreason.objectives.critic import Critic
from jaxreason.objectives.divergence import Divergence


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
