"""Several processes on this machine: they act as one, agree before they start, and end
together.

Injected faults: another number of processes, config or flag, an input that only one of
them cannot read, a bug in one, and the death of either. No process hangs, and the
faulty one is named. Started again they end as if none had died, bit for bit.
"""

import json
import os
import re
import runpy
import signal
import time

import jax
import numpy as np
import pytest
from runs import HEARTBEAT_S, ROOT, finish, maths, params_of, read_lines, run_config, start, train_command

from jaxreason.runtime import processes

# All three sources, a reference policy, and text and tasks held out.
CONFIG = """
import runpy

def get_config(arg=""):
    config = runpy.run_path("configs/tiny.py")["get_config"]("smoke")
    config.sharding.mesh = {"data": 4, "fsdp": 2, "tensor": 1}
    config.phases = ("prior", "sft", "rl")
    config.prior.steps = 20
    task = config.prior.source.task.to_dict()
    source = {"name": "demonstrations", "task": task, "rows": 16, "max_tokens": 48}
    config.sft = {"source": source, "objective": {"name": "sft"}, "optimizer": {"lr": 1e-3}, "steps": 3, "microbatches": 2}
    config.rl.objective = {"name": "dapo", "kl_coefficient": 0.1, "entropy_coefficient": 0.01}
    config.rl.source.problems, config.rl.steps, config.rl.source.task.size = 8, 3, 12
    config.rl.source.replay, config.rl.source.curriculum = 3, {"name": "success_rate", "most": 0.8}
    config.verifier = {"name": "odd_texts:make"}
    for phase in config.phases:
        config[phase].optimizer.eps = 1e-4  # else Adam makes whole steps of gradients that are rounding
    config.evaluate.texts = {"solutions": {"task": task, "length": 32, "rows": 16}}
    return config
"""
VERIFIER = """
from jaxreason.types import Verdict

def make():
    return lambda text, task: Verdict(float(len(text) % 2), len(text) % 2 == 1, text)
"""


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_train_as_one(tmp_path, monkeypatch):
    path = tmp_path / "all.py"
    path.write_text(CONFIG)
    (tmp_path / "odd_texts.py").write_text(VERIFIER)
    monkeypatch.syspath_prepend(tmp_path)
    started = start(train_command(str(path), tmp_path / "two"), 2, 4)
    run_config(runpy.run_path(str(path))["get_config"](), tmp_path / "one")
    for code, stderr, _ in finish(started):
        assert code == 0, stderr
    (step, params), (_, expected) = params_of(tmp_path / "two"), params_of(tmp_path / "one")
    assert step == 26
    # Sums over devices are taken in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params["params"], expected["params"])
    two, one = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("two", "one"))
    assert two["evaluations"] == one["evaluations"]
    assert [loss["nll"] for loss in two["losses"]] == pytest.approx([loss["nll"] for loss in one["losses"]], rel=1e-5)
    two_lines, one_lines = (read_lines(tmp_path / name / "rollouts.jsonl") for name in ("two", "one"))
    assert sum("suite" not in line for line in two_lines) == 3 * 16  # of each step so many are kept
    for a, b in zip(two_lines, one_lines, strict=True):
        assert {k: v for k, v in a.items() if k != "logp_sum"} == {k: v for k, v in b.items() if k != "logp_sum"}
    assert any(line.get("rollout/replayed", 0) > 0 for line in read_lines(tmp_path / "two" / "metrics.jsonl"))


WARM = """
import runpy

def get_config(arg=""):
    config = runpy.run_path("configs/tiny.py")["get_config"]("smoke")
    config.sharding.mesh = {"data": 2, "fsdp": 2, "tensor": 1}
    config.phases, config.evaluate.suites = ("prior",), {}
    config.prior.optimizer.lr = 0.02 if arg == "trained" else 1e-30  # which moves no float
    return config
"""
VERIFIER = """
from jaxreason.types import Verdict

def make():
    return lambda text, task: Verdict(float(len(text) % 2), len(text) % 2 == 1, text)
"""


