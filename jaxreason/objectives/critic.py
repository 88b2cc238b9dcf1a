"""A critic: advantages of single tokens from values, and the loss of the value head.

The value of token t is that of the text before it. Only sampled tokens are steps:
forced ones (tool output) are passed over. The reward comes with the last step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxreason.objectives.losses import log_ratio
from jaxreason.objectives.penalties import kl_rewards
from jaxreason.types import Outputs


class Critic(NamedTuple):
    """How values become advantages."""

    discount: float = 1.0  # gamma
    decay: float = 0.95  # lambda
    normalise: bool = True  # subtract the mean of the batch's advantages and divide by their standard deviation
    trace_clip: float | None = None  # bound of the ratios of V-trace; None: generalised advantages
    kl_coefficient: float | Callable = 0.0  # of rewards of single tokens (`penalties.kl_rewards`), or a function of the batch


def check(critic: Critic) -> None:
    if not (0 <= critic.discount <= 1 and 0 <= critic.decay <= 1):
        raise ValueError(f"got discount={critic.discount}, decay={critic.decay}; allowed: 0 to 1")
    if critic.trace_clip is not None and critic.trace_clip <= 0:
        raise ValueError(f"trace_clip got {critic.trace_clip}; allowed: above 0, such as 1, or None for generalised advantages")


def with_values(critic: Critic, value_BT, batch, logp_BT=None) -> dict:
    """Return the fields of a batch that values determine: `advantage_BT`, `return_BT`
    and `value_BT`. The batch's `advantage_BT` so far are the rewards, which come with
    the last step; with a KL coefficient each step has a reward besides.

    Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16):
    the sum over later steps of (discount * decay)^k * delta, with delta = reward +
    discount * next value - value. The return is advantage + value, before the
    advantages are normalised over the trained tokens of the batch.

    With `trace_clip` these are off-policy corrected by V-trace (Espeholt et al. 2018,
    arXiv 1802.01561, eq. 1 and remark 2, rho and c with one bound): an error e counts
    in those before it by min(r, bound), r the ratio of the policy that learns, of
    `logp_BT`, to the one that sampled. So advantage = delta + discount * decay * later
    e, e = min(r, bound) * advantage, and the return is e + value. The advantage has no
    ratio of its own token, since the loss has one.
    """
    trained_BT = batch.weight_BT != 0
    trust_BT = jnp.ones_like(value_BT)
    if critic.trace_clip is not None:
        trust_BT = jnp.minimum(jnp.exp(log_ratio(Outputs(logp_BT, None), batch)), critic.trace_clip)

    def step(after, now):
        later_error, later_value, later_rollout = after
        value, reward, extra, trained, rollout, trust = now
        goes_on = rollout == later_rollout
        target = jnp.where(goes_on, critic.discount * later_value, reward)
        more = jnp.where(goes_on, critic.discount * critic.decay * later_error, 0.0)
        advantage = extra + target - value + more
        before = (trust * advantage, value, rollout)
        kept = jax.tree.map(lambda new, old: jnp.where(trained, new, old), before, after)
        return kept, jnp.where(trained, advantage, 0.0)

    fixed = not callable(critic.kl_coefficient) and critic.kl_coefficient == 0
    extra_BT = jnp.zeros_like(value_BT) if fixed else kl_rewards(critic.kl_coefficient, batch)
    columns = (value_BT, batch.advantage_BT, extra_BT, trained_BT, batch.rollout_BT, trust_BT)
    columns = jax.tree.map(jnp.transpose, columns)
    nothing_B = jnp.zeros_like(columns[0][0])
    _, advantage_TB = jax.lax.scan(step, (nothing_B, nothing_B, jnp.full_like(batch.rollout_BT[:, 0], -1)), columns, reverse=True)
    advantage_BT = advantage_TB.T
    return_BT = jnp.where(trained_BT, trust_BT * advantage_BT + value_BT, 0.0)
    if critic.normalise:
        count = jnp.maximum(jnp.sum(trained_BT), 1)
        mean = jnp.sum(advantage_BT) / count
        variance = jnp.sum(jnp.where(trained_BT, (advantage_BT - mean) ** 2, 0.0)) / count
        advantage_BT = jnp.where(trained_BT, (advantage_BT - mean) / (jnp.sqrt(variance) + 1e-6), 0.0)
    return {"advantage_BT": advantage_BT, "return_BT": return_BT, "value_BT": value_BT}


def add_value_loss(token_loss, coefficient: float, clip: float | None):
    """Add `coefficient` times the squared error of the value, halved.

    With `clip` the larger of two errors counts, that of the value and that of the value
    kept within `clip` of the one before the update (as in OpenAI's baselines; not in
    arXiv 1707.06347).
    """
    if coefficient <= 0 or (clip is not None and clip <= 0):
        raise ValueError(f"got value_coefficient={coefficient}, value_clip={clip}; allowed: above 0, and None for no clip")

    def with_value(outputs, batch):
        loss_BT, statistics = token_loss(outputs, batch)
        error_BT = (outputs.value_BT - batch.return_BT) ** 2
        if clip is not None:
            near_BT = batch.value_BT + jnp.clip(outputs.value_BT - batch.value_BT, -clip, clip)
            error_BT = jnp.maximum(error_BT, (near_BT - batch.return_BT) ** 2)
        statistics = {**statistics, "value_loss": 0.5 * error_BT, "value": outputs.value_BT, "return": batch.return_BT}
        return loss_BT + 0.5 * coefficient * error_BT, statistics

    return with_value
