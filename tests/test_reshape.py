"""A run stopped on one mesh and continued on others is the same run, up to the rounding
of sums.

One run of three phases is made in four pieces. Each piece continues where the one
before was killed, on another mesh and with other micro-batches, which is harmless and
needs no `--accept_config_change`; the last piece runs as two processes. It is compared
with the same run on one device in one piece.

Found (jax 0.10.2, CPU, 2026-11-24): the same batches, problems and texts throughout;
params differ by 1.2e-7, the last bit of a number near 1, and moments by 1e-5 of the
largest.
"""

import json
import runpy

import jax
import numpy as np
import pytest
from runs import Killed, finish, killed_after, maths, params_of, read_lines, run_config, start, train_command

from jaxreason.main import config_text
from jaxreason.runtime import workdir

pytestmark = pytest.mark.process

# All three sources and a reference policy. Of gradients that are rounding alone Adam
# would make whole steps, were eps below them.
CONFIG = """
import runpy

def get_config(arg=""):
    config = runpy.run_path("configs/tiny.py")["get_config"]("smoke")
    config.sharding.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    config.phases = ("prior", "sft", "rl")
    config.prior.log_every = 1
    task = config.prior.source.task.to_dict()
    source = {"name": "demonstrations", "task": task, "rows": 32, "max_tokens": 48}
    config.sft = {"source": source, "objective": {"name": "sft"}, "optimizer": {"lr": 1e-3}, "microbatches": 2}
    config.rl.objective = {"name": "dapo", "kl_coefficient": 0.1, "entropy_coefficient": 0.01}
    for phase in config.phases:
        config[phase].steps, config[phase].optimizer.eps = 4, 1e-4
    config.evaluate.suites = {"chain": config.evaluate.suites.chain.to_dict()}
    config.checkpoint.every_steps = 2
    return config
"""
# Mesh, micro-batches, and how often a piece saves before it is killed; and of which
# steps there are checkpoints then.
PIECES = [
    ({"data": 1, "fsdp": 1, "tensor": 1}, 2, 1, [2]),
    ({"data": 2, "fsdp": 2, "tensor": 2}, 1, 2, [4, 6]),
    ({"data": 1, "fsdp": 8, "tensor": 1}, 4, 2, [8, 10]),
]
LAST = ({"data": 2, "fsdp": 2, "tensor": 1}, 2)  # by two processes
# What is to be as in one piece, to so many parts; `train/nll` would tell of another
# batch.
SAME = {
    "step": 0,
    "phase": 0,
    "train/tokens": 0,
    "rollout/reward": 0,
    "train/nll": 1e-5,
    "train/grad_norm": 1e-4,
    "train/kl": 1e-3,
}


def fields_of(mesh: dict, microbatches: int) -> dict:
    fields = {f"sharding.mesh.{axis}": size for axis, size in mesh.items()}
    return fields | {f"{phase}.microbatches": microbatches for phase in ("prior", "sft", "rl")}


def texts(path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "logp_sum"} for line in read_lines(path / "rollouts.jsonl")]


@pytest.mark.slow
def test_other_meshes_micro_batches_and_processes_go_on_with_the_same_run(tmp_path, monkeypatch):
    path, whole, pieces = tmp_path / "run.py", tmp_path / "whole", tmp_path / "pieces"
    path.write_text(CONFIG)
    pieces.mkdir()
    for mesh, microbatches, saves, steps in PIECES:
        config = runpy.run_path(str(path))["get_config"]()
        config.update_from_flattened_dict(fields_of(mesh, microbatches))
        workdir.check(pieces, config_text(config), resume="auto", accept_config_change=False, say=print)  # as `main` does
        (pieces / "config.json").write_text(config_text(config))
        with monkeypatch.context() as patch:
            killed_after(patch, saves)
            with pytest.raises(Killed):
                run_config(config, pieces)
        assert sorted(int(folder.name) for folder in (pieces / "checkpoints").iterdir()) == steps
    stopped = [line for line in read_lines(pieces / "rollouts.jsonl") if line["step"] <= 10]
    assert sum("suite" not in line for line in stopped) == 32
    changes = [f"--config.{name}={value}" for name, value in fields_of(*LAST).items()]
    found = finish(start(train_command(str(path), pieces, *changes), 2, 2))
    assert [code for code, _, _ in found] == [0, 0], found
    assert "going on from step 10 of 12, in phase rl" in found[0][1]
    assert "config changed: sharding.mesh.fsdp: 8 there, 2 here" in found[0][2]

    run_config(runpy.run_path(str(path))["get_config"](), whole)
    assert read_lines(pieces / "rollouts.jsonl")[: len(stopped)] == stopped
    assert texts(pieces) == texts(whole)
    for line, expected in zip(maths(pieces), maths(whole), strict=True):
        for name in SAME.keys() & expected.keys():
            close = pytest.approx(expected[name], rel=SAME[name], abs=1e-7) if SAME[name] else expected[name]
            assert line[name] == close, f"{name} at step {line['step']}"
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (pieces, whole)]
    assert summaries[0]["evaluations"] == summaries[1]["evaluations"]
    (step, state), (_, expected) = params_of(pieces), params_of(whole)
    assert step == 12
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), state["params"], expected["params"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max()),
        state["opt_state"],
        expected["opt_state"],
    )
