"""Log-probs, entropies and divergences of rows, with a gradient written by hand."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxreason import sharding
from jaxreason.logp import tiles
from jaxreason.logp.chunks import Rows, Scoring, each_chunk, in_chunks, whole
from jaxreason.objectives.divergence import measure

UNSCORED = 1e30  # normaliser of chunks that are not scored, under which no token has any probability


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scored(how: Scoring, head, rows: Rows, referred):
    """Return log-probs of targets and entropies [B, T], and divergences if they are
    asked for. `referred` is None or (head, hidden states) of the reference.

    They are made chunk by chunk; where no token is wanted they mean nothing. The
    gradient is written by hand: that of a scan would keep one copy of the head's
    gradient per chunk, zeros for skipped chunks included. It needs the logits again:
    they are stored if there are few, and otherwise made again.
    """
    if how.tile is not None:
        return tiles.score(how, head, rows)[0]
    return score(how, head, rows, referred, keep=False)[0]


def scored_forward(how: Scoring, head, rows: Rows, referred):
    tiled = how.tile is not None
    found, kept = tiles.score(how, head, rows, keep=True) if tiled else score(how, head, rows, referred, keep=True)
    return found, (head, rows, referred, kept)


def scored_backward(how: Scoring, saved, gradients):
    if how.tile is not None:
        return *tiles.gradient(how, saved, gradients), None
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
    # The backward pass always computes the first chunk. Without a normaliser its odds
    # could be infinite, and infinity times a weight of 0 is no number.
    zeros_CR = jnp.zeros(rows.wanted.shape, jnp.float32)
    zeros = [zeros_CR + UNSCORED, *[zeros_CR] * (numbers - 1)]
    kept = [jnp.zeros((*rows.wanted.shape, how.vocabulary), jnp.float32)] * (1 + measures) if keep else []
    log_total_CR, *found = each_chunk(0, rows.wanted, score_chunk, (*zeros, *kept))
    found, kept = found[: numbers - 1], found[numbers - 1 :]
    return [uncut(x) for x in found], (log_total_CR, found[1], kept)


def whole_reference(how: Scoring, referred, cut):
    return None if referred is None else (whole(how, referred[0]), cut(referred[1]))


def reference_logp(how: Scoring, referred, temperature_R1, i):
    """Return the log-probs of all tokens under the reference, of chunk i."""
    head, hidden_CRE = referred
    return jax.nn.log_softmax(how.refer(head, hidden_CRE[i]) / temperature_R1)
