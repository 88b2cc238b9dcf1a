"""The tables of a report: what was trained, accuracies and tests, times and costs,
configs and environments.

Texts of folders pass `escape` and are cut at `LONGEST` characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxreason.look import paired
from jaxreason.look import runs as runs_
from jaxreason.look.chart import SUPERSCRIPTS
from jaxreason.look.page import escape
from jaxreason.look.runs import Group, Run, mapping
from jaxreason.runtime.ledger import JOULES_FROM
from jaxreason.runtime.terminal import duration
from jaxreason.runtime.workdir import flat

LONGEST = 400  # characters of a value that are shown
MOST_COLUMNS = 6  # fields that are columns of a table
PARTS = {  # parts of the wall time, with their colours
    "sample": 0,
    "verify": 4,
    "learn": 1,
    "evaluate": 3,
    "compile": 5,
    "other": 2,
}
UNIT_NAMES = {
    "tokens": "tokens",
    "flops": "FLOPs",
    "bytes": "bytes read by decoding",
    "device_s": "device seconds",
    "joules": "joules",
}
SHARES = {"mfu": "of peak FLOP/s", "bandwidth": "of peak bandwidth"}


class Cell(NamedTuple):
    """A cell of a table that holds a number."""

    text: str


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """Make a table; cells are texts, or numbers as `Cell`."""
    rows = [list(row) for row in rows]
    numeric = [any(isinstance(row[i], Cell) for row in rows) for i in range(len(heads))]

    def cell(tag: str, value: Any, is_number: bool) -> str:
        text = cut(value.text if isinstance(value, Cell) else value)
        kind = " ".join(["number"] * is_number + ["long"] * (len(text) > 40))
        return f'<{tag} class="{kind}">{escape(text)}</{tag}>' if kind else f"<{tag}>{escape(text)}</{tag}>"

    def row(tag: str, values: Sequence[Any]) -> str:
        return f"<tr>{''.join(cell(tag, value, is_number) for value, is_number in zip(values, numeric))}</tr>"

    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(row("td", values) for values in rows)
    made = f"<table>{title}<thead>{row('th', heads)}</thead><tbody>{body}</tbody></table>"
    return f'<div class="table" tabindex="0">{made}</div>'


def cut(text: Any, most: int = LONGEST) -> str:
    text = str(text)
    return text if len(text) <= most else f"{text[:most]} ... ({len(text):,} characters)"


def amount(value: float | None) -> str:
    """Format a count: with commas, or from 10^8 on with a power of ten."""
    if value is None:
        return "–"
    if abs(value) >= 1e8:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{mantissa}×10{str(int(power)).translate(SUPERSCRIPTS)}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def interval(low: float | None, high: float | None, sign: str = "") -> str:
    return "" if low is None or high is None or not np.isfinite([low, high]).all() else f" [{low:{sign}.3f}, {high:{sign}.3f}]"


def mean_text(mean: paired.Mean | None) -> str:
    return "–" if mean is None else f"{mean.value:.3f}{interval(mean.low, mean.high)}"


def p_text(p: float | None) -> str:
    return "–" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def suite_text(suite: str, temperature: float) -> str:
    return f"{cut(suite, 80)}, {'greedy' if temperature == 0 else f'T={temperature:g}'}"


# --- sections ---


def headline(groups: Sequence[Group]) -> str:
    """Say what was trained, how it ended, and what it took."""
    warned = notes_list(groups)
    if len(groups) > 1:
        first = described(groups[0].runs[0])
        same = all(described(group.runs[0]) == first for group in groups)
        return f"<p>{'' if same else f'{escape(groups[0].label)}: '}{escape(first)}</p>{warned}{overview(groups)}"
    group = groups[0]
    several = len(group.runs) > 1
    seeds = f"{len(group.runs)} runs with seeds {seeds_text(group)}. " if several else ""
    tiles = [*accuracy_tiles(group), *cost_tiles(group)]
    made = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class=faint>{escape(more)}</dd></div>"
        for name, value, more in tiles
    )
    return f"<p>{escape(seeds)}{escape(described(group.runs[0]))}</p>{warned}<dl class=tiles>{made}</dl>"


def notes_list(groups: Sequence[Group]) -> str:
    """List what is missing or unfinished, with the names of the runs if there are
    several.
    """
    runs = [run for group in groups for run in group.runs]
    about: dict[str, list[str]] = {}
    for name, run in zip(runs_.name_folders([run.folder for run in runs]), runs):
        for note in run.notes:
            about.setdefault(note, []).append(cut(name, 60))
    lines = []
    for note, names in about.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"{', '.join(names[:3])}{more}: {cut(note)}" if len(runs) > 1 else cut(note))
    return f'<ul class="notes">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def seeds_text(group: Group) -> str:
    seeds = [run.seed for run in group.runs]
    if len(seeds) > 2 and all(type(seed) is int for seed in seeds) and sorted(seeds) == list(range(min(seeds), max(seeds) + 1)):
        return f"{min(seeds)}–{max(seeds)}"
    return ", ".join(cut(seed, 20) for seed in seeds)


def described(run: Run) -> str:
    """Say in a line what was trained."""
    model, parts = mapping(run.config.get("model")), []
    if name := model.get("name"):
        count = runs_.number(run.summary.get("parameters"))
        weights = f" from {model['weights']}" if model.get("weights") not in (None, "random") else ""
        parts.append(f"Model {cut(name, 60)}{cut(weights, 80)}{f' with {count:,} parameters' if count else ''}.")
    for name, steps in runs_.phase_steps(run.config).items():
        section = mapping(run.config.get(name))
        source, objective = (mapping(section.get(part)) for part in ("source", "objective"))
        task = mapping(source.get("task")).get("name")
        what = f"{source.get('name')}{f' of {task}' if task else ''} × {objective.get('name')}"
        parts.append(f"Phase {cut(name, 40)}: {cut(what, 120)}, {steps:,} steps.")
    return " ".join(parts)


def accuracy_tiles(group: Group) -> list[tuple[str, str, str]]:
    """Make the tiles of accuracies: before the last phase, and at the end."""
    tiles, changed = [], paired.changes(group)
    for suite, temperature in paired.suites_of([group]):
        last = [found[-1] for run in group.runs if (found := paired.of_suite(run, suite, temperature))]
        mean, name = paired.mean_of(last), suite_text(suite, temperature)
        over = f"over {len(last)} seeds" if len(last) > 1 else f"over {last[0].n:,} problems" if last[0].n else ""
        d = next((d for d in reversed(changed) if suite_text(d.suite, d.temperature) == name), None)
        if d is None:
            tiles.append((name, f"{mean.value:.3f}", f"{mean_text(mean)} {over}"))
            continue
        more = f"{mean_text(mean)} {over}; change {d.difference:+.3f}{interval(d.low, d.high, '+')}"
        tiles.append((f"{name}: {d.a} → {d.b}", f"{d.before:.3f} → {d.after:.3f}", more))
    return tiles


def cost_tiles(group: Group) -> list[tuple[str, str, str]]:
    """Make the tiles of what a run took; means over several runs."""
    several = " (mean of runs)" if len(group.runs) > 1 else ""
    times = [time for run in group.runs if (time := runs_.wall_s(run)) is not None]
    tiles = [(f"Wall time{several}", duration(float(np.mean(times))), "")] if times else []
    totals = mean_used(group)
    for unit, label in (("tokens", "Tokens"), ("flops", "FLOPs"), ("joules", "Joules")):
        kinds = totals.get(unit)
        if kinds:
            more = ", ".join(f"{kind} {amount(value)}" for kind, value in kinds.items() if value)
            if unit == "joules":
                more += f"; {joules_from(group.runs[0])}"
            tiles.append((f"{label}{several}", amount(sum(kinds.values())), more))
        elif unit == "joules":
            tiles.append(("Joules", "not known", joules_from(group.runs[0])))
    return tiles


def mean_used(group: Group) -> dict[str, dict[str, float]]:
    """Return what a run of a group used on average: {unit: {kind: amount}}."""
    each = [runs_.used(run) for run in group.runs]
    found: dict[str, dict[str, float]] = {}
    for unit in dict.fromkeys(unit for one in each for unit in one):
        kinds = dict.fromkeys(kind for one in each for kind in one.get(unit, {}))
        found[unit] = {kind: float(np.mean([one.get(unit, {}).get(kind, 0.0) for one in each])) for kind in kinds}
    return found


def overview(groups: Sequence[Group]) -> str:
    """Make the table of groups: final accuracies and what they took."""
    suites = paired.suites_of(groups)
    rows = []
    for group in groups:
        totals = {unit: sum(kinds.values()) for unit, kinds in mean_used(group).items()}
        row: list[Any] = [group.label, seeds_text(group)]
        for suite, temperature in suites:
            last = [found[-1] for run in group.runs if (found := paired.of_suite(run, suite, temperature))]
            row.append(Cell(mean_text(paired.mean_of(last))))
        times = [time for run in group.runs if (time := runs_.wall_s(run)) is not None]
        row.append(Cell(duration(float(np.mean(times))) if times else "–"))
        row += [Cell(amount(totals.get(unit))) for unit in ("tokens", "flops")]
        if any("joules" in mean_used(g) for g in groups):
            row.append(Cell(amount(totals.get("joules"))))
        rows.append(row)
    heads = ["runs", "seeds", *(suite_text(*suite) for suite in suites), "wall time", "tokens", "FLOPs", "joules"]
    return table(
        heads[: len(rows[0])],
        rows,
        "Last evaluations, with 95 % intervals (over problems for one run, over seeds for several), and the mean cost of a run.",
    )


def evaluations(groups: Sequence[Group]) -> str:
    suites, stages = paired.suites_of(groups), paired.stages(groups)
    if not suites:
        return ""
    several = len(groups) > 1
    rows = []
    for suite, temperature in suites:
        for group in groups:
            means = [paired.stage_mean(group, suite, temperature, stage) for stage in stages]
            if any(means):
                last = next(found[-1] for run in group.runs if (found := paired.of_suite(run, suite, temperature)))
                size = f"{last.n:,}{f' × {last.samples}' if last.samples > 1 else ''}" if last.n else "–"
                label = [group.label] if several else []
                rows.append([*label, suite_text(suite, temperature), Cell(size), *(Cell(mean_text(mean)) for mean in means)])
    last_of = "end of" if all(run.done for group in groups for run in group.runs) else "last in"
    names = [stage if stage == "start" else f"{last_of} {stage}" for stage in stages]
    one = all(len(group.runs) == 1 for group in groups)
    kind = "95 % intervals over problems" if one else "95 % t-intervals over seeds where a group has several runs"
    parts = [table([*["runs"] * several, "suite", "problems", *names], rows, f"Accuracy with {kind}.")]
    if changed := [(group.label, d) for group in groups for d in paired.changes(group)]:
        rows = [[*([label] if several else []), *change_cells(d)] for label, d in changed]
        heads = [*["runs"] * several, "suite", "from", "to", "accuracy", "change", "p", "test"]
        parts.append(table(heads, rows, "Changes within runs, with 95 % intervals."))
    if several and (compared := paired.between(groups)):
        rows = [
            [d.b, *change_cells(d)[:1], *change_cells(d)[3:5], Cell(p_text(d.p)), Cell(p_text(d.corrected)), d.how]
            for d in compared
        ]
        heads = ["runs", "suite", "accuracy", "difference", "p", "p (Holm)", "test"]
        words = (
            f"Last evaluations less those of {cut(groups[0].label, 80)}, with 95 % intervals; p (Holm) is corrected for all rows."
        )
        parts.append(table(heads, rows, words))
    return "".join([*parts, measures(groups)])


def change_cells(d: paired.Difference) -> list[Any]:
    change = f"{d.difference:+.3f}{interval(d.low, d.high, '+')}"
    return [
        suite_text(d.suite, d.temperature),
        d.a,
        d.b,
        Cell(f"{d.before:.3f} → {d.after:.3f}"),
        Cell(change),
        Cell(p_text(d.p)),
        d.how,
    ]


def measures(groups: Sequence[Group]) -> str:
    """Make the table of what else was measured in the last evaluations; means over
    runs.
    """
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for suite, temperature in paired.suites_of(groups):
        for group in groups:
            last = [found[-1] for run in group.runs if (found := paired.of_suite(run, suite, temperature))]
            values: dict[str, list[float]] = {}
            for evaluation in last:
                for name, value in evaluation.measures.items():
                    values.setdefault(name, []).append(value)
            if values:
                rows[group.label, suite_text(suite, temperature)] = {name: float(np.mean(v)) for name, v in values.items()}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    if not names:
        return ""
    columns = [label[1] if len(groups) == 1 else f"{cut(label[0], 60)}: {label[1]}" for label in rows]
    body = [[name, *(Cell(f"{row[name]:.4g}" if name in row else "–") for row in rows.values())] for name in names]
    made = table(["measure", *columns], body)
    return f"<details><summary>Further measures of the last evaluations ({len(names)})</summary>{made}</details>"


def cost(groups: Sequence[Group]) -> str:
    """Make the split of the wall time, and the ledger."""
    rows, bars = [], []
    for group in groups:
        splits = [runs_.time_split(run) for run in group.runs]
        mean = {part: float(np.mean([split[part] for split in splits])) for part in PARTS}
        total = sum(mean.values())
        if not total:
            continue
        shares = {part: seconds / total for part, seconds in mean.items()}
        pieces = "".join(
            f'<span class="c{PARTS[part]}" style="flex-grow:{share:.4f}" title="{part}: {mean[part]:.1f} s, {share:.1%}"></span>'
            for part, share in shares.items()
            if share > 0
        )
        said = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
        label = f"<div>{escape(group.label)}</div>" if len(groups) > 1 else ""
        bars.append(f'<div class="split">{label}<div class="bar" role="img" aria-label="{said}">{pieces}</div></div>')
        cells = [Cell(f"{duration_text(mean[part])} ({shares[part]:.0%})") for part in PARTS]
        rows.append([group.label, *cells, Cell(duration_text(total))])
    parts = []
    if rows:
        keys = "".join(f'<li><i class="c{color}"></i>{part}</li>' for part, color in PARTS.items())
        heads, body = (["runs"], rows) if len(groups) > 1 else ([], [row[1:] for row in rows])
        words = "Wall time"
        words += ", mean of runs" if any(len(group.runs) > 1 for group in groups) else ""
        parts.append(f'<ul class="legend split">{keys}</ul>{"".join(bars)}{table([*heads, *PARTS, "total"], body, f"{words}.")}')
        parts.append(
            '<p class="faint">Other is what remains: building, saving, logging, waiting. If sampling is one batch ahead, it '
            "overlaps with learning, and the parts sum to more than the wall time.</p>"
        )
    return "".join([*parts, ledgers(groups)])


def duration_text(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def ledgers(groups: Sequence[Group]) -> str:
    """Make the table of tokens, FLOPs, device seconds and joules by kind of work."""
    several, rows = len(groups) > 1, []
    units = [unit for unit in UNIT_NAMES if unit != "bytes" or any(unit in mean_used(group) for group in groups)]
    shares = [(name, title) for name, title in SHARES.items() if any(shares_of(group, name) for group in groups)]
    for group in groups:
        totals = mean_used(group)
        kinds = list(dict.fromkeys(kind for by_kind in totals.values() for kind in by_kind))
        label = [group.label] if several else []
        for kind in kinds:
            amounts = [Cell(amount(totals.get(unit, {}).get(kind) or None)) for unit in units]
            told = [
                Cell(f"{share:.2%}" if (share := shares_of(group, name).get(kind)) is not None else "–") for name, _ in shares
            ]
            rows.append([*label, kind, *amounts, *told])
        if kinds:
            sums = [sum(totals[unit].values()) if unit in totals else None for unit in units]
            rows.append([*label, "all", *(Cell(amount(total)) for total in sums), *(Cell("–") for _ in shares)])
    if not rows:
        return ""
    mean = ", mean of runs" if any(len(group.runs) > 1 for group in groups) else ""
    sources = sorted({joules_from(run) for group in groups for run in group.runs})
    heads = [*["runs"] * several, "work", *(UNIT_NAMES[unit] for unit in units), *(title for _, title in shares)]
    made = table(heads, rows, f"Ledger{mean}. Joules: {'; '.join(sources)}.") + gains(groups)
    return f"<details><summary>Ledger of all groups</summary>{made}</details>" if several else made


def joules_from(run: Run) -> str:
    """Say where a run's joules are from."""
    source = run.summary.get("joules_from")
    if isinstance(source, str) and source in JOULES_FROM:
        return JOULES_FROM[source]
    return JOULES_FROM["watts"] if "joules" in runs_.used(run) else "no counter was read, and config.log.watts is not set"


