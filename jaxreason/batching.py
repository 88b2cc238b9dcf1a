"""Batches from groups of rollouts, demonstrations or windows of text.

This module computes advantages, weights, behaviour log-probs and padding in numpy, once
over the whole batch, before any split. The row length is the smallest of a few lengths
(`buckets`) that holds the longest sequence, so few shapes are compiled. With `pack`
short sequences share a row; rows left empty go to the last micro-batches, which the
learner skips.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxreason.cost import shared_length
from jaxreason.objectives import Objective
from jaxreason.objectives import credit as credits
from jaxreason.types import Batch, Group, Hinted, Rollout


def length_buckets(longest: int, count: int = 4, multiple: int = 8) -> tuple[int, ...]:
    """Return up to `count` evenly spaced lengths, rounded up to `multiple`.

    The last one is `longest`.
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
    credit: str = "rollout",
    rows: int | None = None,
    hinted: Sequence[np.ndarray | None] | None = None,
    hint_columns: int = 0,
) -> Batch:
    """Make a batch of R / `rollouts_per_prompt` rows from R rollouts in groups of one
    size, or of `rows` rows, some of them empty.

    Only sampled tokens are trained on, and those of rollouts that were cut off only if
    the objective learns from these. `limit` is the longest completion, the divisor
    of `per_max_length`. `rollouts_per_prompt` must divide the group size: that many
    attempts of a group follow one copy of their prompt as branches of one segment (see
    `attention.causal`). The first attempt continues the prompt; each other one repeats
    the prompt's last token, which predicts the attempt's first token. With `pack` these
    segments also share rows, and the rows fill one of `microbatches` equal parts after
    the other; `microbatches` must divide the number of rows.

    With the credit "attempt" the tokens of each attempt within a rollout have that
    attempt's advantage, see `credit.by_attempt`; the weights stay those of rollouts.
    For a weighting that reads the advantage, a rollout's is that of its attempt that is
    farthest from 0.

    `hinted` are prompts that a teacher reads in the place of those of the rollouts, in
    rows of `hint_columns` more columns (`types.Hinted`); these must hold what hints add
    to a row of `rollouts_per_prompt` attempts. A rollout whose hinted prompt is None
    weighs 0, but its tokens count in the weights of the others.
    """
    if not groups:
        return empty(rows, buckets[0])
    rollouts = [r for group in groups for r in group.attempts]
    trained = [r.sampled & (objective.learns_cut or r.stop != "limit") for r in rollouts]
    length_PG = np.array([tokens.sum() for tokens in trained]).reshape(len(groups), -1)
    if credit == "attempt" and credits.have_several(groups):
        parts = credits.by_attempt(groups, objective)
        farthest_PG = np.reshape([x[np.argmax(np.abs(x))] for x, _ in parts], length_PG.shape)
        _, weight_R = advantage_and_weight(objective._replace(advantage=lambda _: farthest_PG), None, length_PG, limit)
        advantage_R = [values[index_T] for values, index_T in parts]
    else:
        advantage_R, weight_R = advantage_and_weight(objective, credits.of_groups(groups, objective.measures), length_PG, limit)
    count = rollouts_per_prompt
    shares = [group.attempts[i : i + count] for group in groups for i in range(0, len(group.attempts), count)]
    lengths = [shared_length(len(attempts[0].prompt), [len(r.tokens) for r in attempts]) for attempts in shares]
    needed = None if hinted is None else hinted_lengths(rollouts, hinted, count)
    batch, spans = lay_out(lengths, buckets, pack, microbatches, rows, needed, hint_columns)
    i = 0  # index of the rollout
    for attempts, (row, begin, _) in zip(shares, spans, strict=True):
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
            batch.weight_BT[row, start:stop] = np.where(trained[i], weight_R[i], 0.0)
            batch.advantage_BT[row, start:stop] = advantage_R[i]
            batch.behaviour_logp_BT[row, start:stop] = r.logp
            batch.temperature_BT[row, start - 1 : stop] = r.temperature
            start, i = stop, i + 1
    return batch if hinted is None else add_hinted(batch, rollouts, hinted, hint_columns)


def hinted_lengths(rollouts: Sequence[Rollout], hinted: Sequence[np.ndarray | None], count: int) -> list[int]:
    """Count the teacher's columns of each `count` rollouts."""
    each = [0 if prompt is None else len(prompt) + len(r.tokens) for r, prompt in zip(rollouts, hinted, strict=True)]
    return [sum(each[i : i + count]) for i in range(0, len(each), count)]


