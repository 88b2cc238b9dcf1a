"""The report of a sweep: one table, one sentence per field, figures, and the same as
JSON.

    FOLDER/report.md, report.json, figures/curves.png, figures/pareto.png
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxreason.runtime.files import replacing
from jaxreason.sweep.arms import Arm
from jaxreason.sweep.results import (
    ArmSummary,
    Comparison,
    Result,
    compare,
    corrected,
    field_effects,
    name_metric,
    noise_floor,
    pareto,
    read_result,
    summarise,
)


@dataclasses.dataclass
class Report:
    """Everything that the report says, as numbers."""

    metric: str
    baseline: str
    arms: list[ArmSummary]
    comparisons: list[Comparison]
    effects: list[Comparison]
    noise_floor: float | None
    pareto: list[str]
    is_grid: bool  # all arms set the same fields, so that `effects` say all
    missing: dict[str, str]  # run -> what became of it
    across_commits: list[str]  # more than one commit: their names


def make_report(
    folder: Path,
    arms: Mapping[str, Arm],
    seeds: Sequence[int],
    metric: tuple[str, float],
    states: Mapping[str, dict],
    across_commits: bool = False,
) -> Report:
    """Read the results of a sweep and compare its arms with the first one.

    Raises:
      ValueError: runs of different commits, unless `across_commits`.
    """
    suite, temperature = metric
    results: dict[str, dict[int, Result]] = {name: {} for name in arms}
    missing = {}
    for name in arms:
        for seed in seeds:
            run, state = f"{name}/seed{seed}", states.get(f"{name}/seed{seed}", {})
            found = read_result(folder / "runs" / run, name, seed, suite, temperature, state.get("code", ""))
            if found is not None and state.get("status") != "pruned":
                results[name][seed] = found
            else:
                missing[run] = " ".join(filter(None, (state.get("status", "waiting"), state.get("reason", ""))))
    commits = sorted({r.code for by_seed in results.values() for r in by_seed.values()})
    if len(commits) > 1 and not across_commits:
        raise ValueError(
            f"runs of {len(commits)} versions of the code are not compared ({', '.join(commits)}); run the older ones again, or "
            "add --across_commits"
        )
    (base, first), *others = results.items()
    comparisons = [found for name, runs in others if (found := compare(runs, first, name, base))]
    summaries = [summarise(name, list(runs.values())) for name, runs in results.items() if runs]
    return Report(
        metric=name_metric(suite, temperature),
        baseline=base,
        arms=summaries,
        comparisons=corrected(comparisons),
        effects=field_effects(arms, results),
        noise_floor=noise_floor(list(first.values())),
        pareto=pareto(summaries),
        is_grid=len({tuple(sorted(arm)) for arm in arms.values()}) == 1 and bool(next(iter(arms.values()))),
        missing=missing,
        across_commits=commits if len(commits) > 1 else [],
    )


# --- words ---


def interval(low: float, high: float, digits: int = 3, sign: str = "") -> str:
    if math.isinf(low):
        return "[one seed]"
    return f"[{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def table(report: Report) -> list[str]:
    """The table of arms, as Markdown."""
    heads = ["arm", "seeds", report.metric, "over seeds", "over problems", "minus the baseline", "p (Holm)", "FLOPs", "minutes"]
    lines = [f"| {' | '.join([*heads, 'joules'])} |", "|---" * (len(heads) + 1) + "|"]
    by_name = {c.what: c for c in report.comparisons}
    for arm in report.arms:
        c = by_name.get(arm.name)
        difference = f"{c.difference:+.3f} {interval(c.low, c.high, sign='+')}" if c else "-"
        difference = "baseline" if arm.name == report.baseline else difference
        cells = [arm.name, len(arm.seeds), f"{arm.mean:.3f}", interval(*arm.over_seeds), interval(*arm.over_problems), difference]
        cells += [f"{c.corrected:.3g}" if c else "-", f"{arm.flops:.3g}", f"{arm.wall_s / 60:.1f}"]
        cells += [f"{arm.joules:,.0f}" if arm.joules else "-"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def sentence(c: Comparison, floor: float | None, of_field: bool = False) -> str:
    """One plain sentence about a comparison, in points of accuracy."""
    field, _, value = c.what.partition("=") if of_field else (c.what, "", "")
    than = c.than.removeprefix(f"{field}=") if of_field else c.than
    points, low, high = (100 * x for x in (c.difference, c.low, c.high))
    shown = c.corrected < 0.05 and not math.isinf(low)
    verb = ("above" if points > 0 else "below") if shown else "not shown to differ from"
    what = f"{field}: {value}" if value else c.what
    said = f"{what} is {verb} {than}" + (f" by {abs(points):.1f} points" if shown else f" ({points:+.1f} points)")
    said += f", 95 % {low:+.1f} to {high:+.1f}" if not math.isinf(low) else ""
    said += (
        f", corrected p {c.corrected:.2g}, n = {len(c.seeds)} paired seeds" if len(c.seeds) > 1 else f", p {c.p:.2g} ({c.how})"
    )
    if floor is not None:
        said += f", noise floor {100 * floor:.1f}"
    if not shown and c.needed:
        said += f"; {c.needed} seeds would show a difference of this size in 4 of 5 sweeps"
    return said + "."


def caveats(report: Report) -> list[str]:
    """List how far intervals from these seeds can be trusted, and the missing runs."""
    said = []
    counts = sorted({len(c.seeds) for c in report.comparisons})
    if counts and counts[0] == 1:
        said.append("One seed says nothing about other seeds: its intervals are over problems only.")
    if few := [n for n in counts if 1 < n <= 5]:
        n = few[0]
        said.append(
            f"From {n} seeds an interval rests on the assumption that differences are about normal. The exact sign-flip test "
            f"assumes less and cannot give a p below {2 / 2**n:.2g} with {n} seeds."
        )
    if report.noise_floor is not None:
        said.append(
            f"The noise floor, the standard deviation of the baseline over its seeds, is {100 * report.noise_floor:.1f} points."
        )
    if report.across_commits:
        said.append(
            f"Runs of {len(report.across_commits)} versions of the code are compared: {', '.join(report.across_commits)}."
        )
    for run, what in report.missing.items():
        said.append(f"Not in the table: {run} ({what}).")
    return said


def markdown(report: Report, folder: Path) -> str:
    effects = [sentence(c, report.noise_floor, of_field=True) for c in report.effects]
    if not report.is_grid:
        effects = [sentence(c, report.noise_floor) for c in report.comparisons] + effects
    exact = [f"- {c.what}: {c.sign_flip:.2g}" for c in report.comparisons if c.sign_flip is not None]
    parts = [
        f"# {folder.name}",
        "\n".join(table(report)) if report.arms else "No run is done.",
        "\n".join(f"- {s}" for s in effects),
    ]
    parts += ["Exact sign-flip p-values, uncorrected:\n\n" + "\n".join(exact)] if exact else []
    parts += ["\n".join(f"- {line}" for line in caveats(report))]
    if report.arms:
        parts.append(f"Accuracy against FLOPs: no arm beats {', '.join(report.pareto)} in both.")
    figures = sorted((folder / "figures").glob("*.png"))
    parts += ["\n".join(f"![{path.stem}](figures/{path.name})" for path in figures)] if figures else []
    return "\n\n".join(filter(None, parts)) + "\n"


def write_report(report: Report, folder: Path) -> str:
    """Write report.md and report.json; return the former."""
    text = markdown(report, folder)
    (folder / "report.md").write_text(text, encoding="utf-8")
    with replacing(folder / "report.json") as file:
        json.dump(as_json(report), file, indent=2)
    return text


def as_json(value: Any) -> Any:
    """A report as JSON has it: names for fields, null for what is not finite."""
    if dataclasses.is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return as_json(value._asdict())
    if isinstance(value, Mapping):
        return {name: as_json(inside) for name, inside in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inside) for inside in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if hasattr(value, "item") else value


# --- figures ---


def draw_figures(report: Report, folder: Path, last_phase: str) -> list[Path]:
    """Draw the learning curves of the last phase, and accuracy against FLOPs.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
    """
    from jaxreason.look import figures

    (folder / "figures").mkdir(exist_ok=True)
    runs = {arm.name: [folder / "runs" / arm.name / f"seed{seed}" for seed in arm.seeds] for arm in report.arms}
    groups = {name: [figures.read_curve(run, report.metric, last_phase) for run in found] for name, found in runs.items()}
    paths = [folder / "figures" / "curves.png", folder / "figures" / "pareto.png"]
    if groups:
        figures.draw(groups, report.metric, f"updates of phase {last_phase}", paths[0])
        draw_pareto(report, paths[1])
    return paths if groups else []


def draw_pareto(report: Report, out: Path) -> None:
    """Draw accuracy against FLOPs, a point per arm with its interval over seeds."""
    from jaxreason.look.figures import COLORS, new_axes, save

    axes = new_axes()
    for i, arm in enumerate(report.arms):
        low, high = arm.over_seeds if not math.isinf(arm.over_seeds[0]) else arm.over_problems
        error = [[arm.mean - max(0.0, low)], [min(1.0, high) - arm.mean]]
        axes.errorbar(arm.flops, arm.mean, yerr=error, fmt="o", color=COLORS[i % len(COLORS)], label=arm.name, capsize=2)
    front = sorted((arm for arm in report.arms if arm.name in report.pareto), key=lambda arm: arm.flops)
    axes.plot([arm.flops for arm in front], [arm.mean for arm in front], color="#999999", linewidth=1, zorder=0)
    axes.set(xlabel="FLOPs per run", ylabel=report.metric.removeprefix("eval/"), xscale="log")
    save(axes, out)
