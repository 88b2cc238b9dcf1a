"""Countdown on a CPU: reach a target with given numbers, by search with self-checks.
This is configs/tiny.py on another task.

    python -m jaxreason.main --config=configs/countdown.py[:smoke]

It equals configs/tiny.py:task=countdown with a KL penalty to the prior. Without the
penalty, RL at this size was seen to stop thinking where thinking succeeds no more often
than a guess. Not yet run to the end.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    tiny = runpy.run_path(str(Path(__file__).with_name("tiny.py")))["get_config"]
    config = tiny(",".join(filter(None, ["task=countdown", arg])))
    config.rl.objective.kl_coefficient = 0.02
    config.rl.objective.kl_estimator = "k3_reverse"
    return config
