"""Coefficients that a train step adapts: state of an objective, kept in
`TrainState.control` and so in every checkpoint.

A token loss finds the current values in `batch.control`, by the control's name. After
each update they follow from the metrics of the whole batch, (sum, count) pairs, unless
the update was skipped because its gradient was not finite, or no token was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Control(NamedTuple):
    """A part of the state, and its rule."""

    name: str
    init: Callable[[], Any]  # () -> value, a small pytree of arrays
    update: Callable[[Any, dict], Any]  # (value, metrics of the train step) -> value
    reads: str | None = None  # metric without whose tokens the value stays; None: it changes with every update


def begin(controls: tuple[Control, ...]) -> dict | None:
    """Return the state of some controls at the start of a phase; None for none."""
    return {control.name: control.init() for control in controls} or None


def after(controls: tuple[Control, ...], state: dict | None, metrics: dict, finite) -> dict | None:
    """Return the state after an update; the same if the gradient was not `finite`.

    The mean over no tokens is not 0: a batch that nothing is learned from, such as one
    without a right attempt, moves no coefficient.
    """
    if not controls:
        return state
    found = {}
    for control in controls:
        old, changes = state[control.name], finite
        if control.reads is not None:
            changes = finite & (metrics[control.reads][1] > 0)
        new = control.update(old, metrics)
        found[control.name] = jax.tree.map(lambda new, old, changes=changes: jnp.where(changes, new, old), new, old)
    return found


def mean_of(metrics: dict, name: str):
    total, count = metrics[name]
    return total / jnp.maximum(count, 1.0)


def entropy_control(start: float, target: float, delta: float, highest: float) -> Control:
    """Make the coefficient of a reward for entropy that keeps the mean entropy of the
    trained tokens, those that are imitated left out, at `target` nats or above (He et
    al. 2025, arXiv 2505.22312, sec. 3.2.5, adaptive entropy control).

    After each update the coefficient grows by `delta` if the entropy was below the
    target and falls by `delta` if it was above, within 0 and `highest`; it is in force
    only while the entropy is not above the target. The paper judges that by the batch
    that is learned from, which takes a pass of its own. Here it is the batch before.
    """
    if not (target > 0 and delta > 0 and 0 <= start <= highest):
        raise ValueError(
            f"got entropy_target={target}, entropy_delta={delta}, entropy_coefficient={start}, entropy_highest={highest}; "
            "allowed: a target and a delta above 0, and a coefficient of 0 to entropy_highest"
        )

    def update(value, metrics):
        entropy = mean_of(metrics, "scored_entropy")
        moved = value["coefficient"] + delta * jnp.sign(target - entropy)
        return {"coefficient": jnp.clip(moved, 0.0, highest), "entropy": entropy}

    return Control("entropy", lambda: {"coefficient": jnp.float32(start), "entropy": jnp.float32(0)}, update, "scored_entropy")


def entropy_coefficient(target: float):
    """Return a function from a batch to the coefficient that is in force."""

    def found(batch):
        value = batch.control["entropy"]
        return jnp.where(value["entropy"] <= target, value["coefficient"], 0.0)

    return found


def kl_control(start: float, target: float, gain: float) -> Control:
    """Make the coefficient of a KL divergence that keeps it at `target` nats per token
    (Ziegler et al. 2019, arXiv 1909.08593, sec. 2.2): coefficient * (1 + gain * error),
    error = KL / target - 1, clipped to -0.2 and 0.2.

    The paper's KL is that of a whole rollout.
    """
    if not (target > 0 and 0 < gain < 5 and start > 0):
        raise ValueError(
            f"got kl_target={target}, kl_gain={gain}, kl_coefficient={start}; allowed: above 0, and a gain below 5, since 5 "
            "would make the coefficient 0 where the KL is too low"
        )

    def update(value, metrics):
        error = jnp.clip(mean_of(metrics, "kl") / target - 1.0, -0.2, 0.2)
        return {"coefficient": value["coefficient"] * (1.0 + gain * error)}

    return Control("kl", lambda: {"coefficient": jnp.float32(start)}, update, "kl")


def kl_coefficient(batch):
    """Return the coefficient that is in force."""
    return batch.control["kl"]["coefficient"]


def at(coefficient: float | Callable, batch):
    """Return a coefficient that is a number, or a function of the batch."""
    return coefficient(batch) if callable(coefficient) else coefficient


def statistic(name: str, coefficient: float | Callable, batch, like_BT) -> dict:
    """Return an adapted coefficient as a statistic of tokens; nothing for a number."""
    return {name: jnp.full_like(like_BT, coefficient(batch))} if callable(coefficient) else {}
