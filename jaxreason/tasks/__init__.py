"""Problems by name: random-access sequences of `Task`, so `len(tasks)` and `tasks[i]` are all there is to know.

`corpus` is the odd one: a sequence of texts, for pretraining. To add a family, write a file with one maker and name it here.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxreason.options import call, unknown
from jaxreason.tasks import corpus, gsm8k, jsonl, procedural
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
    "corpus": corpus.corpus,
}


def load(name: str, **kwargs) -> Sequence[Task]:
    """Make the tasks of a family; the keywords are those of its maker, its difficulty among them.

    Raises:
      ValueError: an unknown name, an unknown, missing or impossible keyword.
    """
    if name not in TASKS:
        raise ValueError(unknown("task", name, TASKS))
    return call(TASKS[name], kwargs, f"task {name!r}")
