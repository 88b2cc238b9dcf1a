"""Sweeps whose runs are jobs of an engine, against stand-ins for its programs."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from runs import HANG_S, ROOT, written

from jaxreason.launch import shell
from jaxreason.launch.fleets import ENGINES
from jaxreason.sweep import fleet, queue
from jaxreason.sweep.fleet import Fleet, hand_over
from jaxreason.sweep.runs import SweepRun

pytestmark = pytest.mark.process
PLACE = "gs://my-bucket/sweep"
ATTEMPTS = '{"runs": {"lr=1e-4/seed0": {"status": "queued", "attempts": -5, "place": "x"}}}'
OPTIONS = {
    "sky": {"type": "v5litepod-8", "spot": True},
    "xpk": {"type": "v5litepod-8", "cluster": "c"},
    "slurm": {"type": "gpu:1"},
}


@pytest.fixture
def engines(tmp_path, monkeypatch):
    """Put the stand-ins on PATH; return their folder."""
    folder, programs = tmp_path / "fleet", tmp_path / "bin"
    for path in (folder, programs):
        path.mkdir()
    for name in ("sky", "xpk", "sbatch", "squeue", "gcloud"):
        (programs / name).write_text(f'#!/bin/bash\nexec {sys.executable} {ROOT / "tests" / "fake_engines.py"} {name} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_FLEET", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def plan(engines, **what):
    (engines / "plan.json").write_text(json.dumps(what))


def set_jobs(engines, *states):
    """Set the states of jobs in the order of their submission."""
    known = json.loads((engines / "jobs.json").read_text())
    (engines / "jobs.json").write_text(json.dumps(known | dict(zip(known, states))))


def calls(engines):
    return [json.loads(line) for line in (engines / "calls.jsonl").read_text().splitlines()]


def submissions(engines):
    return [words for words in calls(engines) if "launch" in words or "create" in words or words[0] == "sbatch"]


class Made:
    """A sweep of two arms with two seeds."""

    def __init__(self, folder, engine, place=PLACE):
        self.folder, self.said, self.engine = folder, [], engine
        config = {"phases": ["rl"], "rl": {"steps": 3}}
        for seed in (0, 1):
            for arm in ("lr=1e-4", "lr=it's $(HOME)"):
                name = arm if arm == "lr=1e-4" else "lr=x-12345678"
                words = ("--config=configs/tiny.py:smoke", f"--config.rl.optimizer.{arm}", f"--config.seed={seed}")
                runs = folder / "runs" / name / f"seed{seed}"
                self.runs = [*getattr(self, "runs", []), SweepRun(f"{name}/seed{seed}", name, seed, words, runs, config)]
        fields = OPTIONS[engine] | {"root": str(ROOT)}
        self.fleet = Fleet(ENGINES[engine], folder.name, folder, place, fields, shell.real(), self.said.append)

    def __call__(self, **more):
        self.said.clear()
        self.folder.mkdir(exist_ok=True)
        state = queue.State(self.folder / "state.json")
        hand_over(self.runs, state, self.fleet, **more)
        return [state.of(run)["status"] for run in self.runs]


def finish(engines, *names, place="sweep"):
    """Write the folders of runs that are done into the bucket."""
    for name in names:
        folder = engines / "bucket" / "my-bucket" / place / "runs" / name
        (folder / "checkpoints" / "3").mkdir(parents=True)
        (folder / "checkpoints" / "3" / "big").touch()
        (folder / "lock").touch()
        (folder / "summary.json").write_text('{"done": true}')


@pytest.mark.parametrize("engine", ["sky", "xpk"])
def test_runs_are_handed_over_once_and_collected(engines, tmp_path, engine):
    made = Made(tmp_path / "mine", engine)
    assert made() == ["queued"] * 4
    assert len(submissions(engines)) == 4
    names = list(json.loads((engines / "jobs.json").read_text()))
    assert len(set(names)) == 4
    assert all(name.startswith("mine-lr-") and len(name) <= 40 for name in names)
    stops = (tmp_path / "mine" / "jobs" / "stop.sh").read_text().splitlines()
    assert [stop.split("=")[-1].split()[-1] for stop in stops] == names
    assert "4 jobs run, or wait, and may cost money" in made.said[-3]

    set_jobs(engines, "runs", "ended", "ended", "waits")
    finish(engines, "lr=1e-4/seed0", "lr=x-12345678/seed0")
    (engines / "bucket/my-bucket/sweep/runs/lr=1e-4/seed0/summary.json").write_text('{"done": false}')
    assert made() == ["running", "done", "failed", "queued"]
    assert len(submissions(engines)) == 4
    failed = json.loads((tmp_path / "mine" / "state.json").read_text())["runs"]["lr=1e-4/seed1"]
    assert failed["reason"] == f"job {names[2]} ended before the run did; --retries=1 submits it again"
    assert failed["reason"] in made.said[1]
    assert not list((tmp_path / "mine").rglob("checkpoints"))
    assert not list((tmp_path / "mine").rglob("lock"))

    assert made() == ["running", "done", "failed", "queued"]
    assert made(retries=1) == ["running", "done", "queued", "queued"]
    assert len(submissions(engines)) == 5
    set_jobs(engines, "ended", "ended", "ended", "ended", "ended")
    finish(engines, "lr=1e-4/seed1", "lr=x-12345678/seed1")
    (engines / "bucket/my-bucket/sweep/runs/lr=1e-4/seed0/summary.json").write_text('{"done": true}')
    assert made() == ["done"] * 4
    assert not (tmp_path / "mine" / "jobs" / "stop.sh").exists()
    assert made.said == ["4 runs: 4 done"]


def test_a_run_that_ends_between_two_questions_is_not_failed(engines, tmp_path):
    made = Made(tmp_path / "mine", "sky")
    made(workers=1)
    finish(engines, "lr=1e-4/seed0")
    summary = engines / "bucket/my-bucket/sweep/runs/lr=1e-4/seed0/summary.json"
    summary.unlink()
    set_jobs(engines, "runs")

    def run(words):
        result = shell.run(words)
        if words[0] in ("gcloud", "sky") and not summary.exists():
            summary.write_text('{"done": true}')
            set_jobs(engines, "ended")
        return result

    made.fleet = made.fleet._replace(shell=shell.Shell(run, run))
    assert made(workers=1) == ["done", "queued", "waiting", "waiting"]


def test_slurm_writes_into_the_folder_of_the_sweep(engines, tmp_path):
    made = Made(tmp_path / "mine", "slurm", "")
    assert made() == ["queued"] * 4
    texts = [path.read_text() for path in (tmp_path / "mine" / "jobs").glob("*.sbatch")]
    assert sum(f"--workdir={tmp_path}/mine/runs/lr=1e-4/seed0 " in text for text in texts) == 1
    for run in made.runs:
        run.folder.mkdir(parents=True)
        (run.folder / "summary.json").write_text('{"done": true}')
    assert made() == ["done"] * 4
    assert not any(words[0] == "gcloud" for words in calls(engines))


def test_no_more_than_some_at_a_time(engines, tmp_path):
    made = Made(tmp_path / "mine", "sky")
    assert made(workers=2) == ["queued", "queued", "waiting", "waiting"]
    set_jobs(engines, "runs", "ended")
    finish(engines, "lr=x-12345678/seed0")
    assert made(workers=2) == ["running", "done", "queued", "waiting"]


@pytest.mark.parametrize("engine", ["sky", "xpk", "slurm"])
def test_a_refused_job_stops_the_others(engines, tmp_path, engine):
    made = Made(tmp_path / "mine", engine, "" if engine == "slurm" else PLACE)
    plan(engines, submit="Quota exceeded in us-west4", after=1)
    with pytest.raises(ValueError) as error:
        made()
    cause = "[XPK] Error" if engine == "xpk" else "Error"
    assert str(error.value).startswith(f"lr=x-12345678/seed0 could not be submitted: {cause}: Quota exceeded in us-west4; ")
    assert made.said[1] == "4 runs: 1 queued, 3 waiting"
    plan(engines)
    assert made() == ["queued"] * 4


def test_a_job_on_its_way_is_not_submitted_twice(engines, tmp_path, monkeypatch):
    """The stand-in takes the job and does not answer."""
    made = Made(tmp_path / "mine", "sky")
    plan(engines, hang=True)
    quick = shell.Shell(lambda words: shell.run(words, timeout_s=2.0), shell.run)
    made.fleet = made.fleet._replace(shell=quick)
    with pytest.raises(ValueError, match="sky did not end in 2 s; the same command asks SkyPilot whether it has the job mine-lr"):
        made()
    assert made.said[0] == "4 runs: 1 submitting, 3 waiting"
    plan(engines)
    assert made() == ["queued"] * 4
    assert len(submissions(engines)) == 4
    plan(engines, hang=True)  # lost before the engine had it
    (engines / "jobs.json").unlink()
    state = json.loads((tmp_path / "mine" / "state.json").read_text())
    state["runs"]["lr=1e-4/seed0"]["status"] = "submitting"
    (tmp_path / "mine" / "state.json").write_text(json.dumps(state))
    plan(engines)
    assert made() == ["queued", "failed", "failed", "failed"]


@pytest.mark.parametrize("engine", ["sky", "xpk", "slurm"])
def test_a_job_that_was_taken_before_the_error_is_not_submitted_twice(engines, tmp_path, engine):
    made = Made(tmp_path / "mine", engine, "" if engine == "slurm" else PLACE)
    plan(engines, taken="Socket timed out")
    assert made() == ["queued"] * 4
    assert any("although" in line and "Socket timed out" in line for line in made.said)
    assert made() == ["queued"] * 4
    assert len(submissions(engines)) == 4
    plan(engines, taken="Socket timed out", listing="no network")
    (tmp_path / "other").mkdir()
    other = Made(tmp_path / "other", engine, "" if engine == "slurm" else PLACE)
    with pytest.raises(ValueError, match="does not list its jobs"):
        other()


def test_jobs_are_found_without_the_file_of_states(engines, tmp_path):
    made = Made(tmp_path / "mine", "sky")
    made()
    (tmp_path / "mine" / "state.json").unlink()
    set_jobs(engines, "runs")
    assert made() == ["running", "queued", "queued", "queued"]
    assert len(submissions(engines)) == 4


@pytest.mark.parametrize(
    "text", [None, "", "[]", '{"runs": []}', '{"runs": {"lr=1e-4/seed0": {"status": 3}}}', ATTEMPTS, '{"runs": {']
)
def test_second_jobs_and_runs_that_are_done_are_found_without_states(engines, tmp_path, text):
    made, file = Made(tmp_path / "mine", "sky"), tmp_path / "mine" / "state.json"
    made()
    set_jobs(engines, "ended", "ended", "ended", "ended")
    finish(engines, "lr=x-12345678/seed1")
    assert made(retries=1) == ["queued", "queued", "queued", "done"]
    shutil.rmtree(made.runs[3].folder)
    file.unlink() if text is None else file.write_text(text)
    assert made() == ["queued", "queued", "queued", "done"]
    assert [state["attempts"] for state in json.loads(file.read_text())["runs"].values()] == [2, 2, 2, 0]
    assert len(submissions(engines)) == 7


def test_runs_of_another_sweep_at_the_place_are_refused(engines, tmp_path):
    made = Made(tmp_path / "mine", "sky")
    finish(engines, "lr=1e-4/seed0")
    other = {"phases": ["rl"], "rl": {"steps": 5}}
    (engines / "bucket/my-bucket/sweep/runs/lr=1e-4/seed0/config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"another config .*from gs://my-bucket/sweep: choose a --place of this sweep alone"):
        made()
    assert not submissions(engines)


@pytest.mark.parametrize("what", ["listing", "rsync", "gone", "no gcloud"])
def test_nothing_is_submitted_or_failed_without_an_answer(engines, tmp_path, what):
    made = Made(tmp_path / "mine", "sky")
    made(workers=1)
    set_jobs(engines, "ended")
    if what in ("listing", "rsync"):
        plan(engines, **{what: "no network"})
    missing = {"gone": "sky", "no gcloud": "gcloud"}.get(what)

    def run(words):
        return shell.Result(127, "", f"{missing}: not installed") if words[0] == missing else shell.run(words)

    made.fleet = made.fleet._replace(shell=shell.Shell(run, run))
    said = {
        "listing": "SkyPilot does not list its jobs",
        "rsync": "could not be copied here",
        "gone": "sky: not installed; needed:",
    }
    with pytest.raises(ValueError, match=said.get(what, "gcloud is not installed")):
        made()
    assert len(submissions(engines)) == 1
    assert json.loads((tmp_path / "mine" / "state.json").read_text())["runs"]["lr=1e-4/seed0"]["status"] == "queued"


def test_skypilot_without_a_controller_has_no_jobs(engines, tmp_path):
    made = Made(tmp_path / "mine", "sky")
    plan(engines, listing="sky.exceptions.ClusterNotUpError: No in-progress managed jobs.")
    assert made() == ["queued"] * 4


def test_runs_are_in_one_place(engines, tmp_path):
    made = Made(tmp_path / "mine", "sky")
    made()
    made.fleet = made.fleet._replace(place="gs://my-bucket/other")
    with pytest.raises(ValueError, match=r"has a job of --engine=sky --place=gs://my-bucket/sweep; allowed: the same flags"):
        made()
    with pytest.raises(ValueError, match=r"has a job of --engine=sky --place=gs://my-bucket/sweep; allowed: the same flags"):
        fleet.check_none_handed_over(tmp_path / "mine")


def test_ctrl_c_says_what_runs(engines, tmp_path):
    made = Made(tmp_path / "mine", "sky")
    taken = []

    def interrupted(words):
        result = shell.run(words)
        taken.append(words)
        if len(taken) == 3:  # the copy, and two jobs
            raise KeyboardInterrupt
        return result

    made.fleet = made.fleet._replace(shell=shell.Shell(interrupted, shell.run))
    with pytest.raises(KeyboardInterrupt):
        made()
    text = "\n".join(made.said)
    assert "stopped here; jobs that were submitted run on" in text
    assert "4 runs: 1 queued, 1 submitting, 2 waiting" in text
    assert "to stop all:\n  bash mine/jobs/stop.sh" in text
    assert len((tmp_path / "mine" / "jobs" / "stop.sh").read_text().splitlines()) == 2
    made.fleet = made.fleet._replace(shell=shell.real())
    assert made() == ["queued"] * 4
    assert len(submissions(engines)) == 4


# --- the command ---


def sweep(*words):
    made = [sys.executable, "-m", "jaxreason.sweep", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(made, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_S)


ASK = ("--config=configs/tiny.py:smoke", "--grid=rl.objective.name=rloo,grpo; seed=0")
SKY = ("--engine=sky", f"--place={PLACE}", "--engine_options=type=v5litepod-8,spot=true")


def test_a_sweep_is_handed_over_and_reported(engines, tmp_path):
    folder = f"--folder={tmp_path}/mine"
    done = sweep(*ASK, *SKY, folder, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "to be submitted to SkyPilot" in done.stdout
    assert done.stdout.count("sky jobs launch --yes --detach-run") == 2
    assert "phases that runs share (1) are trained by each of them" in done.stdout
    assert not (engines / "calls.jsonl").exists()
    again = sweep(*ASK, *SKY, f"--folder={tmp_path}/other", "--dry_run")  # jobs are named after the place
    assert re.findall(r"[\w-]+\.yaml", again.stdout) == re.findall(r"[\w-]+\.yaml", done.stdout)
    done = sweep(*ASK, *SKY, folder)
    assert done.returncode == 0, done.stderr
    assert "2 runs: 2 queued" in done.stdout
    refused = sweep(*ASK, folder)
    assert refused.returncode == 1
    assert "has a job of --engine=sky" in refused.stderr
    written(tmp_path / "there", {"rl.objective.name=rloo": (0.5,), "rl.objective.name=grpo": (0.6,)})
    shutil.copytree(tmp_path / "there" / "runs", engines / "bucket" / "my-bucket" / "sweep" / "runs")
    shutil.rmtree(engines / "bucket/my-bucket/sweep/runs/rl.objective.name=grpo")
    set_jobs(engines, "ended", "ended")
    done = sweep(*ASK, *SKY, folder, "--nofigures")
    assert done.returncode == 1  # a run failed
    assert "2 runs: 1 done, 1 failed" in done.stdout
    assert "| rl.objective.name=rloo | 1 | 0.500 |" in done.stdout
    assert "ended before the run did; --retries=1 submits it again" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine=sky"], "--engine_options has no type"),
        (["--engine=sky", SKY[2]], "--engine=sky needs --place=gs://BUCKET/FOLDER"),
        ([*SKY, "--search=tpe"], "got --search with --engine=sky; allowed: with --engine=slurm --follow"),
        ([*SKY, "--share"], "got --share with --engine=sky"),
        ([*SKY, "--budget=steps=5"], "got --budget with --engine=sky"),
        (["--engine=sky", "--follow"], "got --follow with --engine=sky"),
        ([*SKY, "--follow"], "got --place; allowed: with --engine, without --follow"),
        (["--engine=local"], "got --engine=local; allowed: --engine=local --follow"),
        (["--place=gs://my-bucket/x"], "got --place"),
        (["--submit=slurm", "--engine=slurm"], "got --submit and --engine; allowed: --engine=slurm --follow"),
        ([*SKY, "--place=my-bucket"], "--place got 'my-bucket'"),
        (["--engine=slurm", "--engine_options=type=gpu:1,partition=a b"], "--partition got 'a b'"),
    ],
)
def test_bad_flags_are_one_line(words, said, tmp_path):
    done = sweep(*ASK, *words, f"--folder={tmp_path}/mine")
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.strip().count("\n") == 0
