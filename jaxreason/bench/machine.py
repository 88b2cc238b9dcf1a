"""Best rates of this machine, and the printer of measurements."""

from __future__ import annotations

import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from absl import flags

flags.disclaim_key_flags()  # they belong to the command, whose --help shows them


def define_numbers(name: str, default: list[str], help: str) -> None:
    """Define a flag that takes positive integers, separated by commas."""
    flags.DEFINE_list(name, default, help)
    allowed = "allowed: integers of 1 or more, separated by commas"
    flags.register_validator(name, lambda given: given and all(x.isdecimal() and int(x) > 0 for x in given), allowed)


def refuse(argv: Sequence[str], needed: str) -> NoReturn:
    """Exit with a line that names the arguments that are not flags, and the needed
    flags.
    """
    got = f"got the arguments {' '.join(argv[1:])!r}; " if argv[1:] else ""
    sys.exit(f"error: {got}needed: {needed}")


class Ceiling(NamedTuple):
    """Best measured rates of this machine."""

    flops_per_s: float  # matrix products
    bytes_per_s: float  # reading memory


def pin(cores: int) -> int:
    """Bind this process to its first `cores` cores (0: all that it may use) and return
    how many it got. Call before jax is imported.
    """
    mine = sorted(os.sched_getaffinity(0))
    count = min(cores or len(mine), len(mine))
    os.sched_setaffinity(0, mine[:count])
    if count == 1:  # XLA's thread pool has a thread per core of the machine, not of this process
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    return count


def seconds(function: Callable, repeats: int = 5, warmup: int = 1) -> list[float]:
    """Return the sorted times of `function()`, which must block until its work is
    done.
    """
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        function()
        times.append(time.perf_counter() - started_s)
    return sorted(times)


def measure(shapes: Sequence[tuple[int, int, int]], dtype: str) -> Ceiling:
    """Measure the rates of matrix products and of reading memory. Products are a square
    one and `shapes` (rows, inputs, outputs); the best rate counts.
    """
    import jax
    import jax.numpy as jnp

    big = 2048 if jax.default_backend() == "cpu" else 8192
    best = 0.0
    products = [jax.jit(jnp.matmul), jax.jit(lambda x, w: jnp.matmul(w.T, x.T))]  # the weights on the right, or on the left
    for rows, inputs, outputs in [(big, big, big), *shapes]:
        x = jnp.full((rows, inputs), 0.5, dtype)
        w = jnp.full((inputs, outputs), 0.5, dtype)
        times = max(1, int((2e9 if big == 2048 else 2e12) / (2 * rows * inputs * outputs)))
        for product in products:

            def work(product=product, x=x, w=w, times=times):
                for _ in range(times):
                    y = product(x, w)
                y.block_until_ready()

            best = max(best, 2 * rows * inputs * outputs * times / statistics.median(seconds(work)))
    numbers = jnp.ones((64 if big == 2048 else 512) * 2**20, jnp.float32)
    total, copied = jax.jit(jnp.sum), jax.jit(lambda x: x + 1)
    read = numbers.nbytes / statistics.median(seconds(lambda: total(numbers).block_until_ready()))
    # A GPU sums more slowly than it copies; a copy reads and writes.
    read = max(read, 2 * numbers.nbytes / statistics.median(seconds(lambda: copied(numbers).block_until_ready())))
    if big == 2048:  # XLA sums slowly, on one core; NumPy's dot product is limited by memory alone
        import numpy as np

        a, b = np.ones(64 * 2**20, np.float32), np.ones(64 * 2**20, np.float32)
        read = max(read, 2 * a.nbytes / statistics.median(seconds(lambda: float(a @ b))))
    return Ceiling(best, read)


def peak_bytes() -> int:
    """Return the peak memory in bytes: of the device, or of this process where the
    device is the host.
    """
    import jax

    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def printer(work: str, cores: int) -> Callable:
    """Make `show(what, values, unit, **more)`, which prints the median of `values` as
    one JSON line.
    """
    import jax

    always = {"work": work, "cores": cores, "device": jax.devices()[0].device_kind, "devices": jax.device_count()}
    always |= {"jax": jax.__version__, "date": datetime.date.today().isoformat()}

    def show(what: str, values, unit: str, **more) -> None:
        values = values if isinstance(values, list) else [values]
        value = {"value": round(statistics.median(values), 4), "unit": unit, "median_of": len(values)}
        spread = {"spread": [round(min(values), 4), round(max(values), 4)]} if len(values) > 1 else {}
        print(json.dumps({"what": what, **value, **spread, **more, **always}), flush=True)

    return show
