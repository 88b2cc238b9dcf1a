"""Twins of procedural tasks: the same problem with its numbers renamed, and the rate at
which only the original is solved.
"""

import re

import numpy as np
import pytest
from runs import SMOKE

from jaxreason import estimators, tasks
from jaxreason.build.suites import SUITES
from jaxreason.evaluation import Suite, measure_twins, outcome_of, summarise
from jaxreason.options import command
from jaxreason.tasks import procedural, splits, twins
from jaxreason.types import Prompted
from jaxreason.verify import make

FAMILIES = [{"name": name} for name in twins.PROCEDURAL] + [
    {"name": "countdown", "numbers": 4, "max_number": 30},
    {"name": "chain", "ops": 1},
]
JUDGES = {"countdown": make("countdown", marker="")}


def ids(of):
    return "-".join(map(str, of.values()))


@pytest.mark.parametrize("of", FAMILIES, ids=ids)
def test_a_twin_is_the_same_problem_with_other_numbers(of):
    made = tasks.load("twins", of=of, size=120, seed=3)
    judge = JUDGES.get(of["name"], make("exact"))
    assert len(made) == 120
    renamed = []
    for original, twin in zip(made[::2], made[1::2], strict=True):
        assert twin.data["twin_of"] == original.id
        assert twin.id == f"{original.id}/twin"
        assert "twin_of" not in original.data
        assert re.sub("[0-9]+", "n", original.question).split("=")[0] == re.sub("[0-9]+", "n", twin.question).split("=")[0]
        assert judge(original.answer, original).correct
        assert judge(twin.answer, twin).correct
        assert not judge(original.answer, twin).correct  # remembering the original's answer earns nothing
        renamed.append(original.question != twin.question)
    assert all(renamed)
    assert list(tasks.load("twins", of=of, size=120, seed=3)) == list(made)


def test_twins_are_of_the_split_of_their_originals():
    for split in splits.SPLITS:
        made = tasks.load("twins", of={"name": "chain"}, split=split, size=60)
        for task in made:
            assert splits.split_of(f"chain {task.question[:-1]}", procedural.HELD_OUT) == split
    assert procedural.are_disjoint(tasks.load("chain", size=5), tasks.load("twins", of={"name": "chain"}, size=4))
    assert not procedural.are_disjoint(tasks.load("chain", size=5, split="test"), made)


def test_easy_numbers_keep_their_names_where_possible():
    """Times 0 ends a chain, so a twin with another 0 would be easier or harder."""
    made = tasks.load("twins", of={"name": "chain", "ops": 5}, size=200)
    same = [
        re.sub("[2-9]", "n", a.question) == re.sub("[2-9]", "n", b.question) for a, b in zip(made[::2], made[1::2], strict=True)
    ]
    assert np.mean(same) > 0.9


@pytest.mark.parametrize(
    ("of", "words"),
    [
        ({"name": "gsm8k"}, "task 'twins' got of='gsm8k'; allowed: calculator, chain"),
        ({"name": "twins", "of": {"name": "chain"}}, "task 'twins' got of='twins'"),
        ({}, "allowed: a section with a name"),
        ({"name": "chain", "size": 4}, "task 'twins' got 'size' in of; allowed: beside of"),
        ("chain", "allowed: a section with a name"),
        ({"name": "chain", "opps": 1}, "unknown field of task 'chain' 'opps' (did you mean 'ops'?)"),
    ],
)
def test_errors_are_one_line(of, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        tasks.load("twins", of=of)
    assert "\n" not in str(error.value)


def test_a_question_without_a_twin_is_left_out(monkeypatch):
    questions = [task.question for task in tasks.load("twins", of={"name": "chain", "ops": 1}, size=400)]
    assert not [q for q in questions if q[0] == q[2] and q[1] == "-"]  # 6-6 is 0 whatever the numbers
    monkeypatch.setattr(procedural, "RENAMINGS", 0)
    with pytest.raises(ValueError, match="no test question in 1000 draws whose numbers can be renamed"):
        tasks.load("twins", of={"name": "chain"})


# --- the measured rate ---


def evaluated(made, policy, samples=1):
    """Evaluate a policy (task, attempt) -> text with the real verifier."""
    suite = Suite("twins", [Prompted(task, np.zeros(1, np.int32)) for task in made], None)
    verify = make("exact")

    def outcome(task, attempt):
        text = policy(task, attempt)
        found = verify(text, task)
        record = {"correct": found.correct, "parsed": text, "reason": found.reason, "stop": "eos", "length": 1, "logp_sum": 0.0}
        return outcome_of(record)

    outcomes_NK = [[outcome(task, k) for k in range(samples)] for task in made]
    return summarise(outcomes_NK, suite, 1.0, phase="rl", step=0).measures


def test_a_policy_that_memorises_is_measured():
    made = tasks.load("twins", of={"name": "chain", "ops": 5}, size=100)
    known = {task.question: task.answer for task in made[::2]}
    found = evaluated(made, lambda task, _: known.get(task.question, "n"))
    assert (found["twin_pairs"], found["original_accuracy"], found["twin_accuracy"]) == (50, 1.0, 0.0)
    assert (found["hack_rate"], found["hack_gap"]) == (1.0, 1.0)
    assert (found["hack_rate_low"], found["hack_rate_high"]) == pytest.approx(estimators.wilson(50, 50))
    assert found["hack_gap_low"] > 0.8


def test_a_policy_that_calculates_has_no_rate_and_one_that_guesses_no_gap():
    made = tasks.load("twins", of={"name": "chain", "ops": 5}, size=400)
    right = evaluated(made, lambda task, _: task.answer)
    assert (right["hack_rate"], right["hack_gap"], right["twin_accuracy"]) == (0.0, 0.0, 1.0)
    rng = np.random.default_rng(0)
    for samples in (1, 4):
        guess = evaluated(made, lambda task, _: task.answer if rng.random() < 0.5 else "n", samples)
        assert 0.15 < guess["hack_rate"] < 0.35
        assert guess["hack_gap_low"] < 0 < guess["hack_gap_high"]


def test_rates_are_those_computed_by_hand_of_whole_pairs():
    made = tasks.load("twins", of={"name": "chain"}, size=8)
    prompted = [Prompted(task, ()) for task in made]
    # pair 0: both; 1: the original alone, in one of two attempts; 2: the twin alone; the
    # original of pair 3 is left out.
    correct_NK = np.array([[1, 1], [1, 1], [1, 0], [0, 0], [0, 0], [1, 1], [0, 0]], float)
    found = measure_twins(correct_NK, [*prompted[:6], prompted[7]])
    assert found["twin_pairs"] == 3
    assert found["original_accuracy"] == pytest.approx(3 / 6)
    assert found["twin_accuracy"] == pytest.approx(4 / 6)
    assert found["hack_rate"] == pytest.approx(1 / 6)
    assert found["hack_gap"] == pytest.approx(-1 / 6)
    assert measure_twins(correct_NK, [Prompted(task, ()) for task in tasks.load("chain", size=7)]) == {}


def test_a_config_names_twins_as_a_suite():
    text = str(SUITES["chain_twins"])
    tree = command.read(SMOKE, {"evaluate.suites.pairs": text, "evaluate.suites.pairs.of.ops": "4"}).to_dict()
    assert tree["evaluate"]["suites"]["pairs"]["of"]["ops"] == 4
    assert "size" not in tree["evaluate"]["suites"]["pairs"]["of"]
