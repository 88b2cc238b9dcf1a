"""Build the model, its params, and its tokenizer and prompt format."""

from __future__ import annotations

import datetime
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from jaxreason import sharding, text
from jaxreason.model import ModelConfig
from jaxreason.model import config as model_config
from jaxreason.model import weights as weights_
from jaxreason.options import call_with_section, unknown_name_message
from jaxreason.platforms import platform_of
from jaxreason.runtime import hub
from jaxreason.runtime import warm_start as origin_
from jaxreason.tasks.procedural import ALPHABET


class ModelAndText(NamedTuple):
    """Model and text of a config."""

    folder: Path | None  # of a pretrained model
    tokenizer: text.Tokenizer | None  # None, like the format, if there are only weights
    format: text.Format | None
    shape: ModelConfig
    load: Callable | None  # loads the params (see `init_params`); None: random params


def read_model_and_text(model: dict, words: dict) -> ModelAndText:
    """Read the sections `model` and `text` of a config."""
    folder = find_folder(**{key: model[key] for key in ("name", "weights", "revision") if key in model})
    tokenizer, format = call_with_section(make_text, words, "config.text", folder=folder)
    shape, load = call_with_section(make_model, model, "config.model", folder=folder, tokenizer=tokenizer)
    return ModelAndText(folder, tokenizer, format, shape, load)


WEIGHTS = ("random", "pretrained")


def find_folder(name: str = "tiny", weights: str = "random", revision: str | None = None) -> Path | None:
    """Find the folder of a pretrained model; None for random weights."""
    if weights not in WEIGHTS:
        raise ValueError(unknown_name_message("value of config.model.weights", weights, WEIGHTS))
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
    name: str,  # named size, Hugging Face id or folder
    weights: str = "random",  # random, or pretrained: those of the named model
    revision: str | None = None,  # commit, branch or tag of a hub id; None: main
    scan_layers: bool | None = None,  # scan over layers instead of unrolling them; None: on accelerators only
    **fields,
) -> tuple[ModelConfig, Callable | None]:
    """Return the model shape, and the loader of its weights or None for random weights.

    `fields` replace fields of the ModelConfig.
    """
    for key in fields:
        if key not in ModelConfig.__dataclass_fields__:
            known = {"name", "weights", "revision", *ModelConfig.__dataclass_fields__}
            raise ValueError(unknown_name_message("field of config.model", key, known))
    for key, made in (("lora", model_config.Lora), ("rope_scaling", model_config.RopeScaling)):
        if fields.get(key) is not None:
            fields[key] = call_with_section(made, fields[key], f"config.model.{key}")
    fields["scan_layers"] = platform_of().scan_layers if scan_layers is None else scan_layers
    if folder is None:
        if name not in model_config.SIZES:
            raise ValueError(
                unknown_name_message("model", name, model_config.SIZES) + "; or weights='pretrained' with a folder or hub id"
            )
        if name == "tiny":
            fields.setdefault("vocab_size", tokenizer.vocab_size)
        return model_config.sized(name, **fields), None
    shape = model_config.read_hf(folder, **fields)
    return shape, functools.partial(origin_.load_folder, folder, shape)


def read_shape(section: dict, text_section: dict) -> model_config.ModelConfig:
    """Read the shape of the model of a `model` section, without loading or downloading
    weights.

    Raises:
      ValueError: the shape is known only to a hub repository, or fields do not fit.
    """
    section, folder, tokenizer = dict(section), None, None
    name = section["name"]
    if section.get("weights") == "pretrained":
        section["weights"] = "random"
        if name not in model_config.SIZES:
            folder = Path(os.path.expanduser(name))
            if not (folder / "config.json").is_file():
                known = unknown_name_message("model", name, model_config.SIZES)
                raise ValueError(f"{known}; or a folder with a config.json (nothing is downloaded here)")
    elif name == "tiny":
        tokenizer, _ = call_with_section(make_text, text_section, "config.text", folder=None)
    shape, _ = call_with_section(make_model, section, "config.model", folder=folder, tokenizer=tokenizer)
    return shape


def start_from(path: str, mine: ModelAndText, say: Callable[[str], None]) -> Callable:
    """Find the params that `config.init_from` names and check that they fit.

    Return the function that loads them. They replace the params of `config.model`,
    pretrained ones too; the shape, tokenizer and chat template of the config stay.
    """
    try:
        found, theirs = find_model_and_text(path)
        notes = origin_.check(found, theirs.shape, mine.shape)
        if theirs.tokenizer is not None:
            text.check_same(theirs.tokenizer, mine.tokenizer)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"config.init_from got {path!r}: {error}") from None
    say(f"init_from: {notes}")
    return functools.partial(origin_.load, found, theirs.shape, mine.shape)


