"""Answer endings with their values, written down before the grammar of the number
verifier.

The grammar of that time missed 63 of 298 (21.1 % [16.9, 26.1]) and rewarded another
number in 61 of 354 (17.2 % [13.7, 21.5]); the new one, at its first reading, 9 (3.0 %
[1.6, 5.6]) and 6 (1.7 % [0.8, 3.6]), 2026-11-27. Those were mended since, so this is
now a test and no estimate.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from jaxreason.estimators import wilson
from jaxreason.types import Task
from jaxreason.verify import make, number

ENDINGS = Path(__file__).with_name("number_endings.txt")


def endings() -> list[tuple[Fraction | None, str]]:
    lines = [line for line in ENDINGS.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    pairs = (line.split(" | ", 1) for line in lines)
    return [(None if value == "none" else Fraction(value), text.replace("⏎", "\n")) for value, text in pairs]


def rates(pairs) -> dict[str, tuple[int, int, list[str]]]:
    """Return, for both kinds of error, the number of errors, the number of texts that
    could have it, and the texts with the error.
    """
    verify, missed, paid, answered = make("number"), [], [], 0
    for value, text in pairs:
        answered += value is not None
        if value is not None and not verify(text, Task("?", str(value))).correct:
            missed.append(text)
        read = number.read_number(text)
        if read is not None and read != value:
            paid.append(text)
    return {"false negatives": (len(missed), answered, missed), "false positives": (len(paid), len(pairs), paid)}


def show(counts) -> None:
    for name, (bad, n, _) in counts.items():
        low, high = wilson(bad, n)
        print(f"{name}: {bad} of {n} = {bad / n:.3%} [{low:.3%}, {high:.3%}]")


def test_endings_are_read():
    counts = rates(endings())
    show(counts)
    assert not counts["false negatives"][0], counts["false negatives"][2]
    assert not counts["false positives"][0], counts["false positives"][2]
