"""Countdown on a CPU: reach a target with given numbers, by search with self-checks;
the embedded default on another task.

    python -m jaxreason.main --config=configs/countdown.py[:smoke]

The same as configs/tiny.py:task=countdown, with a KL to the prior. Without it, RL at
this size was seen to give up thinking where thinking succeeds no more often than a
guess. Not yet run to the end.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    tiny = runpy.run_path(str(Path(__file__).with_name("tiny.py")))["get_config"]
    config = tiny(",".join(filter(None, ["task=countdown", arg])))
    config.rl.objective.kl_coefficient = 0.02
    return config
