r"""The answer is a number, written as people and models write it: `\boxed{1{,}234}`, `#### $1,234.50`, `the answer is -3/4.`

The last box counts; without one the last `####` line, then the last "answer is" line, then the last number in the text.
Numbers are compared exactly, as fractions. Only the end of a long text is read, and every pattern here is linear in it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from fractions import Fraction

from jaxreason.types import Task, Verdict
from jaxreason.verify.exact import verdict

READ = 20_000  # characters from the end of the text
LONGEST = 64  # characters of a number

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])-)?(?:[$€£¥]\s?)?(?P<minus>(?<=[$€£¥])-)?"
    rf"(?P<digits>{_DIGITS})(?:[eE](?P<exponent>[+-]?[0-9]{{1,3}})(?![0-9.]))?"
    r"(?:\s?/\s?(?P<below>[0-9]{1,32})(?![0-9]|[.,][0-9]))?"
)
_FRACTION = re.compile(r"(-?)\\[dt]?frac\s?(?:\{\s?(-?[0-9]{1,32})\s?\}\s?\{\s?([0-9]{1,32})\s?\}|([0-9])([0-9]))")
_SAYS = re.compile(r"answer\s?(?:is|:|=)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?]\s")
_LATEX = (("\\$", "$"), ("{,}", ","), ("\\,", ""), ("\\!", ""), ("\\%", "%"), ("−", "-"), ("\\left", ""), ("\\right", ""))


def number(strict: bool = False, fractions: bool = True) -> Callable[[str, Task], Verdict]:
    """Compare the number that the text gives as its answer with that of `task.answer`.

    `strict` accepts a box or a `####` only. With `fractions=False`, `3/4` is two numbers. Currency signs, thousands commas,
    percent signs and units are ignored: "50%" is 50. Reasons: right, wrong, no answer, bad key (`task.answer` is not one number).
    """

    def verify(text: str, task: Task) -> Verdict:
        key = _only(_clean(task.answer), fractions)
        if key is None:
            return verdict(False, None, "bad key")
        value = read_number(text, strict, fractions)
        if value is None:
            return verdict(False, None, "no answer")
        return verdict(value == key, str(value))

    return verify


def read_number(text: str, strict: bool = False, fractions: bool = True) -> Fraction | None:
    """Find the number that a text gives as its answer; None where there is none, or a box holds several."""
    text = _clean(text[-READ:])
    box = _last_box(text)
    if box is not None:
        return _only(_right_side(box), fractions)
    _, found, after = text.rpartition("####")
    if found:
        return _first(_right_side(_line(after)), fractions)
    if strict:
        return None
    says = list(_SAYS.finditer(text))
    if says:
        value = _first(_right_side(_SENTENCE_END.split(_line(text[says[-1].end() :]))[0]), fractions)
        if value is not None:
            return value
    return _last(text, fractions)


def _clean(text: str) -> str:
    for latex, plain in _LATEX:
        text = text.replace(latex, plain)
    return _FRACTION.sub(lambda m: f" {m[1]}{m[2] or m[4]}/{m[3] or m[5]} ", text)


def _line(text: str) -> str:
    return text.lstrip().partition("\n")[0]


def _right_side(text: str) -> str:
    return text.rpartition("=")[2] if _NUMBER.search(text.rpartition("=")[2]) else text


def _last_box(text: str) -> str | None:
    """Return what the last closed `\\boxed{...}` holds, braces balanced."""
    stop = len(text)
    while (start := text.rfind("\\boxed{", 0, stop)) >= 0:
        depth = 0
        for i in range(start + 6, stop):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start + 7 : i]
        stop = start  # never closed before the next box: so each character is looked at once
    return None


def _values(text: str, fractions: bool):
    """Yield the numbers of a text in order, None for one that is no number after all (too long, or over zero)."""
    for match in _NUMBER.finditer(text):
        if match["below"] and not fractions:
            yield _fraction(match, None)
            yield _fraction(None, match["below"])
        else:
            yield _fraction(match, match["below"])


def _fraction(match: re.Match | None, below: str | None) -> Fraction | None:
    if match is None:
        return Fraction(below) if len(below) <= LONGEST else None
    if len(match[0]) > LONGEST or (below and not int(below)):
        return None
    value = Fraction(match["digits"].replace(",", "")) * Fraction(10) ** int(match["exponent"] or 0)
    return (-value if match["sign"] or match["minus"] else value) / int(below or 1)


def _first(text: str, fractions: bool) -> Fraction | None:
    return next(_values(text, fractions), None)


def _last(text: str, fractions: bool) -> Fraction | None:
    return next(iter(deque(_values(text, fractions), maxlen=1)), None)


def _only(text: str, fractions: bool) -> Fraction | None:
    values = list(_values(text, fractions))
    return values[0] if len(values) == 1 else None
