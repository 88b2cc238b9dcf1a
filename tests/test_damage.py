"""Damage to the folder of a run: nothing is lost, and one line names the fault."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ROOT, load_config

from jaxreason import learner, train
from jaxreason.build import VERSION, build
from jaxreason.main import config_text, default_workdir
from jaxreason.runtime import files, resume, warm_start, workdir
from jaxreason.runtime import log as run_log
from jaxreason.runtime.checkpoint import Damaged, open_checkpoints
from jaxreason.runtime.compiling import keep_compiled

TEXT = json.dumps(json.loads(config_text(load_config("tiny", "smoke"))) | {"version": VERSION})


def check(folder, resume="auto", text=TEXT):
    """Check that a run may start in the folder; return the printed lines."""
    said = []
    workdir.check(folder, text, resume=resume, accept_config_change=False, say=said.append)
    return said


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- a folder that once had checkpoints ---


@pytest.fixture
def lost(tmp_path):
    """Make a folder whose checkpoints were all damaged, and set aside by an earlier
    start.
    """
    (tmp_path / "checkpoints" / "7.damaged").mkdir(parents=True)
    (tmp_path / "checkpoints" / "7.damaged" / "state").write_text("cut sho")
    (tmp_path / "config.json").write_text(TEXT)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        (tmp_path / name).write_text('{"step": 1, "time_s": 1.0}\n')
    return tmp_path


def test_a_folder_that_had_checkpoints_never_starts_anew_by_itself(lost):
    before = content(lost)
    for mode in ("auto", "must"):
        for _ in range(2):  # as a cluster that starts it again and again
            with pytest.raises(
                ValueError, match=r"only damaged checkpoints \(7\.damaged\).*--resume=never, which moves"
            ) as caught:
                check(lost, mode)
            assert "\n" not in str(caught.value)
    assert content(lost) == before
    shutil.rmtree(lost / "checkpoints")  # and if these are removed, the summary remembers
    (lost / "summary.json").write_text('{"done": false, "saved": 7}')
    with pytest.raises(ValueError, match=r"none of its checkpoints any more \(the last known was of step 7\)"):
        check(lost)


def test_never_moves_all_aside_and_loses_nothing(lost):
    said, before = [], content(lost)
    for number in ("1", "2"):
        assert check(lost, "never", TEXT.replace('"seed": 0', '"seed": 1')) == []
        workdir.set_aside(lost, said.append)
        moved = {name.split("/")[0] for name in content(lost) if f".{number}" in name}
        assert moved == {f"{name}.{number}" for name in ("checkpoints", "config.json", "metrics.jsonl", "rollouts.jsonl")}
        assert not (lost / "checkpoints").exists()
        assert said[-1].startswith(f"--resume=never: what {lost} held is now checkpoints.{number}, config.json.{number}, ")
        assert check(lost) == []
        for name, data in before.items():
            (lost / name).parent.mkdir(parents=True, exist_ok=True)
            (lost / name).write_bytes(data)
    assert len(content(lost)) == 3 * len(before)
    for name in workdir.RECORDS:
        for path in lost.glob(f"{name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    said.clear()
    workdir.set_aside(lost, said.append)
    assert said == []


def test_logs_of_a_run_that_ended_before_its_first_checkpoint_are_moved_aside(lost):
    said, before = [], content(lost)
    resume.begin_logs(lost, said.append)
    assert sorted(content(lost).values()) == sorted(before.values())
    assert not (lost / "metrics.jsonl").exists()
    (lost / "metrics.jsonl").write_text("")  # with nothing in it
    resume.begin_logs(lost, said.append)
    assert [line.split("; ")[1] for line in said] == [
        f"the {name} that was there is now {lost / name}.1" for name in ("metrics.jsonl", "rollouts.jsonl")
    ]


def test_the_same_command_twice_with_all_checkpoints_damaged(tmp_path):
    """Use the real command, with `~` in its paths."""
    folder = tmp_path / "mine"
    (folder / "checkpoints" / "3").mkdir(parents=True)
    (folder / "config.json").write_text(TEXT)
    (folder / "summary.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 3, "time_s": 1.0}\n')
    command = [sys.executable, "-m", "jaxreason.main", "--config=configs/tiny.py:smoke", "--workdir=~/mine"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    for words in ("none of the checkpoints is whole", "only damaged checkpoints (3.damaged)"):
        got = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert got.returncode == 1
        (line,) = [line for line in got.stderr.splitlines() if line.startswith("error: ")]
        assert words in line
        assert "--resume=never" in line
        assert "Traceback" not in got.stderr
    assert (folder / "metrics.jsonl").read_text() == '{"step": 3, "time_s": 1.0}\n'
    assert not (ROOT / "~").exists()


# --- checkpoints ---


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def test_a_checkpoint_that_lacks_any_file_is_whole_or_damaged(tmp_path, capfd):
    tree = {"w": jnp.arange(4.0), "v": jnp.ones((2, 2))}
    made = open_checkpoints(tmp_path / "made")
    made.save(1, tree, {"a": 1}, reference=tree)
    made.close()
    noticed = {}
    for i, path in enumerate(sorted((tmp_path / "made" / "1").rglob("*"))):
        if "ocdbt.process" in str(path):
            continue
        folder, name = tmp_path / str(i), path.relative_to(tmp_path / "made")
        shutil.copytree(tmp_path / "made", folder)
        shutil.rmtree(folder / name) if path.is_dir() else (folder / name).unlink()
        reader = open_checkpoints(folder, read_only=True)
        try:
            restored = reader.restore(1, abstract(tree))[0], reader.restore_reference(1, abstract(tree))
            for other in restored:
                jax.tree.map(np.testing.assert_array_equal, other, tree)
        except Damaged as error:
            noticed[str(name)] = str(error)
        reader.close()
    items = {f"1/{item}{file}" for item in ("state", "reference") for file in ("", "/_METADATA", "/d", "/manifest.ocdbt")}
    assert noticed.keys() >= items | {"1/host", "1/host/metadata"}
    assert not any("\n" in line for line in noticed.values())
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("lacks", ["reference", "reference/_METADATA", "state/_METADATA"])
def test_a_checkpoint_that_lacks_an_item_is_set_aside_and_the_older_one_used(tmp_path, lacks):
    run = build(load_config("tiny", "smoke", **{"sharding.mesh.data": 1, "phases": ("rl",), "rl.objective.kl_coefficient": 0.1}))
    _, placed = learner.state_shapes(run.model, run.phases[0].optimizer, run.mesh)
    make = jax.jit(lambda key: learner.new_state(run.model.init(key), run.phases[0].optimizer), out_shardings=placed)
    state = make(jax.random.key(0))
    host = dataclasses.asdict(resume.Progress()) | {"phase": 0}
    saved = open_checkpoints(tmp_path)
    for step in (1, 2):
        saved.save(step, state, host, state.params)
    saved.wait()
    path = tmp_path / "2" / lacks
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = []
    assert resume.find_newest(run, saved, said.append).step == 1
    assert [line.endswith("; set aside") for line in said] == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.damaged"]
    with pytest.raises(resume.NotResumable, match="checkpoint 1 is of phase 1, and the config has 0"):
        resume.find_newest(run._replace(phases=()), saved, said.append)
    saved.close()


def test_an_error_that_says_nothing_of_the_checkpoint_does_not_damage_it(tmp_path, monkeypatch):
    saved = open_checkpoints(tmp_path)
    saved.save(1, {"w": jnp.ones(2)}, {})
    saved.wait()
    import orbax.checkpoint as ocp

    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    with pytest.raises(ValueError, match="can't read the checkpoint of step 1") as caught:
        saved.peek(1)
    assert not isinstance(caught.value, Damaged)
    saved.close()


def test_setting_aside_twice_keeps_both(tmp_path):
    saved = open_checkpoints(tmp_path)
    for _ in range(2):
        saved.save(1, {"w": jnp.ones(2)}, {})
        saved.wait()
        saved.set_aside(1)
    saved.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.damaged", "1.damaged.1"]


@pytest.mark.parametrize("removed", ["1", "."])
def test_checkpoints_that_are_removed_meanwhile_are_said_and_the_next_is_saved(tmp_path, removed, capfd):
    folder = tmp_path / "checkpoints"
    saved = open_checkpoints(folder)
    saved.save(1, {"w": jnp.ones(2)}, {})
    saved.wait()
    assert saved.gone() == []
    shutil.rmtree(folder / removed)
    assert saved.latest() is None
    assert saved.gone() == [1]
    assert saved.gone() == []
    saved.save(2, {"w": jnp.ones(2)}, {})
    saved.wait()
    assert (saved.failure(), saved.steps()) == (None, [2])
    shutil.rmtree(folder)
    folder.write_text("")
    saved.save(3, {"w": jnp.ones(2)}, {})
    saved.close()  # does not raise
    assert "the save of step 3 failed" in saved.failure()
    assert capfd.readouterr().err == ""


def test_a_save_that_fails_prints_nothing_of_its_own(tmp_path):
    """Orbax used to print for each array, again and again, that the event loop is
    closed.
    """
    body = """
