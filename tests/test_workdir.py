"""The folder of a run: who may continue in it, with which config, and how a run that is
asked to stop ends.
"""

import http.server
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from runs import ROOT, Killed, killed_after, load_config, maths, params_of, read_lines, run_config, xla_flags

from jaxreason.build.layout import VERSION
from jaxreason.main import config_text
from jaxreason.runtime import checkpoint, files, preemption, resume, workdir
from jaxreason.runtime import log as run_log


@pytest.fixture
def folder(tmp_path):
    """Make the folder of a run that was stopped at step 40."""
    (tmp_path / "config.json").write_text(config_text(load_config("tiny", "smoke")))
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    return tmp_path


def check(folder, changes=(), said=None, resume="auto", accept=False):
    text = config_text(load_config("tiny", "smoke", **dict(changes)))
    say = [].append if said is None else said.append
    workdir.check(folder, text, resume=resume, accept_config_change=accept, say=say)


HARMLESS = "checkpoint.every_steps log.rollouts_kept evaluate.n sharding.mesh.data sampler.slots rl.microbatches prior.log_every"
MATHS = "rl.optimizer.warmup_steps seed rl.steps model.layers rl.source.group sampler.max_tokens"


@pytest.mark.parametrize("field", HARMLESS.split())
def test_a_change_that_leaves_the_maths_alone_is_said_and_goes_on(folder, field):
    said = []
    check(folder, {field: 3}, said)
    (line,) = said
    assert line.startswith(f"config changed: {field}: ")
    assert line.endswith("there, 3 here")


@pytest.mark.parametrize("field", MATHS.split())
def test_a_change_of_the_maths_is_refused_unless_accepted(folder, field):
    with pytest.raises(ValueError, match=rf"another config \({field}: .* there, 7 here\).*--accept_config_change") as caught:
        check(folder, {field: 7})
    assert "\n" not in str(caught.value)
    said = []
    check(folder, {field: 7}, said, accept=True)
    assert said[0].startswith(f"config changed: {field}")


def test_fewer_steps_than_a_run_has_made_are_refused(folder):
    """This used to look like a full disk, after the sampler was compiled and the new
    config written.
    """
    for item, name, text in (("host", "metadata", '{"host": {}}'), ("state", "_METADATA", "{}")):
        (folder / "checkpoints" / "40" / item).mkdir()
        (folder / "checkpoints" / "40" / item / name).write_text(text)
    with pytest.raises(ValueError, match=r"checkpoint of step 40, and the phases have 39 steps in all; raise the steps"):
        workdir.check_steps(folder, 39)
    workdir.check_steps(folder, 40)
    workdir.check_steps(folder / "new", 0)


