"""Metrics as dictionaries name -> (sum, count); the mean is computed once, at the end.

`merge` adds them over micro-batches, steps or groups; `divide` turns them into numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

WORST = "_worst"  # ends the name of a metric whose largest value counts, not its mean


def merge(*metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Add up (sum, count) pairs by name; a name may be missing from some. Of a name
    that ends in `WORST`, the largest value and count are taken.

    Arrays are added in one program for all names: XLA:CPU allows 32 programs in flight
    per device, and waits for a place on a thread that those in flight may need.
    """
    merged: dict[str, tuple[Any, Any]] = {}
    for pairs in metrics:
        twice = {name: (merged[name], pairs[name]) for name in pairs if name in merged}
        arrays = {name: both for name, both in twice.items() if any(isinstance(x, jax.Array) for x in jax.tree.leaves(both))}
        numbers = {name: both for name, both in twice.items() if name not in arrays}
        merged |= pairs | add_numbers(numbers) | (add_arrays(arrays) if arrays else {})
    return merged


def add_numbers(pairs: Mapping) -> dict:
    return {
        name: tuple(max(x, y) if name.endswith(WORST) else x + y for x, y in zip(*both, strict=True))
        for name, both in pairs.items()
    }


@jax.jit
def add_arrays(pairs: Mapping) -> dict:
    return {
        name: tuple(map(jnp.maximum if name.endswith(WORST) else jnp.add, before, more)) for name, (before, more) in pairs.items()
    }


def divide(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Return sum / count by name, NaN if the count is 0.

    It waits for the devices and fetches all values in one transfer.
    """
    return {
        name: float(total) / float(count) if count != 0 else math.nan
        for name, (total, count) in jax.device_get(dict(metrics)).items()
    }
