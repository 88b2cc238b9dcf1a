"""Return freed memory to the system.

glibc keeps freed memory for reuse. Compiling a train step leaves free memory that is
too fragmented for arrays. With this module the peak memory of a GRPO step is a fifth
lower (jaxreason/bench/README.md).
"""

from __future__ import annotations

import ctypes
import os
import threading
import time

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
    program's results are ready, so a trim at once may come too early. Calls before the
    trim of an earlier one share its thread, which then trims once more: steps may be
    shorter than a trim.
    """
    if hasattr(LIBC, "malloc_trim") and SOON.ask():
        threading.Thread(target=trim_while_asked, args=(after_s,), name="trim", daemon=True).start()


class Soon:
    """Whether memory is to be returned, and whether a thread does so."""

    def __init__(self):
        self.lock = threading.Lock()
        self.asked = self.working = False

    def ask(self) -> bool:
        """Ask for a trim; tell whether a thread must be started for it."""
        with self.lock:
            self.asked, idle, self.working = True, not self.working, True
            return idle

    def take(self) -> bool:
        """Take what was asked for; tell whether there was anything. If not, the thread
        ends.
        """
        with self.lock:
            self.asked, self.working = False, self.asked
            return self.working


SOON = Soon()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=SOON.__init__)  # a forked process has no thread but the one that forked


def trim_while_asked(after_s: float) -> None:
    while SOON.take():
        time.sleep(after_s)
        trim()
