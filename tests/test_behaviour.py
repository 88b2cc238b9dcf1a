"""Parsers of behaviour: against work whose slips are known because the test made them,
on hand-made changes of mind, and on any text at all.
"""

import functools
import re
import time

import numpy as np
import pytest

from jaxreason import tasks
from jaxreason.tasks import behaviour, procedural
from jaxreason.tasks.behaviour import Behaviour, Check, Step, rates
from jaxreason.types import Rollout, Task, Verdict
from jaxreason.verify import make as make_verifier

FAMILIES = ("chain", "inverse_chain", "countdown", "calculator", "reversal", "sorting")
SLIP = 0.3


def verifier(name):
    return make_verifier("countdown") if name == "countdown" else make_verifier("exact", marker="A")


# --- work with known slips, written without the parsers ---


def other(rng, value, n=10):
    return int((value + 1 + rng.integers(n - 1)) % n)


def worked_chain(rng, first, operations):
    """Write a trace and list which of its steps are right."""
    text, value, right = str(first), first, []
    for op, digit in re.findall(r"([-+*])(\d)", operations):
        value = eval(f"({value}{op}{digit})") % 10
        right.append(bool(rng.random() > SLIP))
        value = value if right[-1] else other(rng, value)
        text += f"{op}{digit}={value}"
    return text, value, right


def with_slips_chain(rng, task):
    text, value, right = worked_chain(rng, int(task.question[0]), task.question[1:-1])
    return f"{text};A{value}", right, [], [str(value) == task.answer]


def with_slips_inverse_chain(rng, task):
    operations, target = task.question[1:-1].split("=")
    text, rights, checks, answers = "", [], [], []
    for digit in rng.permutation(10)[: rng.integers(1, 5)]:
        trace, value, right = worked_chain(rng, int(digit), operations)
        accepts, rights = bool(rng.random() < 0.5), rights + right
        checks.append(Check(accepts, accepts == (value == int(target))))
        answers.append(str(digit) in task.data["answers"])
        text += trace + "ny"[accepts]
    return f"{text}A{digit}", rights, checks, [*answers, answers[-1]]


def with_slips_countdown(rng, task):
    dice = procedural.Dice(int(rng.integers(2**31)))
    pool, target = task.data["numbers"], task.data["target"]
    text, rights, checks, answers = "", [], [], []

    def work(tree, steps):
        if isinstance(tree, int):
            return tree
        left, op, right = tree
        a, b = work(left, steps), work(right, steps)
        value = eval(f"{a}{op}{b}") if op != "/" or b else None
        slips = value is None or value < 0 or value != int(value) or rng.random() < SLIP
        claimed = int(value or 0) + int(rng.integers(100, 200)) if slips else int(value)
        rights.append(not slips)
        steps.append(f"{a}{op}{b}={claimed}")
        return claimed

    for _ in range(rng.integers(1, 5)):
        tree, steps = procedural._combine(dice, pool), []
        value, accepts = work(tree, steps), bool(rng.random() < 0.5)
        checks.append(Check(accepts, accepts == (value == target)))
        answers.append(procedural._value(tree) == target)
        text += ",".join(steps) + "ny"[accepts]
    return f"{text}A{procedural._expression(tree)}", rights, checks, [*answers, answers[-1]]


def with_slips_calculator(rng, task):
    a, b, c = map(int, re.findall(r"\d+", task.question))
    rights = [bool(rng.random() > SLIP) for _ in range(2)]
    product = a * b + (0 if rights[0] else int(rng.integers(1, 99)))
    total = product + c + (0 if rights[1] else int(rng.integers(1, 99)))
    return f"[{a}*{b}={product}][{product}+{c}={total}]A{total}", rights, [], [str(total) == task.answer]


