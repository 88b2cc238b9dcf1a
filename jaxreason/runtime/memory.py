"""Return freed memory to the system.

glibc keeps freed memory for reuse. Compiling a train step leaves free memory that is
too fragmented for arrays. With this module the peak memory of a GRPO step is a fifth
lower (jaxreason/bench/README.md).
"""

from __future__ import annotations

import ctypes
import threading

import jax

LIBC = ctypes.CDLL(None)
COMPILED = "/jax/core/compile/backend_compile_duration"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def give_back(after_s: float = 1.0) -> None:
    """Return freed memory to the system from now on: after each compilation of
    `after_s` or longer, and each large array when it is freed.

    Call it once per process, at the start. Without glibc it does nothing.
    """
    if not hasattr(LIBC, "malloc_trim"):
        return
    # By default glibc raises the mmap threshold to the size of the largest freed array
    # (at most 32 MiB) and keeps smaller freed blocks. Setting this threshold turns that
    # off, for the trim threshold too, so both are set. A lower threshold would be
    # slower: the kernel clears returned pages when they are needed again, soon for the
    # scratch memory of matrix products (jaxreason/bench/README.md).
    LIBC.mallopt(M_MMAP_THRESHOLD, 2**25)
    LIBC.mallopt(M_TRIM_THRESHOLD, 2**26)

    def compiled(event: str, seconds: float, **_) -> None:
        if event == COMPILED and seconds >= after_s:
            trim()

    jax.monitoring.register_event_duration_secs_listener(compiled)


def trim() -> None:
    """Return all memory that is free now."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def trim_soon(after_s: float = 0.1) -> None:
    """Return all memory that is free a moment from now, in the background. Call it
    after a large release, such as of the sampler's weights.

    XLA frees the arrays that a program has read on a thread of its own, after the
    program's results are ready, so a trim at once may come too early.
    """
    timer = threading.Timer(after_s, trim)
    timer.daemon = True
    timer.start()
