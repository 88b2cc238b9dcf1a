"""Verifiers: right is right, wrong is wrong, and no text raises, hangs or exceeds its
limits.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from nasty import NASTY

from jaxreason.types import Task, Verdict
from jaxreason.verify import countdown, make, number, pool


def one(answer, **data):
    return Task("?", answer, data=data)


@pytest.fixture(scope="module")
def math():
    return make("math", timeout_s=2.0, memory_mb=1024)


@pytest.mark.parametrize(
    ("text", "marker", "end", "correct", "parsed"),
    [
        ("7+5=2;A2", ";A", "", True, "2"),
        ("A3 no, A2 ", "A", "", True, "2"),
        ("A2, no, A3", "A", "", False, "3"),
        ("2", "A", "", False, None),
        ("A", "A", "", False, None),
        (" 2 ", "", "", True, "2"),
        ("<answer> 2 </answer> bye", "<answer>", "</answer>", True, "2"),
        ("A9", "A", "", True, "9"),  # one of the other answers
    ],
)
def test_exact(text, marker, end, correct, parsed):
    verdict = make("exact", marker=marker, end=end)(text, one("2", answers=("2", "9")))
    assert (verdict.correct, verdict.reward, verdict.parsed) == (correct, float(correct), parsed)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", "12"),
        ("12.00", "12"),
        ("so 3 + 4 = 7 apples.", "7"),
        ("1,234", "1234"),
        ("$1,234.50 in all", "1234.5"),
        ("1,234,567.", "1234567"),
        ("5,6", "6"),
        ("-5", "-5"),
        ("−5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("10-5", "5"),
        ("10 - 5", "5"),
        ("x=-5", "-5"),
        (".5", "1/2"),
        ("50%", "50"),
        ("50\\%", "50"),
        ("3/4", "3/4"),
        ("-3/4", "-3/4"),
        ("\\frac{3}{4}", "3/4"),
        ("\\dfrac12", "1/2"),
        ("\\boxed{-\\frac{3}{4}}", "-3/4"),
        ("\\frac{-3}{4}", "-3/4"),
        ("1.5e3", "1500"),
        ("4 km/h", "4"),
        ("\\boxed{5} and 6", "5"),
        ("\\boxed{5}, no, \\boxed{6}", "6"),
        ("\\boxed{\\frac{1}{2}}", "1/2"),
        ("\\boxed{\\text{12 apples}}", "12"),
        ("\\boxed{\\$1{,}234}", "1234"),
        ("\\boxed{x = 5}", "5"),
        ("\\boxed{5, 6}", None),
        ("\\boxed{five} 5", None),
        ("\\boxed{5} and \\boxed{6", "5"),
        ("#### 1,000 dollars\n\nQ: 7?", "1000"),
        ("#### 4\n#### 5", "5"),
        ("####\n5", "5"),
        ("The answer is 12. It took 3 steps.", "12"),
        ("The answer is 12. Check: 2+2=4", "12"),
        ("**Answer:** 3 + 4 = 7", "7"),
        ("answer is 5\n#### 6", "6"),
        ("1/0", None),
        ("9" * 65, None),
        ("٣", None),
        ("none", None),
        ("", None),
    ],
)
def test_number_reads(text, value):
    assert number.read_number(text) == (None if value is None else Fraction(value))


def test_number_compares_exactly():
    verify = make("number")
    assert verify("0.1", one("1/10")).correct
    assert not verify("0.3333333333333333", one("1/3")).correct
    assert not verify("10000000000000001", one("10000000000000000")).correct  # equal as floats
    assert verify("#### 1,234", one("1234")) == Verdict(1.0, True, "1234", "right")
    assert verify("5", one("3 or 5")).reason == "bad key"
    assert make("number", strict=True)("it is 5", one("5")).reason == "no answer"
    assert make("number", fractions=False)("3/4", one("4")).correct


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("3*7+5", "right"),
        ("5+(7*3)", "right"),
        ("((5)) + 7 × 3", "right"),
        ("3*7", "wrong numbers"),
        ("3*7+5+5-5", "wrong numbers"),
        ("26", "wrong numbers"),
        ("3+7+5", "wrong"),
        ("3*7+5=26", "not an expression"),
        ("3**7+5", "not an expression"),
        ("3*(7+5", "not an expression"),
        ("3*7)+5", "not an expression"),
        ("3 7 5", "not an expression"),
        ("+3*7+5", "not an expression"),
        ("(3)(7)+5", "not an expression"),
        ("()", "not an expression"),
        ("5/(7-7)", "not an expression"),
        ("__import__('os')", "not an expression"),
        ("(" * 5000 + "3", "not an expression"),
        ("", "no answer"),
    ],
)
def test_countdown(expression, reason):
    verdict = make("countdown")(f"A{expression}", one("3*7+5", numbers=(3, 7, 5), target=26))
    assert verdict.reason == reason
    assert verdict.reward == float(verdict.correct) == float(reason == "right")


def test_countdown_is_exact_and_may_leave_numbers_out():
    task = one("8/(3-8/3)", numbers=(3, 3, 8, 8), target=24)
    assert make("countdown")("A8/(3-8/3)", task).correct
    partly = one("", numbers=[2, 4, 9], target=8)
    assert make("countdown", use_all=False)("A2*4", partly).correct
    assert make("countdown", use_all=False)("A4+4", partly).reason == "wrong numbers"
    assert not make("countdown")("A2*4", partly).correct
    with pytest.raises(ValueError, match="needs data 'numbers' and 'target'"):
        make("countdown")("A1", one("1"))


def test_countdown_value_agrees_with_python():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice(["3", "12", "(", ")", "+", "-", "*", "/"]) for _ in range(rng.randint(1, 9)))
        legal = not re.search(r"\*\*|//|(^|[-+*/(])[-+]|\(\)|\)[\d(]|\d\(", text)
        try:
            expected = eval(re.sub(r"(\d+)", r"Fraction(\1)", text)) if legal else None
        except (SyntaxError, ZeroDivisionError, TypeError):
            expected = None
        try:
            value = countdown.evaluate(text)[0]
        except (ValueError, ZeroDivisionError):
            value = None
        assert value == expected, text


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think>b", 1.0),
        ("<think>a</think> ", 0.0),
        ("</think>a<think>b", 0.0),
        ("<think><think>a</think>b", 0.0),
        ("a</think>b", 0.0),
        ("b", 0.0),
    ],
)
def test_format_pays_for_form_alone(text, reward):
    verdict = make("format")(text, one("b"))
    assert (verdict.reward, verdict.correct) == (reward, False)


def test_format_pattern_that_backtracks_for_ever_is_killed():
    verify = make("format", pattern=r"^(a|a)+$", timeout_s=0.5)
    assert verify("a" * 60 + "b", one("")).reason == "timeout"
    assert verify("aaaa", one("")).reward == 1.0  # the next question finds a living child
    assert make("format", open="")("thought</think>b", one("")).reward == 1.0


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("nubmer", {}, "unknown verifier 'nubmer' (did you mean 'number'?)"),
        ("number", {"stric": True}, "unknown field of verifier 'number' 'stric' (did you mean 'strict'?)"),
        ("format", {"pattern": "("}, "not a regular expression"),
        ("math", {"timeout_s": 0}, "timeout_s=0"),
    ],
)
def test_errors_are_one_line(name, kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make(name, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["exact", "number", "countdown", "format"])
def test_total_and_bounded_whatever_the_text(name):
    verify = make(name, **({"marker": "A"} if name == "exact" else {}))
    task = one("5", numbers=(3, 7, 5), target=26, answers=("5",))
    rng = random.Random(0)
    pieces = [
        "\\boxed{",
        "}",
        "####",
        "answer is",
        "A",
        "<think>",
        "</think>",
        "1",
        "2,345",
        "-",
        "$",
        "/",
        "(",
        ")",
        "=",
        " ",
        "\n",
        "e9",
    ]
    pieces += ["\0", "\ud800", "٣", "\\frac{1}", "{,}", ".", "9" * 70]
    fuzz = ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(400)]
    for text in NASTY + fuzz:
        start_s = time.process_time()
        verdict = verify(text, task)
        assert time.process_time() - start_s < 5, repr(text[:40])  # quadratic or worse; it takes microseconds
        assert isinstance(verdict, Verdict)
        assert verdict.reward in (0.0, 1.0)
        assert verdict.reason
        assert verdict.parsed is None or len(verdict.parsed) <= 200


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("so \\boxed{\\frac{2}{4}}", "1/2", "right"),
        ("$\\frac{1}{\\sqrt{2}}$", "\\frac{\\sqrt{2}}{2}", "right"),
        ("\\boxed{(1, 2)}", "(1,2)", "right"),
        ("\\boxed{x=5}", "5", "right"),
        ("\\boxed{6}", "5", "wrong"),
        ("\\boxed{9}", "5", "right"),  # one of the other answers
        ("", "5", "no answer"),
        ("\0\ud800", "5", "no answer"),
    ],
)
def test_math(math, text, key, reason):
    verdict = math(text, one(key, answers=("9",)))
    assert verdict.reason == reason
    assert verdict.reward == float(verdict.correct) == float(reason == "right")


def test_math_child_that_hangs_is_killed_and_replaced(math):
    assert math("\\boxed{10^{10^{10}}}", one("3")).reason == "timeout"  # without the kill it would not come back
    assert math("\\boxed{3}", one("3")).correct


def test_pool_answers_any_thread(math):
    verdicts = {}

    def ask(i):
        verdicts[i] = math(f"\\boxed{{{i}}}", one("3"))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [verdicts[i].correct for i in range(8)] == [i == 3 for i in range(8)]


def test_pool_outlives_a_child_that_dies_and_closes():
    children = pool.Pool("match", processes=1)
    assert children.ask("a", "cat") is True
    child = children._children.queue[0]
    child.process.kill()
    child.process.wait()
    assert children.ask("a", "dog") is False
    child = children._children.queue[0]
    children.close()
    assert child.process.poll() is not None


def test_pool_limits_memory():
    children = pool.Pool("match", processes=1, memory_mb=200)
    with pytest.raises(pool.Failed, match="out of memory"):
        children.ask("x" * 5_000_000, "")  # the parser of patterns takes dozens of bytes a character
    assert children.ask("a", "cat") is True
    children.close()
    with pytest.raises(RuntimeError, match="did not start"):
        pool.Pool("math", memory_mb=1).ask("1", ["1"])


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads /proc")
def test_child_is_light(math):
    """It imports neither jax nor this package, which would cost each child seconds and
    gigabytes.
    """
    assert math(r"\boxed{x+1}", one("1+x")).correct  # which no process decides by itself
    children = pool.shared("math", 2, 2.0, 1024)._children.queue
    started = [child for child in children if child is not None]
    assert started
    for child in started:
        maps = Path(f"/proc/{child.process.pid}/maps").read_text()
        assert "jaxlib" not in maps
        status = Path(f"/proc/{child.process.pid}/status").read_text()
        assert int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) < 200_000
