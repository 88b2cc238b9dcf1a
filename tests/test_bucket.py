"""A run in a bucket: its records and checkpoints get there, and a new machine continues
from them. The bucket is a stand-in (`fake_gcs`), the libraries are the real ones.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import fake_gcs
import jax
import numpy as np
import pytest
from runs import HANG_S, ROOT, SMOKE, finish, maths, params_of, read_lines, start, train_command, xla_flags

pytest.importorskip("gcsfs")

from jaxreason.runtime import bucket, workdir
from jaxreason.runtime import mirror as mirrors
from jaxreason.runtime.mirror import local, mirrored

URL = f"gs://{fake_gcs.NAME}/runs/one"
COMMAND = (f"--config={SMOKE}", "--config.checkpoint.every_steps=1", "--config.checkpoint.keep=3")


@pytest.fixture(scope="module")
def server():
    with fake_gcs.serving() as (there, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield there, environment


@pytest.fixture
def there(server, tmp_path, monkeypatch):
    """Return the bucket, empty, as it is seen from an empty machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found, _ = server
    found.objects.clear()
    found.fails = lambda method, path: None
    return found


def begin(cache: Path, *more: str, url: str | Path = URL) -> subprocess.Popen:
    environment = {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-m", "jaxreason.main", *COMMAND, f"--workdir={url}", *more],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=HANG_S)
    return process.returncode, output


def assert_same_run(found: Path, expected: Path) -> None:
    (step, state), (wanted_step, wanted) = params_of(found), params_of(expected)
    assert step == wanted_step
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    assert maths(found) == maths(expected)
    assert read_lines(found / "rollouts.jsonl") == read_lines(expected / "rollouts.jsonl")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (found, expected)]
    assert summaries[0]["evaluations"] == summaries[1]["evaluations"]
    assert all(each["done"] for each in summaries)


