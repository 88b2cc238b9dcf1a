"""Verifier of programs: it runs the tests of a task against the program in the answer.

Program and tests never share a process. The program is in one sandbox, which gets the
inputs alone. Expected outputs are compared here, and tests that are code run in another
sandbox, where the names of the program's functions stand for calls across. Only plain
data (numbers, text, lists, ...) comes back. So these tricks fail: to print a verdict,
to exit early, to replace `assert` or a builtin, to read the tests from a frame or a
file, or to return an object that equals everything.

Not prevented: a program that knows the inputs of the visible tests and answers only
those. So hidden tests are run too. They don't pay; `correct` says whether they passed.
The share of answers with a reward that are not correct is the rate of such programs
(or of visible tests that are too few). Neither is a program held that recognises an
input by other means, such as its length.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxreason import sandbox as sandboxes
from jaxreason.sandbox.inside import unbound
from jaxreason.types import Task, Verdict
from jaxreason.verify.exact import BAD_KEY, SHOWN, verdict

HIDDEN_FAIL = "hidden tests fail"
WALL = 4.0  # wall time per test, in multiples of its CPU time
MOST_TIMEOUTS = 3  # of one answer: a task with 100 tests would wait half an hour for a program that sleeps
LANGUAGES = ("python", "python3", "py")
UNFIT = "Unfit: "  # how `inside` says that a test can't be run across sandboxes
CHECK = re.compile(r"^def check\(", re.MULTILINE)  # of HumanEval


class Tests(NamedTuple):
    """The tests of a task, each a dictionary or the text of one."""

    visible: Sequence[Any]
    hidden: Sequence[Any]
    setup: str
    entry_point: str


class Outcome(NamedTuple):
    """Counts of tests that passed before judging ended; `reason` is that of the first
    that did not, or "". Hidden tests are not run (`hidden_passed` is None) unless all
    visible ones pass.
    """

    visible_passed: int
    hidden_passed: int | None
    reason: str


def code(
    sandbox: str = "bwrap",  # or "rlimits", which holds accidents but no attacker: see `sandbox.Sandbox`
    partial: bool = False,  # whether the reward is the share of visible tests that pass (after 3 timeouts none does); else 1 or 0
    timeout_s: float = 5.0,  # CPU time per test
    memory_mb: int = 512,  # address space per process
    packages: tuple[str, ...] = (),  # importable besides the standard library, such as numpy
    processes: int = 2,  # answers that are judged at the same time
    max_chars: int = 50_000,  # longest program that is run
) -> Callable[[str, Task], Verdict]:
    """Run the last fenced block of Python in the answer (the whole answer if there is
    none) against the tests of the task, in its `data`.

    `tests` pay, `hidden_tests` are reported. A test is one of: a text of Python that
    raises if the program is wrong (`assert f(1) == 2`, or HumanEval's `def
    check(candidate)` with `entry_point`); {"stdin": ..., "stdout": ...}, compared
    without white space at the ends of lines and of the output; {"input": [arguments],
    "output": value} of the function `entry_point` (`Solution().f` for a method), where
    tuples equal lists. `setup` is code that runs before each test that is a text.

    Tests can't give functions to the program, or share mutable values with it beyond a
    call: changes of its arguments come back, but not who else holds them.

    The verdict's measures are passes_tests and special_cased (it passes the visible
    tests and not the hidden ones), each 0 or 1.

    Reasons: right; hidden tests fail (all visible ones passed: rewarded, not correct);
    wrong; error (the program raised before any test); no answer; too long; timeout;
    out of memory; crashed; too much output; bad key (no visible test, or one that does
    not parse, can't be run so, or names nothing but Python's own functions while there
    is no `entry_point`).

    Raises:
      ValueError: the sandbox can't be had here, or the task has no `tests`.
    """
    if processes < 1 or max_chars < 1:
        raise ValueError(f"verifier 'code' got processes={processes}, max_chars={max_chars}; allowed: 1 or more")
    options = {"timeout_s": WALL * timeout_s, "memory_mb": memory_mb, "packages": tuple(packages)}
    shared = sandboxes.shared(sandbox, warm=2 * processes, **options)
    places = threading.BoundedSemaphore(processes)

    def verify(text: str, task: Task) -> Verdict:
        tests = tests_of(task)
        if not tests.visible or not all(parses(test, tests) for test in (*tests.visible, *tests.hidden)):
            return verdict(False, None, BAD_KEY)
        program = find_program(text)
        if not program.strip():
            return verdict(False, None, "no answer")
        if len(program) > max_chars:
            return verdict(False, program, "too long")
        with places:
            outcome = judge(shared, program, tests, timeout_s, every=partial)
        if outcome.reason == BAD_KEY:
            return verdict(False, None, BAD_KEY)
        passes = outcome.visible_passed == len(tests.visible)
        reward = outcome.visible_passed / len(tests.visible) if partial else float(passes)
        correct = passes and outcome.hidden_passed == len(tests.hidden)
        reason = "right" if correct else HIDDEN_FAIL if passes else outcome.reason
        # How often the tests that pay are passed by a program that the others refute.
        measures = {"passes_tests": float(passes), "special_cased": float(passes and not correct)}
        return Verdict(reward, correct, program[:SHOWN], reason, measures)

    return verify


def tests_of(task: Task) -> Tests:
    """Read the tests of a task.

    Raises:
      ValueError: it has none, or they are no lists.
    """
    data = task.data
    visible, hidden = data.get("tests"), data.get("hidden_tests", ())
    if not all(isinstance(some, list | tuple) for some in (visible, hidden)):
        raise ValueError(
            f"verifier 'code' needs lists in the data 'tests' and, if there are any, 'hidden_tests'; "
            f"task {task.id!r} has {sorted(data)}; the task 'programs' reads them from a file"
        )
    return Tests(visible, hidden, str(data.get("setup") or ""), str(data.get("entry_point") or ""))


def find_program(text: str) -> str:
    """Return the last fenced block of Python, else the last one of no language, else
    the whole text. A last fence may be left open.
    """
    found: dict[bool, str] = {}  # whether the language is named -> its last block
    language, block = None, []
    for line in [*text.split("\n"), "```"]:
        if not line.lstrip().startswith("```"):
            block.append(line)
        elif language is None:
            language, block = line.strip().strip("`").strip().lower(), []
        else:
            if language in ("", *LANGUAGES):
                found[bool(language)] = "\n".join(block)
            language = None
    return found.get(True, found.get(False, text))


def test_code(test: Any, tests: Tests) -> str | None:
    """Return the Python of a test; None for one of standard input and output."""
    if isinstance(test, str):
        called = f"\ncheck({tests.entry_point})" if tests.entry_point and CHECK.search(test) else ""
        return f"{tests.setup}\n{test}{called}"
    if "stdin" in test:
        return None
    arguments = ", ".join(repr(value) for value in test["input"])
    return f"assert as_lists({tests.entry_point}({arguments})) == as_lists({test['output']!r})"


def parses(test: Any, tests: Tests) -> bool:
    """Tell whether a test can be read, and asks the program: one that names Python's
    own functions alone, such as `assert sum([1, 2]) == 3`, would pay any program.
    """
    try:
        whole = test_code(test, tests)
        if whole is None:
            return isinstance(test["stdin"] + test["stdout"], str)
        return bool(unbound(ast.parse(whole)) or tests.entry_point)
    except (SyntaxError, ValueError, KeyError, TypeError, RecursionError, MemoryError):
        return False


def judge(sandbox: sandboxes.Sandbox, program: str, tests: Tests, timeout_s: float, every: bool = False) -> Outcome:
    """Run the visible tests, to the first that fails; with `every` all of them, but
    after `MOST_TIMEOUTS` that ran out of time the rest fail too. Then, if all passed,
    run the hidden ones to the first that fails.
    """
    with contextlib.closing(Trial(sandbox, program, tests, timeout_s)) as trial:
        reasons = []
        for test in tests.visible:
            reasons.append(trial.reason(test))
            if reasons[-1] and (not every or reasons.count("timeout") == MOST_TIMEOUTS):
                break
        failed = [reason for reason in reasons if reason]
        if failed:
            return Outcome(reasons.count(""), None, BAD_KEY if BAD_KEY in failed else failed[0])
        hidden = itertools.takewhile(lambda test: not trial.reason(test), tests.hidden)
        return Outcome(len(reasons), sum(1 for _ in hidden), "")


class Trial:
    """A program and the sandboxes of its tests, which start when first needed."""

    def __init__(self, sandbox: sandboxes.Sandbox, program: str, tests: Tests, timeout_s: float):
        self._sandbox, self._program, self._tests, self._timeout_s = sandbox, program, tests, timeout_s
        self._running: sandboxes.Session | None = None  # the program, for calls of its functions
        self._checker: sandboxes.Session | None = None
        self._raised = ""  # why the program can't be called

    def close(self) -> None:
        for session in (self._running, self._checker):
            if session is not None:
                session.close()

    def reason(self, test: Any) -> str:
        """Run a test; return why it fails, or ""."""
        whole = test_code(test, self._tests)
        return self._compare(test) if whole is None else self._check(whole)

    def _compare(self, test: dict[str, str]) -> str:
        self._checker = self._living(self._checker)
        self._checker.max_output = 2 * len(test["stdout"].encode(errors="replace")) + 10_000
        request = {"do": "run", "fork": True, "code": self._program, "stdin": test["stdin"], "quiet": True}
        result = self._checker.result({**request, "cpu_s": self._timeout_s})
        if result.reason:
            return result.reason
        return "" if lines(result.stdout) == lines(test["stdout"]) else "wrong"

    def _check(self, whole: str) -> str:
        if self._running is None or not self._running.alive:
            self._running = self._sandbox.session()
            request = {"do": "run", "fork": False, "echo": False, "code": self._program, "cpu_s": self._timeout_s}
            self._raised = self._running.result(request).reason
        if self._raised:
            return self._raised
        self._checker = self._living(self._checker)
        names = [self._tests.entry_point] if self._tests.entry_point.isidentifier() else []
        deadline = time.monotonic() + self._checker.timeout_s

        def across(question: dict) -> dict:
            left_s = max(0.0, deadline - time.monotonic())
            reply = self._running.ask({"do": "call", "call": question["call"], "cpu_s": self._timeout_s}, left_s)
            if not isinstance(reply.get("answer"), str):
                raise sandboxes.Lost("crashed")
            return {"answer": reply["answer"]}

        request = {"do": "check", "fork": True, "code": whole, "names": names, "cpu_s": self._timeout_s}
        result = self._checker.result(request, answer=across)
        if result.error.startswith(UNFIT):
            return BAD_KEY
        return "wrong" if result.reason == "error" else result.reason

    def _living(self, session: sandboxes.Session | None) -> sandboxes.Session:
        return session if session is not None and session.alive else self._sandbox.session()


def lines(text: str) -> list[str]:
    """Return the lines of an output without white space at their ends or its own."""
    return [line.rstrip() for line in text.strip().splitlines()]
