"""Trackers: where a run's metrics, histograms and texts go besides its own files.

`config.log.tracker` names them: TensorBoard, W&B and trackio. All have the methods of
`Tracker`. A tracker that fails (a full disk, a lost network) is given up with one
warning, and the run continues: `metrics.jsonl` has all numbers. A run that resumes
continues its run in W&B and trackio, by the id in its folder.
"""

from __future__ import annotations

import html
import importlib.util
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxreason.options import unknown_name_message
from jaxreason.runtime.files import replacing, writing
from jaxreason.runtime.terminal import visible

NAMES = ("tensorboard", "wandb", "trackio")
PROJECT = "jaxreason"  # of W&B and trackio; $WANDB_PROJECT is another one of W&B
STORED = "tracker.json"  # in the run's folder: the id of its run in W&B and trackio

BINS = 30  # of a histogram


class NoTracker(ValueError):
    """A tracker that is asked for and can't be had."""


def read_names(tracker: str | Sequence[str]) -> tuple[str, ...]:
    """Read `config.log.tracker`: a name, several joined by commas or in a tuple, or ""
    or "none".

    Raises:
      ValueError: an unknown name, or "none" beside another.
    """
    given = tracker.split(",") if isinstance(tracker, str) else tracker
    names = list(dict.fromkeys(name for name in (name.strip().lower() for name in given) if name))
    if names == ["none"]:
        return ()
    for name in names:
        if name == "none":
            raise ValueError(f"config.log.tracker got {tracker!r}; allowed: none alone, or names of: {', '.join(sorted(NAMES))}")
        if name not in NAMES:
            raise ValueError(unknown_name_message("tracker in config.log.tracker", name, (*NAMES, "none")))
    return tuple(names)


def check_installed(names: Sequence[str]) -> None:
    """Raise NoTracker if a library is not installed, without importing it."""
    for name in names:
        if name == "tensorboard" or sys.modules.get(name) is not None:  # tensorboardX is one of our dependencies
            continue
        if importlib.util.find_spec(name) is None:
            raise NoTracker(not_installed(name))


def not_installed(name: str) -> str:
    return f"config.log.tracker names {name}, which is not installed; pip install 'jaxreason[{name}]'"


def run_id(folder: Path, continues: bool) -> str:
    """Return the id of a run in W&B and trackio. A new run stores a new one in its
    folder; a run that continues reads it there.
    """
    path = folder / STORED
    if continues:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["id"]
            if isinstance(found, str) and found.isalnum():
                return found
        except (OSError, ValueError, TypeError, KeyError):
            pass  # it began without these trackers, or the file is damaged
    made = secrets.token_hex(4)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps({"id": made}))
    return made


def open_trackers(names: Sequence[str], folder: Path, resume_step: int | None, config: Mapping[str, Any] | None) -> list[Tracker]:
    """Open the named trackers of the run in `folder`, which continues after
    `resume_step`, or is new if that is None or -1. `config` is for W&B and trackio.

    Raises:
      NoTracker, Unwritable: see `log.open_log`.
    """
    continues, opened = resume_step is not None and resume_step >= 0, []
    for name in names:
        if name == "tensorboard":
            with writing(folder / name):
                opened.append(Board(folder / name, None if resume_step is None else resume_step + 1))
            continue
        # A run that continues has its config there, and W&B refuses a changed field.
        options = {"resume": "allow", "config": None if continues else config}
        id = run_id(folder, continues or any(isinstance(tracker, Hosted) for tracker in opened))
        if name == "wandb":
            project = {} if os.environ.get("WANDB_PROJECT") else {"project": PROJECT}
            options |= {"id": id, "name": folder.name, "dir": os.fspath(folder), **project}
        else:  # trackio knows a run by its name
            options |= {"name": f"{folder.name}-{id}", "project": PROJECT}
        opened.append(Hosted(name, options))
    return opened


