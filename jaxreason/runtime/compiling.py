"""Time that this thread spent compiling: tracing, lowering and XLA, including reads
from the compilation cache.

JAX reports the duration of each part to a listener when the part ends. Parts can
overlap (a function traced within another), so `Covered` measures the union of their
time spans. Compilation in other threads, such as background sampling, does not block
this one and is not counted.
"""

from __future__ import annotations

import functools
import threading
import time

import jax

PARTS = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")


class Covered(threading.local):
    """The union of the time spans of this thread's compilations."""

    def __init__(self):
        self.spans: list[tuple[float, float]] = []  # sorted and disjoint
        self.total_s = 0.0

    def add(self, start_s: float, end_s: float) -> None:
        """Add a span that ends after all earlier ones."""
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
    """Start counting; only the first call in a process has an effect."""
    jax.monitoring.register_event_duration_secs_listener(_heard)


def seconds() -> float:
    """Return the seconds that this thread has spent compiling since `listen` was first
    called in this process.
    """
    listen()
    return _covered.total_s