def find_model_and_text(path: str, step: int | None = None) -> tuple[origin_.Origin, ModelAndText]:
    """Find params (see `warm_start.Origin`), their model and their text."""
    found = origin_.find(path, step)
    if found.step is not None:
        with hub.noting(found.config.get("revisions")):
            return found, read_model_and_text(found.config["model"], found.config["text"])
    tokenizer = text.load(found.folder) if (found.folder / "tokenizer.json").is_file() else None
    return found, ModelAndText(found.folder, tokenizer, None, model_config.read_hf(found.folder), None)


MOST_LAYERS = 10_000  # at most, since each layer is traced


def check_size(shape: model_config.ModelConfig, devices) -> None:
    """Check that the devices' memory can hold the params.

    Raises:
      ValueError: it can't, or there are too many layers or token ids.
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
            f"layers {shape.layers}, vocab_size {shape.vocab_size}) and there are {there / 1e9:.0f} GB; allowed: params "
            "that fit; set a smaller width, or use more devices"
        )


def memory_of(devices) -> int | None:
    """Return the total memory of all devices in bytes; None if unknown.

    For CPUs it is the memory of their hosts.
    """
    if devices.flat[0].platform == "cpu":
        pages = {name: os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE") if name in os.sysconf_names}
        return len({d.process_index for d in devices.flat}) * math.prod(pages.values()) if len(pages) == 2 else None
    stats = jax.local_devices()[0].memory_stats() or {}
    return devices.size * stats["bytes_limit"] if "bytes_limit" in stats else None


def init_params(model, load: Callable | None, seed: int, mesh):
    """Make or load the params of a run, each leaf directly on its devices.

    `load(placed, fresh)` returns params with the shardings `placed`; `fresh(*names)`
    makes the params that the checkpoint lacks.
    """
    key = jax.random.fold_in(jax.random.key(seed), INITIALISATION)
    placed = sharding.shardings(jax.eval_shape(model.init, key), mesh)

    def fresh(*names):
        wanted = {name: placed[name] for name in names}
        return jax.jit(lambda key: {name: model.init(key)[name] for name in names}, out_shardings=wanted)(key) if names else {}

    return fresh(*placed) if load is None else load(placed, fresh)


INITIALISATION = 2**31 + 1  # folded into the seed's key for random weights; training folds in the index of the phase


def make_text(
    *,
    folder: Path | None,
    tokenizer: str = "characters",  # characters, byte_level, or pretrained: the model's own
    format: str = "plain",  # plain, or chat: the model's chat template
    alphabet: str = ALPHABET,  # characters of the tokenizer `characters`
    system: str = "",  # system message of a chat
    instruction: str = "{question}",  # text of the prompt; {question} stands for the question
    eos: Sequence[str | int] = (),  # further tokens that end a completion, as texts or ids
    template: dict | None = None,  # arguments of the chat template, such as {"enable_thinking": False}
    date: str | None = None,  # today's date in the chat template, YYYY-MM-DD; None: the day on which the run began
    tools: Sequence[dict] = (),
    described: str = "",
) -> tuple[text.Tokenizer, text.Format]:
    """Make the tokenizer and the format that turns tasks into prompts.

    `tools` and `described` are those of `text.chat`; the plain format has none.
    """
    if tokenizer == "pretrained":
        if folder is None:
            raise ValueError("text.tokenizer is 'pretrained' but model.weights is 'random'; choose characters or byte_level")
        made = text.load(folder)
    else:
        made = text.make(tokenizer, **({"alphabet": alphabet} if tokenizer == "characters" else {}))
    made = text.with_eos(made, eos)
    if format not in text.FORMATS:
        raise ValueError(unknown_name_message("format", format, text.FORMATS))
    today = to_date(date)
    if format == "plain":
        if system or template or date is not None:
            field = "system" if system else "template" if template else "date"
            raise ValueError(f"text.format is 'plain', which reads no text.{field}; choose chat, or put it into text.instruction")
        return made, text.plain(made, instruction)
    if folder is None:
        raise ValueError("text.format is 'chat' but model.weights is 'random', so there is no chat template; choose plain")
    source, path = text.load_template(folder), text.template_path(folder)
    keywords = {"system": system, "instruction": instruction, "arguments": template or {}, "tools": tools, "described": described}
    return made, text.chat(made, source, **keywords, date=today, path=path)


def reword(
    section: dict, folder: Path | None, *, instruction: str | None = None, tools: Sequence[dict] = (), described: str = ""
) -> text.Format:
    """Make the format of a `text` section with another instruction, or with tools: see
    `text.chat`.
    """
    section = section if instruction is None else section | {"instruction": instruction}
    return call_with_section(make_text, section, "config.text", folder=folder, tools=tools, described=described)[1]


def to_date(date: str | None) -> datetime.date | None:
    try:
        return None if date is None else datetime.date.fromisoformat(date)
    except (TypeError, ValueError):
        raise ValueError(f"text.date got {date!r}; allowed: YYYY-MM-DD, or None for the day on which the run began") from None