def with_slips_rearranged(rng, task):
    rest, done, text, rights = list(task.question[1:-1]), "", "", []
    while rest:
        i = len(rest) - 1 if task.question[0] == "<" else rest.index(min(rest))
        picked = int(rng.integers(len(rest))) if rng.random() < SLIP else i
        rights.append(rest[:picked] + rest[picked + 1 :] == rest[:i] + rest[i + 1 :] and rest[picked] == rest[i])
        done += rest.pop(picked)
        text += f"{''.join(rest)},{done};"
    return f"{text}A{done}", rights, [], [done == task.answer]


WORK = {name: globals().get(f"with_slips_{name}", with_slips_rearranged) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_known_slips_are_found(name):
    rng, parser, verify, wrong = np.random.default_rng(0), behaviour.make(name), verifier(name), 0
    for task in tasks.load(name, size=300):
        text, rights, checks, answers = WORK[name](rng, task)
        found = parser.parse(text, task)
        assert [step.right for step in found.steps] == rights, text
        assert list(found.checks) == checks, text
        assert list(found.answers) == answers, text
        assert found.answers[-1] == verify(text, task).correct
        assert all(text[s.start : s.start + len(s.claimed)] == s.claimed and s.end <= len(text) for s in found.steps)
        assert (found.self_checks, found.backtracks) == (len(checks), sum(not check.accepts for check in checks))
        assert found.retries == max(0, found.attempts - 1) == max(0, len(checks) - 1)
        wrong += rights.count(False)
    assert wrong > 50


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["human", "expert"])
def test_demonstrations_are_read_whole(name, kind):
    parser, verify = behaviour.make(name), verifier(name)
    hard = {"countdown": {"numbers": (1, 4)}}.get(name, {})
    made = tasks.load(name, size=300, demonstrations=kind, **hard)
    found = [parser.parse(task.solution, task) for task in made]
    assert [b.answers[-1] for b in found] == [verify(task.solution, task).correct for task in made]
    if kind == "expert":
        measured = rates(found, [True] * len(made))
        assert (measured["step_accuracy"], measured["right_with_wrong_step"]) == (1, 0)
        assert measured.get("check_accuracy", 1) == 1
        sign = ";" if name in ("reversal", "sorting") else "="
        assert sum(len(b.steps) for b in found) == sum(task.solution.count(sign) for task in made)


# --- changes of mind ---

CHAIN = Task("7+5*3-2:", "4")
INVERSE = Task("?*7+5=2:", "1", data={"answers": ("1",)})
COUNTDOWN = Task("3,7,5=26:", "3*7+5", data={"numbers": (3, 7, 5), "target": 26})
TWO_OF_THREE = Task("3,7,0=21:", "3*7+0", data={"numbers": (3, 7, 0), "target": 21})
CALCULATOR = Task("47*83+512:", "4413")
SORTING = Task(">407:", "047")


