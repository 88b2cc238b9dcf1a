"""Output for a person at the terminal: the live table, accuracies, rollouts.

Text from a model is untrusted: its control characters and markup are printed as text
and have no effect.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxreason.types import Evaluation, Rollout

SHOWN = (  # (metric, label, format): of the progress, in this order
    ("rollout/reward", "reward", "{:.3f}"),
    ("rollout/correct", "accuracy", "{:.3f}"),
    ("rollout/length", "length", "{:.0f}"),
    ("train/loss", "loss", "{:.4f}"),
    ("train/entropy", "entropy", "{:.3f}"),
    ("perf/tokens_per_s", "tokens/s", "{:,.0f}"),
)


# Mean per-token KL (k3) between the log-probs of sampler and learner at equal weights.
# Published: 1e-5 to 1e-3 is usual for dense models, 1e-3 to 1e-1 for mixtures of
# experts, in bfloat16 with SGLang as sampler (Miles, "Let Speed Be With Stability",
# 2025, github.com/zhaochenyang20/Awesome-ML-SYS-Tutorial, rlhf/mismatch); training is
# stable below 0.01 (Tinker's documentation, "RL basic", 2025). In float32 it is far
# smaller.
USUAL_KL = (1e-5, 1e-3)
STABLE_KL = 0.01
SHARES = (("time/sample_s", "sampling"), ("time/verify_s", "verifying"), ("time/learn_s", "learning"))


class At(NamedTuple):
    """Progress of a run: its latest metrics, and its steps."""

    values: Mapping[str, Any]  # with `phase`
    step: int
    total_steps: int
    phase_step: int | None = None
    phase_steps: int | None = None
    step_s: float = math.nan  # duration of a step; NaN: not known yet

    @property
    def steps_left(self) -> int:
        """Return the steps left of the phase, or of the run if those are not known."""
        return self.phase_steps - self.phase_step if self.phase_steps and self.phase_step is not None else self.run_steps_left

    @property
    def run_steps_left(self) -> int:
        return self.total_steps - self.step

    @property
    def phase(self) -> str:
        name = visible(str(self.values["phase"]))
        return f"{name} {self.phase_step}/{self.phase_steps}" if self.phase_steps else name


def cells(at: At) -> list[tuple[str, str]]:
    """Return what is known of a run as (label, text): place, time left, metrics, shares
    of time, accuracies of the last evaluation.

    The `eta` is for the phase's own steps; `run eta` assumes that later phases keep
    this pace.
    """
    found = [("phase", at.phase), ("step", f"{at.step}/{at.total_steps}")]
    if math.isfinite(at.step_s):
        found.append(("eta", duration(at.steps_left * at.step_s)))
        if at.run_steps_left > at.steps_left:
            found.append(("run eta", duration(at.run_steps_left * at.step_s)))
    found += [(label, form.format(at.values[name])) for name, label, form in SHOWN if name in at.values]
    found += [(label, f"{share:.0%}") for label, share in shares(at.values).items()]
    return found + [(label, f"{value:.3f}") for label, value in accuracies(at.values).items()]


def shares(values: Mapping[str, Any]) -> dict[str, float]:
    times = {label: values[name] for name, label in SHARES if name in values}
    total_s = sum(times.values())
    return {label: value / total_s for label, value in times.items()} if total_s > 0 else {}


def accuracies(values: Mapping[str, Any]) -> dict[str, float]:
    found = {name: value for name, value in values.items() if name.startswith("eval/") and name.endswith("/accuracy")}
    return {visible(name.removeprefix("eval/").removesuffix("/accuracy")): value for name, value in found.items()}


def table(at: At, width: int, height: int) -> list[str]:
    """Lay out the cells of a run for a terminal: labels with the texts under them, in
    as many rows as are needed, up to `height` lines. No line is wider than `width`.
    """
    rows: list[list[tuple[str, str]]] = [[]]
    for pair in cells(at):
        pair = [" ".join(text.split()) for text in pair]
        size = max(map(cell_len, pair))
        if rows[-1] and sum(cell_len(text) + 2 for _, text in rows[-1]) + size > width:
            rows.append([])
        rows[-1].append(tuple(" " * (size - cell_len(text)) + text for text in pair))
    lines = []
    for row in rows[: max(1, height // 2)]:
        labels, texts = (cut("  ".join(parts), width) for parts in zip(*row, strict=True))
        lines += [f"\x1b[2m{labels}\x1b[0m", texts]
    return lines


def cut(line: str, width: int) -> str:
    """Cut a line to the columns of a terminal; some characters take two."""
    return line if cell_len(line) <= width else set_cell_size(line, width)


def progress(at: At) -> str:
    """Format a progress line of the metrics that are known."""
    parts = [at.phase, f"step {at.step}/{at.total_steps}"]
    if math.isfinite(at.step_s):
        parts.append(f"eta {duration(at.steps_left * at.step_s)}")
        if at.run_steps_left > at.steps_left:
            parts.append(f"run {duration(at.run_steps_left * at.step_s)} at this pace")
    parts += [f"{label} {form.format(at.values[name])}" for name, label, form in SHOWN if name in at.values]
    parts += [f"{label} {value:.3f}" for label, value in accuracies(at.values).items()]
    if times := shares(at.values):
        parts.append(" ".join(f"{label} {share:.0%}" for label, share in times.items()))
    return "  ".join(parts)


def mismatch(values: Mapping[str, float]) -> list[str]:
    """Return lines about the KL divergence between sampler and learner, for the final
    report: whole, by depth of context, and beside what is published.
    """
    name = "rollout/kl_sampler_learner"
    if name not in values:
        return []
    if math.isnan(values[name]):
        return ["KL of sampler and learner per token: not known; the last logged step trained on no token of a rollout"]
    k1 = f" (k1: {values[f'{name}_k1']:.2g})" if f"{name}_k1" in values else ""
    low, high = USUAL_KL
    usual = f"usual in bfloat16: {low:g} to {high:g}, less in float32; training is stable below {STABLE_KL:g}"
    depths = {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}
    by_depth = ", ".join(f"{depth.replace('_on', ' on').replace('_', ' to ')}: {value:.2g}" for depth, value in depths.items())
    lines = [f"KL of sampler and learner per token, when last logged: {values[name]:.2g}{k1}; {usual}"]
    return lines + ([f"  at positions {by_depth}"] if depths else [])


def print_rollouts(
    rollouts: Sequence[Rollout],
    n: int = 3,
    *,
    decode: Callable[[np.ndarray], str] | None = None,
    console: Console | None = None,
) -> None:
    """Print the first n rollouts in full, each with its verdict. Without `decode` the
    question is printed in place of the prompt.
    """
    console = console or Console(highlight=False)
    for rollout in rollouts[:n]:
        verdict = rollout.verdict
        heading = f"problem {rollout.problem}, attempt {rollout.attempt}: {'correct' if verdict.correct else 'wrong'}"
        heading += f", reward {verdict.reward:g}, {len(rollout.tokens)} tokens, stopped by {rollout.stop}"
        console.rule(Text(heading, style="green" if verdict.correct else "red"), align="left")
        prompt = rollout.task.question if decode is None else decode(rollout.prompt)
        for text, style in ((prompt, "dim"), (rollout.text, "")):
            console.print(Text(visible(text, console.encoding), style=style), soft_wrap=True)
        parsed = "no answer found" if verdict.parsed is None else f"answered {verdict.parsed}"
        ending = f"{parsed}{rollout.task.expected}" + (f" ({verdict.reason})" if verdict.reason else "")
        console.print(Text(visible(ending, console.encoding), style="bold"), soft_wrap=True)


def print_evaluations(evaluations: Iterable[Evaluation], *, console: Console | None = None) -> None:
    """Print accuracies before and after: one row per suite and temperature, one column
    per phase (its last evaluation), and the change.
    """
    cells: dict[tuple[str, float], dict[str, Evaluation]] = {}
    phases: list[str] = []
    for evaluation in evaluations:
        cells.setdefault((evaluation.suite, evaluation.temperature), {})[evaluation.phase] = evaluation
        if evaluation.phase not in phases:
            phases.append(evaluation.phase)
    table = Table(box=box.SIMPLE_HEAD)  # two phases fit 80 columns
    table.add_column("suite", no_wrap=True)
    table.add_column("T", no_wrap=True)
    for phase in phases:
        table.add_column(Text(visible("start" if phase == "start" else f"after {phase}")))
    if len(phases) > 1:
        table.add_column("change", justify="right", no_wrap=True)
    for (suite, temperature), row in cells.items():
        accuracy = [f"{e.accuracy:.3f} {e.low:.2f}-{e.high:.2f}" if e else "-" for e in map(row.get, phases)]
        seen = [row[phase].accuracy for phase in phases if phase in row]
        change = [f"{seen[-1] - seen[0]:+.3f}" if len(seen) > 1 else "-"] if len(phases) > 1 else []
        # `Text`, because rich would read brackets in a plain string as markup.
        table.add_row(*(Text(visible(cell)) for cell in (suite, f"{temperature:g}", *accuracy, *change)))
    (console or Console()).print(table)


def visible(text: str, encoding: str = "utf-8") -> str:
    r"""Escape text so that a terminal prints it without acting on it: each unprintable
    character except newline and tab becomes `\x1b` or the like.

    This covers ANSI escapes, carriage returns, bidirectional overrides, zero-width
    characters, lone surrogates, and characters that `encoding` lacks. It does not
    escape markup: pass rich a `Text`.
    """
    hidden = ("C", "Zl", "Zp")  # control, format, surrogate, private, unassigned; line and paragraph separators
    escaped = "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char).startswith(hidden) and char not in "\n\t" else char
        for char in text
    )
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
