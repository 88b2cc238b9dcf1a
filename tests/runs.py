"""Run configs in this process, on small inputs, for tests: what `main` does, without flags."""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def load_config(name: str, options: str = "", **fields):
    """`load_config("tiny", "smoke", **{"rl.steps": 3})`."""
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](options)
    config.update_from_flattened_dict(fields)
    return config


@functools.cache
def compiled() -> Path:
    """A folder for compiled programs that goes with the process, or with the one that started it."""
    if "TESTS_COMPILED" in os.environ:
        return Path(os.environ["TESTS_COMPILED"])
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


def run_config(config, workdir: Path) -> dict:
    """Build and train; return the summary as written."""
    import jax

    from jaxreason import checkpoint
    from jaxreason.build import build
    from jaxreason.train import train

    # Runs of one process make the same programs over and over.
    jax.config.update("jax_compilation_cache_dir", str(compiled()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    run = build(config)
    checkpoints = checkpoint.open_checkpoints(workdir / "checkpoints", **config.checkpoint.to_dict())
    train(run, workdir, checkpoints, log_options={"live": False})
    checkpoints.close()
    return json.loads((workdir / "summary.json").read_text())


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
