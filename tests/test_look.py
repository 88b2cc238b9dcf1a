"""Curves of runs: which values are read, how runs are joined, and which input is
refused.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
from runs import ROOT

from jaxreason.look import curves, figures

METRIC = "eval/chain/greedy/accuracy"


def write_run(folder, values, phases=("prior", "rl")):
    """Write a run with evaluations at steps 0, 10, 20, ...; the first two belong to the
    phase before the last.
    """
    folder.mkdir(parents=True)
    lines = [{"step": 10 * i, "phase": phases[i > 1], METRIC: value} for i, value in enumerate(values)]
    lines.insert(1, {"step": 5, "phase": phases[0], "train/loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_steps_count_from_the_start_of_the_phase(tmp_path):
    run = write_run(tmp_path / "a", [0.0, 0.4, 0.5, 0.75])
    assert figures.read_curve(run, METRIC, "rl") == {0: 0.4, 10: 0.5, 20: 0.75}
    assert figures.read_curve(run, METRIC, None) == {0: 0.0, 10: 0.4, 20: 0.5, 30: 0.75}
    assert figures.read_curve(run, METRIC, "prior") == {0: 0.0, 10: 0.4}


def test_runs_are_joined_at_the_steps_that_all_have(tmp_path):
    steps, mean, lowest, highest = figures.join_curves([{0: 0.0, 10: 0.5, 20: 1.0}, {0: 1.0, 10: 0.0}])
    np.testing.assert_array_equal(steps, [0, 10])
    np.testing.assert_array_equal(mean, [0.5, 0.25])
    np.testing.assert_array_equal(lowest, [0.0, 0.0])
    np.testing.assert_array_equal(highest, [1.0, 0.5])
    with pytest.raises(ValueError, match="no step in common"):
        figures.join_curves([{0: 0.0}, {5: 1.0}])


@pytest.mark.parametrize(
    ("argument", "metric", "phase", "message"),
    [
        ("runs/*", METRIC, None, "allowed: LABEL=GLOB"),
        ("a={}/nothing*", METRIC, None, "no run folder matches"),
        ("a={}/a", "eval/chian/greedy/accuracy", None, f"did you mean '{METRIC}'"),
        ("a={}/a", METRIC, "lr", "one of: prior, rl"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, argument, metric, phase, message):
    write_run(tmp_path / "a", [0.0, 0.4, 0.5])
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        curves.read_groups([argument.format(tmp_path)], metric, phase)
    assert "\n" not in str(caught.value)


def test_the_command_writes_a_small_png(tmp_path):
    pytest.importorskip("matplotlib")
    for i in range(2):
        write_run(tmp_path / f"seed{i}", [0.0, 0.1 * i, 0.5, 0.75])
    out = tmp_path / "figures" / "curve.png"
    command = [sys.executable, "-m", "jaxreason.look.curves", f"--out={out}", f"--metric={METRIC}", "--phase=rl"]
    done = subprocess.run([*command, f"RL={tmp_path}/seed*"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size < 100_000
    wrong = subprocess.run([*command, "RL"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: got the argument 'RL'")
