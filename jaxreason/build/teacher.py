"""Build the reference policy of a phase."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path

import jax

from jaxreason import sharding, text
from jaxreason.build.model import check_size, find_model_and_text, init_params
from jaxreason.build.tasks import Parts
from jaxreason.model import attention, transformer
from jaxreason.model import weights as weights_
from jaxreason.objectives import Objective
from jaxreason.runtime import hub, mirror, warm_start
from jaxreason.runtime.bucket import is_url
from jaxreason.runtime.workdir import checkpoints_of
from jaxreason.teacher import Teacher

NAMES = ("start", "current")


def make_reference(asked: str | None, objective: Objective, hinted: bool, name: str, parts: Parts) -> str | Teacher:
    """Make the reference policy of phase `name`; None asks for the objective's own.

    `hinted`: it is shown more than the policy.

    Raises:
      ValueError: nobody uses it, it could not differ from the policy, or its model does
        not fit.
    """
    where = f"config.{name}.reference"
    if not objective.refers:
        if asked is not None:
            raise ValueError(
                f"{where} got {asked!r}, but the objective has no reference policy; allowed: None, or the objective distil, or "
                f"{name}.objective.kl_coefficient above 0"
            )
        return "start"
    chosen = objective.reference if asked is None else asked
    if not hinted and (chosen == "current" or (chosen == "start" and objective.distils)):
        differs = "at every update" if chosen == "current" else "at the first update, and so for ever"
        fix = f"a checkpoint{'' if objective.distils else ', start'}, or a hint ({name}.source.hint) with self_distil"
        raise ValueError(
            f"{where} got {chosen!r} without a hint, so the policy equals its reference {differs}, and the gradient of "
            f"their distance is zero; allowed: {fix}"
        )
    return chosen if chosen in NAMES else open_teacher(chosen, where, parts)


def open_teacher(path: str, where: str, parts: Parts) -> Teacher:
    """Find a teacher in RUN, RUN/checkpoints/STEP, a Hugging Face folder or a hub id.

    It computes with the dtypes and kernels of the run's model.
    """
    mine, mesh = parts.model.config, parts.meshes.learn
    try:
        found, theirs = find_model_and_text(folder_of(path))
        own = {name: getattr(mine, name) for name in ("dtype", "param_dtype", "scan_layers", "attention")}
        shape = dataclasses.replace(theirs.shape, **own, remat="none", lora=None, value_head=False)
        if shape.vocab_size != mine.vocab_size:
            raise ValueError(
                f"it has vocab_size={shape.vocab_size} and the model here {mine.vocab_size}; allowed: a model of this vocabulary"
            )
        if theirs.tokenizer is not None:
            text.check_same(theirs.tokenizer, parts.tokenizer)
        notes = warm_start.check(found, theirs.shape, shape)
        check_size(shape, mesh.devices)
        attention.check_platform(shape, mesh.devices.flat[0].platform)
        model = transformer(shape, mesh)
        sharding.shardings(jax.eval_shape(model.init, jax.random.key(0)), mesh)  # raises if an axis does not divide
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{where} got {path!r}: {error}") from None
    parts.say(f"{where}: {notes}")
    load = functools.partial(warm_start.load, found, theirs.shape, shape)
    return Teacher(model, functools.partial(init_params, model, load, 0, mesh), identify(found))


def folder_of(path: str) -> str | Path:
    """Return a local folder of a path, URL of a bucket, or hub id."""
    if is_url(path) or mirror.local(path).exists() or not hub.ID.fullmatch(path):
        return path
    return weights_.resolve(path)


def identify(found: warm_start.Origin) -> dict:
    """Return the step of a checkpoint, and a hash that changes with its params and is
    cheap: of a run that of its fingerprints, of a Hugging Face folder that of its
    config and the sizes of its files.
    """
    made = hashlib.sha256()
    if found.step is not None:
        with (checkpoints_of(found.folder) / str(found.step) / "host" / "metadata").open("rb") as file:
            made.update(hashlib.file_digest(file, "sha256").digest())
    else:
        made.update((found.folder / "config.json").read_bytes())
        for file in sorted(found.folder.glob("*.safetensors")):
            made.update(f"{file.name} {file.stat().st_size}\n".encode())
    return {"step": found.step, "fingerprint": made.hexdigest()[:16]}
