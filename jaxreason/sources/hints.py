"""Hints: prompts that show a teacher more than the policy saw.

    answer     the task's answer
    solution   the task's worked solution (Shenfeld et al. 2026, arXiv 2601.19897, SDFT)
    verdict    the reason of the attempt's own verdict, such as an error (Huebotter et
               al. 2026, arXiv 2601.20802, SDPO)
    attempt    a right attempt of the same group (SDPO, whose code shows the verdict
               with it, and can leave out attempts that have no other right one)

The hint becomes a part of the question, and so of the user's turn in a chat. An attempt
may have none: an empty answer or reason, no right attempt in its group, a text that the
tokenizer can't encode, or one that makes the prompt too long.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxreason.types import Group, Task

# Kinds of hints, and the question with its hint.
TEXTS = {
    "answer": "{question}\n\nThe answer is {hint}. Show how to get there.",
    "solution": "{question}\n\nHere is a worked solution:\n\n{hint}\n\nSolve it in your own words.",
    "verdict": "{question}\n\nAn earlier attempt was judged as follows:\n\n{hint}\n\nSolve it without that mistake.",
    "attempt": "{question}\n\nHere is an earlier attempt that is right:\n\n{hint}\n\nSolve it in your own words.",
}
KINDS = ("none", *TEXTS)


class Hints(NamedTuple):
    """How a source makes prompts with hints."""

    kind: str  # one of `TEXTS`
    prompt: Callable[[Task], Sequence[int]]  # token ids of a task's prompt
    text: str  # replaces the question; {question} and {hint} stand for the two
    tokens: int  # that a hint may add to a prompt, at most
    columns: int  # further columns that the teacher's rows have


def with_hint(hints: Hints, task: Task, hint: str) -> Sequence[int]:
    """Return the prompt of a task with a hint.

    Raises:
      ValueError: the tokenizer can't encode it.
    """
    parts = {"{question}": task.question, "{hint}": hint}
    question = re.sub(r"\{question\}|\{hint\}", lambda found: parts[found[0]], hints.text)
    return hints.prompt(dataclasses.replace(task, question=question))


def hint_for(kind: str, group: Group, index: int) -> str:
    """Return the hint for one attempt of a group; "" if there is none.

    A right attempt is the next one after this, so that attempts have different hints,
    and this one itself only if no other is right.
    """
    attempt = group.attempts[index]
    if kind == "answer":
        return attempt.task.answer
    if kind == "solution":
        return attempt.task.solution
    if kind == "verdict":
        return attempt.verdict.reason
    G = len(group.attempts)
    others = (group.attempts[(index + i) % G] for i in range(1, G + 1))
    return next((other.text.strip() for other in others if other.verdict.correct), "")


def hinted_prompts(hints: Hints, groups: Sequence[Group]) -> list[np.ndarray | None]:
    """Return the prompt with its hint for each rollout of groups, in order; None for an
    attempt without a hint.
    """
    found = []
    for group in groups:
        made: dict[str, np.ndarray | None] = {"": None}
        for index in range(len(group.attempts)):
            hint = hint_for(hints.kind, group, index)
            if hint not in made:
                made[hint] = encoded(hints, group.task, hint, len(group.prompt) + hints.tokens)
            found.append(made[hint])
    return found


def encoded(hints: Hints, task: Task, hint: str, longest: int) -> np.ndarray | None:
    try:
        ids = np.asarray(with_hint(hints, task, hint), np.int32)
    except ValueError:  # what a model wrote must not end a run; `build` has tried the text on a task
        return None
    return ids if len(ids) <= longest else None
