"""A trace of some steps, with named regions."""

import gzip
import json

import pytest
from runs import load_config, main

from jaxreason.build import build
from jaxreason.runtime import checkpoint
from jaxreason.runtime.profile import parse_steps
from jaxreason.train import train


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
