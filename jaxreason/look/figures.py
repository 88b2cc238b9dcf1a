"""Figures of metrics over steps, from the `metrics.jsonl` of runs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxreason.options import unknown_name_message

COLORS = (
    "#0072B2",
    "#D55E00",
    "#555555",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # distinguishable by colour-blind readers
LARGEST = 1e300  # values beyond it are not drawn, as differences of them may overflow


def read_curve(run: Path, metric: str, phase: str | None) -> dict[int, float]:
    """Read a metric of a run as a mapping from steps since the start of the phase to
    values.

    Raises:
      ValueError: the run has no such metric in the phase.
      FileNotFoundError: the folder holds no metrics.
    """
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    having = [line for line in lines if isinstance(line.get(metric), int | float)]
    if not having:
        raise ValueError(unknown_name_message(f"metric in {path}", metric, {name for line in lines for name in line}))
    inside = [line for line in having if phase in (None, line["phase"])]
    if not inside:
        raise ValueError(unknown_name_message(f"phase in {path}", phase, {line["phase"] for line in having}))
    before = [line for line in having if line["step"] < inside[0]["step"]]
    start = before[-1]["step"] if before else inside[0]["step"]
    return {line["step"] - start: line[metric] for line in before[-1:] + inside}


def join_curves(curves: Sequence[Mapping[int, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the steps that all curves have, and the mean, lowest and highest value at
    each.

    Raises:
      ValueError: they have no step in common.
    """
    steps = sorted(set.intersection(*map(set, curves)))
    if not steps:
        raise ValueError(f"{len(curves)} runs have no step in common; draw them with labels of their own")
    value_RT = np.array([[curve[step] for step in steps] for curve in curves])
    return np.array(steps), value_RT.mean(axis=0), value_RT.min(axis=0), value_RT.max(axis=0)


def draw(groups: Mapping[str, Sequence[Mapping[int, float]]], metric: str, xlabel: str, out: Path) -> None:
    """Draw the curves of all groups and write the figure to `out`."""
    axes = new_axes()
    for i, (label, curves) in enumerate(groups.items()):
        steps, mean, lowest, highest = join_curves(curves)
        color = COLORS[i % len(COLORS)]
        count = f", {len(curves)} runs: mean, lowest to highest" if len(curves) > 1 else ""
        axes.plot(steps, mean, color=color, marker="o", markersize=3.5, label=label + count)
        if len(curves) > 1:
            axes.fill_between(steps, lowest, highest, color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=metric.removeprefix("eval/"))
    if "accuracy" in metric:
        axes.set_ylim(-0.02, 1.02)
    save(axes, out)


def new_axes():
    """Make the axes of a figure in the style of this project."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def save(axes, out: Path) -> None:
    """Write the figure of some axes, with a legend, as a PNG file.

    It has a palette: the shaded bands of several curves take 130 kB without one.
    """
    from matplotlib import pyplot
    from PIL import Image

    labels = axes.get_legend_handles_labels()
    if len(labels[1]) > MOST_INSIDE:  # below the axes: within them it would hide the curves
        width, height = axes.figure.get_size_inches()
        axes.figure.set_size_inches(width, height + 0.18 * -(-len(labels[1]) // 2))
        axes.figure.legend(*labels, loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    elif labels[1]:
        axes.legend(frameon=False, fontsize=8)
    drawn = io.BytesIO()
    axes.figure.savefig(drawn, dpi=130)
    pyplot.close(axes.figure)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(PALETTE).save(out, optimize=True)


MOST_INSIDE = 5  # entries of a legend within the axes
PALETTE = 128  # colours of a figure
