"""Verifier of expressions that make the target from the numbers: `3,7,5=26` -> `3*7+5`.

It has a small parser of its own (numbers, + - * /, parentheses; no sign, no power), on
stacks and exact fractions: no `eval`, and no input makes it recurse or grow.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import isfinite

from jaxreason.types import Task, Verdict
from jaxreason.verify.exact import BAD_KEY, answer_after, verdict

LONGEST = 256  # characters of an expression
_TOKENS = re.compile(r"[0-9]{1,9}(?![0-9])|[-+*/()]")
_BINDS = {"+": 1, "-": 1, "*": 2, "/": 2}


def countdown(
    marker: str = "A",  # the answer follows its last occurrence
    end: str = "",  # the answer ends before it; empty: at the end of the text
    use_all: bool = True,  # each number exactly once; else at most once
) -> Callable[[str, Task], Verdict]:
    """Check the expression after the last `marker` against `task.data["numbers"]` and
    `task.data["target"]`.

    Each number must be used exactly once, or at most once with `use_all=False`.
    Reasons: right, wrong, no answer, not an expression, wrong numbers, bad key (no
    expression can have these numbers or this target).

    Raises:
      ValueError: the task has no numbers or no target.
    """

    def verify(text: str, task: Task) -> Verdict:
        if "numbers" not in task.data or "target" not in task.data:
            raise ValueError(f"verifier 'countdown' needs data 'numbers' and 'target'; task {task.id!r} has {sorted(task.data)}")
        if not can_judge(task.data["numbers"], task.data["target"], use_all):
            return verdict(False, None, BAD_KEY)
        answer = answer_after(text, marker, end)
        if not answer:
            return verdict(False, None, "no answer")
        try:
            value, used = evaluate(answer)
        except (ValueError, ZeroDivisionError):
            return verdict(False, answer, "not an expression")
        used, given = Counter(used), Counter(task.data["numbers"])
        if used != given if use_all else used - given:
            return verdict(False, answer, "wrong numbers")
        return verdict(value == task.data["target"], answer)

    return verify


def can_judge(numbers: Sequence[int], target: int | float | Fraction, use_all: bool) -> bool:
    """Tell whether an expression can have these numbers (whole, of one to nine digits)
    and this target (exact and finite).
    """
    if not isinstance(target, int | float | Fraction) or isinstance(target, bool) or not isfinite(target):
        return False
    writable = [isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 10**9 for n in numbers]
    return (all if use_all else any)(writable) and bool(writable)


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """Return the exact value of an expression and the numbers in it.

    Raises:
      ValueError: it is not an expression, or longer than 256 characters.
      ZeroDivisionError: it divides by zero.
    """
    expression = expression.replace("×", "*").replace("÷", "/") if len(expression) <= LONGEST else "?"
    if _TOKENS.sub("", expression).strip(" "):
        raise ValueError("not an expression")
    values: list[Fraction] = []
    pending: list[str] = []
    used: list[int] = []

    def apply_down_to(binding: int) -> None:
        while pending and pending[-1] != "(" and _BINDS[pending[-1]] >= binding:
            op, right, left = pending.pop(), values.pop(), values.pop()
            values.append(
                left + right if op == "+" else left - right if op == "-" else left * right if op == "*" else left / right
            )

    wants_value = True
    for token in _TOKENS.findall(expression):
        if wants_value != (token == "(" or token.isdigit()):
            raise ValueError("not an expression")
        if token == "(":
            pending.append(token)
        elif token == ")":
            apply_down_to(0)
            if not pending:
                raise ValueError("not an expression")
            pending.pop()
        elif token.isdigit():
            values.append(Fraction(int(token)))
            used.append(int(token))
            wants_value = False
        else:
            apply_down_to(_BINDS[token])
            pending.append(token)
            wants_value = True
    if wants_value:
        raise ValueError("not an expression")
    apply_down_to(0)
    if pending:
        raise ValueError("not an expression")
    return values[0], used


def same_value(one: str, other: str) -> bool:
    """Tell whether two expressions have the same value."""
    try:
        return evaluate(one)[0] == evaluate(other)[0]
    except (ValueError, ZeroDivisionError):
        return False
