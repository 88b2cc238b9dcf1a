"""Tasks of reasoning-gym: about a hundred datasets of procedural puzzles, each with its
own score (Stojanovski et al. 2025, arXiv 2505.24760).

The items are made in a child process (see `verify.pool`): some datasets draw from the
global random generators, depend on the order of sets, or print. The verifier
`reasoning_gym` judges the answers.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxreason.options import unknown_name_message
from jaxreason.tasks import splits
from jaxreason.tasks.procedural import DRAWS, HELD_OUT, LARGEST, Drawn
from jaxreason.types import Task
from jaxreason.verify import pool

NUMBERS = 2**31  # items of a dataset; some seed NumPy with the number, which must be below 2**32
TIMEOUT_S = 60.0  # CPU time per item; the slowest need about a second


def reasoning_gym(
    dataset: str,  # name of a dataset of reasoning-gym, such as leg_counting
    split: str = "train",  # train or test; no question is in both
    size: int = 1000,  # number of tasks
    seed: int = 0,  # random seed of the tasks
    options: Mapping[str, Any] | None = None,  # fields of the dataset's config, such as its difficulty; None: its defaults
) -> Sequence[Task]:
    """Make tasks of a dataset of reasoning-gym, each on first use.

    Task `index` is drawn from `default_rng((seed, split, index))` and redrawn until the
    hash of its question falls in its split. (The seed of reasoning-gym itself is no
    split: item i + 1 of seed s is item i of seed s + 1.) Questions that differ only in
    case or white space are in the same split. `data` has the dataset, its options and
    the entry, in JSON values, for the verifier. `answer` is the key; if many answers
    are right it is an example of one, or empty.

    Raises:
      ValueError: reasoning-gym is not installed, an unknown dataset or option, an
        impossible option, or a dataset without enough questions of the split.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("task 'reasoning_gym' needs reasoning-gym; pip install 'jaxreason[gym]'")
    if split not in splits.SPLITS:
        raise ValueError(unknown_name_message("split of task 'reasoning_gym'", split, splits.SPLITS))
    if not 1 <= size <= LARGEST or seed < 0:
        raise ValueError(f"task 'reasoning_gym' got size={size}, seed={seed}; allowed: size from 1 to {LARGEST:,}, seed >= 0")
    child = pool.shared("gym", 1, TIMEOUT_S, 4096)
    written = _check_options(child, dataset, options)
    number = splits.SPLITS.index(split)

    def make(index: int) -> Task:
        entry, key = _draw(child, dataset, written, split, np.random.default_rng((seed, number, index)))
        data = {"dataset": dataset, "options": json.loads(written), "entry": entry}
        return Task(entry["question"], key, id=f"reasoning_gym/{dataset}/{split}/{seed}/{index}", data=data)

    return Drawn(make, size, f"reasoning_gym {dataset}", split)


def _check_options(child: pool.Pool, dataset: str, options: Mapping[str, Any] | None) -> str:
    """Return the options of a dataset as JSON text."""
    names = child.ask("names")
    if dataset not in names:
        raise ValueError(unknown_name_message("dataset of reasoning-gym", dataset, names))
    try:
        written = json.dumps(dict(options or {}), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"options of dataset {dataset!r}: {error}; allowed: texts, numbers, lists and mappings") from None
    try:
        fields, error = child.ask("check", dataset, written)
    except pool.Failed as failure:
        raise ValueError(f"dataset {dataset!r} of reasoning-gym: {failure} while it was built; try other options") from None
    for name in options or {}:
        if name not in (allowed := set(fields) - {"seed", "size"}):  # those two are fields of the task
            raise ValueError(unknown_name_message(f"option of dataset {dataset!r}", name, allowed))
    if error:
        raise ValueError(f"dataset {dataset!r} of reasoning-gym got options {dict(options or {})}: {error:.300}")
    return written


def _draw(child: pool.Pool, dataset: str, options: str, split: str, rng: np.random.Generator) -> tuple[dict[str, Any], str]:
    """Draw items until one is of the split; return its entry and key. An item that the
    dataset can't make is drawn again.
    """
    failed = ""
    for _ in range(DRAWS):
        try:
            error, entry, key = child.ask("entry", dataset, options, int(rng.integers(NUMBERS)))
        except pool.Failed as failure:
            raise ValueError(
                f"dataset {dataset!r} of reasoning-gym: {failure} while it made an item; try other options"
            ) from None
        failed = failed or error
        if entry is not None and splits.split_of(splits.normalised(entry["question"]), HELD_OUT) == split:
            return entry, key
    why = f"the first error was {failed!r:.200}" if failed else "too few distinct questions, make it wider by its options"
    raise ValueError(f"dataset {dataset!r} of reasoning-gym: no {split} question in {DRAWS} draws; {why}")
