"""One table of all that differs by platform: the algorithm itself has no branch on a
backend.

The figures behind the rows are in `jaxreason/bench/README.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax


class Platform(NamedTuple):
    """Sizes and choices of one platform."""

    logits_at_once: int  # logits that exist at a time on a device, at most
    logits_kept: int  # logits of a micro-batch that are kept for the backward pass, at most; of more they are made again
    prefill_tokens: int  # tokens that a device prefills at a time
    share_prompts_from: int  # slots share prompts that may have this many tokens
    scan_layers: bool  # scan over layers instead of unrolling them
    fine_buckets: bool  # compile decode steps for more lengths of the cache
    dtype: str  # of the computation, where a model names none
    compiler_options: Mapping[str, Any] | None  # of the train step


PLATFORMS = {
    # 32 MiB of float32 logits may stay in a cache, and 256 MiB are quicker to keep than
    # to make again. Sharing pays with long prompts only, since rows that no slot
    # continues are computed too. Its scheduler would order instructions to have many
    # ready at a time, whatever they keep alive.
    "cpu": Platform(
        logits_at_once=2**23,
        logits_kept=2**26,
        prefill_tokens=128,
        share_prompts_from=512,
        scan_layers=False,
        fine_buckets=True,
        dtype="float32",
        compiler_options={"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    ),
    # Matrix products of fewer rows would leave an accelerator idle, and each program
    # takes long to compile.
    "gpu": Platform(2**27, 2**27, 1024, 0, True, False, "bfloat16", None),
    "tpu": Platform(2**27, 2**27, 1024, 0, True, False, "bfloat16", None),
}
LARGE_GPU_BYTES = 48 * 2**30  # a GPU with this much memory makes four times as many logits at a time


def name_of(mesh=None) -> str:
    """The platform of a mesh; None: of the default device."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def platform_of(mesh=None) -> Platform:
    """The row of a mesh; None: of the default device."""
    name = name_of(mesh)
    row = PLATFORMS[name]
    if name == jax.default_backend() == "gpu" and jax.local_devices()[0].memory_stats()["bytes_limit"] >= LARGE_GPU_BYTES:
        return row._replace(logits_at_once=4 * row.logits_at_once, logits_kept=4 * row.logits_kept)
    return row
