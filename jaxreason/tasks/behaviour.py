"""Behaviour of rollouts on the way to their answers: steps, retries, self-checks,
changes of mind. `make(name)` gives the parser of a task family, `summarise` the rates.

The parsers of procedural tasks know the true result of each step. A step is judged by
what it starts from, so one slip is one wrong step, and the steps that continue from the
wrong value are right; a step that is not the problem's next one is wrong. `lexical`
counts phrases of ordinary prose; it is a fallback, and its rates are named `lexical_`.
The kinds of behaviour (verification, backtracking) are those of Gandhi et al., 2025,
arXiv 2503.01307; the phrases are ours.

Parsers are pure, and total in the text. `Parser.corrupt` makes the wrong step of an
intervention, which `jaxreason.recovery` runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from jaxreason.options import call_with_section, find
from jaxreason.types import Rollout, Task
from jaxreason.verify.countdown import evaluate


class Step(NamedTuple):
    """A result that a rollout claims."""

    name: str  # of the computation: a later step of the same name does it again
    claimed: str
    right: bool
    start: int  # the claim is text[start : start + len(claimed)]
    end: int  # where the step ends, which may be after its claim
    attempt: int  # counted from 0


class Check(NamedTuple):
    """A verdict of a rollout on its own attempt."""

    accepts: bool
    right: bool  # whether that is right of the attempt as written


class Behaviour(NamedTuple):
    """Behaviour of one rollout."""

    steps: tuple[Step, ...] = ()
    attempts: int = 0  # worked ones; 0 is an answer without work
    repeats: int = 0  # attempts that are equal to an earlier one
    retries: int = 0  # new attempts after the first
    self_checks: int = 0
    backtracks: int = 0  # attempts or lines of thought that are given up
    checks: tuple[Check, ...] = ()  # the self-checks whose truth is known
    # In order: whether each attempt's answer, and each answer given, is right; None if
    # that is not known.
    answers: tuple[bool | None, ...] = ()


class Cut(NamedTuple):
    """A text cut after one of its steps, with a wrong result and as it was."""

    corrupted: str
    control: str
    step: int  # index of the step


class Parser(NamedTuple):
    """How the rollouts of a task family are read, and corrupted."""

    parse: Callable[[str, Task], Behaviour]
    usable: Callable[[str, Task, Behaviour], Iterable[tuple[int, list[str]]]]  # steps to corrupt: index, wrong results
    noticed: Callable[[Cut, str, Task], bool]  # whether a continuation of `cut.corrupted` shows that the result was wrong
    label: str = ""  # begins the names of its rates

    def corrupt(
        self, text: str, task: Task, rng: np.random.Generator, fits: Callable[[str], bool] = lambda prefix: True
    ) -> Cut | None:
        """Cut a text after a random step and replace the step's result by a wrong one.

        Only steps are chosen for which `fits` accepts both prefixes; None if there is
        none. In families where the rest of the work follows from a step, a wrong result
        is one that leads to a wrong answer.
        """
        behaviour = self.parse(text, task)
        choices = list(self.usable(text, task, behaviour))
        for i in rng.permutation(len(choices)):
            index, wrong = choices[i]
            step, result = behaviour.steps[index], wrong[rng.integers(len(wrong))]
            # A claim may be written twice: <<3*4=12>>12.
            corrupted = text[: step.start] + text[step.start : step.end].replace(step.claimed, result)
            cut = Cut(corrupted, text[: step.end], index)
            if fits(cut.corrupted) and fits(cut.control):
                return cut
        return None


# --- rates ---


def summarise(rollouts: Sequence[Rollout], parser: Parser) -> dict[str, float]:
    """Return rates and means over judged rollouts, by name (see `rates`)."""
    return rates(
        [parser.parse(r.text, r.task) for r in rollouts],
        [None if r.verdict is None else r.verdict.correct for r in rollouts],
        parser.label,
    )


def rates(behaviours: Sequence[Behaviour], correct: Sequence[bool | None], label: str = "") -> dict[str, float]:
    """Return rates and means of behaviours whose final answers are judged `correct`.

    Where that is None (not judged), the last of the answers counts. A rate without
    cases is left out. The names, each after `label`:

        worked                 fraction of rollouts with at least one step
        steps, attempts, repeats, retries, self_checks, backtracks
                               mean number per rollout (see `Behaviour`)
        step_accuracy          fraction of steps that are right
        right_with_wrong_step  of correct rollouts with steps, fraction with a wrong one
        check_accuracy         fraction of self-checks that are right
        false_accepts          of checked attempts that fail, fraction accepted
        false_rejects          of checked attempts that succeed, fraction rejected
        answers                mean number of answers, attempts included
        first_right            fraction of rollouts whose first answer is right
        wrong_then_right       fraction that are correct after a wrong answer
        right_then_wrong       fraction that are not correct after a right answer
    """
    finals = [b.answers[-1] if c is None and b.answers else c for b, c in zip(behaviours, correct, strict=True)]
    # A single answer was judged already.
    answers = [(final,) if len(b.answers) == 1 else b.answers for b, final in zip(behaviours, finals, strict=True)]
    known = [(a, final) for a, final in zip(answers, finals, strict=True) if final is not None and None not in a]
    steps = [step.right for b in behaviours for step in b.steps]
    checks = [check for b in behaviours for check in b.checks]
    found = {
        "worked": [bool(b.steps) for b in behaviours],
        "steps": [len(b.steps) for b in behaviours],
        **{name: [getattr(b, name) for b in behaviours] for name in COUNTS},
        "step_accuracy": steps,
        "right_with_wrong_step": [
            not all(step.right for step in b.steps) for b, final in zip(behaviours, finals, strict=True) if final and b.steps
        ],
        "check_accuracy": [check.right for check in checks],
        "false_accepts": [check.accepts for check in checks if check.accepts != check.right],
        "false_rejects": [not check.accepts for check in checks if check.accepts == check.right],
        "answers": [len(a) for a in answers],
        "first_right": [bool(a) and a[0] for a, _ in known],
        "wrong_then_right": [final and not all(a) for a, final in known],
        "right_then_wrong": [not final and any(a) for a, final in known],
    }
    return {label + name: float(np.mean(values)) for name, values in found.items() if values}


COUNTS = ("attempts", "repeats", "retries", "self_checks", "backtracks")


# --- procedural tasks ---

_OPERATION = r"([-+*])([0-9]{1,4})"
_CHAIN = re.compile(r"(?:([0-9])|\?)((?:[-+*][0-9])+)(?:=([0-9]))?:")
_TRACE = re.compile(rf"([0-9]{{1,4}})((?:{_OPERATION}=-?[0-9]{{1,4}})+)([ny]?)")
_LINK = re.compile(rf"{_OPERATION}=(-?[0-9]{{1,4}})")
_ANSWER = re.compile(r"A *(-?[0-9]{1,9999})")


class Chain(NamedTuple):
    """The question of a chain; `first` or `target` is None where it has none."""

    first: int | None
    operations: list[tuple[str, int]]
    target: int | None

    def run(self, value: int, start: int = 0) -> int:
        for op, digit in self.operations[start:]:
            value = apply(op, value, digit)
        return value


def read_chain(question: str) -> Chain | None:
    match = _CHAIN.fullmatch(question)
    if match is None:
        return None
    first, operations, target = match.groups()
    operations = [(operations[i], int(operations[i + 1])) for i in range(0, len(operations), 2)]
    return Chain(None if first is None else int(first), operations, None if target is None else int(target))


def apply(op: str, a: int, b: int) -> int:
    return (a + b if op == "+" else a - b if op == "-" else a * b) % 10


def links(match: re.Match, question: Chain, attempt: int) -> tuple[list[Step], int]:
    """Return the steps of a trace such as `7+5=2*3=6`, and its last value.

    A step is right if it is the question's operation at this position, done correctly
    on the value before it.
    """
    value, steps = int(match[1]), []
    starts_right = question.first in (None, value)
    for i, link in enumerate(_LINK.finditer(match[0], len(match[1]))):
        op, digit, claimed = link[1], int(link[2]), link[3]
        asked = (op, digit) in question.operations[i : i + 1] and (i > 0 or starts_right)
        right = asked and claimed == str(apply(op, value, digit))
        name = f"{i}" if question.first is not None else f"{match[1]}:{i}"
        start = match.start() + link.start(3)
        steps.append(Step(name, claimed, right, start, start + len(claimed), attempt))
        value = int(claimed)
    return steps, value


def wrong_links(question: Chain, behaviour: Behaviour, goal: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the right steps of the last attempt with the digits that lead away from
    `goal`.
    """
    place = 0
    for index, step in enumerate(behaviour.steps):
        place = 0 if index == 0 or behaviour.steps[index - 1].attempt != step.attempt else place + 1
        wrong = [str(d) for d in range(10) if str(d) != step.claimed and question.run(d, place + 1) != goal]
        if step.attempt == behaviour.attempts - 1 and step.right and wrong:
            yield index, wrong


