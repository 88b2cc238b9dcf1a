"""From a config to a run: the only reader of ConfigDict.

Each section of a config is the keyword arguments of one function here or below, so a key that nothing reads cannot exist: it is
refused by name. Everything that can be wrong with a config is found here, before anything is compiled.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import inspect
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from jaxreason import __version__, batching, data, hub, ledger, rollout, sharding, sources, tasks, text, verify
from jaxreason import evaluate as evaluation
from jaxreason import objectives as objectives_
from jaxreason import optimizer as optimizer_
from jaxreason import origin as origin_
from jaxreason.cost import attempts_behind_a_prompt, shared_length
from jaxreason.environment import Environment, single_turn
from jaxreason.learner import compile_token_logp
from jaxreason.model import Model, ModelConfig, attention, transformer
from jaxreason.model import config as model_config
from jaxreason.model import weights as weights_
from jaxreason.options import call, unknown
from jaxreason.rollout import Budget, Roller
from jaxreason.sampler import ALL, MEMBERS, Filter, cache_buckets, compile_sampler
from jaxreason.tasks.procedural import ALPHABET
from jaxreason.train import Phase, Run

SECTIONS = ("seed", "model", "text", "sampler", "verifier", "phases", "evaluate", "sharding", "checkpoint", "log")
OPTIONAL = ("init_from",)


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
    trained: Sequence[dict] = ()  # the task sections of all sources
    held_out: Sequence[dict] = ()  # those of all suites and texts
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
    config = config.to_dict()
    phase_names = config.get("phases") or ()
    if not isinstance(phase_names, (tuple, list)) or not phase_names:
        raise ValueError(f"config.phases got {phase_names!r}; allowed: a tuple of one or more names, each a section of its own")
    for key in SECTIONS:
        if key not in config:
            raise ValueError(f"the config lacks {key!r}; it has: {', '.join(sorted(config))}")
    for name in phase_names:
        if name not in config or name in (*SECTIONS, *OPTIONAL):
            raise ValueError(unknown("phase", name, set(config) - {*SECTIONS, *OPTIONAL}))
    for key in set(config) - {*SECTIONS, *OPTIONAL, *phase_names}:
        # A phase that is defined but not run is fine (that is how phases are left out); anything else would be read by nobody.
        if not isinstance(config[key], dict) or "source" not in config[key]:
            raise ValueError(unknown("field of the config", key, {*SECTIONS, *OPTIONAL, *phase_names}))

    here = {"devices": jax.devices(), "process": jax.process_index()}
    meshes = call(sharding.make_meshes, config["sharding"], "config.sharding", **here)
    described = describe(config["model"], config["text"])
    folder, tokenizer, format, shape, load = described
    text.check_vocabulary(tokenizer, shape)
    if config.get("init_from") and not resumes:
        load = start_from(config["init_from"], described, say)
    elif load is not None and not resumes:
        weights_.check(folder, shape)
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
        trained=[config[name]["source"].get("task") or {} for name in phase_names],
        held_out=held_out_sections(**config["evaluate"]),
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
    name: str,
    weights: str = "random",
    revision: str | None = None,  # a commit, branch or tag of a hub id; None: main
    scan_layers: bool | None = None,
    **fields,
) -> tuple[ModelConfig, Callable | None]:
    """Give the shape of a named size, folder or hub id, and what loads its weights (None for random ones).

    `revision` of the hub is a commit, branch or tag; None for `main`. `scan_layers` None means: scan on accelerators, unroll on a
    CPU. `fields` replace fields of the ModelConfig.
    """
    for key in fields:
        if key not in ModelConfig.__dataclass_fields__:
            raise ValueError(
                unknown("field of config.model", key, {"name", "weights", "revision", *ModelConfig.__dataclass_fields__})
            )
    if fields.get("lora") is not None:
        fields["lora"] = call(model_config.Lora, fields["lora"], "config.model.lora")
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
    tokenizer: str = "characters",
    format: str = "plain",
    alphabet: str = ALPHABET,
    system: str = "",
    instruction: str = "{question}",
    eos: Sequence[str | int] = (),
    template: dict | None = None,
    date: str | None = None,
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
    if format == "plain":
        if system or template:
            field = "system" if system else "template"
            raise ValueError(f"text.format is 'plain', which reads no text.{field}; choose chat, or put it into text.instruction")
        return made, text.plain(made, instruction)
    if folder is None:
        raise ValueError("text.format is 'chat' but model.weights is 'random', so there is no chat template; choose plain")
    source, path = text.load_template(folder), text.template_path(folder)
    how = {"system": system, "instruction": instruction, "arguments": template or {}}
    return made, text.chat(made, source, **how, date=to_date(date), path=path)


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
    slots: int,
    max_prompt_tokens: int,
    max_tokens: int,
    chunk_tokens: int = 16,
    cache_dtype: str | None = None,
    prompts_per_prefill: int = 8,
    prefill_tokens: int | None = None,
    prompt_rows: int | None = None,
    stop_strings: Sequence[str] = (),
    thinking_tokens: int | None = None,
    end_of_thinking: str = "\n</think>\n\n",
    untempered_logp: bool = False,
) -> Roller:
    """Compile-to-be sampler of `slots` sequences of at most `max_prompt_tokens` + `max_tokens` tokens, and the text around it.
    The slots are those of all processes together, and the mesh is that of one. On a CPU a small model is fastest with so few that
    their keys and values stay in the processor's caches.

    A turn ends with any of `stop_strings`, which stays in its text. After `thinking_tokens` tokens of a completion
    `end_of_thinking` is forced, unless it was written. `cache_dtype` is that of the model, or float32, bfloat16 or int8.
    Attempts at a problem share its prompt in one of `prompt_rows` rows of a process; 0: each has a copy; None: as many as pay.
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
    source: dict,
    objective: dict,
    optimizer: dict,
    steps: int,
    microbatches: int = 1,
    updates_per_batch: int = 1,
    evaluate_every: int = 0,
    log_every: int = 1,
    offload_reference: bool = False,
    max_skipped: int = 5,
) -> Phase:
    """One phase: `Source x Objective x steps`. After `max_skipped` batches in a row that are not finite the run stops.

    With `offload_reference` the reference policy lies in the host's memory, and on the devices only while it scores a batch.
    """
    positive = {"steps": steps, "microbatches": microbatches, "updates_per_batch": updates_per_batch, "max_skipped": max_skipped}
    for key, value in positive.items():
        if value < 1:
            raise ValueError(f"config.{name}.{key} got {value}; allowed: 1 or more")
    made_objective = call(objectives_.make, objective, f"config.{name}.objective")
    made_optimizer = call(optimizer_.make, optimizer, f"config.{name}.optimizer", steps=steps * updates_per_batch)
    kind, section = source.get("name"), {k: v for k, v in source.items() if k != "name"}
    if kind not in SOURCES:
        raise ValueError(unknown("source", kind, SOURCES))
    if made_objective.needs_group and (kind != "rollouts" or section.get("group", 1) < 2):
        raise ValueError(
            f"config.{name}: objective {objective['name']!r} compares the attempts at a problem, but there is "
            f"{section.get('group', 1)} of each; set {name}.source.group to 2 or more, or choose reinforce, lm or sft"
        )
    if offload_reference and not made_objective.needs_reference:
        raise ValueError(
            f"config.{name}.offload_reference got True, but the objective has no reference policy; allowed: False, or set "
            f"{name}.objective.kl_coefficient above 0"
        )
    given = {"parts": parts, "objective": made_objective, "microbatches": microbatches, "steps": steps}
    made_source = call(SOURCES[kind], section, f"config.{name}.source", **given)
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


