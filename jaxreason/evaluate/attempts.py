"""The attempts of an evaluation in `rollouts.jsonl`, one line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from jaxreason.evaluation import outcome_of
from jaxreason.runtime.files import json_line, replacing, truncate, writing
from jaxreason.types import Rollout, Verdict

SERIES = ("suite", "temperature", "thinking_tokens")  # fields that tell the records of a series from those of others
KEYS = (*SERIES, "problem", "attempt")
NUMBER = (int, float, NoneType)  # a number that is not finite was written as null
# Fields that a record needs, and their types.
NEEDED: dict[str, type | tuple[type, ...]] = {
    "suite": str,
    "temperature": (int, float),
    "thinking_tokens": (int, NoneType),
    "problem": int,
    "attempt": int,
    "text": str,
    "correct": (bool, int),
    "parsed": (str, NoneType),
    "reason": str,
    "reward": NUMBER,
    "stop": str,
    "length": int,
    "logp_sum": NUMBER,
}


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
        """Yield the records, without lines that are no attempt."""
        if self.path.exists():
            with self.path.open(encoding="ascii") as lines:
                yield from filter(is_attempt, map(json.loads, lines))

    def remember(self, record: dict) -> None:
        self.outcomes[key_of(record)] = outcome_of(record)

    def add(self, record: dict) -> None:
        with writing(self.path), self.path.open("a", encoding="ascii") as file:
            file.write(json_line(record))
        self.remember(record)

    def sort(self, keys: Sequence[tuple]) -> dict[tuple, list[dict]]:
        """Write the attempts in the order of `keys`, unless they are, and return the
        records of each series. Attempts with other keys come last, and are not
        returned.
        """
        there = list(self.read())
        by_key = {key_of(record): record for record in there}  # the last one counts, as in `outcomes`
        records = [by_key.pop(key) for key in keys]
        found: dict[tuple, list[dict]] = {}
        for key, record in zip(keys, records, strict=True):
            found.setdefault(key[: len(SERIES)], []).append(record)
        records += by_key.values()
        if records != there:
            with writing(self.path), replacing(self.path) as file:
                file.writelines(map(json_line, records))
        return found


def is_attempt(record: Mapping) -> bool:
    return all(name in record and isinstance(record[name], types) for name, types in NEEDED.items())


def key_of(record: Mapping) -> tuple:
    return tuple(record[name] for name in KEYS)


def rollout_of(record: Mapping, task, prompt):
    """Return a recorded attempt as a rollout, without its tokens."""
    none = np.zeros(0, np.float32)
    verdict = Verdict(record["reward"], record["correct"], record["parsed"], record["reason"])
    words = {"tokens": none.astype(np.int32), "logp": none, "sampled": none.astype(bool), "stop": record["stop"]}
    words |= {"text": record["text"], "verdict": verdict, "temperature": record["temperature"]}
    return Rollout(task, record["problem"], record["attempt"], prompt, **words)
