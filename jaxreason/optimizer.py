"""Optimizers from plain numbers: a schedule and an optax chain."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreason.options import unknown_name_message

SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = {
    "adamw": "Adam with decoupled weight decay of matrices (Loshchilov and Hutter 2017, arXiv 1711.05101)",
    "adam": "Gradient over its root mean square, by two running means (Kingma and Ba 2014, arXiv 1412.6980)",
    "sgd": "The gradient times the rate, without momentum or state",
    "muon": "Orthogonalised momentum for the matrices of layers, AdamW for the rest (Jordan et al. 2024)",
    "adafactor": "Adam without a first moment and with a factored second one (Shazeer and Stern 2018, arXiv 1804.04235)",
    "lion": "The sign of an interpolated momentum (Chen et al. 2023, arXiv 2302.06675)",
}
STATE_DTYPES = ("float32", "bfloat16")
# Field -> optimizers that read it; fields that all of them read are not listed.
READ_BY = {
    "b1": ("adam", "adamw", "lion", "muon"),
    "b2": ("adam", "adamw", "lion", "muon"),
    "eps": ("adam", "adamw", "muon"),
    "weight_decay": ("adafactor", "adamw", "lion", "muon"),
    "state_dtype": ("adam", "adamw", "lion", "muon"),
    "adam_lr": ("muon",),
    "muon_momentum": ("muon",),
    "muon_scale": ("muon",),
}
MUON_SCALES = {"rms": 0.2, "width": None}


def schedule(
    lr: float,
    steps: int,
    *,
    kind: str = "constant",
    warmup_steps: int = 0,
    warmup_fraction: float = 0.0,
    final_fraction: float = 0.0,
):
    """Warm up linearly, then hold `lr` or decay to `final_fraction * lr` at `steps`.

    The warm-up takes `warmup_steps`, or `warmup_fraction` of all steps, rounded.
    """
    if kind not in SCHEDULES:
        raise ValueError(unknown_name_message("schedule", kind, SCHEDULES))
    if not 0 <= warmup_fraction <= 1:
        raise ValueError(f"warmup_fraction got {warmup_fraction}; allowed: 0 to 1")
    if warmup_fraction and warmup_steps:
        raise ValueError(
            f"got warmup_steps={warmup_steps} and warmup_fraction={warmup_fraction}; allowed: one of them, the other 0"
        )
    warmup_steps = warmup_steps or round(warmup_fraction * steps)
    if not 0 <= warmup_steps <= steps and (steps or warmup_steps < 0):
        raise ValueError(f"warmup_steps got {warmup_steps}; allowed: 0 to the {steps} steps of the phase")
    rest = max(1, steps - warmup_steps)
    after = {
        "constant": optax.constant_schedule(lr),
        "cosine": optax.cosine_decay_schedule(lr, rest, alpha=final_fraction),
        "linear": optax.linear_schedule(lr, final_fraction * lr, rest),
    }[kind]
    if not warmup_steps:
        return after
    # Start at lr / warmup_steps, so that step 0 makes an update.
    warmup = optax.linear_schedule(lr / warmup_steps, lr, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def make(
    steps: int,
    *,
    name: str = "adamw",  # adamw, adam, sgd, lion, adafactor or muon
    lr: float,  # the learning rate after the warm-up
    schedule_kind: str = "constant",  # constant, cosine or linear
    warmup_steps: int = 0,  # steps over which the rate rises to lr
    warmup_fraction: float = 0.0,  # the same, as a fraction of all steps
    final_fraction: float = 0.0,  # final rate of a decay, as a fraction of lr
    b1: float = 0.9,  # decay of the first moment (adamw, adam, muon's adamw; lion: weight of the momentum in an update)
    b2: float = 0.999,  # decay of the second moment (adamw, adam, muon's adamw; lion: of the momentum)
    eps: float = 1e-8,  # added to the root of the second moment
    weight_decay: float = 0.0,  # decay of matrices, multiplied by the rate
    clip_norm: float | None = 1.0,  # largest gradient norm; None: any
    state_dtype: str | None = None,  # dtype of the first moment: float32 or bfloat16; None: float32
    adam_lr: float | None = None,  # muon: rate of embeddings, head and vectors; None: lr
    muon_momentum: float = 0.95,  # muon: decay of the momentum
    muon_scale: str = "rms",  # muon: scale of updates: rms, for rates like AdamW's, or width
    value_lr: float | None = None,  # rate of the value head, if the model has one; None: lr
) -> optax.GradientTransformation:
    """Make the optimizer of a phase of `steps` updates.

    Weight decay is multiplied by the rate and skips vectors (norms, biases).

    - adamw, adam: Kingma and Ba 2014, arXiv 1412.6980; Loshchilov and Hutter 2017,
      arXiv 1711.05101.
    - lion: Chen et al. 2023, arXiv 2302.06675, who use a rate 3 to 10 times smaller
      than AdamW's and b2=0.99.
    - adafactor: Shazeer and Stern 2018, arXiv 1804.04235. The rate is relative to the
      root mean square of a parameter, here over all layers of one kind. Moments are
      factored over the two largest axes if both have at least 128 entries.
    - muon: Jordan et al. 2024, on the matrices of each layer; AdamW at `adam_lr` (None:
      `lr`) on embeddings, head and vectors. `muon_scale` "rms" multiplies an orthogonal
      update by 0.2 sqrt(max(in, out)) (Liu et al. 2025, arXiv 2502.16982, eq. 4), so
      that AdamW's rates and decay carry over; "width" multiplies it by
      sqrt(max(1, out / in)), as Jordan does, for rates near 0.02 and a separate
      `adam_lr`.

    `state_dtype` is the dtype of the first moment; second moments and updates are
    float32, whatever the dtype of the params.

    A field that the optimizer does not read must have its default, since a sweep over
    it would vary nothing. `build` drops such fields of a config file with a warning, so
    that `optimizer.name` can be swept alone; `build.check_changes` refuses those that
    the command itself sets.

    Raises:
      ValueError: an unknown name, an impossible schedule, or a field that this
        optimizer does not read.
    """
    if name not in OPTIMIZERS:
        raise ValueError(unknown_name_message("optimizer", name, OPTIMIZERS))
    _check_numbers(
        lr=(lr, lambda x: x > 0, "above 0"),
        adam_lr=(adam_lr, lambda x: x > 0, "None, or above 0"),
        value_lr=(value_lr, lambda x: x > 0, "None, or above 0"),
        final_fraction=(final_fraction, lambda x: 0 <= x <= 1, "0 to 1"),
        b1=(b1, lambda x: 0 <= x < 1, "0 to below 1"),
        b2=(b2, lambda x: 0 <= x < 1, "0 to below 1"),
        eps=(eps, lambda x: x > 0, "above 0: without it a parameter that never had a gradient becomes 0 / 0"),
        weight_decay=(weight_decay, lambda x: x >= 0, "0 or more"),
        clip_norm=(clip_norm, lambda x: x > 0, "None, or above 0"),
        muon_momentum=(muon_momentum, lambda x: 0 <= x < 1, "0 to below 1"),
    )
    if state_dtype not in (None, *STATE_DTYPES):
        raise ValueError(unknown_name_message("state_dtype", state_dtype, (None, *STATE_DTYPES)))
    if muon_scale not in MUON_SCALES:
        raise ValueError(unknown_name_message("muon_scale", muon_scale, MUON_SCALES))
    fields = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay, "state_dtype": state_dtype, "adam_lr": adam_lr}
    fields |= {"muon_momentum": muon_momentum, "muon_scale": muon_scale, "final_fraction": final_fraction}
    for field, (why, default) in ignored({"name": name, "schedule_kind": schedule_kind} | fields).items():
        raise ValueError(f"{field} got {fields[field]!r}, but {why}; else {field}={default}")
    shape = {
        "kind": schedule_kind,
        "warmup_steps": warmup_steps,
        "warmup_fraction": warmup_fraction,
        "final_fraction": final_fraction,
    }
    rate = schedule(lr, steps, **shape)
    adam_rate = rate if adam_lr is None else schedule(adam_lr, steps, **shape)
    clip = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    of_others = lr if adam_lr is None else adam_lr
    values = [] if value_lr is None else [optax.masked(optax.scale(value_lr / of_others), of_value_head)]
    return in_float32(optax.chain(*clip, rule(name, rate, adam_rate, **fields), *values))


def of_value_head(params: Mapping[str, Any]) -> dict[str, Any]:
    """Tell which params are those of the value head."""
    return {name: jax.tree.map(lambda _, name=name: name == "value", branch) for name, branch in params.items()}


def rule(name: str, rate, adam_rate, *, b1, b2, eps, weight_decay, state_dtype, muon_momentum, muon_scale, **_):
    """Make the update rule of an optimizer from its rates and numbers."""
    dtype = None if state_dtype is None else jnp.dtype(state_dtype)
    adam = {"b1": b1, "b2": b2, "eps": eps, "mu_dtype": dtype}
    decay = {"weight_decay": weight_decay, "mask": decayed}
    if name == "adamw":
        return optax.adamw(rate, **adam, **decay)
    if name == "adam":
        return optax.adam(rate, **adam)
    if name == "sgd":
        return optax.sgd(rate)
    if name == "lion":
        return optax.lion(rate, b1=b1, b2=b2, mu_dtype=dtype, **decay)
    if name == "adafactor":
        # optax adds this decay after the rate; multiplied by the rate it has the same
        # meaning as in the other optimizers.
        decay_rate = (lambda step: weight_decay * rate(step)) if weight_decay else None
        return optax.adafactor(rate, weight_decay_rate=decay_rate, weight_decay_mask=decayed)
    matrices = optax.contrib.muon(
        rate,
        beta=muon_momentum,
        weight_decay=weight_decay,
        mu_dtype=dtype,
        muon_weight_dimension_numbers=matrix_axes,
        consistent_rms=MUON_SCALES[muon_scale],
    )
    # optax's muon would use Nesterov's Adam for the rest, and decay norms and biases
    # too.
    return optax.partition({"matrices": matrices, "rest": optax.adamw(adam_rate, **adam, **decay)}, labels)


def ignored(fields: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Find fields of `make` that the optimizer or schedule in `fields` does not read.

    Only fields that differ from their default count. Return for each which optimizers
    or schedules read it, in words, and its default.
    """
    default = {name: p.default for name, p in inspect.signature(make).parameters.items()}
    name, kind = (fields.get(field, default[field]) for field in ("name", "schedule_kind"))
    found = {}
    for field, readers in READ_BY.items():
        if name in OPTIMIZERS and name not in readers and fields.get(field, default[field]) != default[field]:
            found[field] = f"{name} does not read it; allowed with: {', '.join(readers)}", default[field]
    if kind == "constant" and fields.get("final_fraction", default["final_fraction"]) != default["final_fraction"]:
        found["final_fraction"] = "a constant schedule does not read it; allowed with: cosine, linear", default["final_fraction"]
    return found


