"""Killed and resumed is uninterrupted, bit for bit: params, optimizer state,
metrics.jsonl, rollouts.jsonl, evaluations, ledger.

The run has two phases with Adam, shuffled data of more than one epoch, dynamic
sampling, a reference policy, a line of metrics every three steps, a checkpoint every
fourth step, and 30 steps. A process of its own is killed with SIGKILL at each of these
points:

    prefill, sampling, verifying, batching   while rollouts are made, judged, and put into a batch
    answering                                between two turns of a rollout, before it reads an observation
    reference, update                        before its log-probs are taken, before an update
    logging, line                            before metrics are written, and in the middle of a line of rollouts
    saving, renaming                         before a save, and while it is written, before it gets its name
    evaluation, summary, phase               before an evaluation, before the summary is written, between phases

Some points run by default, all with -m slow. At none of them was anything lost or done
twice. The same holds for batches sampled ahead on separate devices, with replay and a
curriculum or without, and at fifty random
times for each of the two (-m soak): 2026-11-26, 100 kills, 41 finished runs, all equal;
14 minutes on one core.

Other faults, the file that injects them, and the result; nothing was lost in any:

    a checkpoint cut short, or with a flipped bit   test_checkpoint   noticed, or harmless; a different state is never restored
    a checkpoint that lacks any of its files        test_damage       the same; all damaged: refused at every start
    a folder moved or removed while the run writes  test_damage       one line, with the folder's new name
    files of a run that hold nonsense, or are gone  test_damage       repaired or named; the old content is kept aside
    Ctrl-C, once and twice, into whatever hangs     test_interrupt    saves and ends; ends at once
    a save that was killed                          test_checkpoint   never seen, and removed
    SIGTERM, twice in one run                       test_workdir      saves and ends; continues bit for bit
    a full disk                                     test_workdir      a save fails, the run does not; the next one is tried
    a full disk, at a line of metrics or rollouts   test_workdir      one line, exit code 1; with room it continues bit for bit
    a full disk, at the summary or a start          test_workdir      the same; existing files are not overwritten
    the folder of checkpoints gone until the end    test_workdir      each save is reported as failed; the run continues later
    a full disk, at TensorBoard's events            test_metrics      reported; the run continues without them
    a checkpoint without an item of the host's part test_train        refused, by the item's name
    two runs in one folder, a lock left behind      test_workdir      refused; reported and taken over, if no run updates it
    a folder or a file that can't be written        test_workdir      one line, before anything is compiled
    a clock that is set back                        test_workdir      times continue; the newest checkpoint is the last step's
    one process of two killed, both started again   test_processes    the other ends by itself; they continue bit for bit
    another mesh, micro-batches, processes          test_reshape      the same problems and texts; params to the last bit or so
    gradients that are not finite                   test_train        skipped; the run stops before anything is damaged
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import ROOT, maths, params_of, read_lines, xla_flags

pytestmark = pytest.mark.process

CONFIG = """
import runpy

def get_config(arg=""):
    config = runpy.run_path("configs/tiny.py")["get_config"]("smoke")
    config.sharding = {{"mesh": {{"data": 1}}, "sampling_devices": {sampling_devices}}}
    config.prior.steps, config.prior.source.task["size"], config.prior.log_every = 12, 24, 3
    config.rl.source.task["size"], config.rl.source.problems, config.rl.steps = 10, 4, 18
    config.rl.log_every, config.rl.evaluate_every, config.rl.source.lag = 3, 7, {lag}
    config.rl.source.dynamic_sampling, config.rl.source.credit = 2, "attempt"
    config.rl.objective = {{"name": "dapo", "kl_coefficient": 0.1, "entropy_coefficient": 0.01}}
    config.evaluate.suites = {{"chain": config.evaluate.suites.chain.to_dict()}}
    config.checkpoint.every_steps = 4
    config.environment = {environment}
    config.rl.source.replay, config.rl.source.curriculum = {replay}, {curriculum}
    config.verifier = {{"name": "odd_texts:make"}}
    return config
"""
# Answers of a model that has learned nothing earn something, so that groups differ.
VERIFIER = """
from jaxreason.types import Verdict

def make():
    return lambda text, task: Verdict(float(len(text) % 2), len(text) % 2 == 1, text)
