"""Tasks from your own JSON-lines file, one object per line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxreason.options import unknown_name_message
from jaxreason.tasks import splits
from jaxreason.types import Task


def jsonl(
    path: str,  # the JSON-lines file
    question: str = "question",  # field of the question, or several joined by +
    answer: str = "answer",  # field of the answer
    solution: str | None = None,  # field of the worked solution, if there is one
    marker: str | None = None,  # text in the answer field; the answer follows its last occurrence
    split: str | None = None,  # train or test, by the question's hash; None: all
    held_out: float = 0.1,  # fraction of the questions that are test
    limit: int | None = None,  # maximum number of tasks
    data: Mapping[str, str] | None = None,  # fields for the verifier: its name of each -> field
) -> Sequence[Task]:
    """Load tasks from the named fields of each line; `question="Body+Question"` joins
    several fields with a space.

    Whole numbers lose their decimals (145.0 -> "145"). With `marker`, the answer is the
    text after its last occurrence in the answer field; without a `solution` field the
    whole answer field is then the solution (GSM8K's own files: marker="####"). `split`
    "train" or "test" selects questions by their hash (a fraction `held_out` is test);
    None takes all. A config that reads one file for both a source and a suite gives
    them "train" and "test". Problems for the verifier `code` have no answer but tests:
    the task `programs` reads those.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a bad line (named as file:line), a missing or empty field, or no
        tasks.
    """
    if split not in (None, *splits.SPLITS):
        raise ValueError(unknown_name_message("split of task 'jsonl'", split, splits.SPLITS))
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise FileNotFoundError(f"task 'jsonl': no file {str(file)!r}")
    tasks, split_of = [], splits.splitter(held_out)
    for number, row in read_rows(file):
        if limit is not None and len(tasks) >= limit:
            break
        where = f"{file}:{number}"
        task = _task(row, where, question, answer, solution, marker, id=f"{file.stem}/{number}")
        if data:
            task = replace(task, data={name: _datum(row, field, where) for name, field in data.items()})
        if split is None or split_of(task.question) == split:
            tasks.append(task)
    if not tasks:
        raise ValueError(f"{file} has no tasks{'' if split is None else f' in split {split!r}'}")
    return tasks


def read_rows(file: Path) -> Iterator[tuple[int, dict]]:
    """Yield the objects of a JSON-lines file with their line numbers.

    Raises:
      ValueError: a line that is no JSON object, named as file:line.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _row(line, f"{file}:{number}")


def _datum(row: dict, name: str, where: str) -> Any:
    """Return a field as it is; a list becomes a tuple."""
    if name not in row:
        raise ValueError(f"{where}: {unknown_name_message('field', name, row)}")
    return tuple(row[name]) if isinstance(row[name], list) else row[name]


def _task(row: dict, where: str, question: str, answer: str, solution: str | None, marker: str | None, id: str) -> Task:
    asked = " ".join(_text(row, name.strip(), where) for name in question.split("+"))
    answered = _text(row, answer, where)
    worked = "" if solution is None else _text(row, solution, where)
    if marker is not None:
        _, found, last = answered.rpartition(marker)
        if not found:
            raise ValueError(f"{where}: no marker {marker!r} in field {answer!r}")
        answered, worked = last.strip(), worked or answered
    for name, text in ((question, asked), (answer, answered)):
        if not text:
            raise ValueError(f"{where}: field {name!r} is empty; allowed: some text, or leave the line out")
    return Task(asked, answered, worked, id)


def _row(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError too
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(
            f"{where}: got a JSON {type(row).__name__}; allowed: an object such as {{'question': ..., 'answer': ...}}"
        )
    return row


def _text(row: dict, name: str, where: str) -> str:
    if name not in row:
        raise ValueError(f"{where}: {unknown_name_message('field', name, row)}")
    value: Any = row[name]
    if (
        (isinstance(value, float) and not math.isfinite(value))
        or not isinstance(value, str | int | float)
        or isinstance(value, bool)
    ):
        raise ValueError(f"{where}: field {name!r} got {value!r}; allowed: text or a finite number")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()
