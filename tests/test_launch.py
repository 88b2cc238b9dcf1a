"""Launching on Cloud TPU, against a stand-in for gcloud that keeps slices as folders
and runs the scripts in them.
"""

import functools
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from runs import HANG_S, ROOT

from jaxreason.launch import __main__ as main
from jaxreason.launch import gcloud, launch, machines, remote, shell, source, state, target
from jaxreason.launch.launch import Asked, LaunchFailed, World
from jaxreason.launch.shell import Result

pytestmark = pytest.mark.process
MACHINE = machines.machine_of("v5litepod-16")
PLACE = gcloud.Place("mine", "us-west4-a")
SOURCE = source.Source(b"", "d" * 16, "c" * 40, ())


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """Put the stand-in on PATH; return its folder."""
    folder, programs = tmp_path / "cloud", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    (programs / "gcloud").write_text(f'#!/bin/bash\nexec {sys.executable} {ROOT / "tests" / "fake_gcloud.py"} "$@"\n')
    (programs / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_CLOUD", str(folder))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    yield folder
    for pid in folder.glob("slices/*/*/jaxreason-launch/*/pid"):
        subprocess.run(["kill", "-9", "--", f"-{pid.read_text().strip()}"], stderr=subprocess.DEVNULL)


def plan(cloud, **what):
    (cloud / "plan.json").write_text(json.dumps(what))


def calls(cloud) -> list[str]:
    """Return what was called: create, describe, scp, ssh all, ssh 0, ..."""
    found = []
    for line in (cloud / "calls.jsonl").read_text().splitlines():
        words = json.loads(line)
        verb = words[4] if len(words) > 4 else words[1]
        worker = next((w.partition("=")[2] for w in words if w.startswith("--worker=")), "")
        kind = "queued " if "queued-resources" in words else ""
        found.append(f"{kind}{verb} {worker}".strip() if verb == "ssh" else f"{kind}{verb}")
    return found


def world(said):
    return World(shell.real(), said.append, sleep=lambda s: time.sleep(min(s, 0.1)))


@pytest.fixture
def asked(tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "a.py").write_text("print('a')\n")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", str(checkout), *words], check=True)
    command = [
        "-m",
        "jaxreason.main",
        "--config=configs/tiny.py",
        "--config.text.instruction=it's {question}; $HOME",
        "--workdir=../runs/mine",
    ]
    return Asked("mine", command, source.pack(checkout), "tpu", workdir="runs/mine", fetch_to=str(tmp_path / "here"))


def run(asked, said, place=PLACE):
    made = world(said)
    return launch.on_tpu(asked, place, MACHINE, target.tpu(place, made.shell), made)


def followed(found: list[str]) -> list[str]:
    """Return calls with the looks at the log as one."""
    return [call for i, call in enumerate(found) if not (call == "ssh 0" and i and found[i - 1] == "ssh 0")]


# ------------------------------------------------------------------------------------------------------------- sequences


def test_create_and_train(cloud, asked):
    said = []
    assert run(asked, said) == 0
    assert followed(calls(cloud)) == ["describe", "create", "describe", "scp", "ssh all", "ssh all", "ssh 0", "scp", "delete"]
    assert [line for line in said if line.startswith("step")] == ["step 1", "step 2", "step 3"]
    assert said[-2:] == [f"the run is in {asked.fetch_to}/mine", "mine is deleted"]
    here = Path(asked.fetch_to) / "mine"
    assert (here / "summary.json").read_text() == "done\n"
    assert (here / "command").read_text().splitlines() == asked.command  # quotes, braces and dollars as they were
    assert not (cloud / "slices" / "mine").exists()
    assert state.read("mine")["step"] == "deleted"


def test_the_same_command_uses_what_is_there(cloud, asked):
    said = []
    assert run(asked._replace(keep=True), said) == 0
    assert "costs money: $19.20 per hour on demand" in said[-1]
    assert shlex.join(gcloud.delete(PLACE)) in said[-1]
    before = len(calls(cloud))
    said.clear()
    assert run(asked, said) == 0
    assert "create" not in calls(cloud)[before:]
    assert said[0] == "mine is ready: it is used again"


def test_a_queued_resource_is_waited_for(cloud, asked):
    said, place = [], PLACE._replace(queued=True)
    assert run(asked, said, place) == 0
    found = calls(cloud)
    assert found[:3] == ["describe", "queued describe", "queued create"]
    assert [line for line in said if line.startswith("mine: ")] == [
        "mine: ACCEPTED",
        "mine: WAITING_FOR_RESOURCES",
        "mine: PROVISIONING",
    ]
    assert found[-1] == "queued delete"
    assert "create" not in [call for call in found if call != "queued create"]


def test_preempted_twice(cloud, asked, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_S", "0.3")
    plan(cloud, preempt=[4, 10])
    said = []
    assert run(asked, said) == 0
    assert [line for line in said if "was preempted" in line] == [
        "mine was preempted; restart 1 of at most 20",
        "mine was preempted; restart 2 of at most 20",
    ]
    assert calls(cloud).count("create") == 3
    assert calls(cloud).count("delete") == 3
    assert said[-1] == "mine is deleted"


def test_preempted_too_often(cloud, asked, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_S", "5")
    plan(cloud, preempt=[1, 1, 1, 1])
    with pytest.raises(LaunchFailed, match="was cut short 2 times"):
        run(asked._replace(max_restarts=1), [])


def test_no_quota(cloud, asked):
    plan(cloud, create="Quota limit 'TPUV5sLitepodServing' has been exceeded. Limit: 0 in region us-west4.")
    with pytest.raises(LaunchFailed, match=r"could not be created: .*Quota limit.*; ask for quota at") as error:
        run(asked, [])
    assert "\n" not in str(error.value)
    assert calls(cloud) == ["describe", "create"]


def test_the_installation_fails_on_one_host(cloud, asked):
    plan(cloud, install=1)
    with pytest.raises(LaunchFailed, match="the installation failed on a host: no matching distribution"):
        run(asked, [])
    (cloud / "slices" / "mine" / "1" / "fail_pip").unlink()
    plan(cloud)
    said = []
    assert run(asked, said) == 0  # the same command goes on
    assert "create" not in calls(cloud)[calls(cloud).index("create") + 1 :]


def test_a_run_that_its_machine_asked_to_stop_goes_on(cloud, asked, monkeypatch):
    monkeypatch.setenv("FAKE_CUT_SHORT", "1")
    said = []
    assert run(asked, said) == 0
    assert "mine ended the run early; restart 1 of at most 20" in said
    assert [line for line in said if line.startswith("step")] == 2 * ["step 1", "step 2", "step 3"]
    assert calls(cloud).count("create") == 1
    assert said[-1] == "mine is deleted"


def test_a_run_that_the_user_stops_is_at_its_end(cloud, asked, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_S", "1")
    plan(cloud, hosts=1)
    said = []

    def stop_after_a_step(line: str) -> None:
        said.append(line)
        if line == "step 1":
            assert command("stop", "mine").stdout == "asked to stop\n"

    made = world(said)._replace(say=stop_after_a_step)
    assert launch.on_tpu(asked, PLACE, MACHINE, target.tpu(PLACE, made.shell), made) == 0
    assert "saved" in said
    assert not [line for line in said if "restart" in line]


def test_the_run_fails(cloud, asked, monkeypatch):
    monkeypatch.setenv("FAKE_CODE", "3")
    said = []
    assert run(asked, said) == 3
    assert said[-1] == "mine is deleted"


def test_a_folder_that_can_not_be_copied_keeps_the_slice(cloud, asked):
    with pytest.raises(LaunchFailed, match="could not be copied, so the machine is kept"):
        run(asked._replace(workdir="runs/other"), [])
    assert (cloud / "slices" / "mine").exists()


def test_a_run_in_a_bucket_is_not_copied(cloud, asked):
    said = []
    assert run(asked._replace(workdir="gs://bucket/runs/mine"), said) == 0
    assert followed(calls(cloud))[-1] == "delete"
    assert "scp 0" not in calls(cloud)
    assert any(line.startswith("the run is in gs://bucket/runs/mine; see python -m jaxreason.report") for line in said)


def test_a_run_is_fetched_from_another_terminal(cloud, asked, tmp_path):
    run(asked._replace(keep=True), [])
    assert command("fetch", "mine", f"--fetch_to={tmp_path / 'again'}").returncode == 0
    assert (tmp_path / "again" / "mine" / "summary.json").exists()
    state.write("there", state.read("mine") | {"workdir": "gs://bucket/runs/there"})
    done = command("fetch", "there", f"--fetch_to={tmp_path / 'again'}")
    assert done.stdout.strip() == f"the run is in {tmp_path / 'again'}/there"
    assert (tmp_path / "again" / "there").is_dir()


def test_a_deleted_slice_costs_nothing_and_is_forgotten(cloud, asked):
    run(asked._replace(workdir="gs://bucket/runs/mine"), [])
    done = command("status", "mine")
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        ["mine: v5litepod-16 in us-west4-a, deleted, costs nothing; the run is in gs://bucket/runs/mine", "slice: ABSENT"],
    )
    for what in ("logs", "stop"):
        done = command(what, "mine")
        said = f"error: mine has no slice, so `launch {what}` can't reach it; the run is in gs://bucket/runs/mine"
        assert (done.returncode, done.stderr.strip()) == (1, said)
    done = command("delete", "mine")
    assert (done.returncode, done.stdout.strip()) == (0, "mine has no slice, and costs nothing; `launch status` forgets it")
    assert command("status").stdout.strip() == "no launches on this machine yet"


PLANNED = {
    "phase": "rl", "fits": True, "peak_bytes": 3 * 2**30, "hbm_bytes": 16 * 2**30, "efficiency": 0.5,
    "prediction": {"step_s": 36.0},
}  # fmt: skip


def test_the_plan_says_what_the_run_costs():
    assert main.needs(PLANNED) == "it needs 3.00 GiB of the 16.00 GiB of a chip"
    assert main.run_price(PLANNED, 200, MACHINE).startswith(
        "200 steps of phase rl: about 2 hours and $38.40 on demand, at 50% of the chips' peak rates, which is a guess"
    )
    assert "not known" in main.run_price(PLANNED | {"prediction": None}, 200, MACHINE)


def test_a_run_is_not_started_twice(cloud, asked, monkeypatch):
    monkeypatch.setenv("FAKE_STEP_S", "0.5")
    made, said = world([]), []
    reached = target.tpu(PLACE, made.shell)
    launch.bring_up(PLACE, MACHINE, made)
    launch.install(asked, reached, made)
    launch.start(asked, reached, made)
    script = remote.start(asked.name, asked.source.digest, asked.command, {})
    assert reached.first(script).out.strip() == "runs already"
    assert run(asked, said) == 0
    assert [line for line in said if line.startswith("step")] == ["step 1", "step 2", "step 3"]


@pytest.mark.parametrize("moment", ["create", "install", "follow"])
def test_ctrl_c_leaves_what_there_is(cloud, asked, moment):
    """The command that was running runs on; the same launch goes on from there."""
    made = world([])
    counted = {"create": "create", "install": "pip install", "follow": "wc -c"}[moment]

    def interrupted(words, timeout_s=60.0):
        result = shell.run(words, timeout_s)
        if any(counted in word for word in words):
            raise KeyboardInterrupt
        return result

    broken = made._replace(shell=shell.Shell(interrupted, shell.run))
    with pytest.raises(KeyboardInterrupt):
        launch.on_tpu(asked, PLACE, MACHINE, target.tpu(PLACE, broken.shell), broken)
    told = launch.left("mine", PLACE, MACHINE, "the command")
    assert "then costs $19.20 per hour" in told
    assert shlex.join(gcloud.delete(PLACE)) in told
    assert state.read("mine")["step"] == {"create": "creating", "install": "installing", "follow": "running"}[moment]
    assert run(asked, []) == 0
    assert calls(cloud).count("create") == 1


def test_ctrl_c_leaves_the_command_that_runs(tmp_path):
    """A process that waits for a command gets Ctrl-C; the command goes on to its end."""
    pid, go, done = (tmp_path / name for name in ("pid", "go", "done"))
    script = f"echo $$ > {pid}.part; mv {pid}.part {pid}; until [ -f {go} ]; do sleep 0.1; done; echo out && touch {done}"
    # A process that was started in the background may have inherited to ignore Ctrl-C.
    hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{hears}; from jaxreason.launch import shell; shell.run(['bash', '-c', {script!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    wait_until(pid.exists)
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=HANG_S)[1]
    go.touch()
    state = ["ps", "-o", "stat=", "-p", pid.read_text().strip()]
    wait_until(lambda: subprocess.run(state, capture_output=True, text=True).stdout.strip()[:1] in ("", "Z"))
    assert done.exists()


def wait_until(condition):
    deadline_s = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_slow_and_a_hanging_gcloud(cloud, asked):
    plan(cloud, slow=0.3)
    assert launch.state_of(PLACE, world([])) == "ABSENT"
    plan(cloud, hang="describe")
    assert shell.run(gcloud.describe(PLACE), timeout_s=0.5) == Result(124, "", "gcloud did not end in 0.5 s")


# ------------------------------------------------------------------------------------------------------------- pieces


def test_types_have_topologies_hosts_and_prices():
    known = machines.machines()
    assert known["v5litepod-16"] == machines.Machine("v5litepod-16", "v5e:4x4", 16, 4, "v2-alpha-tpuv5-lite", 16 * 1.20)
    assert (known["v5litepod-8"].hosts, known["v5p-8"].chips, known["v5p-8"].hosts, known["v6e-256"].hosts) == (1, 4, 1, 64)
    assert machines.needs_queue(known["v6e-8"])
    assert not machines.needs_queue(known["v5litepod-8"])


def test_the_log_is_read_in_parts():
    whole = "a banner\njaxreason-launch|finished 3|5|YWJj|\n"
    for out in (whole, whole.replace("\n", "\r\n"), f"no newline{whole}"):
        assert remote.read(out) == remote.Seen("finished", 3, 5, b"abc")
    assert remote.read("jaxreason-launch|never started|0||\n") == remote.Seen("never started", None, 0, b"")
    for wrong in (
        "",
        "Warning: hosts\n",
        "jaxreason-launch|finished|5||",
        "jaxreason-launch|running|5|YWJj",
        whole.replace("5", "x"),
    ):
        with pytest.raises(ValueError, match="the machine answered"):
            remote.read(wrong)


LAST = "last, without newline"
LOG = b"one\r\n" + "ümlaut\n".encode() + b"\xff\xfe bytes\n" + "ü".encode() * 300 + b"\n\n" + LAST.encode()


@pytest.mark.parametrize("most", [64, 100, 1000])
def test_a_log_of_any_bytes_arrives_once(tmp_path, most, monkeypatch):
    """The looks cut it anywhere, and the login prints a message."""
    home = tmp_path / "jaxreason-launch" / "mine"
    home.mkdir(parents=True)
    (home / "log").write_bytes(LOG)
    (home / "code").write_text("0\n")

    def first(script: str) -> Result:
        script = script.replace("head -c 200000", f"head -c {most}")
        done = shell.run(["env", f"HOME={tmp_path}", "bash", "-c", f"echo welcome; {script}"])
        return done._replace(out=done.out.replace("\n", "\r\n"))

    monkeypatch.setattr(launch.remote, "whole_lines", functools.partial(remote.whole_lines, most=most))
    said = []
    asked = Asked("mine", [], SOURCE, "gpu")
    reached = target.Target(first, first, lambda *_: None, lambda *_: None)
    assert launch.follow(asked, reached, world(said), lambda: True) == 0
    if most == 1000:  # longer than the longest line, which is shown in pieces otherwise
        assert said == LOG.decode(errors="replace").splitlines()
    assert [line for line in said if "ü" * 20 not in line and line.strip("ü\ufffd")] == [
        "one",
        "ümlaut",
        "\ufffd\ufffd bytes",
        LAST,
    ]


def test_a_line_is_shown_when_it_is_whole(tmp_path):
    running = remote.Seen("running", None, 8, b"one\ntwo")
    assert remote.whole_lines(running, 0) == b"one\n"
    assert remote.whole_lines(running._replace(piece=b"tw"), 4) == b""
    assert remote.whole_lines(running._replace(state="finished", size=7), 0) == b"one\ntwo"
    assert remote.whole_lines(running._replace(piece=b"x" * 10), 0, most=10) == b"x" * 10


def answers(*found):
    """Make a shell that gives these results, the last one from then on."""
    left = list(found)
    asked = []

    def give(words, timeout_s=0.0):
        asked.append(list(words))
        return left.pop(0) if len(left) > 1 else left[0]

    return shell.Shell(give, give), asked


OFF = Result(1, "", "ERROR: Unable to find the server at tpu.googleapis.com")
ABSENT = Result(1, "", "ERROR: NOT_FOUND: Resource 'projects/p/locations/z/nodes/mine' was not found")


def described(state, type="v5litepod-16"):
    return Result(0, json.dumps({"state": state, "acceleratorType": type}), "")


def in_state(*found):
    made, asked = answers(*found)
    return World(made, lambda line: None, sleep=lambda s: None), asked


def test_no_network_is_no_absent_slice():
    made, asked = in_state(OFF)
    with pytest.raises(ValueError, match="could not describe it: ERROR: Unable"):
        launch.bring_up(PLACE, MACHINE, made)
    assert len(asked) == 1
    assert launch.is_ready(PLACE, made)  # so the run on it is looked at again
    made, _ = in_state(described("CREATING"), OFF, OFF, OFF, OFF, described("READY"))
    launch.wait_until_ready(PLACE, made)


def test_a_slice_that_somebody_deletes_is_not_created_anew():
    for gone in (ABSENT, described("DELETING")):
        with pytest.raises(LaunchFailed, match="deleted by somebody else"):
            launch.is_ready(PLACE, in_state(gone)[0])
    with pytest.raises(LaunchFailed, match="was deleted before it was ready"):
        launch.wait_until_ready(PLACE, in_state(described("CREATING"), ABSENT)[0])


@pytest.mark.parametrize("state", ["STOPPED", "STOPPING", "UNKNOWN"])
def test_a_slice_that_somebody_stopped_is_not_deleted(state):
    made, asked = in_state(described(state))
    with pytest.raises(LaunchFailed, match=f"mine is {state}, and its disk may hold a run"):
        launch.bring_up(PLACE, MACHINE, made)
    assert not [words for words in asked if "delete" in words]


def test_a_slice_of_another_type_is_not_taken():
    made, _ = in_state(described("READY", "projects/p/locations/z/acceleratorTypes/v5litepod-256"))
    with pytest.raises(LaunchFailed, match="is v5litepod-256, not v5litepod-16"):
        launch.bring_up(PLACE, MACHINE, made)


def test_a_warning_before_the_answer_is_skipped():
    warned = described("READY")._replace(out="WARNING: {old} gcloud\n" + described("READY").out + "\nUpdates are available\n")
    assert gcloud.state_of(warned) == "READY"


def test_a_deletion_is_tried_again():
    done = Result(0, "", "")
    launch.delete(PLACE, in_state(OFF, OFF, OFF, OFF, done)[0])
    launch.delete(PLACE, in_state(ABSENT)[0])  # deleted by somebody else
    with pytest.raises(LaunchFailed, match="mine could not be deleted, and costs a lot: ERROR: Unable to find"):
        launch.delete(PLACE, in_state(OFF)[0], ", and costs a lot")


def test_preempted_while_it_installs(cloud, asked):
    said, made = [], world([])

    def preempted(words, timeout_s=60.0):
        if any("pip install" in word for word in words) and not said:
            said.append("preempted")
            (cloud / "slices" / "mine" / "state").write_text("PREEMPTED")
        return shell.run(words, timeout_s)

    made = made._replace(shell=shell.Shell(preempted, shell.run))
    assert launch.on_tpu(asked, PLACE, MACHINE, target.tpu(PLACE, made.shell), made) == 0
    assert calls(cloud).count("create") == 2


def test_other_extras_are_installed_too(cloud, asked):
    """The run was in a folder, and is in a bucket now."""
    made = world([])
    launch.bring_up(PLACE, MACHINE, made)
    reached = target.tpu(PLACE, made.shell)
    launch.install(asked, reached, made)
    for extra, said in (("tpu", "installed already"), ("tpu,gcs", "installed"), ("tpu,gcs", "installed already")):
        assert reached.first(remote.install("mine", asked.source.digest, extra)).out.strip() == said


OLD = """#!/bin/bash
# An older Python, or one without venv: uv makes the environment.
echo "$(basename "$0") $*" >> "$HOME/calls"
if [ "$1 $2 $3" = "-m uv venv" ]; then mkdir -p "${!#}/bin"; cp "$0" "${!#}/bin/python"; fi
[ "$1 $2" != "-m venv" ] || { mkdir -p "$3/bin"; echo "exit 1" > "$3/bin/python"; chmod +x "$3/bin/python"; exit 1; }
"""


@pytest.mark.parametrize("names", [["python3"], ["python3", "python3.11"]])
def test_a_machine_without_a_python_that_will_do_gets_one(tmp_path, asked, names):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("bash", "tar", "gzip", "rm", "mkdir", "touch", "cp", "chmod", "basename"):
        (programs / name).symlink_to(shutil.which(name))
    for name in names:
        (programs / name).write_text(OLD)
        (programs / name).chmod(0o755)
    (tmp_path / remote.archive_of("mine", asked.source.digest)).write_bytes(asked.source.archive)
    script = remote.install("mine", asked.source.digest, "tpu")
    where = ["env", "-i", f"HOME={tmp_path}", f"PATH={programs}", str(programs / "bash"), "-c", script]
    assert shell.run(where).out.strip() == "installed"
    called = (tmp_path / "calls").read_text().splitlines()
    assert called[-4:-2] == [
        "python3 -m pip install --quiet --user uv",
        "python3 -m uv venv --quiet --seed --python 3.12 jaxreason-launch/mine/venv",
    ]
    assert called[-1].startswith("python -m pip install --quiet -e jaxreason-launch/mine/source-")


def test_what_is_left_of_a_run_ends_before_it_starts_again(tmp_path):
    """One host of several ended early; the processes of the others can't go on."""
    home = tmp_path / "jaxreason-launch" / "mine"
    home.mkdir(parents=True)
    left = subprocess.Popen(["bash", "-c", "trap : TERM; while :; do sleep 1; done"], start_new_session=True)
    (home / "pid").write_text(f"{left.pid}\n")
    assert shell.run(["env", f"HOME={tmp_path}", "bash", "-c", remote.await_end("mine", 1)]).code == 0
    assert left.wait(HANG_S) == -signal.SIGKILL


def test_a_command_that_can_not_be_run_is_a_result(tmp_path):
    (tmp_path / "gcloud").write_text("")
    assert shell.run([str(tmp_path / "gcloud")]).code == 126
    assert "too long" in shell.run(["echo", "x" * (1 << 22)]).said


def test_a_command_that_does_not_end_takes_its_own_commands_along(tmp_path):
    pid = tmp_path / "pid"
    assert shell.run(["bash", "-c", f"sleep 1000 & echo $! > {pid}; wait"], timeout_s=2.0).code == 124
    state = ["ps", "-o", "stat=", "-p", pid.read_text().strip()]
    wait_until(lambda: subprocess.run(state, capture_output=True, text=True).stdout.strip()[:1] in ("", "Z"))


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"kind": "tpu"}', '{"kind": "gpu", "host": 3}', '{"kind": ["x"]}'])
def test_a_damaged_file_of_a_launch_is_one_line(cloud, damage):
    state.write("whole", {"kind": "gpu", "host": "box", "workdir": "runs/whole"})
    (state.folder() / "mine.json").write_text(damage)
    with pytest.raises(ValueError, match=r"mine\.json .*damaged|allowed: a JSON object"):
        state.read("mine")


def test_the_archive_holds_changes_and_new_files(asked, tmp_path):
    checkout = tmp_path / "checkout"
    first = source.pack(checkout)
    assert source.pack(checkout) == first
    (checkout / "a.py").write_text("print('b')\n")
    (checkout / "new.py").write_text("")
    (checkout / ".gitignore").write_text("ignored\n")
    (checkout / "ignored").write_text("secret")
    changed = source.pack(checkout)
    assert changed.digest != first.digest
    assert set(changed.changed) == {"a.py", "new.py", ".gitignore"}
    (tmp_path / "x.tar.gz").write_bytes(changed.archive)
    listed = subprocess.run(["tar", "-tzf", str(tmp_path / "x.tar.gz")], capture_output=True, text=True, check=True).stdout
    assert listed.split() == [".gitignore", "a.py", "new.py"]
    with pytest.raises(ValueError, match="git rev-parse HEAD failed"):
        source.pack(tmp_path)


def test_the_archive_holds_clean_submodules_and_refuses_changed_ones(tmp_path):
    def git(folder, *words):
        who = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "protocol.file.allow=always"]
        subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)

    for name in ("part", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text("1\n")
        git(tmp_path / name, "init", "-q")
        git(tmp_path / name, "add", "-A")
        git(tmp_path / name, "commit", "-qm", name)
    whole = tmp_path / "whole"
    git(whole, "submodule", "add", "-q", str(tmp_path / "part"), "third party/part")
    git(whole, "commit", "-qm", "part")
    with tarfile.open(fileobj=io.BytesIO(source.pack(whole).archive)) as tar:
        assert tar.getnames() == [".gitmodules", "third party/part/part.py", "whole.py"]
    inside = whole / "third party" / "part"
    (inside / "part.py").write_text("2\n")
    with pytest.raises(ValueError, match="submodule third party/part has changes; commit them"):
        source.pack(whole)
    git(inside, "commit", "-qam", "two")
    with pytest.raises(ValueError, match="submodule third party/part is not at the commit that is recorded"):
        source.pack(whole)
    git(whole, "submodule", "deinit", "-q", "-f", "--all")
    with pytest.raises(ValueError, match="submodule third party/part is not at the commit"):
        source.pack(whole)


# ------------------------------------------------------------------------------------------------------------- the command


def command(*words, **more):
    made = [sys.executable, "-m", "jaxreason.launch", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(made, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **more)


ASK = ("tpu", "--name=mine", "--type=v5litepod-16", "--zone=us-west4-a", "--config=configs/tiny.py:smoke", "--noplan", "--yes")
BUCKET = "--workdir=gs://bucket/runs/mine"
ASK += (BUCKET,)


def test_a_dry_run_prints_every_command_and_runs_none(cloud):
    done = command(*ASK, "--dry_run", "--fetch_to=here")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("gcloud ")]
    assert done.stdout.startswith("dry run: ")
    assert [line.split()[4] for line in lines] == ["create", "scp", "ssh", "ssh", "delete"]
    assert f" {BUCKET} --code_when_stopped=75 >> ../log" in done.stdout
    assert "'[tpu,gcs]'" in done.stdout.replace("'\"'\"'", "'")
    assert not (cloud / "calls.jsonl").exists()
    assert not state.names()
    assert not (ROOT / "here").exists()


@pytest.mark.parametrize(
    ("words", "what", "said"),
    [
        ([*ASK, "--type=v5e-16"], {}, "unknown --type 'v5e-16'; Google Cloud calls it 'v5litepod-16'"),
        ([*ASK, "--type=v5e:4x4"], {}, "unknown --type 'v5e:4x4'; Google Cloud calls it 'v5litepod-16'"),
        (["tpu", "--name=mine"], {}, "no --type given; for example --type=v5litepod-8"),
        (["tpu", "mine", *ASK[1:]], {}, "`launch tpu` got 'mine'; allowed: flags only, such as --name=mine"),
        ([*ASK, "--host=box"], {}, "got --host; `launch tpu` does not read it; allowed: with gpu"),
        (["gpu", "--host=box", *ASK[1:]], {}, "got --type; `launch gpu` does not read it; allowed: with tpu"),
        (["sky", "--dry_run", *ASK[1:2]], {}, "--zone; --out=- prints the job's file, and nothing is submitted"),
        (["logs"], {}, "`launch logs` got 0 names; allowed: one name, of: no launches yet"),
        ([*ASK, "--workdir=gs:bucket/mine"], {}, "got 'gs:bucket/mine'; allowed: gs://BUCKET/FOLDER"),
        ([*ASK, "--zone=us-west4-z"], {}, "unknown --zone 'us-west4-z' (did you mean 'us-west4-a'?)"),
        ([*ASK, "--zone=here"], {}, "--zone got 'here'"),
        ([*ASK, "--name=Mine"], {}, "--name got 'Mine'"),
        ([*ASK, "--spot", "--reserved"], {}, "got --spot and --reserved"),
        ([*ASK, "--config=configs/none.py"], {}, "no config file 'configs/none.py'"),
        ([*ASK, "--config.rl.stepps=3"], {}, "stepps"),
        (ASK, {"logged_out": True}, "gcloud is not logged in"),
        (ASK, {"project": "(unset)"}, "gcloud has no project"),
        (ASK, {"bucket": "HTTPError 403: me does not have storage.buckets.get access"}, "gcloud can't see its bucket: ERROR"),
        ([*ASK, "--workdir=s3://bucket/mine"], {}, "allowed: gs://BUCKET/FOLDER"),
        ([*ASK, "--workdir=runs/mine"], {}, "--workdir got 'runs/mine' for 4 hosts, which share no disk"),
        (ASK, {"create": "PERMISSION_DENIED: no"}, "the account lacks a permission"),
        (["status", "other"], {}, "unknown launch 'other'"),
        (["fly"], {}, "got 'fly'; allowed: tpu, gpu, sky, slurm, xpk with flags"),
        ([*ASK, "--cluster=c"], {}, "got --cluster; `launch tpu` does not read it"),
    ],
)
def test_bad_input_is_one_line(cloud, words, what, said):
    plan(cloud, **what)
    if any(word.startswith("--config=") for word in words[:-1]) and words[-1].startswith("--config="):
        words = [word for word in words[:-1] if not word.startswith("--config=")] + [words[-1]]
    done = command(*words)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_gcloud_is_missing(tmp_path, monkeypatch):
    for folder in (Path(shutil.which("git")).parent, Path("/usr/bin"), Path("/bin")):
        for program in folder.iterdir():  # git needs others
            if program.name != "gcloud" and not os.path.lexists(tmp_path / program.name):
                (tmp_path / program.name).symlink_to(program)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = command(*ASK)
    assert done.stderr.splitlines()[-1] == "error: gcloud is not installed; see cloud.google.com/sdk/docs/install"


def test_the_other_terminal_sees_all(cloud, asked):
    run(asked._replace(keep=True), [])
    assert command("status", "mine").stdout.splitlines()[1:] == ["slice: READY", "run: finished 0"]
    assert command("logs", "mine").stdout == "step 1\nstep 2\nstep 3\n"
    assert command("stop", "mine").stdout == "nothing runs\n"
    (state.folder() / "bad.json").write_text("{")
    listed = command("status")
    assert listed.returncode == 0
    assert "bad.json is not JSON" in listed.stdout
    assert "mine: v5litepod-16" in listed.stdout
    assert command("delete", "mine").stdout == "mine is deleted\n"
    state.write("mine", json.loads(json.dumps({"kind": "tpu", "place": PLACE._asdict(), "type": "v5litepod-16", "step": "ended",
                                               "workdir": "runs/mine", "delete": []})))  # fmt: skip
    assert command("delete", "mine").stdout == "mine has no slice, and costs nothing; `launch status` forgets it\n"
    assert not (state.folder() / "mine.json").exists()


def test_a_log_with_characters_that_the_terminal_lacks(cloud, asked, monkeypatch):
    """A launch does not end when its terminal can't show a line."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    state.write("ünlich", {"kind": "gpu", "host": "böx", "workdir": "runs/mine"})
    done = command("status")
    assert (done.returncode, done.stdout) == (0, "?nlich: on b?x, runs/mine\n")


def test_nobody_can_be_asked(cloud):
    done = command(*(word for word in ASK if word != "--yes"), stdin=subprocess.DEVNULL)
    assert done.stderr.splitlines()[-1] == "error: nobody can be asked whether to create it; --yes agrees"
    assert "create" not in calls(cloud)


# ------------------------------------------------------------------------------------------------------------- behind ssh

SSH = """#!/bin/bash
# In the place of ssh: run the script in a home folder.
for last; do :; done
cd "$FAKE_CLOUD/slices/box/0" && HOME=$PWD PATH=$PWD/bin:/usr/bin:/bin exec bash -c "$last"
"""
SCP = """#!/bin/bash
# In the place of scp: HOST:PATH is in that home folder.
args=()
for word; do
  case "$word" in -*|BatchMode=*|ConnectTimeout=*) ;; *) args+=("${word/#box:/$FAKE_CLOUD/slices/box/0/}");; esac
done
exec cp -r "${args[@]}"
"""


def test_a_machine_behind_ssh(cloud, asked, tmp_path):
    import fake_gcloud

    fake_gcloud.CLOUD = cloud
    fake_gcloud.host("box", 0)
    for name, text in (("ssh", SSH), ("scp", SCP)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    said = []
    made = world(said)
    assert launch.on_ssh(asked, target.over_ssh("box", made.shell), made) == 0
    assert [line for line in said if line.startswith("step")] == ["step 1", "step 2", "step 3"]
    assert (Path(asked.fetch_to) / "mine" / "command").read_text().splitlines() == asked.command


def test_a_machine_that_does_not_answer(cloud, asked, tmp_path):
    (tmp_path / "bin" / "scp").write_text("#!/bin/bash\necho 'ssh: Could not resolve hostname box' >&2\nexit 255\n")
    (tmp_path / "bin" / "scp").chmod(0o755)
    made = world([])
    with pytest.raises(LaunchFailed, match=r"could not be copied to all hosts: ssh: Could not resolve hostname box"):
        launch.on_ssh(asked, target.over_ssh("box", made.shell), made)
