"""Metrics, from (sum, count) pairs to the files of a run and its terminal.

While they accumulate, metrics are dictionaries name -> (sum, count): `merge` adds them, over micro-batches, steps or groups, and
`divide` turns them into numbers, once. A `RunLog` writes these to `metrics.jsonl`, TensorBoard and (optionally) W&B, and shows
the latest on one live line. Beside it are the other files and tables of a run: rollouts, evaluations, the summary.

Every line of every file is strict ASCII JSON: what is not finite becomes null. What a model wrote is data: its control characters
and markup are shown, never obeyed. Only one process of a run writes (`write`); reading the files back is left to `report`.

A file that can no longer be written (a full disk, one that is gone) is `Unwritable`, by its name. TensorBoard's events are not
worth ending a run: it goes on without them, and says so.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jaxreason.types import Evaluation, Rollout
from jaxreason.workdir import free_name

PLAIN_EVERY_S = 10.0  # without a terminal, at most one line of progress in this time

SHOWN = (  # (metric, label, format): the live line, in this order
    ("rollout/reward", "reward", "{:.3f}"),
    ("rollout/correct", "accuracy", "{:.3f}"),
    ("rollout/length", "length", "{:.0f}"),
    ("train/loss", "loss", "{:.4f}"),
    ("train/entropy", "entropy", "{:.3f}"),
    ("perf/tokens_per_s", "tokens/s", "{:,.0f}"),
)
SHARES = (("time/sample_s", "sampling"), ("time/verify_s", "verifying"), ("time/learn_s", "learning"))


def merge(*metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Add up (sum, count) pairs by name; a name may be missing from some."""
    merged: dict[str, tuple[Any, Any]] = {}
    for pairs in metrics:
        for name, (total, count) in pairs.items():
            seen_total, seen_count = merged.get(name, (0, 0))
            merged[name] = (seen_total + total, seen_count + count)
    return merged


