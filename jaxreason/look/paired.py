"""Accuracies of runs with intervals, and paired comparisons: of two evaluations of a
run, and of two groups of runs.

Two evaluations of one run, or of one run each of two groups, are paired by problem; two
groups with several seeds in common are paired by seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxreason import estimators
from jaxreason.look.comparison import paired_interval
from jaxreason.look.runs import Group, Run, mapping, mode, phases
from jaxreason.types import Evaluation

DRAWS = 2000  # of a posterior: with 512 problems its ends vary by 0.001 between draws, and a page has many of them


class Mean(NamedTuple):
    """An accuracy, of one run or over seeds, with a 95 % interval; None: not known."""

    value: float
    low: float | None
    high: float | None
    runs: int = 1


class Difference(NamedTuple):
    """The accuracy of b less that of a."""

    suite: str
    temperature: float
    a: str
    b: str
    before: float
    after: float
    difference: float
    low: float | None  # 95 %
    high: float | None
    p: float | None
    how: str
    corrected: float | None = None  # p, for the number of comparisons (Holm)


def suites_of(groups: Sequence[Group]) -> list[tuple[str, float]]:
    """List the suites with their temperatures, as they first appear."""
    return list(dict.fromkeys((e.suite, e.temperature) for group in groups for run in group.runs for e in run.evaluations))


def of_suite(run: Run, suite: str, temperature: float) -> list[Evaluation]:
    return [e for e in run.evaluations if e.suite == suite and mode(e.temperature) == mode(temperature)]


def stages(groups: Sequence[Group]) -> list[str]:
    """List the points at which evaluations are compared: the start, and each phase's
    last evaluation.
    """
    return list(dict.fromkeys(e.phase for group in groups for run in group.runs for e in run.evaluations))


def at_stage(run: Run, suite: str, temperature: float, stage: str) -> Evaluation | None:
    """Return the last evaluation of a phase."""
    return next((e for e in reversed(of_suite(run, suite, temperature)) if e.phase == stage), None)


def mean_of(evaluations: Sequence[Evaluation]) -> Mean | None:
    """Return an accuracy over the runs of a group: with the interval of the evaluation
    if there is one run, else with the t-interval over seeds.
    """
    if not evaluations:
        return None
    if len(evaluations) == 1:
        return Mean(evaluations[0].accuracy, evaluations[0].low, evaluations[0].high)
    values = [e.accuracy for e in evaluations]
    value, low, high = estimators.mean_interval(values, within=(0, 1))
    # Equal values would have an interval without width, which says too much.
    return Mean(value, *((low, high) if np.ptp(values) else (None, None)), len(evaluations))


def stage_mean(group: Group, suite: str, temperature: float, stage: str) -> Mean | None:
    found = [at_stage(run, suite, temperature, stage) for run in group.runs]
    return mean_of([e for e in found if e is not None])


def by_problem(a: Evaluation, b: Evaluation, names: tuple[str, str]) -> Difference:
    """Compare two evaluations of the same problems: the first n of a suite.

    With one sample per problem p is McNemar's, else that of a t-test over the problems'
    means. The interval is that of `comparison.paired_interval`.
    """
    common = (b.suite, b.temperature, *names)
    if not a.verdicts or not b.verdicts:
        difference = b.accuracy - a.accuracy
        return Difference(*common, a.accuracy, b.accuracy, difference, None, None, None, "not tested: no verdicts per problem")
    n, single = min(a.n, b.n), a.samples == b.samples == 1
    a_N, b_N = (solved(e)[:n] for e in (a, b))
    low, high, method = paired_interval(a_N, b_N, single, DRAWS)
    p = estimators.mcnemar(a_N, b_N) if single else estimators.paired_t(b_N - a_N)
    how = f"{'McNemar, ' if single else ''}{method.replace('over tasks', f'over {n} problems')}"
    return Difference(*common, float(a_N.mean()), float(b_N.mean()), float((b_N - a_N).mean()), low, high, p, how)


def solved(e: Evaluation) -> np.ndarray:
    """Return the accuracy on each problem."""
    return np.array([letter == "1" for letter in e.verdicts], np.float64).reshape(e.n, e.samples).mean(axis=1)


def by_seed(pairs: Sequence[tuple[Evaluation, Evaluation]], names: tuple[str, str]) -> Difference:
    """Compare evaluations that are paired by seed, two or more."""
    differences = [b.accuracy - a.accuracy for a, b in pairs]
    mean, low, high = estimators.mean_interval(differences, within=(-1, 1))
    how = f"paired t over {len(pairs)} seeds"
    if not estimators.varies(differences):  # an interval without width says too much
        low, high, how = None, None, f"sign flips over {len(pairs)} seeds, as all differences are equal"
    before, after = (float(np.mean([pair[i].accuracy for pair in pairs])) for i in (0, 1))
    p, last = estimators.paired_t(differences), pairs[0][1]
    return Difference(last.suite, last.temperature, *names, before, after, mean, low, high, p, how)


def compare_pairs(pairs: Sequence[tuple[Evaluation, Evaluation]], names: tuple[str, str]) -> Difference:
    return by_seed(pairs, names) if len(pairs) > 1 else by_problem(*pairs[0], names)


def changes(group: Group) -> list[Difference]:
    """Compare the last evaluation of a group's runs with the first one, and with the
    one before the last phase.
    """
    found = []
    for suite, temperature in suites_of([group]):
        last = {id(run): of_suite(run, suite, temperature) for run in group.runs}
        ends = [(run, evaluations[-1]) for run in group.runs if len(evaluations := last[id(run)]) > 1]
        names = list(dict.fromkeys(b.phase for _, b in ends))
        if len(names) != 1:  # no evaluation but the first, or runs that ended in different phases
            continue
        points = {"start of the run": [(last[id(run)][0], b) for run, b in ends]}
        before = [(before_phase(run, suite, temperature, names[0]), b) for run, b in ends]
        if all(a is not None for a, _ in before):
            points[f"before {names[0]}"] = before
        after = f"end of {names[0]}" if all(run.done for run, _ in ends) else "last evaluation"
        if all(x is y for (x, _), (y, _) in zip(points["start of the run"], before)):
            points.pop("start of the run")
        found += [compare_pairs(pairs, (name, after)) for name, pairs in points.items()]
    return found


def before_phase(run: Run, suite: str, temperature: float, phase: str) -> Evaluation | None:
    """Return the last evaluation before a phase."""
    start = next((p.before for p in phases(run) if p.name == phase), None)
    earlier = [e for e in of_suite(run, suite, temperature) if start is not None and e.step <= start and e.phase != phase]
    return earlier[-1] if earlier else None


def between(groups: Sequence[Group]) -> list[Difference]:
    """Compare the last evaluations of each group with those of the first group.
    P-values are corrected for their number.
    """
    found = []
    base, *others = groups
    for suite, temperature in suites_of(groups):
        for group in others:
            pairs = seed_pairs(base, group, suite, temperature)
            names = (base.label, group.label)
            if not pairs:
                found += unpaired(base, group, suite, temperature)
            elif any(section(x, suite) != section(y, suite) for x in base.runs[:1] for y in group.runs[:1]):
                a, b = (mean_of([pair[i] for pair in pairs]).value for i in (0, 1))
                how = "not tested: the suite differs"
                found.append(Difference(suite, temperature, *names, a, b, b - a, None, None, None, how))
            else:
                found.append(compare_pairs(pairs, names))
    tested = [d for d in found if d.p is not None]
    corrected = dict(zip(map(id, tested), estimators.holm([d.p for d in tested])))
    return [d._replace(corrected=corrected.get(id(d))) for d in found]


def unpaired(base: Group, group: Group, suite: str, temperature: float) -> list[Difference]:
    """Return the difference of groups that have no seed in common, untested; nothing if
    one of them has no evaluation of the suite.
    """
    last = [[found[-1] for run in g.runs if (found := of_suite(run, suite, temperature))] for g in (base, group)]
    if not all(last):
        return []
    a, b = (mean_of(evaluations).value for evaluations in last)
    return [
        Difference(suite, temperature, base.label, group.label, a, b, b - a, None, None, None, "not tested: no seed in common")
    ]


def seed_pairs(base: Group, group: Group, suite: str, temperature: float) -> list[tuple[Evaluation, Evaluation]]:
    """Pair the last evaluations of two groups: by seed, or, if they share no seed, the
    first run of each.
    """
    last = [
        {json.dumps(run.seed): found[-1] for run in g.runs if (found := of_suite(run, suite, temperature))} for g in (base, group)
    ]
    pairs = [(a, last[1][seed]) for seed, a in last[0].items() if seed in last[1]]
    if not pairs and all(len(by_run) == 1 for by_run in last):
        pairs = [tuple(next(iter(by_run.values())) for by_run in last)]
    return pairs


def section(run: Run, suite: str) -> str:
    """Return what decides a suite's problems, which are the same for all seeds."""
    suites = mapping(mapping(run.config.get("evaluate")).get("suites"))
    return json.dumps(suites.get(suite), sort_keys=True)
