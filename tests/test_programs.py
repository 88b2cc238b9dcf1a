"""Programming problems with tests: the layouts of files, MBPP and HumanEval, and that
the verifier `code` can run them.
"""

import json

import pytest

from jaxreason import tasks, verify
from jaxreason.build.suites import read_suites
from jaxreason.build.tasks import check_keys
from jaxreason.types import Task

OWN = {
    "question": "Write f, which doubles.",
    "tests": ["assert f(2) == 4", {"input": [3], "output": 6}],
    "hidden_tests": ["assert f(-1) == -2"],
    "entry_point": "f",
    "solution": "def f(x):\n    return 2 * x",
}
MBPP = {
    "task_id": 1,
    "text": "Write a function to double a number.",
    "code": "def f(x):\r\n    return 2 * x",
    "test_list": ["assert f(2) == math.floor(4.5)", "assert f(0) == 0", "assert f(5) == 10"],
    "test_setup_code": "import math",
    "challenge_test_list": [],
}
SANITIZED = {
    "prompt": "Write a function to double a number.",
    "code": "def f(x):\n    return 2 * x",
    "test_imports": ["import math"],
    "test_list": ["assert f(2) == math.floor(4.5)"],
}
HUMANEVAL = {
    "task_id": "HumanEval/32",
    "prompt": "from typing import List\n\n\ndef poly(xs: list, x: float):\n    return xs[0] + xs[1] * x\n\n\n"
    'def root(xs: List[float]):\n    """ Find x where poly is 0. """\n',
    "entry_point": "root",
    "canonical_solution": "    return -xs[0] / xs[1]\n",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert poly([1, 2], candidate([1, 2])) == 0\n",
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("row", [OWN, MBPP, SANITIZED, HUMANEVAL], ids=["own", "mbpp", "sanitized", "humaneval"])
def test_the_reference_program_passes_and_an_empty_one_does_not(tmp_path, row):
    (task,) = tasks.load("programs", path=write(tmp_path / "a.jsonl", row))
    judge = verify.make("code", sandbox="rlimits")
    assert judge(f"So:\n```python\n{task.solution}\n```", task).reason == "right"
    wrong = judge("def f(x):\n    return x\n\n\ndef root(xs):\n    return 0.0", task)
    assert (wrong.reward, wrong.reason) == (0.0, "wrong")


def test_a_program_for_the_visible_tests_alone_is_paid_and_reported(tmp_path):
    judge = verify.make("code", sandbox="rlimits")
    for row, visible in ((OWN, None), (MBPP, 1)):
        (task,) = tasks.load("programs", path=write(tmp_path / "a.jsonl", row), visible=visible)
        verdict = judge("def f(x):\n    return {2: 4, 3: 6}.get(x)", task)
        assert (verdict.reward, verdict.correct, verdict.measures["special_cased"]) == (1.0, False, 1.0)
    assert task.question.endswith("tests:\nassert f(2) == math.floor(4.5)")  # and shows no hidden one


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "1"}, "got the fields question, answer; needed: question and tests; or text and test_list"),
        (OWN | {"tests": "assert f(2) == 4"}, "field 'tests' got 'assert f\\(2\\) == 4'; allowed: a list of tests"),
        (OWN | {"tests": []}, "field 'tests' is empty; allowed: one test or more"),
        (OWN | {"tests": [7]}, r"field 'tests' got \[7\]; allowed: a list of tests"),
        (OWN | {"hidden_test": []}, "unknown field 'hidden_test' \\(did you mean 'hidden_tests'"),
        (OWN | {"setup": ["import math"]}, r"field 'setup' got \['import math'\]; allowed: a text"),
        (OWN | {"question": " "}, "the question is empty"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"a.jsonl:2: {message}") as error:
        tasks.load("programs", path=write(tmp_path / "a.jsonl", OWN, row))
    assert "\n" not in str(error.value)


def test_files_are_split_by_the_question(tmp_path):
    path = write(tmp_path / "a.jsonl", *(OWN | {"question": f"q{i}"} for i in range(100)))
    train, test = (tasks.load("programs", path=path, split=split, held_out=0.3) for split in ("train", "test"))
    assert len(train) + len(test) == 100
    assert not {t.question for t in train} & {t.question for t in test}
    assert len(tasks.load("programs", path=path, limit=3)) == 3
    with pytest.raises(ValueError, match="visible got 0"):
        tasks.load("programs", path=path, visible=0)


def test_a_file_of_a_suite_of_programs_is_read_as_programs():
    section = read_suites("humaneval=my.jsonl", {})["humaneval"]
    assert (section["name"], section["path"], section["split"]) == ("programs", "my.jsonl", None)
    assert section["verifier"]["name"] == "code"


def test_any_file_may_bring_data_for_a_verifier(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": 1, "t": ["assert f() == 1"], "e": "f"})
    (task,) = tasks.load("jsonl", path=path, data={"tests": "t", "entry_point": "e"})
    assert task.data == {"tests": ("assert f() == 1",), "entry_point": "f"}
    with pytest.raises(ValueError, match=r"a.jsonl:1: unknown field 'tt'"):
        tasks.load("jsonl", path=path, data={"tests": "tt"})


@pytest.mark.parametrize(
    ("verifier", "row", "message"),
    [
        ("code", OWN | {"tests": ["assert ("]}, "the first is that of task 'a/1', which has no answer but tests"),
        ("number", OWN, "the first is that of task 'a/1', which has no answer but tests"),
    ],
)
def test_a_verifier_that_can_not_judge_a_program_is_named(tmp_path, verifier, row, message):
    items = tasks.load("programs", path=write(tmp_path / "a.jsonl", row))
    with pytest.raises(ValueError, match=f"can't judge 1 of 1 keys; {message}"):
        check_keys(items, {"name": verifier}, "source", print)


def test_a_task_without_tests_is_told_where_they_come_from():
    with pytest.raises(ValueError, match=r"task 'q/1' has \[\]; the task 'programs' reads them from a file"):
        verify.make("code", sandbox="rlimits")("def f(): pass", Task("q", "1", id="q/1"))
