"""One table of everything that differs by platform; algorithms do not branch on a
backend.

The measurements behind the rows are in `jaxreason/bench/README.md`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Platform(NamedTuple):
    """Sizes and choices of one platform."""

    logits_at_once: int  # logits on a device at one time, at most
    logits_kept: int  # logits per micro-batch kept for the backward pass; more are recomputed
    logits_tile: tuple[int, int] | None  # tokens x symbols of which more logits than may be kept are computed; None: no tiles
    tokens_at_once: int | None  # of a micro-batch on a device, if it may be chosen; None: by the size of the cache
    prefill_tokens: int  # tokens that a device prefills at one time
    share_prompts_from: int  # slots share prompts if max_prompt_tokens is at least this
    scan_layers: bool  # scan over layers instead of unrolling them
    fine_buckets: bool  # compile decode steps for more cache lengths
    write_after: bool  # a decode step writes its key and value after attending
    dtype: str  # of the computation, if a model names none
    compiler_options: Mapping[str, Any] | None  # of the train step


# Smaller matrix products would leave an accelerator idle, and each program takes long
# to compile.
ACCELERATOR = Platform(
    logits_at_once=2**27,
    logits_kept=2**27,
    logits_tile=None,
    tokens_at_once=2**13,
    prefill_tokens=1024,
    share_prompts_from=0,
    scan_layers=True,
    fine_buckets=False,
    write_after=False,
    dtype="bfloat16",
    compiler_options=None,
)
PLATFORMS = {
    # 32 MiB of float32 logits may fit in a processor cache, and 256 MiB are faster to
    # keep than to recompute. Sharing pays only for long prompts, because prompt rows
    # without a slot are computed too. XLA:CPU's default scheduler favours concurrency
    # over memory.
    "cpu": Platform(
        logits_at_once=2**23,
        logits_kept=2**26,
        logits_tile=None,
        tokens_at_once=None,
        prefill_tokens=128,
        share_prompts_from=512,
        scan_layers=False,
        fine_buckets=True,
        write_after=False,
        dtype="float32",
        compiler_options={"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    ),
    "gpu": ACCELERATOR,
    # A tile of float32 logits fits in the vector memory (128 MiB on a v5e), so that
    # logits are neither written to HBM nor read from it.
    "tpu": ACCELERATOR._replace(logits_tile=(4096, 4096), write_after=True),
}
# A v5p's compiler keeps no tile of logits in vector memory. Larger tiles then move
# fewer bytes: the head's gradient is read and written once per chunk of tokens.
TILE_OF_V5P = (8192, 8192)
V5P = ("TPU v5", "TPU v5p")  # its device kinds; a v5e is a "TPU v5 lite"
LARGE_GPU_BYTES = 48 * 2**30  # GPUs with this much memory get four times the limits on logits


def name_of(mesh=None) -> str:
    """Return the platform of a mesh; None means that of the default device."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def kind_of(mesh=None) -> str:
    """Return the kind of a mesh's devices; None means the default device."""
    return (jax.devices() if mesh is None else mesh.devices.flat)[0].device_kind


def platform_of(mesh=None) -> Platform:
    """Return the table row of a mesh; None means that of the default device."""
    name = name_of(mesh)
    row = PLATFORMS[name]
    if name == jax.default_backend() == "gpu" and jax.local_devices()[0].memory_stats()["bytes_limit"] >= LARGE_GPU_BYTES:
        return row._replace(logits_at_once=4 * row.logits_at_once, logits_kept=4 * row.logits_kept)
    if name == "tpu" and kind_of(mesh) in V5P:
        return row._replace(logits_tile=TILE_OF_V5P)
    return row


CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # of Linux
UNKNOWN_CACHE_BYTES = 2**24
SHARE_OF_LAST_LEVEL = 32  # times the cache of one core, at most: many cores may share the last level


@functools.cache
def cache_bytes() -> int:
    """Return the bytes of a CPU's last cache, or of a part of it if it is large.

    Processes of one run get the same number, whatever their machines: their programs
    must be alike.
    """
    if jax.process_count() > 1:
        return UNKNOWN_CACHE_BYTES
    found = {}
    for level in CACHES.glob("index*/level"):
        with contextlib.suppress(OSError, ValueError):  # a virtual machine may leave files out, or empty
            if (size := in_bytes(read(level.with_name("size")))) > 0:
                found[int(read(level))] = size
    if 3 not in found:
        return found.get(2, UNKNOWN_CACHE_BYTES)
    return min(found[3], SHARE_OF_LAST_LEVEL * found.get(2, found[3]))


def read(path: Path) -> str:
    return path.read_text().strip()


def in_bytes(size: str) -> int:
    """Return the bytes of a size such as 1024K or 32M."""
    return int(size.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1], 1)
