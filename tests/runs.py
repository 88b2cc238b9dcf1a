"""Run configs in this process, on small inputs, for tests: what `main` does, without flags."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def load_config(name: str, options: str = "", **fields):
    """`load_config("tiny", "smoke", **{"rl.steps": 3})`."""
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](options)
    config.update_from_flattened_dict(fields)
    return config


def run_config(config, workdir: Path) -> dict:
    """Build and train; return the summary as written."""
    from jaxreason import checkpoint
    from jaxreason.build import build
    from jaxreason.train import train

    run = build(config)
    checkpoints = checkpoint.open_checkpoints(workdir / "checkpoints", **config.checkpoint.to_dict())
    train(run, workdir, checkpoints, log_options={"live": False})
    checkpoints.close()
    return json.loads((workdir / "summary.json").read_text())


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
