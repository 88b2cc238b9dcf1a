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
from jaxreason.divergence import Divergence, measure
from jaxreason.model import Model
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
    unembed = functools.partial(model.unembed, params)
    logp_BT, entropy_BT, *divergence = score_hidden(unembed, model.config.vocab_size, hidden_BTD, batch, limits, reference)
    value = None if model.value is None else align(model.value(params, hidden_BTD))
    return Outputs(align(logp_BT), align(entropy_BT), value, *map(align, divergence))


def score_hidden(unembed, V: int, hidden_BTD, batch: Batch, limits: Limits | None = None, reference: Reference | None = None):
    """Return log-probs, entropies and divergences, if there is a reference, of what
    each position predicts.
    """
    limits = limits or logits_limits()
    B, T = batch.tokens_BT.shape
    # Token t is predicted at position t - 1; position T - 1 predicts nothing and is
    # rolled to the front.
    wanted_BT, target_BT, temperature_BT = (
        jnp.roll(x, -1, axis=1) for x in (batch.weight_BT != 0, batch.tokens_BT, batch.temperature_BT)
    )
    wanted_BT = wanted_BT.at[:, -1].set(False)

    logits = B * T * V * (1 if reference is None else 2)
    # At least two chunks: if half of a batch is prompts, one of them is skipped.
    cut, uncut = chunks(wanted_BT, max(2, -(-logits // limits.at_once)))
    arrays = map(cut, (wanted_BT, hidden_BTD, target_BT, temperature_BT))
    other = None if reference is None else cut(jnp.roll(batch.reference_hidden_BTD, -1, axis=1))
    found = logp_and_entropy(unembed, logits <= limits.kept, *arrays, reference, other)
    return [jnp.where(wanted_BT, uncut(x), 0.0) for x in found]


def logp_and_entropy(
    unembed,
    keep: bool,
    wanted_CBT,
    hidden_CBTD,
    target_CBT,
    temperature_CBT,
    reference: Reference | None = None,
    reference_hidden_CBTD=None,
):
    """Return log-probs of targets and entropies over the vocabulary, chunk by chunk,
    and divergences from a reference if there is one.

    Chunks without a wanted token return 0. The gradient is written by hand: the
    gradient of a scan would keep one copy of the weight gradient per chunk, zeros for
    skipped chunks included. It needs the logits again: `keep` stores all of them,
    otherwise they are recomputed.
    """
    flat = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), (wanted_CBT, hidden_CBTD, target_CBT, temperature_CBT))
    unembed, weights = jax.closure_convert(unembed, flat[1][0])
    how, referred = Scoring(unembed, keep), None
    if reference is not None:
        C, *_, E = reference_hidden_CBTD.shape
        how = how._replace(divergence=reference.divergence, refer=reference.unembed)
        referred = (reference.head, reference_hidden_CBTD.reshape(C, -1, E))
    return [x.reshape(wanted_CBT.shape) for x in scored(how, weights, *flat, referred)]


class Scoring(NamedTuple):
    """The static arguments of `scored`."""

    unembed: Callable  # (hidden, *weights) -> logits
    keep: bool  # keep the logits for the backward pass
    divergence: Divergence | None = None
    refer: Callable | None = None  # (head, hidden) -> logits of the reference


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scored(how: Scoring, *inputs):
    """Return log-probs and entropies [C, R], and divergences if they are asked for.

    The inputs are weights, wanted_CR, hidden_CRD, target_CR, temperature_CR and either
    None or (head, hidden states) of the reference.
    """
    return score_chunks(how._replace(keep=False), *inputs)[0]


def scored_forward(how: Scoring, *inputs):
    found, kept = score_chunks(how, *inputs)
    return found, (inputs, kept)


def scored_backward(how: Scoring, kept, gradients):
    (weights, wanted_CR, hidden_CRD, target_CR, temperature_CR, referred), (entropy_CR, (log_total_CR, *logits)) = kept
    by_logp_CR, by_entropy_CR, *by_divergence = gradients

    def gradient(i):
        again_RV, back = jax.vjp(lambda weights, hidden_RD: how.unembed(hidden_RD, *weights), weights, hidden_CRD[i])
        all_logp_RV = (logits[0][i] if how.keep else again_RV / temperature_CR[i, :, None]) - log_total_CR[i, :, None]
        p_RV = jnp.exp(all_logp_RV)
        chosen_RV = jnp.arange(p_RV.shape[-1]) == target_CR[i, :, None]
        by_logits_RV = by_logp_CR[i, :, None] * (chosen_RV - p_RV)
        by_logits_RV -= by_entropy_CR[i, :, None] * p_RV * (all_logp_RV + entropy_CR[i, :, None])
        if referred is not None:
            logq_RV = logits[1][i] if how.keep else reference_logp(how, referred, temperature_CR, i)
            by_logits_RV += by_divergence[0][i, :, None] * measure(how.divergence, all_logp_RV, logq_RV)[1]
        return back(by_logits_RV / temperature_CR[i, :, None])

    def add(i, state):
        by_weights, by_hidden_CRD = state
        more, by_hidden_RD = gradient(i)
        return jax.tree.map(jnp.add, by_weights, more), by_hidden_CRD.at[i].set(by_hidden_RD)

    # Always compute the first chunk and add the others to it: this avoids clearing a
    # gradient as large as the embedding.
    by_weights, by_hidden_RD = gradient(0)
    state = by_weights, jnp.zeros_like(hidden_CRD).at[0].set(by_hidden_RD)
    by_weights, by_hidden_CRD = each_chunk(1, wanted_CR, add, state)
    return by_weights, None, by_hidden_CRD, None, None, None


scored.defvjp(scored_forward, scored_backward)


def reference_logp(how: Scoring, referred, temperature_CR, i):
    """Return the log-probs of all tokens under the reference, of chunk i."""
    head, hidden_CRE = referred
    return jax.nn.log_softmax(how.refer(head, hidden_CRE[i]) / temperature_CR[i, :, None])


def score_chunks(how: Scoring, weights, wanted_CR, hidden_CRD, target_CR, temperature_CR, referred):
    """Return log-probs, entropies and divergences, and the values that the backward
    pass needs.

    These include the logits if they are kept.
    """
    C, R = wanted_CR.shape
    V = jax.eval_shape(how.unembed, hidden_CRD[0], *weights).shape[-1]
    measures = how.divergence is not None

    def score(i, state):
        logits_RV = how.unembed(hidden_CRD[i], *weights) / temperature_CR[i, :, None]
        # Summing over the vocabulary without making all its log-probs takes about half
        # the time.
        most_R1 = jnp.max(logits_RV, axis=-1, keepdims=True)
        odds_RV = jnp.exp(logits_RV - most_R1)
        total_R = jnp.sum(odds_RV, axis=-1)
        log_total_R = jnp.log(total_R) + most_R1[:, 0]
        logp_R = jnp.take_along_axis(logits_RV, target_CR[i, :, None], axis=-1)[:, 0] - log_total_R
        entropy_R = log_total_R - jnp.sum(odds_RV * logits_RV, axis=-1) / total_R
        found, kept = (logp_R, entropy_R), (log_total_R, logits_RV)
        if measures:
            logq_RV = reference_logp(how, referred, temperature_CR, i)
            found += (measure(how.divergence, logits_RV - log_total_R[:, None], logq_RV)[0],)
            kept += (logq_RV,)
        return jax.tree.map(lambda all, x: all.at[i].set(x), state, (*found, *kept)[: len(state)])

    zeros, numbers = jnp.zeros((C, R), jnp.float32), 2 + measures
    kept = [jnp.zeros((C, R, V), jnp.float32)] * (1 + measures) if how.keep else []
    found = each_chunk(0, wanted_CR, score, (*[zeros] * (numbers + 1), *kept))
    return found[:numbers], (found[1], found[numbers:])


def each_chunk(first: int, wanted_CR, function, state):
    """Set state to function(i, state) for each chunk i >= `first` with wanted
    tokens.
    """

    def step(i, state):
        return jax.lax.cond(jnp.any(wanted_CR[i]), functools.partial(function, i), lambda state: state, state)

    return jax.lax.fori_loop(first, len(wanted_CR), step, state)


def chunks(wanted_BT, count: int):
    """Make `cut` and `uncut`, which split [B, T] into about `count` chunks and join it.

    `cut` maps [B, T, ...] to chunks [B', T', ...] and `uncut` is its inverse on [B, T].
    A chunk has some columns of all rows, so that rows stay on their devices. If that is
    too much, it has one column of some rows. Wanted tokens come in the first chunks;
    the last chunk may be padded with copies of the last column.
    """
    B, T = wanted_BT.shape
    width = max(1, T // count)
    columns = -(-T // width)
    padded = columns * width
    rows = next(r for r in range(min(-(-count // columns), B), B + 1) if B % r == 0)
    order_BT = jnp.argsort(~wanted_BT, axis=1, stable=True)

    def cut(x):
        x = jnp.take_along_axis(x, order_BT.reshape(B, T, *[1] * (x.ndim - 2)), axis=1)
        x = jnp.pad(x, ((0, 0), (0, padded - T), *[(0, 0)] * (x.ndim - 2)), mode="edge")  # no temperature of 0
        x = x.reshape(B // rows, rows, columns, width, *x.shape[2:])
        return jnp.moveaxis(x, (2, 1), (0, 1)).reshape(columns * rows, B // rows, width, *x.shape[4:])

    def uncut(x):
        x = jnp.moveaxis(x.reshape(columns, rows, B // rows, width), (0, 1), (2, 1)).reshape(B, padded)[:, :T]
        return jnp.take_along_axis(x, jnp.argsort(order_BT, axis=1), axis=1)

    return cut, uncut


def compile_token_logp(model, microbatches: int = 1, mesh=None):
    """Return the jitted `logp(params, batch) -> logp_BT`.

    It serves reference policies, which may read hints, and checks of the sampler. It
    scores the tokens that
    have a weight, in as many micro-batches as `train_step`, and skips the same ones.
    """

    limits = logits_limits(mesh)

    def logp(params, batch):
        if batch.hinted is None:
            return token_outputs(model, params, batch, limits).logp_BT
        hidden_BTD = jnp.roll(predicting(model, params, batch), -1, axis=1)
        unembed = functools.partial(model.unembed, params)
        return align(score_hidden(unembed, model.config.vocab_size, hidden_BTD, batch, limits)[0])

    return compile_scores(logp, microbatches, mesh)


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


def head_of(model: Model, params):
    """Return the params that make logits of hidden states."""
    base, name = params.get("frozen", params), "embed" if model.config.tied_embeddings else "unembed"
    return {name: base[name]}


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