def to_files(there: fake_gcs.Bucket, folder: Path) -> Path:
    """Write all objects of the run as files."""
    for name, (contents, _) in there.objects.items():
        path = folder / name.removeprefix("runs/one/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    return folder


@pytest.mark.slow
@pytest.mark.process
def test_killed_anywhere_and_resumed_on_a_new_machine_is_uninterrupted(there, tmp_path):
    """A SIGKILL comes while a checkpoint is written, between the records and the
    checkpoint, after the checkpoint, and while records are copied. Each process finds an
    empty home.
    """
    assert ended(begin(tmp_path / "local", url=tmp_path / "whole"))[0] == 0
    points = ["checkpoints/1/", "checkpoints/2/host", "checkpoints/4/commit_success", "rollouts.jsonl", "checkpoints/6/state"]
    for number, point in enumerate(points):
        running: list[subprocess.Popen] = []

        def kill(method: str, path: str, point=point, running=running) -> None:
            if method == "POST" and point in path and running:
                running[0].send_signal(signal.SIGKILL)
                running.clear()

        there.fails = kill
        running.append(process := begin(tmp_path / f"machine{number}"))
        code, output = ended(process)
        assert code == -signal.SIGKILL, f"{point}: {output}"
    there.fails = lambda method, path: None
    code, output = ended(begin(tmp_path / "last"))
    assert code == 0, output
    assert "going on from step" in output
    assert f"{URL}/summary.json" in output
    assert_same_run(to_files(there, tmp_path / "found"), tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_write_one_run(there, tmp_path):
    command = train_command(SMOKE, URL)
    for code, error, output in finish(start(command, 2, 1, XDG_CACHE_HOME=str(tmp_path) + "/host{process}")):
        assert code == 0, error + output
    whole = to_files(there, tmp_path / "found")
    assert json.loads((whole / "summary.json").read_text())["done"]
    assert params_of(whole)[0] == 6


@pytest.mark.process
def test_tools_read_a_run_in_a_bucket(there, tmp_path, monkeypatch):
    code, output = ended(begin(tmp_path / "trains"))
    assert code == 0, output
    assert "lock" not in {name.rpartition("/")[2] for name in there.objects}
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT)}
    commands = [
        ["jaxreason.view", URL],
        ["jaxreason.report", URL, "--out=page.html"],
        ["jaxreason.export", URL, "exported"],
        ["jaxreason.export", f"{URL}/checkpoints/5", "exported5"],
        ["jaxreason.evaluate", f"--checkpoint={URL}", "--n=4", "--workdir=evaluated"],
        ["jaxreason.main", f"--config={SMOKE}", f"--config.init_from={URL}", "--workdir=next"],
    ]
    for command in commands:
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=environment, timeout=HANG_S)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "page.html").exists()
    assert (tmp_path / "exported5" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.process
def test_a_damaged_checkpoint_is_set_aside(there, tmp_path):
    """The run goes on from the one before, to the same end."""
    process = begin(tmp_path / "first")

    def stop(method: str, path: str) -> None:
        if method == "POST" and "checkpoints/3/commit_success" in path:
            process.send_signal(signal.SIGTERM)

    there.fails = stop
    assert ended(process)[0] == 0
    there.fails = lambda method, path: None
    steps = {int(found[1]) for name in there.objects if (found := re.match(r"runs/one/checkpoints/(\d+)/commit_success", name))}
    last = f"runs/one/checkpoints/{max(steps)}/"
    largest = max((name for name in there.objects if name.startswith(f"{last}state/")), key=lambda n: len(there.objects[n][0]))
    there.put(largest, there.objects[largest][0][:100])
    code, output = ended(begin(tmp_path / "second"))
    assert code == 0, output
    assert f"runs/one/checkpoints/{max(steps)}.damaged/commit_success.txt" in there.objects
    assert ended(begin(tmp_path / "local", url=tmp_path / "whole"))[0] == 0
    assert_same_run(to_files(there, tmp_path / "found"), tmp_path / "whole")


# --- the parts, in this process ---


def said() -> tuple[list[str], object]:
    lines: list[str] = []
    return lines, lines.append


def test_records_are_copied_when_they_changed(there, tmp_path):
    lines, say = said()
    with mirrored(URL, say) as (folder, mirror):
        (folder / "metrics.jsonl").write_text("1\n")
        (folder / "tensorboard").mkdir()
        (folder / "tensorboard" / "events").write_text("x")
        mirror.send()
        held = dict(there.objects)
        assert {"runs/one/metrics.jsonl", "runs/one/tensorboard/events", "runs/one/lock"} == held.keys()
        mirror.send()
        assert there.objects == held
        with (folder / "metrics.jsonl").open("a") as file:
            file.write("2\n")
    assert there.objects["runs/one/metrics.jsonl"][0] == b"1\n2\n"
    assert there.objects["runs/one/tensorboard/events"] == held["runs/one/tensorboard/events"]
    assert "runs/one/lock" not in there.objects
    assert lines == []
    with mirrored(URL, say) as (again, _):
        assert (again / "metrics.jsonl").read_text() == "1\n2\n"
        assert (again.with_name("run.old") / "metrics.jsonl").exists()
    assert local(URL).joinpath("metrics.jsonl").read_text() == "1\n2\n"


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/run", "gs:bucket/run", "gs:/bucket/run",
     "gs://bucket", "gs://bucket/", "gs:///run", "gs://B/run", "gs://bucket/a//b", "gs://bucket/../x",
     "gs://bucket/a b", "gs://bucket/a#1", "gs://bucket/a*"],
)  # fmt: skip
def test_other_urls_are_refused(url):
    assert bucket.is_url(url)
    with pytest.raises(ValueError, match="allowed"):
        bucket.check_url(url)


def test_a_bucket_that_cannot_be_written_is_named_in_one_line(there):
    there.fails = lambda method, path: 403 if method == "POST" else None
    with pytest.raises(ValueError, match=rf"can't use {URL}: .*403") as error, mirrored(URL, print):
        pass
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="can't use gs://nobody/run"), mirrored("gs://nobody/run", print):
        pass
    there.fails = lambda method, path: None
    with pytest.raises(FileNotFoundError, match="no folder gs://bucket/runs/none"):
        local("gs://bucket/runs/none")


