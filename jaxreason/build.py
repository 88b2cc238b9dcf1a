"""From a config to a run: the only reader of ConfigDict.

Each section of a config is the keyword arguments of one function here or below, so a key that nothing reads cannot exist: it is
refused by name. Everything that can be wrong with a config is found here, before anything is compiled.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import fnmatch
import functools
import importlib.metadata
import inspect
import json
import math
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxreason import __version__, batching, data, fields, hub, ledger, rollout, sharding, sources, tasks, text, verify
from jaxreason import evaluate as evaluation
from jaxreason import objectives as objectives_
from jaxreason import optimizer as optimizer_
from jaxreason import origin as origin_
from jaxreason.checkpoint import open_checkpoints
from jaxreason.cost import attempts_behind_a_prompt, shared_length
from jaxreason.environment import Environment, single_turn
from jaxreason.learner import compile_token_logp
from jaxreason.model import Model, ModelConfig, attention, transformer
from jaxreason.model import config as model_config
from jaxreason.model import weights as weights_
from jaxreason.options import call, find, lines_of, unknown
from jaxreason.rollout import Budget, Roller
from jaxreason.sampler import ALL, MEMBERS, Filter, cache_buckets, compile_sampler
from jaxreason.tasks.procedural import ALPHABET
from jaxreason.train import Phase, Run
from jaxreason.types import Prompted, Task, Verdict

SECTIONS = ("seed", "model", "text", "sampler", "verifier", "phases", "evaluate", "sharding", "checkpoint", "log")
OPTIONAL = ("init_from", "version")
# Counts changes of what a field, or its absence, means: see `CHANGED`.
VERSION = 1


class Described(NamedTuple):
    """The model and the text of a config."""

    folder: Path | None  # of a pretrained model
    tokenizer: text.Tokenizer | None  # None, as the format: weights alone
    format: text.Format | None
    shape: ModelConfig
    load: Callable | None  # what loads its params (see `init_params`); None: they are random


class Parts(NamedTuple):
    """What the phases of a run share."""

    seed: int
    model: Model
    tokenizer: text.Tokenizer
    format: text.Format
    roller: Roller
    verifier: dict
    meshes: sharding.Meshes
    devices: int  # that rows are split over
    say: Callable[[str], None]
    loaded: list[tuple[str, Sequence]] | None = None  # tasks of the sources, each with its name


def build(
    config, *, resumes: bool = False, revisions: Mapping[str, str] | None = None, say: Callable[[str], None] = print
) -> Run:
    """Make a run from a ConfigDict. One that resumes has params of its own, so `init_from` is not looked at.

    `revisions` are the commits at which repositories of the hub are read, unless the config names others (see `hub.noting`).
    The run's provenance has those that were.

    Raises:
      ValueError, FileNotFoundError: anything wrong with it, in one line.
    """
    say = say if jax.process_index() == 0 else lambda line: None
    with hub.noting(revisions, say) as noted:
        run = build_noted(config, resumes, say)
    return run._replace(provenance={**run.provenance, "revisions": noted})


def build_noted(config, resumes: bool, say: Callable[[str], None]) -> Run:
    """Do what `build` does; the commits that it reads are noted around it."""
    config = settle(config.to_dict())
    phase_names = config["phases"]

    here = {"devices": jax.devices(), "process": jax.process_index()}
    meshes = call(sharding.make_meshes, config["sharding"], "config.sharding", **here)
    described = describe(config["model"], config["text"])
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
    given = {"model": sampled, "tokenizer": tokenizer, "format": format, "mesh": meshes.sample}
    roller = call(make_roller, config["sampler"], "config.sampler", processes=jax.process_count(), **given)
    parts = Parts(
        seed=config["seed"],
        model=model,
        tokenizer=tokenizer,
        format=format,
        roller=roller,
        verifier=config["verifier"],
        meshes=meshes,
        devices=sharding.row_devices(meshes.learn),
        say=say,
        loaded=[],
    )
    phases = [call(make_phase, config[name], f"config.{name}", name=name, parts=parts) for name in phase_names]
    evaluate, filter = call(make_evaluate, config["evaluate"], "config.evaluate", parts=parts)
    filters = [ALL] * any(phase.source.samples for phase in phases) + [filter] * (filter is not None)
    recorded, _ = call(make_log, config["log"], "config.log")

    return Run(
        model=model,
        init=functools.partial(init_params, model, load, config["seed"], meshes.learn),
        phases=phases,
        evaluate=evaluate,
        warm_up=functools.partial(warm_up, roller, filters) if filters else None,
        mesh=meshes.learn,
        seed=config["seed"],
        decode=lambda ids: tokenizer.decode([int(i) for i in ids]),
        sample_devices=meshes.sample.size * jax.process_count(),
        **recorded,
        provenance={"config": json.loads(json.dumps(config, default=list)), **versions()},
        description={"config": config, "parameters": model_config.count_parameters(shape)},
    )


def settle(config: dict) -> dict:
    """Check the fields of a config and write down the split of every task that is read from files.

    Files that a source and a suite (or text) both name are split: the source takes train, the
    suite test. A file that only one of them names is read whole. Since the run records the
    result, another suite on resume can't change what is trained on.

    Raises:
      ValueError: a missing, unknown or mistyped field.
    """
    check_fields(config)
    config = copy.deepcopy(config)
    trained, held_out = trained_sections(config), held_out_sections(**config["evaluate"])
    for sections, others, part in ((trained, held_out, "train"), (held_out, trained, "test")):
        for section in filter(tasks.splits_files, sections):
            section.setdefault("split", part if shares_files(section, others) else None)
    return config


def check_fields(config: dict) -> None:
    """Raise ValueError for a missing, unknown or mistyped field of a config."""
    phase_names = config.get("phases") or ()
    if not isinstance(phase_names, (tuple, list)) or not phase_names:
        raise ValueError(f"config.phases got {phase_names!r}; allowed: a tuple of one or more names, each a section of its own")
    for key in SECTIONS:
        if key not in config:
            raise ValueError(f"the config lacks {key!r}; it has: {', '.join(sorted(config))}")
    for name in phase_names:
        if not isinstance(name, str):
            raise ValueError(f"config.phases got {phase_names!r}; allowed: a tuple of names, each a section of its own")
        if name not in config or name in (*SECTIONS, *OPTIONAL):
            raise ValueError(unknown("phase", name, set(config) - {*SECTIONS, *OPTIONAL}))
    for key in set(config) - {*SECTIONS, *OPTIONAL, *phase_names}:
        # A phase that is defined but not run is fine (that is how phases are left out); anything else would be read by nobody.
        if not isinstance(config[key], dict) or "source" not in config[key]:
            raise ValueError(unknown("field of the config", key, {*SECTIONS, *OPTIONAL, *phase_names}))
    for name in phase_names:
        if not is_phase(name, config[name]):
            raise ValueError(f"config.{name} needs source=..., as each of config.phases; got {config[name]!r}")
    fields.check(layout(config), config)
    suites, best = config["evaluate"].get("suites", {}), config["checkpoint"].get("keep_best")
    if best is not None and best not in suites:
        raise ValueError(unknown("suite in config.checkpoint.keep_best", best, suites))
    if config["seed"] < 0:
        raise ValueError(f"config.seed got {config['seed']}; allowed: 0 or more")
    if config.get("version", VERSION) != VERSION:
        raise ValueError(f"config.version got {config['version']}; allowed: {VERSION}, that of this jaxreason")


# --- what each section is ---


class Config(NamedTuple):
    """The fields at the top of a config, where the sections of phases are too."""

    seed: int  # of weights, data and samples
    model: dict  # shape, weights, types and kernels
    text: dict  # tokenizer and prompt format
    sampler: dict  # how attempts are sampled
    verifier: dict  # what judges an answer
    phases: Sequence[str]  # the sections that are run, in this order
    evaluate: dict  # held-out tasks and texts
    sharding: dict  # devices
    checkpoint: dict  # when it is saved, and what is kept
    log: dict  # what is written and shown
    init_from: str | None = None  # begin with params of a run, of RUN/checkpoints/STEP or of a Hugging Face folder
    version: int = VERSION  # of the meaning of the fields, as config.json records it


def layout(config: dict) -> fields.Section:
    """Which function's keyword arguments each section of a config is. A name that is not known brings no fields.

    Raises:
      ValueError: a name of a user's own code that does not load.
    """
    phases = {name: section_of_phase for name, value in config.items() if is_phase(name, value)}
    return fields.Section(
        (Config,),
        sections=phases
        | {
            "model": section_of_model,
            "text": section(make_text, "folder"),
            "sampler": section(make_roller, "model", "tokenizer", "format", "mesh", "processes"),
            "verifier": section_of_verifier,
            "evaluate": section(make_evaluate, "parts", suites=each(section_of_suite), texts=each(section_of_text)),
            "sharding": section(sharding.make_meshes, "devices", "process", mesh=section(sharding.make_mesh, "devices")),
            "checkpoint": section(open_checkpoints, "folder", "read_only"),
            "log": section(make_log),
        },
    )


def is_phase(name: str, value) -> bool:
    return isinstance(value, dict) and "source" in value and name not in (*SECTIONS, *OPTIONAL)


def section(function: Callable, *given: str, **below) -> Callable[[dict], fields.Section]:
    """A section that is the keyword arguments of one function, less those that are given, with the sections `below` in it."""
    return lambda values: fields.Section((function,), given, below)


def each(below: Callable[[dict], fields.Section]) -> Callable[[dict], fields.Section]:
    """A section of sections that the user names."""
    return lambda values: fields.Section(each=below)


def named(what: str, family: dict, values: dict) -> tuple[Callable, ...]:
    """The maker that a section names, if there is one."""
    name = values.get("name")
    known = isinstance(name, str) and (name in family or ":" in name)
    return (find(what, name, family),) if known else ()


# The model that is named, or its checkpoint, decides them where they are absent.
OF_THE_MODEL = (
    *("vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "feed_forward", "rope_theta", "rope_scaling"),
    *("norm_eps", "qkv_bias", "qk_norm", "tied_embeddings"),
)


def section_of_model(values: dict) -> fields.Section:
    below = {"lora": section(model_config.Lora), "rope_scaling": section(model_config.RopeScaling)}
    decided = dict.fromkeys(OF_THE_MODEL, "of the model")
    return fields.Section((make_model, ModelConfig), ("folder", "tokenizer"), below, decided)


def section_of_verifier(values: dict) -> fields.Section:
    return fields.Section((make_environment, *named("verifier", verify.VERIFIERS, values)))


def section_of_task(values: dict, more: tuple[Callable, ...] = ()) -> fields.Section:
    below = {"verifier": section_of_verifier} if more else {}
    decided = {
        "seed": "that of the run",
        "split": "train in a source, test in a suite; a file that only one of them names is read whole",
    } | ({"size": "as many as n"} if more else {})
    return fields.Section((tasks.load, *named("task", tasks.TASKS, values), *more), sections=below, decided=decided)


def section_of_suite(values: dict) -> fields.Section:
    return section_of_task(values, (judged,))


def section_of_text(values: dict) -> fields.Section:
    return fields.Section((held_out_text,), ("name", "parts", "allow_overlap"), {"task": section_of_task})


def section_of_phase(values: dict) -> fields.Section:
    below = {
        "source": section_of_source,
        "objective": section_of_objective,
        "optimizer": section(optimizer_.make, "steps"),
    }
    return fields.Section((make_phase,), ("name", "parts"), below)


def section_of_source(values: dict) -> fields.Section:
    given = ("parts", "objective", "microbatches", "steps")
    return fields.Section((make_source, *named("source", SOURCES, values)), given, {"task": section_of_task})


def section_of_objective(values: dict) -> fields.Section:
    return fields.Section((objectives_.make, *named("objective", objectives_.OBJECTIVES, values)))


def families() -> dict[str, dict[str, str]]:
    """What a config can name, by family, and what each is."""
    makers = {
        "tasks": tasks.TASKS,
        "verifiers": verify.VERIFIERS,
        "objectives": objectives_.OBJECTIVES,
        "advantages": objectives_.ADVANTAGES,
        "weightings": objectives_.WEIGHTINGS,
        "kl_estimators": objectives_.KL_ESTIMATORS,
        "sources": SOURCES,
        "environments": {"single_turn": single_turn},
        "tokenizers": text.TOKENIZERS,
        "formats": text.FORMATS,
    }
    found = {family: {name: first_sentence(maker) for name, maker in members.items()} for family, members in makers.items()}
    found["models"] = {name: model_config.HUB_IDS.get(name, "random weights") for name in model_config.SIZES}
    return found | {"optimizers": optimizer_.OPTIMIZERS}


def first_sentence(function: Callable) -> str:
    """The first sentence of a docstring, in one line."""
    paragraph = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=[^.]{2})\.(?: (?=[A-Z`])|$)", paragraph)[0]


def complete(config: dict) -> dict:
    """Add all fields that a config leaves out, with their defaults. Those that others decide stay absent."""
    return fields.complete(layout(config), config)


class Changed(NamedTuple):
    """A field whose absence, or None, means something else since a version."""

    since: int
    field: str  # pattern of its full name
    names: tuple[str, ...]  # of the family's members that it is about
    was: object


CHANGED = (
    Changed(1, "config.*.objective.weigh", ("rloo", "reinforce"), "per_sequence"),
    Changed(1, "config.*.source.task.split", ("jsonl",), None),
    Changed(1, "config.*.source.task.split", ("corpus",), "train"),
    Changed(1, "config.evaluate.suites.*.split", ("jsonl",), "test"),
    Changed(1, "config.evaluate.texts.*.task.split", ("corpus", "jsonl"), "test"),
)


def from_earlier(config: dict) -> tuple[dict, list[str]]:
    """Read the config.json of a run as this version would have written it; also return the fields that it lacked.

    Where a default has changed since, the field gets the value that it had then.

    Raises:
      ValueError: a field that this version does not have, or that has another name now.
    """
    version = config.get("version", 0)
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"config.json is of version {version}, made by a later jaxreason; update this one (version {VERSION})")
    for where, _, values in fields.sections_of(layout(config), config):
        for change in CHANGED:
            section_, _, name = change.field.rpartition(".")
            concerned = version < change.since and fnmatch.fnmatchcase(where, section_) and values.get("name") in change.names
            if concerned and values.get(name) is None:
                values[name] = change.was
    if gone := fields.unknown_fields(layout(config), config):
        raise ValueError(f"config.json has {gone[0][0]}, which this version does not have ({gone[0][1]})")
    whole = complete(config | {"version": VERSION})
    before = {f"{where}.{name}" for where, _, values in fields.sections_of(layout(config), config) for name in values}
    after = [f"{where}.{name}" for where, _, values in fields.sections_of(layout(whole), whole) for name in values]
    return whole, [name.removeprefix("config.") for name in after if name not in before and name != "config.version"]


PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def versions() -> dict:
    """Versions of what decides the numbers, and the git revision of this code if it is in a repository."""
    revision = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        revision = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES} | {"jaxreason": __version__},
        "revision": revision,
    }


# --- model and text ---


def describe(model: dict, words: dict) -> Described:
    """Read the sections `model` and `text` of a config."""
    folder = find_folder(**{key: model[key] for key in ("name", "weights", "revision") if key in model})
    tokenizer, format = call(make_text, words, "config.text", folder=folder)
    shape, load = call(make_model, model, "config.model", folder=folder, tokenizer=tokenizer)
    return Described(folder, tokenizer, format, shape, load)


WEIGHTS = ("random", "pretrained")


def find_folder(name: str = "tiny", weights: str = "random", revision: str | None = None) -> Path | None:
    """Where a pretrained model lies; None for random weights."""
    if weights not in WEIGHTS:
        raise ValueError(unknown("value of config.model.weights", weights, WEIGHTS))
    if weights == "random":
        if revision is not None:
            raise ValueError(
                f"config.model.revision got {revision!r} with weights='random'; allowed: None, or weights='pretrained'"
            )
        return None
    folder = weights_.resolve(name, revision)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; pass the folder of a Hugging Face checkpoint")
    return folder


def make_model(
    *,
    folder: Path | None,
    tokenizer: text.Tokenizer,
    name: str,  # a named size, a Hugging Face id or a folder
    weights: str = "random",  # random, or pretrained: those of the model that is named
    revision: str | None = None,  # a commit, branch or tag of a hub id; None: main
    scan_layers: bool | None = None,  # scan over layers in the place of unrolling; None: on accelerators
    **fields,
) -> tuple[ModelConfig, Callable | None]:
    """Give the shape of a named size, folder or hub id, and what loads its weights (None for random ones).

    `revision` of the hub is a commit, branch or tag; None for `main`. `scan_layers` None means: scan on accelerators, unroll on a
    CPU. `fields` replace fields of the ModelConfig.
    """
    for key in fields:
        if key not in ModelConfig.__dataclass_fields__:
            known = {"name", "weights", "revision", *ModelConfig.__dataclass_fields__}
            raise ValueError(unknown("field of config.model", key, known))
    for key, made in (("lora", model_config.Lora), ("rope_scaling", model_config.RopeScaling)):
        if fields.get(key) is not None:
            fields[key] = call(made, fields[key], f"config.model.{key}")
    fields["scan_layers"] = jax.default_backend() != "cpu" if scan_layers is None else scan_layers
    if folder is None:
        if name not in model_config.SIZES:
            raise ValueError(unknown("model", name, model_config.SIZES) + "; or weights='pretrained' with a folder or hub id")
        if name == "tiny":
            fields.setdefault("vocab_size", tokenizer.vocab_size)
        return model_config.sized(name, **fields), None
    shape = model_config.read_hf(folder, **fields)
    return shape, functools.partial(origin_.load_folder, folder, shape)


def start_from(path: str, mine: Described, say: Callable[[str], None]) -> Callable:
    """Find the params that `config.init_from` names and check that this config can take them; return what loads them.

    They stand in for those of `config.model`, pretrained ones too, whose shape, tokenizer and chat template stay.
    """
    try:
        found, theirs = find_described(path)
        notes = origin_.check(found, theirs.shape, mine.shape)
        if theirs.tokenizer is not None:
            text.check_same(theirs.tokenizer, mine.tokenizer)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"config.init_from got {path!r}: {error}") from None
    say(f"init_from: {notes}")
    return functools.partial(origin_.load, found, theirs.shape, mine.shape)


def find_described(path: str, step: int | None = None) -> tuple[origin_.Origin, Described]:
    """Find params (see `origin`) and what they belong to."""
    found = origin_.find(path, step)
    if found.step is not None:
        with hub.noting(found.config.get("revisions")):
            return found, describe(found.config["model"], found.config["text"])
    tokenizer = text.load(found.folder) if (found.folder / "tokenizer.json").is_file() else None
    return found, Described(found.folder, tokenizer, None, model_config.read_hf(found.folder), None)


MOST_LAYERS = 10_000  # each is traced


def check_size(shape: model_config.ModelConfig, devices) -> None:
    """Check that the devices' memory can hold the params at all.

    Raises:
      ValueError: it can't, or numbers that no array or trace is made for.
    """
    if shape.vocab_size >= 2**31:
        raise ValueError(f"config.model.vocab_size got {shape.vocab_size}; allowed: below 2**31, as token ids are int32")
    if shape.layers > MOST_LAYERS:
        raise ValueError(f"config.model.layers got {shape.layers}; allowed: up to {MOST_LAYERS}")
    dtypes = (shape.param_dtype, shape.lora and shape.lora.base_dtype)
    needed = model_config.count_parameters(shape) * (2 if "bfloat16" in dtypes else 4)
    there = memory_of(devices)
    if there is not None and needed > there:
        raise ValueError(
            f"the params of config.model take {needed / 1e9:,.0f} GB (width {shape.width}, feed_forward {shape.feed_forward}, "
            f"layers {shape.layers}, vocab_size {shape.vocab_size}) and there are {there / 1e9:.0f} GB; allowed: what "
            "fits; set a smaller width, or use more devices"
        )


def memory_of(devices) -> int | None:
    """Bytes of all devices together; of CPUs those of their hosts; None if that is not known."""
    if devices.flat[0].platform == "cpu":
        pages = {name: os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE") if name in os.sysconf_names}
        return len({d.process_index for d in devices.flat}) * math.prod(pages.values()) if len(pages) == 2 else None
    stats = jax.local_devices()[0].memory_stats() or {}
    return devices.size * stats["bytes_limit"] if "bytes_limit" in stats else None


def init_params(model, load: Callable | None, seed: int, mesh):
    """Make or load the params of a run, each leaf straight onto its devices.

    `load(placed, fresh)` gives params with the shardings `placed`; `fresh(*names)` makes those that it has none for.
    """
    key = jax.random.fold_in(jax.random.key(seed), INITIALISATION)
    placed = sharding.shardings(jax.eval_shape(model.init, key), mesh)

    def fresh(*names):
        wanted = {name: placed[name] for name in names}
        return jax.jit(lambda key: {name: model.init(key)[name] for name in names}, out_shardings=wanted)(key) if names else {}

    return fresh(*placed) if load is None else load(placed, fresh)


INITIALISATION = 2**31 + 1  # folded into the seed's key for random weights; training folds in the number of the phase


def make_text(
    *,
    folder: Path | None,
    tokenizer: str = "characters",  # characters, byte_level, or pretrained: that of the model
    format: str = "plain",  # plain, or chat: by the model's own template
    alphabet: str = ALPHABET,  # of the tokenizer `characters`
    system: str = "",  # the system message of a chat
    instruction: str = "{question}",  # what the model is asked; {question} in it stands for the question
    eos: Sequence[str | int] = (),  # further tokens that end a completion, by their texts or ids
    template: dict | None = None,  # arguments that the chat template reads, as {"enable_thinking": False}
    date: str | None = None,  # YYYY-MM-DD that the chat template takes for today; None: the day on which the run began
) -> tuple[text.Tokenizer, text.Format]:
    """Make the tokenizer and how tasks are put to the model.

    `{question}` in `instruction` stands for the question. `eos` are further tokens that end a completion, by their texts or ids.
    Of a chat model: `system` is its system message; `template` are arguments that its chat template reads, such as
    {"enable_thinking": False}; `date` (YYYY-MM-DD) is the day that it takes for today, None the day on which the run began.
    """
    if tokenizer == "pretrained":
        if folder is None:
            raise ValueError("text.tokenizer is 'pretrained' but model.weights is 'random'; choose characters or byte_level")
        made = text.load(folder)
    else:
        made = text.make(tokenizer, **({"alphabet": alphabet} if tokenizer == "characters" else {}))
    made = text.with_eos(made, eos)
    if format not in text.FORMATS:
        raise ValueError(unknown("format", format, text.FORMATS))
    today = to_date(date)
    if format == "plain":
        if system or template or date is not None:
            field = "system" if system else "template" if template else "date"
            raise ValueError(f"text.format is 'plain', which reads no text.{field}; choose chat, or put it into text.instruction")
        return made, text.plain(made, instruction)
    if folder is None:
        raise ValueError("text.format is 'chat' but model.weights is 'random', so there is no chat template; choose plain")
    source, path = text.load_template(folder), text.template_path(folder)
    how = {"system": system, "instruction": instruction, "arguments": template or {}}
    return made, text.chat(made, source, **how, date=today, path=path)


def to_date(date: str | None) -> datetime.date | None:
    try:
        return None if date is None else datetime.date.fromisoformat(date)
    except (TypeError, ValueError):
        raise ValueError(f"text.date got {date!r}; allowed: YYYY-MM-DD, or None for the day on which the run began") from None


# Prompts that may be so long are shared on a CPU, which pays for the products of rows that nobody continues: a step of SmolLM2's
# shape in 16 slots with 256 columns of their own takes 60.5 ms of one core with a copy of 128 tokens each and 64.6 ms with shared
# ones, 65.7 and 65.2 with 256 tokens, 90.7 and 84.8 with 1,024 (AMD EPYC, Zen 5, float32, best of four, once, 2026-11-26). What
# stands idle on an accelerator costs nothing.
SHARED_TOKENS = 512


def make_roller(
    *,
    model,
    tokenizer: text.Tokenizer,
    format: text.Format,
    mesh,
    processes: int,
    slots: int,  # sequences that are decoded at once, on all processes together
    max_prompt_tokens: int,  # longer prompts are dropped, and counted
    max_tokens: int,  # of a completion
    chunk_tokens: int = 16,  # decoded between two looks at which slots have finished
    cache_dtype: str | None = None,  # of keys and values: float32, bfloat16, int8; None: that of the model
    prompts_per_prefill: int = 8,  # prompts in one prefill call
    prefill_tokens: int | None = None,  # tokens of a prompt in one prefill call; None: by the platform
    prompt_rows: int | None = None,  # prompts that attempts share, per process; 0: each attempt has a copy; None: by size
    stop_strings: Sequence[str] = (),  # texts that end a turn, and stay in it
    thinking_tokens: int | None = None,  # after which the end of thinking is forced; None: never
    end_of_thinking: str = "\n</think>\n\n",  # the text that is forced
    untempered_logp: bool = False,  # also keep log-probs at temperature 1
) -> Roller:
    """Compile-to-be sampler of `slots` sequences of at most `max_prompt_tokens` + `max_tokens` tokens, and the text around it.
    The slots are those of all processes together, and the mesh is that of one. On a CPU a small model is fastest with so few that
    their keys and values stay in the processor's caches.

    A turn ends with any of `stop_strings`, which stays in its text. After `thinking_tokens` tokens of a completion
    `end_of_thinking` is forced, unless it was written. `cache_dtype` is that of the model, or float32, bfloat16 or int8.
    Attempts at a problem share its prompt in one of `prompt_rows` rows of a process; 0: each has a copy; None: by their size.
    """
    positive = {
        "slots": slots,
        "max_prompt_tokens": max_prompt_tokens,
        "max_tokens": max_tokens,
        "chunk_tokens": chunk_tokens,
        "prefill_tokens": prefill_tokens,
        "prompts_per_prefill": prompts_per_prefill,
    }
    for name, value in positive.items():
        if value is not None and value < 1:
            raise ValueError(f"config.sampler.{name} got {value}; allowed: 1 or more")
    if prompt_rows is not None and prompt_rows < 0:
        raise ValueError(f"config.sampler.prompt_rows got {prompt_rows}; allowed: 0 or more")
    if cache_dtype not in CACHE_DTYPES:
        raise ValueError(unknown("config.sampler.cache_dtype", cache_dtype, map(str, CACHE_DTYPES)))
    if isinstance(stop_strings, str) or not all(isinstance(s, str) and s for s in stop_strings):
        raise ValueError(f"config.sampler.stop_strings got {stop_strings!r}; allowed: a tuple of texts, none of them empty")
    thinking = None
    if thinking_tokens is not None:
        if thinking_tokens < 1 or not end_of_thinking.strip():
            raise ValueError(
                f"config.sampler got thinking_tokens={thinking_tokens}, end_of_thinking={end_of_thinking!r}; allowed: 1 or more, "
                "and a text that is more than white space"
            )
        thinking = Budget(thinking_tokens, end_of_thinking, tuple(tokenizer.encode(end_of_thinking, continues=True)))
    if slots % processes:
        raise ValueError(f"config.sampler.slots got {slots}, which do not divide over {processes} processes")
    slots //= processes
    devices = sharding.row_devices(mesh)
    if prompt_rows is None and mesh.devices.flat[0].platform == "cpu" and max_prompt_tokens < SHARED_TOKENS:
        prompt_rows = 0
    elif prompt_rows is None:
        # Twice as many as a full house needs, whose stragglers are of other problems; none where a few slots are alone.
        prompt_rows = 2 * slots // MEMBERS // devices * devices
    length = max_prompt_tokens + max_tokens
    smallest = length if model.config.attention == "cudnn" else 128
    # Where a decode step reads more of the cache than of the weights; but each size is a program, long to compile elsewhere.
    cached = 2 * model.config.layers * model.config.kv_heads * model.config.head_size * slots * length
    fine = mesh.devices.flat[0].platform == "cpu" and cached > model_config.count_parameters(model.config)
    sampler = compile_sampler(
        model,
        slots=slots,
        length=length,
        eos_ids=tokenizer.eos_ids,
        chunk_tokens=chunk_tokens,
        prefill_tokens=prefill_tokens,
        # What continues a shared prompt takes columns for its completion alone. The kernel that goes with cudnn reads those that
        # are there, however many there may be.
        buckets=sorted({*cache_buckets(length, smallest, fine), *([max_tokens] if prompt_rows and length > smallest else [])}),
        # A quarter for the stragglers, where that is worth another program to compile.
        sizes=(slots // 4,) if slots >= 32 and slots // 4 % devices == 0 else (),
        prompt_rows=prompt_rows,
        prompt_columns=max_prompt_tokens,
        cache_dtype=cache_dtype,
        untempered_logp=untempered_logp,
        mesh=mesh,
    )
    return Roller(
        sampler=sampler,
        encode=format.forced,
        decode=functools.partial(tokenizer.decode, continues=True),
        eos_ids=tokenizer.eos_ids,
        prompt_buckets=batching.length_buckets(max_prompt_tokens, count=2 if max_prompt_tokens > 64 else 1),
        rows=min(prompts_per_prefill, slots),
        max_tokens=max_tokens,
        stop_strings=tuple(stop_strings),
        thinking=thinking,
    )


CACHE_DTYPES = (None, "float32", "bfloat16", "int8")


# --- phases ---


def make_phase(
    *,
    name: str,
    parts: Parts,
    source: dict,  # where batches come from
    objective: dict,  # what is trained towards
    optimizer: dict,  # how params are updated
    steps: int,  # batches, one train step each; 0: evaluate only
    microbatches: int = 1,  # parts of a batch whose gradients are added up
    updates_per_batch: int = 1,  # train steps on each batch
    evaluate_every: int = 0,  # steps; 0: at the end of the phase only
    log_every: int = 1,  # steps that a line of metrics sums up
    offload_reference: bool = False,  # keep the reference params in the host's memory while they are not used
    max_skipped: int = 5,  # batches in a row without a finite gradient, after which the run stops
) -> Phase:
    """One phase: `Source x Objective x steps`. After `max_skipped` batches in a row that are not finite the run stops.

    With `offload_reference` the reference policy lies in the host's memory, and on the devices only while it scores a batch.
    """
    if steps < 0:
        raise ValueError(f"config.{name}.steps got {steps}; allowed: 0 (evaluate only) or more")
    positive = {"microbatches": microbatches, "updates_per_batch": updates_per_batch, "max_skipped": max_skipped}
    check_positive(f"config.{name}", **positive, log_every=log_every)
    if evaluate_every < 0:
        raise ValueError(f"config.{name}.evaluate_every got {evaluate_every}; allowed: 0 (at the end only) or more")
    made_objective = call(objectives_.make, objective, f"config.{name}.objective")
    optimizer = without_ignored(optimizer, f"config.{name}.optimizer", parts.say)
    try:
        made_optimizer = call(optimizer_.make, optimizer, f"config.{name}.optimizer", steps=steps * updates_per_batch)
    except ValueError as error:
        raise ValueError(f"config.{name}.optimizer: {error}") from None
    kind, group = source.get("name"), source.get("group", 1)
    if made_objective.needs_group and (kind in ("corpus", "demonstrations") or group < 2):
        raise ValueError(
            f"config.{name}: objective {objective['name']!r} compares the attempts at a problem, but there is "
            f"{group} of each; set {name}.source.group to 2 or more, or choose reinforce, lm or sft"
        )
    if offload_reference and not made_objective.needs_reference:
        raise ValueError(
            f"config.{name}.offload_reference got True, but the objective has no reference policy; allowed: False, or set "
            f"{name}.objective.kl_coefficient above 0"
        )
    given = {"parts": parts, "objective": made_objective, "microbatches": microbatches, "steps": steps}
    made_source = call(make_source, {"name": None} | source, f"config.{name}.source", **given)
    if made_source.rows % (parts.devices * microbatches):
        raise ValueError(
            f"config.{name} has {made_source.rows} rows a batch, which do not divide over {parts.devices} devices x "
            f"{microbatches} micro-batches; change rows, problems x group, source.share_prompts or microbatches"
        )
    return Phase(
        name,
        made_source,
        made_objective,
        made_optimizer,
        steps,
        microbatches,
        updates_per_batch,
        evaluate_every,
        log_every,
        offload_reference,
        max_skipped,
    )


def without_ignored(section: dict, where: str, say: Callable[[str], None]) -> dict:
    """Leave out the fields of an optimizer's section that it does not read, and say which."""
    unread = optimizer_.ignored(section)
    for field, (why, default) in unread.items():
        say(f"warning: {where}.{field}={section[field]!r} changes nothing: {why}; --{where}.{field}={default} silences this")
    return {name: value for name, value in section.items() if name not in unread}


