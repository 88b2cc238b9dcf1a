"""Metrics as dictionaries name -> (sum, count); the mean is computed once, at the end.

`merge` adds them over micro-batches, steps or groups; `divide` turns them into numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax


def merge(*metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Add up (sum, count) pairs by name; a name may be missing from some."""
    merged: dict[str, tuple[Any, Any]] = {}
    for pairs in metrics:
        for name, (total, count) in pairs.items():
            seen_total, seen_count = merged.get(name, (0, 0))
            merged[name] = (seen_total + total, seen_count + count)
    return merged


def divide(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Return sum / count by name, NaN if the count is 0.

    It waits for the devices and fetches all values in one transfer.
    """
    return {
        name: float(total) / float(count) if count != 0 else math.nan
        for name, (total, count) in jax.device_get(dict(metrics)).items()
    }