def test_a_lock_of_another_host_is_watched(there, monkeypatch):
    monkeypatch.setattr(workdir, "BEAT_S", 0.2)
    lines, say = said()
    there.put("runs/one/lock", b"host elsewhere, pid 3, since then, beat 0")
    with mirrored(URL, say):
        assert socket.gethostname() in there.objects["runs/one/lock"][0].decode()
    assert "is of another host" in lines[0]
    assert "which has died; taking it over" in lines[1]

    alive = threading.Event()

    def beat() -> None:
        number = 0
        while not alive.wait(0.05):
            number += 1
            there.put("runs/one/lock", f"host elsewhere, pid 3, since then, beat {number}".encode())

    there.put("runs/one/lock", b"host elsewhere, pid 3, since then, beat 0")
    threading.Thread(target=beat, daemon=True).start()
    with pytest.raises(ValueError, match=f"{URL} is in use by host elsewhere, pid 3"), mirrored(URL, say):
        pass
    alive.set()


def test_a_run_ends_when_another_takes_its_folder_over(there, monkeypatch):
    lines, say = said()
    with mirrored(URL, say) as (folder, mirror):
        (folder / "config.json").write_text("{}")
        there.put("runs/one/lock", b"host elsewhere, pid 3, since then, beat 0")
        with pytest.raises(workdir.Moved, match=f"{URL} was taken over by host elsewhere"):
            mirror.send()  # at a checkpoint
        with pytest.raises(workdir.Moved, match=f"{URL} was taken over by host elsewhere"):
            mirror.check()  # after the step
    monkeypatch.setattr(workdir, "BEAT_S", 0.05)
    there.objects.clear()
    with mirrored(URL, say) as (folder, mirror):
        (folder / "config.json").write_text("{}")
        there.put("runs/one/lock", b"host elsewhere, pid 3, since then, beat 0")
        mirror.threads[0].join(HANG_S)  # between checkpoints
        with pytest.raises(workdir.Moved, match=f"{URL} was taken over by host elsewhere"):
            mirror.send()
    assert "runs/one/config.json" not in there.objects  # it is the other run's folder now
    assert there.objects["runs/one/lock"][0].startswith(b"host elsewhere")
    assert str(folder) in lines[-1]


def test_two_runs_of_one_host_do_not_share_a_folder(there):
    with mirrored(URL, print), pytest.raises(ValueError, match=f"{URL} is in use by"), mirrored(URL, print):
        pass


def test_errors_name_the_bucket_and_not_the_mirror(there):
    with pytest.raises(ValueError, match=f"^{URL}/config.json is bad$"), mirrored(URL, print) as (folder, _):
        raise ValueError(f"{folder}/config.json is bad")


def test_long_urls_have_folders_of_their_own(there):
    long = f"gs://bucket/{'a' * 300}/run"
    with mirrored(long, print) as (one, _), mirrored(long.replace("bucket/a", "bucket/b"), print) as (other, _):
        assert one != other


def test_an_incomplete_checkpoint_is_no_checkpoint(there):
    with mirrored(URL, print) as (folder, _):
        there.put("runs/one/checkpoints/3/host/metadata", b"{}")
        assert workdir.saved_at(folder) == []
        there.put("runs/one/checkpoints/3/commit_success.txt", b"")
        assert workdir.saved_at(folder) == [3]


def test_names_that_are_no_files_here_are_left_out(there, tmp_path):
    """The console marks folders with empty objects, and an object may have any name."""
    odd = ["", "tensorboard/", "/x", "../../../evil", "./x", "a" * 300, "both"]
    for name in [*odd, "config.json", "tensorboard/events", "a b#?*[ü]", "both/x"]:
        there.put(f"runs/one/{name}", b"1")
    with mirrored(URL, print) as (folder, _):
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == ["a b#?*[ü]", "both/x", "bucket.json", "config.json", "tensorboard/events"]
    there.objects.clear()
    there.put("runs/one/", b"")
    with pytest.raises(FileNotFoundError, match="no folder"):
        local(URL)


