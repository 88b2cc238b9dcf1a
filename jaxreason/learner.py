"""The learner: log-probs of tokens, the one train step, and its compilation.

The same function pretrains, imitates and reinforces. `train_step` knows no random key, no config, no mesh and no pad id; what it
optimises is `sum(weight_BT * loss_BT)`, so its gradient is the same under any number of micro-batches and any sharding, up to
the rounding of a sum.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxreason import sharding
from jaxreason.model import Model
from jaxreason.objectives import Objective
from jaxreason.types import Batch, Outputs, TrainState

# At most so many logits exist at a time on a device: on a CPU 32 MiB in float32, which a cache may hold; elsewhere 512 MiB, since
# matrix products of fewer rows would leave an accelerator idle.
# Four times that on a GPU whose memory holds it. Updates of Qwen3-0.6B's shape, 32,768 tokens, cuDNN attention, remat "full":
# 25 % of the card's best rate in 8 micro-batches with the smaller chunks (one H200), 31 % in 2 with the larger (one H100; both
# 2026-11-26).
LARGE_GPU_BYTES = 48 * 2**30
LOGITS_AT_ONCE = {"cpu": 2**23, "gpu": 2**27, "tpu": 2**27}
# Those of a micro-batch are kept for the backward pass if they are no more than that: 256 MiB on a CPU (an update of
# SmolLM2-135M, two micro-batches of 2 x 384 tokens, takes 8.4 s so and 8.8 with all made again; means of four, one core of a
# Zen 5 EPYC, 2026-11-26). Elsewhere what is made in chunks is made again.
LOGITS_KEPT = {"cpu": 2**26, "gpu": 2**27, "tpu": 2**27}


class Limits(NamedTuple):
    """How many logits may exist on all devices of a mesh."""

    at_once: int  # while they are computed
    kept: int  # between a forward and its backward pass


def logits_limits(mesh=None) -> Limits:
    """The limits on a mesh; None: on one device of the default kind."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    times = 1 if mesh is None else sharding.row_devices(mesh)
    if platform == jax.default_backend() == "gpu" and jax.local_devices()[0].memory_stats()["bytes_limit"] >= LARGE_GPU_BYTES:
        times *= 4
    return Limits(LOGITS_AT_ONCE[platform] * times, LOGITS_KEPT[platform] * times)


