"""Optimizers from plain numbers: a schedule and an optax chain."""

from __future__ import annotations

import jax
import optax
import optax.contrib

from jaxreason.options import unknown

SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adamw", "adam", "sgd", "muon", "lion", "adafactor")


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
    warmup_steps: int | None = None,
    warmup_share: float = 0.0,
    final_share: float = 0.0,
    b1: float = 0.9,
    b2: float | None = None,
    eps: float = 1e-8,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    state_dtype: str | None = None,
) -> optax.GradientTransformation:
    """Make the optimizer of a phase of `steps` updates.

    Weight decay spares vectors (norms, biases). The warm-up is `warmup_steps`, or `warmup_share` of the phase. `state_dtype` is
    that of the first moments, None for the params' own. `b2` None is 0.99 for lion and 0.999 for the others.

    muon (Jordan et al. 2024; arXiv 2502.16982) moves the matrices of the layers, with `momentum`, by updates of the size that
    AdamW's have (root mean square 0.2 x lr), so that both go by one `lr`; AdamW with Nesterov momentum moves the rest.
    adafactor (Shazeer and Stern 2018, arXiv 1804.04235) steps in proportion to the size of a parameter.

    Raises:
      ValueError: an unknown name, or a number that this optimizer cannot have.
    """
    if name not in OPTIMIZERS:
        raise ValueError(unknown("optimizer", name, OPTIMIZERS))
    if warmup_share and warmup_steps is not None:
        raise ValueError(f"got warmup_steps={warmup_steps} and warmup_share={warmup_share}; give one of them")
    if not 0 <= warmup_share <= 1:
        raise ValueError(f"warmup_share got {warmup_share}; allowed: 0 to 1, a share of the phase's steps")
    if state_dtype is not None and name not in WITH_STATE_DTYPE:
        raise ValueError(f"state_dtype got {state_dtype!r} with optimizer {name!r}; allowed with: {', '.join(WITH_STATE_DTYPE)}")
    if state_dtype not in (None, "float32", "bfloat16"):
        raise ValueError(unknown("state_dtype", state_dtype, ("float32", "bfloat16")))
    if weight_decay and name not in WITH_DECAY:
        raise ValueError(f"weight_decay got {weight_decay} with optimizer {name!r}; allowed with: {', '.join(WITH_DECAY)}")
    warmup_steps = round(warmup_share * steps) if warmup_steps is None else warmup_steps
    rate = schedule(lr, steps, kind=schedule_kind, warmup_steps=warmup_steps, final_share=final_share)
    b2 = (0.99 if name == "lion" else 0.999) if b2 is None else b2
    if name == "adamw":
        made = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed, mu_dtype=state_dtype)
    elif name == "adam":
        made = optax.adam(rate, b1=b1, b2=b2, eps=eps, mu_dtype=state_dtype)
    elif name == "lion":
        made = optax.lion(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed, mu_dtype=state_dtype)
    elif name == "muon":
        made = optax.contrib.muon(
            rate,
            beta=momentum,
            weight_decay=weight_decay,
            weight_decay_mask=decayed,
            mu_dtype=state_dtype,
            adam_b1=b1,
            adam_b2=b2,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,
        )
    elif name == "adafactor":
        made = optax.adafactor(rate)
    else:
        made = optax.sgd(rate)
    return made if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), made)


WITH_DECAY = ("adamw", "lion", "muon")
WITH_STATE_DTYPE = ("adamw", "adam", "lion", "muon")


def decayed(params):
    """Which parameters decay: kernels and embeddings."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


def matrices(params):
    """Which axes of a parameter muon reads as the rows and columns of a matrix; None where it is not for muon.

    Layers are stacked on axis 0, which is left out: each is made orthogonal by itself.
    """

    def of(path, leaf):
        if path[0].key != "layers" or path[-1].key != "kernel":
            return None
        inputs = 2 if path[-2].key == "o" else 1  # attention's output reads heads x head size
        return optax.contrib.MuonDimensionNumbers(tuple(range(1, 1 + inputs)), tuple(range(1 + inputs, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(of, params)
