"""Predict the needs of a sweep: FLOPs by formula before any run is done, and time,
joules and disk from the ledgers of those that are done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxreason import build
from jaxreason.cost import forward_flops
from jaxreason.runtime.workdir import json_object
from jaxreason.sweep.runs import SweepRun


class Need(NamedTuple):
    """The needs of a run; None where nothing is known."""

    flops: float | None
    wall_s: float | None = None
    joules: float | None = None
    bytes: int | None = None


def flops_at_most(config: Mapping) -> float | None:
    """FLOPs of a run whose attempts all reach their limit; None where the shape of the
    model is not known without a download, or a source is the user's own.
    """
    try:
        shape = build.read_shape(config["model"], config["text"])
    except (ValueError, OSError):
        return None
    longest, total = config["sampler"], 0.0
    evaluate = config["evaluate"]
    attempts = len(evaluate["suites"]) * len(evaluate["temperatures"])
    attempt = forward_flops(shape, [(longest["max_prompt_tokens"], longest["max_tokens"])])
    final = evaluate["n"] if evaluate.get("final_n") is None else evaluate["final_n"]
    total += attempts * final * attempt
    for name in config["phases"]:
        phase, source = config[name], config[name]["source"]
        if source["name"] == "rollouts":
            tokens = longest["max_tokens"] if source.get("max_tokens") is None else source["max_tokens"]
            rows = [(longest["max_prompt_tokens"], tokens)] * (source["problems"] * source["group"])
            batch = forward_flops(shape, rows) * (1 + 3 * phase["updates_per_batch"])
        elif source["name"] in ("corpus", "demonstrations"):
            length = source["length" if source["name"] == "corpus" else "max_tokens"]
            batch = 3 * phase["updates_per_batch"] * forward_flops(shape, [(0, length)] * source["rows"])
        else:
            return None
        between = phase["steps"] // phase["evaluate_every"] if phase["evaluate_every"] else 0
        total += phase["steps"] * batch + attempts * attempt * (evaluate["n"] * between + final)
    return total


def needs(runs: Iterable[SweepRun]) -> dict[str, Need]:
    """Predict the needs of each run: measured if it is done, else the mean of the arm's
    other runs, else that of all runs; FLOPs by formula where none is done.
    """
    runs = list(runs)
    measured = {run.name: found for run in runs if run.stop_after is None and (found := measure(run))}
    formula: dict[str, float | None] = {}
    found = {}
    for run in runs:
        if run.name in measured:
            found[run.name] = measured[run.name]
            continue
        if run.arm not in formula:
            formula[run.arm] = flops_at_most(run.config)
        alike = [measured[other.name] for other in runs if other.name in measured and other.arm == run.arm]
        alike = alike or list(measured.values())
        means = (
            {field: float(np.mean([getattr(n, field) for n in alike])) for field in ("wall_s", "joules", "bytes")}
            if alike
            else {}
        )
        found[run.name] = Need(alike[0].flops if alike and alike[0].flops else formula[run.arm], **means)
    return found


def measure(run: SweepRun) -> Need | None:
    """Measure a finished run; None if the run is not done."""
    summary = json_object(run.folder / "summary.json")
    if not summary or summary.get("done") is not True:
        return None
    used = {unit: sum(kind[unit] for kind in summary["ledger"].values()) for unit in ("flops", "joules")}
    return Need(used["flops"], summary["wall_s"], used["joules"], size_of(run.folder))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
