"""Line charts as inline SVG, with a read-out, a legend and a table of their numbers;
and the same charts as PNG files.

`figure` makes the HTML of a chart, and `record` the data from which `SCRIPT` fills the
read-out and the table. Colours are those of `figures.COLORS`; `STYLE` has lighter ones
for dark pages. PNG files need matplotlib, pages do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxreason.look.figures import COLORS, LARGEST, new_axes, save
from jaxreason.look.page import escape

DARK_COLORS = ("#4aa8e8", "#ff8a4c", "#a9b1b9", "#2fc79a", "#e59fca", "#f2b631", "#9bd6ff", "#f2f2f2")
DASHES = ("", "6 3", "2 3", "8 3 2 3")  # one more time around the colours
MOST_DOTS = 60  # a line of more points has no dots
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Series(NamedTuple):
    """One line of a chart. A y that is None or not finite is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()  # empty: none
    high: Sequence[float | None] = ()
    spread: str = "whiskers"  # how low and high are drawn: "whiskers" or "band"
    color: int = 0  # position in COLORS; beyond them, lines are dashed
    more: Mapping[str, Sequence[float | None]] = {}  # further columns of the table


class Chart(NamedTuple):
    """Lines over one axis."""

    title: str
    x_label: str
    series: Sequence[Series]
    spread_label: str = ""  # what low and high are
    y_range: tuple[float | None, float | None] = (None, None)  # values that the axis includes, at least
    log_y: bool = False
    note: str = ""
    whole_x: bool = False  # x counts something, so that ticks between whole numbers make no sense


class Axis(NamedTuple):
    """A range of values, as drawn, and its ticks with their labels."""

    low: float
    high: float
    ticks: list[tuple[float, str]]
    factor: str = ""  # by which the labels are to be multiplied
    log: bool = False

    def place(self, value: float, start: float, end: float) -> float:
        """Return the position of a value on an axis that is drawn from start to end."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        value = math.log10(max(value, self.low)) if self.log else value
        return start + (value - low) / (high - low) * (end - start)


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def nice_step(raw: float) -> float:
    """Return the smallest of 1, 2, 2.5 or 5 times a power of ten that is >= raw."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))


def axis(values: Sequence[float], most: int, *, tight: bool = False, log: bool = False, whole: bool = False) -> Axis:
    """Make an axis for some values with about `most` ticks.

    It ends at ticks, unless it is `tight`: then at the values. A log axis needs values
    above 0. The ticks of a `whole` axis are whole numbers.
    """
    low, high = (min(values), max(values)) if len(values) else (0.0, 1.0)
    if log:
        return log_axis(low, high)
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # one value
        pad = 0.5 * abs(high) if high else 1.0
        low, high = low - pad, high + pad
    step = nice_step((high - low) / most)
    step = max(1.0, math.ceil(step)) if whole else step
    if not tight:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    power = 3 * math.floor(math.log10(max(abs(low), abs(high))) / 3)
    power = power if power >= 6 or power <= -6 else 0
    scaled = step / 10.0**power
    decimals = next((d for d in range(12) if abs(round(scaled, d) - scaled) < 1e-9 * scaled), 12)
    marks = [(i * step, f"{i * scaled + 0.0:,.{decimals}f}".replace("-", "−")) for i in range(first, last + 1)]
    return Axis(low, high, marks, f"×10{str(power).translate(SUPERSCRIPTS)}" if power else "")


