"""Loading of trained params: from a run, one of its checkpoints, or a Hugging Face
folder.

`find` identifies what a path contains, and `check` decides whether this model can use
it; both run before anything is compiled. `load` then loads the params straight onto the
devices, in the tree, dtypes and shardings of this model.

If both models have the same adapters, the adapters are kept. If only the loaded model
has adapters, they are merged. If only this model has them, the loaded params become its
base. Params that the loaded model lacks (new adapters or a value head) are initialised;
its optimizer state is not loaded. Models of another shape are not supported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxreason import sharding
from jaxreason.model import ModelConfig, lora, transformer, weights
from jaxreason.runtime import mirror, processes
from jaxreason.runtime.checkpoint import open_checkpoints, saved_steps
from jaxreason.runtime.workdir import checkpoints_of

# Config fields that may differ without changing the function that the same params
# compute.
CHOICES = ("value_head", "lora", "dtype", "head_dtype", "param_dtype", "scan_layers", "remat", "attention")
ASIDE = ("value", "lora")  # params that only some models have


class Origin(NamedTuple):
    """The checkpoint or weights found at a path."""

    folder: Path  # of a run, or in Hugging Face format
    step: int | None  # step of the run's checkpoint; None: a Hugging Face folder
    config: dict  # contents of its config.json


def find(path: str | os.PathLike, step: int | None = None) -> Origin:
    """Find params in RUN (at `step`, or the newest), RUN/checkpoints/STEP, or a Hugging
    Face folder.

    Raises:
      ValueError, FileNotFoundError: the path is none of these, or lacks that step.
    """
    folder = Path(os.path.abspath(mirror.local(path)))
    if folder.parent.name == "checkpoints" and folder.name.isdecimal() and step is None:
        folder, step = folder.parents[1], int(folder.name)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    file, run = folder / "config.json", checkpoints_of(folder).is_dir()
    config = read_json(file) if file.is_file() else {}
    if not run and "model_type" in config and step is None:
        return Origin(folder, None, config)
    if not {"model", "text"} <= config.keys():
        raise ValueError(
            f"{folder} is neither a run (config.json with a model and a text, and checkpoints) nor a Hugging Face folder "
            "(config.json with a model_type)"
        )
    if not all(isinstance(config[name], dict) for name in ("model", "text")):
        raise ValueError(f"{file} is no config of a run: its model and its text must be objects")
    steps = saved_steps(checkpoints_of(folder))
    if not steps:
        raise ValueError(f"{folder} has no complete checkpoint yet; a run writes one every checkpoint.every_steps and at its end")
    if step is not None and step not in steps:
        raise ValueError(f"{folder} has no checkpoint of step {step}; it has: {', '.join(map(str, steps))}")
    return Origin(folder, steps[-1] if step is None else step, config)


def read_json(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    return config if isinstance(config, dict) else {}


def check(origin: Origin, theirs: ModelConfig, mine: ModelConfig) -> str:
    """Check that params of `theirs` fit `mine`, and return a one-line description of
    them.

    Raises:
      ValueError, FileNotFoundError: the params don't fit, or some are missing.
    """
    for name in (field.name for field in fields(ModelConfig) if field.name not in CHOICES):
        there, here = getattr(theirs, name), getattr(mine, name)
        if there != here:
            raise ValueError(f"{name} is {there} there and {here} here; set config.model to the model there, or choose another")
    if theirs.lora and mine.lora:
        there, here = ((x.rank, x.alpha, ", ".join(sorted(x.targets))) for x in (theirs.lora, mine.lora))
        if there != here:
            raise ValueError(
                "its adapters have rank {}, alpha {} and targets {}, here they have {}, {} and {}; set config.model.lora to what "
                "it is there, or start from its export, where they are merged".format(*there, *here)
            )
    if origin.step is None:
        weights.check(origin.folder, theirs)
        said = [f"params of {origin.folder}"]
    else:
        with closing(open_checkpoints(checkpoints_of(origin.folder), read_only=True)) as checkpoints:
            checkpoints.check_params(origin.step, params_of(theirs))
        said = [f"params of step {origin.step} of {origin.folder}"]
    if theirs.lora and not mine.lora:
        said.append("its adapters merged")
    if mine.lora and not theirs.lora:
        said.append("under new adapters")
    if mine.value_head != theirs.value_head:
        said.append("a new value head" if mine.value_head else "its value head left out")
    return ", ".join(said)


def load(origin: Origin, theirs: ModelConfig, mine: ModelConfig, placed, fresh: Callable[..., dict]) -> dict[str, Any]:
    """Load params of `theirs` as those of `mine`, with the shardings `placed`. All
    processes read, each only the part that its devices hold.

    `fresh(*names)` initialises new params of these names.
    """
    if origin.step is None:
        return load_folder(origin.folder, mine, placed, fresh)
    # Use the step that process 0 found: a run that still trains may have saved another
    # one between two processes' look-ups.
    return restore(origin._replace(step=processes.gather(origin.step)[0]), theirs, mine, placed, fresh)


def load_folder(folder: Path, config: ModelConfig, placed, fresh: Callable[..., dict]) -> dict[str, Any]:
    """Load the params of a Hugging Face folder; `fresh` initialises params that such
    folders lack.
    """
    new = fresh(*(name for name in ASIDE if name in placed))
    numbers = vars(config)
    if config.lora is None:
        return weights.load(folder, **numbers, sharding=placed, init=new)[1]
    numbers = numbers | {"param_dtype": config.lora.base_dtype or config.param_dtype}
    return {"frozen": weights.load(folder, **numbers, sharding=placed["frozen"])[1], **new}


def restore(origin: Origin, theirs: ModelConfig, mine: ModelConfig, placed, fresh: Callable[..., dict]) -> dict[str, Any]:
    """Restore the params of a checkpoint. They are cast while read or, if adapters are
    merged, after the merge.
    """
    mesh = jax.tree.leaves(placed)[0].mesh
    there, wanted = abstract(theirs, mesh), abstract(mine, mesh)
    merges = theirs.lora is not None and mine.lora is None
    if not merges:  # read each array with the dtype and sharding of this model, which may have it under "frozen"
        wanted = wanted | wanted.get("frozen", {})
        there = {name: wanted.get(name, branch) for name, branch in there.items()}
    with closing(open_checkpoints(checkpoints_of(origin.folder), read_only=True)) as checkpoints:
        params = checkpoints.restore_params(origin.step, there)
    if mine.lora is not None and theirs.lora is None:
        params["frozen"] = {name: params.pop(name) for name in placed["frozen"]}
    if merges:
        params = lora.merge(params, theirs.lora)
    params = {name: params[name] for name in placed if name in params}
    if merges:
        to = {name: placed[name] for name in params}
        params = jax.tree.map(lambda x, sharding_: jax.device_put(x.astype(mine.param_dtype), sharding_), params, to)
    return params | fresh(*(name for name in placed if name not in params))


def params_of(config: ModelConfig):
    """Return the shapes of a model's params."""
    return jax.eval_shape(transformer(replace(config, attention="xla")).init, jax.random.key(0))  # "xla" works on any device


def abstract(config: ModelConfig, mesh):
    """Return the abstract params of a model, with shardings, for a restore."""
    tree = params_of(config)
    placed = sharding.shardings(tree, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placed)
