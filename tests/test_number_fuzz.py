"""Generated answers: forms, values and noise. The value is known because it is drawn
first.
"""

from __future__ import annotations

import random
import time
from fractions import Fraction

import pytest

from jaxreason.estimators import wilson
from jaxreason.types import Task
from jaxreason.verify import make

MINUS = ("-", "−", "–", "－", "- ", "-\u2009")
BOX_UNITS = ("", r"\text{ cm}", r"\text{ cm}^2", r"\,\mathrm{kg}", r"\%", r"^\circ", r" \text{ dollars}", r"~\text{km/h}")
UNITS = ("", " apples", " m^2", " km/h", " cm²", "%", " percent", " dollars", " hours per day", " kg")
LINES = ("{}", "**{}**", "${}$", "Answer: {}", "x = {}", "3 + 4 = {}", "Total: {}", "\\({}\\)")
SAYS = (
    "The answer is {}",
    "the answer is: {}",
    "**Answer:** {}",
    "**Final Answer**: **{}**",
    "Answer: {}",
    "The final answer is ${}$",
    "**Answer**\n\n{}",
    "So the answer is therefore {}",
    "The answer is x = {}",
    "Final Answer:\n{}",
)
AFTER = (
    ".",
    "",
    " because {n} + {m} = {k}.",
    ". It took {n} steps.",
    " for {n} kids.",
    ".\n\nCheck: {n} + {m} = {k}",
    " ({n} + {m}).",
)
LEAD = (
    "",
    "We have {n} and {m}.\n",
    "<think>\nFirst {n} * {m} = {k}.\n</think>\n",
    "Step 1: take {n}.\nStep 2: {n} + {m} = {k}\n",
    "The answer is {k}? Wait, no.\n",
    "\\boxed{{}} holds the answer.\n",
    "{n} / {m}; $\\frac{{{n}}}{{{m}}}$.\n",
)
EXPRESSIONS = (
    r"\sqrt{%d}",
    r"%d\pi",
    "%d!",
    "%dx",
    ">%d",
    r"\pm %d",
    "%d + 18",
    "%d, 97",
    r"%d \text{ or } 97",
    r"x^{%d}",
    "%d:5",
    r"\log_2 %d",
    r"%d\sqrt{2}",
    r"x \le %d",
    "%d - 18x",
    r"%d \times 18",
    "(%d, 97)",
    "%d_8",
)
LINE_EXPRESSIONS = ("%d + 18", "%d * 18", "%d - 18", "%d or 97", "%dx", "√%d", "%dπ", "x > %d", "%d, 97", "%d and 97", "%d:30")


def value_and_form(rng: random.Random, latex: bool) -> tuple[Fraction, str]:
    """Draw a number and one way to write it."""
    kind = rng.choice(["small", "grouped", "decimal", "fraction", "mixed", "scientific", "scaled", "power"])
    whole, below = rng.randint(0, 999), rng.choice([2, 3, 4, 5, 7, 8, 10])
    above = rng.randint(1, below - 1)
    if kind == "small":
        value, form = Fraction(whole), str(whole)
    elif kind == "grouped":
        value = Fraction(rng.randint(1000, 99_999_999))
        separators = ["{,}", r"\,", r"\ ", ",", r",\!"] if latex else [",", " ", "\u2009", "\u202f", "\u00a0", "'", "’"]
        form = f"{int(value):,}".replace(",", rng.choice(separators))
    elif kind == "decimal":
        places = rng.choice([1, 2, 3])
        value = Fraction(rng.randint(1, 99_999), 10**places)
        form = f"{float(value):.{places}f}"
    elif kind == "fraction":
        value = Fraction(whole + 1, below)
        frac = rng.choice([r"\frac{%d}{%d}", r"\dfrac{ %d }{ %d }", r"\tfrac{%d}{%d}", "%d/%d", "%d / %d"])
        form = (frac if latex else "%d/%d") % (whole + 1, below)
    elif kind == "mixed":
        value = whole + 1 + Fraction(above, below)
        form = (rng.choice([r"%d\frac{%d}{%d}", r"%d \dfrac{%d}{%d}", "%d %d/%d"]) if latex else "%d %d/%d") % (
            whole + 1,
            above,
            below,
        )
    elif kind == "scientific":
        exponent, digits = rng.randint(-9, 12), rng.randint(1, 99)
        value = Fraction(digits, 10) * Fraction(10) ** exponent
        times = rng.choice([r" \times 10^{%d}", r"\cdot 10^{%d}", "e%d"]) if latex else rng.choice([" × 10^%d", "e%d", "*10^%d"])
        form = f"{digits / 10}{times % exponent}"
    elif kind == "scaled":
        name, zeros = rng.choice([("million", 6), ("billion", 9), ("thousand", 3)])
        value, form = Fraction(whole * 10**zeros), rf"{whole}\text{{ {name}}}" if latex else f"{whole} {name}"
    else:
        base, exponent = rng.randint(2, 10), rng.randint(2, 5)
        value, form = Fraction(base**exponent), f"{base}^{{{exponent}}}" if latex else f"{base}^{exponent}"
    if rng.random() < 0.2 and kind not in ("fraction", "scientific", "power", "mixed"):
        form = (r"\$" if latex else rng.choice("$€£")) + form
    if value and rng.random() < 0.25:
        return -value, rng.choice(MINUS) + form
    return value, form