def divide(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Return sum / count by name, NaN where nothing was counted; waits for the devices, in a single transfer."""
    return {
        name: float(total) / float(count) if count != 0 else math.nan
        for name, (total, count) in jax.device_get(dict(metrics)).items()
    }


class Unwritable(Exception):
    """A file of a run can't be written."""


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Name the file that what is done within fails to write; the errors of a flush do not."""
    try:
        yield
    except OSError as error:
        raise Unwritable(f"can't write to {os.fspath(path)}: {error.strerror or error}") from None


class Pace(NamedTuple):
    """How long a step takes: an exponential average that starts anew in each phase."""

    phase: str = ""
    steps: int = 0
    step_s: float = math.nan

    def after(self, phase: str, step_s: float) -> Pace:
        if phase != self.phase:
            return Pace(phase, 1)  # the first step of a phase is slow even without its compilation
        if self.steps == 1:
            return Pace(phase, 2, step_s)
        return Pace(phase, self.steps + 1, 0.9 * self.step_s + 0.1 * step_s)


class RunLog:
    """The open log of a run; see `open_log`. Use as a context manager, or call `close`."""

    def __init__(self, file, board, wandb_run, console: Console | None, *, total_steps: int, start_s: float):
        self._file, self._board, self._wandb_run, self._console = file, board, wandb_run, console
        self._doing, self._doing_s, self._shown, self._size = "starting", time.monotonic(), "", 0
        self._total_steps, self._start_s = total_steps, start_s
        self._pace, self._latest, self._printed_s = Pace(), {}, -math.inf
        self._live = None
        if console is not None and console.is_terminal:
            # Redirecting a stdout that is no terminal would send to the terminal what was meant for a file.
            redirect = {"redirect_stdout": sys.stdout.isatty()}
            self._live = Live(get_renderable=self._line, console=console, refresh_per_second=4, **redirect)
            self._live.start()
        atexit.register(self.close)  # a run that ends in an error must give the cursor back

    def write(
        self,
        step: int,
        phase: str,
        values: Mapping[str, float],
        *,
        phase_step: int | None = None,
        phase_steps: int | None = None,
    ) -> None:
        """Log `values` of the global `step`, which never decreases over a run; `phase_step` counts from the phase's start."""
        if self._file is None:
            return
        time_s = round(time.monotonic() - self._start_s, 3)
        record = {"step": step, "phase": phase, "phase_step": phase_step, "time_s": time_s}
        if clash := record.keys() & values.keys():
            raise ValueError(
                f"metrics named {', '.join(sorted(clash))}; these are fields of the log; use a name such as train/loss"
            )
        values = {name: float(value) for name, value in values.items()}
        self._reopen(step)
        self._write_line(_json_line(record | values))
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if self._board is not None:
            try:
                self._board.write(step, finite)
            except OSError as error:
                board, self._board = self._board, None
                self.say(
                    f"warning: can't write to {board.folder}: {error.strerror or error}; TensorBoard gets no more of this run "
                    "until it is started again, and metrics.jsonl has all of it"
                )
        if self._wandb_run is not None:
            self._wandb_run.log(values, step=step)
        if "time/step_s" in finite:
            self._pace = self._pace.after(phase, finite["time/step_s"])
        self._latest = (self._latest if self._latest.get("phase") == phase else {}) | {"phase": phase} | values
        self._show(step, phase_step, phase_steps, now=any(name.startswith("eval/") for name in values))

    def _reopen(self, step: int) -> None:
        """Notice that somebody has moved, removed or cut the file that lines go to, and begin another where it was."""
        path = getattr(self._file, "name", None)
        if path is None:
            return
        with suppress(OSError):
            there, mine = os.stat(path) if os.path.exists(path) else None, os.fstat(self._file.fileno())
            if there is not None and os.path.samestat(there, mine) and mine.st_size >= self._size:
                return
            what = "moved or removed" if there is None else "replaced or cut"
            self.say(f"warning: {path} was {what} while the run wrote it; the lines from step {step} on go to {path}")
            file = open(path, "a", encoding="ascii")  # noqa: SIM115  (open for as long as the run)
            self._file.close()
            self._file = file

    def _write_line(self, line: str) -> None:
        try:
            self._file.write(line)
            self._file.flush()
            self._size = self._file.tell()
        except OSError as error:
            with suppress(OSError):  # it holds what it could not write, and would fail again at exit
                self._file.close()
            raise Unwritable(f"can't write to {self._file.name}: {error.strerror or error}") from None

    def _show(self, step: int, phase_step: int | None, phase_steps: int | None, now: bool) -> None:
        if self._console is None:
            return
        step_s = self._pace.step_s if self._pace.phase == self._latest["phase"] else math.nan
        line = progress(self._latest, step, self._total_steps, phase_step, phase_steps, step_s)
        self._doing, self._shown = "", line
        if self._live is not None:
            self._live.refresh()
        elif now or step >= self._total_steps or time.monotonic() - self._printed_s >= PLAIN_EVERY_S:
            self._printed_s = time.monotonic()
            self._console.print(Text(line), soft_wrap=True)

    def _line(self) -> Text:
        """The live line: of the last metrics, or else of what has been under way since; never more than one line."""
        took = f" {_duration(time.monotonic() - self._doing_s)}"
        line = visible(self._doing + took) if self._doing else self._shown
        return Text(fitted(line, self._console.width), no_wrap=True, overflow="ellipsis")

    def doing(self, what: str) -> None:
        """Say on the live line what is under way, and for how long, until there are other metrics."""
        self._doing, self._doing_s = what, time.monotonic()

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        if self._console is not None:
            self._console.print(Text(visible(text)), soft_wrap=True)

    def close(self) -> None:
        """Close the files and leave the terminal as it was; again does nothing."""
        atexit.unregister(self.close)
        if self._live is not None:
            self._live.stop()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()
        if self._file is not None:
            self._file.close()
        self._file = self._board = self._wandb_run = self._console = self._live = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Board:
    """TensorBoard's events, by tensorboardX's writer of records, in this thread.

    Its `SummaryWriter` has a thread of its own: a full disk ends that, and then every call waits for ever, at exit too.
    """

    def __init__(self, folder: str | os.PathLike, purge_step: int | None = None):
        """Open a new file of events; TensorBoard shows none of earlier files from `purge_step` on."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self.folder, self._event, self._scalar = os.fspath(folder), Event, scalar
        os.makedirs(folder, exist_ok=True)
        self._writer = EventsWriter(os.path.join(folder, "events"))
        if purge_step is not None:
            self._writer.write_event(Event(step=purge_step, file_version="brain.Event:2"))
            self._writer.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self._writer.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.write_event(self._event(step=step, wall_time=time.time(), summary=self._scalar(name, value)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def open_log(
    workdir: str | os.PathLike,
    *,
    total_steps: int,
    resume_step: int | None = None,
    tensorboard: bool = True,
    wandb: Mapping[str, Any] | None = None,
    live: bool = True,
    write: bool = True,
) -> RunLog:
    """Open the log of a run in `workdir`: `metrics.jsonl`, and TensorBoard events in `tensorboard/`.

    `wandb` is the keyword arguments of `wandb.init`, or None. `live` shows progress on stderr: one live line on a terminal, else
    a plain line every ten seconds. `resume_step`, if given, is the step of the checkpoint a run goes on from: what was logged
    after it is cut, and `time_s` goes on from what was kept. With `write` False nothing is opened and every method does nothing.

    Raises:
      ValueError: W&B is asked for but not installed.
      Unwritable: the folder can't be written; so does `write` of the log.
    """
    if not write:
        return RunLog(None, None, None, None, total_steps=total_steps, start_s=time.monotonic())
    wandb_run = None if wandb is None else _import_wandb().init(**{"dir": os.fspath(workdir), **wandb})
    path = Path(workdir, "metrics.jsonl")
    last = None if resume_step is None else truncate(path, resume_step).last
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="ascii")
    board = None
    if tensorboard:
        folder = path.with_name("tensorboard")
        with writing(folder):
            board = Board(folder, None if resume_step is None else resume_step + 1)
    return RunLog(
        file,
        board,
        wandb_run,
        Console(stderr=True, highlight=False) if live else None,
        total_steps=total_steps,
        start_s=time.monotonic() - _time_s(last),  # unlike that of the day this clock is never set back
    )


def _time_s(record: Mapping[str, Any] | None) -> float:
    time_s = (record or {}).get("time_s", 0.0)
    return time_s if isinstance(time_s, (int, float)) and math.isfinite(time_s) else 0.0


def progress(
    values: Mapping[str, Any],
    step: int,
    total_steps: int,
    phase_step: int | None = None,
    phase_steps: int | None = None,
    step_s: float = math.nan,
) -> str:
    """Return the line of progress: what is among `values`, and no word of what is not.

    The time left of the phase is for its own steps; that of the run supposes that later phases keep this pace, and says so.
    """
    phase = f"{values['phase']} {phase_step}/{phase_steps}" if phase_steps else str(values["phase"])
    parts = [phase, f"step {step}/{total_steps}"]
    left = phase_steps - phase_step if phase_steps and phase_step is not None else total_steps - step
    if math.isfinite(step_s):
        parts.append(f"eta {_duration(left * step_s)}")
        if total_steps - step > left:
            parts.append(f"run {_duration((total_steps - step) * step_s)} at this pace")
    parts += [f"{label} {form.format(values[name])}" for name, label, form in SHOWN if name in values]
    parts += [
        f"{name.removeprefix('eval/').removesuffix('/accuracy')} {value:.3f}"
        for name, value in values.items()
        if name.startswith("eval/") and name.endswith("/accuracy")
    ]
    times = {label: values[name] for name, label in SHARES if name in values}
    if (total_s := sum(times.values())) > 0:
        parts.append(" ".join(f"{label} {value / total_s:.0%}" for label, value in times.items()))
    return "  ".join(parts)


def fitted(line: str, width: int) -> str:
    """Leave out the last parts of a line of progress, until it fits `width`."""
    parts = line.split("  ")
    while len(parts) > 1 and len("  ".join(parts)) > width:
        parts.pop()
    return "  ".join(parts)


class Kept(NamedTuple):
    """What `truncate` has left of a file."""

    last: dict[str, Any] | None = None  # line
    dropped: int = 0  # lines of later steps, and a torn last one
    steps: Sequence[int] = ()  # of the lines that are left
    aside: Path | None = None  # the file as it was, if it had lines that are not of a log


def truncate(path: str | os.PathLike, step: int) -> Kept:
    """Drop the lines of a JSONL file whose `step` is above the given one, and a torn last line.

    For `metrics.jsonl` and `rollouts.jsonl` when a run goes on from a checkpoint older than its log. Atomic; a missing file is
    an empty one. If other lines can't be read, the file as it was is kept beside the new one.
    """
    path = Path(path)
    if not path.exists():
        return Kept()
    last, dropped, steps, strange = None, 0, [], 0
    with path.open(encoding="ascii", errors="replace") as lines, writing(path), replacing(path) as kept:
        for line in lines:
            record = _record(line)
            if record is not None and record["step"] <= step:
                kept.write(line if line.endswith("\n") else line + "\n")
                last = record
                steps.append(record["step"])
            elif record is not None or not line.endswith("\n"):  # torn: the process was killed while it wrote
                dropped += 1
            else:
                strange += 1
        aside = free_name(path) if strange else None
        if aside is not None:
            shutil.copy2(path, aside)
    return Kept(last, dropped, steps, aside)


def _record(line: str) -> dict[str, Any] | None:
    """A line of a log; None for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def lacking(steps: Iterable[int], stretches: Iterable[tuple[int, int, int]]) -> str:
    """Name the steps that a log should have lines of and has none; "" if it has all.

    A stretch is (first step, last step, how many steps a line is for at most); its last step has a line.
    """
    there, missing = set(steps), []
    for first, last, every in stretches:
        before = first - 1
        for step in [step for step in range(first, last + 1) if step in there] + [last + every]:
            if step > before + every:
                missing.append((before + 1, min(step - 1, last)))
            before = step
    return ", ".join(f"{first} to {last}" if first < last else f"{first}" for first, last in missing if first <= last)


def write_summary(path: str | os.PathLike, summary: Mapping[str, Any], *, write: bool = True) -> None:
    """Write `summary` as JSON, atomically: a reader finds the old file or the new one, whole."""
    if write:
        with writing(path), replacing(Path(path)) as file:
            file.write(json.dumps(_plain(summary), indent=2, allow_nan=False) + "\n")


def write_rollouts(
    path: str | os.PathLike,
    rollouts: Iterable[Rollout],
    step: int,
    phase: str,
    *,
    decode: Callable[[np.ndarray], str] | None = None,
    write: bool = True,
) -> None:
    """Append rollouts as JSONL; `decode` turns the prompt's token ids into text, and without it they are written as they are."""
    if not write:
        return
    with writing(path), Path(path).open("a", encoding="ascii") as file:
        for rollout in rollouts:
            record = {
                "step": step,
                "phase": phase,
                "problem": rollout.problem,
                "attempt": rollout.attempt,
                "question": rollout.task.question,
                "prompt": rollout.prompt if decode is None else decode(rollout.prompt),
                "text": rollout.text,
                "answer": rollout.task.answer,
                "reward": rollout.verdict.reward,
                "correct": rollout.verdict.correct,
                "parsed": rollout.verdict.parsed,
                "reason": rollout.verdict.reason,
                "stop": rollout.stop,
                "logp_sum": float(np.sum(rollout.logp, dtype=np.float64)),
                "length": len(rollout.tokens),
                "temperature": rollout.temperature,
            }
            file.write(_json_line(record))


def print_rollouts(
    rollouts: Sequence[Rollout],
    n: int = 3,
    *,
    decode: Callable[[np.ndarray], str] | None = None,
    console: Console | None = None,
) -> None:
    """Print the first n rollouts in full, each with its verdict; the question stands for the prompt unless `decode` is given."""
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
        ending = f"{parsed}, expected {rollout.task.answer}" + (f" ({verdict.reason})" if verdict.reason else "")
        console.print(Text(visible(ending, console.encoding), style="bold"), soft_wrap=True)


def print_evaluations(evaluations: Iterable[Evaluation], *, console: Console | None = None) -> None:
    """Print accuracy before and after: a row a suite and temperature, a column a phase (its last evaluation), and the change."""
    cells: dict[tuple[str, float], dict[str, Evaluation]] = {}
    phases: list[str] = []
    for evaluation in evaluations:
        cells.setdefault((evaluation.suite, evaluation.temperature), {})[evaluation.phase] = evaluation
        if evaluation.phase not in phases:
            phases.append(evaluation.phase)
    table = Table(box=box.SIMPLE_HEAD)  # narrow enough for two phases on 80 columns
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
        # Text, since in a plain string rich would take brackets for markup.
        table.add_row(*(Text(visible(cell)) for cell in (suite, f"{temperature:g}", *accuracy, *change)))
    (console or Console()).print(table)


def visible(text: str, encoding: str = "utf-8") -> str:
    r"""Return text that a terminal shows and never obeys: what is not printable, a newline or a tab becomes `\x1b` or the like.

    That covers ANSI escapes, carriage returns, bidirectional overrides, zero-width characters, lone surrogates, and what
    `encoding` lacks. Markup is no concern of it: give rich a `Text`.
    """
    hidden = ("C", "Zl", "Zp")  # control, format, surrogate, private, unassigned; line and paragraph separators
    escaped = "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char).startswith(hidden) and char not in "\n\t" else char
        for char in text
    )
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def _plain(value: Any) -> Any:
    """Return `value` as what JSON has: arrays as lists, named tuples as dictionaries, numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(_plain(record), allow_nan=False) + "\n"


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Yield a text file that takes the place of `path` once it is complete, and is removed if writing fails."""
    unfinished = path.with_name(f".{path.name}.tmp")  # in the same folder, so that the replacement is a rename
    try:
        with unfinished.open("w", encoding="ascii", errors="replace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _import_wandb():
    try:
        import wandb
    except ImportError:
        raise ValueError("logging to W&B is asked for but wandb is not installed; pip install 'jaxreason[wandb]'") from None
    return wandb
