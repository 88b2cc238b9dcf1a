"""Sweeps: arms and their folders, shared phases, the queue, the statistics, and whole
sweeps that are killed and continued.
"""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import HANG_S, METRIC, PRETEND, ROOT, SMOKE, maths, params_of, pretend, result, whole_checkpoint, written, xla_flags

from jaxreason.runtime.workdir import last_metrics
from jaxreason.sweep import Sweep, arms, chain, fixed, jobs, over, product, progress, queue, report, results, search, zip_
from jaxreason.sweep import __main__ as entry
from jaxreason.sweep.__main__ import read_experiment
from jaxreason.sweep.progress import cell
from jaxreason.sweep.runs import SweepRun, begin_with_shared, dropped_fields, dropped_lines, make_runs

# --- arms ---


def test_arms_are_made_from_lists():
    names, groups = over("name", ["a", "b"]), over("group", [4, 8])
    assert product(names, groups) == [
        {"name": "a", "group": 4},
        {"name": "a", "group": 8},
        {"name": "b", "group": 4},
        {"name": "b", "group": 8},
    ]
    assert zip_(names, groups) == [{"name": "a", "group": 4}, {"name": "b", "group": 8}]
    assert chain(names, groups) == [*names, *groups]
    assert product(fixed("steps", 3), names) == [{"steps": 3, "name": "a"}, {"steps": 3, "name": "b"}]
    with pytest.raises(ValueError, match="zip_ got lists of 2, 1 arms"):
        zip_(names, fixed("steps", 3))
    with pytest.raises(ValueError, match="two lists of arms set the field 'name'"):
        product(names, names)


def test_a_grid_in_one_line():
    made, seeds = arms.parse_grid("config.a.name=x,y; b=(1, 2),[3,4],'p,q' ;c=-1..1; seed=0..4")
    assert len(made) == 2 * 3 * 3
    assert made[0] == {"a.name": "x", "b": "(1, 2)", "c": "-1"}
    assert {arm["b"] for arm in made} == {"(1, 2)", "[3,4]", "p,q"}
    assert {arm["c"] for arm in made} == {"-1", "0", "1"}
    assert seeds == (0, 1, 2, 3, 4)
    assert arms.parse_grid("seed=3,5") == ([{}], (3, 5))
    assert arms.parse_grid("a=1")[1] is None
    sections, _ = arms.parse_grid("verifier={'marker': ';A', 'x': (1, 2)},{'name': 'y'}; b=1")
    assert [arm["verifier"] for arm in sections] == ["{'marker': ';A', 'x': (1, 2)}", "{'name': 'y'}"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "--grid is empty"),
        ("a", "--grid has 'a'; allowed: field=value,value"),
        ("a=", "--grid has 'a='"),
        ("a=1; a=2", "--grid has the field 'a' twice"),
        ("a=4..1", "range 4..1"),
        ("seed=x", "seed=x; allowed: whole numbers"),
        ("seed=-1..2", "seed=-1,0,1,2; allowed: whole numbers"),
    ],
)
def test_a_wrong_grid_is_one_line(text, said):
    with pytest.raises(ValueError, match=r".") as caught:
        arms.parse_grid(text)
    assert said in str(caught.value)


def test_equal_overrides_have_one_readable_folder():
    assert arms.name_of({}) == "base"
    assert arms.name_of({"b": 2, "a.name": "x"}) == arms.name_of({"a.name": "x", "b": "2"}) == "a.name=x,b=2"
    assert arms.name_of({"lr": "1e-3"}) == arms.name_of({"lr": 0.001}) == "lr=0.001"
    assert arms.name_of({"ops": (1, 2)}) == arms.name_of({"ops": "(1,2)"}) == "ops=(1,2)"
    strange = [arms.name_of({"text": text}) for text in ("a/b", "a b", "a\nb", "x" * 300, "x" * 301)]
    assert len(set(strange)) == 5
    assert all("/" not in name and len(name) < 120 for name in strange)


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        (Sweep("c", []), "has no arms"),
        (Sweep("c", [{}], seeds=()), "has the seeds"),
        (Sweep("c", [{}], seeds=(1, 1)), "each once"),
        (Sweep("c", [{"lr": "1e-3"}, {"lr": 0.001}]), "two arms have the folder 'lr=0.001'"),
        (Sweep("c", [{"seed": 3}]), "sets the field 'seed'"),
        (Sweep("c", [{}, {"a": 1}], names=("x",)), "1 names and 2 arms"),
        (Sweep("c", [{}], names=("../x",)), "arm named '../x'"),
    ],
)
def test_arms_that_can_not_be_told_apart_are_refused(sweep, said):
    with pytest.raises(ValueError, match=r".") as caught:
        arms.named_arms(sweep)
    assert said in str(caught.value)


