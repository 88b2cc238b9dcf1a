"""Ragged groups of rollouts with forced tokens, and the batch that they make."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from jaxreason import batching, objectives
from jaxreason.types import Group, Outputs, Rollout, Task, Verdict

LIMIT = 9
P, G = 3, 4


def problem(seed: int, *, on_policy: bool = False) -> SimpleNamespace:
    """Draw ragged groups: rewards, log-probs of sampler (`q`) and learner (`p`) per
    sampled token, and the batch that they make.
    """
    rng = np.random.default_rng(seed)
    reward = rng.integers(0, 2, (P, G)).astype(float)
    reward[0] = [1, 0, 0, 1]
    reward[1] = 0.0  # a group of equal rewards
    length = rng.integers(1, LIMIT, (P, G))
    forced = [[rng.random(n) < 0.2 for n in row] for row in length]
    for row in forced:
        for mask in row:
            mask[0] = False
    q = [[rng.uniform(-2.5, -0.05, n) for n in row] for row in length]
    p = [[np.minimum(x + (0 if on_policy else rng.normal(0, 0.5, len(x))), -0.01) for x in row] for row in q]
    style = np.random.default_rng(seed + 100).integers(0, 3, (P, G)).astype(float)  # a second reward
    style[2] = 1.0
    return SimpleNamespace(reward=reward, style=style, forced=forced, q=q, p=p)


def batch_of(drawn: SimpleNamespace, objective: objectives.Objective, **layout):
    groups = [
        Group(
            tuple(
                Rollout(
                    Task("", ""), i, j, np.array([1, 2, 3]), np.arange(len(q)), q.astype(np.float32), ~forced, "eos", "",
                    Verdict(float(reward), reward > 0, measures={"reward_number": reward, "reward_format": style}),
                )
                for j, (q, forced, reward, style) in enumerate(zip(*rows, strict=True))
            )
        )
        for i, rows in enumerate(zip(drawn.q, drawn.forced, drawn.reward, drawn.style, strict=True))
    ]  # fmt: skip
    return batching.from_groups(groups, objective, buckets=(64,), limit=LIMIT, **layout)


def on_grid(values, batch) -> np.ndarray:
    """Put a value per token of each rollout where the batch has the token."""
    grid = np.zeros(batch.tokens_BT.shape)
    for number, rollout in enumerate(itertools.chain.from_iterable(values), start=1):
        grid[batch.rollout_BT == number] = rollout
    return grid


def total(objective, batch, logp_BT):
    """Return the loss as the learner sums it."""
    loss_BT, _ = objective.token_loss(Outputs(logp_BT, jnp.zeros_like(logp_BT)), batch)
    return jnp.sum(jnp.where(batch.weight_BT != 0, batch.weight_BT * loss_BT, 0.0))


def kept(drawn, i, j):
    """Return the positions of the sampled tokens of a rollout."""
    return [t for t, forced in enumerate(drawn.forced[i][j]) if not forced]
