"""Log-probs and entropies of the tokens of a batch, without keeping all logits.

Logits are made in chunks and, when there are many, recomputed in the backward pass.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxreason import sharding
from jaxreason.batching import split_rows, used_parts
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


def token_outputs(model: Model, params, batch: Batch, limits: Limits | None = None) -> Outputs:
    """Score every token of a batch that has a weight, given the tokens before it.

    Each log-prob is at the temperature at which the token was sampled. Logits are made
    for a few positions at a time and recomputed in the backward pass if there are more
    than may be kept, so a large `[B, T, V]` array never exists. Scored tokens are moved
    to the front of each row, so that chunks without any are skipped.
    """
    limits = limits or logits_limits()
    B, T = batch.tokens_BT.shape
    hidden_BTD, _ = model.apply(params, batch.tokens_BT, batch.position_BT, batch.segment_BT)
    # Token t is predicted at position t - 1; position T - 1 predicts nothing and is
    # rolled to the front.
    wanted_BT, target_BT, temperature_BT = (
        jnp.roll(x, -1, axis=1) for x in (batch.weight_BT != 0, batch.tokens_BT, batch.temperature_BT)
    )
    wanted_BT = wanted_BT.at[:, -1].set(False)

    logits = B * T * model.config.vocab_size
    # At least two chunks: if half of a batch is prompts, one of them is skipped.
    cut, uncut = chunks(wanted_BT, max(2, -(-logits // limits.at_once)))
    arrays = map(cut, (wanted_BT, hidden_BTD, target_BT, temperature_BT))
    found = logp_and_entropy(functools.partial(model.unembed, params), logits <= limits.kept, *arrays)
    logp_BT, entropy_BT = (jnp.where(wanted_BT, uncut(x), 0.0) for x in found)

    value = None if model.value is None else align(model.value(params, hidden_BTD))
    return Outputs(align(logp_BT), align(entropy_BT), value)


def logp_and_entropy(unembed, keep: bool, wanted_CBT, hidden_CBTD, target_CBT, temperature_CBT):
    """Return log-probs of targets and entropies over the vocabulary, chunk by chunk.

    Chunks without a wanted token return 0. The gradient is written by hand: the
    gradient of a scan would keep one copy of the weight gradient per chunk, zeros for
    skipped chunks included. It needs the logits again: `keep` stores all of them,
    otherwise they are recomputed.
    """
    flat = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), (wanted_CBT, hidden_CBTD, target_CBT, temperature_CBT))
    unembed, weights = jax.closure_convert(unembed, flat[1][0])
    return [x.reshape(wanted_CBT.shape) for x in scored(unembed, keep, weights, *flat)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scored(unembed, keep: bool, *inputs):
    """Return log-probs and entropies [C, R].

    The inputs are weights, wanted_CR, hidden_CRD, target_CR and temperature_CR.
    """
    return score_chunks(unembed, False, *inputs)[0]


def scored_forward(unembed, keep: bool, *inputs):
    found, kept = score_chunks(unembed, keep, *inputs)
    return found, (inputs, kept)


def scored_backward(unembed, keep: bool, kept, gradients):
    (weights, wanted_CR, hidden_CRD, target_CR, temperature_CR), (entropy_CR, (log_total_CR, *logits)) = kept
    by_logp_CR, by_entropy_CR = gradients

    def gradient(i):
        again_RV, back = jax.vjp(lambda weights, hidden_RD: unembed(hidden_RD, *weights), weights, hidden_CRD[i])
        all_logp_RV = (logits[0][i] if keep else again_RV / temperature_CR[i, :, None]) - log_total_CR[i, :, None]
        p_RV = jnp.exp(all_logp_RV)
        chosen_RV = jnp.arange(p_RV.shape[-1]) == target_CR[i, :, None]
        by_logits_RV = by_logp_CR[i, :, None] * (chosen_RV - p_RV)
        by_logits_RV -= by_entropy_CR[i, :, None] * p_RV * (all_logp_RV + entropy_CR[i, :, None])
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
    return by_weights, None, by_hidden_CRD, None, None


scored.defvjp(scored_forward, scored_backward)


def score_chunks(unembed, keep: bool, weights, wanted_CR, hidden_CRD, target_CR, temperature_CR):
    """Return log-probs and entropies, and the values that the backward pass needs.

    These include the logits if `keep`.
    """
    C, R = wanted_CR.shape
    V = jax.eval_shape(unembed, hidden_CRD[0], *weights).shape[-1]

    def score(i, state):
        logits_RV = unembed(hidden_CRD[i], *weights) / temperature_CR[i, :, None]
        # Summing over the vocabulary without making all its log-probs takes about half
        # the time.
        most_R1 = jnp.max(logits_RV, axis=-1, keepdims=True)
        odds_RV = jnp.exp(logits_RV - most_R1)
        total_R = jnp.sum(odds_RV, axis=-1)
        log_total_R = jnp.log(total_R) + most_R1[:, 0]
        logp_R = jnp.take_along_axis(logits_RV, target_CR[i, :, None], axis=-1)[:, 0] - log_total_R
        entropy_R = log_total_R - jnp.sum(odds_RV * logits_RV, axis=-1) / total_R
        found = (logp_R, entropy_R, log_total_R, logits_RV)
        return jax.tree.map(lambda all, x: all.at[i].set(x), state, found[: len(state)])

    zeros = jnp.zeros((C, R), jnp.float32)
    kept = [jnp.zeros((C, R, V), jnp.float32)] if keep else []
    logp_CR, entropy_CR, *rest = each_chunk(0, wanted_CR, score, (zeros, zeros, zeros, *kept))
    return (logp_CR, entropy_CR), (entropy_CR, rest)


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

    It serves reference policies and checks of the sampler. It scores the tokens that
    have a weight, in as many micro-batches as `train_step`, and skips the same ones.
    """

    limits = logits_limits(mesh)
    return compile_scores(lambda params, batch: token_outputs(model, params, batch, limits).logp_BT, microbatches, mesh)


def compile_token_entropy(model, microbatches: int = 1, mesh=None):
    """Return the jitted `entropy(params, batch) -> entropy_BT`, as `compile_token_logp`
    does for log-probs.
    """
    limits = logits_limits(mesh)
    return compile_scores(lambda params, batch: token_outputs(model, params, batch, limits).entropy_BT, microbatches, mesh)


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
    """Return the jitted `scores(params, batch) -> [B, T]`, computed in micro-batches of
    which it skips the same ones as `train_step`.
    """

    def whole(params, batch):
        if microbatches == 1:
            return scores(params, batch)
        parts = jax.tree.map(lambda x: split_rows(x, microbatches), batch)

        def part(i, found_PBT):
            return found_PBT.at[i].set(scores(params, jax.tree.map(lambda x: x[i], parts)))

        found_PBT = jax.lax.fori_loop(0, used_parts(parts), part, jnp.zeros(parts.weight_BT.shape, jnp.float32))
        return found_PBT.swapaxes(0, 1).reshape(batch.tokens_BT.shape)

    return jax.jit(whole, out_shardings=None if mesh is None else sharding.rows(mesh))