# --- runs ---


def names(runs):
    return [run.name if run.stop_after is None else f"shared, after {run.stop_after}" for run in runs]


def test_arms_that_begin_alike_share_their_prior(tmp_path):
    made = over("rl.objective.name", ["rloo", "grpo"])
    runs = make_runs(Sweep(SMOKE, made, seeds=(0, 1)), tmp_path)
    expected = [[f"rl.objective.name={name}/seed{seed}" for name in ("rloo", "grpo")] for seed in (0, 1)]
    assert names(runs) == ["shared, after prior", *expected[0], "shared, after prior", *expected[1]]
    assert runs[1].shared == runs[2].shared == runs[0].folder != runs[3].folder
    assert (runs[0].steps, runs[1].steps) == (4, 6)
    assert not any(run.shared for run in make_runs(Sweep(SMOKE, made, seeds=(0, 1)), tmp_path, share=False))
    alone = make_runs(Sweep(SMOKE, [{"prior.steps": 3}, {"prior.steps": 5}, {"phases": "('rl',)"}], seeds=(0,)), tmp_path)
    assert [run.shared for run in alone] == [None] * 3
    two = make_runs(Sweep(SMOKE, [{}, {"prior.steps": 5}, {"prior.steps": 5, "rl.steps": 3}], seeds=(0,)), tmp_path)
    assert [run.shared is not None for run in two if run.stop_after is None] == [False, True, True]