def token_outputs(model: Model, params, batch: Batch, limits: Limits | None = None) -> Outputs:
    """Score every token of a batch that has a weight, given the tokens before it, at the temperature it was sampled at.

    Logits are made for a few columns at a time, and made again in the backward pass where those of all columns are more than may
    be kept: `[B, T, V]` never exists when it is large. In each row the tokens that are scored come first, so that chunks without
    any are left out.
    """
    limits = limits or logits_limits()
    B, T = batch.tokens_BT.shape
    hidden_BTD, _ = model.apply(params, batch.tokens_BT, batch.position_BT, batch.segment_BT)
    # Token t is predicted by position t - 1; what stands in column T - 1 predicts nothing and is rolled into column 0.
    wanted_BT, target_BT, temperature_BT = (
        jnp.roll(x, -1, axis=1) for x in (batch.weight_BT != 0, batch.tokens_BT, batch.temperature_BT)
    )
    wanted_BT = wanted_BT.at[:, -1].set(False)

    logits = B * T * model.config.vocab_size
    # Two chunks at least: where prompts are half of a batch, one of them is left out.
    cut, uncut = chunks(wanted_BT, max(2, -(-logits // limits.at_once)))
    arrays = map(cut, (wanted_BT, hidden_BTD, target_BT, temperature_BT))
    found = scores(functools.partial(model.unembed, params), logits <= limits.kept, *arrays)
    logp_BT, entropy_BT = (jnp.where(wanted_BT, uncut(x), 0.0) for x in found)

    def align(x_BT):
        return jnp.roll(x_BT, 1, axis=1).at[:, 0].set(0.0)

    value = None if model.value is None else align(model.value(params, hidden_BTD))
    return Outputs(align(logp_BT), align(entropy_BT), value)


def scores(unembed, keep: bool, wanted_CBT, hidden_CBTD, target_CBT, temperature_CBT):
    """Log-probs of targets and entropies over the vocabulary, chunk by chunk; 0 in a chunk of which nothing is wanted.

    The gradient is written out, since that of a scan keeps one of all weights for each chunk, zeros of those left out included.
    It needs the logits again: with `keep` they are kept, all of them, otherwise made once more.
    """
    flat = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), (wanted_CBT, hidden_CBTD, target_CBT, temperature_CBT))
    unembed, weights = jax.closure_convert(unembed, flat[1][0])

    def each_chunk(first, wanted_CR, function, state):
        """Replace state by function(i, state) for each chunk from `first` on of which something is wanted."""

        def step(i, state):
            return jax.lax.cond(jnp.any(wanted_CR[i]), functools.partial(function, i), lambda state: state, state)

        return jax.lax.fori_loop(first, len(wanted_CR), step, state)

    def forward(keep, weights, wanted_CR, hidden_CRD, target_CR, temperature_CR):
        C, R = wanted_CR.shape
        V = jax.eval_shape(unembed, hidden_CRD[0], *weights).shape[-1]

        def score(i, state):
            logits_RV = unembed(hidden_CRD[i], *weights) / temperature_CR[i, :, None]
            # Sums over the vocabulary, without the log-probs of all of it: of 128 x 49,152 logits in 165 ms, not 300 (one Xeon
            # core, once, 2026-11-25).
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

    @jax.custom_vjp
    def scored(*inputs):
        return forward(False, *inputs)[0]

    def backward(kept, gradients):
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

        # The first chunk is what the others are added to, wanted or not: weights as large as the embedding are not cleared first.
        by_weights, by_hidden_RD = gradient(0)
        state = by_weights, jnp.zeros_like(hidden_CRD).at[0].set(by_hidden_RD)
        by_weights, by_hidden_CRD = each_chunk(1, wanted_CR, add, state)
        return by_weights, None, by_hidden_CRD, None, None

    def keep_inputs(*inputs):
        found, kept = forward(keep, *inputs)
        return found, (inputs, kept)

    scored.defvjp(keep_inputs, backward)
    return [x.reshape(wanted_CBT.shape) for x in scored(weights, *flat)]


def chunks(wanted_BT, count: int):
    """Make `cut`, [B, T, ...] -> chunks of [B', T', ...], and `uncut`, back to [B, T]: `count` chunks or somewhat more.

    A chunk has some columns of all rows, so that rows stay where they are, or if that is too much one column of some rows. What
    is wanted stands in the first ones; the last may be filled up with more of the last column.
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


def loss(params, batch: Batch, *, model: Model, objective: Objective, limits: Limits | None = None):
    """`sum(weight_BT * loss_BT)` and its metrics as (sum, count) pairs over the tokens that are trained on."""
    outputs = token_outputs(model, params, batch, limits)
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
    limits: Limits | None = None,
) -> tuple[TrainState, dict]:
    """Make one update from one batch, in `microbatches` equal parts of its rows. Metrics are (sum, count) pairs.

    Micro-batches after the last that trains anything are left out, at no cost: packing
    empties them. An update whose loss or gradient is not finite is not made; it counts in
    `skipped`, and as a step. So does one that the optimizer makes of a finite gradient but
    is not finite itself, in any array: all params stay as they are, and only the
    optimizer's state, which is finite, has taken the gradient in.
    """
    trained, frozen = split_frozen(state.params)

    def trained_loss(trained, rows):
        return loss(trained | frozen, rows, model=model, objective=objective, limits=limits)

    gradient = jax.value_and_grad(trained_loss, has_aux=True)

    by_layer = model.by_layer(trained)

    def accumulate(i, total):
        (value, metrics), grads = gradient(by_layer, jax.tree.map(lambda x: x[i], parts))
        return (*jax.tree.map(jnp.add, total[:2], (value, metrics)), add_up(total[2], grads))

    if microbatches == 1:
        (value, metrics), grads = gradient(trained, batch)
    else:
        parts = jax.tree.map(lambda x: split_rows(x, microbatches), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        (value, metrics), grads = jax.eval_shape(gradient, trained, first)
        # Sums over micro-batches are float32 whatever the params are kept in.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (value, metrics, grads))
        value, metrics, grads = jax.lax.fori_loop(0, used_parts(parts), accumulate, zeros)

    # The optimizer's state keeps the dtype of the params, which it was made from.
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trained)
    one, grad_norm = jnp.float32(1), optax.global_norm(grads)

    shapes, _ = jax.eval_shape(optimizer.update, grads, state.opt_state, trained)

    def update(grads, opt_state):
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        return updates, opt_state, sum(jnp.sum(jnp.square(u)) for u in jax.tree.leaves(updates)).astype(jnp.float32)

    def skip(grads, opt_state):
        return jax.tree.map(lambda g, u: g.astype(u.dtype), grads, shapes), opt_state, jnp.float32(jnp.nan)

    # A branch, since selecting between old and new states would keep both: twice the params more. Updates are kept until all
    # are known to be finite, and come out of it in the place of gradients: so they take no memory of their own.
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    updates, opt_state, squares = jax.lax.cond(finite, update, skip, grads, state.opt_state)
    made = jnp.isfinite(squares)
    params = jax.tree.map(lambda p, new: jnp.where(made, new, p), trained, optax.apply_updates(trained, updates))
    update_norm = jnp.where(made, jnp.sqrt(squares), 0)
    norms = {"grad_norm": grad_norm, "update_norm": update_norm, "param_norm": optax.global_norm(params)}
    metrics |= {name: (norm, one) for name, norm in ({"loss": value} | norms).items()}
    metrics = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), metrics)  # what is not finite says nothing
    metrics["skipped"] = (1 - made.astype(jnp.float32), one)
    return TrainState(params | frozen, opt_state, state.step + 1), metrics


def add_up(total: dict, grads: dict) -> dict:
    """Add gradients to their sum, in which layers are stacked. Where they come by the layer, each is added by itself."""
    layers = grads.get("layers")
    if not isinstance(layers, tuple):
        return jax.tree.map(jnp.add, total, grads)
    stacked = total["layers"]
    for i, layer in enumerate(layers):
        stacked = jax.tree.map(lambda sum, g, i=i: sum.at[i].add(g), stacked, layer)
    rest = {name: jax.tree.map(jnp.add, total[name], grads[name]) for name in total if name != "layers"}
    return {**rest, "layers": stacked}


def split_frozen(params) -> tuple[dict, dict]:
    """Split params into what is trained and what is not (the base of adapters): gradient and optimizer see the first alone."""
    return {k: v for k, v in params.items() if k != "frozen"}, {k: v for k, v in params.items() if k == "frozen"}


def split_rows(x_B, parts: int):
    """[B, ...] -> [parts, B / parts, ...], taking every `parts`-th row, so that rows sharded over devices stay where they are."""
    B = x_B.shape[0]
    return x_B.reshape(B // parts, parts, *x_B.shape[1:]).swapaxes(0, 1)


def used_parts(parts: Batch):
    """How many micro-batches there are up to the last that trains anything."""
    trains_P = jnp.any(parts.weight_BT != 0, axis=(1, 2))
    return jnp.max(jnp.where(trains_P, jnp.arange(len(trains_P)) + 1, 0))


def compile_train_step(model, objective, optimizer, *, microbatches: int = 1, state_shardings=None):
    """Return `step(state, batch) -> (state, metrics)`, jitted; the state is donated and comes back in the same shardings."""
    step = functools.partial(
        train_step,
        model=model,
        objective=objective,
        optimizer=optimizer,
        microbatches=microbatches,
        limits=logits_limits(None if state_shardings is None else jax.tree.leaves(state_shardings)[0].mesh),
    )
    if state_shardings is None:
        return jax.jit(step, donate_argnums=0, compiler_options=saving_memory(jax.default_backend()))
    mesh = jax.tree.leaves(state_shardings)[0].mesh
    everywhere = NamedSharding(mesh, P())  # metrics: any process can read them
    options = saving_memory(mesh.devices.flat[0].platform)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, everywhere), compiler_options=options)


def saving_memory(platform: str) -> dict | None:
    """Options for the compiler: on a CPU it would order instructions to have many ready at a time, whatever they keep alive."""
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if platform == "cpu" else None


def compile_token_logp(model, microbatches: int = 1, mesh=None):
    """Return `logp(params, batch) -> logp_BT`, jitted: for a reference policy, or to check the sampler.

    Of the tokens that have a weight; in as many parts, and leaving out the same, as `train_step`.
    """

    limits = logits_limits(mesh)

    def token_logp(params, batch):
        if microbatches == 1:
            return token_outputs(model, params, batch, limits).logp_BT
        parts = jax.tree.map(lambda x: split_rows(x, microbatches), batch)

        def score(i, logp_PBT):
            rows = jax.tree.map(lambda x: x[i], parts)
            return logp_PBT.at[i].set(token_outputs(model, params, rows, limits).logp_BT)

        logp_PBT = jax.lax.fori_loop(0, used_parts(parts), score, jnp.zeros(parts.weight_BT.shape, jnp.float32))
        return logp_PBT.swapaxes(0, 1).reshape(batch.tokens_BT.shape)

    return jax.jit(token_logp, out_shardings=None if mesh is None else sharding.rows(mesh))


# --- the state of a phase ---


def new_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at the start of a phase."""
    return TrainState(params, optimizer.init(split_frozen(params)[0]), jnp.int32(0))


def state_shapes(model: Model, optimizer: optax.GradientTransformation, mesh) -> tuple[TrainState, TrainState]:
    """The shapes and the shardings of a phase's state."""
    abstract = jax.eval_shape(lambda: new_state(model.init(jax.random.key(0)), optimizer))
    return abstract, sharding.shardings(abstract, mesh)


def name_metrics(learned: dict, *, sampled: bool) -> dict:
    """Put the metrics of a train step under their names in the log."""
    named = {f"train/{name}": value for name, value in learned.items()}
    gap, kl = named.pop("train/behaviour_gap"), named.pop("train/behaviour_kl")
    if sampled:
        named |= {"rollout/logp_gap": gap, "rollout/kl_sampler_learner": kl}
    return named