class Tracker(Protocol):
    """One place that metrics go to."""

    name: str  # what a warning calls it

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def histograms(self, step: int, values: Mapping[str, Sequence[float]]) -> None: ...

    def texts(self, step: int, texts: Mapping[str, str]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """Several trackers; one that fails is left out from then on."""

    def __init__(self, trackers: Sequence[Tracker], say: Callable[[str], None]):
        self.trackers, self.say = list(trackers), say

    def call(self, method: str, step: int, values: Mapping) -> None:
        """Call a method of all trackers."""
        for tracker in list(self.trackers):
            try:
                getattr(tracker, method)(step, values)
            except Exception as error:  # whatever a library or a network raises: a tracker must not end a run
                self.trackers.remove(tracker)
                why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
                self.say(
                    f"warning: can't write to {tracker.name}: {why}; it gets no more of this run until it is started again, and "
                    "metrics.jsonl has all of it"
                )

    def close(self) -> None:
        for tracker in self.trackers:
            try:
                tracker.close()
            except Exception as error:
                self.say(f"warning: can't close {tracker.name}: {' '.join(str(error).split())}")
        self.trackers = []


class Board:
    """TensorBoard events, written by tensorboardX's `EventsWriter` in the calling
    thread.

    tensorboardX's `SummaryWriter` uses its own thread. A full disk ends that thread,
    and every later call then blocks forever, also at exit.
    """

    def __init__(self, folder: str | os.PathLike, purge_step: int | None = None):
        """Open a new event file. TensorBoard hides events of earlier files from
        `purge_step` on.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.name, self._event = os.fspath(folder), Event
        os.makedirs(folder, exist_ok=True)
        self._writer = EventsWriter(os.path.join(folder, "events"))
        if purge_step is not None:
            self._writer.write_event(Event(step=purge_step, file_version="brain.Event:2"))
            self._writer.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self._writer.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        self._add(step, [scalar(name, value) for name, value in values.items()])

    def histograms(self, step: int, values: Mapping[str, Sequence[float]]) -> None:
        from tensorboardX.summary import histogram

        self._add(step, [histogram(name, np.asarray(x, np.float64), BINS) for name, x in values.items() if len(x)])

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        from tensorboardX.summary import text

        self._add(step, [text(name, indented(visible(value))) for name, value in texts.items()])

    def _add(self, step: int, summaries: list) -> None:
        for summary in summaries:
            self._writer.write_event(self._event(step=step, wall_time=time.time(), summary=summary))
        # The writer's own flush waits for the disk, which takes longer than all else of
        # a line of metrics: milliseconds on an SSD, more on a disk in the network.
        file = getattr(getattr(self._writer, "_py_recordio_writer", None), "_writer", self._writer)
        file.flush()

    def close(self) -> None:
        self._writer.close()


def indented(text: str) -> str:
    """Return Markdown of lines that are shown as they are: it indents them by four
    spaces.
    """
    return "    " + text.replace("\n", "\n    ")


class Hosted:
    """A library with the functions of W&B: `init`, `log`, `finish`, `Histogram`."""

    def __init__(self, library: str, options: Mapping[str, Any]):
        """Begin a run of `library`, wandb or trackio.

        Raises:
          NoTracker: it is not installed, or can't begin a run.
        """
        try:
            self._library = __import__(library)
        except ImportError:
            raise NoTracker(not_installed(library)) from None
        self.name = library
        try:
            self._run = self._library.init(**options)
        except Exception as error:  # no key, no network, an option that it lacks: whatever the library raises
            why = " ".join(str(error).split()) or type(error).__name__
            raise NoTracker(
                f"{library} can't begin a run: {why}; mend it, or leave {library} out of config.log.tracker"
            ) from error
        begun = getattr(self._run, "step", 0)  # of W&B, which refuses earlier steps: it has them from before a resume
        self._first_step = begun if isinstance(begun, int) else 0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, values)

    def histograms(self, step: int, values: Mapping[str, Sequence[float]]) -> None:
        self._log(step, {name: self._library.Histogram([float(x) for x in values_]) for name, values_ in values.items()})

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Show texts as they are: as Markdown in trackio, as HTML in W&B."""
        shown = {name: visible(value) for name, value in texts.items()}
        if hasattr(self._library, "Markdown"):
            self._log(step, {name: self._library.Markdown(indented(value)) for name, value in shown.items()})
        else:
            page = '<pre style="white-space: pre-wrap">{}</pre>'
            self._log(step, {name: self._library.Html(page.format(html.escape(value))) for name, value in shown.items()})

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if step >= self._first_step:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