def chain() -> Parser:
    """Read `7+5=2*3=6-2=4;A4`."""

    def parse(text: str, task: Task) -> Behaviour:
        question = read_chain(task.question)
        if question is None or question.first is None:
            return Behaviour()
        traces = list(_TRACE.finditer(text))
        steps = [step for i, trace in enumerate(traces) for step in links(trace, question, i)[0]]
        keys, count = {task.answer, *task.data.get("answers", ())}, len(traces)
        answers = tuple(answer in keys for answer in _ANSWER.findall(text))
        return Behaviour(tuple(steps), count, _repeats([trace[0] for trace in traces]), max(0, count - 1), answers=answers)

    def usable(text: str, task: Task, behaviour: Behaviour):
        return wrong_links(question, behaviour, question.run(question.first)) if (question := read_chain(task.question)) else ()

    return Parser(parse, usable, noticed_by(parse))


def inverse_chain() -> Parser:
    """Read `3*7=1+5=6n4*7=8+5=3n1*7=7+5=2yA1`. The answer of an attempt is its first
    digit.
    """

    def parse(text: str, task: Task) -> Behaviour:
        question = read_chain(task.question)
        if question is None or question.target is None:
            return Behaviour()
        keys = {task.answer, *task.data.get("answers", ())}
        steps, checks, answers, tried = [], [], [], []
        for trace in _TRACE.finditer(text):
            made, value = links(trace, question, len(tried))
            steps += made
            tried.append(trace[1])
            answers.append(trace[1] in keys)
            if trace[5]:
                reached = value == question.target and len(made) == len(question.operations)
                checks.append(Check(trace[5] == "y", (trace[5] == "y") == reached))
        answers += [answer in keys for answer in _ANSWER.findall(text)]
        return _searched(steps, checks, answers, tried)

    def usable(text: str, task: Task, behaviour: Behaviour):
        return wrong_links(question, behaviour, question.target) if (question := read_chain(task.question)) else ()

    return Parser(parse, usable, noticed_by(parse))


