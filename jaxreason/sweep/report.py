"""The report of a sweep: one table, one sentence per field, figures, and the same as
JSON.

    FOLDER/report.md, report.json, figures/curves.png, figures/pareto.png
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
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
    is_grid,
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
    is_grid: bool  # so that `effects` say all
    missing: dict[str, str]  # run -> what became of it
    across_commits: list[str]  # more than one commit: their names
    asked_apart: list[str]  # why accuracies may be of different problems


def make_report(
    folder: Path,
    arms: Mapping[str, Arm],
    seeds: Sequence[int],
    metric: tuple[str, float],
    states: Mapping[str, dict],
    across_commits: bool = False,
) -> Report:
    """Read the results of a sweep and compare its arms with the first one.

    An arm is in no test if any of its runs was stopped early: those that it has were
    chosen by their results.

    Raises:
      ValueError: runs of different commits, unless `across_commits`.
    """
    suite, temperature = metric
    results: dict[str, dict[int, Result]] = {name: {} for name in arms}
    missing = {}
    for name in arms:
        of_seeds = {seed: states.get(f"{name}/seed{seed}", {}) for seed in seeds}
        stopped = next((state for state in of_seeds.values() if state.get("status") == "pruned"), None)
        for seed, state in of_seeds.items():
            run = f"{name}/seed{seed}"
            try:
                found = read_result(folder / "runs" / run, name, seed, suite, temperature, state.get("code") or "unknown")
            except ValueError as error:
                missing[run] = f"done, but {error}"
                continue
            if found is not None and stopped is None:
                results[name][seed] = found
            elif found is not None and state is not stopped:
                missing[run] = " ".join(filter(None, ("done, but its arm was stopped early:", stopped.get("reason", ""))))
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
        is_grid=is_grid(arms),
        missing=missing,
        across_commits=commits if len(commits) > 1 else [],
        asked_apart=asked_apart(arms, results),
    )


ASKED = re.compile(r"(evaluate|verifier)(\.|$)")  # fields that decide which problems are asked, and which answers are right


def asked_apart(arms: Mapping[str, Arm], results: Mapping[str, Mapping[int, Result]]) -> list[str]:
    """Say why the accuracies of arms may be of different problems, or judged
    differently: they then differ without any difference of the models.
    """
    fields = sorted({field for arm in arms.values() for field in arm if ASKED.match(field)})
    said = [f"arms set {', '.join(fields)}"] if fields else []
    counts = sorted({r.n for by_seed in results.values() for r in by_seed.values()})
    return said + ([f"runs were asked {', '.join(map(str, counts))} problems"] if len(counts) > 1 else [])


# --- words ---


def plain(text: str) -> str:
    """A text from outside in one line of Markdown, with no HTML and no cell of a
    table in it.
    """
    return re.sub(r"[|`]", r"\\\g<0>", " ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")


def interval(low: float, high: float, digits: int = 3, sign: str = "", unbounded: str = "[one seed]") -> str:
    if math.isinf(low):
        return unbounded
    return f"[{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def table(report: Report) -> list[str]:
    """The table of arms, as Markdown."""
    heads = ["arm", "seeds", plain(report.metric), "over seeds", "over problems", "minus the baseline", "p (Holm)", "FLOPs"]
    heads += ["minutes", "joules"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    by_name = {c.what: c for c in report.comparisons}
    for arm in report.arms:
        c = by_name.get(arm.name)
        difference = f"{c.difference:+.3f} {interval(c.low, c.high, sign='+', unbounded='[no interval]')}" if c else "-"
        difference = "baseline" if arm.name == report.baseline else difference
        over_seeds = interval(*arm.over_seeds) if arm.over_seeds[0] < arm.over_seeds[1] else "[all seeds equal]"
        cells = [plain(arm.name), len(arm.seeds), f"{arm.mean:.3f}", over_seeds, interval(*arm.over_problems), difference]
        cells += [f"{c.corrected:.3g}" if c else "-", f"{arm.flops:.3g}", f"{arm.wall_s / 60:.1f}"]
        cells += [f"{arm.joules:,.0f}" if arm.joules else "-"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def sentence(c: Comparison, floor: float | None, of_field: bool = False) -> str:
    """One plain sentence about a comparison, in points of accuracy."""
    field, _, value = c.what.partition("=") if of_field else ("", "", c.what)
    what, than = (plain(text or "''") for text in (value, c.than.removeprefix(f"{field}=") if of_field else c.than))
    points, low, high = (100 * x for x in (c.difference, c.low, c.high))
    shown = c.corrected < 0.05
    verb = ("above" if points > 0 else "below") if shown else "not shown to differ from"
    said = (f"{plain(field)}: " if of_field else "") + f"{what} is {verb} {than}"
    said += f" by {abs(points):.1f} points" if shown else f" ({points:+.1f} points)"
    if c.settings_range is not None:
        lowest, highest = (100 * x for x in c.settings_range)
        said += (
            f" on average over {c.settings} settings of the other fields, in which it differs by {lowest:+.1f} to {highest:+.1f}"
        )
    said += f", 95 % {low:+.1f} to {high:+.1f}" if not math.isinf(low) else ", no interval"
    said += f", corrected p {c.corrected:.2g}"
    said += f", n = {len(c.seeds)} paired seeds" if len(c.seeds) > 1 else ""
    said += f" ({c.how})" if c.how != USUAL_TEST else ""
    if floor is not None:
        said += f", noise floor {100 * floor:.1f}"
    if not shown and c.needed:
        said += f"; {c.needed} seeds would show a difference of this size, if it is real, in 4 of 5 sweeps"
    return said + "."


USUAL_TEST = "paired t over seeds"


def caveats(report: Report) -> list[str]:
    """List how far intervals from these seeds can be trusted, and the missing runs."""
    said = []
    counts = sorted({len(c.seeds) for c in report.comparisons})
    if report.arms and report.baseline not in [arm.name for arm in report.arms]:
        said.append(f"No run of the baseline {plain(report.baseline)} is done, so no arm is compared with it.")
    if report.asked_apart:
        said.append(f"Accuracies may be of different problems: {plain('; '.join(report.asked_apart))}.")
    if counts and counts[0] == 1:
        said.append("One seed says nothing about other seeds: its intervals are over problems only.")
    if few := [n for n in counts if 1 < n <= 5]:
        n = few[0]
        said.append(
            f"From {n} seeds an interval rests on the assumption that differences are about normal. The exact sign-flip test "
            f"assumes less and cannot give a p below {2 / 2**n:.2g} with {n} seeds."
        )
    if max(len(report.comparisons), len(report.effects)) > 1:
        of_arms, of_fields = len(report.comparisons), len(report.effects)
        said.append(
            f"P-values are corrected (Holm) for the {of_arms} comparisons with the baseline"
            + (f", those of fields for the {of_fields} sentences on fields" if of_fields else "")
            + "; intervals are not corrected."
        )
    if report.noise_floor is not None:
        said.append(
            f"The noise floor, the standard deviation of the baseline over its seeds, is {100 * report.noise_floor:.1f} points."
        )
    if report.across_commits:
        said.append(
            f"Runs of {len(report.across_commits)} versions of the code are compared: {', '.join(report.across_commits)}."
        )
    return said + missing_runs(report.missing)


def missing_runs(missing: Mapping[str, str]) -> list[str]:
    """A line per arm and cause of missing runs, or one for many arms that wait."""
    alike: dict[tuple[str, str], list[str]] = {}
    for run, what in missing.items():
        arm, _, seed = run.rpartition("/seed")
        alike.setdefault((arm, what), []).append(seed)
    waiting = [arm for arm, what in alike if what == "waiting"]
    many = len(waiting) > MOST_WAITING
    said = [
        f"Not in the table: {plain(arm)}/seed{', '.join(seeds)} ({plain(what)})."
        for (arm, what), seeds in alike.items()
        if not (many and what == "waiting")
    ]
    return said + ([f"Not in the table: runs of {len(waiting)} arms (waiting); report.json names them."] if many else [])


MOST_WAITING = 10  # arms that are named: a search leaves most of a grid untried


def markdown(report: Report, folder: Path) -> str:
    effects = [sentence(c, report.noise_floor, of_field=True) for c in report.effects]
    if not report.is_grid:
        effects = [sentence(c, report.noise_floor) for c in report.comparisons] + effects
    exact = [f"- {plain(c.what)}: {c.sign_flip:.2g}" for c in report.comparisons if c.sign_flip is not None]
    parts = [
        f"# {plain(folder.name)}",
        "\n".join(table(report)) if report.arms else "No run is done.",
        "\n".join(f"- {s}" for s in effects),
    ]
    parts += ["Exact sign-flip p-values, uncorrected:\n\n" + "\n".join(exact)] if exact else []
    parts += ["\n".join(f"- {line}" for line in caveats(report))]
    if report.arms:
        best = plain(", ".join(report.pareto))
        parts.append(f"Best accuracy for their FLOPs, by the means and whatever their noise: {best}.")
    figures = sorted((folder / "figures").glob("*.png"))
    parts += ["\n".join(f"![{path.stem}](figures/{path.name})" for path in figures)] if figures else []
    return "\n\n".join(filter(None, parts)) + "\n"


def write_report(report: Report, folder: Path) -> str:
    """Write report.md and report.json; return the former."""
    text = markdown(report, folder)
    (folder / "report.md").write_text(text, encoding="utf-8")
    with replacing(folder / "report.json") as file:
        json.dump(as_json(report), file, indent=2, allow_nan=False)
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
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- figures ---


def draw_figures(report: Report, folder: Path, last_phase: str, say: Callable[[str], None]) -> list[Path]:
    """Draw the learning curves of the last phase, and accuracy against FLOPs; return
    the paths. An arm whose curves can't be read or have no common step is left out of
    the curves, which is said.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
    """
    from jaxreason.look import figures

    (folder / "figures").mkdir(exist_ok=True)
    groups = {}
    for arm in report.arms[:MOST_CURVES]:
        try:
            curves = [figures.read_curve(folder / "runs" / arm.name / f"seed{s}", report.metric, last_phase) for s in arm.seeds]
            figures.join_curves(curves)
        except (ValueError, KeyError, OSError) as error:  # another last phase, or a damaged file
            say(f"{arm.name} is not in curves.png: {' '.join(str(error).split())}")
        else:
            groups[arm.name] = curves
    paths = []
    if groups:
        paths.append(folder / "figures" / "curves.png")
        if left_out := len(report.arms) - MOST_CURVES:
            say(f"curves.png has the first {MOST_CURVES} arms, without {left_out} others") if left_out > 0 else None
        figures.draw(groups, report.metric, f"updates of phase {last_phase}", paths[-1])
    if report.arms:
        paths.append(folder / "figures" / "pareto.png")
        draw_pareto(report, paths[-1])
    return paths


MOST_CURVES = 8  # in a figure: colours are for so many, and a legend takes the space of the curves


def draw_pareto(report: Report, out: Path) -> None:
    """Draw accuracy against FLOPs, a point per arm with its interval over seeds."""
    from jaxreason.look.figures import COLORS, new_axes, save

    axes = new_axes()
    for i, arm in enumerate(report.arms):
        low, high = arm.over_seeds if arm.over_seeds[0] > -math.inf else arm.over_problems
        error = [[max(0.0, arm.mean - max(0.0, low))], [max(0.0, min(1.0, high) - arm.mean)]]
        few = len(report.arms) <= MOST_CURVES
        label = arm.name if few or arm.name in report.pareto[-MOST_CURVES:] else None
        color = COLORS[i % len(COLORS)] if label else "#bbbbbb"
        axes.errorbar(arm.flops, arm.mean, yerr=error, fmt="o", color=color, label=label, capsize=2)
    front = sorted((arm for arm in report.arms if arm.name in report.pareto), key=lambda arm: arm.flops)
    axes.plot([arm.flops for arm in front], [arm.mean for arm in front], color="#999999", linewidth=1, zorder=0)
    axes.set(xlabel="FLOPs per run", ylabel=report.metric.removeprefix("eval/"), xscale="log")
    save(axes, out)