def load_tasks(section: dict, **defaults) -> Sequence:
    """Load tasks from their section; `defaults` fill in fields that the family has and the section leaves open."""
    section = dict(section)
    name = section.pop("name", None)
    if name in tasks.TASKS:
        known = inspect.signature(tasks.TASKS[name]).parameters
        section = {k: v for k, v in defaults.items() if k in known} | section
    return tasks.load(name, **section)


def load_trained(section: dict, parts: Parts) -> Sequence:
    """Load the tasks of a source; of files that a suite or a text reads too, the split for training."""
    split = {"split": "train"} if shares_files(section, parts.held_out) else {}
    items = load_tasks(section, seed=parts.seed, **split)
    parts.loaded.append((section["name"], items))
    parts.say(f"source: {len(items):,} of task {section['name']!r}{tasks.of_split(section | split)}")
    return items


def load_held_out(section: dict, parts: Parts, what: str, allow_overlap: bool, **defaults) -> Sequence:
    """Load the tasks of a suite or a text: a test split, or the whole of files that no source reads.

    Raises:
      ValueError: a source trains on some of them.
    """
    whole = tasks.splits_files(section.get("name")) and not shares_files(section, parts.trained)
    split = {"split": None if whole else "test"}
    items = load_tasks(section, **split, **defaults)
    parts.say(f"{what}: {len(items):,} of task {section['name']!r}{tasks.of_split(section | split)}")
    for name, trained in parts.loaded:
        if shared := tasks.overlap(trained, items):
            message = f"{what} holds {shared:,} of its {len(items):,} questions or texts in common with the source task {name!r}"
            if not allow_overlap:
                raise ValueError(f"{message}; set their split, or another path, or config.evaluate.allow_overlap=True to insist")
            parts.say(f"warning: {message}")
    return items


