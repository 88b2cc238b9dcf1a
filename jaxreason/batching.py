"""From groups of rollouts, demonstrations or windows of text to a `Batch`: advantages,
weights, behaviour log-probs, padding.

Advantages and weights are made here once, over the whole batch, in numpy, before
anything is split. Rows have the smallest of a few lengths that holds the longest
sequence, so few shapes are ever compiled. Short sequences share a row, if `pack`; rows
that this leaves empty stand in the last micro-batches, which the learner leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxreason.cost import shared_length
from jaxreason.objectives import Objective
from jaxreason.types import Batch, Group


def length_buckets(longest: int, count: int = 4, multiple: int = 8) -> tuple[int, ...]:
    """Up to `count` lengths, evenly spaced and rounded up to `multiple`, of which the
    last is `longest`.
    """
    return tuple(sorted({min(longest, -(-longest * i // (count * multiple)) * multiple) for i in range(1, count + 1)}))


def from_groups(
    groups: Sequence[Group],
    objective: Objective,
    *,
    buckets: Sequence[int],
    limit: int,
    pack: bool = False,
    microbatches: int = 1,
    rollouts_per_prompt: int = 1,
) -> Batch:
    """Make a batch of R / `rollouts_per_prompt` rows from the R rollouts of groups that
    are all of one size.

    Only sampled tokens are trained on. `limit` is the longest completion, which
    `per_max_length` divides by. `rollouts_per_prompt` attempts of a group, which must
    divide its size, follow one copy of its prompt as branches of one segment (see
    `attention.causal`): the first continues the prompt, each other one begins with the
    prompt's last token again, which predicts its first. With `pack` rows are shared
    further, and fill one of `microbatches` equal parts after the other, which must
    divide their number.
    """
    rollouts = [r for group in groups for r in group.attempts]
    reward_PG = np.array([[r.verdict.reward for r in group.attempts] for group in groups], np.float64)
    advantage_R = objective.advantage(reward_PG).reshape(-1)
    length_R = np.array([r.sampled.sum() for r in rollouts])
    weight_R = objective.weigh(length_R, advantage_R, limit)
    count = rollouts_per_prompt
    parts = [group.attempts[i : i + count] for group in groups for i in range(0, len(group.attempts), count)]
    lengths = [shared_length(len(attempts[0].prompt), [len(r.tokens) for r in attempts]) for attempts in parts]
    batch, spans = lay_out(lengths, buckets, pack, microbatches)
    i = 0  # of the rollout
    for attempts, (row, begin, _) in zip(parts, spans, strict=True):
        prompt = attempts[0].prompt
        start = begin + len(prompt)
        batch.tokens_BT[row, begin:start], batch.temperature_BT[row, begin:start] = prompt, attempts[0].temperature
        for r in attempts:
            if r is not attempts[0]:
                assert np.array_equal(r.prompt, prompt), "the attempts of a group must have one prompt"
                batch.tokens_BT[row, start], start = prompt[-1], start + 1
            stop = start + len(r.tokens)
            batch.tokens_BT[row, start:stop] = r.tokens
            batch.position_BT[row, start - 1 : stop] = len(prompt) - 1 + np.arange(stop - start + 1)
            batch.rollout_BT[row, start:stop] = i + 1
            batch.weight_BT[row, start:stop] = np.where(r.sampled, weight_R[i], 0.0)
            batch.advantage_BT[row, start:stop] = advantage_R[i]
            batch.behaviour_logp_BT[row, start:stop] = r.logp
            batch.temperature_BT[row, start - 1 : stop] = r.temperature
            start, i = stop, i + 1
    return batch


def from_demonstrations(
    demonstrations: Sequence[tuple], objective: Objective, *, buckets: Sequence[int], pack: bool = False, microbatches: int = 1
) -> Batch:
    """Make a batch of R rows from R pairs of (token ids, trainable); one that is too
    long is cut on the right.
    """
    R, longest = len(demonstrations), buckets[-1]
    demonstrations = [(np.asarray(ids)[:longest], np.asarray(trainable, bool)[:longest]) for ids, trainable in demonstrations]
    length_R = np.array([trainable[1:].sum() for _, trainable in demonstrations])
    advantage_R = objective.advantage(np.ones((R, 1))).reshape(R)
    weight_R = objective.weigh(length_R, advantage_R, longest)
    batch, spans = lay_out([len(ids) for ids, _ in demonstrations], buckets, pack, microbatches)
    for i, ((ids, trainable), (row, begin, stop)) in enumerate(zip(demonstrations, spans, strict=True)):
        batch.tokens_BT[row, begin:stop] = ids
        batch.rollout_BT[row, begin:stop] = i + 1
        batch.weight_BT[row, begin:stop] = np.where(trainable, weight_R[i], 0.0)
        batch.weight_BT[row, begin] = 0.0  # nothing stands before the first token
        batch.advantage_BT[row, begin:stop] = advantage_R[i]
    return batch


def lay_out(
    lengths: Sequence[int], buckets: Sequence[int], pack: bool, microbatches: int
) -> tuple[Batch, list[tuple[int, int, int]]]:
    """Make an empty batch of as many rows as sequences, and say where each stands: its
    row, its first column and its end.

    Packed rows are filled first-fit, the longest sequences first (at most 11/9 of the
    fewest rows, and 2/3 of one; Dosa 2007).
    """
    R, T = len(lengths), next(b for b in buckets if b >= max(lengths))
    batch = empty(R, T)
    rows = [[i] for i in range(R)]
    if pack:
        rows, room = [], []
        for i in sorted(range(R), key=lambda i: -lengths[i]):
            row = next((row for row, free in enumerate(room) if free >= lengths[i]), len(rows))
            if row == len(rows):
                rows.append([])
                room.append(T)
            rows[row].append(i)
            room[row] -= lengths[i]
    spans: dict[int, tuple[int, int, int]] = {}
    for row, members in enumerate(rows):
        if pack:  # fill one micro-batch after the other; `split_rows` gives each every `microbatches`-th row
            row = row % (R // microbatches) * microbatches + row // (R // microbatches)
        begin = 0
        for segment, i in enumerate(members, start=1):
            stop = begin + lengths[i]
            batch.segment_BT[row, begin:stop] = segment
            batch.position_BT[row, begin:stop] = np.arange(lengths[i])
            spans[i], begin = (row, begin, stop), stop
    return batch, [spans[i] for i in range(R)]


def split_rows(x_B, parts: int):
    """[B, ...] -> [parts, B / parts, ...], taking every `parts`-th row, so that rows
    sharded over devices stay where they are.
    """
    B = x_B.shape[0]
    return x_B.reshape(B // parts, parts, *x_B.shape[1:]).swapaxes(0, 1)


def used_parts(parts: Batch):
    """Count the micro-batches up to the last that trains anything."""
    trains_P = jnp.any(parts.weight_BT != 0, axis=(1, 2))
    return jnp.max(jnp.where(trains_P, jnp.arange(len(trains_P)) + 1, 0))


def computed_tokens(batch: Batch, microbatches: int) -> int:
    """Count the tokens that the learner computes, padding included: those of the
    micro-batches up to the last that trains anything.
    """
    B, T = batch.weight_BT.shape
    trains = batch.weight_BT.reshape(B // microbatches, microbatches, T).any(axis=(0, 2))
    return int(np.flatnonzero(trains).max(initial=-1) + 1) * (B // microbatches) * T


def from_windows(tokens_BT: np.ndarray, objective: Objective) -> Batch:
    """Make a batch from windows of a token stream, all trained on but their first
    token.
    """
    B, T = tokens_BT.shape
    advantage_B = objective.advantage(np.ones((B, 1))).reshape(B)
    weight_B = objective.weigh(np.full(B, T - 1), advantage_B, T - 1)
    batch = empty(B, T)
    batch.tokens_BT[:] = tokens_BT
    batch.segment_BT[:] = 1
    batch.rollout_BT[:] = np.arange(1, B + 1)[:, None]
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
        rollout_BT=np.zeros((B, T), np.int32),
    )