def add_hinted(batch: Batch, rollouts: Sequence[Rollout], hinted: Sequence[np.ndarray | None], columns: int) -> Batch:
    """Add the teacher's rows to a batch, and take the weight of rollouts without a
    hint.

    A rollout is in the same row for both, so rows can be sharded.
    """
    B, T = batch.tokens_BT.shape
    U = T + columns
    tokens_BU, position_BU, segment_BU = (np.zeros((B, U), np.int32) for _ in range(3))
    column_BT, end_B, segments_B = np.zeros((B, T), np.int32), np.zeros(B, int), np.zeros(B, int)
    position_BU[:] = np.arange(U)
    row_R = np.zeros(len(rollouts) + 1, int)
    rows, columns_ = np.nonzero(batch.rollout_BT)
    row_R[batch.rollout_BT[rows, columns_]] = rows
    for number, (r, prompt) in enumerate(zip(rollouts, hinted, strict=True), start=1):
        row = row_R[number]
        here_T = batch.rollout_BT[row] == number
        if prompt is None:
            batch.weight_BT[row, here_T] = 0.0
            continue
        begin, middle = end_B[row], end_B[row] + len(prompt)
        stop = end_B[row] = middle + len(r.tokens)
        segments_B[row] += 1
        tokens_BU[row, begin:middle], tokens_BU[row, middle:stop] = prompt, r.tokens
        position_BU[row, begin:stop] = np.arange(stop - begin)
        segment_BU[row, begin:stop] = segments_B[row]
        column_BT[row, here_T] = np.arange(middle, stop)
    return dataclasses.replace(batch, hinted=Hinted(tokens_BU, position_BU, segment_BU, column_BT))


