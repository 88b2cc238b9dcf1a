"""Time that this thread spent compiling: tracing, lowering and XLA itself, programs
read from a cache included.

JAX tells a listener of each part when it ends. Parts contain others (a function that is
traced within another), so what counts is the time that they cover together. Other
threads, such as one that samples in the background, do not hold up this one.
"""

from __future__ import annotations

import functools
import threading
import time

import jax

PARTS = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")


class Covered(threading.local):
    """The spans of time that parts cover together, of this thread."""

    def __init__(self):
        self.spans: list[tuple[float, float]] = []  # in order, apart from each other
        self.total_s = 0.0

    def add(self, start_s: float, end_s: float) -> None:
        """Add a span that ends after all others."""
        while self.spans and self.spans[-1][1] > start_s:
            first_s, last_s = self.spans.pop()
            self.total_s -= last_s - first_s
            start_s = min(start_s, first_s)
        self.spans.append((start_s, end_s))
        self.total_s += end_s - start_s


_covered = Covered()


def _heard(event: str, duration_s: float, **_) -> None:
    if event.rpartition("/")[2] in PARTS:
        now_s = time.perf_counter()
        _covered.add(now_s - duration_s, now_s)


@functools.cache
def listen() -> None:
    """Begin to count, once per process."""
    jax.monitoring.register_event_duration_secs_listener(_heard)


def seconds() -> float:
    """Seconds that this thread has spent compiling since the process first asked."""
    listen()
    return _covered.total_s
