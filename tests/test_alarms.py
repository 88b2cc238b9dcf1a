"""Warnings about runs that may not learn: each fires once per phase, also if the run is
interrupted, and not on a healthy run.
"""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from runs import load_config, read_lines, run_config

from jaxreason.build import build
from jaxreason.build.tasks import in_distribution
from jaxreason.runtime import checkpoint
from jaxreason.runtime.alarms import FEWEST, IN_A_ROW, Alarms, Traits, conditions
from jaxreason.runtime.journal import Journal
from jaxreason.train import Stopped, train

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


CHAIN = Traits(trained=("chain",))


def heard(lines, traits=CHAIN, cut=(), phase=lambda step: "rl"):
    """List the warnings of a run that was interrupted before the lines `cut`."""
    alarms, found = Alarms(), []
    for step, values in enumerate(lines):
        if step in cut:  # a checkpoint is JSON
            alarms = Alarms(**json.loads(json.dumps(dataclasses.asdict(alarms))))
        found += [(w.step, w.name) for w in alarms.hear(step, phase(step), values, traits)]
    return found


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
    phases = heard([bad] * 30, phase=lambda step: "prior" if step < 10 else "rl")
    assert phases == [(IN_A_ROW - 1, name), (10 + IN_A_ROW - 1, name)]  # once in each phase


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
    for accuracy, found in ((0.5, ["reward/chain"]), (0.995, [])):
        evaluation = {"eval/chain/greedy/accuracy": accuracy}
        assert [name for _, name in heard([evaluation, *rising, evaluation])] == found


@pytest.mark.parametrize(("needs_group", "names"), [(True, ["groups"]), (False, [])])
def test_groups_matter_to_objectives_that_compare_their_attempts(needs_group, names):
    journal = journal_of(needs_group=needs_group)
    for step in range(IN_A_ROW):
        Journal.warn(journal, step, "rl", HEALTHY | {"rollout/informative_groups": 0.0})
    assert [warning["name"] for warning in journal.progress.warnings] == names


def journal_of(needs_group=True, lag=0, updates=1, replay=0):
    objective, source = SimpleNamespace(needs_group=needs_group), SimpleNamespace(lag=lag, replay=replay)
    phase = SimpleNamespace(objective=objective, source=source, updates_per_batch=updates)
    progress, log = SimpleNamespace(warnings=[]), SimpleNamespace(say=lambda line: None)
    return SimpleNamespace(phase=phase, alarms=Alarms(), progress=progress, log=log)


@pytest.mark.parametrize(
    ("made", "kl", "names"),
    [
        ({}, 0.05, ["mismatch"]),
        ({"lag": 2}, 0.05, []),
        ({"updates": 4}, 0.05, []),
        ({"replay": 3}, 0.05, []),
        ({"lag": 2}, 0.5, ["stale"]),
        ({"updates": 4}, 0.5, ["stale"]),
        ({"replay": 3}, 0.5, ["stale"]),
    ],
)
def test_older_params_that_sample_on_purpose_are_no_mismatch(made, kl, names):
    journal = journal_of(**made)
    for step in range(IN_A_ROW):
        Journal.warn(journal, step, "rl", HEALTHY | {"rollout/kl_sampler_learner": kl})
    assert [warning["name"] for warning in journal.progress.warnings] == names


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


def evaluated(value, suite="chain", **modes):
    return [{f"eval/{suite}/{mode}/accuracy": x for mode, x in {"greedy": value, **modes}.items()}]


def test_a_reward_that_rises_while_accuracy_does_not_is_told():
    flat = [*evaluated(0.4), *rewards(0.3, 0.9), *evaluated(0.4)]
    assert heard(flat) == [(41, "reward/chain")]
    assert heard([*evaluated(0.4), *rewards(0.3, 0.9), *evaluated(0.5)]) == []
    assert heard([*evaluated(0.4), *rewards(0.3, 0.35), *evaluated(0.4)]) == []
    # It rose before the phase began, or one of its temperatures rises.
    started = [*evaluated(0.1), *evaluated(0.4), *rewards(0.3, 0.9), *evaluated(0.4)]
    assert heard(started, phase=lambda step: "prior" if step < 2 else "rl") == [(42, "reward/chain")]
    assert heard([*evaluated(0.4, t1=0.1), *rewards(0.3, 0.9), *evaluated(0.4, t1=0.3)]) == []


