"""Optimizers from plain numbers: a schedule and an optax chain."""

from __future__ import annotations

import jax
import optax

from jaxreason.options import unknown

SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adamw", "adam", "sgd")


def schedule(lr: float, steps: int, *, kind: str = "constant", warmup_steps: int = 0, final_share: float = 0.0):
    """Warm up linearly from 0 over `warmup_steps`, then stay, or decay to `final_share * lr` at `steps`."""
    if kind not in SCHEDULES:
        raise ValueError(unknown("schedule", kind, SCHEDULES))
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup_steps got {warmup_steps}; allowed: 0 to the {steps} steps of the phase")
    rest = max(1, steps - warmup_steps)
    after = {
        "constant": optax.constant_schedule(lr),
        "cosine": optax.cosine_decay_schedule(lr, rest, alpha=final_share),
        "linear": optax.linear_schedule(lr, final_share * lr, rest),
    }[kind]
    if not warmup_steps:
        return after
    # Step 0 makes a small update, not an empty one.
    warmup = optax.linear_schedule(lr / warmup_steps, lr, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def make(
    steps: int,
    *,
    name: str = "adamw",
    lr: float,
    schedule_kind: str = "constant",
    warmup_steps: int = 0,
    final_share: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """Make the optimizer of a phase of `steps` updates. Weight decay spares vectors (norms, biases)."""
    if name not in OPTIMIZERS:
        raise ValueError(unknown("optimizer", name, OPTIMIZERS))
    rate = schedule(lr, steps, kind=schedule_kind, warmup_steps=warmup_steps, final_share=final_share)
    if name == "adamw":
        chain = [optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)]
    elif name == "adam":
        chain = [optax.adam(rate, b1=b1, b2=b2, eps=eps)]
    else:
        chain = [optax.sgd(rate)]
    if clip_norm is not None:
        chain.insert(0, optax.clip_by_global_norm(clip_norm))
    return optax.chain(*chain)


def decayed(params):
    """Which parameters decay: kernels and embeddings."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)