def log_axis(low: float, high: float) -> Axis:
    """Make a logarithmic axis with ticks at powers of ten, or at 1, 2 and 5 times them
    if the range is short.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = max(1, math.ceil((last - first) / 6))
    marks = [(10.0**p, f"10{str(p).translate(SUPERSCRIPTS)}") for p in range(first, last + 1, every)]
    if last - first <= 2:
        marks = [(m * 10.0**p, f"{m * 10.0**p:g}") for p in range(first, last + 1) for m in (1, 2, 5)]
    bottom, top = 10.0**first, 10.0**last
    return Axis(bottom, top, [mark for mark in marks if bottom <= mark[0] <= top], log=True)


class Frame(NamedTuple):
    """The axes of a chart and the rectangle that they span, in units of the SVG."""

    x: Axis
    y: Axis
    left: float
    top: float
    right: float
    bottom: float

    def point(self, x: float, y: float) -> tuple[float, float]:
        return self.x.place(x, self.left, self.right), self.y.place(y, self.bottom, self.top)


def frame(chart: Chart, width: int, height: int) -> Frame:
    """Lay out a chart."""
    x_values = [x for s in chart.series for x, y in zip(s.x, s.y) if finite(x) and finite(y)]
    y_values = [y for s in chart.series for y in (*s.y, *s.low, *s.high) if finite(y)]
    log = chart.log_y and bool(y_values) and min(y_values) > 0
    y_values += [y for y in chart.y_range if y is not None and not log]
    y = axis(y_values, 5, log=log)
    left = 14 + 6.6 * max(len(label) for _, label in y.ticks)
    return Frame(axis(x_values, max(3, width // 90), tight=True, whole=chart.whole_x), y, left, 18, width - 16, height - 38)


def svg(chart: Chart, width: int, height: int) -> str:
    """Draw a chart as an SVG element."""
    f = frame(chart, width, height)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" tabindex="0" aria-label="{escape(spoken(chart))}">']
    for value, label in f.y.ticks:
        _, y = f.point(f.x.low, value)
        parts.append(f'<path class="grid" d="M{f.left:.1f} {y:.1f}H{f.right:.1f}"/>')
        parts.append(f'<text class="tick" x="{f.left - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in f.x.ticks:
        x, _ = f.point(value, f.y.low)
        parts.append(f'<path class="axis" d="M{x:.1f} {f.bottom:.1f}v4"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{f.bottom + 17:.1f}" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="axis" d="M{f.left:.1f} {f.bottom:.1f}H{f.right:.1f}"/>')
    if f.y.factor:
        parts.append(f'<text class="tick" x="{f.left - 7:.1f}" y="9" text-anchor="start">{f.y.factor}</text>')
    label = f"{chart.x_label} {f.x.factor}".strip()
    middle = (f.left + f.right) / 2
    parts.append(f'<text class="label" x="{middle:.1f}" y="{height - 5}" text-anchor="middle">{escape(label)}</text>')
    crowded = ' class="crowded"' if len(chart.series) > 4 else ""
    parts.append(f"<g{crowded}>{''.join(piece for series in chart.series for piece in drawn(series, f))}</g>")
    return "".join([*parts, '<g class="cursor"></g></svg>'])


def spoken(chart: Chart) -> str:
    """Describe a chart to a screen reader; the table has its numbers."""
    return f"Chart: {chart.title} over {chart.x_label}, {len(chart.series)} line{'s' * (len(chart.series) != 1)}"


def drawn(series: Series, f: Frame) -> list[str]:
    """Draw a series: its band or whiskers, its line and its dots, one path each."""
    color = f"c{series.color % len(COLORS)}"
    dash = DASHES[series.color // len(COLORS) % len(DASHES)]
    parts, pieces = [], stretches(series.x, series.y)
    dots = [f.point(series.x[i], series.y[i]) for piece in pieces for i in piece]
    if series.low:
        edges = [
            (f.point(series.x[i], series.low[i]), f.point(series.x[i], series.high[i]))
            for piece in pieces
            for i in piece
            if finite(series.low[i]) and finite(series.high[i])
        ]
        if series.spread == "band" and edges:
            outline = [low for low, _ in edges] + [high for _, high in reversed(edges)]
            parts.append(f'<path class="band {color}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in outline)}Z"/>')
        elif edges:
            lines = "".join(f"M{x:.1f} {low:.1f}V{high:.1f}" for (x, low), (_, high) in edges)
            parts.append(f'<path class="whisker {color}" d="{lines}"/>')
    line = "".join(
        "M" + "L".join("{:.1f} {:.1f}".format(*f.point(series.x[i], series.y[i])) for i in piece) + "h0" * (len(piece) == 1)
        for piece in pieces
    )
    parts.append(f'<path class="line {color}"{f" stroke-dasharray={dash!r}" if dash else ""} d="{line}"/>')
    if len(dots) <= MOST_DOTS:
        marks = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in dots)
        parts.append(f'<path class="dots {color}" d="{marks}"/>')
    return parts


def stretches(x: Sequence[float], y: Sequence[float | None]) -> list[list[int]]:
    """Return the positions of values between gaps, one list for each stretch."""
    found: list[list[int]] = [[]]
    for i, value in enumerate(y):
        if finite(value) and finite(x[i]):
            found[-1].append(i)
        elif found[-1]:
            found.append([])
    return [piece for piece in found if piece]


def legend(names: Sequence[tuple[str, int]]) -> str:
    """Make the HTML legend of some (name, colour)."""
    keys = []
    for name, color in names:
        dash = DASHES[color // len(COLORS) % len(DASHES)]
        line = f'<path class="line c{color % len(COLORS)}"{f" stroke-dasharray={dash!r}" if dash else ""} d="M1 6H21"/>'
        keys.append(f'<li><svg viewBox="0 0 22 12" width="22" height="12" aria-hidden="true">{line}</svg>{escape(name)}</li>')
    return f'<ul class="legend">{"".join(keys)}</ul>'


def figure(chart: Chart, key: str, *, width: int = 430, height: int = 250, with_legend: bool = True) -> str:
    """Make the HTML of a chart. `key` is its name in the data of the page."""
    names = [(s.name, s.color) for s in chart.series]
    parts = [f'<figure class="chart" data-chart="{key}"><figcaption><b>{escape(chart.title)}</b>']
    parts += [f" <span>{escape(note)}</span>" for note in (chart.note,) if note]
    parts.append("</figcaption>")
    if with_legend and len(names) > 1:
        parts.append(legend(names))
    parts.append(f'<div class="plot">{svg(chart, width, height)}<div class="readout" aria-live="polite" hidden></div></div>')
    parts.append('<details class="numbers"><summary>Numbers</summary></details></figure>')
    return "".join(parts)


def record(chart: Chart, *, width: int = 430, height: int = 250) -> dict[str, Any]:
    """Return what `SCRIPT` needs of a chart."""
    f = frame(chart, width, height)
    return {
        "x": chart.x_label,
        "spread": chart.spread_label,
        "box": [f.left, f.top, f.right, f.bottom],
        "range": [f.x.low, f.x.high, f.y.low, f.y.high],
        "log": f.y.log,
        "series": [
            {"name": s.name, "color": s.color % len(COLORS), "x": list(s.x), "y": list(s.y)}
            | ({"low": list(s.low), "high": list(s.high)} if s.low else {})
            | ({"more": {name: list(values) for name, values in s.more.items()}} if s.more else {})
            for s in chart.series
        ],
    }


def draw_png(chart: Chart, out: Path) -> None:
    """Write a chart as a PNG file. Needs matplotlib."""
    axes = new_axes()
    for s in chart.series:
        color, dash = COLORS[s.color % len(COLORS)], ("-", "--", ":", "-.")[s.color // len(COLORS) % len(DASHES)]
        kept = [i for piece in stretches(s.x, s.y) for i in piece]
        x, y = [s.x[i] for i in kept], [s.y[i] for i in kept]
        marker = "o" if len(x) <= MOST_DOTS else ""
        axes.plot(x, y, color=color, linestyle=dash, marker=marker, markersize=3, label=plain(s.name))
        edges = [(s.x[i], s.low[i], s.high[i]) for i in kept if s.low and finite(s.low[i]) and finite(s.high[i])]
        if edges and s.spread == "band":
            axes.fill_between(*zip(*edges), color=color, alpha=0.2, linewidth=0)
        elif edges:
            axes.vlines(*zip(*edges), color=color, alpha=0.6, linewidth=1)
    ends = [y for y in chart.y_range if y is not None]
    low, high = axes.get_ylim()
    axes.set_ylim(min([low, *ends]), max([high, *ends]))
    if chart.log_y and all(y > 0 for s in chart.series for y in s.y if finite(y)):
        axes.set_yscale("log")
    axes.set(xlabel=plain(chart.x_label), ylabel=plain(chart.title))
    save(axes, out)


def plain(text: str) -> str:
    """Return a text as matplotlib shows it, without formulas between dollars."""
    return "".join(c if c.isprintable() else "?" for c in text[:60]).replace("$", r"\$")


STYLE = (
    ":root {"
    + "".join(f" --c{i}: {color};" for i, color in enumerate(COLORS))
    + " }\n@media (prefers-color-scheme: dark) { :root {"
    + "".join(f" --c{i}: {color};" for i, color in enumerate(DARK_COLORS))
    + " } }\n"
    + "".join(f".c{i} {{ --color: var(--c{i}); }}\n" for i in range(len(COLORS)))
    + """
