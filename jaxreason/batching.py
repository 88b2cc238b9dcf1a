"""From rollouts, demonstrations or windows of text to a `Batch`: advantages, weights, behaviour log-probs, padding.

Advantages and weights are made here once, over the whole batch, in numpy, before anything is split. Rows are padded on the
right to the smallest of a few lengths, so few shapes are ever compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxreason.objectives import Objective
from jaxreason.types import Batch, Rollout


def length_buckets(longest: int, count: int = 4, multiple: int = 8) -> tuple[int, ...]:
    """Up to `count` lengths, evenly spaced and rounded up to `multiple`, of which the last is `longest`."""
    return tuple(sorted({min(longest, -(-longest * i // (count * multiple)) * multiple) for i in range(1, count + 1)}))


def from_rollouts(rollouts: Sequence[Rollout], objective: Objective, *, group: int, buckets: Sequence[int], limit: int) -> Batch:
    """Make a batch of R rows from rollouts that stand in order of (problem, attempt), `group` to a problem.

    Only sampled tokens are trained on. `limit` is the longest completion, which `per_slot` divides by.
    """
    R = len(rollouts)
    reward_PG = np.array([r.verdict.reward for r in rollouts], np.float64).reshape(-1, group)
    advantage_R = objective.advantage(reward_PG).reshape(R)
    length_R = np.array([r.sampled.sum() for r in rollouts])
    weight_R = objective.weigh(length_R, advantage_R, limit)
    batch = empty(R, _bucket(max(len(r.prompt) + len(r.tokens) for r in rollouts), buckets))
    for i, r in enumerate(rollouts):
        start, stop = len(r.prompt), len(r.prompt) + len(r.tokens)
        batch.tokens_BT[i, :start], batch.tokens_BT[i, start:stop] = r.prompt, r.tokens
        batch.segment_BT[i, :stop] = 1
        batch.weight_BT[i, start:stop] = np.where(r.sampled, weight_R[i], 0.0)
        batch.advantage_BT[i, start:stop] = advantage_R[i]
        batch.behaviour_logp_BT[i, start:stop] = r.logp
        batch.temperature_BT[i] = r.temperature
    return batch


def from_demonstrations(demonstrations: Sequence[tuple], objective: Objective, *, buckets: Sequence[int]) -> Batch:
    """Make a batch from (token ids, trainable) pairs, one a row; a row that is too long is cut on the right."""
    R, longest = len(demonstrations), buckets[-1]
    demonstrations = [(np.asarray(ids)[:longest], np.asarray(trainable, bool)[:longest]) for ids, trainable in demonstrations]
    length_R = np.array([trainable[1:].sum() for _, trainable in demonstrations])
    advantage_R = objective.advantage(np.ones((R, 1))).reshape(R)
    weight_R = objective.weigh(length_R, advantage_R, longest)
    batch = empty(R, _bucket(max(len(ids) for ids, _ in demonstrations), buckets))
    for i, (ids, trainable) in enumerate(demonstrations):
        batch.tokens_BT[i, : len(ids)] = ids
        batch.segment_BT[i, : len(ids)] = 1
        batch.weight_BT[i, : len(ids)] = np.where(trainable, weight_R[i], 0.0)
        batch.weight_BT[i, 0] = 0.0  # nothing stands before the first token
        batch.advantage_BT[i] = advantage_R[i]
    return batch


def from_windows(tokens_BT: np.ndarray, objective: Objective) -> Batch:
    """Make a batch from windows of a token stream, all trained on but their first token."""
    B, T = tokens_BT.shape
    advantage_B = objective.advantage(np.ones((B, 1))).reshape(B)
    weight_B = objective.weigh(np.full(B, T - 1), advantage_B, T - 1)
    batch = empty(B, T)
    batch.tokens_BT[:] = tokens_BT
    batch.segment_BT[:] = 1
    batch.weight_BT[:, 1:] = weight_B[:, None]
    batch.advantage_BT[:] = advantage_B[:, None]
    return batch


def empty(B: int, T: int) -> Batch:
    """A numpy batch of padding."""
    return Batch(
        tokens_BT=np.zeros((B, T), np.int32),
        position_BT=np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy(),
        segment_BT=np.zeros((B, T), np.int32),
        weight_BT=np.zeros((B, T), np.float32),
        advantage_BT=np.zeros((B, T), np.float32),
        behaviour_logp_BT=np.zeros((B, T), np.float32),
        temperature_BT=np.ones((B, T), np.float32),
    )


def _bucket(length: int, buckets: Sequence[int]) -> int:
    return next(b for b in buckets if b >= length)
