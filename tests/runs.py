"""Run configs, in this process or by the real command, and compare the files of
runs.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SMOKE = f"{ROOT}/configs/tiny.py:smoke"
HEARTBEAT_S = 10
HANG_S = 1200  # a process that takes longer hangs; no test depends on how busy a machine is


def xla_flags(devices: int) -> str:
    """Return the XLA flags of this process (tests/conftest.py) with another number of
    devices.
    """
    return os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")


def grouped(rollouts, size: int) -> list:
    """Split rollouts, in the order of their problems, into groups of `size`
    attempts.
    """
    from jaxreason.types import Group

    return [Group(tuple(rollouts[i : i + size])) for i in range(0, len(rollouts), size)]


# --- in this process: as `main`, without flags ---


def load_config(name: str, options: str = "", **fields):
    """Load a config: `load_config("tiny", "smoke", **{"rl.steps": 3})`."""
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](options)
    config.update_from_flattened_dict(fields)
    return config


def run_config(config, workdir: Path) -> dict:
    """Build and train a config; return the summary that the run wrote."""
    from jaxreason.build import build
    from jaxreason.runtime import checkpoint
    from jaxreason.train import train

    run = build(config)
    checkpoints = checkpoint.open_checkpoints(workdir / "checkpoints", **config.checkpoint.to_dict())
    train(run, workdir, checkpoints, log_options={"live": False})
    checkpoints.close()
    return json.loads((workdir / "summary.json").read_text())


class Killed(Exception):
    pass


def killed_after(monkeypatch, saves: int):
    """End the run right after its n-th checkpoint; later steps are then logged but not
    saved.
    """
    from jaxreason.runtime import checkpoint

    open_checkpoints = checkpoint.open_checkpoints

    def opened(*args, **kwargs):
        made, count = open_checkpoints(*args, **kwargs), [0]
        save_whole = made.save

        def save(*args, **kwargs):
            if count[0] == saves:
                made.wait()
                raise Killed
            count[0] += 1
            save_whole(*args, **kwargs)

        made.save = save
        return made

    monkeypatch.setattr(checkpoint, "open_checkpoints", opened)


# --- as processes ---


def main(*arguments, cwd=ROOT, timeout=HANG_S, **environment):
    """Run the real command on one device; return (exit code, stdout, stderr)."""
    env = os.environ | {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT), **environment}
    got = subprocess.run(
        [sys.executable, "-m", "jaxreason.main", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )
    return got.returncode, got.stdout, got.stderr


def start(command: list[str], count: int, devices: int, **environment: str) -> list[subprocess.Popen]:
    """Start processes with some virtual CPU devices each.

    Arguments may contain {process}; those of the command also {port} and {count}.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, *(word.format(port=port, count=count, process=process) for word in command)],
            cwd=ROOT,
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices), "PYTHONPATH": str(ROOT)}
            | {name: value.format(process=process) for name, value in environment.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]


def finish(started: list[subprocess.Popen], timeout_s: float = HANG_S) -> list[tuple[int, str, str]]:
    """Wait for all processes; return the exit code, stderr and stdout of each."""
    try:
        return [(*process.communicate(timeout=timeout_s), process.returncode)[::-1] for process in started]
    finally:
        for process in started:
            process.kill()


def train_command(config: str, workdir: Path, *more: str) -> list[str]:
    joined = ["--coordinator_address=localhost:{port}", "--num_processes={count}", "--process_id={process}"]
    run = [f"--config={config}", f"--workdir={workdir}", f"--heartbeat_timeout_s={HEARTBEAT_S}"]
    return ["-m", "jaxreason.main", *run, *joined, *more]


# --- files of finished runs ---


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def maths(workdir: Path) -> list[dict]:
    """Return the lines of metrics without their times."""
    lines = read_lines(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(("time", "perf"))} for line in lines]