def check_changes(config: dict, changes: Mapping[str, str]) -> None:
    """Check that an optimizer reads each of its fields that a command names.

    Raises:
      ValueError: it does not; a sweep over the field would vary nothing.
    """
    for phase, values in config.items():
        section = values.get("optimizer") if is_phase(phase, values) else None
        for field, (why, default) in optimizer_.ignored(section).items() if isinstance(section, dict) else ():
            where = f"{phase}.optimizer.{field}"
            if where in changes:
                raise ValueError(f"config.{where} got {section[field]!r}, but {why}; else --config.{where}={default}")


def check_positive(where: str, **fields: int) -> None:
    for name, value in fields.items():
        if value < 1:
            raise ValueError(f"{where}.{name} got {value}; allowed: 1 or more")


def make_source(
    *,
    name: str,  # corpus, demonstrations, rollouts, or module:maker of your own
    parts: Parts,
    objective,
    microbatches: int,
    steps: int,
    **section,
) -> sources.Source:
    """Make the source of a name."""
    given = {"parts": parts, "objective": objective, "microbatches": microbatches, "steps": steps}
    made = call(find("source", name, SOURCES), section, f"source {name!r}", **given)
    if not isinstance(made, sources.Source):
        raise ValueError(f"source {name!r} made a {type(made).__name__}; allowed: a sources.Source")
    return made