def shares_of(group: Group, name: str) -> dict[str, float]:
    """Return the fraction of a peak rate that a group's runs reached by kind of work,
    as the mean of those that say so.
    """
    found: dict[str, list[float]] = {}
    for run in group.runs:
        for kind, shares in mapping(run.summary.get("utilisation")).items():
            if (share := runs_.number(mapping(shares).get(name))) is not None:
                found.setdefault(kind, []).append(share)
    return {kind: float(np.mean(shares)) for kind, shares in found.items()}


def gains(groups: Sequence[Group]) -> str:
    """Make the table of what runs used per correct answer that they gained."""
    runs = [run for group in groups for run in group.runs]
    rows = []
    for name, run in zip(runs_.name_folders([run.folder for run in runs]), runs):
        cost = mapping(run.summary.get("per_correct_answer_gained"))
        if runs_.number(cost.get("gained")):
            units = ("gained", "tokens", "flops", "device_s", "joules")
            rows.append([name, str(cost.get("suite")), *(Cell(amount(runs_.number(cost.get(unit)))) for unit in units)])
    heads = ["run", "suite", "answers gained", "tokens", "FLOPs", "device seconds", "joules"]
    return (
        table(heads, rows, "All that a run used, per correct answer gained between its first and last evaluation.")
        if rows
        else ""
    )


