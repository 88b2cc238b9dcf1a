"""Results of the runs of a sweep, read from their folders, and what follows from them:
arms, comparisons with the baseline, effects of fields.

Two intervals of an arm answer two questions. The one over seeds says what another run
of the arm would give; the one over problems what these runs would give on other
problems. A comparison pairs runs of one seed: what a seed makes of both arms cancels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxreason import estimators
from jaxreason.options import unknown_name_message
from jaxreason.runtime.workdir import json_object


class Result(NamedTuple):
    """A run that is done."""

    arm: str
    seed: int
    value: float  # of the metric
    low: float  # 95 %, over problems
    high: float
    n: int  # problems
    verdicts: str  # a letter per sample, problem by problem: 1 is correct
    flops: float
    device_s: float
    joules: float
    wall_s: float
    code: str  # version of the package's sources
    samples: int = 1  # per problem

    def correct_NK(self) -> np.ndarray | None:
        """Verdicts as numbers, problems x samples; None if they were not recorded."""
        if not self.verdicts or len(self.verdicts) != self.n * self.samples:
            return None
        return np.array([letter == "1" for letter in self.verdicts], np.float64).reshape(self.n, self.samples)


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
    low: float  # unbounded if the differences do not vary, or there is nothing to pair
    high: float
    p: float  # uncorrected
    how: str  # which test it is of
    corrected: float = 1.0  # for the number of comparisons (Holm)
    sign_flip: float | None = None  # exact p-value over seeds
    deviation: float | None = None  # standard deviation of the differences over seeds
    needed: int | None = None  # paired seeds that would show a difference of this size, with power 0.8
    settings: int = 1  # of the other fields, over which the effect of a field is averaged
    settings_range: tuple[float, float] | None = None  # lowest and highest difference in one of them


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
    """Read what a run measured at its end; None if it is not done.

    Raises:
      ValueError: it is done, but was not evaluated on the suite at the temperature, or
        its summary is damaged.
    """
    summary = json_object(folder / "summary.json") or {}
    if summary.get("done") is not True:
        return None
    try:
        evaluations = [e for e in summary["evaluations"] if e["suite"] == suite and e["temperature"] == temperature]
        if not evaluations:
            raise ValueError(f"it has no {name_metric(suite, temperature)}")
        last, ledger = evaluations[-1], summary["ledger"].values()
        used = {unit: _finite(sum(kind[unit] for kind in ledger)) for unit in ("flops", "device_s", "joules")}
        measured = {name: _finite(last[name], 1.0) for name in ("low", "high")} | {"n": int(last["n"])}
        measured |= {"verdicts": last.get("verdicts", ""), "samples": last.get("samples", 1)}
        return Result(arm, seed, _finite(last["accuracy"], 1.0), **measured, **used, wall_s=_finite(summary["wall_s"]), code=code)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its summary.json is damaged ({error!r})") from None


def _finite(value: Any, highest: float = math.inf) -> float:
    """Check a number of a summary: what was not finite was written as null."""
    if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= highest:
        raise TypeError(f"{value!r} is no number from 0 to {highest:g}")
    return float(value)


def accuracy_before(run: Path, phase: str, suite: str, temperature: float) -> tuple[float, float]:
    """Return a suite's accuracy before a phase of a run, and at the end of the run."""
    evaluations = [
        e for e in json_object(run / "summary.json")["evaluations"] if e["suite"] == suite and e["temperature"] == temperature
    ]
    before = [e for e in evaluations if e["step"] <= min(e["step"] for e in evaluations if e["phase"] == phase)]
    return next(e["accuracy"] for e in reversed(before) if e["phase"] != phase), evaluations[-1]["accuracy"]


def summarise(name: str, results: Sequence[Result]) -> ArmSummary:
    """Summarise the runs of an arm."""
    mean, *over_seeds = estimators.mean_interval([r.value for r in results], within=(0, 1))
    means = {unit: float(np.mean([getattr(r, unit) for r in results])) for unit in ("flops", "device_s", "joules", "wall_s")}
    seeds = tuple(sorted(r.seed for r in results))
    return ArmSummary(name, seeds, mean, tuple(over_seeds), problems_interval(results), **means)


def problems_interval(results: Sequence[Result]) -> tuple[float, float]:
    """The 95 % interval of an arm's accuracy over problems, for these runs.

    Runs of all seeds are asked the same problems, so a problem counts once, with its
    samples in all runs (see `estimators.clustered`).
    """
    found = [r.correct_NK() for r in results]
    if all(correct_NK is not None and len(correct_NK) == results[0].n for correct_NK in found):
        _, low, high, *_ = estimators.clustered(np.concatenate(found, axis=1))
        return low, high
    n = min(r.n for r in results)
    return estimators.wilson(float(np.mean([r.value for r in results])) * n, n)


