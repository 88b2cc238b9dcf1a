"""The log of a run: `metrics.jsonl`, its trackers (see `trackers`) and its
progress.
"""

from __future__ import annotations

import atexit
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from jaxreason.runtime.files import Unwritable, json_line, truncate, writing
from jaxreason.runtime.live import Live
from jaxreason.runtime.terminal import At, cut, duration, progress, table, visible
from jaxreason.runtime.trackers import Tracker, Trackers, check_installed, open_trackers, read_names

PLAIN_EVERY_S = 10.0  # shortest time between progress lines without a terminal
HIGHEST = 8  # lines of the live table, at most


class Pace(NamedTuple):
    """Duration of a step: an exponential average that restarts in each phase."""

    phase: str = ""
    steps: int = 0
    step_s: float = math.nan

    def after(self, phase: str, step_s: float) -> Pace:
        if phase != self.phase:
            return Pace(phase, 1)  # ignored: the first step of a phase is slow even without its compilation
        if self.steps == 1:
            return Pace(phase, 2, step_s)
        return Pace(phase, self.steps + 1, 0.9 * self.step_s + 0.1 * step_s)


class RunLog:
    """The open log of a run; see `open_log`. Use it as a context manager, or call
    `close`.
    """

    def __init__(self, file, trackers: Sequence[Tracker], console: Console | None, *, total_steps: int, start_s: float):
        self._file, self._trackers, self._console = file, Trackers(trackers, lambda line: self.say(line)), console
        self._doing, self._doing_s, self._shown, self._size = "starting", time.monotonic(), None, 0
        self._total_steps, self._start_s = total_steps, start_s
        self._pace, self._latest, self._printed_s = Pace(), {}, -math.inf
        self._live = None
        if console is not None and console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(console.file, self._lines)
            self._live.start()
        atexit.register(self.close)  # also of a run that ends in an error

    def write(
        self,
        step: int,
        phase: str,
        values: Mapping[str, float],
        *,
        phase_step: int | None = None,
        phase_steps: int | None = None,
    ) -> None:
        """Log `values` of the global `step`, which never decreases over a run.
        `phase_step` counts from the start of the phase.
        """
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
        self._write_line(json_line(record | values))
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._trackers.call("write", step, finite)
        if "time/step_s" in finite:
            self._pace = self._pace.after(phase, finite["time/step_s"])
        self._latest = (self._latest if self._latest.get("phase") == phase else {}) | {"phase": phase} | values
        self._show(step, phase_step, phase_steps, now=any(name.startswith("eval/") for name in values))

    def write_more(
        self, step: int, *, histograms: Mapping[str, Sequence[float]] | None = None, texts: Mapping[str, str] | None = None
    ) -> None:
        """Give histograms of values, and texts, to the trackers."""
        if histograms:  # a library has no bins for NaN, and a tracker that raises is given up
            finite = {name: [x for x in values if math.isfinite(x)] for name, values in histograms.items()}
            self._trackers.call("histograms", step, {name: values for name, values in finite.items() if values})
        if texts:
            self._trackers.call("texts", step, texts)

    def _reopen(self, step: int) -> None:
        """Detect that somebody has moved, removed or truncated the log file, and open a
        new one at its path.
        """
        path = getattr(self._file, "name", None)
        if path is None:
            return
        with suppress(OSError):
            there, mine = os.stat(path) if os.path.exists(path) else None, os.fstat(self._file.fileno())
            if there is not None and os.path.samestat(there, mine) and mine.st_size >= self._size:
                return
            what = "moved or removed" if there is None else "replaced or cut"
            self.say(f"warning: {path} was {what} while the run wrote it; the lines from step {step} on go to {path}")
            file = open(path, "a", encoding="ascii")  # noqa: SIM115 (stays open until the run ends)
            self._file.close()
            self._file = file

    def _write_line(self, line: str) -> None:
        try:
            self._file.write(line)
            self._file.flush()
            self._size = self._file.tell()
        except OSError as error:
            with suppress(OSError):  # the file still buffers the line, and would fail again at exit
                self._file.close()
            raise Unwritable(f"can't write to {self._file.name}: {error.strerror or error}") from None

    def _show(self, step: int, phase_step: int | None, phase_steps: int | None, now: bool) -> None:
        if self._console is None:
            return
        step_s = self._pace.step_s if self._pace.phase == self._latest["phase"] else math.nan
        self._doing, self._shown = "", At(self._latest, step, self._total_steps, phase_step, phase_steps, step_s)
        if self._live is not None:
            return  # its thread draws it
        if now or step >= self._total_steps or time.monotonic() - self._printed_s >= PLAIN_EVERY_S:
            self._printed_s = time.monotonic()
            self._console.print(Text(progress(self._shown)), soft_wrap=True)

    def _lines(self) -> list[str]:
        """Return the lines of the table: the latest metrics, and the activity that
        began after them.
        """
        width, height = self._console.size
        shown, doing = self._shown, self._doing
        lines = [] if shown is None else table(shown, width, min(HIGHEST, height - 2))
        return lines + ([cut(visible(f"{doing} {duration(time.monotonic() - self._doing_s)}"), width)] if doing else [])

    def doing(self, what: str) -> None:
        """Show below the live table the current activity and its duration, until the
        next metrics.
        """
        self._doing, self._doing_s = what, time.monotonic()

    def say(self, text: str) -> None:
        """Print a line above the live table."""
        if self._live is not None:
            self._live.say(visible(text, self._console.encoding))
        elif self._console is not None:
            self._console.print(Text(visible(text)), soft_wrap=True)

    def close(self) -> None:
        """Close the files and restore the terminal. A second call does nothing."""
        atexit.unregister(self.close)
        if self._live is not None:
            self._live.stop()
        self._trackers.close()
        if self._file is not None:
            self._file.close()
        self._file = self._console = self._live = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_log(
    workdir: str | os.PathLike,
    *,
    total_steps: int,
    resume_step: int | None = None,
    tracker: str | Sequence[str] = "tensorboard",
    config: Mapping[str, Any] | None = None,
    live: bool = True,
    write: bool = True,
) -> RunLog:
    """Open the log of a run in `workdir`: `metrics.jsonl`, and the trackers that
    `tracker` names, such as TensorBoard with its events in `tensorboard/`.

    A run that resumes continues its run in W&B or trackio; a new run gives them
    `config`. `live` shows progress on stderr: a live table on a terminal, else a plain
    line every ten seconds. `resume_step` is the last logged step that the checkpoint
    expects, or -1 for a new run in a folder with files of an earlier one: later lines
    are dropped, and `time_s` continues from the last line kept. If `write` is False,
    nothing is opened and every method does nothing.

    Raises:
      ValueError: an unknown tracker.
      NoTracker: a tracker is requested and is not installed, or can't begin a run.
      Unwritable: the folder can't be written. `RunLog.write` raises it too.
    """
    if not write:
        return RunLog(None, (), None, total_steps=total_steps, start_s=time.monotonic())
    names, path = read_names(tracker), Path(workdir, "metrics.jsonl")
    check_installed(names)
    last = None if resume_step is None else truncate(path, resume_step).last
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="ascii")
    return RunLog(
        file,
        open_trackers(names, path.parent, resume_step, config),
        Console(stderr=True, highlight=False) if live else None,
        total_steps=total_steps,
        start_s=time.monotonic() - _time_s(last),  # unlike wall-clock time, this clock is never set back
    )


def _time_s(record: Mapping[str, Any] | None) -> float:
    time_s = (record or {}).get("time_s", 0.0)
    return time_s if isinstance(time_s, (int, float)) and math.isfinite(time_s) else 0.0
