"""Warnings about runs that may not learn: each fires once, and not on a healthy run."""

import json
from types import SimpleNamespace

import pytest
from runs import load_config, read_lines, run_config

from jaxreason.runtime.alarms import FEWEST, IN_A_ROW, Alarms, conditions
from jaxreason.runtime.journal import Journal

HEALTHY = {
    "train/entropy": 0.3,
    "train/grad_norm": 0.3,
    "rollout/correct": 0.5,
    "rollout/reward": 0.5,
    "rollout/informative_groups": 0.7,
    "rollout/cut": 0.1,
    "rollout/kl_sampler_learner": 1e-6,
    "rollout/verifier_errors": 0.0,
    "rollout/verifier_timeouts": 0.0,
}


def heard(lines, given=()):
    alarms = Alarms(set(given))
    return [(w.step, w.name) for step, values in enumerate(lines) for w in alarms.hear(step, "rl", values)]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("entropy", {"train/entropy": 0.001}),
        ("groups", {"rollout/informative_groups": 0.0}),
        ("length", {"rollout/cut": 0.6}),
        ("mismatch", {"rollout/kl_sampler_learner": 0.05}),
    ],
)
def test_a_condition_that_holds_is_told_once(name, changed):
    bad = HEALTHY | changed
    assert heard([HEALTHY] * 20) == []
    assert heard([HEALTHY, *[bad] * (IN_A_ROW - 1), HEALTHY, *[bad] * (IN_A_ROW - 1)]) == []  # never so often in a row
    assert heard([HEALTHY, *[bad] * 30, HEALTHY, *[bad] * 30]) == [(IN_A_ROW, name)]
    assert heard([bad] * 30, given=[name]) == []  # a run that goes on has had it


def test_lines_of_evaluations_do_not_end_a_row():
    bad, evaluation = HEALTHY | {"train/entropy": 0.001}, {"eval/chain/greedy/accuracy": 0.5, "cost/flops": 1.0}
    assert heard([bad, bad, evaluation] * IN_A_ROW) == [(IN_A_ROW // 2 * 3, "entropy")]


def test_numbers_that_are_not_finite_neither_hide_a_spike_nor_raise_the_reward():
    nan = HEALTHY | {"train/grad_norm": float("nan"), "rollout/reward": float("nan")}
    spike = HEALTHY | {"train/grad_norm": 3.1}
    assert heard([*[HEALTHY, nan] * FEWEST, spike]) == [(2 * FEWEST, "gradient")]
    accuracy = {"eval/chain/greedy/accuracy": 0.5}
    assert heard([accuracy, *[HEALTHY] * 20, nan, accuracy]) == []


def test_held_out_accuracy_that_can_hardly_rise_is_no_reason_for_a_warning():
    rising = [HEALTHY | {"rollout/reward": 0.5 + i / 100} for i in range(40)]
    for accuracy, found in ((0.5, ["reward"]), (0.995, [])):
        evaluation = {"eval/chain/greedy/accuracy": accuracy}
        assert [name for _, name in heard([evaluation, *rising, evaluation])] == found


@pytest.mark.parametrize(("needs_group", "names"), [(True, ["groups"]), (False, [])])
def test_groups_matter_to_objectives_that_compare_their_attempts(needs_group, names):
    phase = SimpleNamespace(objective=SimpleNamespace(needs_group=needs_group))
    progress, log = SimpleNamespace(warnings=[]), SimpleNamespace(say=lambda line: None)
    journal = SimpleNamespace(phase=phase, alarms=Alarms(set()), progress=progress, log=log)
    for step in range(IN_A_ROW):
        Journal.warn(journal, step, "rl", HEALTHY | {"rollout/informative_groups": 0.0})
    assert [warning["name"] for warning in progress.warnings] == names


def test_low_entropy_of_a_solved_task_is_what_is_wanted():
    assert heard([HEALTHY | {"train/entropy": 0.001, "rollout/correct": 0.97}] * 30) == []


def test_a_failing_verifier_is_told_at_once():
    assert heard([HEALTHY, HEALTHY | {"rollout/verifier_errors": 0.01, "rollout/verifier_timeouts": 0.01}]) == [(1, "verifier")]
    assert heard([HEALTHY | {"rollout/verifier_errors": 0.009}] * 9) == []


def test_a_gradient_spike_is_told():
    spike = HEALTHY | {"train/grad_norm": 3.1}
    assert heard([HEALTHY] * FEWEST + [spike]) == [(FEWEST, "gradient")]
    assert heard([HEALTHY] * (FEWEST - 1) + [spike]) == []  # too early to know what is usual
    assert heard([HEALTHY] * FEWEST + [HEALTHY | {"train/grad_norm": 2.9}]) == []
    assert heard([HEALTHY] * FEWEST + [HEALTHY | {"train/grad_norm": float("nan")}]) == []


def rewards(first, last, count=40):
    return [HEALTHY | {"rollout/reward": first + (last - first) * i / count} for i in range(count)]


def test_a_reward_that_rises_while_accuracy_does_not_is_told():
    def accuracy(value):
        return [{"eval/chain/greedy/accuracy": value}]

    assert heard([*accuracy(0.4), *rewards(0.3, 0.9), *accuracy(0.4)]) == [(41, "reward")]
    assert heard([*accuracy(0.4), *rewards(0.3, 0.9), *accuracy(0.5)]) == []
    assert heard([*accuracy(0.4), *rewards(0.3, 0.35), *accuracy(0.4)]) == []
    # An accuracy that rose and fell a little is not flat.
    assert heard([*accuracy(0.4), *rewards(0.3, 0.6), *accuracy(0.9), *rewards(0.6, 0.9), *accuracy(0.39)]) == []


def test_a_phase_without_rollouts_has_no_conditions():
    assert not any(holds for holds, _ in conditions({"train/entropy": 0.0, "train/loss": 1.0}).values())


def test_a_run_says_its_warnings_and_keeps_them_in_its_summary(tmp_path, capsys):
    """Random weights solve nothing: no group has two rewards."""
    fields = {"rl.steps": IN_A_ROW + 2, "phases": ("rl",), "rl.evaluate_every": 0}
    summary = run_config(load_config("tiny", "smoke", **fields), tmp_path)
    assert [(w["step"], w["name"]) for w in summary["warnings"]] == [(IN_A_ROW, "groups")]
    assert "no gradient" in summary["warnings"][0]["text"]
    assert json.loads((tmp_path / "summary.json").read_text())["warnings"] == summary["warnings"]
    assert sum(line.get("rollout/informative_groups") == 0 for line in read_lines(tmp_path / "metrics.jsonl")) >= IN_A_ROW