_MOVE = re.compile(r"([0-9]{1,9})([-+*/])([0-9]{1,9})=(-?[0-9]{1,9})|([ny])|A([-+*/() 0-9]*)")


def countdown() -> Parser:
    """Read `7-5=2,2*3=6n3*7=21,21+5=26yA3*7+5`.

    A step may use each number, and each earlier result of its attempt, once. The answer
    of an attempt is the true value of its expression, whatever it claims.
    """

    def parse(text: str, task: Task) -> Behaviour:
        numbers, target = task.data.get("numbers"), task.data.get("target")
        if numbers is None or target is None:
            return Behaviour()
        steps, checks, tried, answers = [], [], [], []
        pool, names = Pool(numbers), []

        def close() -> None:
            nonlocal pool, names
            if names:
                tried.append(tuple(names))
                answers.append(pool.is_worth(target))
            pool, names = Pool(numbers), []

        for move in _MOVE.finditer(text):
            if move[4] is not None:
                right = pool.step(int(move[1]), move[2], int(move[3]), int(move[4]))
                names.append(move[0].partition("=")[0])
                steps.append(Step(names[-1], move[4], right, move.start(4), move.end(4), len(tried)))
            elif move[5]:
                checks.append(Check(move[5] == "y", (move[5] == "y") == pool.claims(target)))
                close()
            else:
                close()
                answers.append(_solves(move[6], numbers, target))
        close()
        return _searched(steps, checks, answers, tried)

    def usable(text: str, task: Task, behaviour: Behaviour):
        last = behaviour.attempts - 1
        return [(i, misread(s.claimed)) for i, s in enumerate(behaviour.steps) if s.attempt == last and s.right]

    return Parser(parse, usable, noticed_by(parse))