def load_tasks(section: dict, **defaults) -> Sequence:
    """Load tasks from their section; `defaults` fill in fields that the family has and the section leaves open."""
    section = dict(section)
    name = section.pop("name", None)
    for maker in named("task", tasks.TASKS, {"name": name}):
        known = inspect.signature(maker).parameters
        section = {k: v for k, v in defaults.items() if k in known} | section
    return tasks.load(name, **section)


def load_trained(section: dict, parts: Parts) -> Sequence:
    """Load the tasks of a source."""
    items = load_tasks(section, seed=parts.seed)
    parts.loaded.append((section["name"], items))
    parts.say(f"source: {len(items):,} of task {section['name']!r}{tasks.of_split(section)}")
    return items


def load_held_out(section: dict, parts: Parts, what: str, allow_overlap: bool, **defaults) -> Sequence:
    """Load the tasks of a suite or a text, of the test split unless the section names another.

    Raises:
      ValueError: a source trains on some of them.
    """
    items = load_tasks(section, split="test", **defaults)
    parts.say(f"{what}: {len(items):,} of task {section['name']!r}{tasks.of_split({'split': 'test'} | section)}")
    for name, trained in parts.loaded:
        if shared := tasks.overlap(trained, items):
            message = f"{what} holds {shared:,} of its {len(items):,} questions or texts in common with the source task {name!r}"
            if not allow_overlap:
                raise ValueError(f"{message}; set their split, or another path, or config.evaluate.allow_overlap=True to insist")
            parts.say(f"warning: {message}")
    return items


