"""Trackers: where a run's metrics, histograms and texts go besides its own files.

All have the methods of `Tracker`. A tracker that fails (a full disk, a lost network) is
given up with one warning, and the run goes on: `metrics.jsonl` has all numbers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxreason.runtime.terminal import visible

BINS = 30  # of a histogram


class NoTracker(ValueError):
    """A tracker that is asked for and can't be had."""


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

        # TensorBoard reads Markdown: four spaces make lines that it shows as they are.
        shown = {name: "    " + visible(value).replace("\n", "\n    ") for name, value in texts.items()}
        self._add(step, [text(name, value) for name, value in shown.items()])

    def _add(self, step: int, summaries: list) -> None:
        for summary in summaries:
            self._writer.write_event(self._event(step=step, wall_time=time.time(), summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


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
            raise NoTracker(
                f"logging to {library} is asked for but it is not installed; pip install 'jaxreason[{library}]'"
            ) from None
        self.name = library
        try:
            self._run = self._library.init(**options)
        except Exception as error:  # no key, no network, an option that it lacks: whatever the library raises
            why = " ".join(str(error).split()) or type(error).__name__
            raise NoTracker(f"{library} can't begin a run: {why}; mend it, or leave out config.log.{library}") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def histograms(self, step: int, values: Mapping[str, Sequence[float]]) -> None:
        self._run.log({name: self._library.Histogram([float(x) for x in values_]) for name, values_ in values.items()}, step=step)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        if hasattr(self._library, "Markdown"):  # of trackio; W&B shows no plain text
            shown = {name: "    " + visible(value).replace("\n", "\n    ") for name, value in texts.items()}
            self._run.log({name: self._library.Markdown(value) for name, value in shown.items()}, step=step)

    def close(self) -> None:
        self._run.finish()
