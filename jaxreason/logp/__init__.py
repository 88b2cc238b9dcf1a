"""Log-probs and entropies of the tokens of a batch, and divergences from a reference,
without keeping all logits.

Logits are made in chunks (`chunks`) and, when there are many, recomputed in the
backward pass (`scored`); on a TPU for a part of the vocabulary at a time (`tiles`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxreason import sharding
from jaxreason.batching import split_rows, used_parts
from jaxreason.logp.chunks import Limits, Rows, Scoring, Tile
from jaxreason.logp.scored import scored
from jaxreason.model import Model
from jaxreason.objectives.divergence import Divergence
from jaxreason.platforms import platform_of
from jaxreason.types import Batch, Outputs


def logits_limits(mesh=None) -> Limits:
    """Return the limits of a mesh; None means one device of the default platform."""
    platform, devices = platform_of(mesh), 1 if mesh is None else sharding.row_devices(mesh)
    tile = None if platform.logits_tile is None else Tile(*platform.logits_tile)
    return Limits(platform.logits_at_once * devices, platform.logits_kept * devices, tile)


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
    how = how._replace(tile=tile_of(how, wanted_BT.size, mesh))
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


def tile_of(how: Scoring, tokens: int, mesh) -> Tile | None:
    """Return the tile in which logits are made; None: for the whole vocabulary at a
    time. That is so if they are few enough to be kept, are compared with a reference's,
    or are split over devices by the vocabulary.
    """
    few, split = tokens * how.vocabulary <= how.limits.kept, mesh is not None and mesh.shape["tensor"] > 1
    return None if few or split or how.divergence is not None else how.limits.tile


def head_dtype(model: Model):
    return jnp.dtype(model.config.head_dtype or model.config.dtype)


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