def test_an_arm_says_which_fields_its_name_drops(tmp_path):
    made = make_runs(Sweep(SMOKE, over("rl.objective.name", ["rloo", "grpo"]), seeds=(0, 1)), tmp_path)
    (lines,) = dropped_fields(made).values()
    assert len(lines) == 1
    assert "dropped weigh='per_token'" in lines[0]
    assert dropped_lines(dropped_fields(made)) == [f"{lines[0]} (arm rl.objective.name=grpo)"]
    kept = Sweep(SMOKE, over("rl.objective.name", ["rloo", "grpo"]), common={"rl.objective.weigh": "per_token"})
    assert not dropped_fields(make_runs(kept, tmp_path))


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ({"rl.objectiv.name": "grpo"}, r"arm 'rl.objectiv.name=grpo': unknown field .* \(did you mean 'objective'\?\)"),
        ({"rl.steps": "x"}, "config.rl.steps got 'x'; allowed: int"),
        ({"rl.objective.name": "grop"}, "unknown objective 'grop'"),
        ({"rl.optimizer.lr": 0.0}, "lr got 0.0; allowed: above 0"),
        ({"rl.optimizer.name": "sgd", "rl.optimizer.b1": 0.8}, "sgd does not read it"),
        ({"phases": "('x',)"}, "unknown phase 'x'"),
    ],
)
def test_a_wrong_arm_is_refused_before_anything_starts(arm, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        make_runs(Sweep(SMOKE, [{}, arm]), tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_experiment_is_a_file_with_a_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        f"""
from jaxreason.sweep import Sweep, over
def sweep(arg=''):
    return Sweep({SMOKE!r}, over('rl.steps', [1, 2]), seeds=(0,) if arg == 'quick' else (0, 1), common={{'log.watts': 3}})
"""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxreason.sweep.__main__.FLAGS", type("Flags", (), {"metric": None, "seeds": None}))
        asked = read_experiment(f"{file}:quick", {"rl.source.group": "4"})
        assert asked.name == "mine-quick"
        assert asked.sweep.seeds == (0,)
        assert asked.sweep.common == {"log.watts": 3, "rl.source.group": "4"}
        file.write_text("x = 1\n")
        with pytest.raises(ValueError, match="has no function sweep"):
            read_experiment(str(file), {})


def test_an_experiment_prepares_files_for_its_runs(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(
        f"""
from jaxreason.sweep import Sweep
def prepare(folder, seeds):
    for seed in seeds:
        (folder / f"{{seed}}.txt").write_text("1+2=3")
def sweep(arg=''):
    task = {{"name": "corpus", "path": "{{folder}}/{{seed}}.txt"}}
    return Sweep({SMOKE!r}, [{{"prior.source.task": task}}, {{"rl.steps": 1}}], seeds=(0, 3), names=["prepared", "own"])
"""
    )
    fields = {"follow": False, "budget": None, "share": True, "workers": 1, "devices_per_run": 1, "search": None}
    fields |= {"retries": 0, "engine": None, "metric": None, "seeds": None}
    monkeypatch.setattr(entry, "FLAGS", type("Flags", (), fields))
    monkeypatch.setattr(entry, "report", lambda folder: None)
    paths = []

    def execute(runs, *_, **__):
        for run in runs:
            if run.arm == "prepared":
                paths.append(run.config["prior"]["source"]["task"]["path"])
                assert Path(paths[-1]).read_text() == "1+2=3", "the files are there before the runs"

    monkeypatch.setattr(queue, "execute", execute)
    entry.run_sweep(read_experiment(str(file), {}), tmp_path / "sweep")
    assert sorted(set(paths)) == [str(tmp_path / "sweep" / f"{seed}.txt") for seed in (0, 3)]


def test_a_folder_that_cannot_be_made_is_a_failure_of_its_run(tmp_path, monkeypatch):
    def full(run):
        if run.arm == "fails":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(queue, "begin_with_shared", full)
    states, said = pretend(tmp_path, monkeypatch, ["fails", "ends"])
    assert [state["status"] for state in states] == ["failed", "done"]
    assert "could not begin: [Errno 28] No space left on device" in said[0]


def test_a_run_whose_folder_is_still_in_use_is_tried_again(tmp_path, monkeypatch):
    states, said = pretend(tmp_path, monkeypatch, ["locked"])
    assert (states[0]["status"], states[0]["attempts"]) == ("done", 2)
    assert "will be tried again" in said[0]


def test_runs_are_submitted_as_jobs(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    assert jobs.parse_options("timeout_min=5,slurm_partition=gpu") == {"timeout_min": 5, "slurm_partition": "gpu"}
    with pytest.raises(ValueError, match="--engine_options has 'x'"):
        jobs.parse_options("x")
    states, _ = pretend(tmp_path, monkeypatch, ["ends", "fails"], launch=jobs.Jobs("local", tmp_path, {"timeout_min": 2}))
    assert [state["status"] for state in states] == ["done", "failed"]
    assert states[1]["reason"] == "exit 1: it went wrong"


# --- the queue, with processes that only pretend ---


def test_a_run_that_fails_is_recorded_and_the_others_continue(tmp_path, monkeypatch):
    states, said = pretend(tmp_path, monkeypatch, ["fails", "killed", "ends"])
    assert [state["status"] for state in states] == ["failed", "failed", "done"]
    assert states[0]["reason"] == "exit 1: it went wrong"
    assert states[0]["last_lines"] == ["error: it went wrong"]
    assert states[1]["reason"] == "killed by SIGKILL, perhaps for the memory it took"
    assert (tmp_path / "logs" / "ends2,seed0.log").read_text().startswith("cores")
    assert len(said) == 2
    assert json.loads((tmp_path / "state.json").read_text())["runs"]["fails0/seed0"]["attempts"] == 1


def test_retries_and_a_second_call(tmp_path, monkeypatch):
    states, said = pretend(tmp_path, monkeypatch, ["once", "fails"], retries=1)
    assert [(state["status"], state["attempts"]) for state in states] == [("done", 2), ("failed", 2)]
    assert "will be tried again" in said[0]
    again, _ = pretend(tmp_path, monkeypatch, ["once", "fails"])  # what failed is tried once more
    assert [(state["status"], state["attempts"]) for state in again] == [("done", 2), ("failed", 1)]


def test_runs_are_stopped_and_pruned(tmp_path, monkeypatch):
    begun = time.monotonic()
    states, _ = pretend(tmp_path, monkeypatch, ["sleeps", "ends"], stopped=lambda: time.monotonic() > begun + 2)
    assert [state["status"] for state in states] == ["stopped", "waiting"]
    states, said = pretend(tmp_path, monkeypatch, ["sleeps", "ends"], prune=lambda run: "too slow" if run.arm == "sleeps" else "")
    assert [state["status"] for state in states] == ["pruned", "done"]
    assert said == ["sleeps0/seed0: stopped early: too slow"]
    states, _ = pretend(tmp_path, monkeypatch, ["sleeps", "ends"])
    assert states[0]["status"] == "pruned"  # it stays so


def test_workers_divide_cores_and_accelerators(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 4, 5, 7})
    assert [sorted(worker.cores) for worker in queue.make_workers(None)] == [[2], [3], [4], [5], [7]]
    assert [sorted(worker.cores) for worker in queue.make_workers(2)] == [[2, 3], [4, 5]]  # as many for each
    with pytest.raises(ValueError, match=r"--workers=6 with 1 per run; allowed: 1 to 5, since this machine has 5 cores"):
        queue.make_workers(6)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,4,5")
    gpus = queue.make_workers(None, per_run=2)
    assert [worker.environment for worker in gpus] == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "4,5"}]
    assert [sorted(worker.cores) for worker in gpus] == [[2, 3], [4, 5, 7]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(queue.glob, "glob", lambda pattern: ["/dev/accel0", "/dev/accel1"] if "accel" in pattern else [])
    tpus = queue.make_workers(None)
    assert [worker.environment["TPU_VISIBLE_CHIPS"] for worker in tpus] == ["0", "1"]


def test_the_table_reads_the_last_whole_lines(tmp_path):
    run = SweepRun("a/seed0", "a", 0, (), tmp_path, {"phases": ("rl",), "rl": {"steps": 9}})
    assert cell(run, {"status": "waiting"}, "x") == "waiting"
    lines = [json.dumps({"step": i, "phase": "rl", "rollout/reward": i / 10, "pad": "y" * 5000}) for i in range(9)]
    (tmp_path / "metrics.jsonl").write_text('{"step": 8, "eval/a": 0.25}\n' + "\n".join(lines) + '\n{"step": 9, "cu')
    assert last_metrics(tmp_path)["step"] == 8
    assert cell(run, {"status": "running"}, "eval/a") == "rl 8/9 r 0.80"
    assert cell(run, {"status": "failed"}, "eval/a") == "failed"


# --- statistics and report ---


def test_seeds_are_paired():
    base = {seed: result("a", seed, value) for seed, value in enumerate((0.5, 0.6, 0.7))}
    arm = {seed: result("b", seed, base[seed].value + d) for seed, d in enumerate((0.05, 0.06, 0.04))} | {9: result("b", 9, 0.0)}
    c = results.compare(arm, base, "b", "a")
    assert c.seeds == (0, 1, 2)  # the seed that one of them lacks is left out
    assert c.difference == pytest.approx(0.05)
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert (c.low, c.high) == pytest.approx((0.05 - half, 0.05 + half), rel=1e-5)
    assert c.sign_flip == 0.25
    assert c.p < 0.02
    assert results.compare(arm, {5: base[0]}, "b", "a") is None


def test_one_seed_pairs_problems():
    a, b = "1" * 100 + "0" * 100, "1" * 120 + "0" * 80
    c = results.compare({0: result("b", 0, 0.6, verdicts=b)}, {0: result("a", 0, 0.5, verdicts=a)}, "b", "a")
    assert c.p == pytest.approx(2 / 2**20)
    assert 0.05 < c.low < 0.1 < c.high < 0.15
    few_a, few_b = (result(arm, 0, n / 20, 20) for arm, n in (("a", 10), ("b", 12)))
    few = results.compare({0: few_b}, {0: few_a}, "b", "a")
    assert "posterior" in few.how
    assert few.low < 0 < few.high
    none = results.compare({0: result("b", 0, 0.6, verdicts="")}, {0: result("a", 0, 0.5)}, "b", "a")
    assert none.p == 1


def test_effects_of_fields_are_averaged_over_the_others():
    made = dict(zip("abcd", product(over("x", [1, 2]), over("y", [1, 2]))))
    values = {"a": 0.5, "b": 0.6, "c": 0.7, "d": 0.9}
    found = {name: {seed: result(name, seed, value) for seed in (0, 1)} for name, value in values.items()}
    found["d"][1] = result("d", 1, 0.901)
    x, y = results.field_effects(made, found)
    assert (x.what, x.than, x.difference) == ("x=2", "x=1", pytest.approx((0.2 + 0.3) / 2 + 0.00025))
    assert y.difference == pytest.approx((0.1 + 0.2) / 2 + 0.00025)
    assert x.corrected >= x.p


def test_the_report_says_what_is_shown_what_is_not_and_what_is_missing(tmp_path):
    values = {"base": (0.50, 0.52, 0.51), "better": (0.70, 0.71, 0.72), "same": (0.52, 0.50, 0.51), "broken": (0.5, None, 0.6)}
    states = written(tmp_path, values)
    made = report.make_report(tmp_path, {name: {} for name in values}, (0, 1, 2), METRIC, states)
    assert made.noise_floor == pytest.approx(0.01)
    text = report.write_report(made, tmp_path)
    assert "| base | 3 | 0.510 | [0.485, 0.535] |" in text
    assert "- better is above base by 20.0 points, 95 % +17.5 to +22.5" in text
    assert re.search(r"- same is not shown to differ from base \([+-]0.0 points\)", text)
    assert "- Not in the table: broken/seed1 (failed: exit 1: it went wrong)." in text
    assert "cannot give a p below 0.5 with 2 seeds" in text
    assert "| 10 |" in text  # joules
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["missing"] == {"broken/seed1": "failed: exit 1: it went wrong"}
    assert [arm["name"] for arm in again["arms"]] == list(values)
    assert again["pareto"] == ["better"]


def test_a_problem_counts_once_in_the_interval_over_problems():
    """Whatever the number of seeds that were asked it."""
    alike = [result("a", seed, 0.5) for seed in range(5)]
    low, high = results.problems_interval(alike)
    assert (low, high) == pytest.approx(results.problems_interval(alike[:1]), abs=0.005)
    apart = [result("a", 0, 0.5), result("a", 1, 0.5, verdicts="0" * 100 + "1" * 100)]
    low, high = results.problems_interval(apart)  # each problem was solved once: nothing varies over problems
    assert (low, high) == results.problems_interval(apart[:1])
    assert results.problems_interval([result("a", seed, 1.0) for seed in range(3)])[0] == pytest.approx(1 - 0.0188, abs=1e-3)


def test_runs_of_two_versions_of_the_code_are_not_compared(tmp_path):
    states = written(tmp_path, {"a": (0.5, 0.6), "b": (0.6, 0.7)}, code={"a": "old", "b": "new"})
    with pytest.raises(
        ValueError, match=r"runs of 2 versions of the code are not compared \(new: 2 runs, as b/seed0; old: 2 runs"
    ):
        report.make_report(tmp_path, {"a": {}, "b": {}}, (0, 1), METRIC, states)
    made = report.make_report(tmp_path, {"a": {}, "b": {}}, (0, 1), METRIC, states, across_commits=True)
    assert "versions of the code are compared: new, old" in report.markdown(made, tmp_path)


def test_a_pruned_run_is_in_no_test(tmp_path):
    states = written(tmp_path, {"a": (0.5, 0.6), "b": (0.6, 0.7)})
    states["b/seed1"] = {"status": "pruned", "reason": "below the median at step 40", "code": "c"}
    made = report.make_report(tmp_path, {"a": {}, "b": {}}, (0, 1), METRIC, states)
    assert not made.comparisons  # nor is another run of its arm: which ones there are depends on their results
    assert [arm.name for arm in made.arms] == ["a"]
    assert made.missing == {
        "b/seed0": "done, but its arm was stopped early: below the median at step 40",
        "b/seed1": "stopped early: below the median at step 40",
    }


def test_a_metric_is_of_the_config():
    config = {"evaluate": {"suites": {"chain": {}, "x": {}}, "temperatures": (0.0, 0.7)}}
    assert results.parse_metric(None, config) == ("chain", 0.0)
    assert results.parse_metric("eval/x/t0.7/accuracy", config) == ("x", 0.7)
    with pytest.raises(ValueError, match=r"unknown metric .*did you mean 'eval/x/t0.7/accuracy'"):
        results.parse_metric("eval/x/t0.8/accuracy", config)


# --- whole sweeps ---


def sweep(*words, cwd, kill_after=None, number=signal.SIGTERM):
    """Run the real command on one device; kill it once `kill_after()` says so."""
    env = os.environ | {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxreason.sweep", *words]
    process = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while kill_after is not None and process.poll() is None:
        if kill_after():
            process.send_signal(number)
            break
        time.sleep(0.1)
    try:
        out, err = process.communicate(timeout=HANG_S)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.process
def test_a_dry_run_can_be_read_by_a_program(tmp_path):
    words = (f"--config={SMOKE}", "--grid=rl.objective.name=rloo,grpo; seed=0", f"--folder={tmp_path / 'made'}")
    code, out, err = sweep(*words, "--dry_run", "--json", cwd=tmp_path)
    assert code == 0, err
    found = json.loads(out)
    shared, *arms_ = found["runs"]
    assert [run["name"] for run in arms_] == ["rl.objective.name=rloo/seed0", "rl.objective.name=grpo/seed0"]
    assert {run["shared"] for run in arms_} == {shared["folder"]}
    assert [run["steps"] for run in found["runs"]] == [4, 6, 6]
    # The prior counts once.
    assert found["flops_at_most"] == pytest.approx(sum(run["flops_at_most"] for run in arms_) - shared["flops_at_most"])
    assert all(0 < run["flops_unrecorded"] <= run["flops_at_most"] for run in found["runs"])
    assert not (tmp_path / "made").exists()
    code, _, err = sweep(*words, "--json", cwd=tmp_path)
    assert (code, err) == (1, "error: got --json without --dry_run; allowed: with it\n")


LONGER = ("--config.prior.steps=30", "--config.rl.steps=6", "--config.rl.evaluate_every=3", "--config.checkpoint.every_steps=5")


@pytest.mark.process
@pytest.mark.slow
def test_a_sweep_that_is_killed_twice_ends_as_one_that_is_not(tmp_path):
    """With shared priors against none, too: every run has the numbers of a run of its
    own.
    """
    words = (f"--config={SMOKE}", "--grid=rl.objective.name=rloo,grpo; seed=0..1", *LONGER)
    folder = tmp_path / "killed"
    runs = [f"rl.objective.name={name}/seed{seed}" for name in ("rloo", "grpo") for seed in (0, 1)]

    def any_is_in(phase):
        # Not `**`: checkpoints come and go while it looks.
        paths = [*folder.glob("shared/*/metrics.jsonl"), *folder.glob("runs/*/*/metrics.jsonl")]
        with contextlib.suppress(FileNotFoundError):  # a copy that was renamed
            return any(f'"phase": "{phase}"' in path.read_text() for path in paths)
        return False

    code, out, _ = sweep(*words, f"--folder={folder}", cwd=tmp_path, kill_after=lambda: any_is_in("prior"))
    assert code == 130
    assert "the same command continues" in out
    code, *_ = sweep(*words, f"--folder={folder}", cwd=tmp_path, kill_after=lambda: any_is_in("rl"), number=signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, out, err = sweep(*words, f"--folder={folder}", cwd=tmp_path)
    assert code == 0, err
    code, _, err = sweep(*words, f"--folder={tmp_path / 'alone'}", "--noshare", cwd=tmp_path)
    assert code == 0, err
    for run in runs:
        assert maths(folder / "runs" / run) == maths(tmp_path / "alone" / "runs" / run)
        (_, ours), (_, theirs) = params_of(folder / "runs" / run), params_of(tmp_path / "alone" / "runs" / run)
        assert all(map(np.array_equal, *map(leaves, (ours, theirs))))
    numbers = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("killed", "alone")]
    for arm in numbers[0]["arms"] + numbers[1]["arms"]:
        for unit in ("wall_s", "device_s"):
            arm.pop(unit)
    assert numbers[0]["arms"] == numbers[1]["arms"]
    assert numbers[0]["comparisons"] == numbers[1]["comparisons"]
    assert (folder / "figures" / "curves.png").stat().st_size < 100_000
    assert out.splitlines()[-1].startswith("written: ")


def leaves(tree):
    import jax

    return jax.tree.leaves(tree)


@pytest.mark.process
@pytest.mark.slow
def test_arms_that_crash_and_diverge_are_in_the_report(tmp_path):
    (tmp_path / "mine.py").write_text(
        f"""
from jaxreason.options import command
def get_config(arg=''):
    return command.load({SMOKE!r})
def crashes():
    def verify(text, task):
        if task.id != 'none': raise RuntimeError('no such thing')
    return verify
"""
    )
    words = (
        f"--config={tmp_path / 'mine.py'}",
        "--config.prior.steps=20",
        "--seeds=1",
        "--nofigures",
        f"--folder={tmp_path / 'sweep'}",
    )
    grid = "--grid=verifier={'name': 'exact', 'marker': ';A'},{'name': 'mine:crashes'}; prior.optimizer.lr=2e-3,1e30"
    code, out, err = sweep(*words, grid, cwd=tmp_path)
    assert code == 1, err
    missing = json.loads((tmp_path / "sweep" / "report.json").read_text())["missing"]
    assert len(missing) == 3
    assert sum("RuntimeError: no such thing" in reason for reason in missing.values()) == 2
    assert sum("not finite" in reason for reason in missing.values()) == 1
    assert "Not in the table: " in out


def test_a_copy_of_shared_phases_appears_at_once_and_keeps_what_was_there(tmp_path):
    phases = {"prior": {"source": {}, "steps": 4}, "rl": {"source": {}, "steps": 2}}
    trunk, config = tmp_path / "trunk", {"phases": ["prior", "rl"], **phases}
    whole_checkpoint(trunk, 4)
    (trunk / "checkpoints" / "2").mkdir()
    (trunk / "checkpoints" / "6").mkdir()  # a save that did not end
    (trunk / "metrics.jsonl").write_text("{}\n")
    (trunk / "lock").write_text("mine")
    there = config | {"rl": {"source": {}, "steps": 9}, "seed": 3, "revisions": {"a": "b"}}
    (trunk / "config.json").write_text(json.dumps(there))
    run = SweepRun("a/seed0", "a", 0, (), tmp_path / "runs" / "a", config, shared=trunk)
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text("before its first checkpoint\n")
    begin_with_shared(run)
    assert sorted(path.name for path in run.folder.iterdir()) == ["checkpoints", "config.json", "metrics.jsonl"]
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["4"]
    assert json.loads((run.folder / "config.json").read_text()) == config | {"seed": 3, "revisions": {"a": "b"}}
    assert (tmp_path / "runs" / "a.1" / "metrics.jsonl").exists()
    (run.folder / "checkpoints" / "5").mkdir()
    begin_with_shared(run)  # it has begun: nothing is copied over it
    assert (run.folder / "checkpoints" / "5").exists()


def test_runs_begin_by_themselves_if_their_shared_phases_fail(tmp_path, monkeypatch):
    """The cause may be a later phase of the first arm alone."""
    trunk = SweepRun(
        "shared/x", "fails", 0, (), tmp_path / "shared" / "x", {"phases": ["a", "b"], "a": {"steps": 1}}, stop_after="a"
    )
    arms_ = [SweepRun(f"{kind}/seed0", kind, 0, (), tmp_path / kind, {}, shared=trunk.folder) for kind in ("fails", "ends")]
    monkeypatch.setattr(SweepRun, "command", lambda run: ["-c", PRETEND, str(run.folder), run.arm])
    state = queue.State(tmp_path / "state.json")
    queue.execute([trunk, *arms_], queue.make_workers(1), state, tmp_path, say=[].append)
    assert [state.of(run)["status"] for run in (trunk, *arms_)] == ["failed", "failed", "done"]


# --- search ---


def test_halving_is_replayed_by_hand():
    curves = {
        "a": [(10, 0.5, 1), (20, 0.6, 2), (40, 0.7, 4)],
        "b": [(10, 0.4, 1), (20, 0.9, 2), (40, 0.9, 4)],  # below a at the first rung: stopped there
        "c": [(10, 0.6, 1), (20, 0.5, 2), (40, 0.5, 4)],  # above a, then below it
        "d": [(10, 0.7, 1), (15, 0.0, 1.5), (20, 0.7, 2), (40, 0.8, 4)],  # what is at no rung does not count
    }
    assert search.replay_halving(curves, first=10) == ("d", 4 + 1 + 2 + 4)
    backwards = dict(reversed(curves.items()))
    assert search.replay_halving(backwards, first=10) == ("d", 4 + 1 + 1 + 1)
    assert search.replay_halving({"b": curves["b"], "a": curves["a"]}, first=10)[0] == "b"


def test_a_budget_has_a_unit():
    assert search.parse_budget(None) is None
    assert search.parse_budget("flops=1e15") == ("flops", 1e15)
    for wrong in ("flops", "flops=0", "flops=x", "flops=inf", "hours=3"):
        with pytest.raises(ValueError, match="--budget"):
            search.parse_budget(wrong)


def test_what_is_spent_counts_shared_phases_once(tmp_path):
    trunk = SweepRun("shared/x", "a", 0, (), tmp_path / "trunk", {}, stop_after="prior")
    made = [SweepRun(f"{name}/seed0", name, 0, (), tmp_path / name, {}, shared=trunk.folder) for name in ("a", "b", "c")]
    for run, step in ((trunk, 4), (made[0], 10), (made[1], 7)):
        run.folder.mkdir()
        line = {
            "step": step,
            "ledger/learn_flops": step * 10.0,
            "ledger/sample_flops": step * 1.0,
            "time/ledger/learn_joules": 2.0 * step,
        }
        (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert search.spent([trunk, *made], "steps") == 4 + 6 + 3
    assert search.spent([trunk, *made], "flops") == 11 * 13
    assert search.spent([trunk, *made], "joules") == 2 * 13


CURVES = """
import json, os, sys, time
folder, height = sys.argv[1], float(sys.argv[2])
os.makedirs(folder, exist_ok=True)
for step in range(1, 5):
    with open(folder + '/metrics.jsonl', 'a') as file:
        file.write(json.dumps({'phase': 'rl', 'step': 4 + step, 'eval/chain/greedy/accuracy': height * step}) + '\\n')
    time.sleep(0.7)
json.dump({'done': True, 'evaluations': []}, open(folder + '/summary.json', 'w'))
"""


def test_a_search_stops_bad_arms_and_continues_its_study(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    heights = {"0.0003": 0.2, "0.001": 0.1, "0.003": 0.01, "0.01": 0.02}
    made = Sweep(SMOKE, over("rl.optimizer.lr", heights), seeds=(0, 1), common={"rl.evaluate_every": "1"})
    monkeypatch.setattr(SweepRun, "command", lambda run: ["-c", CURVES, str(run.folder), str(heights[run.arm.partition("=")[2]])])
    how = {"search": "random", "pruner": "halving", "share": False}
    seen = []
    for trials in (2, 4, 4):
        study = search.Search(made, tmp_path, trials=trials, **how)
        state = queue.State(tmp_path / "state.json")
        steps = {"prune": study.prune, "more": study.more, "finished": study.finished}
        queue.execute([], queue.make_workers(1), state, tmp_path, say=[].append, **steps)
        seen.append({name: one["status"] for name, one in state.runs.items()})
    assert len({name.partition("/")[0] for name in seen[0]}) == 2
    assert len({name.partition("/")[0] for name in seen[1]}) == 4
    assert seen[1] == seen[2]  # nothing is left to try
    assert study.study.best_trial.params == {"rl.optimizer.lr": "0.0003"}
    assert "pruned" in seen[1].values()
    assert "not among the best at step" in next(one["reason"] for one in state.runs.values() if one["status"] == "pruned")


def test_the_remaining_time_is_that_of_the_slowest_run_and_of_those_that_wait(tmp_path):
    runs = [SweepRun(f"{n}/seed0", n, 0, (), tmp_path / n, {"phases": ("rl",), "rl": {"steps": 10}}) for n in "abcd"]
    state = queue.State(tmp_path / "state.json")
    for run in runs:
        state.of(run)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text(json.dumps({"step": 4, "phase": "rl", "time/step_s": 2.0}) + "\n")
    running = [queue.Running(runs[1], None, None, None, 0, 0.0)]
    state.set(runs[1], status="running")
    assert progress.remaining_s(running, runs, state, 2) is None  # nothing is known of those that wait
    state.set(runs[0], status="done", seconds=30.0)
    assert progress.remaining_s(running, runs, state, 2) == 6 * 2 + 2 * 30 / 2
    assert progress.remaining_s([], runs, state, 2) is None