def answer(rng: random.Random) -> tuple[Fraction | None, str]:
    """Draw a text and the number that it gives as its answer; None if that is not one
    number.
    """
    n, m = rng.randint(1, 50), rng.randint(1, 50)
    fill = {"n": n, "m": m, "k": n + m}
    lead, place, other = rng.choice(LEAD).format(**fill), rng.choice(["box", "line", "says", "plain"]), rng.randint(2, 99)
    if place != "plain" and rng.random() < 0.2:
        box = rf"\boxed{{{rng.choice(EXPRESSIONS) % other}}}"
        return None, lead + (box if place == "box" else f"#### {rng.choice(LINE_EXPRESSIONS) % other}")
    value, form = value_and_form(rng, latex=place == "box")
    if place == "box":
        inner = rng.choice(["{}", "{{{}}}", r"\text{{Total}} = {}", " {} ", "x={}", r"\displaystyle {}"]).format(form)
        unit = "" if "^" in form or "/" in form or "e" in form.replace("text", "") else rng.choice(BOX_UNITS)
        first = rng.choice(["", "", rf"I first got \boxed{{{n}}}. Wait, no. "])
        end = rng.choice(["", ".", "$", f"\n\nCheck: {n} + {m} = {n + m}.", "\nDone, in \\boxed{}."])
        return value, f"{lead}{first}So we get $\\boxed{{{inner}{unit}}}{end}"
    unit = "" if "^" in form or "e" in form else rng.choice(UNITS)
    if place == "line":
        end = rng.choice(
            ["", "\n####", " ####", "\n\n", "<|im_end|>", "</s>", f"\n\nIt took {n} steps.", "\nI leave \\boxed{} empty."]
        )
        return value, lead + rng.choice(["#### ", "####", "#### Final Answer\n", "####\n"]) + rng.choice(LINES).format(
            form + unit
        ) + end
    if place == "says":
        denied = rng.choice(["", "", f"The answer is not {n + 1000}. "])
        return value, lead + denied + rng.choice(SAYS).format(form + unit) + rng.choice(AFTER).format(**fill)
    return value, lead + f"In all that makes {form.replace('- ', '-').replace(MINUS[-1], '-')}{unit}."


def measure(count: int, seed: int) -> tuple[float, float]:
    """Judge generated texts by their own number, by another one and by its negative;
    return both false rates.
    """
    rng, verify = random.Random(seed), make("number")
    texts = [answer(rng) for _ in range(count)]
    missed, paid, answered = [], [], 0
    start_s = time.perf_counter()
    for value, text in texts:
        own = verify(text, Task("?", "0" if value is None else str(value)))
        if value is not None:
            answered += 1
            if not own.correct:
                missed.append(text)
        if own.parsed is not None and Fraction(own.parsed) != value:
            paid.append(text)  # a key of that number would be paid
    seconds = time.perf_counter() - start_s
    for name, bad, n in (("false negatives", missed, answered), ("false positives", paid, count)):
        low, high = wilson(len(bad), n)
        print(f"{name}: {len(bad)} of {n} = {len(bad) / n:.3%} [{low:.3%}, {high:.3%}]; such as {bad[:8]}")
    print(f"{count / seconds:,.0f} texts per second")
    return len(missed) / answered, len(paid) / count


@pytest.mark.parametrize("count", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_generated_answers(count):
    missed, paid = measure(count, seed=18)
    assert missed < 0.002
    assert paid < 0.002