def test_resume_never_auto_and_must(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    for mode in ("auto", "must", "never"):
        check(folder, resume=mode)
    for mode in ("auto", "never"):
        check(empty, resume=mode)
    with pytest.raises(ValueError, match="holds no checkpoint, and --resume=must"):
        check(empty, resume="must")


@pytest.mark.process
def test_one_run_at_a_time_and_a_dead_one_is_explained(tmp_path):
    hold = """
import pathlib, sys
from jaxreason.runtime.workdir import lock
lock(pathlib.Path(sys.argv[1]), print)
print("has it", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", hold, str(tmp_path)]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "has it\n"
    with pytest.raises(ValueError, match=rf"is in use by host .*, pid {other.pid}, since .*; wait for it or stop it"):
        workdir.lock(tmp_path, print)
    other.kill()
    other.communicate()
    said = []
    give_back = workdir.lock(tmp_path, said.append)
    assert f"pid {other.pid}" in said[0]
    assert "has died" in said[0]
    give_back()
    said.clear()
    workdir.lock(tmp_path, said.append)()
    assert said == []


@pytest.mark.parametrize("clock", ["runs", "goes back", "stands still"])
def test_a_lock_of_another_host_is_watched(tmp_path, monkeypatch, clock):
    """Its run is alive if the lock is touched, whatever time that host's clock
    shows.
    """
    monkeypatch.setattr(workdir, "BEAT_S", 0.2)
    (tmp_path / "lock").write_text("host elsewhere, pid 7, since 2026-01-01 00:00:00\n")
    alive, ended = clock != "stands still", threading.Event()

    def beat():
        for i in range(1000):
            if ended.wait(0.1) or not alive:
                return
            os.utime(tmp_path / "lock", None if clock == "runs" else (1e9 - 3600 * i, 1e9 - 3600 * i))

    thread = threading.Thread(target=beat)
    thread.start()
    said = []
    if alive:
        with pytest.raises(ValueError, match="is in use by host elsewhere, pid 7"):
            workdir.lock(tmp_path, said.append)
    else:
        workdir.lock(tmp_path, said.append)()
        assert "host elsewhere, pid 7" in said[1]
    ended.set()
    thread.join()
    assert "watching" in said[0]


@pytest.mark.slow
@pytest.mark.process
def test_a_clock_that_is_set_back_changes_nothing(tmp_path, monkeypatch):
    """The clock goes back an hour at every line of metrics, in the killed run and in
    its continuation; files have the times that it gave.
    """
    config = load_config("tiny", "smoke", **{"phases": ("prior",), "prior.steps": 8, "prior.log_every": 1})
    config.evaluate.suites, config.checkpoint.every_steps = {}, 2
    run_config(config, tmp_path / "whole")

    behind_s, now, now_ns, write, newest, found = [0], time.time, time.time_ns, run_log.RunLog.write, resume.find_newest, []

    def set_back(*args, **kwargs):
        behind_s[0] += 3600
        write(*args, **kwargs)

    monkeypatch.setattr(time, "time", lambda: now() - behind_s[0])
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() - behind_s[0] * 10**9)
    monkeypatch.setattr(run_log.RunLog, "write", set_back)
    monkeypatch.setattr(resume, "find_newest", lambda *args: found.append(newest(*args)) or found[-1])
    with monkeypatch.context() as patch:
        killed_after(patch, saves=3)
        with pytest.raises(Killed):
            run_config(config, tmp_path / "back")
    checkpoints = tmp_path / "back" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["4", "6"]
    for age_s, step in ((0, "4"), (86400, "6")):
        for path in (checkpoints / step, *(checkpoints / step).rglob("*")):
            os.utime(path, (now() - age_s, now() - age_s))
    summary = run_config(config, tmp_path / "back")

    assert found[1].step == 6
    assert sorted(path.name for path in checkpoints.iterdir()) == ["6", "8"]
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "back")[1], params_of(tmp_path / "whole")[1])
    assert maths(tmp_path / "back") == maths(tmp_path / "whole")
    lines = read_lines(tmp_path / "back" / "metrics.jsonl")
    times_s = [line["time_s"] for line in lines]
    assert times_s[0] > 0
    assert times_s == sorted(times_s)
    spent = [line[name] for line in lines for name in line if name.startswith("time/") and name.endswith(("learn_s", "step_s"))]
    assert min(spent) > 0
    assert times_s[-2] / 2 < summary["wall_s"] < 600


# --- folders that can't be written, or read ---

# Root reads and writes whatever it likes, unless it gives that up for what it becomes:
# drops from its bounding set (prctl 24) CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH. For
# anybody else that does nothing.
WITHOUT_RIGHTS = """
import ctypes, os, sys
for right in (1, 2):
    ctypes.CDLL(None).prctl(24, right, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-m", "jaxreason.main", *sys.argv[1:]])
"""


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(
    ("shut", "mode", "message"),
    [
        (".", 0o555, "can't write to {}: Permission denied; make room or choose another workdir"),
        ("checkpoints", 0o555, "can't write to {}: Permission denied; make room or choose another workdir"),
        ("lock", 0o444, "can't write to {}; make it writable, or choose another workdir"),
        ("config.json", 0o444, "can't write to {}; make it writable, or choose another workdir"),
        ("tensorboard", 0o555, "can't write to {}; make it writable, or choose another workdir"),
        ("config.json", 0o000, "{}: Permission denied"),
    ],
)
def test_a_folder_that_is_read_only_is_one_line_before_anything_is_compiled(tmp_path, shut, mode, message):
    for name in ("checkpoints", "tensorboard"):
        (tmp_path / name).mkdir()
    (tmp_path / "lock").touch()
    config = load_config("tiny", "smoke")
    config.version = VERSION
    (tmp_path / "config.json").write_text(config_text(config))
    path = tmp_path / shut
    path.chmod(mode)
    command = [sys.executable, "-c", WITHOUT_RIGHTS, "--config=configs/tiny.py:smoke", f"--workdir={tmp_path}"]
    got = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    path.chmod(0o755)
    assert got.returncode == 1
    assert got.stderr == f"error: {message.format(path)}\n"  # and not "compiling the sampler ..."
    assert {found.name for found in tmp_path.iterdir()} == {"checkpoints", "tensorboard", "lock", "config.json"}
    assert not list((tmp_path / "checkpoints").iterdir())


# --- being stopped ---

FIELDS = ["--config.prior.steps=700", "--config.prior.log_every=7", "--config.rl.steps=1", "--config.checkpoint.every_steps=2000"]


def begin(folder, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "jaxreason.main", "--config=configs/tiny.py:smoke", f"--workdir={folder}", *FIELDS, *more],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def await_step(process, folder, step, timeout_s=240):
    deadline_s = time.time() + timeout_s
    while time.time() < deadline_s:
        lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
        if lines and json.loads(lines[-1] if lines[-1].endswith("}") else lines[-2])["step"] >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise TimeoutError


@pytest.mark.slow
@pytest.mark.process
def test_sigterm_and_ctrl_c_save_and_end_and_the_run_goes_on_as_if_nothing_had_been(tmp_path):
    """The run is stopped twice in the middle of a line of metrics that sums seven
    steps.
    """
    stopped = tmp_path / "stopped"
    for step, number, code, name in ((60, signal.SIGTERM, 0, "SIGTERM"), (200, signal.SIGINT, 130, "Ctrl-C")):
        process = begin(stopped)
        await_step(process, stopped, step)
        process.send_signal(number)
        started_s = time.time()
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert time.time() - started_s < 30
        assert f"got {name}: saving after this step" in err
        assert "Traceback" not in err
        last = (out if number == signal.SIGTERM else err).splitlines()[-1]
        assert last.startswith("stopped after step " if number == signal.SIGTERM else "interrupted; ")
        at = int(last.rsplit(" ", 1)[1])
        assert number == signal.SIGINT or last.startswith(f"stopped after step {at}; ")
        assert at >= step
        assert last.endswith(f"the same command continues from step {at}")
        assert (stopped / "checkpoints" / str(at)).is_dir()
        assert (stopped / "lock").read_text() == ""
    for folder in (stopped, tmp_path / "whole"):
        process = begin(folder, "--resume=must") if folder == stopped else begin(folder)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    jax.tree.map(np.testing.assert_array_equal, params_of(stopped)[1], params_of(tmp_path / "whole")[1])
    assert maths(stopped) == maths(tmp_path / "whole")
    assert read_lines(stopped / "rollouts.jsonl") == read_lines(tmp_path / "whole" / "rollouts.jsonl")


@pytest.mark.process
def test_a_second_sigterm_ends_at_once():
    body = """
import os, signal, sys, time
from jaxreason.runtime import preemption
with preemption.watch() as stop:
    assert not stop()
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
"""
    started_s = time.time()
    got = subprocess.run([sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True)
    assert got.returncode == 143, got.stderr
    assert time.time() - started_s < 25


def test_the_maintenance_notice_of_a_cloud_tpu_is_heard(monkeypatch):
    answers, asked = ["NONE", "NONE", "TERMINATE_ON_HOST_MAINTENANCE"], []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[len(asked) - 1].encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
    noticed = []
    preemption.await_maintenance(noticed.append, pause_s=0.5)
    server.shutdown()
    assert noticed == ["maintenance of this machine is coming (TERMINATE_ON_HOST_MAINTENANCE)"]
    assert asked == [("/computeMetadata/v1/instance/maintenance-event", "Google")] * 3


@pytest.mark.slow
@pytest.mark.process
def test_a_disk_that_is_full_fails_a_save_and_not_the_run(tmp_path):
    """A limit on file sizes simulates a full disk; it is lifted after two failed
    saves.
    """
    body = """
import resource, sys
sys.path.insert(0, "tests")
from pathlib import Path
from runs import load_config, run_config
from jaxreason.runtime import checkpoint
made = checkpoint.open_checkpoints

def limited(*args, **kwargs):
    opened = made(*args, **kwargs)
    count, save_whole = [0], opened.save
    def save(*args, **kwargs):
        count[0] += 1
        full = 2 <= count[0] <= 3
        opened.wait()
        limit = 2000 if full else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        save_whole(*args, **kwargs)
        opened.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        failure = opened.failure()
        print("SAVE", args[0], opened.steps(), failure, flush=True)
    opened.save = save
    return opened

checkpoint.open_checkpoints = limited
config = load_config("tiny", "smoke", **{"phases": ("prior",), "prior.steps": 5, "checkpoint.every_steps": 1})
run_config(config, Path(sys.argv[1]))
"""
    got = subprocess.run([sys.executable, "-c", body, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    saves = [line for line in got.stdout.splitlines() if line.startswith("SAVE")]
    assert saves[0] == "SAVE 1 [1] None"
    for line, step in zip(saves[1:3], (2, 3), strict=True):
        assert line.startswith(f"SAVE {step} [1] the save of step {step} failed: ")
        assert line.endswith("the newest checkpoint is of step 1")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]  # nothing of 2 and 3
    assert saves[3:] == ["SAVE 4 [4, 1] None", "SAVE 5 [5, 4] None"]


# --- files that can no longer be written, in the middle of a run ---

CUT = {
    "sharding.mesh.data": 1,
    "prior.steps": 3,
    "prior.log_every": 1,
    "rl.steps": 4,
    "rl.evaluate_every": 2,
    "checkpoint.every_steps": 2,
}


def cut_config():
    config = load_config("tiny", "smoke", **CUT)
    config.evaluate.suites = {"chain": config.evaluate.suites.chain.to_dict()}
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_config(cut_config(), folder)
    return folder


def assert_same(folder, whole):
    jax.tree.map(np.testing.assert_array_equal, params_of(folder)[1], params_of(whole)[1])
    assert maths(folder) == maths(whole)
    assert read_lines(folder / "rollouts.jsonl") == read_lines(whole / "rollouts.jsonl")
    found, wanted = (json.loads((each / "summary.json").read_text()) for each in (folder, whole))
    assert found["done"]
    assert found["evaluations"] == wanted["evaluations"]


def full_at(monkeypatch, owner, name, path, call):
    """Simulate a full disk at the call-th call of a function that writes a file: the
    file may grow by 40 bytes, so the text ends in mid-line.
    """
    write, calls = getattr(owner, name), [0]

    def limited(*args, **kwargs):
        calls[0] += 1
        if calls[0] != call:
            return write(*args, **kwargs)
        size = path.stat().st_size if path.suffix == ".jsonl" else 0  # a file that is not appended to is written anew
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, resource.RLIM_INFINITY))
        try:
            return write(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    monkeypatch.setattr(owner, name, limited)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(
    ("file", "owner", "name", "call"),
    [
        ("metrics.jsonl", run_log.RunLog, "write", 9),
        ("rollouts.jsonl", files, "write_rollouts", 6),
        ("summary.json", files, "write_summary", 3),
        ("summary.json", files, "write_summary", 6),  # the last, when all else is written
    ],
)
def test_a_file_that_cannot_be_written_ends_the_run_and_loses_nothing(tmp_path, monkeypatch, whole, file, owner, name, call):
    with monkeypatch.context() as patch:
        full_at(patch, owner, name, tmp_path / file, call)
        with pytest.raises(files.Unwritable) as caught:
            run_config(cut_config(), tmp_path)
    found = params_of(tmp_path)[0]
    assert str(caught.value) == (
        f"can't write to {tmp_path / file}: File too large; make room, or make it writable; the same command continues from step "
        f"{found}"
    )
    assert found >= 2
    if file != "summary.json":
        assert not (tmp_path / file).read_text().endswith("\n")
    run_config(cut_config(), tmp_path)
    assert_same(tmp_path, whole)


@pytest.mark.process
def test_checkpoints_that_cannot_be_written_end_a_run_at_its_last_step_and_not_before(tmp_path, monkeypatch, whole):
    """A file replaces their folder: from step 4 on no save succeeds; step 7 is the last
    step.
    """
    folder, aside, made, said = tmp_path / "checkpoints", tmp_path / "aside", checkpoint.open_checkpoints, []

    def opened(*args, **kwargs):
        opened = made(*args, **kwargs)
        save_whole = opened.save

        def save(step, *args, **kwargs):
            opened.wait()
            if step == 4:
                folder.rename(aside)
                folder.touch()
            save_whole(step, *args, **kwargs)

        opened.save = save
        return opened

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "open_checkpoints", opened)
        patch.setattr(run_log.RunLog, "say", lambda log, line: said.append(line))
        with pytest.raises(files.Unwritable) as caught:
            run_config(cut_config(), tmp_path)
    told = [line for line in said if line.startswith("warning: the save")]
    for line, step in zip(told, (4, 6, 7), strict=True):
        assert line.startswith(f"warning: the save of step {step} failed: [Errno 20] Not a directory: '{folder}/{step}.")
        assert line.endswith("there is no checkpoint; make room, or make it writable, before the next save")
    removed = "warning: somebody has removed the checkpoints of steps 2, 3; the run continues"
    assert said.count(removed) == 1
    assert str(caught.value).startswith(f"the save of step 7 failed: [Errno 20] Not a directory: '{folder}/7.")
    assert str(caught.value).endswith("make room, or make it writable; the same command continues from the start")
    assert not json.loads((tmp_path / "summary.json").read_text())["done"]
    folder.unlink()
    aside.rename(folder)
    run_config(cut_config(), tmp_path)
    assert_same(tmp_path, whole)


FILLED = """
import pathlib, resource, sys, time
from absl import app
from jaxreason import main
from jaxreason.runtime import log as run_log

def fill():
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

write, calls = run_log.RunLog.write, []

def in_mid_run(*args, **kwargs):
    calls.append(args)
    if len(calls) == 4:
        while list(pathlib.Path(sys.argv[2], "checkpoints").glob("*tmp*")):  # a save that fails meanwhile says more
            time.sleep(0.01)
        fill()
    write(*args, **kwargs)

if sys.argv[1] == "in mid-run":
    run_log.RunLog.write = in_mid_run
if sys.argv[1] == "from the start":
    fill()
arguments = ["main", "--config=configs/tiny.py:smoke", f"--workdir={sys.argv[2]}", *sys.argv[3:]]
app.run(main.main, argv=arguments, flags_parser=main.parse_flags)
"""


@pytest.mark.slow
@pytest.mark.process
def test_a_full_disk_is_one_line_and_room_is_all_that_the_same_command_needs(tmp_path):
    fields = [
        "--config.phases=('prior',)",
        "--config.prior.steps=5",
        "--config.prior.log_every=1",
        "--config.checkpoint.every_steps=1",
    ]

    def start(filled):
        # A program that takes long to compile is kept on the disk, and jax warns if it
        # can't be.
        quiet = ["-W", "ignore:Error writing persistent compilation cache entry"]
        command = [sys.executable, *quiet, "-c", FILLED, filled, str(tmp_path), *fields]
        got = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
        )
        assert "Traceback" not in got.stderr, got.stderr
        return got.returncode, got.stderr.splitlines()

    code, err = start("in mid-run")
    assert code == 1
    assert [line for line in err if line.startswith("error: ")] == [err[-1]]
    way_out = f"{tmp_path}/metrics.jsonl: File too large; make room, or make it writable; the same command continues from step "
    assert err[-1].startswith(f"error: can't write to {way_out}")
    at = int(err[-1].rsplit(" ", 1)[1])
    assert at == params_of(tmp_path)[0] > 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}
    assert start("from the start") == (
        1,
        [f"error: can't write to {tmp_path}: File too large; make room or choose another workdir"],
    )
    assert {path: path.read_bytes() for path in before} == before
    code, err = start("no")
    assert code == 0
    assert any(f"going on from step {at} of 5" in line for line in err)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 5]
