"""What the runs of a sweep measured, read from their folders, and what follows from it:
arms, comparisons with the baseline, effects of fields.

Two intervals of an arm answer two questions. The one over seeds says what another run
of the arm would give; the one over problems what these runs would give on other
problems. A comparison pairs runs of one seed: what a seed makes of both arms cancels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxreason import estimators
from jaxreason.options import unknown_name_message
from jaxreason.runtime.workdir import json_object

FEW_PROBLEMS = 100  # below it a bootstrap over problems is too optimistic


class Result(NamedTuple):
    """A run that is done."""

    arm: str
    seed: int
    value: float  # of the metric
    low: float  # 95 %, over problems
    high: float
    n: int  # problems
    verdicts: str  # a letter per problem: 1 is correct
    flops: float
    device_s: float
    joules: float
    wall_s: float
    code: str  # version of the package's sources


class ArmSummary(NamedTuple):
    """An arm over its seeds."""

    name: str
    seeds: tuple[int, ...]
    mean: float
    over_seeds: tuple[float, float]  # t-interval; unbounded for one seed
    over_problems: tuple[float, float]  # see `problems_interval`
    flops: float  # means over runs, as are the others
    device_s: float
    joules: float
    wall_s: float


class Comparison(NamedTuple):
    """An arm, or a value of a field, less the one it is compared with."""

    what: str
    than: str
    seeds: tuple[int, ...]  # that both have
    difference: float
    low: float
    high: float
    p: float  # uncorrected
    how: str  # which test it is of
    corrected: float = 1.0  # for the number of comparisons (Holm)
    sign_flip: float | None = None  # exact p-value over seeds
    needed: int | None = None  # paired seeds that would show a difference of this size, with power 0.8


def parse_metric(metric: str | None, config: Mapping[str, Any]) -> tuple[str, float]:
    """Return the suite and the temperature of `eval/SUITE/MODE/accuracy`; None is the
    first of each.

    Raises:
      ValueError: the config evaluates no such thing.
    """
    suites, temperatures = list(config["evaluate"]["suites"]), list(config["evaluate"]["temperatures"])
    if not suites or not temperatures:
        raise ValueError("the config evaluates no suite, so there is nothing to compare; set config.evaluate.suites")
    if metric is None:
        return suites[0], temperatures[0]
    allowed = {name_metric(suite, t): (suite, t) for suite in suites for t in temperatures}
    if metric not in allowed:
        raise ValueError(unknown_name_message("metric", metric, allowed))
    return allowed[metric]


def name_metric(suite: str, temperature: float) -> str:
    """The name in metrics.jsonl of a suite's accuracy at a temperature."""
    return f"eval/{suite}/{'greedy' if temperature == 0 else f't{temperature:g}'}/accuracy"


def read_result(folder: Path, arm: str, seed: int, suite: str, temperature: float, code: str) -> Result | None:
    """Read what a run measured at its end; None if it is not done."""
    summary = json_object(folder / "summary.json") or {}
    evaluations = [e for e in summary.get("evaluations", ()) if e["suite"] == suite and e["temperature"] == temperature]
    if summary.get("done") is not True or not evaluations:
        return None
    last, ledger = evaluations[-1], summary["ledger"]
    used = {unit: sum(kind[unit] for kind in ledger.values()) for unit in ("flops", "device_s", "joules")}
    measured = {name: last[name] for name in ("low", "high", "n")} | {"verdicts": last.get("verdicts", "")}
    return Result(arm, seed, last["accuracy"], **measured, **used, wall_s=summary["wall_s"], code=code)


def accuracy_before(run: Path, phase: str, suite: str, temperature: float) -> tuple[float, float]:
    """Return a suite's accuracy before a phase of a run, and at the end of the run."""
    evaluations = [
        e for e in json_object(run / "summary.json")["evaluations"] if e["suite"] == suite and e["temperature"] == temperature
    ]
    before = [e for e in evaluations if e["step"] <= min(e["step"] for e in evaluations if e["phase"] == phase)]
    return next(e["accuracy"] for e in reversed(before) if e["phase"] != phase), evaluations[-1]["accuracy"]


def summarise(name: str, results: Sequence[Result]) -> ArmSummary:
    """Summarise the runs of an arm."""
    mean, *over_seeds = estimators.mean_interval([r.value for r in results])
    means = {unit: float(np.mean([getattr(r, unit) for r in results])) for unit in ("flops", "device_s", "joules", "wall_s")}
    seeds = tuple(sorted(r.seed for r in results))
    return ArmSummary(name, seeds, mean, tuple(over_seeds), problems_interval(results), **means)


