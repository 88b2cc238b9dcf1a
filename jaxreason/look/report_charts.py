"""Charts of the runs of a report: evaluations over steps or cost, and training metrics
over the steps of a phase.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxreason.look import runs as runs_
from jaxreason.look.chart import Chart, Series
from jaxreason.look.paired import of_suite, suites_of
from jaxreason.look.runs import Group, Run

UNITS = {"steps": "steps", "flops": "FLOPs", "tokens": "tokens", "joules": "joules", "seconds": "wall time"}
MOST_POINTS = 200  # of a line of training metrics; more are averaged
ALL_POINTS = 1600  # of a chart of them
SHOWN = {  # training metrics that are always in sight, with their titles
    "rollout/reward": "Reward",
    "rollout/correct": "Correct attempts (share)",
    "rollout/length": "Response length (tokens)",
    "rollout/cut": "Attempts cut off at the limit (share)",
    "train/entropy": "Entropy (nats per token)",
    "train/loss": "Loss",
    "train/nll": "Negative log-likelihood (nats per token)",
    "train/grad_norm": "Gradient norm",
    "train/kl": "KL to the reference policy (nats per token)",
    "rollout/kl_sampler_learner": "KL of sampler to learner (nats per token)",
    "rollout/informative_groups": "Groups with unequal rewards (share)",
    "perf/tokens_per_s": "Tokens learned per second",
}
SHARES = ("rollout/correct", "rollout/informative_groups")
FROM_ZERO = ("rollout/length", "rollout/cut", "train/entropy", "perf/tokens_per_s")


class Line(NamedTuple):
    """A quantity that evaluations measure, as one line of a chart: `read` returns
    step -> (value, low, high) of a run.
    """

    name: str
    read: Callable[[Run], dict[int, tuple[float, float | None, float | None]]]


class Quantity(NamedTuple):
    """Content of one chart of evaluations: lines, each for all groups."""

    title: str
    lines: list[Line]
    y_range: tuple[float | None, float | None]


def evaluated(groups: Sequence[Group]) -> list[Quantity]:
    """List what the evaluations of some runs measure.

    The temperatures of a suite share a chart if there is one group.
    """
    found: list[Quantity] = []
    by_suite: dict[str, list[Line]] = {}
    for suite, temperature in suites_of(groups):
        name = "greedy" if temperature == 0 else f"T={temperature:g}"
        by_suite.setdefault(suite, []).append(Line(name, accuracies(suite, temperature)))
    for suite, lines in by_suite.items():
        title = f"Accuracy on {suite[:80]}"
        if len(groups) == 1:
            found.append(Quantity(title + (f", {lines[0].name}" if len(lines) == 1 else ""), lines, (0.0, 1.0)))
        else:
            found += [Quantity(f"{title}, {line.name}", [line], (0.0, 1.0)) for line in lines]
    texts = {name for group in groups for run in group.runs for line in run.lines for name in line if is_text(name)}
    for name in sorted(texts):
        title = f"Negative log-likelihood of {name.split('/', 1)[1].removesuffix('/nll')[:80]} (nats per token)"
        found.append(Quantity(title, [Line("", losses(name))], (None, None)))
    return found


def is_text(name: str) -> bool:
    return name.startswith("eval/") and name.endswith("/nll")


def accuracies(suite: str, temperature: float) -> Callable:
    return lambda run: {e.step: (e.accuracy, e.low, e.high) for e in of_suite(run, suite, temperature)}


def losses(name: str) -> Callable:
    return lambda run: {
        line["step"]: (value, None, None) for line in run.lines if (value := runs_.number(line.get(name))) is not None
    }


def units(runs: Sequence[Run]) -> list[str]:
    """List what evaluations can be drawn against."""
    return [unit for unit in UNITS if any(runs_.steps_to(run, unit, [0]) is not None for run in runs)]


def evaluation_chart(quantity: Quantity, groups: Sequence[Group], unit: str, phase: str | None) -> Chart:
    """Draw a quantity against a unit, over the whole run or one phase."""
    label, scale = unit_scale(unit, [run for group in groups for run in group.runs])
    series: list[Series] = []
    for i, group in enumerate(groups):
        for j, line in enumerate(quantity.lines):
            parts = (group.label if len(groups) > 1 else "", line.name if len(quantity.lines) > 1 else "")
            name = ", ".join(filter(None, parts)) or quantity.title
            series += evaluation_series(name, line, group, unit, phase, scale, color=i if len(groups) > 1 else j)
    since = f" since the start of phase {phase[:40]}" if phase else ""
    banded, y_range = any(s.spread == "band" for s in series), quantity.y_range
    series = cut_intervals(series, y_range)
    return Chart(quantity.title, f"{label}{since}", series, "range" if banded else "95 %", y_range, whole_x=unit == "steps")


def unit_scale(unit: str, runs: Sequence[Run]) -> tuple[str, float]:
    """Return the label of an axis, and the factor of its values."""
    if unit != "seconds":
        return UNITS[unit], 1.0
    longest = max([0.0, *(time for run in runs if (time := runs_.wall_s(run)) is not None)])
    name, seconds = ("s", 1.0) if longest < 600 else ("minutes", 60.0) if longest < 3 * 3600 else ("hours", 3600.0)
    return f"wall time ({name})", 1 / seconds


def evaluation_series(
    name: str, line: Line, group: Group, unit: str, phase: str | None, scale: float, color: int
) -> list[Series]:
    """Make the line of a group: of one run with its intervals, of several with their
    range. Runs without a step in common get a line each.
    """
    found = []
    for run in group.runs:
        start = 0 if phase is None else next((p.before for p in runs_.phases(run) if p.name == phase), None)
        end = None if start is None or phase is None else next((p.before for p in runs_.phases(run) if p.before > start), None)
        points = {} if start is None else {s: v for s, v in line.read(run).items() if s >= start and (end is None or s <= end)}
        x = runs_.steps_to(run, unit, [start or 0, *points])
        if points and x is not None:
            offset = x[0] if phase else 0.0
            places = [(value - offset) * scale for value in x[1:]]
            found.append({step - (start or 0): (place, *value) for place, (step, value) in zip(places, points.items())})
    if not found:
        return []
    common = sorted(set.intersection(*map(set, found)))
    if len(found) == 1 or not common:
        names = [name] if len(found) == 1 else [f"{name}, run {i}" for i in range(1, len(found) + 1)]
        return [interval_series(n, points, color) for n, points in zip(names, found)]
    x_RT = np.array([[points[step][0] for step in common] for points in found])
    y_RT = np.array([[points[step][1] for step in common] for points in found])
    return [mean_series(name, x_RT.mean(axis=0), y_RT, color)]


def interval_series(name: str, points: Mapping[int, tuple], color: int) -> Series:
    x, y, low, high = zip(*points.values())
    has_interval = any(value is not None for value in low)
    return Series(name, x, y, low if has_interval else (), high if has_interval else (), color=color)


def mean_series(name: str, x_T: np.ndarray, y_RT: np.ndarray, color: int) -> Series:
    """Make the line of several runs: their mean, range and t-interval."""
    low_T, high_T = t_intervals(y_RT)
    more = {"t-interval, low": rounded(low_T), "t-interval, high": rounded(high_T)}
    ends = y_RT.min(axis=0).tolist(), y_RT.max(axis=0).tolist()
    return Series(name, x_T.tolist(), y_RT.mean(axis=0).tolist(), *ends, "band", color, more)


def cut_intervals(series: Sequence[Series], y_range: tuple[float | None, float | None]) -> list[Series]:
    """Cut t-intervals to the values that a quantity can have: see
    `estimators.mean_interval`.
    """
    least, most = (bound if y is None else y for y, bound in zip(y_range, (-np.inf, np.inf)))
    return [s._replace(more={name: np.clip(y_T, least, most).tolist() for name, y_T in s.more.items()}) for s in series]


def t_intervals(y_RT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % t-intervals over runs at all steps: see
    `estimators.mean_interval`.
    """
    from scipy.stats import t

    R, _ = y_RT.shape
    mean_T, half_T = y_RT.mean(axis=0), float(t.ppf(0.975, R - 1)) * y_RT.std(axis=0, ddof=1) / np.sqrt(R)
    return mean_T - half_T, mean_T + half_T