def test_links_and_pipes_in_a_mirror_are_not_copied(there, tmp_path):
    with mirrored(URL, print) as (folder, mirror):
        (folder / "loop").symlink_to(folder)
        (folder / "missing").symlink_to("/nonexistent")
        os.mkfifo(folder / "pipe")
        (folder / "file").write_text("1")
        mirror.send()
    assert [name for name in there.objects if "lock" not in name] == ["runs/one/file"]


@pytest.mark.parametrize("length", [100, 30 << 20])
def test_a_copy_that_is_broken_off_leaves_the_object_as_it_was(there, length):
    there.put("runs/one/records", b"whole")

    class Breaks:
        def __init__(self):
            self.pieces = [b"x" * length]

        def open(self, mode: str):
            return contextlib.nullcontext(self)

        def read(self, most: int) -> bytes:
            if self.pieces:
                return self.pieces.pop()
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        mirrors.copy(Breaks(), bucket.remote(f"{URL}/records"))
    gc.collect()
    assert there.objects["runs/one/records"][0] == b"whole"


def test_a_lock_of_a_host_with_the_same_name_is_watched(there, monkeypatch):
    """Containers often have the same host name, and their own process ids."""
    monkeypatch.setattr(workdir, "BEAT_S", 0.05)
    for lock in (f"host {socket.gethostname()}, pid 1 of 0123456789abcdef, since then, beat 0".encode(), b"\xff\xfe"):
        lines, say = said()
        there.put("runs/one/lock", lock)
        with mirrored(URL, say):
            pass
        assert "watching" in lines[0]
    died = subprocess.Popen(["true"])
    died.wait()
    lines, say = said()
    held = f"host {socket.gethostname()}, pid {died.pid} of {mirrors.process_space()}, since then, beat 0"
    there.put("runs/one/lock", held.encode())
    with mirrored(URL, say):
        pass
    assert [line for line in lines if "watching" in line] == []


def test_the_last_copy_waits_for_the_network(there, monkeypatch):
    monkeypatch.setattr(mirrors, "RETRY_S", 0.01)
    lines, say = said()
    with mirrored(URL, say) as (folder, mirror):
        (folder / "file").write_text("1")
        send, fails = mirror.copies.send, [1, 2, 3]

        def flaky() -> None:
            if fails:
                fails.pop()
                raise ConnectionError("no network")
            send()

        mirror.copies.send = flaky
    assert there.objects["runs/one/file"][0] == b"1"
    assert len(lines) == 1
    assert "no network; trying again" in lines[0]
    assert "runs/one/lock" not in there.objects


def test_a_mirror_that_cannot_be_written_is_named(there, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    there.put("runs/one/config.json", b"{}")
    for use in (lambda: local(URL), lambda: mirrored(URL, print).__enter__()):
        with pytest.raises(ValueError, match=r"can't write to .*Not a directory; .*XDG_CACHE_HOME"):
            use()


def test_a_reader_keeps_one_copy(there):
    there.put("runs/one/config.json", b"{}")
    first = local(URL)
    assert local(URL) == first
    assert not first.with_name("read.old").exists()


def test_a_free_name_in_a_bucket_is_free(there):
    for name in ("5.damaged", "5.damaged.1"):
        there.put(f"runs/one/checkpoints/{name}/x", b"")
    path = bucket.remote(f"{URL}/checkpoints/5.damaged")
    assert workdir.free_name(path).name == "5.damaged.2"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_the_last_copy_does_not_wait_for_a_bucket_that_is_gone(there, monkeypatch, status):
    monkeypatch.setattr(mirrors, "RETRY_S", HANG_S)
    lines, say = said()
    with mirrored(URL, say) as (folder, _):
        (folder / "file").write_text("1")
        there.fails = lambda method, path: status if method == "POST" else None
    assert [line for line in lines if "trying again" in line] == []
    assert str(folder) in lines[-1]
