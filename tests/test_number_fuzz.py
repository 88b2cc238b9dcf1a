"""Answers made by rule, whose value is known: how often the number verifier misses a right one or pays a wrong one."""

import random
import time

import pytest

from jaxreason.estimators import wilson
from jaxreason.types import Task
from jaxreason.verify import make

NAMES = ("Anna", "the farmer", "each child", "she")
UNITS = ("", "", " apples", " dollars", " km", " hours", " cm^2", " m²", "%", " years old", " km/h", " pages per day")
BEFORE = (
    "First, {a} + {b} = {c}.",
    "{name} has {a} apples and gives away {b}.",
    "So {a} * {b} = {c}, which is less than {d}.",
    "We are told that x^2 = {a}.\n\n- Step 1: {b}\n- Step 2: {c}",
    "At 3:00 there were {a} left.",
    "<think>\nIs it {a}? No: the answer is {b}? Wait.\n</think>",
    "",
)
AFTER = ("", "", "", "\n", " ", "\n\n", "\n####", "<end>")


def spellings(rng: random.Random) -> tuple[str, str]:
    """A key and another way to write it."""
    kind = rng.choice(("integer", "integer", "large", "decimal", "fraction", "mixed", "negative", "power", "scale"))
    n = rng.randint(0, 999)
    if kind == "integer":
        return str(n), rng.choice((f"{n}", f"{n}.0", f"{n}.00", f"${n}", f"\\${n}", f"€{n}"))
    if kind == "large":
        n = rng.randint(1000, 9_999_999)
        grouped = f"{n:,}"
        marks = (",", "{,}", "\\,", "\u2009", "\u00a0", "'", "\\ ")
        return str(n), rng.choice((str(n), grouped, f"${grouped}", grouped.replace(",", rng.choice(marks))))
    if kind == "decimal":
        n = f"{rng.randint(0, 99)}.{rng.randint(1, 99)}"
        return n, rng.choice((n, f"${n}", n + "0"))
    if kind == "negative":
        minus = rng.choice(("-", "−", "–", "- ", "-\\$"))
        n = rng.randint(1, 999)
        return f"-{n}", f"{minus}{n}"
    if kind == "power":
        k = rng.randint(2, 6)
        m = rng.randint(2, 9)
        times, power = rng.choice((" \\times ", "\\cdot", " × ")), rng.choice((f"{k}", f"{{{k}}}"))
        return str(m * 10**k), f"{m}{times}10^{power}"
    if kind == "scale":
        name, power = rng.choice((("thousand", 3), ("million", 6), ("billion", 9)))
        m = rng.randint(1, 99)
        return str(m * 10**power), f"{m} {name}"
    above, below = rng.randint(1, 9), rng.randint(2, 9)
    fraction = rng.choice(
        (f"{above}/{below}", f"\\frac{{{above}}}{{{below}}}", f"\\dfrac{above}{below}", f"\\frac{above}{{{below}}}")
    )
    if kind == "fraction":
        return f"{above}/{below}", fraction
    whole, below = rng.randint(1, 9), above + rng.randint(1, 9)
    return f"{whole * below + above}/{below}", rng.choice((f"{whole} {above}/{below}", f"{whole}\\frac{{{above}}}{{{below}}}"))


FORMS = (
    "\\boxed{{{v}}}",
    "The answer is $\\boxed{{{v}}}$.",
    "Therefore, the final answer is: \\( \\boxed{{{v}}} \\)",
    "\\boxed{{{v}\\text{{{u}}}}}",
    "\\boxed{{x = {v}}}",
    "#### {v}",
    "#### {v}{u}",
    "#### **{v}**",
    "#### Final Answer\n{v}",
    "The answer is {v}{u}.",
    "**Answer:** {v}{u}",
    "**Answer**: {v}{u}",
    "The final answer is:\n\n**{v}**",
    "Answer: {v}{u}, because {a} + {b} = {c}.",
)
# What must not be paid, though the right number is in it.
TRAPS = (
    "\\boxed{{{v}, {a}1}}",
    "\\boxed{{{v} + 1}}",
    "\\boxed{{{v}x}}",
    "\\boxed{{\\sqrt{{{v}}}}}",
    "\\boxed{{> {v}}}",
    "#### {v} + {a}1",
    "#### {v} or {a}1",
    "The answer is not {v}.\n#### {a}1",
    "\\boxed{{{v}}}. Wait, no: \\boxed{{{a}1}}",
)


def texts(count: int, seed: int):
    """Yield (text, key, whether it is right)."""
    rng = random.Random(seed)
    for _ in range(count):
        key, spelling = spellings(rng)
        a, b = rng.randint(1000, 2000), rng.randint(0, 50)
        numbers = {"a": a, "b": b, "c": a + b, "d": 7777, "name": rng.choice(NAMES), "v": spelling, "u": rng.choice(UNITS)}
        trap = rng.random() < 0.3
        wrong = trap or rng.random() < 0.2
        form = rng.choice(TRAPS if trap else FORMS)
        before, after = rng.choice(BEFORE), rng.choice(AFTER)
        if wrong and not trap:
            key = f"{rng.randint(20_000_000, 30_000_000)}"
        yield f"{before}\n{form}".format(**numbers) + after, key, not wrong


def rates(count: int, seed: int) -> dict[str, tuple[int, int]]:
    """(missed, right texts) and (paid, wrong texts)."""
    verify = make("number")
    missed, paid, right, wrong = [], [], 0, 0
    for text, key, is_right in texts(count, seed):
        correct = verify(text, Task("", key)).correct
        right, wrong = right + is_right, wrong + (not is_right)
        if is_right and not correct:
            missed.append((text, key))
        if correct and not is_right:
            paid.append((text, key))
    for text, key in missed[:10] + paid[:10]:
        print(repr(text), repr(key))
    return {"missed": (len(missed), right), "paid": (len(paid), wrong)}


def check(count: int, seed: int) -> None:
    started_s = time.perf_counter()
    found = rates(count, seed)
    for name, (hits, n) in found.items():
        low, high = wilson(hits, n)
        print(f"{name}: {hits} of {n}, {hits / n:.5f} [{low:.5f}, {high:.5f}]")
    print(f"{count / (time.perf_counter() - started_s):,.0f} texts per second")
    assert found["missed"][0] <= 0.002 * found["missed"][1]
    assert found["paid"][0] <= 0.002 * found["paid"][1]


def test_known_values_are_read():
    check(2_000, seed=0)


@pytest.mark.slow
def test_a_hundred_thousand_known_values_are_read():
    check(100_000, seed=1)
