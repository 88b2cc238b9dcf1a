"""Tasks with worked solutions that a model wrote: a folder of `jaxreason.generate`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxreason.tasks.jsonl import read_rows
from jaxreason.types import Task


def generated(
    path: str,  # the folder of a data set of jaxreason.generate
    limit: int | None = None,  # maximum number of tasks
) -> Sequence[Task]:
    """Load the right attempts that `python -m jaxreason.generate` wrote, each a worked
    solution as the model wrote it, white space included.

    Raises:
      FileNotFoundError: no such data set.
      ValueError: a damaged line, or no tasks.
    """
    file = Path(os.path.expanduser(path)) / "tasks.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"task 'generated': no file {str(file)!r}; make it with python -m jaxreason.generate --out=...")
    tasks = []
    for number, row in read_rows(file):
        if limit is not None and len(tasks) >= limit:
            break
        for name in ("question", "answer", "solution"):
            if not isinstance(row.get(name), str):
                raise ValueError(f"{file}:{number}: field {name!r} got {row.get(name)!r}; allowed: text; make the data set anew")
        given, forced = row.get("data", {}), row.get("forced") or []
        if not isinstance(given, dict):
            raise ValueError(f"{file}:{number}: field 'data' got {given!r:.60}; allowed: an object; make the data set anew")
        if not are_spans(forced, len(row["solution"])):
            raise ValueError(
                f"{file}:{number}: field 'forced' got {forced!r:.60}; allowed: pairs [start, end] of positions in the solution; "
                "make the data set anew"
            )
        data = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        data |= {"forced": tuple(map(tuple, forced))} if forced else {}
        tasks.append(Task(row["question"], row["answer"], row["solution"], f"{row.get('task')}/{number}", data))
    if not tasks:
        raise ValueError(f"{file} has no tasks: no attempt was kept; look at {file.with_name('about.json')}")
    return tasks


def are_spans(value: Any, length: int) -> bool:
    """Tell whether a JSON value lists pairs [start, end] of positions in a text, in
    order.
    """
    if not isinstance(value, list) or not all(isinstance(span, list) and len(span) == 2 for span in value):
        return False
    places = [place for span in value for place in span]
    return all(type(place) is int and 0 <= place <= length for place in places) and places == sorted(places)