figure.chart { margin: 0; min-width: 0; }
figure.chart figcaption { font-size: 14px; }
figure.chart figcaption span, .legend { color: var(--faint); font-size: 13px; }
.plot { position: relative; }
.plot > svg { display: block; width: 100%; height: auto; }
svg .grid, svg .axis { fill: none; stroke: var(--line); stroke-width: 1; }
svg .axis { stroke: var(--faint); }
svg text { font: 11px system-ui, sans-serif; fill: var(--faint); font-variant-numeric: tabular-nums; }
svg .line, svg .whisker, svg .dots { fill: none; stroke: var(--color); stroke-width: 1.75; stroke-linejoin: round;
  stroke-linecap: round; }
svg .line[stroke-dasharray] { stroke-linecap: butt; }
svg .whisker { stroke-width: 1.5; opacity: .6; stroke-linecap: butt; }
svg .dots { stroke-width: 5; }
svg .band { fill: var(--color); opacity: .18; }
svg .crowded .band { opacity: .09; }
svg .cursor path { stroke: var(--faint); stroke-width: 1; stroke-dasharray: 3 3; fill: none; }
svg .cursor circle { fill: var(--color); stroke: var(--paper); stroke-width: 1.5; }
ul.legend { list-style: none; margin: .1rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1rem; }
ul.legend svg { margin-right: .35rem; vertical-align: middle; }
.readout { position: absolute; top: 1rem; z-index: 1; pointer-events: none; width: max-content; max-width: min(60%, 26rem);
  padding: .3rem .6rem; font-size: 13px; font-variant-numeric: tabular-nums; color: var(--ink); background: var(--paper);
  border: 1px solid var(--line); border-radius: 4px; box-shadow: 0 2px 8px #0003; overflow-wrap: anywhere; }
.readout[hidden] { display: none; }
.readout i { font-style: normal; width: .6rem; height: .6rem; display: inline-block; border-radius: 50%; background: var(--color);
  margin-right: .3rem; }
details.numbers { font-size: 13px; margin: 0; min-width: 0; }
details.numbers > div { max-height: 20rem; overflow: auto; border: 1px solid var(--line); padding: 0 .5rem; }
details.numbers th { position: sticky; top: 0; background: var(--paper); }
summary { cursor: pointer; }
details.numbers td:first-child { white-space: nowrap; }
details.numbers summary { color: var(--faint); width: fit-content; }
"""
)

SCRIPT = r"""
const SVG = "http://www.w3.org/2000/svg";
function drawing(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
function number(value, digits = 4) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e9) return value.toLocaleString("en-US");
  if (size && (size < 1e-4 || size >= 1e9)) {
    const [digits, power] = value.toExponential(3).split("e");
    const raised = [...power.replace("+", "")].map(c => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("");
    return `${Number(digits)}×10${raised}`;
  }
  return value.toLocaleString("en-US", {maximumSignificantDigits: size >= 1000 ? 6 : digits});
}
function nearest(values, x) {
  let best = 0;
  values.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(values[best] - x)) best = i; });
  return best;
}
function fillTable(details, chart) {
  if (details.querySelector("table")) return;
  const named = chart.series.length > 1;
  const more = [...new Set(chart.series.flatMap(s => Object.keys(s.more || {})))];
  const spread = chart.series.some(s => s.low);
  const heads = [...(named ? ["line"] : []), chart.x, "value",
    ...(spread ? [chart.spread + ", low", chart.spread + ", high"] : []), ...more];
  const rows = chart.series.flatMap(s => s.x.map((x, i) => element("tr", {},
    named ? element("td", {}, visible(s.name)) : null,
    [x, s.y[i], ...(spread ? [s.low?.[i], s.high?.[i]] : []), ...more.map(name => s.more?.[name]?.[i])]
      .map(value => element("td", {class: "number"}, number(value))))));
  details.append(element("div", {tabindex: 0}, element("table", {},
    element("thead", {}, element("tr", {},
      heads.map((head, i) => element("th", {class: named && !i ? "" : "number"}, visible(head))))),
    element("tbody", {}, rows))));
}
function watch(figure) {
  const chart = data.charts[figure.dataset.chart], svg = figure.querySelector(".plot > svg");
  const cursor = svg.querySelector(".cursor"), readout = figure.querySelector(".readout");
  const [left, top, right, bottom] = chart.box, [x0, x1, y0, y1] = chart.range;
  const xs = [...new Set(chart.series.flatMap(s => s.x))].sort((a, b) => a - b);
  let at = -1;
  const height = y => chart.log ? Math.log10(Math.max(y, y0)) : y;
  function show(i) {
    at = i;
    const place = x => left + (x - x0) / (x1 - x0) * (right - left), x = xs[i], px = place(x);
    cursor.replaceChildren(drawing("path", {d: `M${px} ${top}V${bottom}`}));
    const part = px / svg.viewBox.baseVal.width, lines = [];
    readout.style.left = part < .5 ? `calc(${part * 100}% + 12px)` : "auto";
    readout.style.right = part < .5 ? "auto" : `calc(${100 - part * 100}% + 12px)`;
    readout.style.maxWidth = `calc(${Math.max(part, 1 - part) * 100}% - 14px)`;
    readout.hidden = false;
    for (const s of chart.series) {
      const j = nearest(s.x, x), y = s.y[j];
      if (y == null || Math.abs(s.x[j] - x) > (x1 - x0) / 40) continue;
      const py = bottom - (height(y) - height(y0)) / (height(y1) - height(y0)) * (bottom - top);
      cursor.append(drawing("circle", {class: "c" + s.color, r: 4, cx: place(s.x[j]), cy: py}));
      const spread = s.low && s.low[j] != null ? ` [${number(s.low[j], 3)}, ${number(s.high[j], 3)}]` : "";
      const name = chart.series.length > 1 ? " " + visible(s.name) : "";
      lines.push([y, element("div", {}, element("i", {class: "c" + s.color}), element("b", {}, number(y, 3)), spread + name)]);
    }
    const sorted = lines.sort((a, b) => b[0] - a[0]).map(line => line[1]);
    readout.replaceChildren(element("div", {}, `${visible(chart.x)}: ${number(x)}`), ...sorted);
  }
  function hide() { at = -1; cursor.replaceChildren(); readout.replaceChildren(); readout.hidden = true; }
  svg.addEventListener("pointermove", event => {
    const place = svg.getBoundingClientRect();
    const px = (event.clientX - place.left) / place.width * svg.viewBox.baseVal.width;
    if (xs.length) show(nearest(xs, x0 + (px - left) / (right - left) * (x1 - x0)));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", event => {
    const move = {ArrowLeft: -1, ArrowRight: 1, Home: -xs.length, End: xs.length}[event.key];
    if (event.key === "Escape") hide();
    if (!move || !xs.length) return;
    event.preventDefault();
    show(Math.min(xs.length - 1, Math.max(0, at + move)));
  });
  const details = figure.querySelector("details.numbers");
  details.addEventListener("toggle", () => fillTable(details, chart));
}
document.querySelectorAll("figure.chart").forEach(watch);
"""
