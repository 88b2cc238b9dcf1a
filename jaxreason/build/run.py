"""Build a run from a config; all errors in the config are raised here, before anything
is compiled.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax

from jaxreason import __version__, sharding, text
from jaxreason.build.evaluation import make_evaluate, make_log
from jaxreason.build.layout import from_earlier, settle
from jaxreason.build.model import check_size, init_params, read_model_and_text, reword, start_from
from jaxreason.build.phases import make_phase
from jaxreason.build.sampler import decoding_of, make_completer, warm_up
from jaxreason.build.tasks import Parts, load_tasks, trained_sections, trained_tasks
from jaxreason.build.teacher import NAMES as REFERENCES
from jaxreason.draw import ALL
from jaxreason.model import attention, transformer
from jaxreason.model import config as model_config
from jaxreason.model import weights as weights_
from jaxreason.options import call_with_section
from jaxreason.runtime import hub, warm_start
from jaxreason.runtime.bucket import is_url
from jaxreason.runtime.checkpoint import open_checkpoints
from jaxreason.teacher import Teacher
from jaxreason.train import Phase, Run


def build(
    config, *, resumes: bool = False, revisions: Mapping[str, str] | None = None, say: Callable[[str], None] = print
) -> Run:
    """Make a run from a ConfigDict.

    A run that resumes has its own params, so `init_from` is ignored. `revisions` are
    the commits at which hub repositories are read, unless the config names others (see
    `hub.noting`). The run's provenance has the commits that were read.

    Raises:
      ValueError, FileNotFoundError: an error in the config, in one line.
    """
    say = say if jax.process_index() == 0 else lambda line: None
    with hub.noting(revisions, say) as noted:
        run = build_noted(config, resumes, say)
    return run._replace(provenance={**run.provenance, "revisions": noted})


def build_noted(config, resumes: bool, say: Callable[[str], None]) -> Run:
    """Build a run as `build` does, inside its `hub.noting` block."""
    config = settle(config.to_dict())
    phase_names, made_with = config["phases"], versions()

    placement = {"devices": jax.devices(), "process": jax.process_index()}
    meshes = call_with_section(sharding.make_meshes, config["sharding"], "config.sharding", **placement)
    described = read_model_and_text(config["model"], config["text"])
    folder, tokenizer, format, shape, load = described
    text.check_vocabulary(tokenizer, shape)
    if config.get("init_from") and not resumes:
        load = start_from(config["init_from"], described, say)
    elif load is not None and not resumes:
        weights_.check(folder, shape)
    check_size(shape, meshes.learn.devices)
    attention.check_platform(shape, meshes.learn.devices.flat[0].platform)
    model, sampled = (transformer(shape, mesh) for mesh in meshes)
    for mesh in meshes:
        sharding.shardings(jax.eval_shape(model.init, jax.random.key(0)), mesh)  # raises if an axis does not divide
    arguments = {"model": sampled, "tokenizer": tokenizer, "format": format, "mesh": meshes.sample}
    completer = call_with_section(make_completer, config["sampler"], "config.sampler", processes=jax.process_count(), **arguments)
    parts = Parts(
        seed=config["seed"],
        model=model,
        tokenizer=tokenizer,
        format=format,
        completer=completer,
        verifier=config["verifier"],
        meshes=meshes,
        devices=sharding.row_devices(meshes.learn),
        say=say,
        reword=functools.partial(reword, config["text"], folder),
        loaded=[data for path in ancestors(config) for data in trained_before(path, say)],
        environments=[],
        environment=config.get("environment"),
        trained=trained_tasks(config),
    )
    phases = [call_with_section(make_phase, config[name], f"config.{name}", name=name, parts=parts) for name in phase_names]
    evaluate, filter = call_with_section(make_evaluate, config["evaluate"], "config.evaluate", parts=parts)
    filters = [ALL] * any(phase.source.samples for phase in phases) + [filter] * (filter is not None)

    logged = call_with_section(make_log, config["log"], "config.log")
    with_tokens = logged.pop("rollout_tokens")
    parts_of_batches = {phase.name: phase.microbatches for phase in phases}  # some were chosen for this machine
    return Run(
        model=model,
        init=functools.partial(init_params, model, load, config["seed"], meshes.learn),
        phases=phases,
        evaluate=evaluate,
        warm_up=functools.partial(warm_up, completer, filters, parts.environments) if filters else None,
        mesh=meshes.learn,
        seed=config["seed"],
        decode=lambda ids: tokenizer.decode([int(i) for i in ids]),
        sample_devices=meshes.sample.size * jax.process_count(),
        samples_apart=not set(meshes.sample.devices.flat) & set(meshes.learn.devices.flat),
        decoding=decoding_of(sampled, completer.sampler, config["sampler"].get("cache_dtype")),
        **logged,
        token_pieces=functools.partial(text.pieces, tokenizer) if with_tokens else None,
        open_checkpoints=functools.partial(call_with_section, open_checkpoints, config["checkpoint"], "config.checkpoint"),
        provenance={"config": json.loads(json.dumps(config, default=list)), **made_with, **teachers(phases)},
        description={
            "config": config,
            "parameters": model_config.count_parameters(shape),
            "environment": {**made_with, "devices": describe_devices(meshes), "microbatches": parts_of_batches},
        },
    )


def ancestors(config: dict) -> Iterator[str]:
    """Yield the checkpoints from which a run's params or its teachers' are read, except
    those of the hub.
    """
    if config.get("init_from"):
        yield config["init_from"]
    for name in config["phases"]:
        path = config[name].get("reference")
        if path not in (None, *REFERENCES) and (is_url(path) or Path(path).expanduser().exists()):
            yield path


def teachers(phases: Sequence[Phase]) -> dict:
    """Return what tells the teachers of phases from others, for the checkpoints."""
    found = {phase.name: phase.reference.identity for phase in phases if isinstance(phase.reference, Teacher)}
    return {"teachers": found} if found else {}


def trained_before(init_from: str | None, say: Callable[[str], None]) -> Iterator[tuple[str, Sequence]]:
    """Yield the data that the run `init_from` and its own ancestors were trained on.

    Each item is (description, tasks). No suite may share questions with them.
    """
    seen = set()
    while init_from:
        try:
            found = warm_start.find(init_from)
            if found.step is None or found.folder in seen:  # a pretrained checkpoint: unknown
                return
            seen.add(found.folder)
            if not {"seed", "phases"} <= found.config.keys():
                raise ValueError(f"{found.folder / 'config.json'} names no phases")
            config, _ = from_earlier(found.config)
            with hub.noting(found.config.get("revisions")):
                for section in trained_sections(config):
                    yield f"the task {section['name']!r} of {found.folder}", load_tasks(section, seed=config["seed"])
        except (ValueError, OSError) as error:
            say(f"warning: the training data of {init_from} can't be read, so suites are not compared with it: {error}")
            return
        init_from = config.get("init_from")


def describe_devices(meshes: sharding.Meshes) -> str:
    """Name the devices that learn, and those that sample if they are others."""
    learn, sample = meshes.learn.devices.flat, meshes.sample.devices.flat
    named = f"{len(learn)} x {learn[0].device_kind}"
    return named if set(learn) == set(sample) else f"{named} to learn, {len(sample)} x {sample[0].device_kind} to sample"


PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def versions() -> dict:
    """Return the versions of packages that affect the numbers, and the git revision."""
    revision = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES} | {"jaxreason": __version__},
        "revision": revision,
    }