class Pool:
    """Numbers that the steps of a countdown attempt may use; each has the value that is
    claimed for it, and its true one (None: no value).
    """

    def __init__(self, numbers: Sequence[int]):
        self.values: dict[int, list[Fraction | None]] = {}  # claimed -> true ones
        self.count = 0
        self.whole = True  # whether all steps used numbers that were there
        for n in numbers:
            self._put(n, Fraction(n))

    def step(self, a: int, op: str, b: int, claimed: int) -> bool:
        """Replace two numbers by a result; tell whether it is right."""
        left, right = self._take(a), self._take(b)
        there = bool(left and right)
        self.whole &= there
        self._put(claimed, _compute(left[0], op, right[0]) if there else None)
        return there and _compute(Fraction(a), op, Fraction(b)) == claimed

    def claims(self, target: int) -> bool:
        return self.whole and self.count == 1 and bool(self.values.get(target))

    def is_worth(self, target: int) -> bool:
        return self.whole and self.count == 1 and [target] in self.values.values()

    def _put(self, claimed: int, true: Fraction | None) -> None:
        self.values.setdefault(claimed, []).append(true)
        self.count += 1

    def _take(self, claimed: int) -> list[Fraction | None]:
        """Remove a number; return its true value in a list, which is empty if it is not
        there.
        """
        if not self.values.get(claimed):
            return []
        self.count -= 1
        return [self.values[claimed].pop(0)]


def _compute(a: Fraction | None, op: str, b: Fraction | None) -> Fraction | None:
    if a is None or b is None or (op == "/" and not b):
        return None
    return a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b


def _solves(expression: str, numbers: Sequence[int], target: int) -> bool:
    try:
        value, used = evaluate(expression.strip())
    except (ValueError, ZeroDivisionError):
        return False
    return value == target and sorted(used) == sorted(numbers)


_CALL = re.compile(r"\[([-+*/() 0-9]{3,200})=(-?[0-9]{1,40})\]?")


def calculator() -> Parser:
    """Read `[47*83=3901][3901+512=4413]A4413`. A call may use numbers of the question
    and earlier results.
    """

    def parse(text: str, task: Task) -> Behaviour:
        known = {int(n) for n in re.findall(r"[0-9]{1,40}", task.question)}
        steps = []
        for call in _CALL.finditer(text):
            try:
                value, used = evaluate(call[1])
                right = value == int(call[2]) and known.issuperset(used)
            except (ValueError, ZeroDivisionError):
                right = False
            known.add(int(call[2]))
            steps.append(Step(call[1].replace(" ", ""), call[2], right, call.start(2), call.end(), 0))
        answers = tuple(answer == task.answer for answer in _ANSWER.findall(text))
        return Behaviour(tuple(steps), attempts=min(1, len(steps)), answers=answers)

    def usable(text: str, task: Task, behaviour: Behaviour):
        return [(i, misread(step.claimed)) for i, step in enumerate(behaviour.steps) if step.right]

    return Parser(parse, usable, noticed_by(parse))


def reversal() -> Parser:
    """Read `40,7;4,70;,704;A704`: the digits left and the digits done."""
    return _rearranged(lambda rest: len(rest) - 1)


def sorting() -> Parser:
    """Read `47,0;7,04;,047;A047`: the digits left and the digits done."""
    return _rearranged(lambda rest: rest.index(min(rest)))


