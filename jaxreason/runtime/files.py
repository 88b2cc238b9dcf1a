"""The files of a run, written and read back.

Every line is strict ASCII JSON; a number that is not finite becomes null. A file that
can no longer be written (a full disk, a folder that is gone) raises `Unwritable` with
its name. Only one process of a run writes (`write`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np

from jaxreason.runtime.workdir import free_name
from jaxreason.types import Rollout


class Unwritable(Exception):
    """A file of a run can't be written."""


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Name the file that what is done within fails to write; the errors of a flush do
    not.
    """
    try:
        yield
    except OSError as error:
        raise Unwritable(f"can't write to {os.fspath(path)}: {error.strerror or error}") from None


class Kept(NamedTuple):
    """The part of a file that `truncate` kept."""

    last: dict[str, Any] | None = None  # line
    dropped: int = 0  # lines of later steps, and a torn last one
    steps: Sequence[int] = ()  # of the lines that are left
    aside: Path | None = None  # the file as it was, if it had lines that are not of a log


def truncate(path: str | os.PathLike, step: int) -> Kept:
    """Drop the lines of a JSONL file whose `step` is above the given one, and a torn
    last line.

    For `metrics.jsonl` and `rollouts.jsonl` when a run goes on from a checkpoint older
    than its log. Atomic; a missing file is an empty one. If other lines can't be read,
    the file as it was is kept beside the new one.
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

    A stretch is (first step, last step, how many steps a line is for at most); its last
    step has a line.
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
    """Write `summary` as JSON, atomically: a reader finds the old file or the new one,
    whole.
    """
    if write:
        with writing(path), replacing(Path(path)) as file:
            file.write(json.dumps(plain_json(summary), indent=2, allow_nan=False) + "\n")


def write_rollouts(
    path: str | os.PathLike,
    rollouts: Iterable[Rollout],
    step: int,
    phase: str,
    *,
    decode: Callable[[np.ndarray], str] | None = None,
    write: bool = True,
) -> None:
    """Append rollouts as JSONL; `decode` turns the prompt's token ids into text, and
    without it they are written as they are.
    """
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
            file.write(json_line(record))


def plain_json(value: Any) -> Any:
    """Return `value` as what JSON has: arrays as lists, named tuples as dictionaries,
    numbers that are not finite as None.
    """
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return plain_json(value._asdict())
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return plain_json(np.asarray(value).tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(plain_json(record), allow_nan=False) + "\n"


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Yield a text file that takes the place of `path` once it is complete, and is
    removed if writing fails.
    """
    unfinished = path.with_name(f".{path.name}.tmp")  # in the same folder, so that the replacement is a rename
    try:
        with unfinished.open("w", encoding="ascii", errors="replace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
