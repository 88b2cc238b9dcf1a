"""Verifiers by name: `verify(answer_text, task) -> Verdict`, with a reward of 1.0 for a
right answer and 0.0 for any other.

A verifier is total in the text: whatever a model wrote, it returns a verdict in bounded
time, with one of a few fixed words as its `reason`. Work that can hang (computer
algebra, patterns) runs in killable child processes: see `pool`. A task without the data
that its verifier needs is our own mistake, and raises. If no answer could equal the
key, the reason is "bad key" for every text, because the key is checked first (`math`
checks only for an empty one). `combine` has verifiers that are made of others. To add a
verifier, write a file with one maker and name it here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxreason.options import call_with_section, find
from jaxreason.types import Task, Verdict
from jaxreason.verify import code, combine, countdown, exact, expression, form, number, reasoning_gym, taskset
from jaxreason.verify.exact import BAD_KEY

VERIFIERS = {
    "exact": exact.exact,
    "number": number.number,
    "countdown": countdown.countdown,
    "math": expression.math,
    "reasoning_gym": reasoning_gym.reasoning_gym,
    "code": code.code,
    "format": form.format,
    "taskset": taskset.taskset,
    **combine.COMBINATORS,
}

BOUNDED = ("math", "reasoning_gym", "format", "code")  # these enforce their own time limit, and wait for busy children

leaves, takes_tokens, never_penalised = combine.leaves, combine.takes_tokens, combine.never_penalised
reward_measures = combine.reward_measures


def uses_children(section: Mapping[str, Any]) -> bool:
    """Tell whether a verifier, or a part of it, asks child processes."""
    return any(one.get("name") in BOUNDED for one in leaves(section))


def is_bounded(section: Mapping[str, Any]) -> bool:
    """Tell whether a verifier enforces its own time limit. A part that is the user's
    own code may have none.
    """
    return uses_children(section) and not any(":" in str(one.get("name")) for one in leaves(section))


def make(
    name: str,  # a verifier of this package, or your own as module:maker
    **kwargs,
) -> Callable[[str, Task], Verdict]:
    """Make a verifier of this package by name, or of your own `module:maker`. The
    keywords are those of the maker.

    Raises:
      ValueError: an unknown name or keyword, or a missing optional dependency.
    """
    made = call_with_section(find("verifier", name, VERIFIERS), kwargs, f"verifier {name!r}")
    if not callable(made):
        raise ValueError(f"verifier {name!r} made a {type(made).__name__}; allowed: a function verify(text, task) -> Verdict")
    return made


def equivalence(name: str, **kwargs) -> Callable[[str, str], bool] | None:
    """Return a function that tells whether two answers that a verifier has found are
    the same, for votes; None if only equal texts are. Of parts, the first finds the
    answer.

    Expressions of countdown are compared by value, and answers in mathematics as `math`
    does. Numbers need no comparison: `number` writes equal ones alike.
    """
    if name in combine.COMBINATORS:
        return next((equivalence(**one) for one in leaves({"name": name, **kwargs})), None)
    if name == "math":
        judge = make(name, **kwargs)
        return lambda one, other: judge(f"\\boxed{{{other}}}", Task("", f"${one}$")).correct
    return countdown.same_value if name == "countdown" else None


def canonical_answers(answers: Sequence[str | None], same: Callable[[str, str], bool] | None) -> list[str | None]:
    """Replace each answer by the first one that is equivalent to it."""
    first: dict[str, str] = {}
    for answer in answers:
        if answer is not None and answer not in first:
            classes = dict.fromkeys(first.values())
            first[answer] = next((other for other in classes if same is not None and same(other, answer)), answer)
    return [None if answer is None else first[answer] for answer in answers]


def bad_keys(verify: Callable[[str, Task], Verdict], tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks whose keys a verifier of this package can't judge."""
    return [task for task in tasks if verify("", task).reason == BAD_KEY]