def advantage_and_weight(objective: Objective, reward, length_PG, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the advantage of each rollout and the weight of each of its tokens, [R].
    `reward` is [P, G], or [P, G, N] for an objective of N measures.

    Raises:
      ValueError: a function of the objective, such as a user's own, returns another
        shape.
    """

    def checked(name: str, found) -> np.ndarray:
        if np.shape(found) != length_PG.shape:
            raise ValueError(
                f"the objective's {name} returned the shape {np.shape(found)}; allowed: {length_PG.shape}, problems x attempts"
            )
        return np.asarray(found)

    advantage_PG = checked("advantage", objective.advantage(reward))
    weight_PG = checked("weigh", objective.weigh(length_PG, advantage_PG, limit))
    return advantage_PG.reshape(-1), weight_PG.reshape(-1)


def advantages(batch: Batch) -> list[float]:
    """Return the advantage of each rollout of a batch, in the order of their numbers;
    that of its last attempt where attempts have their own.
    """
    inside_BT = batch.rollout_BT > 0
    advantage_R = np.zeros(batch.rollout_BT.max(initial=0), np.float32)
    advantage_R[batch.rollout_BT[inside_BT] - 1] = batch.advantage_BT[inside_BT]
    return advantage_R.tolist()


def from_demonstrations(
    demonstrations: Sequence[tuple], objective: Objective, *, buckets: Sequence[int], pack: bool = False, microbatches: int = 1
) -> Batch:
    """Make a batch of R rows from R pairs of (token ids, trainable).

    A demonstration that is too long is cut on the right.
    """
    R, longest = len(demonstrations), buckets[-1]
    demonstrations = [(np.asarray(ids)[:longest], np.asarray(trainable, bool)[:longest]) for ids, trainable in demonstrations]
    length_R = np.array([trainable[1:].sum() for _, trainable in demonstrations])
    advantage_R, weight_R = advantage_and_weight(objective, np.ones((R, 1)), length_R[:, None], longest)
    batch, spans = lay_out([len(ids) for ids, _ in demonstrations], buckets, pack, microbatches)
    for i, ((ids, trainable), (row, begin, stop)) in enumerate(zip(demonstrations, spans, strict=True)):
        batch.tokens_BT[row, begin:stop] = ids
        batch.rollout_BT[row, begin:stop] = i + 1
        batch.weight_BT[row, begin:stop] = np.where(trainable, weight_R[i], 0.0)
        batch.weight_BT[row, begin] = 0.0  # no token precedes the first one
        batch.advantage_BT[row, begin:stop] = advantage_R[i]
    return batch


def lay_out(
    lengths: Sequence[int],
    buckets: Sequence[int],
    pack: bool,
    microbatches: int,
    rows: int | None = None,
    hinted: Sequence[int] | None = None,
    hint_columns: int = 0,
) -> tuple[Batch, list[tuple[int, int, int]]]:
    """Make an empty batch with one row per sequence, or `rows` if that is given, and
    place each sequence.

    Return (row, first column, end column) of each. With `hinted`, the lengths that a
    teacher reads, the sequences of a row also fit its row there, which has
    `hint_columns` more columns. Packing is first-fit, longest
    sequence first: it uses at most 11/9 of the fewest rows, plus 2/3 of a row (Dosa
    2007).
    """
    R, T = len(lengths), next(b for b in buckets if b >= max(lengths))
    B = R if rows is None else rows
    batch = empty(B, T)
    filled = [[i] for i in range(R)]
    if pack:
        filled = []
        sizes_R2 = np.array([lengths, [0] * R if hinted is None else hinted]).T
        room_R2 = np.full((R, 2), (T, T + hint_columns))  # one row per sequence always suffices
        for i in sorted(range(R), key=lambda i: -lengths[i]):
            row = int(np.argmax((room_R2[: len(filled) + 1] >= sizes_R2[i]).all(axis=1)))
            if row == len(filled):
                filled.append([])
            filled[row].append(i)
            room_R2[row] -= sizes_R2[i]
    spans: dict[int, tuple[int, int, int]] = {}
    for row, members in enumerate(filled):
        # Fill one micro-batch after the other, so that those left empty are the last:
        # `split_rows` puts every `microbatches`-th row in the same one.
        if pack or rows is not None:
            row = row % (B // microbatches) * microbatches + row // (B // microbatches)
        begin = 0
        for segment, i in enumerate(members, start=1):
            stop = begin + lengths[i]
            batch.segment_BT[row, begin:stop] = segment
            batch.position_BT[row, begin:stop] = np.arange(lengths[i])
            spans[i], begin = (row, begin, stop), stop
    return batch, [spans[i] for i in range(R)]


def split_rows(x_B, parts: int):
    """Reshape [B, ...] to [parts, B / parts, ...].

    Each part gets every `parts`-th row, so rows that are sharded over devices stay on
    their device.
    """
    B = x_B.shape[0]
    return x_B.reshape(B // parts, parts, *x_B.shape[1:]).swapaxes(0, 1)


def used_parts(parts: Batch):
    """Count the micro-batches up to the last one with a weight that is not 0."""
    trains_P = jnp.any(parts.weight_BT != 0, axis=(1, 2))
    return jnp.max(jnp.where(trains_P, jnp.arange(len(trains_P)) + 1, 0))


def computed_tokens(batch: Batch, microbatches: int) -> int:
    """Count the tokens that the learner computes, padding included.

    These are the tokens of the micro-batches up to the last one with a weight that is
    not 0.
    """
    B, T = batch.weight_BT.shape
    trains = batch.weight_BT.reshape(B // microbatches, microbatches, T).any(axis=(0, 2))
    return int(np.flatnonzero(trains).max(initial=-1) + 1) * (B // microbatches) * T


def from_windows(tokens_BT: np.ndarray, objective: Objective) -> Batch:
    """Make a batch from windows of a token stream; only their first tokens are
    untrained.
    """
    B, T = tokens_BT.shape
    advantage_B, weight_B = advantage_and_weight(objective, np.ones((B, 1)), np.full((B, 1), T - 1), T - 1)
    batch = empty(B, T)
    batch.tokens_BT[:] = tokens_BT
    batch.segment_BT[:] = 1
    batch.rollout_BT[:] = np.arange(1, B + 1)[:, None]
    batch.weight_BT[:, 1:] = weight_B[:, None]
    batch.advantage_BT[:] = advantage_B[:, None]
    return batch


def join(batches: Sequence[Batch], *, weights: Sequence[float], imitated: Sequence[bool], length: int) -> Batch:
    """Join the rows of several batches, padded to `length` tokens.

    The token weights of each batch are multiplied by its entry in `weights`; rollouts
    are numbered over all. `imitated` says which batches have `imitated_BT`.
    """
    names = [f.name for f in dataclasses.fields(Batch) if any(getattr(batch, f.name) is not None for batch in batches)]
    B = sum(len(batch.tokens_BT) for batch in batches)
    joined, row = empty(B, length), 0
    if any(imitated):
        joined = dataclasses.replace(joined, imitated_BT=np.zeros((B, length), np.bool_))
    for batch, weight, imitates in zip(batches, weights, imitated, strict=True):
        (rows, T), numbered = batch.tokens_BT.shape, int(joined.rollout_BT.max(initial=0))
        there = slice(row, row + rows)
        for name in names:
            getattr(joined, name)[there, :T] = getattr(batch, name)
        joined.weight_BT[there] *= np.float32(weight)
        joined.rollout_BT[there, :T] = np.where(batch.rollout_BT > 0, batch.rollout_BT + numbered, 0)
        if imitates:
            joined.imitated_BT[there] = True
        row += rows
    return joined


def empty(B: int, T: int) -> Batch:
    """Make a numpy batch that is all padding."""
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
