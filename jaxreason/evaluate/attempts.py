"""The attempts of an evaluation in `rollouts.jsonl`, one line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxreason.evaluation import outcome_of
from jaxreason.runtime.files import json_line, replacing, truncate, writing
from jaxreason.types import Rollout, Verdict

SERIES = ("suite", "temperature", "thinking_tokens")  # fields that tell the records of a series from those of others
KEYS = (*SERIES, "problem", "attempt")
NEEDED = {*KEYS, "text", "correct", "parsed", "reason", "reward", "stop", "length", "logp_sum"}


class Attempts:
    """The attempts of an evaluation: written as they finish, and in order at the
    end.
    """

    def __init__(self, path: Path):
        self.path = path
        truncate(path, sys.maxsize)  # a killed process may have left half a line
        self.outcomes: dict[tuple, Any] = {}
        for record in self.read():
            self.remember(record)

    def read(self) -> Iterator[dict]:
        if self.path.exists():
            with self.path.open(encoding="ascii") as lines:
                yield from (record for record in map(json.loads, lines) if record.keys() >= NEEDED)

    def remember(self, record: dict) -> None:
        self.outcomes[key_of(record)] = outcome_of(record)

    def add(self, record: dict) -> None:
        with writing(self.path), self.path.open("a", encoding="ascii") as file:
            file.write(json_line(record))
        self.remember(record)

    def sort(self, order: Sequence[tuple]) -> dict[tuple, list[dict]]:
        """Write all attempts in the order of their series, problem and attempt, unless
        they are; return the records of each series.
        """
        rank = {series: i for i, series in enumerate(order)}
        there = list(self.read())
        records = sorted(there, key=lambda r: (rank.get(series_of(r), len(rank)), r["problem"], r["attempt"]))
        if records != there:
            with writing(self.path), replacing(self.path) as file:
                file.writelines(map(json_line, records))
        found: dict[tuple, list[dict]] = {series: [] for series in order}
        for record in records:
            found.setdefault(series_of(record), []).append(record)
        return found


def series_of(record: Mapping) -> tuple:
    return tuple(record[name] for name in SERIES)


def key_of(record: Mapping) -> tuple:
    return tuple(record[name] for name in KEYS)


def rollout_of(record: Mapping, task, prompt):
    """Return a recorded attempt as a rollout, without its tokens."""
    none = np.zeros(0, np.float32)
    verdict = Verdict(record["reward"], record["correct"], record["parsed"], record["reason"])
    words = {"tokens": none.astype(np.int32), "logp": none, "sampled": none.astype(bool), "stop": record["stop"]}
    words |= {"text": record["text"], "verdict": verdict, "temperature": record["temperature"]}
    return Rollout(task, record["problem"], record["attempt"], prompt, **words)
