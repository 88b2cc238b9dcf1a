"""The report of one run or several: one self-contained HTML page, and PNG files of its
charts.

Runs that differ in nothing but their seed are one line: their mean, with a band from
the lowest to the highest. Accuracies can be seen against steps, FLOPs, tokens, joules
and wall time, over the whole run or one phase. All numbers are those of the folders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxreason.look import chart as chart_
from jaxreason.look import report_charts as charts_
from jaxreason.look import runs as runs_
from jaxreason.look.chart import Chart
from jaxreason.look.page import escape, page
from jaxreason.look.report_tables import cost, cut, differences, evaluations, headline, settings
from jaxreason.look.runs import Group, Run
from jaxreason.runtime.files import replacing

WIDE, NARROW = (640, 300), (430, 230)  # sizes of charts, in units of their SVG


def write_report(folders: Sequence[Path], out: Path, *, png: bool = False) -> list[Path]:
    """Write the report of some runs as `out`, and with `png` its charts beside it;
    return what was written.

    Raises:
      ValueError: a folder is not that of a run.
      OSError: a file can't be read or written.
      ModuleNotFoundError: `png` needs matplotlib.
    """
    if not folders:
        raise ValueError("no run is given; needed: one or more folders of runs")
    found = [runs_.read_run(folder) for folder in {folder.resolve(): folder for folder in folders}.values()]
    made = Report(runs_.group_runs(found))
    out.parent.mkdir(parents=True, exist_ok=True)
    text = made.page()
    with replacing(out, encoding="utf-8") as file:
        file.write(text)
    return [out, *(write_pngs(made, out) if png else [])]


def write_pngs(made: Report, out: Path) -> list[Path]:
    """Write the charts that a page shows first as PNG files."""
    paths = []
    for i, (key, chart) in enumerate(made.first_charts.items()):
        name = re.sub(r"[^A-Za-z0-9]+", "_", key if key[0] != "_" else chart.title).strip("_").lower()[:60]
        paths.append(out.with_name(f"{out.stem}_{i:02d}_{name}.png"))
        chart_.draw_png(chart, paths[-1])
    return paths


class Report:
    """A report of groups of runs. Making its page collects its charts."""

    def __init__(self, groups: Sequence[Group]):
        self.groups = list(groups)
        self.charts: dict[str, dict] = {}  # for the page's script
        self.first_charts: dict[str, Chart] = {}  # those that are visible at first

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    def page(self) -> str:
        count = len(self.groups)
        title = (
            self.groups[0].label if count == 1 else f"{len(self.runs)} runs" + f" in {count} groups" * (count < len(self.runs))
        )
        sections = [
            ("Accuracy", self.accuracy()),
            ("Evaluations", evaluations(self.groups)),
            ("Training", self.training()),
            ("Time and cost", cost(self.groups)),
            ("Differences", differences(self.groups)),
            ("Config and environment", settings(self.groups)),
        ]
        sections = [(name, anchor(name), body) for name, body in sections if body]
        links = "".join(f'<a href="#{key}">{name}</a>' for name, key, _ in sections)
        parts = [f"<header><h1>{escape(cut(title, 120))}</h1>{headline(self.groups)}<nav>{links}</nav></header><main>"]
        parts += [f'<section id="{key}"><h2>{name}</h2>{body}</section>' for name, key, body in sections]
        return page(
            f"Report: {cut(title, 80)}",
            "".join([*parts, "</main>"]),
            style=chart_.STYLE + STYLE,
            script=chart_.SCRIPT + SCRIPT,
            data={"charts": self.charts},
        )

    def figure(self, chart: Chart, size: tuple[int, int], *, first: bool = True, with_legend: bool = True) -> str:
        """Add a chart to the page; return its HTML."""
        key = f"chart{len(self.charts)}"
        width, height = size
        self.charts[key] = chart_.record(chart, width=width, height=height)
        if first:
            self.first_charts[chart.title] = chart
        return chart_.figure(chart, key, width=width, height=height, with_legend=with_legend)

    def accuracy(self) -> str:
        """Make the charts of evaluations, once for each axis and range that the page
        can switch to.
        """
        quantities = charts_.evaluated(self.groups)
        if not quantities:
            return "<p>No evaluation is logged.</p>"
        units = charts_.units(self.runs)
        names = list(dict.fromkeys(phase.name for run in self.runs for phase in runs_.phases(run)))
        ranges = {"": "whole run"} | ({name: name for name in names} if len(names) > 1 else {})
        default = list(ranges)[-1]
        shown = []
        for i, (range_, _) in enumerate(ranges.items()):
            for unit in units:
                first = range_ == default and unit == "steps"
                charts = [charts_.evaluation_chart(q, self.groups, unit, range_ or None) for q in quantities]
                figures = "".join(self.figure(c, WIDE, first=first) for c in charts if c.series)
                figures = figures or "<p>No evaluation in this phase.</p>"
                hidden = "" if first else " hidden"
                shown.append(f'<div class="charts wide" data-unit="{unit}" data-range="{i}"{hidden}>{figures}</div>')
        switches = radios("unit", "Against", {unit: charts_.UNITS[unit] for unit in units}, "steps")
        if len(ranges) > 1:
            switches += radios("range", "Over", {str(i): name for i, name in enumerate(ranges.values())}, str(len(ranges) - 1))
        words = "Held-out problems."
        if any(len(group.runs) == 1 for group in self.groups):
            words += " Whiskers are the 95 % interval over problems."
        if any(len(group.runs) > 1 for group in self.groups):
            words += (
                " The line of several runs is their mean, at the steps that all have; the band spans the lowest to the highest."
                " Their numbers have the 95 % t-interval over seeds."
            )
        words += " FLOPs, tokens and joules are those of sampling and learning, without evaluations."
        return f'<p class="faint">{words}</p><div class="switches">{switches}</div>{"".join(shown)}'

    def training(self) -> str:
        """Make the charts of training metrics, by phase."""
        parts = []
        for name in dict.fromkeys(phase.name for run in self.runs for phase in runs_.phases(run)):
            main, others, constant = charts_.training_charts(self.groups, name)
            legend = chart_.legend([(group.label, i) for i, group in enumerate(self.groups)]) if len(self.groups) > 1 else ""
            figures = "".join(self.figure(c, NARROW, with_legend=False) for c in main)
            parts.append(f'<h3>Phase {escape(cut(name, 60))}</h3>{legend}<div class="charts">{figures}</div>')
            if others:
                figures = "".join(self.figure(c, NARROW, first=False, with_legend=False) for c in others)
                parts.append(
                    f'<details><summary>{len(others)} more metrics</summary><div class="charts">{figures}</div></details>'
                )
            if constant:
                listed = ", ".join(f"{escape(cut(metric, 80))} = {value:g}" for metric, value in constant.items())
                parts.append(f'<p class="faint">Constant: {listed}</p>')
        return "".join(parts)


def anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def radios(group: str, legend: str, names: Mapping[str, str], checked: str) -> str:
    made = [
        f'<label><input type="radio" name="{group}" value="{value}"{" checked" * (value == checked)}>'
        f"<span>{escape(cut(name, 40))}</span></label>"
        for value, name in names.items()
    ]
    return f"<fieldset><legend>{legend}</legend>{''.join(made)}</fieldset>"


STYLE = """
header, main { max-width: 1400px; margin: 0 auto; padding: 0 1.5rem; }
main { padding-bottom: 3rem; }
h1 { font-size: 1.5rem; margin: 1.25rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
header p { margin: .25rem 0 .75rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-top: 1rem; }
.faint { color: var(--faint); }
p.faint { font-size: 13px; max-width: 60rem; }
ul.notes { margin: .5rem 0; padding: .5rem .75rem .5rem 2rem; background: var(--shade); border-left: 3px solid var(--bad);
  overflow-wrap: anywhere; }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(15.5rem, 1fr)); gap: .75rem; margin: .75rem 0 0; }
