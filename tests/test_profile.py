"""A trace of some steps, with named regions."""

import gzip
import json

import pytest
from runs import load_config, main

from jaxreason.build import build
from jaxreason.runtime import checkpoint
from jaxreason.runtime.profile import Trace, parse_steps
from jaxreason.train import Stopped, train


def test_steps_are_read():
    assert parse_steps("10:12", 20) == (10, 12)
    assert parse_steps(" 3 ", 3) == (3, 3)
    for wrong in ("12:10", "0:3", "3:21", "ten", "", "1:2:3", "-1:2", "1.5:2"):
        with pytest.raises(ValueError, match="allowed: FIRST:LAST within 1:20"):
            parse_steps(wrong, 20)


@pytest.mark.process
def test_wrong_steps_are_one_line(tmp_path):
    code, _, err = main("--config=configs/tiny.py:smoke", f"--workdir={tmp_path / 'run'}", "--profile_steps=5:99")
    assert code == 1
    assert err.strip().splitlines()[-1].startswith("error: --profile_steps got '5:99'; allowed: FIRST:LAST within 1:6")
    assert not (tmp_path / "run").exists()


def raise_error(*args, **kwargs):
    raise RuntimeError("no room\nfor it")


@pytest.mark.parametrize("fails", ["start_trace", "stop_trace"])
def test_a_trace_that_fails_is_given_up(tmp_path, monkeypatch, fails):
    said: list[str] = []
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr("jax.profiler." + name, raise_error if name == fails else lambda *args, **kwargs: None)
    trace = Trace(tmp_path / "profile", (1, 2), said.append)
    for step in (1, 2, 3):
        trace.begin_step(step)
        trace.enter("step")
        trace.leave()
        assert not trace.end_step(step, {})
    trace.close()
    (line,) = said
    assert line == f"warning: can't write a trace to {tmp_path / 'profile'}: no room for it; the run continues without it"


def test_a_run_that_continues_behind_the_steps_says_so(tmp_path):
    said: list[str] = []
    Trace(tmp_path, (2, 4), said.append).resume(3)
    Trace(tmp_path, None, said.append).resume(3)
    assert said == []
    Trace(tmp_path, (2, 4), said.append).resume(4)
    assert said == ["warning: nothing is traced: the run continues after step 4, and --profile_steps ends at 4"]


def test_a_folder_that_cannot_be_made_is_no_end_of_a_run(tmp_path):
    said: list[str] = []
    (tmp_path / "profile").write_text("")
    Trace(tmp_path / "profile", (1, 1), said.append).begin_step(1)
    assert len(said) == 1


def test_a_run_that_is_stopped_within_the_steps_has_their_trace(tmp_path):
    config = load_config("tiny", "smoke", **{"phases": ("rl",), "rl.steps": 3})
    config.evaluate.suites = {}
    run = build(config, say=lambda line: None)._replace(profile_steps=(1, 3))
    checkpoints = checkpoint.open_checkpoints(tmp_path / "checkpoints", **config.checkpoint.to_dict())
    with pytest.raises(Stopped):
        train(run, tmp_path, checkpoints, log_options={"live": False}, stop=lambda: "stopped")
    checkpoints.close()
    assert list((tmp_path / "profile").rglob("perfetto_trace.json.gz"))


def test_a_trace_has_the_regions_of_its_steps(tmp_path):
    config = load_config("tiny", "smoke", **{"phases": ("rl",), "rl.steps": 3})
    config.evaluate.suites = {}
    run = build(config, say=lambda line: None)._replace(profile_steps=(2, 3))
    checkpoints = checkpoint.open_checkpoints(tmp_path / "checkpoints", **config.checkpoint.to_dict())
    train(run, tmp_path, checkpoints, log_options={"live": False})
    checkpoints.close()
    (path,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    for region, least in (("sample", 2), ("verify", 2), ("batch", 2), ("step", 2)):
        assert names.count(region) >= least, region
    assert names.count("batch") == 2  # of the steps 2 and 3 alone
