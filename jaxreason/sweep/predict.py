"""Predict the needs of a sweep: FLOPs by formula before any run is done, and time,
joules and disk from the ledgers of those that are done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxreason import build, objectives
from jaxreason.cost import adapter_flops, forward_flops
from jaxreason.options import call_with_section
from jaxreason.runtime.workdir import json_object
from jaxreason.sweep.runs import SweepRun


class Need(NamedTuple):
    """The needs of a run; None where nothing is known."""

    flops: float | None
    wall_s: float | None = None
    joules: float | None = None
    bytes: int | None = None
    by_formula: bool = True  # FLOPs, at most


def flops_at_most(config: Mapping, stop_after: str | None = None) -> float | None:
    """FLOPs of a run whose attempts all reach their limit, up to a phase; None where
    the shape of the model is not known without a download, a source is the user's own,
    or a field is missing, which the run will say.
    """
    names = list(config["phases"])
    names = names[: names.index(stop_after) + 1] if stop_after else names
    try:
        shape = build.read_shape(config["model"], config["text"])
        phases = [phase_flops(shape, config[name], config["sampler"], f"config.{name}") for name in names]
        evaluate = config["evaluate"]
        attempts = evaluation_flops(shape, evaluate, config["sampler"])
        texts = [text["rows"] * forward_flops(shape, [(0, text["length"])]) for text in (evaluate.get("texts") or {}).values()]
    except (ValueError, OSError, KeyError):
        return None
    if None in phases:
        return None
    every = [(config[name]["steps"], config[name]["evaluate_every"]) for name in names]
    between = sum(steps // every for steps, every in every if every)
    final = evaluate["n"] if evaluate.get("final_n") is None else evaluate["final_n"]
    asked = evaluate["n"] * between + final * (1 + len(names))
    return sum(phases) + attempts * asked + sum(texts) * (between + 1 + len(names))


def flops_unrecorded(config: Mapping, stop_after: str | None = None) -> float | None:
    """FLOPs, at most, that a run spends between two lines of its metrics, which have
    its ledger: those of a run that is killed and are in no record. None as of
    `flops_at_most`.

    A line is written one step late, and a stale source has drawn ahead.
    """
    names = list(config["phases"])
    names = names[: names.index(stop_after) + 1] if stop_after else names
    once = {name: config[name] | {"steps": 0, "evaluate_every": 0} for name in names}
    evaluations = flops_at_most({**config, **once}, stop_after)
    if evaluations is None:
        return None
    between = []
    for name in names:
        steps = config[name]["log_every"] + 2 + (config[name]["source"].get("lag") or 0)
        alone = {**config, **once, name: once[name] | {"steps": min(steps, config[name]["steps"])}}
        between.append(flops_at_most(alone, stop_after) - evaluations)
    return max(between) + evaluations


def phase_flops(shape, phase: Mapping, sampler: Mapping, where: str) -> float | None:
    """FLOPs of sampling and learning in a phase; None for a source of the user's.

    Rows are counted and not listed, since a client of the lab may ask for any number.
    """
    source = phase["source"]
    if source["name"] == "rollouts":
        tokens = sampler["max_tokens"] if source.get("max_tokens") is None else source["max_tokens"]
        row, rows = (sampler["max_prompt_tokens"], tokens), source["problems"] * source["group"]
    elif source["name"] in ("corpus", "demonstrations"):
        row, rows = (0, source["length" if source["name"] == "corpus" else "max_tokens"]), source["rows"]
    else:
        return None
    passes = 3 * phase["updates_per_batch"] + (source["dynamic_sampling"] if source["name"] == "rollouts" else 0)
    passes += call_with_section(objectives.make, phase["objective"], f"{where}.objective").passes
    return phase["steps"] * passes * rows * (forward_flops(shape, [row]) + adapter_flops(shape, sum(row)))


def evaluation_flops(shape, evaluate: Mapping, sampler: Mapping) -> float:
    """FLOPs of attempts at one task of each suite, at all temperatures."""
    total = 0.0
    for suite in evaluate["suites"].values():
        own = {name: suite.get(name) for name in ("samples", "temperatures", "max_tokens")}
        tokens = sampler["max_tokens"] if own["max_tokens"] is None else own["max_tokens"]
        temperatures = evaluate["temperatures"] if own["temperatures"] is None else own["temperatures"]
        samples = 1 if own["samples"] is None else own["samples"]
        attempts = sum(samples if temperature else 1 for temperature in temperatures)
        total += attempts * forward_flops(shape, [(sampler["max_prompt_tokens"], tokens)])
    return total


def needs(runs: Iterable[SweepRun]) -> dict[str, Need]:
    """Predict the needs of each run: measured if it is done, else the mean of the arm's
    other runs. Of an arm that has none the FLOPs are by formula, and time, joules and
    disk the means of all runs that are done.
    """
    runs = list(runs)
    measured = {run.name: found for run in runs if run.stop_after is None and (found := measure(run))}
    formula: dict[tuple[str, str | None], float | None] = {}
    found = {}
    for run in runs:
        if run.name in measured:
            found[run.name] = measured[run.name]
            continue
        key = run.arm, run.stop_after
        if key not in formula:
            formula[key] = flops_at_most(run.config, run.stop_after)
        if run.stop_after is not None:  # a part of a run: nothing that was measured is like it
            found[run.name] = Need(formula[key])
            continue
        own = [measured[other.name] for other in runs if other.name in measured and other.arm == run.arm]
        alike = own or list(measured.values())
        fields = ("wall_s", "joules", "bytes") if alike else ()
        means = {field: float(np.mean([getattr(need, field) for need in alike])) for field in fields}
        flops = float(np.mean([need.flops for need in own])) if own else formula[key]
        found[run.name] = Need(flops, **means, by_formula=not own)
    return found


def flops_left(runs: Iterable[SweepRun], needed: Mapping[str, Need]) -> float | None:
    """FLOPs of the runs that are not done, at most; shared phases count once. None
    where those of a run are unknown.
    """
    runs, total = list(runs), 0.0
    by_folder = {run.folder: needed[run.name].flops for run in runs if run.stop_after is not None}
    for run in runs:
        if run.is_done():
            continue
        if needed[run.name].flops is None:
            return None
        shared = by_folder.get(run.shared) or 0.0
        total += max(0.0, needed[run.name].flops - shared)
    return total


def measure(run: SweepRun) -> Need | None:
    """Measure a finished run; None if the run is not done."""
    summary = json_object(run.folder / "summary.json")
    if not summary or summary.get("done") is not True:
        return None
    used = {unit: sum(kind[unit] for kind in summary["ledger"].values()) for unit in ("flops", "joules")}
    return Need(used["flops"], summary["wall_s"], used["joules"], size_of(run.folder), by_formula=False)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
