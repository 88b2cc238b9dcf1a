"""Tasks made by rule: endless, exactly checkable, and split into train and test by
construction.

Each maker returns a lazy sequence of tasks. Item `index` is drawn from
`default_rng((seed, split, index))` and redrawn until the hash of its question falls in
its split, so no seed, size or demonstration style ever puts a question in both splits.
For an out-of-distribution test, use the same maker with `split="test"` and another
difficulty.

`demonstrations` chooses `Task.solution`: "none"; "human" (with guesses, short cuts and
slips, as people make them); "verified" (human ones redrawn until the answer is right);
"expert" (all steps, no slip). The question does not depend on it. All families use the
29 characters of `ALPHABET` and mark the answer by `A`: `7+5*3-2:` ->
`7+5=2*3=6-2=4;A4`.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from jaxreason.options import unknown_name_message
from jaxreason.tasks import splits
from jaxreason.types import Task

ALPHABET = "0123456789+-*/=:;,?()[]<>Any "  # 29 characters: with BOS, EOS and PAD a vocabulary of 32
DEMONSTRATIONS = ("none", "human", "verified", "expert")
HELD_OUT = 1 / 8  # fraction of the questions that are test
RENAMINGS = 100  # most choices of other numbers for a question
DRAWS = 1000  # most draws for a question of a split; with 1 in 8, all fail with probability 1e-58


class Question(NamedTuple):
    """A drawn problem. Equal questions have equal `canonical` texts; `parts` is input
    for the demonstrations.
    """

    text: str
    canonical: str
    answer: str
    parts: Any
    data: Mapping[str, Any] = {}


class Demonstration(NamedTuple):
    """A worked solution. `forced` lists the character spans that a tool wrote, which
    the loss must mask.
    """

    text: str
    right: bool = True
    forced: tuple[tuple[int, int], ...] = ()


class Dice:
    """Uniform random draws, made in blocks: a scalar draw from a NumPy generator takes
    microseconds, and a task needs dozens of them.
    """

    def __init__(self, *seed: int):
        self._rng = np.random.default_rng(seed)
        self._block: Iterator[float] = iter(())

    def chance(self, p: float) -> bool:
        return self._random() < p

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        """Draw from low to high, both included."""
        return low + self.below(high - low + 1)

    def pick(self, options: Sequence) -> Any:
        return options[self.below(len(options))]

    def weighted(self, options: Sequence, cumulative: Sequence[float]) -> Any:
        """Draw an option, given the running sums of the weights."""
        return options[min(bisect(cumulative, self._random() * cumulative[-1]), len(options) - 1)]

    def other(self, n: int, than: int) -> int:
        """Draw from 0..n-1, excluding `than`."""
        return (than + 1 + self.below(n - 1)) % n

    def shuffled(self, items: Sequence) -> list:
        return sorted(items, key=lambda _: self._random())

    def _random(self) -> float:
        for u in self._block:
            return u
        self._block = iter(self._rng.random(64).tolist())
        return next(self._block)


HARDEST = 10_000  # most operations, numbers or digits of a task
LARGEST = 10**8  # most tasks in a set, which keeps a list of them in memory


class Drawn(Sequence):
    """Tasks of one family and split, each made on first use and kept. `pair(index)` is
    a task and its twin: see `twins`.
    """

    def __init__(
        self,
        make: Callable[[int], Task],
        size: int,
        family: str,
        split: str,
        pair: Callable[[int], tuple[Task, Task]] | None = None,
    ):
        self._make, self.family, self.split, self.pair = make, family, split, pair
        self._tasks: list[Task | None] = [None] * size
        self[0]  # an impossible difficulty fails here, not in the middle of a run

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        task = self._tasks[index]
        if task is None:
            task = self._tasks[index] = self._make(index)
        return task


def are_disjoint(a: Sequence, b: Sequence) -> bool:
    """Tell whether two sequences are drawn from different splits of one family, so that
    they have no question in common.
    """
    return isinstance(a, Drawn) and isinstance(b, Drawn) and a.family == b.family and a.split != b.split


def chain(
    split: str = "train",  # train or test; no task is in both
    size: int = 20_000,  # number of tasks
    seed: int = 0,  # random seed of the tasks
    ops: int | tuple[int, int] = (2, 5),  # operations per task: a number, or (lowest, highest)
    ops_weights: Sequence[float] | None = None,  # weight of each number of operations; None: equal
    demonstrations: str = "none",  # worked solutions: none, human (slips, guesses), verified (right human ones) or expert
    slip: float = 0.12,  # human: probability of a wrong step
    guess: float = 0.5,  # human: probability of answering without work
    stop_early: float = 0.2,  # human: probability of answering with the value so far
    guess_right: float = 0.25,  # human: probability that a guess is right
) -> Sequence[Task]:
    """Make left-to-right arithmetic modulo 10: `7+5*3-2:` -> `7+5=2*3=6-2=4;A4`.

    A human guesses with probability `guess` (right in a fraction `guess_right` of
    guesses), stops part-way with probability `stop_early` and answers with the value so
    far, and otherwise works out all steps. Each step slips to a uniform digit with
    probability `slip`, and the next step continues from the wrong value.
    """
    _check_probabilities(slip=slip, guess=guess, stop_early=stop_early, guess_right=guess_right)
    draw_ops = _difficulty("ops", ops, ops_weights)

    def draw(dice: Dice) -> Question:
        return question_of(dice.below(10), _steps(dice, draw_ops(dice)))

    def question_of(first: int, steps: list[tuple[str, int]]) -> Question:
        text = f"{first}{_join(steps)}"
        return Question(text + ":", text, str(_run(first, steps)), (first, steps))

    def rename(names: Mapping[int, int], question: Question) -> Question:
        first, steps = question.parts
        return question_of(names[first], [(op, names[digit]) for op, digit in steps])

    def work(dice: Dice, question: Question, slip: float, stop: int | None = None) -> Demonstration:
        first, steps = question.parts
        trace, value = _trace(dice, first, steps[:stop], slip)
        return Demonstration(f"{trace};A{value}", str(value) == question.answer)

    def human(dice: Dice, question: Question) -> Demonstration:
        if dice.chance(guess):
            right = dice.chance(guess_right)
            value = question.answer if right else dice.other(10, int(question.answer))
            return Demonstration(f";A{value}", right)
        # Conditional on not guessing, so that `guess` and `stop_early` are fractions of
        # all demonstrations.
        if guess < 1 and dice.chance(stop_early / (1 - guess)):
            return work(dice, question, slip, stop=dice.between(1, len(question.parts[1])))
        return work(dice, question, slip)

    def expert(dice: Dice, question: Question) -> Demonstration:
        return work(dice, question, 0)

    return _tasks("chain", split, size, seed, demonstrations, draw, human, expert, rename)


def inverse_chain(
    split: str = "train",  # train or test; no task is in both
    size: int = 20_000,  # number of tasks
    seed: int = 0,  # random seed of the tasks
    ops: int | tuple[int, int] = 2,  # operations per task: a number, or (lowest, highest)
    ops_weights: Sequence[float] | None = None,  # weight of each number of operations; None: equal
    demonstrations: str = "none",  # worked solutions: none, human (slips, guesses), verified (right human ones) or expert
    max_answers: int = 2,  # most first digits that may solve a task
    lucky: float = 0.05,  # probability that an attempt uses a right digit; else a random one
    give_up: float = 0.45,  # human: probability of giving up after a failed attempt
    attempts: int = 4,  # human: most attempts per demonstration
    slip: float = 0.04,  # human: probability of a wrong step
    check_slip: float = 0.05,  # human: probability of a wrong check
) -> Sequence[Task]:
    """Make chains with a missing first digit, for trial and error: `?*7+5=2:` ->
    `3*7=1+5=6n4*7=8+5=3n1*7=7+5=2yA1`.

    `data["answers"]` lists every digit that solves the task, at most `max_answers`. A
    human tries an untried digit (a right one with probability `lucky`, else a random
    one). After a wrong attempt a human gives up with probability `give_up`, or when
    `attempts` are used up, and then answers with a guess. A step slips with probability
    `slip`, the y/n check with `check_slip`. An expert neither slips nor gives up.
    """
    _check_probabilities(lucky=lucky, give_up=give_up, slip=slip, check_slip=check_slip)
    draw_ops = _difficulty("ops", ops, ops_weights)

    def draw(dice: Dice) -> Question | None:
        steps = _steps(dice, draw_ops(dice))
        return question_of(dice.below(10), steps)

    def question_of(first: int, steps: list[tuple[str, int]]) -> Question | None:
        target = _run(first, steps)
        answers = tuple(str(x) for x in range(10) if _run(x, steps) == target)
        if len(answers) > max_answers:
            return None
        text = f"?{_join(steps)}={target}"
        return Question(text + ":", text, answers[0], (steps, target), {"answers": answers})

    def rename(names: Mapping[int, int], question: Question) -> Question | None:
        renamed = question_of(names[int(question.answer)], [(op, names[digit]) for op, digit in question.parts[0]])
        shared = renamed and {*renamed.data["answers"]} & {*question.data["answers"]}
        return None if shared else renamed

    def search(dice, question, attempts, lucky, give_up, slip, check_slip) -> Demonstration:
        steps, target = question.parts
        answers = question.data["answers"]
        untried, text = list("0123456789"), ""
        for attempt in range(attempts):
            good = [x for x in untried if x in answers]
            digit = dice.pick(good if good and dice.chance(lucky) else untried)
            untried.remove(digit)
            trace, value = _trace(dice, int(digit), steps, slip)
            says_yes = (value == target) != dice.chance(check_slip)
            text += trace + "ny"[says_yes]
            if says_yes:
                return Demonstration(f"{text}A{digit}", digit in answers)
            if attempt == attempts - 1 or dice.chance(give_up):
                break
        digit = dice.pick(untried or list("0123456789"))
        return Demonstration(f"{text}A{digit}", digit in answers)

    def human(dice: Dice, question: Question) -> Demonstration:
        return search(dice, question, _attempts(attempts, 10), lucky, give_up, slip, check_slip)

    def expert(dice: Dice, question: Question) -> Demonstration:
        return search(dice, question, 10, lucky, 0, 0, 0)

    return _tasks("inverse_chain", split, size, seed, demonstrations, draw, human, expert, rename)


def calculator(
    split: str = "train",  # train or test; no task is in both
    size: int = 20_000,  # number of tasks
    seed: int = 0,  # random seed of the tasks
    factor_digits: int | tuple[int, int] = 2,  # digits of each factor: a number, or (lowest, highest)
    addend_digits: int | tuple[int, int] = 3,  # digits of the addend: a number, or (lowest, highest)
    demonstrations: str = "none",  # worked solutions: none, human (slips, guesses), verified (right human ones) or expert
    use_tool: float = 0.25,  # human: probability of calling the calculator
    chain_calls: float = 0.4,  # human: probability of a second call, for the sum
    sum_right: float = 0.3,  # human: probability that a guessed sum is right
    guess_right: float = 0.4,  # human: probability that an answer without a call is right
) -> Sequence[Task]:
    """Make a product and a sum, hard without the tool: `47*83+512:` ->
    `[47*83=3901][3901+512=4413]A4413`.

    The model writes a call up to its `=`; the tool writes the result and the `]`.
    `data["forced"]` lists these spans of the solution. A human calls the tool with
    probability `use_tool`, then calls again for the sum with probability `chain_calls`,
    or else guesses the sum, right with probability `sum_right`. A human who does not
    call guesses the answer, right with probability `guess_right`. A wrong guess has one
    wrong digit.
    """
    _check_probabilities(use_tool=use_tool, chain_calls=chain_calls, sum_right=sum_right, guess_right=guess_right)
    draw_factor, draw_addend = _difficulty("factor_digits", factor_digits), _difficulty("addend_digits", addend_digits)

    def number(dice: Dice, digits: int) -> int:
        return dice.between(10 ** (digits - 1), 10**digits - 1)

    def draw(dice: Dice) -> Question:
        return question_of(number(dice, draw_factor(dice)), number(dice, draw_factor(dice)), number(dice, draw_addend(dice)))

    def question_of(a: int, b: int, c: int) -> Question:
        return Question(f"{a}*{b}+{c}:", f"{min(a, b)}*{max(a, b)}+{c}", str(a * b + c), (a, b, c))

    def rename(names: Mapping[int, int], question: Question) -> Question | None:
        renamed = ["".join(str(names[int(digit)]) for digit in str(part)) for part in question.parts]
        return None if any(part[0] == "0" for part in renamed) else question_of(*map(int, renamed))

    def call(text: str, expression: str, value: int) -> tuple[str, tuple[int, int]]:
        start = f"{text}[{expression}="
        done = f"{start}{value}]"
        return done, (len(start), len(done))

    def guess(dice: Dice, text: str, answer: str, p_right: float, forced=()) -> Demonstration:
        right = dice.chance(p_right)
        return Demonstration(f"{text}A{answer if right else _misremember(dice, answer)}", right, forced)

    def human(dice: Dice, question: Question) -> Demonstration:
        if not dice.chance(use_tool):
            return guess(dice, "", question.answer, guess_right)
        if dice.chance(chain_calls):
            return expert(dice, question)
        a, b, _ = question.parts
        text, forced = call("", f"{a}*{b}", a * b)
        return guess(dice, text, question.answer, sum_right, (forced,))

    def expert(dice: Dice, question: Question) -> Demonstration:
        a, b, c = question.parts
        text, first = call("", f"{a}*{b}", a * b)
        text, second = call(text, f"{a * b}+{c}", a * b + c)
        return Demonstration(f"{text}A{question.answer}", True, (first, second))

    return _tasks("calculator", split, size, seed, demonstrations, draw, human, expert, rename)


def countdown(
    split: str = "train",  # train or test; no task is in both
    size: int = 20_000,  # number of tasks
    seed: int = 0,  # random seed of the tasks
    numbers: int | tuple[int, int] = 3,  # how many numbers: one count, or (lowest, highest)
    max_number: int = 9,  # largest of the numbers
    max_target: int = 99,  # largest target
    demonstrations: str = "none",  # worked solutions: none, human (slips, guesses), verified (right human ones) or expert
    direct: float = 0.1,  # human: probability of answering without a search
    lucky: float = 0.25,  # probability that an attempt uses a solution; else a random expression
    give_up: float = 0.3,  # human: probability of giving up after a failed attempt
    attempts: int = 4,  # most attempts per demonstration
    slip: float = 0.04,  # human: probability of a wrong step
    check_slip: float = 0.05,  # human: probability of a wrong check
) -> Sequence[Task]:
    """Make "reach the target with each number once": `3,7,5=26:` ->
    `7-5=2,2*3=6n3*7=21,21+5=26yA3*7+5`.

    An attempt consists of its steps, joined by commas, then `n` or `y`. `data` has
    `numbers` and `target`. A solution exists by construction, and `Task.answer` is one;
    all its values are whole numbers >= 0. A human answers without a search with
    probability `direct`; the rest is as in `inverse_chain`, but an attempt may be
    repeated. The expert's last attempt succeeds.
    """
    _check_probabilities(direct=direct, lucky=lucky, give_up=give_up, slip=slip, check_slip=check_slip)
    draw_count = _difficulty("numbers", numbers)
    if max_number < 1 or max_target < 1:
        raise ValueError(f"countdown got max_number={max_number}, max_target={max_target}; allowed: 1 or more")

    def draw(dice: Dice) -> Question | None:
        pool = tuple(dice.between(1, max_number) for _ in range(draw_count(dice)))
        return question_of(pool, _combine(dice, pool))

    def question_of(pool: tuple[int, ...], tree) -> Question | None:
        target = _value(tree)
        if not 1 <= target <= max_target or (target in pool and len(pool) > 1):
            return None
        canonical = f"{','.join(map(str, sorted(pool)))}={target}"
        text = f"{','.join(map(str, pool))}={target}:"
        return Question(text, canonical, _expression(tree), (pool, target, tree), {"numbers": pool, "target": target})

    def rename(names: Mapping[int, int], question: Question) -> Question | None:
        pool, _, tree = question.parts
        renamed = _renamed(tree, names)
        return question_of(tuple(names[number] for number in pool), renamed) if _is_whole(renamed) else None

    def search(dice, question, attempts, lucky, give_up, slip, check_slip, must_solve) -> Demonstration:
        pool, target, solution = question.parts
        text = ""
        for attempt in range(attempts):
            last = attempt == attempts - 1
            tree = solution if (last and must_solve) or dice.chance(lucky) else _combine(dice, pool)
            steps, value = _work(dice, tree, slip)
            says_yes = (value == target) != dice.chance(check_slip)
            text += ",".join(steps) + "ny"[says_yes]
            if says_yes:
                return Demonstration(f"{text}A{_expression(tree)}", _value(tree) == target)
            if last or dice.chance(give_up):
                break
        return answer_blind(dice, question, text)

    def answer_blind(dice: Dice, question: Question, text: str = "") -> Demonstration:
        pool, target, _ = question.parts
        tree = _combine(dice, pool)
        return Demonstration(f"{text}A{_expression(tree)}", _value(tree) == target)

    def human(dice: Dice, question: Question) -> Demonstration:
        if dice.chance(direct):
            return answer_blind(dice, question)
        return search(dice, question, _attempts(attempts), lucky, give_up, slip, check_slip, must_solve=False)

    def expert(dice: Dice, question: Question) -> Demonstration:
        return search(dice, question, _attempts(attempts), lucky, 0, 0, 0, must_solve=True)

    return _tasks("countdown", split, size, seed, demonstrations, draw, human, expert, rename, range(1, max_number + 1))


def reversal(
    split: str = "train",  # train or test; no task is in both
    size: int = 20_000,  # number of tasks
    seed: int = 0,  # random seed of the tasks
    length: int | tuple[int, int] = (3, 6),  # digits per task: a number, or (lowest, highest)
    demonstrations: str = "none",  # worked solutions: none, human (slips, guesses), verified (right human ones) or expert
    slip: float = 0.05,  # human: probability of moving a random digit
    guess: float = 0.3,  # human: probability of answering with a random order
) -> Sequence[Task]:
    """Make digit strings to reverse: `<407:` -> `40,7;4,70;,704;A704`. Each step shows
    the digits left and the digits done.
    """
    return _rearrange("reversal", "<", lambda rest: len(rest) - 1, split, size, seed, length, demonstrations, slip, guess)


def sorting(
    split: str = "train",  # train or test; no task is in both
    size: int = 20_000,  # number of tasks
    seed: int = 0,  # random seed of the tasks
    length: int | tuple[int, int] = (3, 6),  # digits per task: a number, or (lowest, highest)
    demonstrations: str = "none",  # worked solutions: none, human (slips, guesses), verified (right human ones) or expert
    slip: float = 0.05,  # human: probability of moving a random digit
    guess: float = 0.3,  # human: probability of answering with a random order
) -> Sequence[Task]:
    """Make digit strings to sort in ascending order: `>407:` -> `47,0;7,04;,047;A047`.
    Each step shows the digits left and the digits done.
    """
    return _rearrange("sorting", ">", lambda rest: rest.index(min(rest)), split, size, seed, length, demonstrations, slip, guess)


def _rearrange(name, sign, choose, split, size, seed, length, demonstrations, slip, guess) -> Sequence[Task]:
    """Make tasks that move one digit at a time from the rest to the result. A human
    moves a random digit with probability `slip`, and with probability `guess` answers
    any order.
    """
    _check_probabilities(slip=slip, guess=guess)
    draw_length = _difficulty("length", length)

    def work(dice: Dice, digits: str, slip: float) -> tuple[str, str]:
        rest, done, text = digits, "", ""
        while rest:
            at = dice.below(len(rest)) if slip and dice.chance(slip) else choose(rest)
            rest, done = rest[:at] + rest[at + 1 :], done + rest[at]
            text += f"{rest},{done};"
        return text, done

    def draw(dice: Dice) -> Question:
        return question_of(dice, "".join(str(dice.below(10)) for _ in range(draw_length(dice))))

    def question_of(dice: Dice, digits: str) -> Question:
        return Question(f"{sign}{digits}:", sign + digits, work(dice, digits, 0)[1], digits)

    def rename(names: Mapping[int, int], question: Question) -> Question:
        return question_of(Dice(0), "".join(str(names[int(digit)]) for digit in question.parts))

    def human(dice: Dice, question: Question) -> Demonstration:
        if dice.chance(guess):
            text, done = "", "".join(dice.shuffled(question.parts))
        else:
            text, done = work(dice, question.parts, slip)
        return Demonstration(f"{text}A{done}", done == question.answer)

    def expert(dice: Dice, question: Question) -> Demonstration:
        text, done = work(dice, question.parts, 0)
        return Demonstration(f"{text}A{done}")

    return _tasks(name, split, size, seed, demonstrations, draw, human, expert, rename)


def _tasks(
    name, split, size, seed, demonstrations, draw, human, expert, rename, numbers: Sequence[int] = range(10)
) -> Sequence[Task]:
    """Build the sequence of a family from four functions: `draw` makes a question
    (None: draw again), `human` and `expert` make its demonstrations, `rename` the
    question with another number for each of `numbers` (None: choose others).
    """
    if split not in splits.SPLITS:
        raise ValueError(unknown_name_message(f"split of task {name!r}", split, splits.SPLITS))
    if demonstrations not in DEMONSTRATIONS:
        raise ValueError(unknown_name_message("demonstrations", demonstrations, DEMONSTRATIONS))
    if not 1 <= size <= LARGEST or seed < 0:
        raise ValueError(f"task {name!r} got size={size}, seed={seed}; allowed: size from 1 to {LARGEST:,}, seed >= 0")
    number = splits.SPLITS.index(split)

    def drawn(dice: Dice) -> Question:
        for _ in range(DRAWS):
            question = draw(dice)
            if question is not None and splits.split_of(f"{name} {question.canonical}", HELD_OUT) == split:
                return question
        raise ValueError(
            f"task {name!r}: no {split} question in {DRAWS} draws; too few distinct questions at this difficulty, make it wider"
        )

    def demonstrate(dice: Dice, question: Question) -> Demonstration:
        if demonstrations == "none":
            return Demonstration("")
        if demonstrations == "expert":
            return expert(dice, question)
        for _ in range(DRAWS):
            demonstration = human(dice, question)
            if demonstration.right or demonstrations == "human":
                return demonstration
        raise ValueError(f"task {name!r}: no right demonstration in {DRAWS} draws; make slips rarer or guesses better")

    def make(index: int) -> Task:
        dice = Dice(seed, number, index)
        question = drawn(dice)
        text, _, forced = demonstrate(dice, question)
        data = {**question.data, "forced": forced} if forced else question.data
        return Task(question.text, question.answer, text, f"{name}/{split}/{seed}/{index}", data)

    def twin_of(dice: Dice, question: Question) -> Question | None:
        for tries in range(RENAMINGS):
            # 0 and 1 make problems easy, so they keep their names if possible.
            fixed = [n for n in numbers if n < 2] if tries < RENAMINGS // 2 else []
            moved = [n for n in numbers if n not in fixed]
            names = dict(zip([*fixed, *moved], [*fixed, *dice.shuffled(moved)], strict=True))
            found = rename(names, question)
            differs = found is not None and found.answer != question.answer and found.canonical != question.canonical
            if differs and splits.split_of(f"{name} {found.canonical}", HELD_OUT) == split:
                return found
        return None

    def pair(index: int) -> tuple[Task, Task]:
        dice, id = Dice(seed, number, index), f"{name}/{split}/{seed}/{index}"
        for _ in range(DRAWS):
            question = drawn(dice)
            twin = twin_of(dice, question)
            if twin is not None:
                original = Task(question.text, question.answer, "", id, question.data)
                return original, Task(twin.text, twin.answer, "", f"{id}/twin", {**twin.data, "twin_of": id})
        raise ValueError(f"task {name!r}: no {split} question in {DRAWS} draws whose numbers can be renamed; make it wider")

    return Drawn(make, size, name, split, pair)


def _difficulty(name: str, value: int | Sequence[int], weights: Sequence[float] | None = None) -> Callable[[Dice], int]:
    """Return a function that draws a difficulty, given as a number or as (lowest,
    highest); uniform unless `weights` are given.
    """
    try:
        low, high = (value, value) if isinstance(value, int) else map(operator.index, value)
    except (TypeError, ValueError):
        low, high = 0, 0
    if not 1 <= low <= high <= HARDEST:
        raise ValueError(f"{name} got {value!r}; allowed: a whole number from 1 to {HARDEST:,}, or a pair (lowest, highest)")
    if weights is None:
        return lambda dice: dice.between(low, high)
    if len(weights) != high - low + 1 or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(
            f"{name}_weights got {tuple(weights)!r}; allowed: {high - low + 1} weights >= 0 for {name} {low}..{high}"
        )
    options, cumulative = range(low, high + 1), list(accumulate(weights))
    return lambda dice: dice.weighted(options, cumulative)


def _check_probabilities(**probabilities: float) -> None:
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} got {value}; allowed: 0 to 1")


def _attempts(attempts: int, most: int | None = None) -> int:
    if attempts < 1:
        raise ValueError(f"attempts got {attempts}; allowed: 1 or more")
    return attempts if most is None else min(attempts, most)


def _apply(op: str, a: int, b: int) -> int:
    return a + b if op == "+" else a - b if op == "-" else a * b


def _steps(dice: Dice, count: int) -> list[tuple[str, int]]:
    return [(dice.pick("++--*"), dice.below(10)) for _ in range(count)]  # probabilities: + 0.4, - 0.4, * 0.2


def _join(steps: list[tuple[str, int]]) -> str:
    return "".join(f"{op}{digit}" for op, digit in steps)


def _run(value: int, steps: list[tuple[str, int]]) -> int:
    for op, digit in steps:
        value = _apply(op, value, digit) % 10
    return value


def _trace(dice: Dice, value: int, steps: list[tuple[str, int]], slip: float) -> tuple[str, int]:
    """Write the chain with `=value` after each step, and return it with the last value:
    `7+5=2*3=6`.
    """
    text = str(value)
    for op, digit in steps:
        value = _apply(op, value, digit) % 10
        if slip and dice.chance(slip):
            value = dice.below(10)
        text += f"{op}{digit}={value}"
    return text, value


def _misremember(dice: Dice, number: str) -> str:
    """Change one digit, so that the number is wrong and has the same number of
    digits.
    """
    at, digit = dice.below(len(number)), 0
    while (digit == 0 and at == 0) or str(digit) == number[at]:
        digit = dice.below(10)
    return f"{number[:at]}{digit}{number[at + 1 :]}"


# A countdown expression is a number or (left, op, right).


def _combine(dice: Dice, pool: Sequence[int]):
    """Join all numbers into a random expression whose intermediate values are whole and
    >= 0.
    """
    items: list = [(number, number) for number in pool]  # (expression, value)
    while len(items) > 1:
        (left, a), (right, b) = (items.pop(dice.below(len(items))) for _ in range(2))
        op = dice.pick([op for op in "+-*/" if op in "+*" or (op == "-" and a >= b) or (op == "/" and b and a % b == 0)])
        items.append(((left, op, right), a // b if op == "/" else _apply(op, a, b)))
    return items[0][0]


def _renamed(tree, names: Mapping[int, int]):
    """Return an expression with its numbers renamed."""
    return names[tree] if isinstance(tree, int) else (_renamed(tree[0], names), tree[1], _renamed(tree[2], names))


def _is_whole(tree) -> bool:
    """Tell whether all values of an expression are whole numbers >= 0."""
    if isinstance(tree, int):
        return True
    left, op, right = tree
    if not (_is_whole(left) and _is_whole(right)):
        return False
    a, b = _value(left), _value(right)
    return a >= b if op == "-" else bool(b) and a % b == 0 if op == "/" else True


def _value(tree) -> int:
    if isinstance(tree, int):
        return tree
    left, op, right = tree
    return _value(left) // _value(right) if op == "/" else _apply(op, _value(left), _value(right))


def _expression(tree, outer: str = "", on_right: bool = False) -> str:
    """Write an expression with no more parentheses than it needs."""
    if isinstance(tree, int):
        return str(tree)
    left, op, right = tree
    text = f"{_expression(left, op)}{op}{_expression(right, op, True)}"
    looser = outer in ("*", "/") and op in "+-"
    return f"({text})" if outer and (looser or (on_right and (outer == "/" or (outer == "-" and op in "+-")))) else text


def _work(dice: Dice, tree, slip: float) -> tuple[list[str], int]:
    """Work an expression out step by step, inner ones first. After a slip the wrong
    value is used.
    """
    if isinstance(tree, int):
        return [], tree
    left, op, right = tree
    (before, a), (then, b) = _work(dice, left, slip), _work(dice, right, slip)
    value = max(_apply(op, a, b), 0) if op != "/" else a // b if b else 0  # out of range only after a slip
    if slip and dice.chance(slip):
        value = dice.below(10) if value < 10 else int(_misremember(dice, str(value)))
    return [*before, *then, f"{a}{op}{b}={value}"], value
