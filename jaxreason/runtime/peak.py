"""Peak rates of a device: of known chips by table, of others measured if asked.

Utilisation is a fraction of them. Rates of chips are the makers' for dense bfloat16
products, whatever dtype a model computes in; no program reaches them. Measured rates
are those that a product and a copy reach on this machine, now, beside whatever else
runs on it. Without either, utilisation is not told.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MEASURED_S = 0.4  # time of each of the two measurements, about


class Peak(NamedTuple):
    """Peak rates of one jax device."""

    device: str
    flops_per_s: float
    bytes_per_s: float  # of its memory
    source: str  # "table" or "measured"


# By `device_kind`: (FLOP/s of dense bfloat16 products, bytes/s of memory). TPUs:
# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; where jax names a chip in two ways,
# both. GPUs: NVIDIA's data sheets, whose figures "with sparsity" are halved: A100 (June
# 2021), H100 (2023), H200, L4, L40S, DGX B200 (an eighth of it). A part of a GPU (MIG)
# has another name and is not known.
PEAKS = {
    "TPU v4": (275e12, 1228e9),
    "TPU v5 lite": (197e12, 819e9),
    "TPU v5e": (197e12, 819e9),
    "TPU v5": (459e12, 2765e9),
    "TPU v5p": (459e12, 2765e9),
    "TPU v6 lite": (918e12, 1638e9),
    "TPU v6e": (918e12, 1638e9),
    "NVIDIA A100-PCIE-40GB": (312e12, 1555e9),
    "NVIDIA A100-SXM4-40GB": (312e12, 1555e9),
    "NVIDIA A100 80GB PCIe": (312e12, 1935e9),
    "NVIDIA A100-SXM4-80GB": (312e12, 2039e9),
    "NVIDIA H100 PCIe": (756e12, 2000e9),
    "NVIDIA H100 NVL": (835e12, 3900e9),
    "NVIDIA H100 80GB HBM3": (989e12, 3350e9),
    "NVIDIA H200": (989e12, 4800e9),
    "NVIDIA L4": (121e12, 300e9),
    "NVIDIA L40S": (362e12, 864e9),
    "NVIDIA B200": (2250e12, 8000e9),
}


def find(device, dtype: str, measures: bool) -> Peak | None:
    """Return the peak rates of a jax device; None if they are neither known nor
    measured.
    """
    kind = device.device_kind
    if measures:
        return measure(device, dtype)
    return Peak(kind, *PEAKS[kind], source="table") if kind in PEAKS else None


def measure(device, dtype: str) -> Peak:
    """Measure products and copies on a device, in about a second.

    Virtual devices of a CPU share it, so each gets an equal part.
    """
    cpu = device.platform == "cpu"
    side, numbers = (1024, 16 * 2**20) if cpu else (8192, 128 * 2**20)
    x_SS = jax.device_put(jnp.full((side, side), 0.5, dtype), device)
    x_N = jax.device_put(jnp.ones(numbers, jnp.float32), device)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    flops_per_s = 2 * side**3 / shortest_s(lambda: product(x_SS, x_SS).block_until_ready())
    bytes_per_s = 2 * x_N.nbytes / shortest_s(lambda: copy(x_N).block_until_ready())
    if cpu:  # XLA copies on few cores; a dot product of NumPy waits for memory alone
        a_N, b_N = np.ones(numbers, np.float32), np.ones(numbers, np.float32)
        bytes_per_s = max(bytes_per_s, 2 * a_N.nbytes / shortest_s(lambda: a_N @ b_N))
    parts = jax.local_device_count() if cpu else 1
    return Peak(device.device_kind, flops_per_s / parts, bytes_per_s / parts, "measured")


def shortest_s(function: Callable) -> float:
    """Return the shortest time of a function that is called for `MEASURED_S`, after a
    call that compiles it.
    """
    function()
    times_s = []
    while not times_s or sum(times_s) < MEASURED_S:
        started_s = time.perf_counter()
        function()
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)
