"""Tasks by name. A maker returns a random-access sequence of `Task`: its whole
interface is `len(tasks)` and `tasks[i]`.

`corpus` is the exception: it returns texts, for pretraining. To add a family, write a
file with one maker and name it here.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from jaxreason.options import call_with_section, find
from jaxreason.tasks import (
    corpus,
    generated,
    gsm8k,
    hub,
    jsonl,
    openenv,
    procedural,
    programs,
    reasoning_gym,
    splits,
    taskset,
    twins,
)
from jaxreason.types import Task

TASKS = {
    "chain": procedural.chain,
    "inverse_chain": procedural.inverse_chain,
    "calculator": procedural.calculator,
    "countdown": procedural.countdown,
    "reversal": procedural.reversal,
    "sorting": procedural.sorting,
    "twins": twins.twins,
    "gsm8k": gsm8k.gsm8k,
    "jsonl": jsonl.jsonl,
    "generated": generated.generated,
    "hub": hub.hub,
    "svamp": hub.svamp,
    "asdiv": hub.asdiv,
    "math": hub.math,
    "math500": hub.math500,
    "aime24": hub.aime24,
    "aime25": hub.aime25,
    "amc23": hub.amc23,
    "deepscaler": hub.deepscaler,
    "dapo_math_17k": hub.dapo_math_17k,
    "big_math": hub.big_math,
    "countdown_3to4": hub.countdown_3to4,
    "programs": programs.programs,
    "mbpp": programs.mbpp,
    "humaneval": programs.humaneval,
    "reasoning_gym": reasoning_gym.reasoning_gym,
    "openenv": openenv.openenv,
    "taskset": taskset.taskset,
    "corpus": corpus.corpus,
}


def load(
    name: str,  # a task of this package, or your own as module:maker
    **kwargs,
) -> Sequence[Task]:
    """Make the tasks of a family of this package, or of your own `module:maker`. The
    keywords are those of the maker.

    Raises:
      ValueError: an unknown name, or an unknown, missing or impossible keyword.
    """
    maker, limit = find("task", name, TASKS), kwargs.get("limit")
    if name in TASKS and limit is not None and limit < 1:
        raise ValueError(f"limit of task {name!r} got {limit}; allowed: None (all), or 1 or more")
    made = call_with_section(maker, kwargs, f"task {name!r}")
    if not hasattr(made, "__len__") or (len(made) and not isinstance(made[0], Task | str)):
        raise ValueError(f"task {name!r} made {type(made).__name__}; allowed: a sequence of Task, or of texts")
    return made


# --- training and held-out tasks ---


def splits_files(section: Mapping[str, Any]) -> bool:
    """Tell whether the task family of a section reads the user's own files and splits
    them by the hash of each question or text.
    """
    name = section.get("name")
    return name in TASKS and {"path", "held_out"} <= inspect.signature(TASKS[name]).parameters.keys()


def files(section: Mapping[str, Any]) -> set[str]:
    """List the files that a config section names, if its task family splits files."""
    path = section.get("path")
    if not splits_files(section) or not isinstance(path, str | list | tuple):
        return set()
    with contextlib.suppress(FileNotFoundError):  # the family's maker reports a missing file
        return {str(file.resolve()) for file in corpus.find_files([path] if isinstance(path, str) else path)}
    return set()


def of_split(section: Mapping[str, Any]) -> str:
    """Name the split of a section, as the end of a printed line."""
    return f", split {section['split']!r}" if section.get("split") else ""


def overlap(trained: Sequence, held_out: Sequence) -> int:
    """Count the held-out tasks and texts that are also trained on, ignoring case and
    white space.

    A task counts if its question is a training question or part of a training text. A
    text counts if more than half of its characters are in training paragraphs, so that
    a corpus cut into files can be compared with one cut into paragraphs.
    """
    if procedural.are_disjoint(trained, held_out):
        return 0
    known = {piece for item in trained for piece in _pieces(item)}
    texts = "\n".join(piece for item in trained if isinstance(item, str) for piece in _pieces(item))
    if len(texts) * len(held_out) > MOST_COMPARED:
        texts = ""
    return sum(_known_share(_pieces(item), known) > 0.5 or _is_in(item, texts) for item in held_out)


MOST_COMPARED = 10**10  # characters x held-out items, about ten seconds; above it, texts are not searched
SHORTEST_QUOTED = 16  # characters; shorter questions are not searched in texts


def _is_in(item: Task | str, texts: str) -> bool:
    """Tell whether a task's question is part of the training texts."""
    if isinstance(item, str) or not texts:
        return False
    question = splits.normalised(item.question)
    return len(question) >= SHORTEST_QUOTED and question in texts


def _known_share(pieces: list[str], known: set[str]) -> float:
    return sum(len(piece) for piece in pieces if piece in known) / max(1, sum(map(len, pieces)))


def _pieces(item: Task | str) -> list[str]:
    pieces = corpus.paragraphs(item) if isinstance(item, str) else [item.question]
    return [splits.normalised(piece) for piece in pieces]
