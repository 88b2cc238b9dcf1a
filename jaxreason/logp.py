"""Log-probs and entropies of the tokens of a batch, and divergences from a reference,
without keeping all logits.

Logits are made in chunks and, when there are many, recomputed in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxreason import sharding
from jaxreason.batching import split_rows, used_parts
from jaxreason.model import Model
from jaxreason.objectives.divergence import Divergence, measure
from jaxreason.platforms import platform_of
from jaxreason.types import Batch, Outputs


class Limits(NamedTuple):
    """Number of logits that may exist at most on all devices of a mesh."""

    at_once: int  # while a chunk is computed
    kept: int  # between forward and backward pass


def logits_limits(mesh=None) -> Limits:
    """Return the limits of a mesh; None means one device of the default platform."""
    platform, devices = platform_of(mesh), 1 if mesh is None else sharding.row_devices(mesh)
    return Limits(platform.logits_at_once * devices, platform.logits_kept * devices)


class Reference(NamedTuple):
    """The distributions that a divergence is measured from."""

    divergence: Divergence
    unembed: Callable  # (head, hidden) -> logits
    head: Any  # params that `unembed` reads


def token_outputs(
    model: Model, params, batch: Batch, limits: Limits | None = None, reference: Reference | None = None
) -> Outputs:
    """Score every token of a batch that has a weight, given the tokens before it.

    Each log-prob is at the temperature at which the token was sampled. Logits are made
    for a few positions at a time and recomputed in the backward pass if there are more
    than may be kept, so a large `[B, T, V]` array never exists. Scored tokens are moved
    to the front of each row, so that chunks without any are skipped. With a reference
    the divergence from it is measured as well, from the batch's `reference_hidden_BTD`
    and at the same temperature; it has no gradient by the reference.
    """
    hidden_BTD, _ = model.apply(params, batch.tokens_BT, batch.position_BT, batch.segment_BT)
    logp_BT, entropy_BT, *divergence = score_hidden(model, params, hidden_BTD, batch, limits or logits_limits(), reference)
    value = None if model.value is None else align(model.value(params, hidden_BTD))
    return Outputs(align(logp_BT), align(entropy_BT), value, *map(align, divergence))


def score_hidden(model: Model, params, hidden_BTD, batch: Batch, limits: Limits, reference: Reference | None = None):
    """Return log-probs, entropies and divergences, if there is a reference, of what
    each position predicts.

    On a mesh each device scores its own rows. Left to itself, the compiler gathers the
    head, and sums its gradient over the devices, once per chunk.
    """
    # Token t is predicted at position t - 1; position T - 1 predicts nothing and is
    # rolled to the front.
    wanted_BT, target_BT, temperature_BT = (
        jnp.roll(x, -1, axis=1) for x in (batch.weight_BT != 0, batch.tokens_BT, batch.temperature_BT)
    )
    rows = Rows(wanted_BT.at[:, -1].set(False), hidden_BTD, target_BT, temperature_BT)
    head, mesh = model.head(params), model.mesh
    how, referred = Scoring(model.unembed, model.config.vocab_size, limits, head_dtype(model)), None
    if reference is not None:
        how = how._replace(divergence=reference.divergence, refer=reference.unembed)
        referred = (reference.head, jnp.roll(batch.reference_hidden_BTD, -1, axis=1))
    devices = 1 if mesh is None else sharding.row_devices(mesh)
    if devices == 1 or len(wanted_BT) % devices:
        found = scored(how, sharding.gather_weights(head, mesh, ""), rows, referred)
    else:
        how = how._replace(limits=Limits(limits.at_once // devices, limits.kept // devices), on_mesh=True)
        of_referred = None if referred is None else (sharding.over_fsdp(referred[0]), sharding.ROWS)
        found = jax.shard_map(
            functools.partial(scored, how),
            mesh=mesh,
            in_specs=(sharding.over_fsdp(head), sharding.ROWS, of_referred),
            out_specs=sharding.ROWS,
            axis_names={"data", "fsdp"},
            check_vma=False,
        )(head, rows, referred)
    return [jnp.where(rows.wanted, x, 0.0) for x in found]


def head_dtype(model: Model):
    return jnp.dtype(model.config.head_dtype or model.config.dtype)


class Scoring(NamedTuple):
    """The static arguments of `scored`."""

    unembed: Callable  # (head, hidden) -> logits
    vocabulary: int
    limits: Limits  # of one device, on a mesh
    dtype: Any  # of the products with the head
    on_mesh: bool = False  # inside a shard_map over data and fsdp
    divergence: Divergence | None = None
    refer: Callable | None = None  # (head, hidden) -> logits of the reference


class Rows(NamedTuple):
    """Hidden states and the tokens that they predict, in rows [B, T] or in chunks
    [C, R].
    """

    wanted: Any  # whether the token is scored
    hidden: Any  # [..., D]
    target: Any
    temperature: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scored(how: Scoring, head, rows: Rows, referred):
    """Return log-probs of targets and entropies [B, T], and divergences if they are
    asked for. `referred` is None or (head, hidden states) of the reference.

    They are made chunk by chunk; in chunks without a wanted token they are 0. The
    gradient is written by hand: that of a scan would keep one copy of the head's
    gradient per chunk, zeros for skipped chunks included. It needs the logits again:
    they are stored if there are few, and otherwise made again.
    """
    return score(how, head, rows, referred, keep=False)[0]


def scored_forward(how: Scoring, head, rows: Rows, referred):
    found, kept = score(how, head, rows, referred, keep=True)
    return found, (head, rows, referred, kept)


def scored_backward(how: Scoring, saved, gradients):
    given, rows, referred, (log_total_CR, entropy_CR, logits) = saved
    cut, uncut, _ = in_chunks(how, rows)
    # Columns that fill up the last chunk get no gradient.
    by_logp_CR, by_entropy_CR, *by_divergence = (cut(x, "constant") for x in gradients)
    head, rows, referred = whole(how, given), jax.tree.map(cut, rows), whole_reference(how, referred, cut)
    if how.on_mesh:  # sums over chunks and devices are float32; the products cast again
        head = jax.tree.map(lambda x: x.astype(jnp.float32), head)

    def gradient(i):
        temperature_R1 = rows.temperature[i, :, None]
        again_RV, back = jax.vjp(how.unembed, head, rows.hidden[i])
        all_logp_RV = (logits[0][i] if logits else again_RV / temperature_R1) - log_total_CR[i, :, None]
        p_RV = jnp.exp(all_logp_RV)
        chosen_RV = jnp.arange(p_RV.shape[-1]) == rows.target[i, :, None]
        by_logits_RV = by_logp_CR[i, :, None] * (chosen_RV - p_RV)
        by_logits_RV -= by_entropy_CR[i, :, None] * p_RV * (all_logp_RV + entropy_CR[i, :, None])
        if referred is not None:
            logq_RV = logits[1][i] if logits else reference_logp(how, referred, temperature_R1, i)
            by_logits_RV += by_divergence[0][i, :, None] * measure(how.divergence, all_logp_RV, logq_RV)[1]
        return back(by_logits_RV / temperature_R1)

    def add(i, state):
        by_head, by_hidden_CRD = state
        more, by_hidden_RD = gradient(i)
        return jax.tree.map(jnp.add, by_head, more), by_hidden_CRD.at[i].set(by_hidden_RD)

    # Always compute the first chunk and add the others to it: this avoids clearing a
    # gradient as large as the embedding.
    by_head, by_hidden_RD = gradient(0)
    state = by_head, jnp.zeros_like(rows.hidden).at[0].set(by_hidden_RD)
    by_head, by_hidden_CRD = each_chunk(1, rows.wanted, add, state)
    if how.on_mesh:
        by_head = jax.tree.map(lambda g, x: g.astype(x.dtype), sharding.scatter_over_fsdp(by_head), given)
    return by_head, Rows(None, uncut(by_hidden_CRD), None, None), None


scored.defvjp(scored_forward, scored_backward)


def score(how: Scoring, head, rows: Rows, referred, *, keep: bool):
    """Return log-probs, entropies and divergences, and what the backward pass needs:
    normalisers and entropies in chunks, and the logits if `keep` and there are few.
    """
    cut, uncut, logits = in_chunks(how, rows)
    keep, measures = keep and logits <= how.limits.kept, how.divergence is not None
    head, rows, referred = whole(how, head), jax.tree.map(cut, rows), whole_reference(how, referred, cut)

    def score_chunk(i, state):
        temperature_R1 = rows.temperature[i, :, None]
        logits_RV = how.unembed(head, rows.hidden[i]) / temperature_R1
        # Summing over the vocabulary without making all its log-probs takes about half
        # the time.
        most_R1 = jnp.max(logits_RV, axis=-1, keepdims=True)
        odds_RV = jnp.exp(logits_RV - most_R1)
        total_R = jnp.sum(odds_RV, axis=-1)
        log_total_R = jnp.log(total_R) + most_R1[:, 0]
        logp_R = jnp.take_along_axis(logits_RV, rows.target[i, :, None], axis=-1)[:, 0] - log_total_R
        entropy_R = log_total_R - jnp.sum(odds_RV * logits_RV, axis=-1) / total_R
        found, kept = (log_total_R, logp_R, entropy_R), (logits_RV,)
        if measures:
            logq_RV = reference_logp(how, referred, temperature_R1, i)
            found += (measure(how.divergence, logits_RV - log_total_R[:, None], logq_RV)[0],)
            kept += (logq_RV,)
        return jax.tree.map(lambda all, x: all.at[i].set(x), state, (*found, *kept)[: len(state)])

    numbers = 3 + measures
    zeros = [jnp.zeros(rows.wanted.shape, jnp.float32)] * numbers
    kept = [jnp.zeros((*rows.wanted.shape, how.vocabulary), jnp.float32)] * (1 + measures) if keep else []
    log_total_CR, *found = each_chunk(0, rows.wanted, score_chunk, (*zeros, *kept))
    found, kept = found[: numbers - 1], found[numbers - 1 :]
    return [uncut(x) for x in found], (log_total_CR, found[1], kept)


def whole(how: Scoring, head):
    """Return the whole head on each device; on a mesh in the dtype of its products, in
    which it is sent.
    """
    return sharding.gather_over_fsdp(jax.tree.map(lambda x: x.astype(how.dtype), head)) if how.on_mesh else head


def whole_reference(how: Scoring, referred, cut):
    return None if referred is None else (whole(how, referred[0]), cut(referred[1]))


def reference_logp(how: Scoring, referred, temperature_R1, i):
    """Return the log-probs of all tokens under the reference, of chunk i."""
    head, hidden_CRE = referred
    return jax.nn.log_softmax(how.refer(head, hidden_CRE[i]) / temperature_R1)


def each_chunk(first: int, wanted_CR, function, state):
    """Set state to function(i, state) for each chunk i >= `first` with wanted
    tokens.
    """

    def step(i, state):
        return jax.lax.cond(jnp.any(wanted_CR[i]), functools.partial(function, i), lambda state: state, state)

    return jax.lax.fori_loop(first, len(wanted_CR), step, state)


def in_chunks(how: Scoring, rows: Rows):
    """Return `cut` and `uncut` of `chunks`, and the number of logits of all rows."""
    logits = rows.wanted.size * how.vocabulary * (1 if how.divergence is None else 2)
    # At least two chunks: if half of a batch is prompts, one of them is skipped.
    return *chunks(rows.wanted, max(2, -(-logits // how.limits.at_once))), logits


def chunks(wanted_BT, count: int):
    """Make `cut` and `uncut`, which split [B, T] into about `count` chunks and join it.

    `cut` maps [B, T, ...] to chunks [C, R, ...] and `uncut` is its inverse. A chunk has
    some columns of all rows or, if that is too much, one column of some rows. Wanted
    tokens come in the first chunks; the last chunk may be filled up with copies of the
    last column, or with 0 (`fill` "constant").
    """
    B, T = wanted_BT.shape
    width = -(-T // min(count, T))
    columns = -(-T // width)
    padded = columns * width
    rows = next(r for r in range(min(-(-count // columns), B), B + 1) if B % r == 0)
    order_BT = jnp.argsort(~wanted_BT, axis=1, stable=True)

    def in_order(x, order_BT):
        return jnp.take_along_axis(x, order_BT.reshape(B, T, *[1] * (x.ndim - 2)), axis=1)

    def cut(x, fill="edge"):  # the copies: no temperature of 0
        x = jnp.pad(in_order(x, order_BT), ((0, 0), (0, padded - T), *[(0, 0)] * (x.ndim - 2)), mode=fill)
        x = x.reshape(B // rows, rows, columns, width, *x.shape[2:])
        return jnp.moveaxis(x, (2, 1), (0, 1)).reshape(columns * rows, -1, *x.shape[4:])

    def uncut(x):
        x = x.reshape(columns, rows, B // rows, width, *x.shape[2:])
        x = jnp.moveaxis(x, (0, 1), (2, 1)).reshape(B, padded, *x.shape[4:])[:, :T]
        return in_order(x, jnp.argsort(order_BT, axis=1))

    return cut, uncut


def compile_token_logp(model, microbatches: int = 1, mesh=None):
    """Return the jitted `logp(params, batch) -> logp_BT`.

    It serves reference policies, which may read hints, and checks of the sampler. It
    scores the tokens that have a weight, in as many micro-batches as `train_step`, and
    skips the same ones.
    """

    limits = logits_limits(mesh)

    def logp(params, batch):
        if batch.hinted is None:
            return token_outputs(model, params, batch, limits).logp_BT
        hidden_BTD = jnp.roll(predicting(model, params, batch), -1, axis=1)
        return align(score_hidden(model, params, hidden_BTD, batch, limits)[0])

    return compile_scores(logp, microbatches, mesh)


def compile_token_entropy(model, microbatches: int = 1, mesh=None):
    """Return the jitted `entropy(params, batch) -> entropy_BT`, as `compile_token_logp`
    does for log-probs.
    """
    limits = logits_limits(mesh)
    return compile_scores(lambda params, batch: token_outputs(model, params, batch, limits).entropy_BT, microbatches, mesh)


def compile_hidden(model, microbatches: int = 1, mesh=None):
    """Return the jitted `hidden(params, batch) -> hidden_BTD` of `predicting`."""
    return compile_scores(functools.partial(predicting, model), microbatches, mesh)


def predicting(model: Model, params, batch: Batch):
    """Return the hidden states that predict each token, from which a head makes the
    distributions. With hints they are those of the teacher's rows.
    """
    rows = batch.hinted
    if rows is None:
        return align(model.apply(params, batch.tokens_BT, batch.position_BT, batch.segment_BT)[0])
    hidden_BUD, _ = model.apply(params, rows.tokens_BU, rows.position_BU, rows.segment_BU)
    return jnp.take_along_axis(hidden_BUD, jnp.maximum(rows.column_BT - 1, 0)[..., None], axis=1)


def compile_token_values(model, microbatches: int = 1, mesh=None):
    """Return the jitted `values(params, batch) -> value_BT`: of the text before each
    token, 0 in column 0. It makes no logits.
    """

    def values(params, batch):
        hidden_BTD, _ = model.apply(params, batch.tokens_BT, batch.position_BT, batch.segment_BT)
        return align(model.value(params, hidden_BTD))

    return compile_scores(values, microbatches, mesh)


def align(x_BT):
    """Move what position t - 1 predicts to token t."""
    return jnp.roll(x_BT, 1, axis=1).at[:, 0].set(0.0)


def compile_scores(scores, microbatches: int, mesh):
    """Return the jitted `scores(params, batch) -> [B, T, ...]`, computed in
    micro-batches of which it skips the same ones as `train_step`.
    """

    def whole(params, batch):
        if microbatches == 1:
            return scores(params, batch)
        parts = jax.tree.map(lambda x: split_rows(x, microbatches), batch)

        def part(i, found_PBT):
            return found_PBT.at[i].set(scores(params, jax.tree.map(lambda x: x[i], parts)))

        made = jax.eval_shape(scores, params, jax.tree.map(lambda x: x[0], parts))
        found_PBT = jax.lax.fori_loop(0, used_parts(parts), part, jnp.zeros((microbatches, *made.shape), made.dtype))
        return found_PBT.swapaxes(0, 1).reshape(*batch.tokens_BT.shape, *made.shape[2:])

    return jax.jit(whole, out_shardings=None if mesh is None else sharding.rows(mesh))
