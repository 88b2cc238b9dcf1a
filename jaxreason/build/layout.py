"""The fields of a config: the function of each section, and the meaning of fields in
earlier versions.

A section is the keyword arguments of one function, so a field that nothing reads can't
exist.
"""

from __future__ import annotations

import copy
import fnmatch
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxreason import objectives as objectives_
from jaxreason import optimizer as optimizer_
from jaxreason import sharding, sources, tasks, text, tools, verify
from jaxreason.build import environments
from jaxreason.build.environments import SECTIONS as ENVIRONMENTS
from jaxreason.build.evaluation import attempted, held_out_text, make_evaluate, make_log
from jaxreason.build.model import make_model, make_text
from jaxreason.build.phases import SOURCES, make_phase, make_source
from jaxreason.build.sampler import make_completer
from jaxreason.build.tasks import held_out_sections, make_judge, named, shares_files, trained_sections
from jaxreason.model import ModelConfig
from jaxreason.model import config as model_config
from jaxreason.options import fields, unknown_name_message
from jaxreason.runtime import trackers
from jaxreason.runtime.checkpoint import open_checkpoints
from jaxreason.tools.calls import DIALECTS

SECTIONS = ("seed", "model", "text", "sampler", "verifier", "phases", "evaluate", "sharding", "checkpoint", "log")


OPTIONAL = ("init_from", "version", "environment")


# Increased when the meaning of a field, or of its absence, changes: see `CHANGED`.
VERSION = 2


def settle(config: dict) -> dict:
    """Check the fields of a config and set the split of every task read from files.

    A file that a source and a suite (or text) both name is split: the source gets
    train, the suite test. A file that only one of them names is read whole. The run
    records the result, so adding a suite on resume can't change the training data.

    Raises:
      ValueError: a missing, unknown or mistyped field.
    """
    check_fields(config)
    config = copy.deepcopy(config)
    trained, held_out = trained_sections(config), held_out_sections(**config["evaluate"])
    if not config["evaluate"].get("allow_overlap"):
        check_questions(trained, held_out)
    for sections, others, part in ((trained, held_out, "train"), (held_out, trained, "test")):
        for section in filter(tasks.splits_files, sections):
            section.setdefault("split", part if shares_files(section, others) else None)
    return config


def check_questions(trained: Sequence[dict], held_out: Sequence[dict]) -> None:
    """Raise ValueError if suite and source read different question fields of one file.

    Such a file can't be split, because the split is by question.
    """
    for suite in held_out:
        for source in trained:
            there, here = (section.get("question", "question") for section in (source, suite))
            if there != here and shares_files(suite, [source]):
                raise ValueError(
                    f"a source reads the field {there!r} of {source['path']} as its question and a suite {here!r}; allowed: one "
                    "field in both, as the file is split by it, a file each, or config.evaluate.allow_overlap=True to insist"
                )


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
            raise ValueError(unknown_name_message("phase", name, set(config) - {*SECTIONS, *OPTIONAL}))
    for key in set(config) - {*SECTIONS, *OPTIONAL, *phase_names}:
        # A phase may be defined but not run (this is how to leave a phase out). Nothing
        # reads any other field.
        if not isinstance(config[key], dict) or "source" not in config[key]:
            raise ValueError(unknown_name_message("field of the config", key, {*SECTIONS, *OPTIONAL, *phase_names}))
    for name in phase_names:
        if not is_phase(name, config[name]):
            raise ValueError(f"config.{name} needs source=..., as each of config.phases; got {config[name]!r}")
    fields.check(layout(config), config)
    suites, best = config["evaluate"].get("suites", {}), config["checkpoint"].get("keep_best")
    if best is not None and best not in suites:
        raise ValueError(unknown_name_message("suite in config.checkpoint.keep_best", best, suites))
    if config["seed"] < 0:
        raise ValueError(f"config.seed got {config['seed']}; allowed: 0 or more")
    if config.get("version", VERSION) != VERSION:
        raise ValueError(f"config.version got {config['version']}; allowed: {VERSION}, that of this jaxreason")


