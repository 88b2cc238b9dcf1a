r"""The verifier `math`: which part of a text is its answer, how keys are read, which
comparisons need no process, and a held-out table.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import math_table
import pytest
from nasty import NASTY

from jaxreason.types import Task
from jaxreason.verify import make, pool
from jaxreason.verify.expression import both_ways, compare, last_boxes, last_line, tidy


def one(answer, **data):
    return Task("?", answer, data=data)


@pytest.fixture(scope="module")
def math():
    return make("math", timeout_s=30.0)


@pytest.fixture(scope="module")
def children():
    return pool.shared("math", 2, 30.0, 2048)


@pytest.mark.parametrize(
    ("text", "key", "correct"),
    [
        (r"\boxed{35.0\%}", "35", True),
        (r"\boxed{35\%}", "35", True),
        (r"\boxed{35.0}", r"35\%", True),
        (r"\boxed{35.5\%}", "35", False),
        (r"The answer is $35.5\%$.", "35.5", True),
        (r"first \boxed{3}. Wait, no: \boxed{4}", "4", True),
        (r"first \boxed{3}. Wait, no: \boxed{4}", "3", False),
        (r"first \boxed{3}. Wait, no: \boxed{4}", "3,4", False),
        (r"\boxed{3} and \boxed{4}", "3,4", True),
        (r"$x = \boxed{3}$ and $y = \boxed{4}$", "3,4", True),
        (r"\boxed{3} and \boxed{4}", "3,5", False),
        (r"\boxed{3}, though \boxed{ } is empty and \boxed{5 is not closed", "3", True),
        (r"\boxed{x^2}", r"\[x^2\]", True),
        (r"\boxed{\frac{1}{2}}", r"\[0.50\].", True),
        (r"\boxed{18 \text{ dollars}.}", r"\(\text{18 dollars}\)", True),
        (r"\boxed{\text{18 dollars}}", "18", True),
        (r"\boxed{\text{2 million}}", "2000000", True),
        (r"\boxed{2\text{ million}}", "2", False),
        (r"\boxed{2.5 million}", "2500000", True),
        (r"\boxed{1½}", r"\frac{3}{2}", True),
        (r"\boxed{€5}", "5", True),
        (r"\boxed{x = 3}", "$3$ and $4$", False),
        (r"\boxed{3, 4}", "$3$ and $4$", True),
        (r"\fbox{$\frac{6}{4}$}", r"\boxed{\frac{3}{2}}", True),
    ],
)
def test_answers_are_compared_with_keys_as_mathematics(math, text, key, correct):
    assert math(text, one(key)).correct == correct


@pytest.mark.parametrize(
    ("text", "key", "correct"),
    [
        (r"\boxed{1011_2}", "1011_3", False),
        (r"\boxed{1011_{2}}", "1011_{3}", False),
        (r"\boxed{1011_2}", "$1011_{2}$", True),
        (r"\boxed{1011_{\text{two}}}", "1011_2", True),
        (r"\boxed{1011_{\text{two}}}", r"1011_{\text{three}}", False),
        (r"\boxed{(1011)_2}", "1011_3", False),
        (r"\boxed{1011 _ {2}}", "1011_3", False),
        (r"\boxed{\text{1011}_2}", "1011_3", False),
        (r"\boxed{1A_{16}}", "1A_{12}", False),
        (r"\boxed{1A_{16}}", "1A_{16}", True),
        (r"\boxed{10_2} and \boxed{10_3}", "10_2, 10_5", False),
        (r"The answer is $1011_2$.", "1011_3", False),
        (r"The answer is $1011_3$.", "1011_3", True),
        (r"We turn $31_{10}$ into $1011_3$.", "1011_3", True),
        (r"\boxed{10_2} and \boxed{10_3}", "10_2, 10_3", True),
        (r"\boxed{1011}", "1011_3", True),
        (r"\boxed{a_1 + 2}", "a_1 + 2", True),
    ],
)
def test_numbers_of_different_bases_differ(math, text, key, correct):
    assert math(text, one(key)).correct == correct


def test_a_key_of_the_right_base_counts_among_others(math):
    assert math(r"\boxed{1011_2}", one("1011_3", answers=["1011_{2}"])).correct
    assert not math(r"\boxed{1011_2}", one("1011_3", answers=["1011_{4}"])).correct


def test_the_table_is_judged_as_by_a_person():
    missed, paid = math_table.judge()
    assert len(math_table.TABLE) >= 150
    assert len(missed) <= 1, missed
    assert not paid


def test_answers_that_are_slow_to_compare_are_right(math):
    assert math(r"\boxed{x^2+2x+1}", one("(x+1)^2")).correct
    assert math(r"\boxed{\sin^2 x+\cos^2 x}", one("1")).correct


@pytest.mark.parametrize(
    ("expression", "tidied"),
    [
        (r"\[18\]", "18"),
        (r"\(18\).", "18"),
        ("$$18$$", "18"),
        ("$18.$", "18"),
        (r"\boxed{\text{18}}", "18"),
        (r"12\,345\ 678", "12345678"),
        (r"1{,}000", "1000"),
        (r"(1,\,200)", r"(1,\,200)"),
        ("$3$ and $4$", "$3$ and $4$"),
        (r"\text{Evelyn}", r"\text{Evelyn}"),
        (r"\text{a}+\text{b1}", r"\text{a}+\text{b1}"),
        ("0.333...", "0.333..."),
        (r"\$18", r"\$18"),
        ("[1,2)", "[1,2)"),
        ("$", "$"),
        ("$$", ""),
        (r"\boxed{}", ""),
    ],
)
def test_tidy(expression, tidied):
    assert tidy(expression) == tidied


def test_last_boxes():
    assert last_boxes(r"\boxed{1} so \boxed{2}") == ["2"]
    assert last_boxes(r"\boxed{0} so \boxed{1}, \boxed{2} or \boxed{3}") == ["3", "1, 2, 3"]
    assert last_boxes(r"\boxed{6}, \boxed{6}") == ["6"]
    assert last_boxes("6") == []
    assert both_ways([r"\boxed{5\%}", "6"]) == [r"\boxed{5\%}", "6", r"\boxed{5}"]


def test_plain_answers_need_no_process(monkeypatch):
    monkeypatch.setattr(pool.Pool, "ask", lambda *_: pytest.fail("asked a process"))
    math = make("math")
    assert math(r"\boxed{1,234}", one("1234")).reason == "right"
    assert math(r"\boxed{\frac{3}{4}}", one("0.75")).reason == "right"
    assert math(r"\boxed{x+y}", one(r"\(x+y\)")).reason == "right"
    assert math(r"\boxed{12}", one("$13$")).reason == "wrong"
    assert math("I do not know", one("13")).reason == "no answer"
    for key in ("", "$$", r"\boxed{}", " "):
        assert math(r"\boxed{12}", one(key)).reason == "bad key"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("3+8\n11", "11"),
        ("2\n-5", "-5"),
        ("  so:\n 1,234 \n", "1,234"),
        ("11", "11"),
        ("3+8=11", None),
        ("The answer: 5\n7", None),
        ("It is 5.\n7", None),
        ("$5$\n7", None),
        ("\\(5\\)\n7", None),
        ("7\n", "7"),
        ("", None),
    ],
)
def test_a_last_line_of_one_number_is_the_answer(monkeypatch, text, line):
    assert last_line(text) == line
    if line is not None:
        monkeypatch.setattr(pool.Pool, "ask", None)
        judge = make("math")
        assert judge(text, one(line)).correct
        assert not judge(text, one("4")).correct


def test_the_same_question_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(pool.Pool, "ask", lambda self, *question: asked.append(question) or (True, "4", ""))
    judge = make("math")
    for _ in range(3):
        assert judge("2+2=4", one("4")).correct
    assert len(asked) == 1


def test_the_quick_path_agrees_with_math_verify(children):
    rng = random.Random(0)

    def number():
        n = rng.choice([0, 1, 5, 12, 90, 1234, 70_000, 123_456_789])
        forms = [f"{n}", f"{n:,}", f"-{n}", f"{n}.0", f"{n}.5", f"{n}.1250", f"\\${n}", f"{n}/8", f"\\frac{{{n}}}{{8}}"]
        return rng.choice([*forms, "-0", "1/8", "0.125", "1/3", "0.3333", "0.33333", "-\\dfrac{4}{8}", "-0.5", "2/4"])

    seen = set()
    while len(seen) < 120:
        answer, key = number(), number()
        quick = compare(answer, [key])
        if quick is not None and (answer, key) not in seen:
            seen.add((answer, key))
            assert children.ask([f"\\boxed{{{answer}}}"], [key])[0] == quick, (answer, key)
    for text in ("I do not know", "x = y", "five percent", "(a, b)", "answer: none"):  # judged without a process, too
        assert children.ask([text], ["5"]) == [False, None, "no answer"]
    assert {compare(*pair) for pair in (("1", ["2"]), ("1", ["x"]), ("2/6", ["0.333333"]))} == {False, None}


def test_reading_is_bounded_whatever_the_text():
    for text in NASTY:
        start_s = time.process_time()
        last_boxes(text[-10_000:])
        both_ways([tidy(text[-10_000:])])
        assert time.process_time() - start_s < 5, repr(text[:40])


def test_a_child_has_its_cpu_time_however_long_it_waits_for_it():
    """The child is stopped, as by other work, for 20 times its limit; a limit on wall
    time would call the answer wrong.
    """
    children = pool.Pool("match", processes=1, timeout_s=0.05)
    assert children.ask("a", "cat") is True
    child = children._children.queue[0]
    os.kill(child.process.pid, signal.SIGSTOP)
    waker = threading.Timer(1.0, os.kill, (child.process.pid, signal.SIGCONT))
    waker.start()
    assert children.ask("a", "dog") is False
    assert children._children.queue[0] is child
    children.close()


def test_a_child_that_does_nothing_is_given_up_in_the_end(monkeypatch):
    monkeypatch.setattr(pool, "PATIENCE", 2)
    children = pool.Pool("match", processes=1, timeout_s=0.1)
    assert children.ask("a", "cat") is True
    os.kill(children._children.queue[0].process.pid, signal.SIGSTOP)
    with pytest.raises(pool.Failed, match="timeout"):
        children.ask("a", "dog")
    assert children.ask("a", "cat") is True
    children.close()


def test_a_child_that_is_killed_by_others_has_crashed_and_not_timed_out():
    children = pool.Pool("match", processes=1, timeout_s=5)
    children.ask("a", "cat")
    child = children._children.queue[0]
    os.kill(child.process.pid, signal.SIGSTOP)
    threading.Timer(0.1, os.kill, (child.process.pid, signal.SIGKILL)).start()
    with pytest.raises(pool.Failed, match="crashed"):
        children.ask("a", "dog")
    children.close()
