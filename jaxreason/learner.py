"""The learner: log-probs of tokens, the one train step, and its compilation.

The same function pretrains, imitates and reinforces. `train_step` knows no random key, no config, no mesh and no pad id; what it
optimises is `sum(weight_BT * loss_BT)`, so its gradient is the same under any number of micro-batches and any sharding, up to
the rounding of a sum.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from jaxreason.model import Model
from jaxreason.objectives import Objective
from jaxreason.types import Batch, Outputs, TrainState

LOGITS_PER_CHUNK = 2**24  # at most this many logits (64 MiB in float32) exist at a time


def token_outputs(model: Model, params, batch: Batch) -> Outputs:
    """Score every token of a batch given the tokens before it, at the temperature it was sampled at.

    Logits are made in chunks of tokens and made again in the backward pass, so `[B, T, V]` never exists when it is large.
    """
    B, T = batch.tokens_BT.shape
    hidden_BTD, _ = model.apply(params, batch.tokens_BT, batch.position_BT, batch.segment_BT)
    # Token t is predicted by position t - 1; what stands in column T - 1 predicts nothing and is rolled into column 0.
    target_BT = jnp.roll(batch.tokens_BT, -1, axis=1)
    temperature_BT = jnp.roll(batch.temperature_BT, -1, axis=1)

    def score(hidden_ND, target_N, temperature_N):
        logits_NV = model.unembed(params, hidden_ND) / temperature_N[:, None]
        logp_NV = jax.nn.log_softmax(logits_NV)
        logp_N = jnp.take_along_axis(logp_NV, target_N[:, None], axis=1)[:, 0]
        return logp_N, -jnp.sum(jnp.exp(logp_NV) * logp_NV, axis=-1)

    N, V = B * T, model.config.vocab_size
    flat = hidden_BTD.reshape(N, -1), target_BT.reshape(N), temperature_BT.reshape(N)
    chunks = next(c for c in range(-(-N * V // LOGITS_PER_CHUNK), N + 1) if N % c == 0)
    if chunks == 1:
        logp, entropy = score(*flat)
    else:
        split = jax.tree.map(lambda x: split_rows(x, chunks), flat)
        scored = jax.lax.map(lambda x: jax.checkpoint(score)(*x), split)
        logp, entropy = (x.swapaxes(0, 1) for x in scored)

    def align(x):
        return jnp.roll(x.reshape(B, T), 1, axis=1).at[:, 0].set(0.0)

    value = None if model.value is None else align(model.value(params, hidden_BTD))
    return Outputs(align(logp), align(entropy), value)


def loss(params, batch: Batch, *, model: Model, objective: Objective):
    """`sum(weight_BT * loss_BT)` and its metrics as (sum, count) pairs over the tokens that are trained on."""
    outputs = token_outputs(model, params, batch)
    loss_BT, stats = objective.token_loss(outputs, batch)
    trained_BT = batch.weight_BT != 0
    count = jnp.sum(trained_BT, dtype=jnp.float32)
    value = jnp.sum(jnp.where(trained_BT, batch.weight_BT * loss_BT, 0.0))
    gap_BT = outputs.logp_BT - batch.behaviour_logp_BT
    stats = {
        "entropy": outputs.entropy_BT,
        "nll": -outputs.logp_BT,
        "behaviour_gap": jnp.abs(gap_BT),  # on-policy: how far sampler and learner disagree, which should be rounding
        "behaviour_kl": jnp.exp(gap_BT) - 1 - gap_BT,  # KL(sampler || learner) on-policy, by the k3 estimator
        **stats,
    }
    metrics = {name: (jnp.sum(jnp.where(trained_BT, x, 0.0)), count) for name, x in stats.items()}
    return value, metrics


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
) -> tuple[TrainState, dict]:
    """Make one update from one batch, in `microbatches` equal parts of its rows. Metrics are (sum, count) pairs.

    Where the loss or the gradient's norm is not finite the state stays as it was, and only `skipped` counts the step.
    """
    trained, frozen = split_frozen(state.params)

    def trained_loss(trained, rows):
        return loss(trained | frozen, rows, model=model, objective=objective)

    gradient = jax.value_and_grad(trained_loss, has_aux=True)

    def accumulate(total, rows):
        (value, metrics), grads = gradient(trained, rows)
        return jax.tree.map(jnp.add, total, (value, metrics, grads)), None

    if microbatches == 1:
        (value, metrics), grads = gradient(trained, batch)
    else:
        parts = jax.tree.map(lambda x: split_rows(x, microbatches), batch)
        (value, metrics), grads = jax.eval_shape(gradient, trained, jax.tree.map(lambda x: x[0], parts))
        # Sums over micro-batches are float32 whatever the params are kept in.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (value, metrics, grads))
        (value, metrics, grads), _ = jax.lax.scan(accumulate, zeros, parts)

    # The optimizer's state keeps the dtype of the params, which it was made from.
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trained)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    grad_norm, one = optax.global_norm(grads), jnp.float32(1)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    new = TrainState(optax.apply_updates(trained, updates), opt_state, state.step + 1)
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, dataclasses.replace(state, params=trained))
    metrics |= {
        "loss": (value, one),
        "grad_norm": (grad_norm, one),
        "update_norm": (optax.global_norm(updates), one),
        "param_norm": (optax.global_norm(new.params), one),
    }
    metrics = jax.tree.map(lambda x: jnp.where(finite, x, 0.0), metrics)  # a NaN would spoil the mean of the steps beside it
    new = dataclasses.replace(new, params=new.params | frozen)
    return new, metrics | {"skipped": (1 - finite.astype(jnp.float32), one)}


def split_frozen(params) -> tuple[dict, dict]:
    """Split params into what is trained and what is not (the base of adapters): gradient and optimizer see the first alone."""
    return {k: v for k, v in params.items() if k != "frozen"}, {k: v for k, v in params.items() if k == "frozen"}


def split_rows(x_B, parts: int):
    """[B, ...] -> [parts, B / parts, ...], taking every `parts`-th row, so that rows sharded over devices stay where they are."""
    B = x_B.shape[0]
    return x_B.reshape(B // parts, parts, *x_B.shape[1:]).swapaxes(0, 1)


def compile_train_step(model, objective, optimizer, *, microbatches: int = 1, state_shardings=None):
    """Return `step(state, batch) -> (state, metrics)`, jitted; the state is donated and comes back in the same shardings."""
    step = functools.partial(train_step, model=model, objective=objective, optimizer=optimizer, microbatches=microbatches)
    if state_shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))


def compile_token_logp(model):
    """Return `logp(params, batch) -> logp_BT`, jitted: for a reference policy, or to check the sampler."""
    return jax.jit(lambda params, batch: token_outputs(model, params, batch).logp_BT)