dl.tiles > div { background: var(--shade); border-radius: 6px; padding: .6rem .8rem; min-width: 0; overflow-wrap: anywhere; }
dl.tiles dt { font-size: 13px; color: var(--faint); }
dl.tiles dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
dl.tiles dd.faint { font-size: 12.5px; line-height: 1.4; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.25rem 1.5rem;
  margin-top: .75rem; }
.charts.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 33rem), 1fr)); }
.charts.wide > figure { max-width: 52rem; }
.charts[hidden] { display: none; }
.switches { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; }
fieldset { border: 0; margin: 0; padding: 0; display: flex; flex-wrap: wrap; align-items: center; font-size: 14px; }
fieldset legend { float: left; padding: 0; margin-right: .5rem; color: var(--faint); }
fieldset label { cursor: pointer; }
fieldset input { position: absolute; opacity: 0; }
fieldset span { display: block; padding: .15rem .6rem; border: 1px solid var(--line); margin-left: -1px; }
fieldset input:checked + span { background: var(--accent); border-color: var(--accent); color: var(--paper); }
fieldset input:focus-visible + span { outline: 2px solid var(--accent); outline-offset: 2px; }
.table { overflow-x: auto; margin: .75rem 0 1.25rem; font-size: 14px; max-height: 40rem; overflow-y: auto; width: fit-content;
  max-width: 100%; }
.table caption { text-align: left; color: var(--faint); font-size: 13px; }
.table .long { overflow-wrap: anywhere; min-width: 16rem; }
.table th { white-space: nowrap; }
td.number { white-space: nowrap; }
.split { margin: .4rem 0; font-size: 14px; }
.bar { display: flex; height: 22px; gap: 1px; border-radius: 4px; overflow: hidden; }
.bar span { background: var(--color); min-width: 1px; flex-basis: 0; }
ul.legend.split i { display: inline-block; width: .75rem; height: .75rem; margin-right: .35rem; border-radius: 2px;
  background: var(--color); }
details { margin: .5rem 0; }
@media print { .switches, nav { display: none; } }
"""

SCRIPT = r"""
function turn() {
  const chosen = name => document.querySelector(`input[name=${name}]:checked`)?.value;
  const unit = chosen("unit"), range = chosen("range") ?? "0";
  for (const charts of document.querySelectorAll(".charts[data-unit]"))
    charts.hidden = charts.dataset.unit !== unit || charts.dataset.range !== range;
}
for (const input of document.querySelectorAll(".switches input")) input.addEventListener("change", turn);
turn();
"""
