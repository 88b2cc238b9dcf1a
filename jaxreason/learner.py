"""The learner: the loss, the train step, and its compilation.

One train step serves pretraining, imitation and reinforcement learning. It takes no
random key, config, mesh or pad id. It minimises `sum(weight_BT * loss_BT)`, so its
gradient is the same for any number of micro-batches and any sharding, up to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxreason import metrics as metrics_
from jaxreason import sharding
from jaxreason.batching import split_rows, used_parts
from jaxreason.logp import (
    Limits,
    Reference,
    compile_hidden,
    compile_token_entropy,
    compile_token_logp,
    compile_token_values,
    logits_limits,
    token_outputs,
)
from jaxreason.metrics import WORST
from jaxreason.model import Model
from jaxreason.objectives import Objective, controls
from jaxreason.objectives.controls import Control
from jaxreason.objectives.critic import with_values
from jaxreason.objectives.losses import nll_where_imitated
from jaxreason.platforms import platform_of
from jaxreason.types import Batch, TrainState

DEPTHS = (0, 64, 256, 1024, 4096)  # positions at which `by_depth` cuts
MISMATCH = "rollout/kl_sampler_learner"
MISMATCH_BY_DEPTH = f"{MISMATCH}/"


def loss(
    params,
    batch: Batch,
    head=None,
    *,
    model: Model,
    objective: Objective,
    limits: Limits | None = None,
    teacher: Model | None = None,
):
    """Return `sum(weight_BT * loss_BT)` and metrics over the tokens with a weight.

    `teacher` is the reference policy's model if it is another one, and `head` its
    unembedding, for an objective with a divergence. Without a head the reference has
    that of the params.

    Tokens of `imitated_BT` have the loss `nll`, and count in no metric of the
    objective, or of sampler and learner. Metrics are (sum, count) pairs; of a name that
    ends in `WORST`, the largest value and 1.
    """
    reference = None
    if objective.divergence is not None:
        head = jax.lax.stop_gradient(model.head(params)) if head is None else head
        reference = Reference(objective.divergence, (teacher or model).unembed, head)
    outputs = token_outputs(model, params, batch, limits, reference)
    trained_BT = scored_BT = batch.weight_BT != 0
    if batch.imitated_BT is None:
        loss_BT, stats = objective.token_loss(outputs, batch)
    else:
        scored_BT = trained_BT & ~batch.imitated_BT
        batch, loss_BT, stats = nll_where_imitated(objective.token_loss, outputs, batch)
    value = jnp.sum(jnp.where(trained_BT, batch.weight_BT * loss_BT, 0.0))
    gap_BT = outputs.logp_BT - batch.behaviour_logp_BT
    stats = {
        "behaviour_gap": jnp.abs(gap_BT),  # on-policy: the disagreement of sampler and learner, which should be rounding
        "behaviour_kl": jnp.exp(gap_BT) - 1 - gap_BT,  # KL(sampler || learner) on-policy, by the k3 estimator
        # The same by k1, which other libraries report. It is far noisier: over 400
        # tokens of tiny in bfloat16 it varied by 2e-4 where k3 was 5e-6.
        "behaviour_kl_k1": -gap_BT,
        **stats,
    }
    metrics = averaged({"entropy": outputs.entropy_BT, "nll": -outputs.logp_BT}, trained_BT) | averaged(stats, scored_BT)
    if batch.imitated_BT is not None:
        metrics |= averaged({"imitation_nll": -outputs.logp_BT}, trained_BT & batch.imitated_BT)
        metrics |= averaged({"scored_entropy": outputs.entropy_BT}, scored_BT)
    return value, metrics | by_depth("behaviour_kl", stats["behaviour_kl"], scored_BT, batch.position_BT)


def averaged(stats: dict, counted_BT) -> dict:
    """Return (sum, count) of each statistic over some tokens, or (largest, 1), or with
    the count 0 if there is none of them.
    """
    count = jnp.sum(counted_BT, dtype=jnp.float32)
    counted = {name: jnp.where(counted_BT, x, 0.0) for name, x in stats.items()}
    any_ = jnp.minimum(count, 1)
    return {name: (jnp.max(x), any_) if name.endswith(WORST) else (jnp.sum(x), count) for name, x in counted.items()}


def by_depth(name: str, x_BT, counted_BT, position_BT) -> dict:
    """Return (sum, count) of a metric for tokens at the same depth: between two of
    `DEPTHS` positions from the start of the prompt.

    Sampler and learner may disagree more and more along a text: errors in the cache or
    in positions add up. Depths that rows of this length do not reach are left out.
    """
    T, found = x_BT.shape[1], {}
    for first, end in itertools.pairwise((*DEPTHS, None)):
        if first < T:
            here_BT = counted_BT & (position_BT >= first) & (True if end is None else position_BT < end)
            total, count = jnp.sum(jnp.where(here_BT, x_BT, 0.0)), jnp.sum(here_BT, dtype=jnp.float32)
            found[f"{name}/{first}_{'on' if end is None else end - 1}"] = (total, count)
    return found


def train_step(
    state: TrainState,
    batch: Batch,
    head=None,
    *,
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
    limits: Limits | None = None,
    teacher: Model | None = None,
) -> tuple[TrainState, dict]:
    """Make one update from one batch, in `microbatches` equal parts of its rows.

    `head` and `teacher` are those of `loss`.

    Metrics are (sum, count) pairs. Micro-batches after the last one with a weight are
    skipped at no cost; packing leaves such parts empty. If the loss or the gradient is
    not finite, the update is skipped: it counts in the metric `skipped` and as a step.
    If the gradient is finite but the optimizer's update is not, in any array, the
    update is skipped as well: all params stay unchanged, but the optimizer state, which
    is finite, includes the gradient.
    """
    trained, frozen = split_frozen(state.params)

    def trained_loss(trained, rows):
        rows = dataclasses.replace(rows, control=state.control)
        return loss(trained | frozen, rows, head, model=model, objective=objective, limits=limits, teacher=teacher)

    gradient = jax.value_and_grad(trained_loss, has_aux=True)

    by_layer = model.by_layer(trained)

    def accumulate(i, total):
        (value, metrics), grads = gradient(by_layer, jax.tree.map(lambda x: x[i], parts))
        return total[0] + value, metrics_.merge(total[1], metrics), add_up(total[2], grads)

    if microbatches == 1:
        (value, metrics), grads = gradient(trained, batch)
    else:
        parts = jax.tree.map(lambda x: split_rows(x, microbatches), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        (value, metrics), grads = jax.eval_shape(gradient, trained, first)
        # Sums over micro-batches are float32, whatever the dtype of the params.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (value, metrics, grads))
        value, metrics, grads = jax.lax.fori_loop(0, used_parts(parts), accumulate, zeros)

    # Gradients get the dtype of the params from which the optimizer state was made.
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trained)
    one, grad_norm = jnp.float32(1), optax.global_norm(grads)

    shapes, _ = jax.eval_shape(optimizer.update, grads, state.opt_state, trained)

    def update(grads, opt_state):
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        return updates, opt_state, sum(jnp.sum(jnp.square(u)) for u in jax.tree.leaves(updates)).astype(jnp.float32)

    def skip(grads, opt_state):
        return jax.tree.map(lambda g, u: g.astype(u.dtype), grads, shapes), opt_state, jnp.float32(jnp.nan)

    # Use `cond`: selecting between the old and new optimizer states would keep both,
    # which takes twice the size of the params more. The updates replace the gradients
    # in memory, so keeping them until all are known to be finite costs nothing.
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    updates, opt_state, squares = jax.lax.cond(finite, update, skip, grads, state.opt_state)
    made = jnp.isfinite(squares)
    params = jax.tree.map(lambda p, new: jnp.where(made, new, p), trained, optax.apply_updates(trained, updates))
    update_norm = jnp.where(made, jnp.sqrt(squares), 0)
    norms = {"grad_norm": grad_norm, "update_norm": update_norm, "param_norm": optax.global_norm(params)}
    metrics |= {name: (norm, one) for name, norm in ({"loss": value} | norms).items()}
    seen = {"scored_entropy": metrics["entropy"], **metrics}
    control = controls.after(objective.controls, state.control, seen, finite)
    metrics = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), metrics)  # count nothing if not finite
    metrics["skipped"] = (1 - made.astype(jnp.float32), one)
    return TrainState(params | frozen, opt_state, state.step + 1, control), metrics


def add_up(total: dict, grads: dict) -> dict:
    """Add gradients to their sum, in which layers are stacked.

    Gradients that come as a tuple of layers are added one layer at a time.
    """
    layers = grads.get("layers")
    if not isinstance(layers, tuple):
        return jax.tree.map(jnp.add, total, grads)
    stacked = total["layers"]
    for i, layer in enumerate(layers):
        stacked = jax.tree.map(lambda sum, g, i=i: sum.at[i].add(g), stacked, layer)
    rest = {name: jax.tree.map(jnp.add, total[name], grads[name]) for name in total if name != "layers"}
    return {**rest, "layers": stacked}


def split_frozen(params) -> tuple[dict, dict]:
    """Split params into trained and frozen ones (the base of adapters).

    Gradient and optimizer see only the trained ones.
    """
    return {k: v for k, v in params.items() if k != "frozen"}, {k: v for k, v in params.items() if k == "frozen"}


def compile_train_step(model, objective, optimizer, *, microbatches: int = 1, state_shardings=None, teacher=None):
    """Return the jitted `step(state, batch, head=None) -> (state, metrics)`.

    The state is donated and returned in the same shardings. `head` is given if the
    objective has a divergence, unless the reference is the state's own params.
    """
    step = functools.partial(
        train_step,
        model=model,
        objective=objective,
        optimizer=optimizer,
        microbatches=microbatches,
        teacher=teacher,
        limits=logits_limits(None if state_shardings is None else jax.tree.leaves(state_shardings)[0].mesh),
    )
    if state_shardings is None:
        return jax.jit(step, donate_argnums=0, compiler_options=platform_of().compiler_options)
    mesh = jax.tree.leaves(state_shardings)[0].mesh
    everywhere = NamedSharding(mesh, P())  # of the metrics, so that every process can read them
    options = platform_of(mesh).compiler_options
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, everywhere), compiler_options=options)


def compile_references(model, objective, *, microbatches: int = 1, mesh=None, teacher=None):
    """Return `refer(batch, reference)`, which adds to a batch the log-probs or hidden
    states by the reference params that the objective needs. They are those of the model
    `teacher` if there is one.
    """
    reference_logp = compile_token_logp(teacher or model, microbatches, mesh)
    reference_hidden = compile_hidden(teacher or model, microbatches, mesh)

    def refer(batch: Batch, reference) -> Batch:
        needed = {}
        if objective.needs_reference:
            needed["reference_logp_BT"] = reference_logp(reference, batch)
        if objective.divergence is not None:
            needed["reference_hidden_BTD"] = reference_hidden(reference, batch)
        return dataclasses.replace(batch, **needed)

    return refer


def compile_completion(model, objective, *, microbatches: int = 1, mesh=None, teacher=None):
    """Return `complete(batch, params, reference, control)`, which adds to a batch what
    the objective needs beside the rollouts: what `compile_references` adds, advantages
    by the values of the current params, and what its `prepare` makes of the whole
    batch. `control` is that of the train state.
    """
    refer = compile_references(model, objective, microbatches=microbatches, mesh=mesh, teacher=teacher)
    logp = compile_token_logp(model, microbatches, mesh)
    if objective.critic is not None:
        values = compile_token_values(model, microbatches, mesh)
        by_values = jax.jit(functools.partial(with_values, objective.critic))
    if objective.needs_entropy:
        entropy = compile_token_entropy(model, microbatches, mesh)
    rows = None if mesh is None else sharding.rows(mesh)
    prepare = jax.jit(functools.partial(prepared, objective.prepare), out_shardings=rows)

    def complete(batch: Batch, params, reference=None, control=None) -> Batch:
        if reference is not None:
            batch = refer(batch, reference)
        if objective.critic is not None:
            seen = dataclasses.replace(batch, control=control)
            logp_BT = None if objective.critic.trace_clip is None else logp(params, batch)
            batch = dataclasses.replace(batch, **by_values(values(params, batch), seen, logp_BT))
        if objective.prepare:
            entropy_BT = entropy(params, batch) if objective.needs_entropy else None
            batch = dataclasses.replace(batch, **prepare(dataclasses.replace(batch, entropy_BT=entropy_BT, control=control)))
        return batch

    return complete


def prepared(functions, batch: Batch) -> dict:
    """Return the fields of a batch that some functions change, one after the other."""
    found: dict = {}
    for function in functions:
        found |= function(dataclasses.replace(batch, **found))
    return found


# --- the state of a phase ---


def new_state(params, optimizer: optax.GradientTransformation, controls_: tuple[Control, ...] = ()) -> TrainState:
    """Make the state at the start of a phase; `controls_` are the objective's."""
    return TrainState(params, optimizer.init(split_frozen(params)[0]), jnp.int32(0), controls.begin(controls_))