@pytest.mark.parametrize(
    ("name", "task", "text", "expected"),
    [
        ("chain", CHAIN, "7+5=2*3=6-2=4;A4", {"attempts": 1, "answers": (True,)}),
        ("chain", CHAIN, ";A4", {"attempts": 0, "steps": (), "answers": (True,)}),
        ("chain", CHAIN, "7+5=3*3=9-2=7;A77+5=2*3=6-2=4;A4", {"attempts": 2, "retries": 1}),
        ("chain", CHAIN, ";A5;A4", {"answers": (False, True)}),
        ("inverse_chain", INVERSE, "3*7=1+5=6n3*7=1+5=6n1*7=7+5=2yA1", {"attempts": 3, "repeats": 1, "backtracks": 2}),
        ("inverse_chain", INVERSE, "1*7=7+5=2nA3", {"answers": (True, False), "checks": (Check(False, False),)}),
        ("inverse_chain", INVERSE, "6*7=2yA6", {"checks": (Check(True, False),)}),  # not all of the chain
        ("countdown", COUNTDOWN, "7-5=2,2*3=6n3*7=21,21+5=26yA3*7+5", {"answers": (False, True, True), "retries": 1}),
        ("countdown", COUNTDOWN, "3*7=22,22+5=27nA7*5-3", {"answers": (True, False)}),  # the expression was right
        ("countdown", COUNTDOWN, "7+9=16,16+5=21,21+5=26y", {"checks": (Check(True, False),)}),
        ("countdown", COUNTDOWN, "3*7=21,21+5=25,25+1=26y", {"checks": (Check(True, False),)}),  # a number of its own
        ("countdown", TWO_OF_THREE, "3*7=21y", {"checks": (Check(True, False),), "answers": (False,)}),
        ("countdown", COUNTDOWN, "3*7=21y", {"checks": (Check(True, False),)}),
        ("calculator", CALCULATOR, "[47*83=3901][3901+512=4413]A4413", {"attempts": 1, "answers": (True,)}),
        ("sorting", SORTING, "47,0;7,04;,047;A047", {"attempts": 1, "answers": (True,)}),
    ],
)
def test_changes_of_mind(name, task, text, expected):
    found = behaviour.make(name).parse(text, task)
    assert {field: getattr(found, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("name", "task", "text", "rights"),
    [
        ("chain", CHAIN, "7+5=2*4=8-2=6", "101"),  # not the question's operation
        ("chain", CHAIN, "8+5=3*3=9-2=7", "011"),  # nor its first digit
        ("chain", CHAIN, "7+5=2*3=6-2=4+1=5", "1110"),  # nor so many operations
        ("chain", CHAIN, "7+5=12*3=36", "00"),  # not modulo 10
        ("countdown", COUNTDOWN, "7*7=49,49+5=54", "01"),  # a number used twice; then with what was written
        ("countdown", COUNTDOWN, "7/5=1,3/0=0", "00"),
        ("calculator", CALCULATOR, "[47*84=3948][3901+512=4413]", "00"),  # numbers of neither question nor result
        ("calculator", CALCULATOR, "[(47*83)=3901][/=4]", "1"),
        ("sorting", SORTING, "47,0;4,07;,074", "101"),
        ("sorting", SORTING, "47,0;7,04;,047;,047", "1110"),
    ],
)
def test_steps_are_judged_by_what_they_start_from(name, task, text, rights):
    assert "".join("01"[s.right] for s in behaviour.make(name).parse(text, task).steps) == rights


def test_rates_of_a_few_rollouts():
    right, wrong = Step("0", "1", True, 0, 1, 0), Step("1", "2", False, 1, 2, 0)
    found = rates(
        [
            Behaviour(
                (right, wrong), attempts=2, retries=1, checks=(Check(False, True), Check(True, False)), answers=(False, True)
            ),
            Behaviour((right,), attempts=1, checks=(Check(False, False),), answers=(True, False)),
            Behaviour(answers=(None,)),
            Behaviour((right,), attempts=1),
        ],
        [True, False, True, None],
    )
    assert found == {
        "worked": 3 / 4,
        "steps": 1.0,
        "attempts": 1.0,
        "repeats": 0.0,
        "retries": 1 / 4,
        "self_checks": 0.0,
        "backtracks": 0.0,
        "step_accuracy": 3 / 4,
        "right_with_wrong_step": 1.0,
        "check_accuracy": 1 / 3,
        "false_accepts": 1 / 2,
        "false_rejects": 1.0,
        "answers": 5 / 4,
        "first_right": 2 / 3,
        "wrong_then_right": 1 / 3,
        "right_then_wrong": 1 / 3,
    }
    assert rates([], []) == {}
    assert {"step_accuracy", "check_accuracy", "first_right"}.isdisjoint(rates([Behaviour()], [None]))


def test_rollouts_are_summarised_with_or_without_verdicts():
    def rollout(verdict):
        empty = np.zeros(0, np.int32)
        return Rollout(CHAIN, 0, 0, empty, empty, empty, empty, "eos", "7+5=2*3=6-2=4;A4", verdict)

    parser = behaviour.of_task("chain")
    judged, unjudged = ([rollout(v)] for v in (Verdict(0.0, False, None), None))
    assert behaviour.summarise(judged, parser)["first_right"] == 0  # a single answer is what the verifier says it is
    assert behaviour.summarise(unjudged, parser)["first_right"] == 1
    assert set(behaviour.summarise(unjudged, behaviour.of_task("svamp"))) >= {"lexical_steps", "lexical_backtracks"}


# --- any text ---


@pytest.mark.parametrize("name", behaviour.PARSERS)
def test_any_text_is_read(name):
    rng, parser = np.random.default_rng(0), behaviour.make(name)
    family = "chain" if name == "lexical" else name
    task = tasks.load(family, size=1, demonstrations="expert")[0]
    odd = [*procedural.ALPHABET, *"Anyyn=,;[]()+-*/", "٣", "\ud800", "\n", "é", "####", "\\boxed{", "}", "answer is ", "wait, "]
    texts = ["".join(rng.choice(odd, rng.integers(60))) for _ in range(300)]
    texts += ["".join(rng.permutation(list(task.solution))) for _ in range(100)]
    for text in ("", *texts):
        found = parser.parse(text, task)
        assert all(text[s.start : s.start + len(s.claimed)] == s.claimed for s in found.steps)
        cut = parser.corrupt(text, task, rng)
        if cut is not None:
            assert text.startswith(cut.control)
            assert isinstance(parser.noticed(cut, text, task), bool)
    for question in ("", "7", "?", "What is 5?", "<", "3,7=:"):
        assert parser.parse(task.solution, Task(question, "4")) is not None
        assert parser.corrupt(task.solution, Task(question, "4"), rng) is None or name in ("calculator", "lexical")


@pytest.mark.parametrize("name", behaviour.PARSERS)
@pytest.mark.parametrize(
    "piece", ["1", "1+", "1+1=2", "1 + ", "####", "\\boxed{", "A", "[1", "[1+1=2]", ";", "1,", " ", "wait, ", "(", "n", "="]
)
def test_long_texts_are_read_in_linear_time(name, piece):
    parser, task = behaviour.make(name), tasks.load("countdown" if name == "countdown" else "chain", size=1)[0]
    if name in ("reversal", "sorting"):
        task = SORTING

    text, started_s = (piece * 100_000)[:100_000], time.process_time()
    parser.parse(text, task)
    assert time.process_time() - started_s < 5  # quadratic: a minute; it takes less than 0.5 s


# --- corruption ---


def is_at_most(length, prefix):
    return len(prefix) <= length


@pytest.mark.parametrize("name", FAMILIES)
def test_a_corrupted_step_is_the_only_wrong_one(name):
    rng, parser = np.random.default_rng(0), behaviour.make(name)
    chosen = set()
    for task in tasks.load(name, size=200, demonstrations="expert"):
        cut = parser.corrupt(task.solution, task, rng)
        assert task.solution.startswith(cut.control)
        wrong, right = parser.parse(cut.corrupted, task).steps, parser.parse(cut.control, task).steps
        assert [s.right for s in wrong] == [True] * cut.step + [False]
        assert len(right) == cut.step + 1
        assert all(s.right for s in right)
        assert wrong[-1].name == right[-1].name
        assert len(cut.corrupted) == len(cut.control)
        assert sum(a != b for a, b in zip(cut.corrupted, cut.control, strict=True)) == 1
        chosen.add(cut.step)
        shorter = parser.corrupt(task.solution, task, rng, functools.partial(is_at_most, len(cut.control)))
        assert len(shorter.control) <= len(cut.control)
        assert parser.corrupt(task.solution, task, rng, lambda prefix: False) is None
    assert len(chosen) > 1


@pytest.mark.parametrize("name", ["chain", "inverse_chain"])
def test_a_corrupted_chain_leads_to_a_wrong_answer(name):
    """Otherwise a model that trusts the wrong result would be counted as recovered."""
    rng, parser, multiplied = np.random.default_rng(0), behaviour.make(name), 0
    for task in tasks.load(name, size=300, demonstrations="expert", ops=3):
        cut = parser.corrupt(task.solution, task, rng)
        rest = task.solution[len(cut.control) :]
        value = int(cut.corrupted[-1])
        for op, digit in re.findall(r"([-+*])(\d)", rest):
            value = eval(f"({value}{op}{digit})") % 10
        multiplied += "*" in rest
        assert str(value) != (task.answer if name == "chain" else task.question[-2])
    assert multiplied > 30


@pytest.mark.parametrize(
    ("name", "task", "corrupted", "control", "continuation", "noticed"),
    [
        ("chain", CHAIN, "7+5=3", "7+5=2", "*3=6-2=4;A4", True),  # goes on from the right value
        ("chain", CHAIN, "7+5=3", "7+5=2", "*3=9-2=7;A7", False),
        ("chain", CHAIN, "7+5=3", "7+5=2", "*3=8-2=6;A6", False),  # wrong from either
        ("chain", CHAIN, "7+5=3", "7+5=2", ";A3;7+5=2*3=6-2=4;A4", True),  # begins again
        ("inverse_chain", INVERSE, "1*7=8", "1*7=7", "+5=3n3*7=1+5=6nA3", False),
        ("inverse_chain", INVERSE, "1*7=8", "1*7=7", "+5=3n1*7=7+5=2yA1", True),
        ("inverse_chain", INVERSE, "1*7=7+5=3", "1*7=7+5=2", "yA1", True),  # accepts what it knows is right
        ("inverse_chain", INVERSE, "1*7=7+5=3", "1*7=7+5=2", "nA3", False),
        ("countdown", COUNTDOWN, "3*7=22", "3*7=21", ",21+5=26yA3*7+5", True),
        ("countdown", COUNTDOWN, "3*7=22", "3*7=21", ",22+5=27nA7*5-3", False),
        ("calculator", CALCULATOR, "[47*83=3801]", "[47*83=3901]", "[3901+512=4413]A4413", True),
        ("calculator", CALCULATOR, "[47*83=3801]", "[47*83=3901]", "[47*83=3901][3901+512=4413]A4413", True),
        ("calculator", CALCULATOR, "[47*83=3801]", "[47*83=3901]", "[3801+512=4313]A4313", False),
        ("sorting", SORTING, "47,1", "47,0", ";7,04;,047;A047", True),
        ("sorting", SORTING, "47,1", "47,0", ";7,14;,147;A147", False),
        ("lexical", Task("", "50"), "3 * 5 = 16", "3 * 5 = 15", ". So 16 + 35 = 51", False),
        ("lexical", Task("", "50"), "3 * 5 = 16", "3 * 5 = 15", ". Wait, 15 + 35 = 50", True),
        ("lexical", Task("", "50"), "3 * 5 = 16", "3 * 5 = 15", " dolls. 3*5=15, and 15 + 35 = 50", True),
    ],
)
def test_a_continuation_shows_whether_the_wrong_step_was_noticed(name, task, corrupted, control, continuation, noticed):
    parser = behaviour.make(name)
    cut = behaviour.Cut(corrupted, control, len(parser.parse(control, task).steps) - 1)
    assert parser.noticed(cut, continuation, task) is noticed


# --- prose ---


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("I waited for her. How long did she wait? It was the right way.", (0, 0, 0)),
        ("That is right. This is correct. Check the box.", (0, 0, 0)),
        ("So it is 12. Let me double-check that.", (1, 0, 0)),
        ("Let’s verify: 3 * 4 = 12. To check our work, divide.", (2, 0, 0)),
        ("Wait, that's wrong. But wait, no.", (0, 2, 0)),
        ("I made a mistake. That can't be right.", (0, 2, 0)),
        ("Hmm, this is incorrect. Alternatively, use thirds.", (0, 1, 1)),
        ("Let me try again with another approach.\nLet's recalculate.", (0, 0, 2)),
    ],
)
def test_phrases_of_prose(text, counts):
    found = behaviour.make("lexical").parse(text, Task("", "1"))
    assert (found.self_checks, found.backtracks, found.retries) == counts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She has 3 * 4 = 12 apples and $1,200 - 200 = $1,000.", [("3*4", "12", True), ("1200-200", "1,000", True)]),
        (
            r"\(3 \times 4 = 13\), 10 / 4 = 2.5, 10/3 = 3.33",
            [("3*4", "13", False), ("10/4", "2.5", True), ("10/3", "3.33", True)],
        ),
        ("2 + 3 * 4 = 14 and 6 ÷ 2 x 3 = 9", [("2+3*4", "14", True), ("6/2*3", "9", True)]),
        ("10/3 = 3, 5/0 = 0", [("10/3", "3", False), ("5/0", "0", False)]),
        ("2(3 + 4) = 14, x - 3 + 4 = 9, 3 + 4 = 7 * 2, 2^3 + 1 = 9, 1 1/2 + 2 = 3 1/2, 50 + 20% = 60, 3 + 4 = 7x", []),
        ("5 - 7 = -2, 1 = 1, 7 = 3 + 4", [("5-7", "-2", True)]),
    ],
)
def test_equations_in_prose(text, expected):
    assert [(s.name, s.claimed, s.right) for s in behaviour.equations(text)] == expected