def rounded(values: Sequence[float]) -> list[float]:
    """Round to seven digits, to keep the page small."""
    return [float(f"{value:.7g}") for value in values]


# --- training ---


def training_charts(groups: Sequence[Group], phase: str) -> tuple[list[Chart], list[Chart], dict[str, float]]:
    """Draw the training metrics of a phase.

    Return the charts that are always in sight, the others, and the values of metrics
    that never change.
    """
    lines = [line for group in groups for run in group.runs for _, line in runs_.training_lines(run) if line["phase"] == phase]
    values: dict[str, set[float]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith(("train/", "rollout/", "perf/")) and runs_.number(value) is not None:
                values.setdefault(name, set()).add(value)
    constant = {name: next(iter(seen)) for name, seen in values.items() if len(seen) == 1 and len(lines) > 1}
    moving = [name for name in values if name not in constant]
    shown = [name for name in SHOWN if name in moving]
    made = {name: training_chart(name, groups, phase) for name in [*shown, *sorted(set(moving) - set(shown))]}
    return [made[name] for name in shown], [chart for name, chart in made.items() if name not in SHOWN], constant


def training_chart(metric: str, groups: Sequence[Group], phase: str) -> Chart:
    """Draw a training metric over the steps of a phase."""
    series, sizes = [], set()
    most = max(40, min(MOST_POINTS, ALL_POINTS // len(groups)))
    for i, group in enumerate(groups):
        found = [curve for run in group.runs if (curve := runs_.training_curve(run, metric, phase))]
        common = sorted(set.intersection(*map(set, found))) if found else []
        curves = [found] if common else [[curve] for curve in found]
        for j, together in enumerate(curves):
            name = group.label if len(curves) == 1 else f"{group.label}, run {j + 1}"
            steps = common or sorted(together[0])
            y_RT = np.array([[curve[step] for step in steps] for curve in together], np.float64)
            size = -(-len(steps) // most)
            sizes.add(size)
            series.append(training_series(name, np.array(steps, np.float64), y_RT, size, color=i))
    note = f"mean of {max(sizes)} lines per point" if max(sizes, default=1) > 1 else ""
    y_range = (0.0, 1.0) if metric in SHARES else (0.0, None) if metric in FROM_ZERO else (None, None)
    y = [value for s in series for value in s.y if value is not None]
    log = metric == "train/grad_norm" and min(y) > 0 and max(y) / min(y) > 100
    title = SHOWN.get(metric, metric[:80])
    return Chart(title, "steps of the phase", cut_intervals(series, y_range), "range", y_range, log, note, whole_x=True)


def training_series(name: str, x_T: np.ndarray, y_RT: np.ndarray, size: int, color: int) -> Series:
    """Make the line of a metric; each of its points is the mean of `size` steps."""
    if size > 1:
        starts = np.arange(0, len(x_T), size)
        counts = np.diff([*starts, len(x_T)])
        x_T = np.add.reduceat(x_T, starts) / counts
        y_RT = np.add.reduceat(y_RT, starts, axis=1) / counts
    if len(y_RT) > 1:
        made = mean_series(name, x_T, y_RT, color)
        return made._replace(x=rounded(made.x), y=rounded(made.y), low=rounded(made.low), high=rounded(made.high))
    return Series(name, rounded(x_T), rounded(y_RT[0]), color=color)