def state_shapes(model: Model, optimizer: optax.GradientTransformation, mesh, controls_: tuple[Control, ...] = ()):
    """Return the shapes and the shardings of a phase's state, two TrainStates."""
    abstract = jax.eval_shape(lambda: new_state(model.init(jax.random.key(0)), optimizer, controls_))
    return abstract, sharding.shardings(abstract, mesh)


def name_metrics(learned: dict, *, sampled: bool) -> dict:
    """Rename the metrics of a train step as in the log.

    `effective_sample_size` is the share of tokens of equal weight that would have the
    same variance as these ratios: (sum r)^2 / (n sum r^2).

    Those that compare sampler and learner are left out unless the batch was sampled.
    With `lag` or several updates per batch they include the change of the policy
    meanwhile.
    """
    learned, named = dict(learned), {}
    if "ratio_squared" in learned:
        (total, count), (squares, _) = learned["ratio"], learned.pop("ratio_squared")
        learned["effective_sample_size"] = (total**2 / jnp.maximum(squares, 1e-30), count)
    for name, value in learned.items():
        if name == "behaviour_gap":
            named |= {"rollout/logp_gap": value} if sampled else {}
        elif name.startswith("behaviour_kl"):
            named |= {MISMATCH + name.removeprefix("behaviour_kl"): value} if sampled else {}
        else:
            named[f"train/{name}"] = value
    return named