def test_answers_in_prose_are_judged_in_order():
    asked = []
    judge = make_verifier("number")

    def correct(text, task):
        asked.append(text)
        return judge(text, task).correct

    parser, task = behaviour.of_task("gsm8k", correct), Task("", "18")
    text = "So \\boxed{\\frac{36}{2}}.\nNo, the answer is 17.\n#### 19\n#### 18\nDone."
    assert parser.parse(text, task).answers == (True, False, False, True)  # although a box outranks what is not in one
    assert asked == ["\\boxed{\\frac{36}{2}}", "answer is 17.", "#### 19", "#### 18"]
    asked.clear()
    assert parser.parse("The answer is \\boxed{18} apples.", task).answers == (None,)  # one answer needs no judge
    assert asked == []
    assert len(parser.parse("#### 1\n" * 100, task).answers) == behaviour.MOST_ANSWERS
    assert behaviour.make("lexical").parse("#### 1\n#### 2", task).answers == (None, None)


def test_prose_is_corrupted_where_the_result_is_needed_again():
    parser, task, rng = behaviour.make("lexical"), Task("", "50"), np.random.default_rng(0)
    text = "Dolls: 3 * 5 = $<<3*5=15>>15. Also 7 + 1 = 8. All: 15 + 35 = 50.\n#### 50\n8"
    cuts = [parser.corrupt(text, task, rng) for _ in range(30)]
    assert {cut.step for cut in cuts} == {0, 2}
    for cut in cuts:
        assert text.startswith(cut.control)
        assert (
            parser.parse(cut.corrupted, task).steps[cut.step].right,
            parser.parse(cut.control, task).steps[cut.step].right,
        ) == (
            False,
            True,
        )
        if cut.step == 0:
            assert re.fullmatch(r"Dolls: 3 \* 5 = \$<<3\*5=(\d+)>>\1", cut.corrupted)
    assert parser.corrupt("Nothing to see.\n#### 50", task, rng) is None


# --- by name ---


def test_own_parsers(tmp_path, monkeypatch):
    (tmp_path / "ours_of_behaviour.py").write_text(
        "from jaxreason.tasks.behaviour import Behaviour, Step\n"
        "def tens(right='10'):\n"
        "    def parse(text, task):\n"
        "        return Behaviour((Step('', text[:2], text[:2] == right, 0, 2, 0),) if len(text) > 1 else ())\n"
        "    return parse\n"
        "def five():\n    return 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parser = behaviour.make("ours_of_behaviour:tens", right="20")
    cut = parser.corrupt("20 apples", CHAIN, np.random.default_rng(0))
    assert cut.control == "20"
    assert cut.corrupted != "20"
    assert behaviour.rates([parser.parse("20", CHAIN)], [True])["step_accuracy"] == 1
    with pytest.raises(ValueError, match="made a int; allowed: a Parser, or a function"):
        behaviour.make("ours_of_behaviour:five")
    with pytest.raises(ValueError, match=r"unknown parser of behaviour 'chian' \(did you mean 'chain'"):
        behaviour.make("chian")