def in_float32(made: optax.GradientTransformation) -> optax.GradientTransformation:
    """Make an optimizer work in float32, whatever the dtype of the params.

    Updates are float32. In bfloat16 a decay of 0.999 rounds to 1, so second moments
    would never decay.
    """

    def widened(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params):
        return made.init(widened(params))

    def update(grads, state, params):
        return made.update(widened(grads), state, widened(params))

    return optax.GradientTransformation(init, update)


def _check_numbers(**numbers: tuple) -> None:
    """Raise ValueError for the first number that is out of range or not finite.

    Each is (value, test, range) and is also tested after rounding to float32.
    """
    for name, (value, fits, allowed) in numbers.items():
        if value is None:
            continue
        if not (fits(value) and math.isfinite(value)):
            raise ValueError(f"{name} got {value}; allowed: {allowed}")
        with np.errstate(over="ignore", under="ignore"):
            rounded = float(np.float32(value))
        if abs(rounded) < np.finfo(np.float32).tiny:  # XLA flushes subnormal numbers to 0
            rounded = 0.0
        if not (fits(rounded) and math.isfinite(rounded)):
            raise ValueError(f"{name} got {value}, in float32 {rounded:g}; allowed: {allowed}")


def decayed(params):
    """Mark the parameters that have weight decay: kernels and embeddings."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


def labels(params):
    """Label the matrices of layers "matrices" (for Muon) and all else "rest"."""

    def label(path, _):
        return "matrices" if path[0].key in ("layers", "lora") and path[-1].key == "kernel" else "rest"

    return jax.tree_util.tree_map_with_path(label, params)


def matrix_axes(params):
    """Return the input and output axes of each kernel for Muon.

    Axis 0 is the layer, a batch of matrices.
    """

    def axes_of(path, x):
        # The attention output projection and matrix "a" of its adapter have two input
        # axes: heads and head size.
        heads_in = "o" in (path[-2].key, path[-3].key) and path[-2].key != "b"
        first = 3 if heads_in else 2
        return optax.contrib.MuonDimensionNumbers(tuple(range(1, first)), tuple(range(first, x.ndim)))

    return jax.tree_util.tree_map_with_path(axes_of, params)