@pytest.mark.slow
@pytest.mark.process
def test_two_processes_begin_with_the_params_of_another_run(tmp_path):
    path = tmp_path / "warm.py"
    path.write_text(WARM)
    run_config(runpy.run_path(str(path))["get_config"]("trained"), tmp_path / "one")
    (tmp_path / "one" / "config.json").write_text(json.dumps({"model": {"name": "tiny", "layers": 1}, "text": {}}))
    (tmp_path / "home0").mkdir()
    (tmp_path / "home0" / "run").symlink_to(tmp_path / "one")
    command = train_command(str(path), tmp_path / "two", "--config.init_from=~/run")
    for process, (code, stderr, _) in enumerate(finish(start(command, 2, 2, HOME=str(tmp_path / "home{process}")))):
        assert code != 0
        assert f"error: {'process 1: ' * (process == 0)}config.init_from got '~/run': no folder {tmp_path}/home1/run" in stderr
    command[command.index("--config.init_from=~/run")] = f"--config.init_from={tmp_path / 'one'}"
    for code, stderr, _ in finish(start(command, 2, 2)):
        assert code == 0, stderr
    (step, params), (_, expected) = params_of(tmp_path / "two"), params_of(tmp_path / "one")
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, params["params"], expected["params"])


SAY = """
import sys, numpy as np
from jaxreason.runtime import processes
index = int(sys.argv[1])
processes.join(coordinator_address=sys.argv[2], num_processes=int(sys.argv[3]), process_id=index, heartbeat_timeout_s=10)
import jax
"""


def script(body: str) -> list[str]:
    return ["-c", (SAY + body).replace("{", "{{").replace("}", "}}"), "{process}", "localhost:{port}", "{count}"]


@pytest.mark.process
def test_every_process_gathers_the_values_of_all():
    body = """
sizes = [0, 3_000_000, 2**20 - 200][index]
for round in range(2):
    told = processes.gather((index, round, np.full(sizes, index, np.uint8), {"text": "x" * index}))
    assert [t[:2] for t in told] == [(p, round) for p in range(3)]
    assert [len(t[2]) for t in told] == [0, 3_000_000, 2**20 - 200]
    assert all((t[2] == p).all() and t[3] == {"text": "x" * p} for p, t in enumerate(told))

def read():
    if index == 1:
        raise FileNotFoundError("no such file: here.json")
    return 7

try:
    processes.on_all_processes(read)
except (ValueError, FileNotFoundError) as error:
    print(type(error).__name__, error)
assert processes.on_all_processes(lambda: 7) == 7
print("writes", processes.writes())
"""
    found = finish(start(script(body), 3, 1))
    assert [code for code, _, _ in found] == [0, 0, 0], found
    lines = [stdout.splitlines()[-2:] for _, _, stdout in found]
    assert lines[0] == ["ValueError process 1: no such file: here.json", "writes True"]
    assert lines[1] == ["FileNotFoundError no such file: here.json", "writes False"]
    assert lines[2] == ["ValueError process 1: no such file: here.json", "writes False"]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("tensor", [1, 2])
def test_params_reach_a_process_that_shares_the_axis_tensor_with_another(tensor):
    body = f"""
from jax.sharding import AxisType, Mesh
from jaxreason import sharding
from jaxreason.model import ModelConfig, transformer

home = Mesh(np.array(jax.devices()).reshape(2, 2).T[None], ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
assert len({{d.process_index for d in home.devices[0, 0]}}) == 2
mesh = sharding.make_mesh(tensor={tensor}, devices=jax.local_devices())
shape = {{"vocab_size": 24, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8, "feed_forward": 32}}
params = jax.tree.map(np.asarray, jax.jit(transformer(ModelConfig(**shape)).init)(jax.random.key(0)))
put = lambda x, where: jax.make_array_from_callback(x.shape, where, lambda index: x[index])
sent = sharding.send(jax.tree.map(put, params, sharding.shardings(params, home)), mesh)
jax.tree.map(np.testing.assert_array_equal, jax.device_get(sent), params)
assert jax.tree.map(lambda x: x.sharding, sent) == sharding.gathered(params, mesh)
"""
    for code, stderr, _ in finish(start(script(body), 2, 2)):
        assert code == 0, stderr


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_is_killed_ends_the_others(tmp_path, dies):
    started = start(
        train_command("configs/tiny.py:smoke", tmp_path, "--config.prior.steps=100000", "--config.prior.log_every=1"), 2, 2
    )
    log = tmp_path / "metrics.jsonl"
    deadline_s = time.time() + 240
    while not (log.is_file() and len(log.read_text().splitlines()) > 5):
        assert time.time() < deadline_s
        assert all(process.poll() is None for process in started), finish(started)
        time.sleep(0.2)
    started[dies].send_signal(signal.SIGKILL)
    killed_s = time.time()
    found = finish(started, timeout_s=HEARTBEAT_S + 60)
    assert time.time() - killed_s < HEARTBEAT_S + 45
    code, stderr, _ = found[1 - dies]
    assert code != 0
    # These are jax's words: process 0, to which all others report, is the leader.
    named = r"leader task was preempted/died" if dies == 0 else r"tasks are unhealthy \(stopped sending heartbeats\):\s+1\s"
    assert re.search(named, stderr), stderr