def compare(arm: Mapping[int, Result], base: Mapping[int, Result], what: str, than: str) -> Comparison | None:
    """Compare two arms by the seeds that both have: seed -> result. None without one.

    With one seed the problems are paired: by McNemar's test and a posterior, which has
    a width even if few verdicts differ; or, with several samples per problem, by a
    t-test and the interval of the problems' differences.
    """
    seeds = tuple(sorted(arm.keys() & base.keys()))
    if not seeds:
        return None
    if len(seeds) > 1:
        return over_seeds(what, than, {seed: arm[seed].value - base[seed].value for seed in seeds}, within=(-1, 1))
    a, b = base[seeds[0]], arm[seeds[0]]
    a_NK, b_NK = a.correct_NK(), b.correct_NK()
    difference = b.value - a.value
    if a_NK is None or b_NK is None or len(a_NK) != len(b_NK):
        return Comparison(what, than, seeds, difference, -np.inf, np.inf, 1.0, "one seed, no paired problems")
    if a.samples == b.samples == 1:
        p = estimators.mcnemar(a_NK[:, 0], b_NK[:, 0])
        _, low, high, _ = estimators.paired_posterior(a_NK[:, 0], b_NK[:, 0])
        # The prior moves the posterior of few problems towards 0.
        low, high = min(low, difference), max(high, difference)
        return Comparison(what, than, seeds, difference, low, high, p, "one seed: McNemar, posterior over problems")
    mean_a, mean_b = a_NK.mean(axis=1), b_NK.mean(axis=1)
    p = estimators.paired_t(mean_b - mean_a)
    low, high = estimators.difference_interval(mean_b - mean_a)
    return Comparison(what, than, seeds, difference, low, high, p, "one seed: paired t and interval over problems")


def over_seeds(
    what: str, than: str, differences: Mapping[int, float], within: tuple[float, float] = (-math.inf, math.inf)
) -> Comparison:
    """A comparison from the differences of paired seeds, whose mean is known to be
    `within` a range.

    Differences that are all equal have no interval, and the p-value of the exact
    sign-flip test.
    """
    values = [differences[seed] for seed in sorted(differences)]
    seeds = tuple(sorted(differences))
    mean, low, high = estimators.mean_interval(values, within=within)
    if not estimators.varies(values):
        how = "sign flips over seeds, as all differences are equal" if len(values) > 1 else "one seed, no test"
        return Comparison(what, than, seeds, mean, -np.inf, np.inf, estimators.paired_t(values), how)
    exact = estimators.sign_flip(values) if len(values) <= estimators.MOST_FLIPPED else None
    deviation = float(np.std(values, ddof=1))
    p = estimators.paired_t(values)
    return Comparison(what, than, seeds, mean, low, high, p, "paired t over seeds", sign_flip=exact, deviation=deviation)


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Correct the p-values of a family of comparisons for their number, and find the
    seeds that would show each difference after a correction by as many (Bonferroni).
    """
    level = 0.05 / max(1, len(comparisons))
    return [
        c._replace(
            corrected=p,
            needed=estimators.seeds_needed(c.difference, c.deviation, level=level) if c.deviation is not None else None,
        )
        for c, p in zip(comparisons, estimators.holm([c.p for c in comparisons]), strict=True)
    ]


def noise_floor(base: Sequence[Result]) -> float | None:
    """The standard deviation of the baseline over its seeds; None for one seed."""
    return float(np.std([r.value for r in base], ddof=1)) if len(base) > 1 else None


def is_grid(arms: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether the arms are all combinations of values of the same fields, so
    that the effects of the fields say all.
    """
    first = next(iter(arms.values()))
    if not first or any(arm.keys() != first.keys() for arm in arms.values()):
        return False
    return len(arms) == math.prod(len({repr(arm[field]) for arm in arms.values()}) for field in first)


def field_effects(arms: Mapping[str, Mapping[str, Any]], results: Mapping[str, Mapping[int, Result]]) -> list[Comparison]:
    """The effect of each field's values, averaged over the settings of the other
    fields: arms that differ in nothing else are compared, with the field's first value.
    A seed counts if all of these arms have it.
    """
    found = []
    for field in dict.fromkeys(itertools.chain(*arms.values())):
        values = list(dict.fromkeys(str(arm[field]) for arm in arms.values() if field in arm))
        alike: dict[str, dict[str, str]] = {}  # the other fields -> value -> arm
        for name, arm in arms.items():
            if field in arm:
                rest = repr(sorted((k, repr(v)) for k, v in arm.items() if k != field))
                alike.setdefault(rest, {})[str(arm[field])] = name
        for value in values[1:]:
            pairs = [
                (by_value[value], by_value[values[0]]) for by_value in alike.values() if {value, values[0]} <= by_value.keys()
            ]
            pairs = [pair for pair in pairs if all(results[arm] for arm in pair)]
            seeds = set.intersection(*(results[a].keys() & results[b].keys() for a, b in pairs)) if pairs else set()
            if seeds:
                what, than = f"{field}={value}", f"{field}={values[0]}"
                found.append(_field_effect(what, than, [(results[a], results[b]) for a, b in pairs], sorted(seeds)))
    return corrected(found)


def _field_effect(
    what: str, than: str, pairs: Sequence[tuple[Mapping[int, Result], Mapping[int, Result]]], seeds: Sequence[int]
) -> Comparison:
    """The mean difference of pairs of arms."""
    if len(pairs) == 1:
        return compare(*pairs[0], what, than)
    difference_PS = np.array([[a[seed].value - b[seed].value for seed in seeds] for a, b in pairs])
    found = over_seeds(what, than, dict(zip(seeds, difference_PS.mean(axis=0).tolist(), strict=True)))
    each = difference_PS.mean(axis=1)
    return found._replace(settings=len(pairs), settings_range=(float(each.min()), float(each.max())))


def pareto(summaries: Sequence[ArmSummary]) -> list[str]:
    """The arms to which no other is better in accuracy or FLOPs and at least as good in
    the other, cheapest first. Noise is not considered.
    """
    front: list[ArmSummary] = []
    for arm in sorted(summaries, key=lambda s: (s.flops, -s.mean)):
        if not front or arm.mean > front[-1].mean or (arm.mean, arm.flops) == (front[-1].mean, front[-1].flops):
            front.append(arm)
    return [arm.name for arm in front]
