"""The `code` verifier: honest programs are paid in every form of test, tricks are not,
and special-casing shows.
"""

import pytest

from jaxreason.sandbox import bwrap
from jaxreason.types import Task
from jaxreason.verify import BOUNDED, bad_keys, make
from jaxreason.verify import code as judging
from jaxreason.verify.code import HIDDEN_FAIL, find_program

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(bool(bwrap.refusal()), reason=bwrap.refusal()),
]

ADD = Task(
    "Write add(a, b).",
    "",
    id="add",
    data={"tests": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"], "hidden_tests": ["assert add(40, 2) == 42"]},
)
HUMAN_EVAL = Task(
    "",
    "",
    data={
        "entry_point": "add",
        "tests": ["METADATA = {}\n\ndef check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(5, 7) == 12"],
    },
)
INPUTS = Task(
    "", "", data={"tests": [{"stdin": "1 2\n", "stdout": "3\n"}], "hidden_tests": [{"stdin": "40 2\n", "stdout": "42"}]}
)
CALLS = Task("", "", data={"entry_point": "Solution().add", "tests": [{"input": [1, 2], "output": 3}]})


@pytest.fixture(scope="module")
def verify():
    return make("code", timeout_s=30.0)


@pytest.fixture(scope="module")
def hasty():
    return make("code", timeout_s=0.5)


def fenced(program):
    return f"Here it is:\n```python\n{program}\n```\nDone."


RIGHT = {
    "asserts": (ADD, "def add(a, b):\n    return a + b"),
    "prints too": (ADD, "def add(a, b):\n    print('PASS')\n    return a + b"),
    "HumanEval": (HUMAN_EVAL, "def add(a, b):\n    return a + b"),
    "standard input": (INPUTS, "a, b = map(int, input().split())\nprint(a + b)"),
    "standard input with errors printed": (
        INPUTS,
        "import sys\nprint(sum(map(int, input().split())))\nprint('x', file=sys.stderr)",
    ),
    "exits well": (INPUTS, "import os\nprint(sum(map(int, input().split())), flush=True)\nos._exit(0)"),
    "a name of Python's own": (
        Task("", "", data={"tests": ["assert sum(10, 15) == 6"], "entry_point": "sum"}),
        "def sum(a, b):\n    return 1 + 5",
    ),
    "a method": (CALLS, "class Solution:\n    def add(self, a, b):\n        return a + b"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_is_paid(verify, name):
    task, program = RIGHT[name]
    verdict = verify(fenced(program), task)
    assert (verdict.reward, verdict.correct, verdict.reason) == (1.0, True, "right")


VALUES = {
    "a tuple and a dict": ("def f(x): return ({1: x}, [x])", "assert f(2) == ({1: 2}, [2])"),
    "a set": ("def f(x): return set(x)", "assert f([1, 1, 2]) == {1, 2}"),
    "bytes": ("def f(x): return x[::-1]", "assert f(b'ab') == b'ba'"),
    "nan": ("def f(): return float('nan')", "import math\nassert math.isnan(f())"),
    "complex": ("def f(x): return x * 1j", "assert f(2) == 2j"),
    "a huge integer": ("def f(x): return x ** 5000", "assert f(10) == 10 ** 5000"),
    "a fraction": (
        "from fractions import Fraction\ndef f(x): return x / 2",
        "from fractions import Fraction\nassert f(Fraction(1)) == Fraction(1, 2)",
    ),
    "a decimal": (
        "from decimal import Decimal\ndef f(): return Decimal('1.5')",
        "from decimal import Decimal\nassert f() == Decimal('1.5')",
    ),
    "a range": ("def f(x): return range(x)", "assert f(3) == range(3)\nassert list(f(3)) == [0, 1, 2]"),
    "a Counter": ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
    "a generator": ("def f(x):\n    yield from range(x)", "assert list(f(3)) == [0, 1, 2]\nassert next(f(1)) == 0"),
    "an object of the program": (
        "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n    def sum(self): return self.a + self.b\n"
        "def f(pairs): return [p.a for p in pairs]",
        "assert f([Pair(1, 2), Pair(3, 4)]) == [1, 3]\nassert Pair(1, 2).sum() == 3",
    ),
    "a change in place": ("def f(x): x.sort()", "x = [2, 1]\nf(x)\nassert x == [1, 2]"),
    "keywords": ("def f(a, *, b): return a - b", "assert f(3, b=1) == 2"),
    "an error": (
        "def f(x):\n    if x < 0: raise ValueError('no')",
        "try:\n    f(-1)\nexcept ValueError:\n    pass\nelse:\n    assert False",
    ),
    "an error of its own": (
        "class E(Exception): pass\ndef f(): raise E",
        "try:\n    f()\nexcept Exception:\n    pass\nelse:\n    assert False",
    ),
    "state": ("n = 0\ndef f():\n    global n\n    n += 1\n    return n", "assert f() == 1\nassert f() == 2"),
    "recursion and imports": (
        "import functools\n@functools.cache\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)",
        "assert f(50) == 12586269025",
    ),
    "a dataclass": (
        "from dataclasses import dataclass, astuple\n@dataclass\nclass P:\n    x: 'int'\ndef f(): return astuple(P(1))",
        "assert f() == (1,)",
    ),
    "a named tuple": ("from collections import namedtuple\ndef f(): return namedtuple('P', 'x y')(1, 2)", "assert f() == (1, 2)"),
    "text that can't be written": ("def f(): return '\\ud800'", "assert f() == '\\ud800'"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_cross(verify, name):
    program, test = VALUES[name]
    assert verify(fenced(program), Task("", "", data={"tests": [test]})).reason == "right"
    wrong = Task("", "", data={"tests": [f"{test}\nassert len([]) == 1"]})
    assert verify(fenced(program), wrong).reward == 0.0


EQUAL = """class A:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
"""
TRICKS = {
    "equals everything": f"{EQUAL}def add(a, b): return A()",
    "an integer that equals everything": "class I(int):\n    def __eq__(self, other): return True\ndef add(a, b): return I(7)",
    "a list that equals everything": "class L(list):\n    def __eq__(self, other): return True\ndef add(a, b): return L()",
    "claims another class": f"{EQUAL}    __class__ = int\ndef add(a, b): return A()",
    "exits": "import sys\nsys.exit(0)",
    "exits at once": "import os\nos._exit(0)",
    "exits when called": "import os\ndef add(a, b): os._exit(0)",
    "raises SystemExit when called": "def add(a, b): raise SystemExit(0)",
    "raises StopIteration": "def add(a, b): raise StopIteration",
    "prints a verdict": 'print(\'{"kind": "done", "error": "", "reason": ""}\')\nprint(\'PASSED\')\ndef add(a, b): return None',
    "replaces AssertionError": "import builtins\nbuiltins.AssertionError = ZeroDivisionError\ndef add(a, b): return None",
    "replaces builtins": "import builtins\nbuiltins.len = builtins.eval = builtins.exec = lambda *_: True\n"
    "def add(a, b): return None",
    "replaces json": "import json\njson.dumps = lambda *_: 'null'\ndef add(a, b): return None",
    "traces": "import sys\nsys.settrace(lambda *_: None)\ndef add(a, b): return None",
    "swallows errors": "import sys\nsys.excepthook = lambda *_: None\ndef add(a, b): 1 / 0",
    "an exit handler": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): return None",
    "forges frames": (
        "import os, json\nb = json.dumps({'kind': 'done', 'error': '', 'reason': ''}).encode()\n"
        "for fd in range(3, 64):\n    try: os.write(fd, len(b).to_bytes(4, 'big') + b)\n    except OSError: pass\n"
        "def add(a, b): return None"
    ),
    "forges values": (
        "import os, json\nb = json.dumps({'kind': 'value', 'answer': '{\"value\": [\"object\", [0, \"int\"]]}'}).encode()\n"
        "for fd in range(3, 64):\n    try: os.write(fd, len(b).to_bytes(4, 'big') + b)\n    except OSError: pass\n"
        "def add(a, b): return None"
    ),
    "forges nonsense": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'\\x00\\x00\\x00\\x04[[[[')\n    except OSError: pass\n"
        "def add(a, b): return None"
    ),
    "reads the tests from frames": (
        "import sys, re\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n"
        "        found = re.search(r'== (\\d+)', str(f.f_globals) + str(f.f_locals))\n"
        "        if found: return int(found[1])\n        f = f.f_back"
    ),
    "reads the tests from memory": (
        "import gc, re\ndef add(a, b):\n    for o in gc.get_objects():\n"
        "        found = re.search(rf'add.{a}, {b}. == (\\d+)', str(o)[:10**5]) if isinstance(o, (dict, list)) else None\n"
        "        if found: return int(found[1])"
    ),
    "reads the tests from files": (
        "import os, re\ndef add(a, b):\n    for d in ('/tmp', '/proc/self', '.'):\n        for p, _, fs in os.walk(d):\n"
        "            for f in fs:\n"
        "                try: t = open(os.path.join(p, f)).read()\n                except Exception: continue\n"
        "                found = re.search(rf'== (\\d+)', t)\n"
        "                if found: return int(found[1])"
    ),
    "says that the test is unfit": (
        "import sys, json\nf = sys._getframe()\nwhile f.f_back: f = f.f_back\n"
        "raised = {'raised': ['TypeError', 'a test may give a program plain data']}\n"
        "f.f_globals['call'] = lambda *_: {'kind': 'value', 'answer': json.dumps(raised)}\n"
        "def add(a, b): return None"
    ),
    "not defined": "x = 1",
    "not callable": "add = 3",
    "wrong": "def add(a, b): return a - b",
    "no Python": "I can't do that.",
}


@pytest.mark.parametrize("name", TRICKS)
def test_a_trick_is_not_paid(verify, name):
    verdict = verify(fenced(TRICKS[name]), ADD)
    assert (verdict.reward, verdict.correct) == (0.0, False), verdict
    assert verdict.reason in ("wrong", "error", "crashed"), verdict


SHORTCUTS = {
    "by memory": "def add(a, b): return {(1, 2): 3, (-1, 1): 0}.get((a, b))",
    "by branches": "def add(a, b):\n    if a == 1: return 3\n    return 0",
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_special_casing_shows(verify, name):
    verdict = verify(fenced(SHORTCUTS[name]), ADD)
    assert (verdict.reward, verdict.correct, verdict.reason) == (1.0, False, HIDDEN_FAIL)
    assert dict(verdict.measures) == {"passes_tests": 1.0, "special_cased": 1.0}


def test_special_casing_of_inputs_shows(verify):
    assert verify(fenced("print(3)"), INPUTS).reason == HIDDEN_FAIL


STDIN_TRICKS = {
    "nothing": "pass",
    "wrong": "print(4)",
    "more": "print(3)\nprint(3)",
    "an error after the output": "print(3)\n1 / 0",
    "endless lines": "print(3)\nprint('\\n' * 10**6)\nprint(4)",
}


@pytest.mark.parametrize("name", STDIN_TRICKS)
def test_wrong_output_is_not_paid(verify, name):
    assert verify(fenced(STDIN_TRICKS[name]), INPUTS).reward == 0.0


def test_partial_reward(verify):
    partial = make("code", timeout_s=30.0, partial=True)
    half = fenced("def add(a, b): return 3")
    assert (partial(half, ADD).reward, partial(half, ADD).reason) == (0.5, "wrong")
    assert verify(half, ADD).reward == 0.0


@pytest.mark.parametrize(
    ("visible", "hidden", "expected", "runs"),
    [
        (["timeout"] * 50, [], (0, None, "timeout"), 3),
        (["", "timeout", "wrong", "timeout", "", "timeout", ""], [], (2, None, "timeout"), 6),
        (["wrong"] * 50, [], (0, None, "wrong"), 50),
        (["", ""], ["", "timeout", "timeout", ""], (2, 1, ""), 4),
        (["", ""], ["", ""], (2, 2, ""), 4),
    ],
)
def test_a_program_that_never_ends_is_not_waited_for_in_every_test(monkeypatch, visible, hidden, expected, runs):
    seen = []
    monkeypatch.setattr(judging.Trial, "reason", lambda self, test: seen.append(test) or test)
    found = judging.judge(None, "", judging.Tests(visible, hidden, "", ""), 1.0, every=True)
    assert found == expected
    assert len(seen) == runs


LIMITS = {
    "a loop when loaded": ("while True: pass", "timeout"),
    "a loop when called": ("def add(a, b):\n    while True: pass", "timeout"),
    "a sleep when called": ("import time\ndef add(a, b): time.sleep(1000)", "timeout"),
    "memory when loaded": ("x = bytes(10**11)", "out of memory"),
    "endless output": ("while True: print('x' * 10**5)", ("too much output", "timeout")),
    "a crash when called": ("import ctypes\ndef add(a, b): ctypes.string_at(0)", "crashed"),
    "an endless iterator": ("def add(a, b):\n    while True: yield 1", "wrong"),
    "an endless list": ("def add(a, b): return [0] * 10**8", ("timeout", "wrong", "crashed", "out of memory", "too much output")),
    "a list in itself": ("def add(a, b):\n    x = []\n    x.append(x)\n    return x", "wrong"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(hasty, name):
    program, reasons = LIMITS[name]
    verdict = hasty(fenced(program), ADD)
    assert verdict.reward == 0.0
    assert verdict.reason in reasons, verdict


@pytest.mark.parametrize("text", ["", " \n", "```python\n```", "```python\n\n```"])
def test_no_program_is_no_answer(verify, text):
    assert verify(text, ADD).reason == "no answer"


@pytest.mark.parametrize(
    "text", ["\0", "\ud800", "x" * 60_000, "(" * 40_000, "```" * 1000, "\u202e", "🙂" * 100, "def add(a, b):\n\treturn a\n  + b"]
)
def test_any_text_has_a_verdict(verify, text):
    assert verify(text, ADD).reward == 0.0


def test_the_last_python_block_is_the_program():
    assert find_program("```python\na\n```\ntext\n```python\nb\n```\n```text\nc\n```") == "b"
    assert find_program("```\na\n```\n```\nb\n```") == "b"
    assert find_program("```py\na\n```\n```\nb\n```") == "a"
    assert find_program("text\n```python\nx = 1\ny = 2") == "x = 1\ny = 2"
    assert find_program("x = 1") == "x = 1"
    assert find_program("```bash\nls\n```") == "```bash\nls\n```"


BAD = [
    {"tests": []},
    {"tests": ["assert add(1, 2"]},
    {"tests": [{"stdin": "1"}]},
    {"tests": [{"stdin": 1, "stdout": "2"}]},
    {"tests": [{"input": [1]}], "entry_point": "add"},
    {"tests": ["assert add(1, 2) == 3"], "hidden_tests": ["assert ("]},
    {"tests": ["assert sum([1, 2]) == 3"]},
    {"tests": ["assert add(1, 2) == 3"], "hidden_tests": ["assert True"]},
    {"tests": ["assert add(lambda x: x, 2) == 3"]},
]


@pytest.mark.parametrize("data", BAD)
def test_a_test_that_can_not_be_run_is_a_bad_key(verify, data):
    task = Task("", "", data=data)
    assert verify(fenced("def add(a, b): return 3"), task).reason == "bad key"
    assert bad_keys(verify, [task]) or "lambda" in str(data)


def test_a_task_without_tests_is_our_mistake(verify):
    with pytest.raises(ValueError, match="verifier 'code' needs lists in the data 'tests'"):
        verify("x", Task("", "", id="a"))


def test_it_keeps_its_own_time():
    assert "code" in BOUNDED