# A reference policy, and lines of metrics that sum up several steps.
RESTARTED = """
import runpy

def get_config(arg=""):
    config = runpy.run_path("configs/tiny.py")["get_config"]("smoke")
    config.sharding.mesh = {"data": 2, "fsdp": 2, "tensor": 1}
    config.prior.steps, config.prior.log_every = 8, 3
    config.rl.steps, config.rl.log_every, config.rl.evaluate_every = 6, 3, 4
    config.rl.objective = {"name": "dapo", "kl_coefficient": 0.1, "entropy_coefficient": 0.01}
    config.evaluate.suites = {"chain": config.evaluate.suites.chain.to_dict()}
    config.checkpoint.every_steps = 3
    return config
"""
# `main`, but that the process of this number kills itself when it comes to a point (see
# killed_run.py) for so many times.
KILLED = """
import sys
from absl import app
from killed_run import set_up
from jaxreason.main import main, parse_flags

dies, point, count, process = sys.argv[1:5]
set_up(point if process == dies else "none", int(count))
app.run(main, argv=[sys.argv[0], *sys.argv[5:]], flags_parser=parse_flags)
"""


@pytest.mark.slow
@pytest.mark.process
def test_one_process_is_killed_and_both_started_again_is_uninterrupted(tmp_path):
    """First the process that writes is killed, during its second checkpoint; then the
    other one, in the middle of a phase after a checkpoint.
    """
    path = tmp_path / "run.py"
    path.write_text(RESTARTED)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    code = KILLED.replace("{", "{{").replace("}", "}}")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    for dies, point, count in ((0, "renaming", 3), (1, "batching", 5)):
        begun = ["-c", code, str(dies), point, str(count), "{process}", *train_command(str(path), killed)[2:]]
        found = finish(start(begun, 2, 2, PYTHONPATH=paths))
        assert found[dies][0] == -signal.SIGKILL, found
        assert found[1 - dies][0] not in (0, -signal.SIGKILL), found  # it ended by itself
    for folder in (killed, whole):
        found = finish(start(train_command(str(path), folder), 2, 2))
        assert [code for code, _, _ in found] == [0, 0], found
        assert ("in phase rl" in found[0][1]) == (folder == killed), found[0][1]  # where it went on
    (step, state), (_, expected) = params_of(killed), params_of(whole)
    assert step == 14
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert read_lines(killed / "rollouts.jsonl") == read_lines(whole / "rollouts.jsonl")
    assert maths(killed) == maths(whole)
    found, wanted = (json.loads((folder / "summary.json").read_text()) for folder in (killed, whole))
    assert found["evaluations"] == wanted["evaluations"]


@pytest.mark.slow
@pytest.mark.process
def test_a_bug_in_one_process_ends_all_and_is_shown():
    body = """
if index == 1:
    processes.end(KeyError("a bug"), 10)
try:
    processes.gather("waiting")
except Exception as error:
    processes.end(error, 10)
"""
    found = finish(start(script(body), 2, 1), timeout_s=60)
    assert all(code != 0 for code, _, _ in found)
    assert "error: process 1 of 2 ends, and with it the others: KeyError: 'a bug'" in found[1][1]


@pytest.mark.process
def test_another_config_on_one_process_is_refused(tmp_path):
    started = start(train_command("configs/tiny.py:smoke", tmp_path, "--config.seed={process}"), 2, 2)
    for code, stderr, _ in finish(started):
        assert code == 1
        assert "error: process 1 has another config than process 0; start all with the same command" in stderr
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_processes": 2}, "several processes need --coordinator_address and --process_id too"),
        ({"num_processes": 2, "process_id": 2, "coordinator_address": "here:1"}, "process 2 of 2; allowed"),
        ({"num_processes": 2, "process_id": 0, "coordinator_address": "here"}, "allowed: host:port"),
    ],
)
def test_flags_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        processes.join(**{"coordinator_address": None, "num_processes": None, "process_id": None} | given)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_STEP_NODELIST": "a1", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "2"}, False),  # in an allocation, but not started by srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
    ],
)
def test_clusters_are_seen_in_the_environment(monkeypatch, environment, expected):
    for name in ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.in_cluster() is expected
