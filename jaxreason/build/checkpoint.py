"""Open a checkpoint to sample from it, without a config: a run, one of its checkpoints,
or a pretrained model.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxreason import sharding, text
from jaxreason.build.layout import from_earlier
from jaxreason.build.model import check_size, init_params, read_model_and_text, reword
from jaxreason.build.sampler import make_completer
from jaxreason.build.tasks import Parts
from jaxreason.model import attention, transformer
from jaxreason.model import weights as weights_
from jaxreason.options import call_with_section
from jaxreason.platforms import platform_of
from jaxreason.runtime import hub, mirror, warm_start
from jaxreason.runtime.bucket import is_url
from jaxreason.runtime.workdir import checkpoints_of


class Checkpoint(NamedTuple):
    """A model to sample from, before its params are loaded."""

    parts: Parts  # model, tokenizer, format, sampler
    load: Callable[[], Any]  # () -> params, on the mesh
    folder: Path
    step: int | None  # of a run; None: a pretrained model
    config: dict  # of the run; {}: a pretrained model
    sections: dict[str, dict | None]  # model, text, sampler, verifier and environment, as they are used


# Fields of a sampler where there is no run to take them from.
SAMPLER = {"max_prompt_tokens": 1024, "max_tokens": 512}
SLOTS = {"cpu": 16, "gpu": 128, "tpu": 128}
VERIFIER = {"name": "number", "must_finish": True}
PLAIN = "Question: {question}\nAnswer:"  # prompt of a model without a chat template


def open_checkpoint(
    path: str | os.PathLike,
    *,
    step: int | None = None,
    sampler: Mapping[str, Any] | None = None,
    verifier: Mapping[str, Any] | None = None,
    mesh: Mapping[str, int] | None = None,
    date: str | None = None,
    say: Callable[[str], None] = print,
) -> Checkpoint:
    """Open RUN, RUN/checkpoints/STEP, a Hugging Face folder, a hub id or a named size.

    `sampler` are fields of a config's section that replace those of the run, or the
    defaults of a pretrained model; `verifier` is a whole section. A pretrained model
    gets its chat template, or a plain question if it has none, and computes in the
    platform's dtype; `date` (YYYY-MM-DD) is today's date in its template. `mesh` are
    the axes of the devices; by default each device samples with its own copy.

    Raises:
      ValueError, FileNotFoundError: no such checkpoint, or fields that do not fit.
    """
    placed = call_with_section(sharding.make_mesh, dict(mesh or {}), "mesh", devices=jax.local_devices())
    found, config = find(path, step)
    if found.step is None:
        sections = pretrained_sections(found.folder, date, sharding.row_devices(placed))
        described = read_model_and_text(sections["model"], sections["text"])
        load = described.load
    else:
        config, _ = from_earlier(config)
        sections = {name: config[name] for name in ("model", "text", "sampler", "verifier")}
        # The run may have had another number of devices; slots change the speed alone.
        sections["sampler"] = sections["sampler"] | {"slots": fitting(sections["sampler"]["slots"], sharding.row_devices(placed))}
        with hub.noting(found.config.get("revisions")):
            described = read_model_and_text(sections["model"], sections["text"])
        warm_start.check(found, described.shape, described.shape)
        load = functools.partial(warm_start.load, found, described.shape, described.shape)
    sections["sampler"] = sections["sampler"] | dict(sampler or {})
    sections["verifier"] = sections["verifier"] if verifier is None else dict(verifier)
    sections["environment"] = config.get("environment")
    text.check_vocabulary(described.tokenizer, described.shape)
    if found.step is None:
        weights_.check(described.folder, described.shape)
    check_size(described.shape, placed.devices)
    attention.check_platform(described.shape, placed.devices.flat[0].platform)
    model = transformer(described.shape, placed)
    words = {"tokenizer": described.tokenizer, "format": described.format}
    completer = call_with_section(
        make_completer, sections["sampler"], "config.sampler", model=model, mesh=placed, processes=1, **words
    )
    parts = Parts(
        seed=0,
        model=model,
        **words,
        completer=completer,
        verifier=sections["verifier"],
        meshes=sharding.Meshes(placed, placed),
        devices=sharding.row_devices(placed),
        say=say,
        reword=functools.partial(reword, sections["text"], described.folder),
        loaded=[],
        environments=[],
        environment=sections["environment"],
    )
    load_params = functools.partial(init_params, model, load, 0, placed)
    return Checkpoint(parts, load_params, found.folder, found.step, config, sections)


def find(path: str | os.PathLike, step: int | None) -> tuple[warm_start.Origin, dict]:
    """Find a checkpoint and the config of its run, {} if it has none."""
    folder = mirror.local(path)
    if not folder.exists() and folder.parent.name != "checkpoints":  # a hub id or a named size
        if step is not None:
            raise ValueError(f"--step={step} with the pretrained model {os.fspath(path)!r}; allowed: with the folder of a run")
        folder = weights_.resolve(os.fspath(path))
    found = warm_start.find(folder, step)
    return found, found.config if found.step is not None else {}


def pretrained_sections(folder: Path, date: str | None, devices: int) -> dict[str, dict]:
    """Return the sections of a config for a model in Hugging Face format, on devices
    that each have the same number of slots.
    """
    dtype = platform_of().dtype
    words = {"tokenizer": "pretrained", "format": "chat", "date": date}
    try:
        text.load_template(folder)
    except FileNotFoundError:
        words = {"tokenizer": "pretrained", "format": "plain", "instruction": PLAIN}
    return {
        "model": {"name": str(folder), "weights": "pretrained", "dtype": dtype, "param_dtype": dtype},
        "text": words,
        "sampler": SAMPLER | {"slots": fitting(SLOTS[jax.default_backend()], devices)},
        "verifier": dict(VERIFIER),
    }


def fitting(slots: int, devices: int) -> int:
    """Return the lowest number from `slots` on that the devices share equally."""
    return -(-slots // devices) * devices


OF_PRETRAINED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash the files of the params, names and contents: 16 hexadecimal digits.

    Of a pretrained model also those of its shape, its tokenizer and the ends of its
    turns.
    """
    folder = checkpoint.folder
    if checkpoint.step is not None:
        folder = checkpoints_of(folder) / str(checkpoint.step)
        # In a bucket: the fingerprints of all arrays, in the place of the arrays.
        files = [folder / "host" / "metadata"] if is_url(folder) else sorted(filter(Path.is_file, folder.rglob("*")))
    else:
        files = sorted(folder.glob("*.safetensors")) + [folder / name for name in OF_PRETRAINED if (folder / name).is_file()]
    made = hashlib.sha256()
    for path in files:
        made.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            made.update(hashlib.file_digest(file, "sha256").digest())
    return made.hexdigest()[:16]