import resource, sys
import jax.numpy as jnp
from jaxreason.runtime.checkpoint import open_checkpoints
saved = open_checkpoints(sys.argv[1])
for step in range(1, 8):
    limit = resource.RLIM_INFINITY if step in (1, 7) else 2000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    saved.save(step, {f"w{i}": jnp.ones((64, 64)) for i in range(40)}, {})
    saved.wait()
    print(saved.failure())
saved.close()
"""
    got = subprocess.run([sys.executable, "-c", body, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (got.returncode, got.stderr) == (0, "")
    first, *failed, last = got.stdout.splitlines()
    assert (first, last) == ("None", "None")
    assert [line[:25] for line in failed] == [f"the save of step {step} failed" for step in range(2, 7)]


# --- the folder, while the run writes in it ---


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_folder_that_is_moved_or_removed_is_noticed(tmp_path, how):
    folder, other = tmp_path / "run", tmp_path / "elsewhere"
    (folder / "checkpoints" / "5").mkdir(parents=True)
    unlock = workdir.lock(folder, print)
    check_stays = workdir.stays(folder)
    check_stays()
    shutil.rmtree(folder) if how == "removed" else folder.rename(other)
    if how == "replaced":
        shutil.copytree(other, folder, ignore=lambda *_: ["lock"])
    with pytest.raises(workdir.Moved) as caught:
        check_stays()
    unlock()
    unlock()
    way_out = f"removed or replaced while the run wrote in it; {workdir.continues(folder)}"
    if how != "removed":
        way_out = f"moved to {other} while the run wrote in it; with --workdir={other} the same command continues from step 5"
        assert (other / "lock").read_text() == ""
    assert str(caught.value) == f"{folder} was {way_out}"


def test_the_loop_looks_before_it_writes(tmp_path):
    """Nothing is written to a file or folder that replaced the run's folder."""
    config = load_config("tiny", "smoke", **{"sharding.mesh.data": 1, "phases": ("prior",), "checkpoint.every_steps": 1})
    config.evaluate.suites = {}
    checkpoints, calls = open_checkpoints(tmp_path / "run" / "checkpoints", every_steps=1), []

    def check_stays():
        calls.append(None)
        if len(calls) == 5:
            checkpoints.wait()
            (tmp_path / "run").rename(tmp_path / "moved")
            raise workdir.Moved("moved")

    with pytest.raises(workdir.Moved):
        train.train(build(config), tmp_path / "run", checkpoints, log_options={"live": False}, check_stays=check_stays)
    checkpoints.close()
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "moved" / "checkpoints" / "1").is_dir()


