"""Problems by name: random-access sequences of `Task`, so `len(tasks)` and `tasks[i]`
are all there is to know.

`corpus` is the odd one: a sequence of texts, for pretraining. To add a family, write a
file with one maker and name it here.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from jaxreason.options import call_with_section, find
from jaxreason.tasks import corpus, gsm8k, hub, jsonl, procedural, splits
from jaxreason.types import Task

TASKS = {
    "chain": procedural.chain,
    "inverse_chain": procedural.inverse_chain,
    "calculator": procedural.calculator,
    "countdown": procedural.countdown,
    "reversal": procedural.reversal,
    "sorting": procedural.sorting,
    "gsm8k": gsm8k.gsm8k,
    "jsonl": jsonl.jsonl,
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
    "corpus": corpus.corpus,
}


def load(
    name: str,  # one of the tasks, or module:maker of your own
    **kwargs,
) -> Sequence[Task]:
    """Make the tasks of a family, or of a user's `module:maker`; the keywords are those
    of its maker.

    Raises:
      ValueError: an unknown name, an unknown, missing or impossible keyword.
    """
    maker, limit = find("task", name, TASKS), kwargs.get("limit")
    if name in TASKS and limit is not None and limit < 1:
        raise ValueError(f"limit of task {name!r} got {limit}; allowed: None (all), or 1 or more")
    made = call_with_section(maker, kwargs, f"task {name!r}")
    if not hasattr(made, "__len__") or (len(made) and not isinstance(made[0], Task | str)):
        raise ValueError(f"task {name!r} made {type(made).__name__}; allowed: a sequence of Task, or of texts")
    return made


# --- what is trained on, and what is held out ---


def splits_files(section: Mapping[str, Any]) -> bool:
    """Whether a section's family reads a user's files and splits them by the hash of
    each question or text.
    """
    name = section.get("name")
    return name in TASKS and {"path", "held_out"} <= inspect.signature(TASKS[name]).parameters.keys()


def files(section: Mapping[str, Any]) -> set[str]:
    """The files that a section of a config names, if its family splits files."""
    path = section.get("path")
    if not splits_files(section) or not isinstance(path, str | list | tuple):
        return set()
    with contextlib.suppress(FileNotFoundError):  # which the family itself will say
        return {str(file.resolve()) for file in corpus.find_files([path] if isinstance(path, str) else path)}
    return set()


def of_split(section: Mapping[str, Any]) -> str:
    """The split of a section, in words, for a line on the screen."""
    return f", split {section['split']!r}" if section.get("split") else ""


def overlap(trained: Sequence, held_out: Sequence) -> int:
    """Count the held-out tasks and texts that are trained on, up to case and white
    space.

    A task counts if its question is trained on; a text if more than half of its
    characters are in paragraphs that are, so that a corpus cut into files is compared
    with one cut into paragraphs.
    """
    if procedural.are_disjoint(trained, held_out):
        return 0
    known = {piece for item in trained for piece in _pieces(item)}
    texts = "\n".join(piece for item in trained if isinstance(item, str) for piece in _pieces(item))
    if len(texts) * len(held_out) > MOST_COMPARED:
        texts = ""
    return sum(_known_share(_pieces(item), known) > 0.5 or _is_in(item, texts) for item in held_out)


MOST_COMPARED = 10**10  # characters x questions: some ten seconds
SHORTEST_QUOTED = 16  # characters of a question that is looked for inside a text


def _is_in(item: Task | str, texts: str) -> bool:
    """Whether a task's question is part of a text that is trained on."""
    if isinstance(item, str) or not texts:
        return False
    question = splits.normalised(item.question)
    return len(question) >= SHORTEST_QUOTED and question in texts


def _known_share(pieces: list[str], known: set[str]) -> float:
    return sum(len(piece) for piece in pieces if piece in known) / max(1, sum(map(len, pieces)))


def _pieces(item: Task | str) -> list[str]:
    pieces = corpus.paragraphs(item) if isinstance(item, str) else [item.question]
    return [splits.normalised(piece) for piece in pieces]
