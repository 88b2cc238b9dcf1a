"""Time the sandbox: its start, a call, a run of a program, and how late it is past a
deadline.

    python -m jaxreason.bench sandbox --backend=bwrap

Figures: jaxreason/bench/README.md.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from absl import app, flags

from jaxreason.bench import machine
from jaxreason.options import command
from jaxreason.sandbox import Sandbox

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # they belong to the command, whose --help shows them
DEADLINE_S = 0.5


def seconds(call: Callable[[], object], repeats: int) -> Iterator[float]:
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        yield time.perf_counter() - started


def line(work: str, took_s: list[float]) -> dict:
    took_ms = sorted(1e3 * second for second in took_s)
    rounded = {"median_ms": statistics.median(took_ms), "p95_ms": took_ms[int(0.95 * len(took_ms))], "largest_ms": took_ms[-1]}
    return {"work": work, **{name: round(value, 2) for name, value in rounded.items()}, "n": len(took_ms)}


def measure(box: Sandbox, repeats: int, threads: int) -> Iterator[dict]:
    """Yield one line per kind of work."""
    sessions = []
    yield line("start", list(seconds(lambda: sessions.append(box.session()), repeats)))
    yield line("end", [next(seconds(session.close, 1)) for session in sessions])
    session = box.session()
    yield line("call", list(seconds(lambda: session.run("1 + 1"), 10 * repeats)))
    forked = {"do": "run", "fork": True, "code": "print(1)", "stdin": ""}
    yield line("program in a living sandbox", list(seconds(lambda: session.result(forked), repeats)))
    session.close()
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: box.run("print(1)"), range(repeats)))
    rate = repeats / (time.perf_counter() - started)
    yield {"work": f"program in a fresh sandbox, {threads} threads", "runs_per_s": round(rate, 1), "n": repeats}
    late = [took_s - DEADLINE_S for took_s in seconds(lambda: box.run("while True: pass", timeout_s=DEADLINE_S), 10)]
    yield line(f"past a deadline of {DEADLINE_S} s, start and end included", late)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        machine.refuse(argv, "flags alone; --help lists them")
    try:
        box = Sandbox(FLAGS.backend)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    for found in measure(box, FLAGS.repeats, FLAGS.threads):
        print(json.dumps({"backend": FLAGS.backend, **found}), flush=True)


def run() -> None:
    """Define the flags and run the benchmark."""
    flags.DEFINE_string("backend", "bwrap", "bwrap or rlimits.")
    flags.DEFINE_integer("repeats", 50, "Timed starts and runs; calls are ten times as many.", lower_bound=1)
    flags.DEFINE_integer("threads", 4, "Threads that run programs at the same time.", lower_bound=1)
    app.run(main, flags_parser=command.parse_or_exit)