_DIGITS = re.compile("[<>][0-9]+:")


def _rearranged(choose: Callable[[str], int]) -> Parser:
    def parse(text: str, task: Task) -> Behaviour:
        if not _DIGITS.fullmatch(task.question):
            return Behaviour()
        rest, done, at, steps = task.question[1:-1], "", 0, []
        for part in text.split(";"):
            left, comma, moved = part.partition(",")
            if comma and set(left + moved) <= set("0123456789"):
                i = choose(rest) if rest else 0
                right = rest != "" and (left, moved) == (rest[:i] + rest[i + 1 :], done + rest[i])
                steps.append(Step(str(len(steps)), part, right, at, at + len(part), 0))
                rest, done = left, moved
            at += len(part) + 1
        answers = tuple(answer == task.answer for answer in _ANSWER.findall(text))
        return Behaviour(tuple(steps), attempts=min(1, len(steps)), answers=answers)

    def usable(text: str, task: Task, behaviour: Behaviour):
        """Change the digit that was just moved."""
        last = [(i, step.claimed) for i, step in enumerate(behaviour.steps) if step.right]
        return [(i, [state[:-1] + d for d in "0123456789" if d != state[-1]]) for i, state in last]

    return Parser(parse, usable, noticed_by(parse))


def _searched(steps: list[Step], checks: list[Check], answers: list[bool], tried: list) -> Behaviour:
    return Behaviour(
        tuple(steps),
        attempts=len(tried),
        repeats=_repeats(tried),
        retries=max(0, len(tried) - 1),
        self_checks=len(checks),
        backtracks=sum(not check.accepts for check in checks),
        checks=tuple(checks),
        answers=tuple(answers),
    )


def _repeats(tried: Sequence) -> int:
    return len(tried) - len(set(tried))


def misread(number: str) -> list[str]:
    """List the numbers that differ from a written one in one digit, with as many
    digits.
    """
    digits = [i for i, c in enumerate(number) if c in "0123456789"]
    found = [number[:i] + d + number[i + 1 :] for i in digits for d in "0123456789" if d != number[i]]
    return [other for other in found if len(digits) == 1 or other[digits[0]] != "0"]


def noticed_by(parse: Callable[[str, Task], Behaviour]) -> Callable[[Cut, str, Task], bool]:
    """Make `noticed(cut, continuation, task)`: whether the continuation does the
    corrupted step again with the right result, or has a step or a self-check that is
    right after the text as it was, and wrong after the corrupted one.
    """

    def noticed(cut: Cut, continuation: str, task: Task) -> bool:
        after, was = parse(cut.corrupted + continuation, task), parse(cut.control + continuation, task)
        if len(after.steps) <= cut.step:
            return False
        later = after.steps[cut.step + 1 :]
        again = any(step.name == after.steps[cut.step].name and step.right for step in later)
        pairs = [*zip(later, was.steps[cut.step + 1 :]), *zip(after.checks, was.checks)]
        return again or any(before.right and not now.right for now, before in pairs)

    return noticed


# --- prose ---