def params_of(workdir: Path) -> tuple[int, dict]:
    """Return step and state of the newest checkpoint, as NumPy arrays, whatever devices
    saved it.
    """
    import orbax.checkpoint as ocp

    from jaxreason.runtime import checkpoint

    made = checkpoint.open_checkpoints(workdir / "checkpoints", read_only=True)
    step = made.latest()
    reader, state = ocp.PyTreeCheckpointer(), workdir / "checkpoints" / str(step) / "state"
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(state).item_metadata.tree)
    tree = reader.restore(state, restore_args=as_numpy)
    made.close()
    return step, tree


# --- sweeps ---

PRETEND = """
import json, os, sys, time
folder, kind = sys.argv[1:]
os.makedirs(folder, exist_ok=True)
if kind == 'fails': sys.exit('error: it went wrong')
if kind == 'killed': os.kill(os.getpid(), 9)
if kind == 'once' and not os.path.exists(folder + '/tried'):
    open(folder + '/tried', 'w').close(); sys.exit('error: the first time')
if kind == 'locked' and not os.path.exists(folder + '/tried'):
    open(folder + '/tried', 'w').close(); sys.exit('error: x is in use by host y; wait for it')
if kind == 'sleeps': time.sleep(600)
print('cores', sorted(os.sched_getaffinity(0)))
json.dump({'done': True, 'evaluations': []}, open(folder + '/summary.json', 'w'))
"""


def pretend(tmp_path, monkeypatch, kinds, **how):
    """Execute runs that do no more than a word says; return the state of each."""
    from jaxreason.sweep import queue
    from jaxreason.sweep.runs import SweepRun

    runs = [SweepRun(f"{kind}{i}/seed0", kind, 0, (), tmp_path / f"{kind}{i}", {}) for i, kind in enumerate(kinds)]
    monkeypatch.setattr(SweepRun, "command", lambda run: ["-c", PRETEND, str(run.folder), run.arm])
    state = queue.State(tmp_path / "state.json")
    said = []
    queue.execute(runs, queue.make_workers(1), state, tmp_path, say=said.append, **how)
    return [state.of(run) for run in runs], said


def whole_checkpoint(folder, step):
    """Make a checkpoint with the files that every whole one has."""
    for name, text in (("host/metadata", '{"host": {}}'), ("state/_METADATA", "")):
        path = folder / "checkpoints" / str(step) / name
        path.parent.mkdir(parents=True)
        path.write_text(text)


# --- folders of sweeps ---

METRIC = ("chain", 0.0)


def result(arm, seed, value, n=200, verdicts=None, code="c", flops=1e9):
    """Make the result of a run of a sweep; the first problems are the right ones."""
    from jaxreason.sweep import results

    right = round(value * n)
    verdicts = "1" * right + "0" * (n - right) if verdicts is None else verdicts
    return results.Result(arm, seed, value, 0.0, 1.0, n, verdicts, flops, 60.0, 0.0, 60.0, code)


def written(tmp_path, values, n=200, code="c"):
    """A sweep's folder with runs that are done: arm -> accuracy by seed; None is no
    run.
    """
    states = {}
    for arm, by_seed in values.items():
        for seed, value in enumerate(by_seed):
            run = f"{arm}/seed{seed}"
            if value is None:
                states[run] = {"status": "failed", "reason": "exit 1: it went wrong"}
                continue
            folder = tmp_path / "runs" / run
            folder.mkdir(parents=True)
            right = round(value * n)
            last = {"suite": "chain", "temperature": 0.0, "accuracy": right / n, "low": 0.0, "high": 1.0, "n": n}
            last["verdicts"] = "1" * right + "0" * (n - right)
            ledger = {kind: {"flops": 1e9, "device_s": 3.0, "joules": 5.0, "tokens": 1.0} for kind in ("sample", "learn")}
            summary = {"done": True, "evaluations": [last | {"accuracy": 0.0}, last], "ledger": ledger, "wall_s": 60.0}
            (folder / "summary.json").write_text(json.dumps(summary))
            states[run] = {"status": "done", "code": code if isinstance(code, str) else code[arm]}
    return states


# --- pages ---


def open_browser():
    """Start a headless Chromium; skip the test where there is none, or none that
    starts.
    """
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    except Exception as error:  # such as no memory, or no namespaces in a container
        pytest.skip(f"the browser does not start: {error}")