def trained_sections(config: dict) -> list[dict]:
    """The task sections of all sources of the phases that are run."""
    sections = [config[name]["source"].get("task") for name in config["phases"]]
    return [section for section in sections if isinstance(section, dict)]


def held_out_sections(suites: dict | None = None, texts: dict | None = None, **_) -> list[dict]:
    """The task sections of all suites and texts."""
    sections = [*(suites or {}).values(), *(text.get("task") for text in (texts or {}).values())]
    return [section for section in sections if isinstance(section, dict)]


def shares_files(section: dict, others: Sequence[dict]) -> bool:
    """Whether a task family reads files, some of which are read by other sections too."""
    files = tasks.files(section)
    return any(files & tasks.files(other) for other in others)


def fitting(items: Sequence, prompt: Callable, limit: int, what: str, say: Callable[[str], None]) -> list[Prompted]:
    """The tasks whose prompts have at most `limit` tokens, with these; says how many were dropped, refuses if all were."""
    if not len(items):
        raise ValueError(f"{what} has no tasks; check its split and limit")
    prompted = [Prompted(task, np.asarray(prompt(task), np.int32)) for task in items]
    kept = [p for p in prompted if len(p.prompt) <= limit]
    if not kept:
        raise ValueError(
            f"all {len(items)} prompts of {what} are longer than sampler.max_prompt_tokens={limit} (the first has "
            f"{len(prompted[0].prompt)} tokens); raise it"
        )
    if len(kept) < len(items):
        say(f"{what}: dropped {len(items) - len(kept)} of {len(items)} tasks with prompts over {limit} tokens")
    return kept


