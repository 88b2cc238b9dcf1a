"""Procedural tasks in pairs: a problem, and its twin with the numbers renamed.

A policy that has learnt the method solves both; one that has memorised answers, or
answers by the look of a problem, solves only the original. An evaluation of such a
suite measures the rate of the latter: see `evaluation.measure_twins`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxreason.tasks import procedural
from jaxreason.types import Task


def twins(
    of: Mapping[str, Any],  # section of a procedural task, such as {"name": "chain", "ops": 5}
    split: str = "test",  # train or test; both problems of a pair are in it
    size: int = 2_000,  # number of tasks, two for each pair
    seed: int = 0,  # random seed of the tasks
) -> Sequence[Task]:
    """Make pairs of a procedural task and its twin: tasks 2 i and 2 i + 1.

    A twin has other numbers in the same places and another answer: a permutation of the
    digits, in which 0 and 1 stay if possible; for `countdown` of the numbers, with the
    same expression as a solution. It is of the same split, so a twin in the test split
    is never trained on. Its `data["twin_of"]` is the id of the original. A question
    without a twin, such as 6-6 whose answer is 0 whatever the numbers, is left out.

    Raises:
      ValueError: a task that is not procedural, or one whose numbers can't be renamed.
    """
    from jaxreason.tasks import load

    if not isinstance(of, Mapping) or not isinstance(of.get("name"), str):
        raise ValueError(f"task 'twins' got of={of!r:.80}; allowed: a section with a name, such as {{'name': 'chain'}}")
    if twice := {"split", "size", "seed"} & of.keys():
        raise ValueError(f"task 'twins' got {min(twice)!r} in of; allowed: beside of, as it is that of the pairs")
    made = load(**of, split=split, size=max(1, -(-size // 2)), seed=seed) if of["name"] in PROCEDURAL else None
    if not isinstance(made, procedural.Drawn) or made.pair is None:
        raise ValueError(f"task 'twins' got of={of['name']!r}; allowed: {', '.join(PROCEDURAL)}")
    pair = functools.cache(made.pair)
    return procedural.Drawn(lambda i: pair(i // 2)[i % 2], 2 * len(made), made.family, made.split)


PROCEDURAL = ("calculator", "chain", "countdown", "inverse_chain", "reversal", "sorting")