def test_an_accuracy_that_rises_and_falls_is_told_until_it_recovers():
    rise = [*evaluated(0.4), *rewards(0.3, 0.6), *evaluated(0.8)]
    assert heard([*rise, *rewards(0.6, 0.9), *evaluated(0.39)]) == [(82, "reward/chain")]
    assert heard([*rise, *rewards(0.6, 0.65), *evaluated(0.39)]) == []  # the reward has not risen since
    assert heard([*rise, *rewards(0.6, 0.3), *evaluated(0.2), *rewards(0.6, 0.9), *evaluated(0.5)]) == []  # it recovers
    assert heard([*rise, *rewards(0.6, 0.8), *evaluated(0.85), *rewards(0.8, 0.85), *evaluated(0.8)]) == []


def test_each_suite_in_distribution_is_watched_and_no_other():
    def both(chain, sorting, ood):
        return [evaluated(chain)[0] | evaluated(sorting, "sorting")[0] | evaluated(ood, "chain_ood")[0]]

    traits = Traits(trained=("chain", "sorting"))
    for after, found in (((0.9, 0.4, 0.1), ["sorting"]), ((0.4, 0.9, 0.1), ["chain"]), ((0.4, 0.4, 0.9), ["chain", "sorting"])):
        lines = [*both(0.4, 0.4, 0.1), *rewards(0.3, 0.9), *both(*after)]
        assert [name for _, name in heard(lines, traits)] == [f"reward/{suite}" for suite in found]


@pytest.mark.parametrize(
    ("suite", "source", "is_in"),
    [
        ({"name": "chain", "ops": 5}, {"name": "chain"}, True),  # ops is (2, 5) where it is not given
        ({"name": "chain", "ops": 8}, {"name": "chain"}, False),
        ({"name": "chain", "ops": (2, 6)}, {"name": "chain", "ops": [2, 5]}, False),
        ({"name": "chain", "ops": [3, 4], "size": 9, "seed": 1}, {"name": "chain", "ops": (2, 5), "slip": 0.9}, True),
        ({"name": "sorting"}, {"name": "reversal"}, False),
        ({"name": "countdown", "numbers": 4}, {"name": "countdown"}, False),
        ({"name": "jsonl", "path": "test.jsonl"}, {"name": "jsonl", "path": "train.jsonl"}, True),
        ({"name": "reasoning_gym", "dataset": "a"}, {"name": "reasoning_gym", "dataset": "b"}, False),
        ({"name": "gsm8k", "instruction": "{question}"}, {"name": "gsm8k"}, True),
    ],
)
def test_suites_of_the_kind_that_a_source_trains_on(suite, source, is_in):
    assert in_distribution(suite, source) == is_in


def test_an_interrupted_run_gives_the_warnings_of_one_that_was_not():
    bad = HEALTHY | {"train/entropy": 0.001}
    spike, failing = HEALTHY | {"train/grad_norm": 9.0}, HEALTHY | {"rollout/verifier_errors": 0.5}
    lines = [*evaluated(0.4), *[HEALTHY] * 15, spike, *[bad] * 9, failing, failing, *rewards(0.3, 0.6), *evaluated(0.8)]
    lines += [*rewards(0.6, 0.9), *evaluated(0.5), *[bad] * 9, spike, *rewards(0.6, 0.9), *evaluated(0.3)]
    whole = heard(lines)
    assert [name for _, name in whole] == ["gradient", "entropy", "verifier", "reward/chain"]
    for step in range(len(lines)):
        assert heard(lines, cut=[step]) == whole
    assert heard(lines, cut=range(len(lines))) == whole


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


def test_a_run_that_is_stopped_and_continued_warns_as_if_it_never_was(tmp_path):
    """It stops while a condition is counted, and again after the warning."""
    fields = {"rl.steps": IN_A_ROW + 4, "phases": ("rl",), "rl.evaluate_every": 0}
    config, said = load_config("tiny", "smoke", **fields), []
    config.evaluate.suites = {}
    steps = iter(range(1, 99))

    def stop():
        return "stopped" if next(steps) in (3, IN_A_ROW + 2) else ""

    while True:
        checkpoints = checkpoint.open_checkpoints(tmp_path / "checkpoints", **config.checkpoint.to_dict())
        try:
            summary = train(build(config), tmp_path, checkpoints, log_options={"live": False}, stop=stop)
            break
        except Stopped as error:
            said.append(str(error))
        finally:
            checkpoints.close()
    assert len(said) == 2
    assert [(w["step"], w["phase"], w["name"]) for w in summary["warnings"]] == [(IN_A_ROW, "rl", "groups")]
