"""The reference policy of a phase: the params at its start, the current ones, or a
teacher, which is a model of its own that is read from disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxreason import sharding
from jaxreason.model import Model


class Teacher(NamedTuple):
    """A reference policy that is read from a checkpoint. It has the vocabulary of the
    policy, but may have another architecture.
    """

    model: Model
    load: Callable[[], Any]  # () -> params, on the mesh
    identity: dict  # JSON; changes with the params


def model_of(phase) -> Model | None:
    """Return the model of a phase's teacher; None: the reference has the policy's."""
    return phase.reference.model if isinstance(phase.reference, Teacher) else None


def is_saved(phase) -> bool:
    """Return whether the reference is a part of the phase's checkpoints: a teacher is
    read again, and the current params are there anyway.
    """
    return phase.objective.refers and phase.reference == "start"


def begin(phase, params, saved):
    """Return the reference params of a phase, or None.

    `params` are those of its start, of which a copy is made; or `saved` are those of a
    checkpoint.
    """
    if not phase.objective.refers or phase.reference == "current":
        return None
    if isinstance(phase.reference, Teacher):
        reference = phase.reference.load()
    else:
        reference = jax.tree.map(jnp.copy, params) if saved is None else saved
    return sharding.keep_in(reference, "pinned_host") if phase.offload_reference else reference


def in_use(phase, reference, params):
    """Return the reference params where they are computed with; None without any.

    `params` are those of the policy.
    """
    if phase.reference == "current":
        return params
    return sharding.keep_in(reference, "device") if reference is not None and phase.offload_reference else reference


def head_for_step(phase, model: Model, reference) -> tuple:
    """Return the further arguments of the phase's train step: the reference's
    unembedding, if the objective has a divergence and the step does not have it.
    """
    if phase.objective.divergence is None or phase.reference == "current":
        return ()
    return ((model_of(phase) or model).head(reference),)