def corpus(
    *,
    parts: Parts,
    objective,
    microbatches: int,
    steps: int,
    task: dict,  # the texts, or tasks with worked solutions
    rows: int,  # windows in a batch
    length: int,  # of a window, in tokens
) -> sources.Source:
    """Windows of `length` tokens from the packed stream of a text corpus or of a family's worked solutions."""
    check_positive("source", rows=rows, length=length)
    windows = data.token_windows(encode_documents(load_trained(task, parts), parts, task), length)
    return sources.corpus(data.batches(data.shuffled(windows, seed=parts.seed), rows), objective, rows=rows)


def encode_documents(documents: Sequence, parts: Parts, task: dict) -> list[list[int]]:
    """Token ids of texts, or of tasks with their worked solutions, each from beginning to end of sequence."""
    tokenizer = parts.tokenizer
    if not isinstance(documents[0], str):
        return [parts.format.demonstration(d)[0] for d in check_solutions(documents, task)]
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [[*start, *tokenizer.encode(d, special=False), tokenizer.eos_ids[0]] for d in documents]


def demonstrations(
    *,
    parts: Parts,
    objective,
    microbatches: int,
    steps: int,
    task: dict,  # tasks with worked solutions
    rows: int,  # solutions in a batch
    max_tokens: int,  # of prompt and solution; longer ones are cut
    pack: bool = True,  # put short ones into one row
) -> sources.Source:
    """`rows` worked solutions a batch, of at most `max_tokens` tokens, prompt included; longer ones are cut."""
    check_positive("source", rows=rows, max_tokens=max_tokens)
    items = check_solutions(load_trained(task, parts), task)
    parts.format.demonstration(items[0])  # raises for a template that has no demonstrations
    buckets = batching.length_buckets(max_tokens)
    return sources.demonstrations(
        data.shuffled(items, seed=parts.seed),
        parts.format.demonstration,
        objective,
        rows=rows,
        buckets=buckets,
        pack=pack,
        microbatches=microbatches,
    )