def test_a_log_that_is_removed_or_cut_meanwhile_is_said(tmp_path):
    said, path = [], tmp_path / "metrics.jsonl"
    with run_log.open_log(tmp_path, total_steps=4, tracker="none", live=False) as log:
        log.say = said.append
        log.write(1, "rl", {})
        path.rename(tmp_path / "aside")
        log.write(2, "rl", {})
        path.write_text("")
        log.write(3, "rl", {})
        log.write(4, "rl", {})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [3, 4]
    assert [json.loads(line)["step"] for line in (tmp_path / "aside").read_text().splitlines()] == [1]
    assert said == [
        f"warning: {path} was {what} while the run wrote it; the lines from step {step} on go to {path}"
        for step, what in ((2, "moved or removed"), (3, "replaced or cut"))
    ]


# --- files that hold nonsense ---

NONSENSE = ["", "{", "123", "[]", '"text"', "null", "\x1b[2J\x00", "[" * 100_000]


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "rollouts.jsonl", "summary.json", "lock", "checkpoints", "tensorboard"]
)
def test_a_folder_in_a_files_place_and_a_file_in_a_folders_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_text("") if name in workdir.FOLDERS else path.mkdir()
    kind = "no folder, and a run has a folder" if name in workdir.FOLDERS else "no file, and a run has a file"
    for mode in workdir.RESUME:
        with pytest.raises(ValueError, match=rf"^{path} is {kind} of this name; move it away$"):
            check(tmp_path, mode)