"""
STEPS = 30
AGAIN = {"name": "retry", "attempts": 3, "message": "?"}
TURNS = {"name": "with_tools", "tools": ("calculator",), "dialect": "brackets", "inside": AGAIN}
NEITHER = {"replay": 0, "curriculum": None}
BOTH = {"replay": 2, "curriculum": {"name": "success_rate", "least": 0.3, "most": 0.7, "revisit": 2}}
KINDS = {
    "lag 0": {"lag": 0, "sampling_devices": 0, "environment": None, **NEITHER},
    "lag 1": {"lag": 1, "sampling_devices": 1, "environment": None, **NEITHER},
    "turns, lag 1": {"lag": 1, "sampling_devices": 1, "environment": TURNS, **NEITHER},
    "replay, lag 1": {"lag": 1, "sampling_devices": 1, "environment": None, **BOTH},
}
# In the order in which a run comes to them; each process gets further than the one
# before.
SOME = [("logging", 3), ("reference", 2), ("line", 5), ("renaming", 2), ("summary", 2)]
BETWEEN_TURNS = [("answering", 7), ("answering", 60), ("verifying", 40), ("answering", 90), ("line", 5)]
ALL = [
    ("evaluation", 1),
    ("logging", 3),
    ("update", 3),
    ("phase", 2),
    ("reference", 2),
    ("prefill", 3),
    ("sampling", 9),
    ("saving", 5),
    ("verifying", 10),
    ("line", 5),
    ("renaming", 2),
    ("batching", 5),
    ("update", 3),
    ("evaluation", 1),
    ("summary", 2),
]


def begin(config: Path, workdir: Path, point: str = "none", count: int = 0) -> subprocess.Popen:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(config.parent)])
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(2), "PYTHONPATH": paths}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "killed_run.py"), str(config), str(workdir), point, str(count)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory):
    """Return the config, and the folder of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    config = folder / "config.py"
    config.write_text(CONFIG.format(**KINDS[request.param]))
    (folder / "odd_texts.py").write_text(VERIFIER)
    process = begin(config, folder / "run")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return config, folder / "run"


def assert_same_run(workdir: Path, whole: Path) -> None:
    (step, state), (_, expected) = params_of(workdir), params_of(whole)
    assert step == STEPS
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert read_lines(workdir / "rollouts.jsonl") == read_lines(whole / "rollouts.jsonl")
    if "environment = {" in (whole.parent / "config.py").read_text():
        assert any(letter == "t" for r in read_lines(whole / "rollouts.jsonl") for letter, _ in r.get("spans", ()))
    assert maths(workdir) == maths(whole)
    if "success_rate" in (whole.parent / "config.py").read_text():
        values = read_lines(whole / "metrics.jsonl")
        assert all(any(line.get(f"rollout/{name}", 0) > 0 for line in values) for name in ("replayed", "passed_over"))
    found, wanted = (json.loads((folder / "summary.json").read_text()) for folder in (workdir, whole))
    assert found["evaluations"] == wanted["evaluations"]
    amounts, expected = (
        [used[unit] for used in each["ledger"].values() for unit in ("tokens", "flops")] for each in (found, wanted)
    )
    assert amounts == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whole", "points"),
    [
        pytest.param("lag 1", SOME, id="lag 1, some"),
        pytest.param("turns, lag 1", BETWEEN_TURNS, id="turns"),
        pytest.param("replay, lag 1", SOME, id="replay"),
        pytest.param("lag 0", ALL, id="lag 0, all", marks=pytest.mark.slow),
        pytest.param("lag 1", ALL, id="lag 1, all", marks=pytest.mark.slow),
    ],
    indirect=["whole"],
)
def test_killed_at_these_points_and_resumed_is_uninterrupted(tmp_path, whole, points):
    config, expected = whole
    for point, count in points:
        process = begin(config, tmp_path, point, count)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL, f"{point} {count}: {output}"
    process = begin(config, tmp_path)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert_same_run(tmp_path, expected)


@pytest.mark.soak
@pytest.mark.parametrize("whole", KINDS, indirect=True)
def test_killed_at_fifty_random_times(tmp_path, whole):
    """Kill at any time from the start of the process to a fifth beyond the length of a
    whole run, also while it reads or saves.
    """
    config, expected = whole
    started_s = time.monotonic()

    def ended(folder: Path, timeout_s: float) -> bool:
        process = begin(config, folder)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return False
        assert process.returncode == 0, output
        assert_same_run(folder, expected)
        return True

    draw, steps, finished, run_s = random.Random(0), [], 0, 600.0
    while len(steps) < 50:
        folder, begun_s = tmp_path / str(finished), time.monotonic()
        fresh = not folder.exists()
        if ended(folder, draw.uniform(0, 1.2 * run_s) if finished else run_s):
            finished += 1
            if fresh:  # from start to end: how long that takes changes with what else the machine does
                run_s = time.monotonic() - begun_s
        else:
            steps.append(last_step(folder))
    assert ended(folder, 600)
    took_s = time.monotonic() - started_s
    print(f"\n{len(steps)} kills in {took_s:.0f} s, {finished + 1} runs finished, the last whole one in {run_s:.1f} s")
    print(f"steps at which they were killed: {sorted(steps)}")


def last_step(folder: Path) -> int:
    """Return the last step of a killed run with a whole line of metrics."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=-1)
