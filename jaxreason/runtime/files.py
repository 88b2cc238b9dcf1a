"""Reading and writing of a run's files.

Every line is strict ASCII JSON; a number that is not finite becomes null. If a file can
no longer be written (full disk, missing folder), `Unwritable` names it. Only one
process of a run writes: the one with `write` true.
"""

from __future__ import annotations

import itertools
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
    """A file of a run that can't be written."""


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError in this block into Unwritable that names `path`; flush errors
    carry no file name.
    """
    try:
        yield
    except OSError as error:
        raise Unwritable(f"can't write to {os.fspath(path)}: {error.strerror or error}") from None


class Kept(NamedTuple):
    """The part of a file that `truncate` kept."""

    last: dict[str, Any] | None = None  # the last line kept
    dropped: int = 0  # number of lines dropped: those of later steps, and an incomplete last one
    steps: Sequence[int] = ()  # steps of the lines kept
    aside: Path | None = None  # copy of the original file, if some of its lines were unreadable


def truncate(path: str | os.PathLike, step: int) -> Kept:
    """Drop the lines of a JSONL file whose `step` is above the given one, and an
    incomplete last line.

    This is for `metrics.jsonl` and `rollouts.jsonl` when a run resumes from a
    checkpoint older than its log. It is atomic and treats a missing file as empty. If
    other lines can't be read, a copy of the original file is kept beside the new one.
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
            elif record is not None or not line.endswith("\n"):  # incomplete: the process was killed while writing
                dropped += 1
            else:
                strange += 1
        aside = free_name(path) if strange else None
        if aside is not None:
            shutil.copy2(path, aside)
    return Kept(last, dropped, steps, aside)


def _record(line: str) -> dict[str, Any] | None:
    """Parse a line of a log; None for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def lacking(steps: Iterable[int], stretches: Iterable[tuple[int, int, int]]) -> str:
    """Name the steps that a log should have lines for but lacks; "" if it lacks none.

    A stretch is (first step, last step, largest number of steps per line); its last
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
    """Write `summary` as JSON, atomically: a reader finds either the complete old file
    or the complete new one.
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
    pieces: Callable[[np.ndarray], list[str]] | None = None,
    advantages: Iterable[float | None] = (),
    write: bool = True,
    **more,
) -> None:
    """Append rollouts as JSONL. `decode` turns the prompt's token ids into text;
    without it the ids are written. `pieces` returns the text of each token; with it
    each token's text, log-prob and author are written. `advantages` has one for each
    rollout, or for none. `more` are further fields of each record.
    """
    if not write:
        return
    with writing(path), Path(path).open("a", encoding="ascii") as file:
        for rollout, advantage in itertools.zip_longest(rollouts, advantages):
            tokens = {} if pieces is None else token_record(rollout, pieces)
            learned = {} if advantage is None else {"advantage": advantage}
            file.write(json_line({"step": step, "phase": phase, **more, **rollout_record(rollout, decode), **learned, **tokens}))


def whole_groups(rollouts: Sequence[Rollout], most: int) -> Sequence[Rollout]:
    """Return the first groups of attempts with at most `most` rollouts together, or
    one group if even that is larger; none if `most` is 0.
    """
    starts = [i for i, r in enumerate(rollouts) if i == 0 or r.problem != rollouts[i - 1].problem] + [len(rollouts)]
    fit = [start for start in starts if start <= most]
    return rollouts[: max(fit[-1], starts[1] if most and rollouts else 0)]


def rollout_record(rollout: Rollout, decode: Callable[[np.ndarray], str] | None = None) -> dict[str, Any]:
    """Return what a line of `rollouts.jsonl` says of a rollout."""
    return {
        "problem": rollout.problem,
        "task": rollout.task.id,
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
        "sampled": int(np.count_nonzero(rollout.sampled)),  # tokens that were not forced
        "temperature": rollout.temperature,
        **({"measures": dict(rollout.verdict.measures)} if rollout.verdict.measures else {}),
        **({"attempts": [list(pair) for pair in rollout.verdict.attempts]} if rollout.verdict.attempts else {}),
        **({"spans": spans(rollout.author)} if {*rollout.author} - {"m"} else {}),
    }


def spans(author: str) -> list[list]:
    """Return who wrote a completion, as [letter, number of tokens] in order: see
    `types.Rollout.author`.
    """
    return [[letter, len([*run])] for letter, run in itertools.groupby(author)]


def token_record(rollout: Rollout, pieces: Callable[[np.ndarray], list[str]]) -> dict[str, Any]:
    """Return what a line of `rollouts.jsonl` may say of a rollout's tokens: the text of
    each, its log-prob, and a letter for who wrote it: see `types.Rollout.author`.
    """
    logp = [round(float(x), 3) for x in rollout.logp]
    author = rollout.author or "".join("fm"[int(sampled)] for sampled in rollout.sampled)
    return {"pieces": pieces(rollout.tokens), "logp": logp, "author": author}


def plain_json(value: Any) -> Any:
    """Convert `value` to JSON types: arrays to lists, named tuples to dictionaries,
    numbers that are not finite to None.
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
def replacing(path: Path, encoding: str = "ascii") -> Iterator[IO[str]]:
    """Yield a text file that replaces `path` once it is complete, and is removed if
    writing fails.
    """
    unfinished = path.with_name(f".{path.name}.tmp")  # in the same folder, so that the replacement is a rename
    try:
        with unfinished.open("w", encoding=encoding, errors="replace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