@pytest.mark.parametrize("text", [*NONSENSE, "{}", '{"done": "yes"}', '{"done": []}'])
def test_a_summary_that_is_none_is_said(tmp_path, text, monkeypatch):
    (tmp_path / "summary.json").write_text(text)
    assert not workdir.is_done(tmp_path)
    (line,) = check(tmp_path)
    assert line.startswith(f"{tmp_path / 'summary.json'} is not a summary of a run; ")
    monkeypatch.chdir(tmp_path)
    free = default_workdir("configs/tiny.py", "text")
    free.mkdir(parents=True)
    (free / "summary.json").write_text(text)
    assert default_workdir("configs/tiny.py", "text") == free


@pytest.mark.parametrize("text", NONSENSE)
def test_a_config_that_is_none_is_made_good_from_the_checkpoint(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert check(tmp_path) == [f"{path} is no config of a run; written anew"]
    host = tmp_path / "checkpoints" / "5" / "host"
    host.mkdir(parents=True)
    (tmp_path / "checkpoints" / "9" / "host").mkdir(parents=True)
    (tmp_path / "checkpoints" / "9" / "host" / "metadata").write_text(text)
    (host / "metadata").write_text(json.dumps({"host": {"config": json.loads(TEXT)}}))
    told = "written anew, after a comparison with the config in the checkpoint of step 5"
    assert check(tmp_path) == [f"{path} is no config of a run; {told}"]
    path.unlink()
    assert check(tmp_path) == [f"{path} is missing; {told}"]
    with pytest.raises(ValueError, match="another config"):
        check(tmp_path, text=TEXT.replace('"seed": 0', '"seed": 1'))


@pytest.mark.parametrize("text", [*NONSENSE, '{"step": "3"}', '{"step": null}', '{"step": true}', '{"step": 1.5}', "{}"])
def test_a_line_that_is_none_is_left_out_and_kept_aside(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    whole = f'{{"step": 1, "time_s": 5}}\n{text}\n{{"step": 2, "time_s": "soon"}}\n{{"step": 3}}\n{{"st'
    path.write_text(whole)
    kept = files.truncate(path, 2)
    assert (kept.steps, kept.dropped, kept.aside) == ([1, 2], 2, tmp_path / "metrics.jsonl.1")
    assert kept.aside.read_text() == whole
    assert path.read_text() == '{"step": 1, "time_s": 5}\n{"step": 2, "time_s": "soon"}\n'
    with run_log.open_log(tmp_path, total_steps=4, resume_step=2, tracker="none", live=False) as log:
        log.write(3, "rl", {})


def test_steps_that_a_log_lacks_are_named():
    assert files.lacking(range(11), [(0, 0, 1), (1, 10, 1)]) == ""
    assert files.lacking([0, 3, 6, 7, 10], [(0, 0, 1), (1, 7, 3), (8, 10, 3)]) == ""
    assert files.lacking([], [(0, 0, 1), (1, 7, 3), (8, 10, 3)]) == "0, 1 to 7, 8 to 10"
    assert files.lacking([0, 3, 7], [(0, 0, 1), (1, 7, 3), (8, 10, 3)]) == "4 to 6, 8 to 10"
    assert files.lacking([1, 2, 9], [(1, 2, 1), (3, 9, 1)]) == "3 to 8"
    assert files.lacking([4], [(1, 4, 4), (5, 4, 4), (9, 4, 4)]) == ""  # phases that the run has not come to


def test_lines_that_somebody_removed_are_said(tmp_path):
    run = build(load_config("tiny", "smoke", **{"sharding.mesh.data": 1, "prior.log_every": 2}))
    config = json.loads(TEXT)
    found = resume.Found(5, {"waiting": [], "config": config | {"prior": {"log_every": 2}}}, None, None)

    def said(metrics_steps, rollouts_steps):
        for name, steps in (("metrics.jsonl", metrics_steps), ("rollouts.jsonl", rollouts_steps)):
            (tmp_path / name).write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
        lines = []
        resume.cut_logs(run, tmp_path, found, lines.append)
        return [line.replace(str(tmp_path), "") for line in lines]

    assert said([0, 2, 4, 4, 5], [5, 5]) == []
    assert said([0, 2, 4, 5, 6], [5, 6]) == [
        "dropped lines of steps that will be repeated: 1 of metrics.jsonl, 1 of rollouts.jsonl"
    ]
    lacks = "warning: /metrics.jsonl lacks steps {}, which are not repeated"
    assert said([0, 4, 5], [5]) == [lacks.format("1 to 3")]
    assert said([0, 2], []) == [lacks.format("3 to 4, 5"), "warning: /rollouts.jsonl lacks steps 5, which are not repeated"]
    (tmp_path / "metrics.jsonl").unlink()
    lines = []
    resume.cut_logs(run, tmp_path, found, lines.append)
    assert lines[0] == f"warning: {tmp_path / 'metrics.jsonl'} lacks steps 0, 1 to 4, 5, which are not repeated"


def test_control_characters_in_a_lock_are_escaped(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "BEAT_S", 0.01)
    (tmp_path / "lock").write_bytes(b"\x1b[2J\xff\x00 evil\nhost\r" + bytes(10_000))
    said = []
    workdir.lock(tmp_path, said.append)()
    assert all(line.isprintable() and len(line) < 2000 for line in said)
    assert r"\x1b[2J" in said[-1]


@pytest.mark.parametrize("section", ["model", "text"])
def test_a_runs_config_whose_sections_are_none_is_named(tmp_path, section):
    (tmp_path / "checkpoints").mkdir()
    config = {"model": {}, "text": {}} | {section: [1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json is no config of a run"):
        warm_start.find(tmp_path)


# --- home folders ---


def test_a_home_folder_is_found_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        keep_compiled("~/compiled")
        assert jax.config.jax_compilation_cache_dir.startswith(f"{tmp_path}/compiled/")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path}/run"):
        warm_start.find("~/run")
    with pytest.raises(FileNotFoundError, match=r"no folder .*~nobody-of-this-name"):
        warm_start.find("~nobody-of-this-name/run")


@pytest.mark.parametrize("half_made", ["999", "999/host", "999/state"])
def test_an_empty_or_half_made_checkpoint_of_a_later_step_is_set_aside(tmp_path, half_made):
    run = build(load_config("tiny", "smoke", **{"sharding.mesh.data": 1, "phases": ("rl",)}))
    _, placed = learner.state_shapes(run.model, run.phases[0].optimizer, run.mesh)
    make = jax.jit(lambda key: learner.new_state(run.model.init(key), run.phases[0].optimizer), out_shardings=placed)
    folder = tmp_path / "checkpoints"
    saved = open_checkpoints(folder)
    saved.save(1, make(jax.random.key(0)), dataclasses.asdict(resume.Progress()) | {"phase": 0})
    saved.close()
    (folder / half_made).mkdir(parents=True)
    workdir.check_steps(tmp_path, 2)  # that of 999 says nothing
    with pytest.raises(ValueError, match="has a checkpoint of step 1, and the phases have 0 steps"):
        workdir.check_steps(tmp_path, 0)
    saved, said = open_checkpoints(folder), []
    assert resume.find_newest(run, saved, said.append).step == 1
    saved.close()
    assert [line.endswith("; set aside") for line in said] == [True]
    assert sorted(path.name for path in folder.iterdir()) == ["1", "999.damaged"]