class Config(NamedTuple):
    """Top-level fields of a config; the sections of its phases are beside them."""

    seed: int  # seed of weights, data and samples
    model: dict  # shape, weights, dtypes and kernels
    text: dict  # tokenizer and prompt format
    sampler: dict  # sampling of attempts
    verifier: dict  # judge of answers
    phases: Sequence[str]  # names of the sections to run, in this order
    evaluate: dict  # held-out tasks and texts
    sharding: dict  # meshes of devices
    checkpoint: dict  # when to save, and which checkpoints to keep
    log: dict  # logs to write and show
    environment: dict | None = None  # tools, further attempts; None: the model writes once and is judged
    init_from: str | None = None  # start from the params of a run, of RUN/checkpoints/STEP or of a Hugging Face folder
    version: int = VERSION  # version of the fields' meaning, recorded in config.json


def layout(config: dict) -> fields.Section:
    """Map each section of a config to the function whose keyword arguments it is.

    An unknown name adds no fields.

    Raises:
      ValueError: a name of user code that does not load.
    """
    phases = {name: section_of_phase for name, value in config.items() if is_phase(name, value)}
    return fields.Section(
        (Config,),
        sections=phases
        | {
            "model": section_of_model,
            "text": section(make_text, "folder", "tools", "described"),
            "sampler": section(make_completer, "model", "tokenizer", "format", "mesh", "processes"),
            "verifier": section_of_verifier,
            "environment": section_of_environment,
            "evaluate": section(make_evaluate, "parts", suites=each(section_of_suite), texts=each(section_of_text)),
            "sharding": section(sharding.make_meshes, "devices", "process", mesh=section(sharding.make_mesh, "devices")),
            "checkpoint": section(open_checkpoints, "folder", "read_only", "before_save"),
            "log": section(make_log),
        },
    )


def is_phase(name: str, value) -> bool:
    return isinstance(value, dict) and "source" in value and name not in (*SECTIONS, *OPTIONAL)


def section(function: Callable, *given: str, **below) -> Callable[[dict], fields.Section]:
    """Describe a section that is the keyword arguments of one function.

    The caller supplies the arguments in `given`; `below` are sections inside this one.
    """
    return lambda values: fields.Section((function,), given, below)


def each(below: Callable[[dict], fields.Section]) -> Callable[[dict], fields.Section]:
    """Describe a section of sections that the user names."""
    return lambda values: fields.Section(each=below)


