"""Memory that was freed goes back to the system.

glibc keeps freed memory for later. Compiling a train step leaves it memory that no
array fits into. A GRPO step peaks a fifth lower with this module
(jaxreason/bench/README.md).
"""

from __future__ import annotations

import ctypes

import jax

LIBC = ctypes.CDLL(None)
COMPILED = "/jax/core/compile/backend_compile_duration"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def give_back(after_s: float = 1.0) -> None:
    """From now on give freed memory back: after each compilation of `after_s` or
    longer, and large arrays as they are freed.

    For a process to call once, at its start. Without glibc nothing changes.
    """
    if not hasattr(LIBC, "malloc_trim"):
        return
    # By itself glibc raises the first to the largest array that was freed, 32 MiB at
    # most, and then keeps what is smaller; where it is set, the second has to be. What
    # was given back is cleared page by page when it is wanted again, at once in the
    # case of scratch for matrix products: in one micro-batch, four attempts to a
    # prompt, that step took 9.4 s with 1 MiB here and 8.4 with this and `trim` (medians
    # of 3 and 2), and peaked at 4,510 and 4,810 MiB.
    LIBC.mallopt(M_MMAP_THRESHOLD, 2**23)
    LIBC.mallopt(M_TRIM_THRESHOLD, 2**26)

    def compiled(event: str, seconds: float, **_) -> None:
        if event == COMPILED and seconds >= after_s:
            trim()

    jax.monitoring.register_event_duration_secs_listener(compiled)


def trim() -> None:
    """Give back all that is free now: for the end of something large, such as the
    sampler's weights.
    """
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)
