"""Comparisons of two evaluations, from synthetic folders."""

import inspect
import json

import numpy as np
import pytest

from jaxreason import estimators
from jaxreason.build.evaluation import attempted
from jaxreason.look import comparison
from jaxreason.look.comparison import compare, compare_folders, paired_interval, read_evaluations


def made(folder, verdicts, questions, **more):
    folder.mkdir()
    n = len(questions)
    entry = {
        "suite": "s",
        "temperature": 0.0,
        "thinking_tokens": None,
        "n": n,
        "samples": len(verdicts) // n,
        "verdicts": verdicts,
    }
    entry |= {"questions": questions, "prompts": "p"} | more
    (folder / "evaluation.json").write_text(json.dumps({"done": True, "evaluations": [entry]}))
    lines = [{"suite": "s", "temperature": 0.0, "thinking_tokens": None, "problem": i, "attempt": 0} for i in range(n)]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"suite": "s", "tem')
    return folder


def test_tasks_whose_rollouts_were_kept_come_first():
    kept = [(9, "a:1", "b:1"), (7, None, "b:2")]
    lines = comparison.places([(5, None, None), *reversed(kept)])
    assert lines == ["    problem 9 of B: a:1, b:1", "    problem 7 of B: not kept, b:2", "    and 1 more"]
    (line,) = comparison.places([(i, None, None) for i in range(comparison.SHOWN + 2)])
    assert line.startswith("    problems of B: 0, 1, ")
    assert " and 2 more (rollouts not kept" in line
    assert comparison.places([]) == []
    assert comparison.places([(3, "a:1", "b:1")]) == ["    problem 3 of B: a:1, b:1"]


def test_a_comparison_pairs_tasks(tmp_path):
    a = made(tmp_path / "a", "0011" * 30, [f"q{i}" for i in range(120)], prompts=["p"] * 120)
    b = made(tmp_path / "b", "0111" * 30, [f"q{i}" for i in range(120)])
    lines = "\n".join(compare_folders(a, b))
    assert "A 0.500, B 0.750, B - A +0.250" in lines
    assert "p 1.9e-09" in lines  # McNemar's: 2 * 0.5 ** 30
    assert "learned (solved more often in B): 30:" in lines
    assert f"problem 5 of B: {a}/rollouts.jsonl:6, {b}/rollouts.jsonl:6" in lines
    assert "and 22 more" in lines
    assert "lost (solved less often in B): 0" in lines
    # Other order, other number, other prompts: paired by question, and said.
    c = made(tmp_path / "c", "0101", ["q3", "q2", "q1", "new"], prompts=["other"] * 4)
    lines = "\n".join(compare_folders(a, c))
    assert "3 tasks are in both, of 120 in A and 4 in B" in lines
    assert "the prompts differ" in lines
    assert "A 0.667, B 0.333" in lines  # q3, q2, q1: 1 1 0 against 0 1 0


def test_a_question_that_comes_twice_is_paired_in_order(tmp_path):
    a = made(tmp_path / "a", "0110", ["q0", "q1", "q1", "q2"])
    b = made(tmp_path / "b", "0101", ["q0", "q1", "q1", "q2"])
    lines = "\n".join(compare_folders(a, b))
    assert "4 tasks: A 0.500, B 0.500" in lines
    assert "learned (solved more often in B): 1:" in lines
    assert "lost (solved less often in B): 1:" in lines


def test_other_tasks_are_refused(tmp_path):
    a, b = made(tmp_path / "a", "01", ["q0", "q1"]), made(tmp_path / "b", "01", ["r0", "r1"])
    with pytest.raises(ValueError, match="no task that is in both"):
        compare_folders(a, b)
    c = made(tmp_path / "c", "01", ["q0", "q1"], temperature=1.0)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_folders(a, c)


def test_a_smaller_evaluation_has_no_other_prompts(tmp_path):
    a = made(tmp_path / "a", "0110", [f"q{i}" for i in range(4)], prompts=["p0", "p1", "p2", "p3"])
    b = made(tmp_path / "b", "01", ["q0", "q2"], prompts=["p0", "p2"])
    assert "prompts differ" not in "\n".join(compare_folders(a, b))
    c = made(tmp_path / "c", "01", ["q0", "q2"], prompts=["p0", "other"])
    assert "prompts differ" in "\n".join(compare_folders(a, c))
    # Earlier versions wrote one digest, which also differs if the number does.
    d = made(tmp_path / "d", "01", ["q0", "q1"], prompts="digest of two")
    e = made(tmp_path / "e", "0111", [f"q{i}" for i in range(4)], prompts="digest of four")
    assert "prompts differ" not in "\n".join([*compare_folders(d, e), *compare_folders(a, e)])


def test_equal_differences_have_an_interval_with_a_width(tmp_path):
    """Five tasks that both solve are no proof that the two are equal."""
    questions = [f"q{i}" for i in range(5)]
    a, b = made(tmp_path / "a", "11" * 5, questions), made(tmp_path / "b", "11" * 5, questions)
    one = compare(*(read_evaluations(folder)["s", 0.0, None] for folder in (a, b)))
    assert one.low == pytest.approx(-estimators.wilson(0, 5)[1]) == -one.high
    low, high, _ = paired_interval(np.zeros(2), np.ones(2), single=True)
    assert low < high == 1.0  # the posterior of two tasks alone ends below
    for n, difference in ((1, 0.5), (5, 1.0), (5, -1.0), (1000, 0.5)):
        low, high, _ = paired_interval(np.zeros(n), np.full(n, difference), single=False)
        assert -1 <= low <= difference <= high <= 1
        assert low < high
    assert (low, high) == pytest.approx((0.5, 0.5), abs=0.01)


def test_fewer_tasks_are_never_said_to_be_enough(tmp_path):
    """Two tasks, both learned, have no spread: two tasks seem to show it, and don't."""
    a, b = made(tmp_path / "a", "00", ["q0", "q1"]), made(tmp_path / "b", "11", ["q0", "q1"])
    lines = "\n".join(compare_folders(a, b))
    assert "B - A +1.000 [-" in lines
    assert "would show" not in lines


def test_settings_that_differ_are_named(tmp_path):
    a, b = made(tmp_path / "a", "01", ["q0", "q1"]), made(tmp_path / "b", "01", ["q0", "q1"])
    for folder, most, judge in ((a, 64, "exact"), (b, 512, "one\ntwo")):
        settings = {
            "n": most,
            "model": {"name": str(folder)},
            "sampler": {"max_tokens": most},
            "suites": {"s": {"verifier": judge}, str(most): {"name": "chain"}},
        }
        there = json.loads((folder / "evaluation.json").read_text())
        (folder / "evaluation.json").write_text(json.dumps(there | {"settings": settings}))
    notes = [line for line in compare_folders(a, b) if line.startswith("note: ")]
    assert notes == [
        "note: sampler.max_tokens is 64 in A, 512 in B",
        r"note: suites.s.verifier is 'exact' in A, 'one\ntwo' in B",
    ]


def test_a_comparison_knows_which_fields_of_a_suite_decide_its_tasks():
    assert set(comparison.ATTEMPTED) == set(inspect.signature(attempted).parameters)