def differences(groups: Sequence[Group]) -> str:
    """Make the tables of config fields and versions in which groups differ."""
    if len(groups) < 2:
        return ""
    labels = [group.label for group in groups]
    parts = []
    for name, trees in (
        ("config", [group.runs[0].config for group in groups]),
        ("environment", [group.runs[0].environment for group in groups]),
    ):
        found = {field: [value_text(value) for value in values] for field, values in runs_.differing(trees).items()}
        if not found:
            parts.append(f"<p>No difference of {name} but seeds.</p>")
        elif len(found) <= MOST_COLUMNS:  # a row for each group, since their labels are long
            parts.append(table(["runs", *found], zip(labels, *found.values()), f"Differences of {name}."))
        else:
            parts.append(table([name, *labels], [[field, *values] for field, values in found.items()], f"Differences of {name}."))
    return "".join(parts)


def value_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def settings(groups: Sequence[Group]) -> str:
    """Make the tables of folders, and of the environment and config of the first
    group; `differences` has what other groups have instead.
    """
    parts = [table(["runs", "seed", "state", "folder"], [run_row(group, run) for group in groups for run in group.runs])]
    first = groups[0].runs[0]
    of = f" of {cut(groups[0].label, 60)}" if len(groups) > 1 else ""
    if first.environment:
        rows = [[name, value_text(value)] for name, value in first.environment.items()]
        parts.append(f"<details open><summary>Environment{escape(of)}</summary>{table(['', 'value'], rows)}</details>")
    else:
        parts.append(f"<p>The environment{escape(of)} is not recorded.</p>")
    rows = [[name, value_text(value)] for name, value in sorted(flat(first.config).items())]
    if rows:
        made = table(["field", "value"], rows)
        parts.append(f"<details><summary>Config{escape(of)}: {len(rows)} fields</summary>{made}</details>")
    return "".join(parts)


def run_row(group: Group, run: Run) -> list[str]:
    state = "finished" if run.done else f"not finished, step {run.steps:,}"
    return [group.label, str(run.seed), state, str(run.folder)]