# Fields that the named model or its checkpoint decides if they are absent.
OF_THE_MODEL = (
    *("vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "feed_forward", "rope_theta", "rope_scaling"),
    *("norm_eps", "qkv_bias", "qk_norm", "tied_embeddings"),
)


def section_of_model(values: dict) -> fields.Section:
    below = {"lora": section(model_config.Lora), "rope_scaling": section(model_config.RopeScaling)}
    decided = dict.fromkeys(OF_THE_MODEL, "of the model")
    return fields.Section((make_model, ModelConfig), ("folder", "tokenizer"), below, decided, replaces=OF_THE_MODEL)


def section_of_verifier(values: dict) -> fields.Section:
    return fields.Section((make_judge, *named("verifier", verify.VERIFIERS, values)), sections={"of": section_of_part})


def section_of_part(values: dict) -> fields.Section:
    """Describe a verifier inside another one: the environment's fields are outside."""
    return fields.Section((verify.make, *named("verifier", verify.VERIFIERS, values)), sections={"of": section_of_part})


def section_of_environment(values: dict) -> fields.Section:
    makers = named("environment", ENVIRONMENTS, values) or (environments.single_turn,)
    if ":" in str(values.get("name")):
        return fields.Section((environments.single_turn, *makers), ("environment",))
    return fields.Section(makers, ("judged", "parts", "words"), {"inside": section_of_environment})


def section_of_task(values: dict, more: tuple[Callable, ...] = ()) -> fields.Section:
    below: dict = {"verifier": section_of_verifier, "environment": section_of_environment} if more else {}
    below["of"] = section_of_twins
    decided = {
        "seed": "that of the run",
        "split": "train in a source, test in a suite; a file that only one of them names is read whole",
    } | ({"size": "as many as n"} if more else {})
    return fields.Section((tasks.load, *named("task", tasks.TASKS, values), *more), sections=below, decided=decided)


def section_of_twins(values: dict) -> fields.Section:
    """Describe the task of which `twins` makes pairs."""
    return fields.Section((tasks.load, *named("task", tasks.TASKS, values)), given=("split", "size", "seed"))


def section_of_suite(values: dict) -> fields.Section:
    return section_of_task(values, (attempted,))


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
    given, below = ("parts", "objective", "microbatches", "steps"), {"task": section_of_task, "curriculum": section_of_curriculum}
    below["of"] = each(section_of_part_of_mix)
    makers = named("source", SOURCES, values)
    if SOURCES["kept_rollouts"] in makers:  # which passes the rest on
        makers, given = (
            (*makers, SOURCES["rollouts"]),
            (*given, "replay", "replay_age", "dynamic_sampling", "rollouts_per_prompt"),
        )
    return fields.Section((make_source, *makers), (*given, "keep"), below)


def section_of_part_of_mix(values: dict) -> fields.Section:
    of_source = section_of_source(values)
    return of_source._replace(sections={**of_source.sections, "objective": section_of_objective})


def section_of_curriculum(values: dict) -> fields.Section:
    return fields.Section((sources.make_curriculum, *named("curriculum", sources.CURRICULA, values)), ("epoch",))


def section_of_objective(values: dict) -> fields.Section:
    makers = (objectives_.make, *named("objective", objectives_.OBJECTIVES, values))
    return fields.Section(makers, replaces=("advantage", "weigh"))


def families() -> dict[str, dict[str, str]]:
    """List the names that a config can use, by family, each with its description."""
    makers = {
        "tasks": tasks.TASKS,
        "verifiers": verify.VERIFIERS,
        "objectives": objectives_.OBJECTIVES,
        "advantages": objectives_.ADVANTAGES,
        "weightings": objectives_.WEIGHTINGS,
        "kl_estimators": objectives_.KL_ESTIMATORS,
        "sources": SOURCES,
        "curricula": sources.CURRICULA,
        "environments": ENVIRONMENTS,
        "tools": tools.TOOLS,
        "dialects": DIALECTS,
        "tokenizers": text.TOKENIZERS,
        "formats": text.FORMATS,
    }
    found = {family: {name: first_sentence(maker) for name, maker in members.items()} for family, members in makers.items()}
    found["models"] = {name: model_config.HUB_IDS.get(name, "random weights") for name in model_config.SIZES}
    return found | {"optimizers": optimizer_.OPTIMIZERS}


def first_sentence(function: Callable) -> str:
    """Return the first sentence of a docstring, in one line."""
    paragraph = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=[^.]{2})\.(?: (?=[A-Z`])|$)", paragraph)[0]


def complete(config: dict) -> dict:
    """Add all fields that a config leaves out, with their defaults.

    Fields whose default another part decides stay absent.
    """
    return fields.complete(layout(config), config)


class Changed(NamedTuple):
    """A field whose absence, or None, had another meaning before version `since`."""

    since: int
    field: str  # pattern of the field's full name
    names: tuple[str, ...]  # members of the family that changed
    was: object


CHANGED = (
    Changed(1, "config.*.objective.weigh", ("rloo", "reinforce"), "per_sequence"),
    Changed(1, "config.*.source.task.split", ("jsonl",), None),
    Changed(1, "config.*.source.task.split", ("corpus",), "train"),
    Changed(1, "config.evaluate.suites.*.split", ("jsonl",), "test"),
    Changed(1, "config.evaluate.texts.*.task.split", ("corpus", "jsonl"), "test"),
)


def from_earlier(config: dict) -> tuple[dict, list[str]]:
    """Convert the config.json of a run to this version.

    Also return the fields that it lacked. A field whose default has changed since gets
    its default of that time.

    Raises:
      ValueError: a field that this version does not have, or that has been renamed.
    """
    config = {name: value for name, value in config.items() if name != "revisions"}  # the commits of the hub that it read
    config = with_asked_correction(with_named_kl(with_one_tracker(config)))
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


def with_one_tracker(config: dict) -> dict:
    """Convert the fields that earlier versions had for each tracker."""
    log = config.get("log")
    if not isinstance(log, dict) or not (had := {name: log[name] for name in trackers.NAMES if name in log}):
        return config
    used = [name for name, value in {"tensorboard": True, **had}.items() if value not in (None, False)]
    kept = {name: value for name, value in log.items() if name not in had}
    return config | {"log": {"tracker": ",".join(used), **kept}}


def with_named_kl(config: dict) -> dict:
    """Convert the name of a KL estimator that earlier versions called k3."""

    config = dict(config)
    for name, section in config.items():
        objective = section.get("objective") if isinstance(section, dict) else None
        if isinstance(objective, dict) and objective.get("kl_estimator") == "k3":
            config[name] = section | {"objective": objective | {"kl_estimator": "k3_reverse"}}
    return config


def with_asked_correction(config: dict) -> dict:
    """Convert `correct` of objectives as versions 0 and 1 understood it: without the
    field nothing was corrected.

    In an objective that has a ratio or imitates, None means the same today.
    """
    config = dict(config)
    version = config.get("version", 0)
    for name, section in config.items() if isinstance(version, int) and version < 2 else ():
        objective = section.get("objective") if isinstance(section, dict) else None
        if isinstance(objective, dict) and objective.get("correct", "none") == "none":
            config[name] = section | {"objective": objective | {"correct": "none" if scores_rollouts(objective) else None}}
    return config


def scores_rollouts(objective: dict) -> bool:
    """Return whether an objective scores rollouts without an importance ratio, so that
    `correct` None is `token`. A user's own is taken for one.
    """
    maker = objectives_.OBJECTIVES.get(objective.get("name"))
    return maker is None or maker().on_policy


# Fields of an objective that nothing reads while another has a value.
READ_WITH = (
    *((name, "kl_coefficient", (0,)) for name in ("kl_estimator", "kl_in", "kl_target")),
    ("kl_estimator", "kl_in", ("reward",)),
    ("kl_gain", "kl_target", (None,)),
    *((name, "entropy_target", (None,)) for name in ("entropy_delta", "entropy_highest")),
    *((name, "correct", ("none",)) for name in ("correct_by", "correct_low", "correct_high")),
    ("covariance_fraction", "covariance", ("none",)),
    *((name, "covariance", ("none", "kl")) for name in ("covariance_low", "covariance_high")),
    ("covariance_coefficient", "covariance", ("none", "clip")),
)


def check_changes(config: dict, changes: Mapping[str, str]) -> None:
    """Check that the optimizer and objective fields that a command sets are read.

    Raises:
      ValueError: one is not; a sweep over it would vary nothing.
    """
    for phase, values in config.items():
        objective = values.get("objective") if is_phase(phase, values) else None
        for name, other, off in READ_WITH if isinstance(objective, dict) else ():
            value = objective.get(other)
            if other == "correct" and value is None and not scores_rollouts(objective):
                value = "none"
            if f"{phase}.objective.{name}" in changes and value in off:
                got = f"config.{phase}.objective.{name} got {objective[name]!r}"
                raise ValueError(f"{got}, but {other} is {off[off.index(value)]}, so nothing reads it; set both")
        section = values.get("optimizer") if is_phase(phase, values) else None
        for field, (why, default) in optimizer_.ignored(section).items() if isinstance(section, dict) else ():
            where = f"{phase}.optimizer.{field}"
            if where in changes:
                raise ValueError(f"config.{where} got {section[field]!r}, but {why}; else --config.{where}={default}")
