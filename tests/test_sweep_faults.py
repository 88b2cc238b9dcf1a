"""Sweeps in bad circumstances: damaged files, edited configs, names that no file may
have, devices named in unusual ways, jobs that are stopped.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs import SMOKE, pretend, whole_checkpoint

from jaxreason.sweep import Sweep, __main__, arms, jobs, over, progress, queue
from jaxreason.sweep.runs import SweepRun, begin_with_shared, make_runs

OBJECTIVES = over("rl.objective.name", ["rloo", "grpo"])


@pytest.mark.parametrize("text", ["t=don't; seed=0..4", "a=)x,y; b=1", "a=(1,2; b=3", 'a="x', "a=([1,2),3]"])
def test_a_quote_or_bracket_without_partner_does_not_swallow_the_grid(text):
    with pytest.raises(ValueError, match="that has no partner"):
        arms.parse_grid(text)


@pytest.mark.parametrize("text", ["a=1,", "a=1,,2", "a=,1"])
def test_a_comma_too_many_makes_no_arm(text):
    with pytest.raises(ValueError, match="--grid has an empty value"):
        arms.parse_grid(text)
    assert arms.parse_grid("a='',1")[0] == [{"a": ""}, {"a": "1"}]
    assert arms.parse_grid('a="don\'t",it')[0] == [{"a": "don't"}, {"a": "it"}]


def test_names_fit_into_the_bytes_of_a_file_name(tmp_path):
    named = [arms.name_of({"text": char * n}) for char in "a漢" for n in (90, 400)]
    assert len(set(named)) == 4
    for name in named:
        (tmp_path / f"{name},seed12345.log").touch()
    with pytest.raises(ValueError, match=r"arm named 漢+\.\.\., 300 bytes; allowed: 200"):
        arms.named_arms(Sweep("c", [{}], names=("漢" * 100,)))


def test_seeds_are_said_once(monkeypatch):
    flags = {"experiment": None, "grid": "a=1; seed=0..2", "seeds": 5, "metric": None}
    monkeypatch.setattr(__main__, "FLAGS", type("Flags", (), flags))
    with pytest.raises(ValueError, match="--seeds=5 and a --grid with seed="):
        __main__.read_sweep(__main__.command.Words(SMOKE, {}, []))


@pytest.mark.parametrize("flag", __main__.OF_A_SEARCH)
def test_a_flag_of_a_search_is_refused_without_one(flag):
    with pytest.raises(ValueError, match=f"got --{flag} without --search"):
        __main__.check_search([flag], None)
    __main__.check_search([flag], "tpe")


def test_an_experiment_that_is_no_file_is_not_called_a_config():
    with pytest.raises(
        ValueError, match=r"--experiment got 'nope\.py', which is no file; allowed: a Python file with sweep\(arg\)"
    ):
        __main__.read_experiment("nope.py:quick", {})


# --- damaged and edited files ---


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"runs": []}', '{"runs": {"a/seed0": 3}}', '{"runs": {"a/seed0": {}}}', '{"runs": {"a/seed0": null}}'],
)
def test_a_damaged_state_is_made_anew(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    run = SweepRun("a/seed0", "a", 0, (), tmp_path / "a", {})
    state = queue.State(tmp_path / "state.json")
    assert queue.add_runs([run], state, lambda *_: None) == [run]
    assert queue.read_states(tmp_path / "state.json") == {"a/seed0": {"status": "waiting", "attempts": 0}}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": "c", "common": {}, "arms": {}, "seeds": []}'])
def test_a_damaged_definition_is_not_written_over(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match=r"sweep.json is damaged; bring it back"):
        __main__.write_definition(tmp_path, {"config": "c", "common": {}, "arms": {"base": {}}, "seeds": [0]})
    assert (tmp_path / "sweep.json").read_text() == text


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*state\.json'"):
        queue.State(tmp_path / "state.json").set(SweepRun("a/seed0", "a", 0, (), tmp_path, {}), status="done")


def test_a_reward_that_is_not_finite_does_not_end_the_table(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "phase": "rl", "rollout/reward": null}\n')
    run = SweepRun("a/seed0", "a", 0, (), tmp_path, {"phases": ("rl",), "rl": {"steps": 9}})
    assert progress.cell(run, {"status": "running"}, "x") == "rl 3/9"


def record(run, done=False, **changes):
    """Make the folder that a run leaves."""
    run.folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(run.config, default=list))
    for field, value in changes.items():
        section, _, name = field.rpartition("__")
        (config[section] if section else config)[name] = value
    (run.folder / "config.json").write_text(json.dumps(config | {"revisions": {}}))
    (run.folder / "summary.json").write_text(json.dumps({"done": done}))


@pytest.mark.parametrize("done", [True, False])
def test_a_config_file_that_was_edited_is_not_mixed_with_what_it_was(tmp_path, done):
    """Results of both would be compared as if the arms differed in their names alone."""
    sweep = Sweep(SMOKE, OBJECTIVES, seeds=(0,))
    first, second = make_runs(sweep, tmp_path, share=False)
    record(first, done=done, log__watts=3)  # changes no result
    assert len(make_runs(sweep, tmp_path, share=False)) == 2
    record(second, done=done, rl__steps=7)
    with pytest.raises(ValueError, match=r"grpo/seed0 has a run of another config \(rl.steps: 7 there, 2 here\)"):
        make_runs(sweep, tmp_path, share=False)
    record(second, done=done, evaluate__final_n=9)
    if done:
        with pytest.raises(ValueError, match=r"evaluate.final_n: 9 there, 8 here"):
            make_runs(sweep, tmp_path, share=False)
    else:
        assert len(make_runs(sweep, tmp_path, share=False)) == 2


def test_a_report_needs_no_config_file(tmp_path):
    """The folder may be on another machine, or the config may have moved."""
    (run,) = make_runs(Sweep(SMOKE, [{}], seeds=(3,)), tmp_path)
    record(run, done=True)
    known = {"config": "elsewhere.py", "common": {}, "arms": {"lost": {}, "base": {}}, "seeds": [0, 3]}
    assert list(__main__.recorded_config(tmp_path, known)["evaluate"]["suites"]) == ["chain", "chain_ood"]
    with pytest.raises(ValueError, match=r"no config file 'elsewhere.py'"):
        __main__.recorded_config(tmp_path / "empty", known)


# --- shared phases ---


def shared_names(folder, machine="", sweep=None):
    runs = make_runs(sweep or Sweep(SMOKE, OBJECTIVES, seeds=(0,)), folder, machine=machine)
    return [run.name for run in runs if run.stop_after]


def test_phases_are_shared_only_by_runs_that_compute_the_same(tmp_path, monkeypatch):
    folder = tmp_path / "config"
    folder.mkdir()
    shutil.copy(SMOKE.partition(":")[0], folder / "mine.py")
    data = folder / "weights"
    data.mkdir()
    (data / "a").write_text("a")
    sweep = Sweep(f"{folder / 'mine.py'}:smoke", OBJECTIVES, seeds=(0,), common={"init_from": str(data)})
    seen = [shared_names(tmp_path, sweep=sweep), shared_names(tmp_path, "1 gpu", sweep)]
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    seen.append(shared_names(tmp_path, sweep=sweep))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")  # changes no numbers
    assert shared_names(tmp_path, sweep=sweep) == seen[-1]
    (data / "b").write_text("other weights")
    seen.append(shared_names(tmp_path, sweep=sweep))
    (folder / "module.py").write_text("x = 1\n")
    seen.append(shared_names(tmp_path, sweep=sweep))
    (folder / ".#mine.py").symlink_to("user@host.1234")  # the lock of an editor
    assert shared_names(tmp_path, sweep=sweep) == seen[-1]
    assert len({name for names in seen for name in names}) == len(seen)


def test_nothing_is_trained_for_runs_that_have_begun(tmp_path, monkeypatch):
    """After a change of the code, say, which gives shared phases another address."""
    sweep = Sweep(SMOKE, OBJECTIVES, seeds=(0,))
    assert len(shared_names(tmp_path)) == 1
    for run in make_runs(sweep, tmp_path, share=False):
        record(run, done=True)
    assert not shared_names(tmp_path)
    assert not shared_names(tmp_path, sweep=Sweep(SMOKE, [*OBJECTIVES, {"rl.objective.name": "dapo"}], seeds=(0,)))


@pytest.mark.parametrize("broken", ["checkpoint", "config"])
def test_a_run_begins_by_itself_if_its_shared_folder_is_broken(tmp_path, broken):
    whole_checkpoint(tmp_path / "trunk", 4)
    if broken == "checkpoint":
        (tmp_path / "trunk" / "config.json").write_text("{}")
        (tmp_path / "trunk" / "checkpoints" / "4" / "state" / "_METADATA").unlink()
    begin_with_shared(SweepRun("a/seed0", "a", 0, (), tmp_path / "run", {"phases": ["a", "b"]}, shared=tmp_path / "trunk"))
    assert not (tmp_path / "run").exists()


# --- devices ---


@pytest.mark.parametrize(
    ("visible", "platforms", "expected"),
    [
        ("GPU-8f6b,GPU-9c", "", ["GPU-8f6b", "GPU-9c"]),
        ("MIG-0a/1/2", "", ["MIG-0a/1/2"]),
        ("0, 1", "", ["0", "1"]),
        ("0,-1,1", "", ["0"]),
        ("2,3", "cuda,cpu", ["2", "3"]),
        ("2,3", "cpu", None),
        ("NoDevFiles", "", None),
        ("", "", None),
    ],
)
def test_accelerators_are_found_as_cuda_and_jax_name_them(monkeypatch, visible, platforms, expected):
    """A machine's GPUs must not be passed over for its cores in silence."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(queue.glob, "glob", lambda pattern: [])
    if expected is None:
        assert {worker.environment["JAX_PLATFORMS"] for worker in queue.make_workers(None)} == {"cpu"}
    else:
        assert [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in queue.make_workers(None)] == expected


