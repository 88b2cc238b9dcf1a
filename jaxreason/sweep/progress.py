"""The live table of a sweep: arms x seeds, and what each run is doing."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jaxreason.runtime.terminal import duration
from jaxreason.runtime.workdir import last_metrics
from jaxreason.sweep.queue import Running, State
from jaxreason.sweep.runs import SweepRun

EVERY_S = 2.0  # the table is drawn
QUIET_EVERY_S = 60.0  # a line is printed where there is no terminal


def cell(run: SweepRun, state: Mapping, metric: str) -> str:
    """Return the table's text about a run: its phase, step, reward and accuracy."""
    status = state.get("status", "waiting")
    if status == "waiting":
        return "shared" if run.shared and not run.folder.exists() else "waiting"
    values = last_metrics(run.folder)
    accuracy = f" {values[metric]:.3f}" if isinstance(values.get(metric), float) else ""
    if status != "running":
        return status + accuracy
    step = values.get("step", 0)
    reward = f" r {values['rollout/reward']:.2f}" if isinstance(values.get("rollout/reward"), float) else ""  # null: not finite
    return f"{values.get('phase', 'start')} {step}/{run.steps}{reward}{accuracy}"


def remaining_s(running: Sequence[Running], runs: Sequence[SweepRun], state: State, workers: int) -> float | None:
    """Estimate the seconds until all runs are done, from the pace of those that run and
    the times of those that are done; None if there is neither.
    """
    rates = []
    for one in running:
        values = last_metrics(one.run.folder)
        if (seconds := values.get("time/step_s")) and values.get("step"):
            rates.append(seconds * (one.run.steps - values["step"]))
    done_s = [s for run in runs if (s := state.of(run).get("seconds"))]
    waiting = sum(state.of(run)["status"] == "waiting" for run in runs)
    if not rates or (waiting and not done_s):
        return None
    return max(rates) + (waiting * sum(done_s) / len(done_s) / max(1, workers) if waiting else 0.0)


def draw(runs: Sequence[SweepRun], state: State, metric: str, left_s: float | None) -> Table:
    """The table: a row per arm, a column per seed."""
    arms, seeds = list(dict.fromkeys(run.arm for run in runs)), list(dict.fromkeys(run.seed for run in runs))
    by_cell = {(run.arm, run.seed): run for run in runs if run.stop_after is None}
    title = f"{sum(state.of(run)['status'] == 'done' for run in runs)} of {len(runs)} runs done"
    made = Table(box=box.SIMPLE_HEAD, title=title + (f", about {duration(left_s)} left" if left_s else ""), title_justify="left")
    made.add_column("arm")
    for seed in seeds:
        made.add_column(f"seed {seed}", no_wrap=True)
    for arm in arms:
        cells = [
            cell(by_cell[arm, seed], state.of(by_cell[arm, seed]), metric) if (arm, seed) in by_cell else "" for seed in seeds
        ]
        made.add_row(Text(arm), *map(Text, cells))
    shared = [run for run in runs if run.stop_after is not None]
    if shared:
        cells = [next((cell(run, state.of(run), metric) for run in shared if run.seed == seed), "") for seed in seeds]
        made.add_row(Text("(shared phases)", style="dim"), *map(Text, cells))
    return made


@contextlib.contextmanager
def shown(runs: Sequence[SweepRun], state: State, metric: str, workers: int):
    """Yield `(show, say)`: the one draws the table where there is a terminal, and
    prints a line a minute where there is none; the other prints a line.
    """
    console = Console(highlight=False)
    if not sys.stdout.isatty():
        yield _quiet(runs, state), printer(console)
        return
    last = [0.0]
    with Live(draw(runs, state, metric, None), console=console, refresh_per_second=2) as live:

        def show(running: Sequence[Running]) -> None:
            if time.monotonic() - last[0] >= EVERY_S:
                last[0] = time.monotonic()
                live.update(draw(runs, state, metric, remaining_s(running, runs, state, workers)))

        yield show, printer(live.console)
        live.update(draw(runs, state, metric, None))


def printer(console: Console) -> Callable[[str], None]:
    """Return what prints a line of plain text."""
    return lambda line: console.print(Text(line), soft_wrap=True)


def _quiet(runs: Sequence[SweepRun], state: State) -> Callable[[Sequence[Running]], None]:
    last = [0.0]

    def show(running: Sequence[Running]) -> None:
        if time.monotonic() - last[0] < QUIET_EVERY_S:
            return
        last[0] = time.monotonic()
        done = sum(state.of(run)["status"] == "done" for run in runs)
        doing = [f"{one.run.name} {last_metrics(one.run.folder).get('step', 0)}/{one.run.steps}" for one in running]
        print(f"{done} of {len(runs)} runs done; running: {', '.join(doing) or 'none'}", flush=True)

    return show