def check_solutions(items: Sequence, task: dict) -> Sequence:
    if not items[0].solution:
        raise ValueError(f"tasks of {task['name']!r} have no worked solutions; set task.demonstrations or task.solution")
    return items


def rollouts(
    *,
    parts: Parts,
    objective,
    microbatches: int,
    steps: int,
    task: dict,  # what is attempted
    problems: int,  # in a batch
    group: int,  # attempts at each problem
    temperature: float = 1.0,  # at which they are sampled
    max_tokens: int | None = None,  # of an attempt; None: sampler.max_tokens
    reward: str = "verdict",  # verdict, or random: a control that is paid by chance
    dynamic_sampling: int = 1,  # draw up to this many times the problems, until enough have attempts that differ in reward
    lag: int = 0,  # updates between the params that sample and those that learn
    pack: bool = True,  # put short attempts into one row
    share_prompts: int | None = None,  # attempts behind one copy of their prompt in the learner; None: as many as save work
    top_k: int = 0,  # refused in training unless 0: the importance ratio would be biased
    top_p: float = 1.0,  # refused in training unless 1
    min_p: float = 0.0,  # refused in training unless 0
) -> sources.Source:
    """`group` verified attempts at each of `problems` tasks a step, sampled from the params `lag` updates ago.

    With `dynamic_sampling` of n up to n times as many problems are drawn, until enough have attempts that differ in reward.
    The learner reads `share_prompts` attempts at a problem behind one copy of its prompt; None: as many as save work.

    Words may not be left out by `top_k`, `top_p` or `min_p`: they are here to say why.
    """
    if make_filter(top_k, top_p, min_p, "source") != ALL:
        raise ValueError(
            f"source got top_k={top_k}, top_p={top_p}, min_p={min_p}; allowed in training: 0, 1 and 0. The learner's log-probs "
            "are over all words, so its ratio to the sampler's would be biased: below 1 on-policy by the share that is left out. "
            "Change the temperature instead, or set them in config.evaluate"
        )
    check_positive("source", problems=problems, group=group)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"source.temperature got {temperature}; allowed: finite, above 0 (greedy attempts are all alike)")
    if lag and objective.on_policy:
        raise ValueError(
            f"source.lag got {lag}, but the objective has no importance ratio, so its gradient would be biased; allowed: 0, or "
            "an objective with a ratio: grpo, dr_grpo, dapo"
        )
    roller = parts.roller
    if max_tokens is not None:
        if not 1 <= max_tokens <= roller.max_tokens:
            raise ValueError(f"source.max_tokens got {max_tokens}; allowed: 1 to sampler.max_tokens={roller.max_tokens}")
        roller = roller._replace(max_tokens=max_tokens)
    longest_prompt = roller.sampler.length - parts.roller.max_tokens
    share = attempts_that_share(
        share_prompts,
        parts.model.config,
        group=group,
        rows=problems * group,
        multiple=parts.devices * microbatches,
        prompt=longest_prompt // 2,
        completion=roller.max_tokens,
    )
    loaded = load_trained(task, parts)
    what = f"task {task['name']!r}"
    prompted = fitting(loaded, parts.format.prompt, longest_prompt, what, parts.say)
    items = [task for task, _ in prompted]
    check_keys(items, parts.verifier, what, parts.say)
    return sources.rollouts(
        data.shuffled(prompted, seed=parts.seed),
        judge(parts.verifier, items),
        roller,
        objective,
        problems=problems,
        group=group,
        temperature=temperature,
        buckets=batching.length_buckets(shared_length(longest_prompt, [roller.max_tokens] * share)),
        reward=reward,
        dynamic_sampling=dynamic_sampling,
        pack=pack,
        microbatches=microbatches,
        share=share,
        lag=lag,
        background=not set(parts.meshes.sample.devices.flat) & set(parts.meshes.learn.devices.flat),
        steps=steps,
    )