def problems_interval(results: Sequence[Result]) -> tuple[float, float]:
    """The 95 % interval of an arm's accuracy over problems, for these runs.

    Runs of all seeds are asked the same problems, so a problem counts once, with its
    mean over the runs. Where all problems have one mean, or there is one run, it is the
    Wilson interval of so many problems.
    """
    n = results[0].n
    value = float(np.mean([r.value for r in results]))
    if len(results) > 1 and all(len(r.verdicts) == n for r in results):
        mean_N = np.mean([[letter == "1" for letter in r.verdicts] for r in results], axis=0)
        if np.ptp(mean_N) > 0:
            _, low, high = estimators.mean_interval(mean_N)
            return max(0.0, low), min(1.0, high)
    return estimators.wilson(round(value * n), n)


def compare(arm: Mapping[int, Result], base: Mapping[int, Result], what: str, than: str) -> Comparison | None:
    """Compare two arms by the seeds that both have: seed -> result. None without one.

    With one seed the problems are paired: by McNemar's test and a bootstrap, or below
    100 problems by a posterior, which a bootstrap is too narrow for.
    """
    seeds = tuple(sorted(arm.keys() & base.keys()))
    if not seeds:
        return None
    if len(seeds) > 1:
        return over_seeds(what, than, {seed: arm[seed].value - base[seed].value for seed in seeds})
    a, b = base[seeds[0]], arm[seeds[0]]
    if not a.verdicts or len(a.verdicts) != len(b.verdicts):
        return Comparison(what, than, seeds, b.value - a.value, -np.inf, np.inf, 1.0, "one seed, no paired problems")
    right_a, right_b = ([letter == "1" for letter in r.verdicts] for r in (a, b))
    p = estimators.mcnemar(right_a, right_b)
    if len(right_a) < FEW_PROBLEMS:
        _, low, high, _ = estimators.paired_posterior(right_a, right_b)
        return Comparison(what, than, seeds, b.value - a.value, low, high, p, "one seed: McNemar, posterior over problems")
    difference, low, high = estimators.paired_bootstrap(right_a, right_b)
    return Comparison(what, than, seeds, difference, low, high, p, "one seed: McNemar, bootstrap over problems")


def over_seeds(what: str, than: str, differences: Mapping[int, float]) -> Comparison:
    """A comparison from the differences of paired seeds."""
    values = [differences[seed] for seed in sorted(differences)]
    mean, low, high = estimators.mean_interval(values)
    exact = estimators.sign_flip(values) if len(values) <= estimators.MOST_FLIPPED else None
    needed = estimators.seeds_needed(mean, float(np.std(values, ddof=1))) if len(values) > 1 else None
    p = estimators.paired_t(values)
    return Comparison(
        what, than, tuple(sorted(differences)), mean, low, high, p, "paired t over seeds", sign_flip=exact, needed=needed
    )


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Correct the p-values of a family of comparisons for their number."""
    return [c._replace(corrected=p) for c, p in zip(comparisons, estimators.holm([c.p for c in comparisons]), strict=True)]


def noise_floor(base: Sequence[Result]) -> float | None:
    """The standard deviation of the baseline over its seeds; None for one seed."""
    return float(np.std([r.value for r in base], ddof=1)) if len(base) > 1 else None


def field_effects(arms: Mapping[str, Mapping[str, Any]], results: Mapping[str, Mapping[int, Result]]) -> list[Comparison]:
    """The effect of each field's values, averaged over the settings of the other
    fields: arms that differ in nothing else are compared, with the field's first value.
    """
    found = []
    for field in dict.fromkeys(itertools.chain(*arms.values())):
        values = list(dict.fromkeys(repr(arm[field]) for arm in arms.values() if field in arm))
        alike: dict[str, dict[str, str]] = {}  # the other fields -> value -> arm
        for name, arm in arms.items():
            if field in arm:
                rest = repr(sorted((k, repr(v)) for k, v in arm.items() if k != field))
                alike.setdefault(rest, {})[repr(arm[field])] = name
        for value in values[1:]:
            both = [by_value for by_value in alike.values() if {value, values[0]} <= by_value.keys()]
            pairs = [(by_value[value], by_value[values[0]]) for by_value in both]
            pairs = [pair for pair in pairs if all(results[arm] for arm in pair)]
            seeds = set.intersection(*(results[a].keys() & results[b].keys() for a, b in pairs)) if pairs else set()
            if seeds:
                differences = {s: float(np.mean([results[a][s].value - results[b][s].value for a, b in pairs])) for s in seeds}
                what, than = (f"{field}={v.strip(chr(39))}" for v in (value, values[0]))
                single = compare(results[pairs[0][0]], results[pairs[0][1]], what, than) if len(pairs) == 1 else None
                found.append(single or over_seeds(what, than, differences))
    return corrected(found)


def pareto(summaries: Sequence[ArmSummary]) -> list[str]:
    """The arms that no other beats in both accuracy and FLOPs, cheapest first."""
    front, best = [], -np.inf
    for arm in sorted(summaries, key=lambda s: (s.flops, -s.mean)):
        if arm.mean > best:
            front.append(arm.name)
            best = arm.mean
    return front
