"""Known TPU chips: peak rates, memory, topologies and prices."""

from __future__ import annotations

import math
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """A kind of accelerator chip; each chip is one jax device."""

    hbm_bytes: float  # available to a program
    flops_per_s: float  # bfloat16, dense
    hbm_bytes_per_s: float
    ici_bytes_per_s: float  # sent along one axis of the torus, both directions together
    usd_per_hour: float | None  # on demand; None: not known
    price_source: str
    chips_per_host: int  # at most; in a slice of several hosts libtpu 0.0.42 gives each host 4
    topologies: tuple[str, ...]  # that can be rented


# Memory: the size that libtpu 0.0.42's compiler reports as available (2026-11-24); it
# reserves the rest of the 16, 32 and 95 GB. FLOP/s and HBM bandwidth:
# docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}, read 2026-11-24. Interconnect: "How to
# Scale Your Model" (Austin et al. 2025), jax-ml.github.io/scaling-book/tpus, "ICI
# BW/link (bidi)"; a little below the documentation's 400, 1200 and 800 GB/s per chip
# over 4, 6 and 4 ports (v5e, v5p, v6e). Prices are on-demand list prices in the United
# States, from cloud.google.com/tpu/pricing as quoted in the source that is named. They
# change: give your own with --prices. v4 is left out: libtpu describes the two cores of
# a chip as two devices, a real v4 shows them as one, and jax makes no mesh of them.
CHIPS = {
    "v5e": Chip(
        hbm_bytes=15.75 * GIB,
        flops_per_s=197e12,
        hbm_bytes_per_s=819e9,
        ici_bytes_per_s=90e9,
        usd_per_hour=1.20,
        price_source="'How to Scale Your Model', February 2025",
        chips_per_host=8,
        topologies=("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    ),
    "v5p": Chip(
        hbm_bytes=95.74 * GIB,
        flops_per_s=459e12,
        hbm_bytes_per_s=2765e9,
        ici_bytes_per_s=180e9,
        usd_per_hour=4.20,
        price_source="'How to Scale Your Model', February 2025",
        chips_per_host=4,
        topologies=("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    ),
    "v6e": Chip(
        hbm_bytes=31.25 * GIB,
        flops_per_s=918e12,
        hbm_bytes_per_s=1638e9,
        ici_bytes_per_s=180e9,
        usd_per_hour=2.70,
        price_source="in us-east5, public notes of 2026-08-01",
        chips_per_host=8,
        topologies=("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    ),
}


def topology_names() -> list[str]:
    """List the names of all known topologies, such as `v5e:4x8`."""
    return [f"{name}:{shape}" for name, chip in CHIPS.items() for shape in chip.topologies]


def chips_of(topology: str) -> int:
    """Count the chips of a topology such as `v5e:4x8`."""
    return math.prod(map(int, topology.partition(":")[2].split("x")))
