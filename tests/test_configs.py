"""Every config runs in its `smoke` form, from start to summary, with inputs made
here.
"""

import subprocess
import sys
from pathlib import Path

import jax
import pytest
from gsm8k_folder import write_gsm8k
from runs import ROOT, load_config, read_lines, run_config

from jaxreason.types import Evaluation

GOLDEN = Path(__file__).parent / "golden"
ROWS = [(f"Tom has {n} pens and buys {m}. How many?", f"He has {n} + {m}.\n#### {n + m}") for n in range(4) for m in range(6)]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Write a Hugging Face folder with random weights, a real tokenizer and a chat
    template.
    """
    from jaxreason import text
    from jaxreason.model import ModelConfig, transformer, weights

    shape = ModelConfig(text.load(GOLDEN / "chat").vocab_size, 32, 2, 4, 2, 8, 64, tied_embeddings=True)
    folder = tmp_path_factory.mktemp("checkpoint")
    weights.save(folder, shape, transformer(shape).init(jax.random.key(0)), tokenizer_folder=GOLDEN / "chat")
    return folder


@pytest.fixture
def gsm8k(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(write_gsm8k(tmp_path / "data", {"train": ROWS[8:], "test": ROWS[:8]})))


def check_run(workdir, summary, phases):
    """Check the files that every run folder holds."""
    assert summary["done"]
    lines = read_lines(workdir / "metrics.jsonl")
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert steps[-1] == summary["steps"]
    assert [p for p in dict.fromkeys(line["phase"] for line in lines) if p != "start"] == phases
    assert all(line["train/loss"] is not None for line in lines if "train/loss" in line)
    assert list(workdir.glob("tensorboard/events*"))
    for e in summary["evaluations"]:
        assert e.keys() == set(Evaluation._fields)
        assert (len(e["verdicts"]), e["verdicts"].count("1")) == (e["n"], round(e["accuracy"] * e["n"]))
        assert 0 <= e["low"] <= e["accuracy"] <= e["high"] <= 1


def test_scalerl_on_chains(tmp_path):
    config = load_config("scalerl", "task=chain,smoke", **{"sharding.mesh.data": 1})
    assert (config.rl.objective.name, config.rl.objective.weigh, config.rl.source.lag) == ("cispo", "per_mixed_prompt", 1)
    check_run(tmp_path, run_config(config, tmp_path), ["prior", "rl"])
    assert load_config("scalerl", "task=chain").rl.source.lag == 8
    with pytest.raises(ValueError, match="size and model are for task=gsm8k"):
        load_config("scalerl", "task=chain,size=8b")


@pytest.mark.parametrize("options", ["", "prior=none", "reward=random", "task=inverse_chain"])
def test_tiny(tmp_path, options):
    fields = {"sharding.mesh.data": 1} if options else {}  # else all eight devices
    summary = run_config(load_config("tiny", f"{options},smoke", **fields), tmp_path)
    check_run(tmp_path, summary, ["rl"] if "none" in options else ["prior", "rl"])
    assert summary["evaluations"][0]["phase"] == "start"
    assert {e["temperature"] for e in summary["evaluations"]} == {0.0, 1.0}
    rollouts = read_lines(tmp_path / "rollouts.jsonl")
    assert {"prompt", "text", "reward", "correct", "parsed", "reason", "stop", "logp_sum", "length"} <= rollouts[0].keys()
    assert all(r["logp_sum"] <= 0 and r["stop"] in ("eos", "limit") for r in rollouts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["countdown", "pretrain"])
def test_cpu_config(tmp_path, name, monkeypatch):
    monkeypatch.chdir(ROOT)
    summary = run_config(load_config(name, "smoke", **{"sharding.mesh.data": 1}), tmp_path)
    check_run(tmp_path, summary, ["pretrain"] if name == "pretrain" else ["prior", "rl"])
    if name == "pretrain":
        assert [loss["text"] for loss in summary["losses"]] == ["held_out", "held_out"]
        assert summary["losses"][-1]["nll"] < summary["losses"][0]["nll"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "phase"), [("gsm8k", "rl"), ("sft", "sft"), ("scalerl", "rl")])
def test_pretrained_config(tmp_path, checkpoint, gsm8k, name, phase):
    summary = run_config(load_config(name, f"model={checkpoint},smoke", **{"sharding.mesh.data": 1}), tmp_path)
    check_run(tmp_path, summary, [phase])
    assert summary["evaluations"][-1]["n"] == 8
    if name != "sft":
        first = read_lines(tmp_path / "rollouts.jsonl")[0]
        assert first["question"] in first["prompt"]
        assert "<|start|>" in first["prompt"]


def test_gsm8k_imitates_before_rl_and_trains_adapters_where_its_size_says_so(checkpoint, gsm8k):
    from jaxreason.build import build

    assert load_config("gsm8k", "size=8b,sft=100").sft.steps == 100
    config = load_config("gsm8k", f"size=8b,sft=100,model={checkpoint},smoke", **{"sharding.mesh.data": 1})
    run = build(config, say=lambda line: None)
    assert [(phase.name, phase.steps) for phase in run.phases] == [("sft", 2), ("rl", 2)]
    assert run.model.config.lora.rank == 32


@pytest.mark.process
def test_gsm8k_says_what_to_do_without_weights_or_data(tmp_path, checkpoint):
    """Offline, the real command prints one line and exits with code 2; nothing is
    compiled.
    """
    environment = {"TFDS_DATA_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    for model, words in (("qwen2.5_0.5b", "hf download"), (checkpoint, "TFDS_DATA_DIR")):
        command = [sys.executable, "-m", "jaxreason.main", f"--config=configs/gsm8k.py:model={model}"]
        got = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert got.returncode != 0
        lines = got.stderr.strip().splitlines()
        assert len(lines) == 1, got.stderr
        assert lines[0].startswith("error: ")
        assert words in lines[0]
        assert lines[0].count("or ") >= 2  # three things to do