MOST_ATTEMPTS = 2**20  # at a problem, in a batch


def attempts_that_share(
    asked: int | None, shape: ModelConfig, *, group: int, rows: int, multiple: int, prompt: int, completion: int
) -> int:
    """How many attempts at a problem stand behind one copy of its prompt.

    None asks for as many as pay with a typical `prompt` and the longest `completion`, of those that leave a `multiple` of rows:
    devices x micro-batches.
    """
    if not 1 <= group <= MOST_ATTEMPTS:
        raise ValueError(f"source.group got {group}; allowed: 1 to {MOST_ATTEMPTS:,}")
    alone = shape.attention != "xla"  # the kernels know segments, but no branches of one
    if asked is None:
        choices = [n for n in range(1, group + 1) if group % n == 0 and rows // n % multiple == 0]
        return 1 if alone else attempts_behind_a_prompt(shape, choices or [1], prompt, completion)
    if asked < 1 or group % asked:
        raise ValueError(f"source.share_prompts got {asked}; allowed: a divisor of group={group}, or None: what saves work")
    if asked > 1 and alone:
        raise ValueError(f"source.share_prompts got {asked} with attention={shape.attention!r}; allowed: 1, or attention='xla'")
    return asked


def warm_up(roller: Roller, filters: Sequence[Filter], params) -> None:
    """Compile the sampler for all lengths."""
    # Every verifier judges a turn at once, so only the end of thinking is ever forced.
    rollout.warm_up(roller, roller.sampler.prepare(params), filters, forces=roller.thinking is not None)


SOURCES = {"corpus": corpus, "demonstrations": demonstrations, "rollouts": rollouts}


def make_filter(top_k: int, top_p: float, min_p: float, where: str) -> Filter:
    """Which words may be drawn."""
    if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p < 1:
        raise ValueError(
            f"{where} got top_k={top_k}, top_p={top_p}, min_p={min_p}; allowed: top_k 0 (all) or more, top_p above 0 and at "
            "most 1, min_p from 0 to below 1"
        )
    return Filter(top_k, top_p, min_p)


OF_ENVIRONMENT = ("must_finish", "deadline_s")  # fields of a verifier section that its verifier does not get


def make_environment(
    *,
    name: str,  # one of the verifiers, or module:maker of your own
    must_finish: bool = False,  # an attempt that is cut off at its limit is wrong, whatever it says
    deadline_s: float | None = None,  # of a verdict; None: 60, or none for a verifier that has a timeout_s
    **section,
) -> Environment:
    """Make the environment that a `verifier` section asks for (see single_turn)."""
    if name in verify.BOUNDED and deadline_s is not None:
        raise ValueError(f"verifier.deadline_s got {deadline_s}, but {name!r} has its own limit; set timeout_s instead")
    own = {"deadline_s": None} if name in verify.BOUNDED else {"deadline_s": deadline_s} if deadline_s is not None else {}
    return single_turn(verify.make(name, **section), must_finish, name=name, **own)


KEYS_TRIED = 20_000  # at most; a verifier reads some ten thousand a second


def check_keys(items: Sequence, section: dict, what: str, say: Callable[[str], None]) -> None:
    """Say how many tasks have keys that their verifier can't judge, so that no answer would be right; refuse if all have.

    A verifier that is not of this package is not asked: it may be slow, or cost money.
    """
    if section.get("name") not in verify.VERIFIERS:
        return
    step = -(-len(items) // KEYS_TRIED)
    tried = items[::step]
    bad = verify.bad_keys(verify.make(**{k: v for k, v in section.items() if k not in OF_ENVIRONMENT}), tried)
    if not bad:
        return
    of = f"{len(tried)} keys" if step == 1 else f"{len(tried)} keys that were tried (of {len(items)})"
    told = f"verifier {section['name']!r} can't judge {len(bad)} of {of}; the first is {bad[0].answer!r} of task {bad[0].id!r}"
    if len(bad) == len(tried):
        raise ValueError(f"{what}: {told}. Every reward would be 0; choose another verifier, or other fields of the task")
    say(f"warning: {what}: {told}; such attempts earn 0 and are counted in rollout/bad_keys")


def judge(section: dict, items: Sequence[Task]) -> Environment:
    """Make the environment of a `verifier` section, whose verifier, if it is the user's own, is tried on the first task.

    Raises:
      ValueError: no verifier of that name, a wrong field, or a verifier of the user's that gives no Verdict.
    """
    section = {"name": None} | section
    if isinstance(name := section["name"], str) and ":" in name and len(items):
        judge_one = verify.make(**{key: value for key, value in section.items() if key not in OF_ENVIRONMENT})
        for answer in (items[0].answer, ""):
            with lines_of(f"verifier {name!r} on the first task"):
                verdict = judge_one(answer, items[0])
            if not isinstance(verdict, Verdict):
                raise ValueError(f"verifier {name!r} gave {verdict!r} of the first task; allowed: a types.Verdict")
    return call(make_environment, section, "config.verifier")


# --- evaluation and logs ---


def make_evaluate(
    *,
    parts: Parts,
    suites: dict,  # held-out tasks that are attempted: name -> the section of their tasks
    texts: dict | None = None,  # held-out documents that are scored: name -> task, length and rows
    temperatures: Sequence[float] = (0.0, 1.0),  # every suite is attempted once at each; 0 is greedy
    n: int = 200,  # tasks of each suite
    final_n: int | None = None,  # the same at the start and at the end of a phase; None: n
    top_k: int = 0,  # draw from the likeliest k tokens; 0: all
    top_p: float = 1.0,  # draw from the likeliest tokens that have this probability together
    min_p: float = 0.0,  # draw from tokens with this fraction of the likeliest's probability
    allow_overlap: bool = False,  # evaluate on questions that a source trains on too
) -> tuple[Callable, Filter | None]:
    """Return `evaluate(params, phase, step, final)`: n tasks of each suite, `final_n` at the start and the end of a phase.

    Also return which words its attempts may use, None if it makes none.

    A suite's section is that of its tasks, and may have a `verifier` of its own. A text's section is that of its documents, with
    the `length` and the number of `rows` of its windows. Of files that a source reads too, sources get the train split and
    suites the test split, unless they say which; files that nothing trains on are held out whole. Questions that a source
    trains on are refused in a suite, unless `allow_overlap`.
    """
    roller = parts.roller
    filter = make_filter(top_k, top_p, min_p, "config.evaluate")
    if suites and not temperatures:
        raise ValueError("config.evaluate.temperatures is empty; allowed: one or more, 0 is greedy")
    check_positive("config.evaluate", n=n, final_n=n if final_n is None else final_n)
    if wrong := [t for t in temperatures if not 0 <= t < float("inf")]:
        raise ValueError(f"config.evaluate.temperatures got {wrong[0]}; allowed: 0 (greedy) or more, finite")
    # Written as the metrics name them, so that none takes another's place.
    if twice := [t for i, t in enumerate(temperatures) if f"{t:g}" in [f"{other:g}" for other in temperatures[:i]]]:
        raise ValueError(f"config.evaluate.temperatures has {twice[0]:g} twice; allowed: each once")
    longest_prompt = roller.sampler.length - roller.max_tokens
    made = []
    for name, section in suites.items():
        task = {k: v for k, v in section.items() if k != "verifier"}
        items = load_held_out(task, parts, f"suite {name!r}", allow_overlap, size=max(n, final_n or n))
        prompted = fitting(items, parts.format.prompt, longest_prompt, f"suite {name!r}", parts.say)
        items = [task for task, _ in prompted]
        own = section.get("verifier")
        verifier = parts.verifier if own is None else own
        check_keys(items, verifier, f"suite {name!r}", parts.say)
        made.append(evaluation.Suite(name, prompted, judge(verifier, items)))

    made_texts = [
        call(held_out_text, section, f"config.evaluate.texts.{name}", name=name, parts=parts, allow_overlap=allow_overlap)
        for name, section in (texts or {}).items()
    ]
    mesh, config = parts.meshes.learn, parts.model.config
    reading_flops = ledger.reading(config, [batch for text in made_texts for batch in text.batches])
    compiled = compile_token_logp(parts.model, mesh=mesh)

    def token_logp(params, batch):
        return compiled(params, sharding.put_rows(batch, mesh))

    def evaluate(params, *, phase: str, step: int, final: bool):
        nll = evaluation.score(token_logp, params, made_texts)
        evaluations, rollouts = evaluation.evaluate(
            roller,
            params,
            made,
            temperatures=temperatures,
            n=final_n if final and final_n else n,
            seed=0,
            phase=phase,
            step=step,
            filter=filter,
        )
        work = ledger.sampling(config, rollouts)
        work["flops"] += reading_flops
        return evaluation.Result(evaluations, rollouts, nll, work)

    return evaluate, filter if suites else None


def judged(
    *,
    verifier: dict | None = None,  # of this suite alone; None: that of the config
):
    """The field of a suite beside those of its tasks."""


def held_out_text(
    *,
    name: str,
    parts: Parts,
    allow_overlap: bool,
    task: dict,  # the documents
    length: int,  # of a window, in tokens
    rows: int = 64,  # windows that are scored, at most
) -> evaluation.Text:
    """The first `rows` windows of held-out documents, in batches of eight rows."""
    check_positive(f"config.evaluate.texts.{name}", rows=rows, length=length)
    windows = data.token_windows(
        encode_documents(load_held_out(task, parts, f"text {name!r}", allow_overlap), parts, task), length
    )[:rows]
    each = min(8 * parts.devices, len(windows) // parts.devices * parts.devices)
    if not each:
        raise ValueError(
            f"config.evaluate.texts.{name}: {len(windows)} windows of {length} tokens; give more text or shorter windows"
        )
    whole = range(0, len(windows) // each * each, each)
    return evaluation.Text(name, [batching.from_windows(windows[i : i + each], objectives_.lm()) for i in whole])


def make_log(
    *,
    rollouts_kept: int = 64,  # of each step, in rollouts.jsonl
    watts: float | None = None,  # of a device at work, for joules in the ledger; None: no joules
    tensorboard: bool = True,  # write tensorboard/
    live: bool = True,  # show a live table, on a terminal
    wandb: dict | None = None,  # arguments of wandb.init; None: not used
) -> tuple[dict, dict]:
    """What the loop is to know of it: how many rollouts of a step are written, the watts of a device; and the log's options."""
    if rollouts_kept < 0:
        raise ValueError(f"config.log.rollouts_kept got {rollouts_kept}; allowed: 0 (none) or more of each step")
    if watts is not None and not watts > 0:
        raise ValueError(f"config.log.watts got {watts}; allowed: None, or what a device takes at work, above 0")
    return {"rollouts_kept": rollouts_kept, "watts": watts}, {"tensorboard": tensorboard, "live": live, "wandb": wandb}