# --- the queue ---


def test_a_pruned_run_stays_pruned_when_the_sweep_is_stopped(tmp_path, monkeypatch):
    count = iter(range(100))
    states, _ = pretend(tmp_path, monkeypatch, ["sleeps"], prune=lambda run: "too slow", stopped=lambda: next(count) > 0)
    assert states[0]["status"] == "pruned"


def test_each_run_records_the_code_that_it_began_with(tmp_path, monkeypatch):
    versions = iter("ab")
    states, _ = pretend(tmp_path, monkeypatch, ["ends", "ends"], provenance=lambda: {"code": next(versions)})
    assert [state["code"] for state in states] == ["a", "b"]


def test_a_run_that_ended_without_its_checkpoint_says_why():
    lines = ["warning: the save of step 4 failed: No space left on device", "stopped after step 4"]
    assert queue.how_it_ended(0, lines) == f"exit 0: {lines[0]}"
    assert queue.how_it_ended(1, lines) == "exit 1: stopped after step 4"


def test_the_version_of_the_code_has_files_that_git_does_not_know(tmp_path, monkeypatch):
    (tmp_path / "jaxreason" / "sweep").mkdir(parents=True)
    (tmp_path / "jaxreason" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(__main__, "__file__", str(tmp_path / "jaxreason" / "sweep" / "__main__.py"))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "jaxreason"], ["commit", "-q", "--no-verify", "-m", "x"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    clean = __main__.provenance(folder)["code"]
    (tmp_path / "jaxreason" / "new.py").write_bytes(b"y = 'caf\xe9'\n")
    new = __main__.provenance(folder)["code"]
    assert new.startswith(f"{clean}-")
    assert "+y = 'caf" in (folder / f"{new}.diff").read_text()
    monkeypatch.setenv("PATH", "")  # no git
    assert __main__.provenance(folder)["commit"] == ""


SAVES = """
import os, signal, sys, time
asked = []
def ask(*_):
    if asked: os._exit(3)  # as a run does at a second signal
    asked.append(1)
signal.signal(signal.SIGTERM, ask)
open(sys.argv[1] + '/ready', 'w').close()
while not asked: time.sleep(0.1)
time.sleep(2)
open(sys.argv[1] + '/saved', 'w').close()
"""


@pytest.mark.process
def test_jobs_that_are_stopped_save_their_runs(tmp_path, monkeypatch):
    """One second is all that submitit's `cancel` leaves to a local job."""
    pytest.importorskip("submitit")
    run = SweepRun("a/seed0", "a", 0, (), tmp_path / "a", {})
    run.folder.mkdir()
    monkeypatch.setattr(SweepRun, "command", lambda run: ["-c", SAVES, str(run.folder)])
    state = queue.State(tmp_path / "state.json")
    launch = jobs.Jobs("local", tmp_path, {"timeout_min": 5})
    ready = (run.folder / "ready").exists
    queue.execute([run], queue.make_workers(1), state, tmp_path, say=[].append, stopped=ready, launch=launch)
    assert state.of(run)["status"] == "stopped"
    assert (run.folder / "saved").exists()


@pytest.mark.process
@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_a_job_asks_its_run_once_to_save_itself(tmp_path, monkeypatch, executor):
    """Slurm signals the run as well as the job; a second SIGTERM would end it at once."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", executor)
    made = []

    class Process:
        def __init__(self, *_, **__):
            made.append(self)
            self.got = []

        def send_signal(self, number):
            self.got.append(number)

        def wait(self):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0)
            return 7

    monkeypatch.setattr(jobs.subprocess, "Popen", Process)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        assert jobs.execute(["-m", "x"], str(tmp_path / "log"), str(Path.cwd()), {}) == 7
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert made[0].got == [signal.SIGTERM] * (2 if executor == "local" else 1)