def held_out_sections(suites: dict | None = None, texts: dict | None = None, **_) -> list[dict]:
    """The task sections of all suites and texts."""
    return [*(suites or {}).values(), *(text.get("task") or {} for text in (texts or {}).values())]


def shares_files(section: dict, others: Sequence[dict]) -> bool:
    """Whether a task family reads files, some of which are read by other sections too."""
    files = tasks.files(section)
    return any(files & tasks.files(other) for other in others)


def fitting(items: Sequence, prompt: Callable, limit: int, what: str, say: Callable[[str], None]) -> list:
    """The tasks whose prompts have at most `limit` tokens; says how many were dropped, refuses if all were."""
    if not len(items):
        raise ValueError(f"{what} has no tasks; check its split and limit")
    kept = [task for task in items if len(prompt(task)) <= limit]
    if not kept:
        raise ValueError(
            f"all {len(items)} prompts of {what} are longer than sampler.max_prompt_tokens={limit} (the first has "
            f"{len(prompt(items[0]))} tokens); raise it"
        )
    if len(kept) < len(items):
        say(f"{what}: dropped {len(items) - len(kept)} of {len(items)} tasks with prompts over {limit} tokens")
    return kept


def corpus(*, parts: Parts, objective, microbatches: int, steps: int, task: dict, rows: int, length: int) -> sources.Source:
    """Windows of `length` tokens from the packed stream of a text corpus or of a family's worked solutions."""
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
    *, parts: Parts, objective, microbatches: int, steps: int, task: dict, rows: int, max_tokens: int, pack: bool = True
) -> sources.Source:
    """`rows` worked solutions a batch, of at most `max_tokens` tokens, prompt included; longer ones are cut."""
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
    task: dict,
    problems: int,
    group: int,
    temperature: float = 1.0,
    max_tokens: int | None = None,
    reward: str = "verdict",
    dynamic_sampling: int = 1,
    lag: int = 0,
    pack: bool = True,
    share_prompts: int | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> sources.Source:
    """`group` verified attempts at each of `problems` tasks a step, sampled from the params `lag` updates ago.

    With `dynamic_sampling` of n up to n times as many problems are drawn, until enough have attempts that differ in reward.
    The learner reads `share_prompts` attempts at a problem behind one copy of its prompt; None: as many as pay.

    Words may not be left out by `top_k`, `top_p` or `min_p`: they are here to say why.
    """
    if make_filter(top_k, top_p, min_p, "source") != ALL:
        raise ValueError(
            f"source got top_k={top_k}, top_p={top_p}, min_p={min_p}; allowed in training: 0, 1 and 0. The learner's log-probs "
            "are over all words, so its ratio to the sampler's would be biased: below 1 on-policy by the share that is left out. "
            "Change the temperature instead, or set them in config.evaluate"
        )
    if temperature <= 0:
        raise ValueError(f"source.temperature got {temperature}; allowed: above 0 (greedy attempts are all alike)")
    if lag and objective.on_policy:
        raise ValueError(
            f"source.lag got {lag}, but the objective has no importance ratio, so its gradient would be biased; allowed: 0, or "
            "an objective with a ratio: grpo, dr_grpo, dapo"
        )
    prompt, roller = parts.format.prompt, parts.roller
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
    items = fitting(load_trained(task, parts), prompt, longest_prompt, f"task {task['name']!r}", parts.say)
    return sources.rollouts(
        data.shuffled(items, seed=parts.seed),
        prompt,
        make_environment(parts.verifier),
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


def attempts_that_share(
    asked: int | None, shape: ModelConfig, *, group: int, rows: int, multiple: int, prompt: int, completion: int
) -> int:
    """How many attempts at a problem stand behind one copy of its prompt.

    None asks for as many as pay with a typical `prompt` and the longest `completion`, of those that leave a `multiple` of rows:
    devices x micro-batches.
    """
    alone = shape.attention != "xla"  # the kernels know segments, but no branches of one
    if asked is None:
        choices = [n for n in range(1, group + 1) if group % n == 0 and rows // n % multiple == 0]
        return 1 if alone else attempts_behind_a_prompt(shape, choices or [1], prompt, completion)
    if asked < 1 or group % asked:
        raise ValueError(f"source.share_prompts got {asked}; allowed: a divisor of group={group}, or None for as many as pay")
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


def make_environment(section: dict) -> Environment:
    """Make the environment that a `verifier` section asks for: its name, its fields, and `must_finish` (see single_turn)."""
    section = {"name": None, **section}
    must_finish = section.pop("must_finish", False)
    return single_turn(verify.make(**section), must_finish)


# --- evaluation and logs ---


def make_evaluate(
    *,
    parts: Parts,
    suites: dict,
    texts: dict | None = None,
    temperatures: Sequence[float] = (0.0, 1.0),
    n: int = 200,
    final_n: int | None = None,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    allow_overlap: bool = False,
) -> tuple[Callable, Filter | None]:
    """Return `evaluate(params, phase, step, final)`: n tasks of each suite, `final_n` at the start and the end of a phase.

    Also return which words its attempts may use, None if it makes none.

    A suite's section is that of its tasks, and may have a `verifier` of its own. A text's section is that of its documents, with
    the `length` and the number of `rows` of its windows. Of files that a source reads too, sources get the train split and
    suites the test split, unless they say which; files that nothing trains on are held out whole. Questions that a source
    trains on are refused in a suite, unless `allow_overlap`.
    """
    prompt, roller = parts.format.prompt, parts.roller
    filter = make_filter(top_k, top_p, min_p, "config.evaluate")
    if suites and not temperatures:
        raise ValueError("config.evaluate.temperatures is empty; allowed: one or more, 0 is greedy")
    longest_prompt = roller.sampler.length - roller.max_tokens
    made = []
    for name, section in suites.items():
        environment = make_environment(section.get("verifier", parts.verifier))
        task = {k: v for k, v in section.items() if k != "verifier"}
        items = load_held_out(task, parts, f"suite {name!r}", allow_overlap, size=max(n, final_n or n))
        items = fitting(items, prompt, longest_prompt, f"suite {name!r}", parts.say)
        made.append(evaluation.Suite(name, items, environment))

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
            prompt=prompt,
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


def held_out_text(*, name: str, parts: Parts, allow_overlap: bool, task: dict, length: int, rows: int = 64) -> evaluation.Text:
    """The first `rows` windows of held-out documents, in batches of eight rows."""
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
    rollouts_kept: int = 64,
    watts: float | None = None,
    tensorboard: bool = True,
    live: bool = True,
    wandb: dict | None = None,
) -> tuple[dict, dict]:
    """What the loop is to know of it: how many rollouts of a step are written, the watts of a device; and the log's options."""
    if watts is not None and not watts > 0:
        raise ValueError(f"config.log.watts got {watts}; allowed: None, or what a device takes at work, above 0")
    return {"rollouts_kept": rollouts_kept, "watts": watts}, {"tensorboard": tensorboard, "live": live, "wandb": wandb}
