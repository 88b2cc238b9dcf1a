"""Time that this thread spent compiling: tracing, lowering and XLA, including reads
from the compilation cache.

JAX reports the duration of each part to a listener when the part ends. Parts can
overlap (a function traced within another), so `Covered` measures the union of their
time spans. Compilation in other threads, such as background sampling, does not block
this one and is not counted.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import threading
import time
from pathlib import Path

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


def keep_compiled(folder: str | None) -> None:
    """Keep compiled programs in `folder`.

    None means the default folder, or JAX_COMPILATION_CACHE_DIR if that is set.
    """
    if folder is None:
        if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            return
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "jaxreason")
    if folder:
        folder = os.path.expanduser(folder)
        # A program compiled for one kind of CPU may not run on another, and JAX's cache
        # key does not include the kind.
        cpu = Path("/proc/cpuinfo")
        kind = (
            next((line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
            if cpu.is_file()
            else ""
        )
        kind = hashlib.sha256(f"{platform.processor()} {kind}".encode()).hexdigest()[:8]
        jax.config.update("jax_compilation_cache_dir", str(Path(folder) / f"{platform.machine()}-{kind}"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