_BETWEEN = re.compile(r"(?<=[.!?…])\s+|\n\s*")
_CHECKS = re.compile(
    r"\b(?:(?:let['’]?s|let me|let us|i['’]ll|i will|i should|we can|we should|we need to|now,?) (?:now |also |just |quickly )?"
    r"(?:double[- ]?check|check|verify|confirm|make sure)|double[- ]?check(?:ing)?|sanity check|to (?:check|verify|confirm) "
    r"(?:this|that|our|my|the)|checking (?:this|that|our|my|the)|verification)\b",
    re.IGNORECASE,
)
_BACKTRACKS = re.compile(
    r"(?:(?:^|[>:;*]\s{0,3}|\b(?:but|oh|no),? )(?:wait|hold on|oops|hmm|actually)\b|\bscratch that\b|\bmy mistake\b"
    r"|\b(?:that|this|it)(?:['’]s| is| was| seems| looks| must be) (?:not (?:right|correct)|incorrect|wrong|a mistake|an error)\b"
    r"|\b(?:that|this|it)(?: isn['’]t| can['’]t be| cannot be| doesn['’]t seem) (?:right|correct)\b"
    r"|\bi (?:made|have made|see) (?:a|an|my) (?:mistake|error)\b)",
    re.IGNORECASE,
)
_RETRIES = re.compile(
    r"\b(?:alternatively|(?:let['’]?s|let me|let us|i['’]ll|i will) (?:try|re-?do|start over|re-?(?:calculate|compute|consider))"
    r"|(?:another|a different) (?:way|approach|method)|try(?:ing)? again|start(?:ing)? over)\b",
    re.IGNORECASE,
)
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,4}(?![0-9])|[0-9]{1,15})(?:\.[0-9]{1,9})?"
_SIGN = r"\s{0,3}(?:[-+*/×÷·−]|x(?=[\s$0-9])|\\(?:times|cdot|div)(?![A-Za-z]))\s{0,3}"
_EQUATION = re.compile(
    rf"(?<![\w.,$])\\?\$?({_NUMBER}(?:{_SIGN}\\?\$?{_NUMBER}){{1,8}})\s{{0,3}}=\s{{0,3}}\\?\$?(-?{_NUMBER})(?![\w%]|\.[0-9])(?:>>\$?\2(?![0-9]))?"
)
_OPERAND = re.compile(_NUMBER)
_SIGNS = str.maketrans({"×": "*", "÷": "/", "·": "*", "−": "-", "x": "*"})
# Around an equation that is a part of a longer expression, or of a number as 1 1/2.
_CONTINUES = re.compile(r"\s{0,3}(?:[-+*/×÷^%−–]|x\s|\\(?:times|cdot|div))|\s[0-9]")
_CONTINUED = re.compile(r"(?:[-+*/×÷·−–^%)0-9]|\sx|(?:times|cdot|div))[\s$\\]{0,3}$")
_FINAL = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{|(?<!#)#{4,}[ \t]{0,9}(?=[^\s#])|\banswer\s?(?:is|:)", re.IGNORECASE)
_LONGEST_ANSWER = 200  # characters
MOST_ANSWERS = 8  # answers of a text that are judged: the first ones, and the last


def lexical(correct: Callable[[str, Task], bool] | None = None) -> Parser:
    r"""Read ordinary prose by its wording: a rough count, not a judgement.

    Self-checks, backtracks and retries are sentences with a phrase such as "let me
    check", "Wait," or "alternatively". Steps are equations of plain numbers (`3 * 4 =
    12`), which are right if their arithmetic is; they need not follow from the
    question. Answers are boxes, `####` and "answer is"; with several, each is judged
    alone by `correct(answer, task)`, else whether they are right is not known.
    """

    def parse(text: str, task: Task) -> Behaviour:
        answers, retries = final_answers(text), sentences_with(_RETRIES, text)
        known = correct is not None and len(answers) > 1
        return Behaviour(
            tuple(equations(text)),
            attempts=1 + retries,
            retries=retries,
            self_checks=sentences_with(_CHECKS, text),
            backtracks=sentences_with(_BACKTRACKS, text),
            answers=tuple(bool(correct(text[start:end], task)) if known else None for start, end in answers),
        )

    def usable(text: str, task: Task, behaviour: Behaviour):
        """Use results that the text has again, up to the end of its first answer."""
        answers = final_answers(text)
        last = {number[0]: number.start() for number in _OPERAND.finditer(text[: answers[0][1]] if answers else text)}
        for i, step in enumerate(behaviour.steps):
            if step.right and last.get(step.claimed, -1) >= step.end:
                yield i, misread(step.claimed)

    again = noticed_by(lambda text, task: Behaviour(tuple(equations(text))))

    def noticed(cut: Cut, continuation: str, task: Task) -> bool:
        before, after = (sentences_with(_BACKTRACKS, text) for text in (cut.corrupted, cut.corrupted + continuation))
        return again(cut, continuation, task) or after > before

    return Parser(parse, usable, noticed, "lexical_")


def sentences_with(phrases: re.Pattern, text: str) -> int:
    """Count the sentences that have one of some phrases."""
    return sum(phrases.search(sentence) is not None for sentence in _BETWEEN.split(text))


def equations(text: str) -> Iterator[Step]:
    """Yield the equations of plain numbers in a text. A rounded result is right."""
    for match in _EQUATION.finditer(text):
        before = text[max(0, match.start() - 8) : match.start()]
        if _CONTINUED.search(before) or _CONTINUES.match(text, match.end()):
            continue
        expression = re.sub(r"\\(times|cdot|div)", lambda m: "/" if m[1] == "div" else "*", match[1])
        expression = re.sub(r"[\s$\\,]", "", expression).translate(_SIGNS)
        claimed = Fraction(match[2].replace(",", ""))
        decimals = len(match[2].partition(".")[2])
        value = _sum(expression)
        right = value is not None and (value == claimed or (decimals > 0 and abs(value - claimed) * 2 * 10**decimals <= 1))
        yield Step(expression, match[2], right, match.start(2), match.end(), 0)


def _sum(expression: str) -> Fraction | None:
    """Evaluate numbers joined by + - * /; None for a division by zero."""
    numbers, signs = map(Fraction, re.split(r"[-+*/]", expression)), re.findall(r"[-+*/]", expression)
    terms: list[Fraction | None] = [next(numbers)]
    for sign, number in zip(signs, numbers, strict=True):
        if sign in "*/":
            terms[-1] = _compute(terms[-1], sign, number)
        else:
            terms.append(number if sign == "+" else -number)
    return None if None in terms else sum(terms)


def final_answers(text: str) -> list[tuple[int, int]]:
    """Return where each answer that a text gives starts and ends: from its marker to
    its closing brace, or to the end of its line.
    """
    found: list[tuple[int, int]] = []
    for match in _FINAL.finditer(text):
        limit = min(len(text), match.end() + _LONGEST_ANSWER)
        line = text.find("\n", match.end(), limit)
        end = (line if line >= 0 else limit) if not match[0].endswith("{") else _closing(text, match.end(), limit)
        if end is not None and not (found and match.start() < found[-1][1]):  # "the answer is \\boxed{18}" is one
            found.append((match.start(), end))
    return found if len(found) <= MOST_ANSWERS else [*found[: MOST_ANSWERS - 1], found[-1]]


def _closing(text: str, start: int, limit: int) -> int | None:
    depth = 1
    for i in range(start, limit):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i + 1
    return None


# --- by name ---

PARSERS: dict[str, Callable[..., Parser]] = {
    "chain": chain,
    "inverse_chain": inverse_chain,
    "countdown": countdown,
    "calculator": calculator,
    "reversal": reversal,
    "sorting": sorting,
    "lexical": lexical,
}


def make(
    name: str,  # a parser of this module, or your own as module:maker
    **kwargs,
) -> Parser:
    """Make a parser by name, or your own. A maker of your own returns a `Parser`, or a
    function `parse(text, task) -> Behaviour`, whose right steps are corrupted by one
    digit.

    Raises:
      ValueError: an unknown name or keyword, or something else than a parser.
    """
    made = call_with_section(find("parser of behaviour", name, PARSERS), kwargs, f"parser {name!r}")
    if isinstance(made, Parser):
        return made
    if not callable(made):
        raise ValueError(f"parser {name!r} made a {type(made).__name__}; allowed: a Parser, or a function parse(text, task)")

    def usable(text: str, task: Task, behaviour: Behaviour):
        return [(i, wrong) for i, step in enumerate(behaviour.steps) if step.right and (wrong := misread(step.claimed))]

    return Parser(made, usable, noticed_by(made))


def of_task(name: str, correct: Callable[[str, Task], bool] | None = None) -> Parser:
    """Make the parser of a task family; `lexical(correct)` for a family without its
    own.
    """
    return make(name) if name in PARSERS else lexical(correct)
