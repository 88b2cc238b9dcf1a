"""The gate: checks of the configs, options and fields that a client may run. All else
is refused.

A client names a config or an experiment of this repository, options that the file
offers, and values of fields. A value is a number, true, false, None or a list of these,
of the field's type; a text is allowed only if it is one of `choices` or the config's
own value of this field. So no text of a client can name a file, a module, a host or
a model. Some fields are closed whatever the value: the judge of answers, the
environment and its limits, evaluation on training questions, the watts that joules are
estimated from, devices, checkpoints, and where a run begins.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxreason.options import OFFERED, command, lines_of, unknown_name_message

FOLDERS = ("configs", "experiments")
DTYPES = ("float32", "bfloat16")
MOST_VARIANTS = 32  # combinations of names in a grid: each is a config that is read
MOST_ITEMS = 64  # of a list
MOST_RUNS = 200  # of a sweep
MOST = {"log.rollouts_kept": 256}  # per step: rollouts are kept on the disk, which no budget counts
PLAIN = re.compile(r"[\w.+-]+")  # texts that need no quotes in a grid
FIELD = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


class Setting(NamedTuple):
    """A field of a config, and how a client may set it."""

    type: Any
    value: Any  # the config's own
    default: Any
    help: str
    choices: tuple[str, ...]  # texts that are allowed besides the own one
    closed: str  # why it can't be set; "" if it can


class Request(NamedTuple):
    """A sweep that was let through: the words of `jaxreason.sweep`, and its name."""

    words: list[str]
    name: str
    watts: float | None  # of the config: joules can be estimated


def catalogue(root: Path) -> dict[str, dict[str, Path]]:
    """Return the configs and experiments of the repository: folder -> name -> file.
    Links are left out.
    """
    found: dict[str, dict[str, Path]] = {}
    for folder in FOLDERS:
        files = sorted((root / folder).glob("*.py"))
        found[folder] = {path.stem: path for path in files if path.is_file() and not path.is_symlink()}
    return found


def find(root: Path, folder: str, name: str) -> str:
    """Return the path of a config or experiment within the repository, from its name or
    that path.

    Raises:
      ValueError: the repository has none of this name.
    """
    known = catalogue(root)[folder]
    stem = name.removeprefix(f"{folder}/").removesuffix(".py")
    if stem not in known:
        bare, colon, own = stem.partition(":")
        if colon and (bare := bare.removesuffix(".py")) in known:
            what = folder.removesuffix("s")
            raise ValueError(f"{what} got {short(name)}; allowed: {bare!r}, with its options {short(own)} in `options`")
        raise ValueError(unknown_name_message(folder.removesuffix("s"), name[:100], known))
    return f"{folder}/{stem}.py"


# --- options of a file ---


def offered(root: Path, path: str) -> dict[str, tuple[Any, tuple | None]]:
    """Return the options of a config or experiment: name -> its default and choices."""
    if path.startswith("configs/"):
        command.load(str(root / path))
    else:
        OFFERED.clear()
        run_experiment(root, path, "")
    return {name: (default, None if choices is None else tuple(choices)) for name, (default, choices) in OFFERED.items()}


def run_experiment(root: Path, path: str, options: str) -> Any:
    """Return the Sweep of an experiment's file, which is the user's own code."""
    with lines_of(path):
        sweep = runpy.run_path(str(root / path)).get("sweep")
        if sweep is None:
            raise ValueError(f"{path} has no function sweep(arg='') that returns a Sweep")
        return sweep(options)


def with_options(root: Path, path: str, options: Mapping[str, Any]) -> str:
    """Return FILE:OPTIONS.

    Raises:
      ValueError: an option that the file does not offer, or a value that is no choice.
    """
    from jaxreason.options.fields import fits

    known, words = offered(root, path), []
    for name, value in options.items():
        if name not in known:
            raise ValueError(unknown_name_message(f"option of {path}", name[:100], known))
        default, choices = known[name]
        if choices is not None:
            good = isinstance(value, str | int | float) and value in choices
        elif isinstance(default, str):
            good = isinstance(value, str) and value == default
        else:
            good = fits(value, type(default)) and not is_below_0(value)
        if not good:
            allowed = choices if choices is not None else (default,) if isinstance(default, str) else type(default).__name__
            raise ValueError(f"option {name} of {path} got {short(value)}; allowed: {allowed}")
        words.append(f"{name}={value}")
    return path + (f":{','.join(words)}" if words else "")


# --- fields ---


def choices() -> dict[str, tuple[str, ...]]:
    """Return the texts that a client may set: pattern of a field -> choices. They name
    functions of this package that compute, and neither read nor write anything.
    """
    from jaxreason import objectives, optimizer
    from jaxreason.build.teacher import NAMES
    from jaxreason.objectives import corrections, credit, distillation, divergence, losses, selection, wrappers
    from jaxreason.sources import hints, rewards

    return {
        r"\w+\.objective\.name": tuple(objectives.OBJECTIVES),
        r"\w+\.objective\.advantage": tuple(objectives.ADVANTAGES),
        r"\w+\.objective\.weigh": tuple(objectives.WEIGHTINGS),
        r"\w+\.objective\.kl_estimator": tuple(objectives.KL_ESTIMATORS),
        r"\w+\.objective\.kl_in": wrappers.KL_IN,
        r"\w+\.objective\.cut": objectives.CUT,
        r"\w+\.objective\.correct": corrections.LEVELS,
        r"\w+\.objective\.correct_by": corrections.HOWS,
        r"\w+\.objective\.covariance": selection.COVARIANCES,
        r"\w+\.objective\.divergence": (*divergence.KINDS, *losses.DIVERGENCES),
        r"\w+\.objective\.over": distillation.OVER,
        r"\w+\.optimizer\.name": tuple(optimizer.OPTIMIZERS),
        r"\w+\.optimizer\.schedule_kind": optimizer.SCHEDULES,
        r"\w+\.optimizer\.state_dtype": DTYPES,
        r"\w+\.optimizer\.muon_scale": ("rms", "width"),
        r"\w+\.source\.reward": rewards.REWARDS,
        r"\w+\.source\.credit": credit.CREDITS,
        r"\w+\.source\.hint": hints.KINDS,
        r"\w+\.reference": NAMES,
        r"\w+\.source\.task\.demonstrations": ("none", "human", "verified", "expert"),
        r"model\.(param_|head_)?dtype": DTYPES,
        r"model\.remat": ("none", "full", "dots"),
        r"model\.attention": ("xla", "cudnn", "splash"),
        r"sampler\.cache_dtype": (*DTYPES, "int8"),
        r"log\.tracker": ("none",),
    }


def why_closed(path: str, phases: Sequence[str]) -> str:
    """Return why a field can't be set by a client; "" if it can."""
    first, _, rest = path.partition(".")
    if re.search(r"(^|\.)(verifier|environment)(\.|$)", path):
        return "it decides how answers are judged, and what a model's own calls may do"
    if path == "evaluate.allow_overlap":
        return "it decides what counts as held out"
    if path == "seed":
        return "seeds are set by `seeds`"
    if path == "phases" or (first in ("model", "sampler", "evaluate", *phases) and rest):
        return ""
    return "" if path in ("log.rollouts_kept", "log.tracker", "log.report") else "it is the user's own"


def settings(config: str, changes: Mapping[str, str]) -> tuple[dict[str, Setting], dict]:
    """Return the fields of a config with some of them changed: name -> Setting, and the
    config.

    Raises:
      ValueError: it is no config.
    """
    from jaxreason import build
    from jaxreason.options import fields

    tree = command.read(config, dict(changes), lambda line: None).to_dict()
    phases = [name for name, value in tree.items() if build.is_phase(name, value)]
    named, found = choices(), {}
    for where, section, values in fields.sections_of(build.layout(tree), tree):
        for name, field in fields.fields_of(section).items():
            path = f"{where}.{name}".removeprefix("config.")
            if name in section.sections or isinstance(values.get(name), Mapping):
                continue
            texts = tuple(phases) if path == "phases" else next((t for p, t in named.items() if re.fullmatch(p, path)), ())
            default = None if field.default is fields.NEEDED else field.default
            own = (field.type, values.get(name), default, field.help)
            found[path] = Setting(*own, texts, why_closed(path, phases))
    return found, tree


def word(path: str, value: Any, setting: Setting) -> str:
    """Write a value of a client as a word of a command.

    Raises:
      ValueError: a value that is not allowed in this field.
    """
    from jaxreason.options.fields import fits, members, shown

    if setting.closed:
        raise ValueError(f"field {path} can't be set here: {setting.closed}")
    if isinstance(value, Mapping):
        raise ValueError(f"field {path} got a section; allowed: a number, true, false, null, or a list; set the fields inside it")
    items = value if isinstance(value, list) else [value]
    own = setting.value if isinstance(setting.value, list | tuple) else (setting.value,)
    texts = {*setting.choices, *(text for text in own if isinstance(text, str))}
    if len(items) > MOST_ITEMS:
        raise ValueError(f"field {path} got a list of {len(items)}; allowed: up to {MOST_ITEMS} items")
    for item in items:
        if isinstance(item, str) and item not in texts:
            if not texts and str not in members(setting.type):
                raise ValueError(f"field {path} got the text {short(item)}; allowed: {shown(setting.type)}")
            raise ValueError(
                f"field {path} got the text {short(item)}; allowed: {', '.join(map(repr, sorted(texts))) or 'no text'}: "
                "a client may not name files, modules, models or hosts"
            )
        if not isinstance(item, str | bool | int | float) and item is not None:
            raise ValueError(f"field {path} got {short(item)}; allowed: numbers, true, false, null and known names")
        if is_below_0(item):
            raise ValueError(f"field {path} got {short(item)}; allowed: whole numbers from 0")
    value = tuple(value) if isinstance(value, list) else value
    if value is None and setting.value is not None and str in members(setting.type) and not setting.choices:
        raise ValueError(f"field {path} got null; allowed: its own text {short(setting.value)}")
    kinds = [kind for kind in members(setting.type) if kind is not Any]
    if not any(fits(value, kind) for kind in kinds):
        raise ValueError(f"field {path} got {short(value)}; allowed: {shown(setting.type)}")
    if isinstance(value, int | float) and value > MOST.get(path, math.inf):
        raise ValueError(f"field {path} got {value}; allowed: up to {MOST[path]}")
    return value if isinstance(value, str) else repr(value)


def is_below_0(value: Any) -> bool:
    """Tell whether a whole number would lower the bound of FLOPs by formula."""
    return isinstance(value, int) and value < 0


def short(value: Any) -> str:
    try:
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**18 else "a very large number"
    except (ValueError, RecursionError):  # Python writes no number of more than 4300 digits
        text = "a value with a very large number in it, or a very deep one"
    return text if len(text) <= 80 else f"{text[:77]}..."


def checked(
    config: str, common: Mapping[str, str], fields: Mapping[str, Any], grid: Mapping[str, list]
) -> tuple[dict, dict, dict]:
    """Check the values of a client against the fields of a config. Return the words of
    `fields`, those of `grid`, and the config.

    A name decides which fields its section has, so names are checked first, and the
    fields of every combination of names are known.
    """
    for path in (*fields, *grid):
        if not FIELD.fullmatch(path) or len(path) > 200:
            raise ValueError(f"got the field {short(path)}; allowed: a name such as rl.optimizer.lr")
    if twice := fields.keys() & grid.keys():
        raise ValueError(f"{min(twice)} is in `fields` and in `grid`; allowed: one of them")
    known, tree = settings(config, common)
    lists = {path: [value] for path, value in fields.items()} | dict(grid)
    names = {path: [word(path, value, get(known, path)) for value in values] for path, values in lists.items() if is_name(path)}
    if math.prod(map(len, names.values())) > MOST_VARIANTS:
        raise ValueError(f"the grid has more than {MOST_VARIANTS} combinations of names; ask for fewer")
    for chosen in itertools.product(*names.values()) if names else ():
        more, _ = settings(config, {**common, **dict(zip(names, chosen, strict=True))})
        known = more | known
    made = {path: [word(path, value, get(known, path)) for value in values] for path, values in lists.items()}
    return {path: made[path][0] for path in fields}, {path: made[path] for path in grid}, tree


def is_name(path: str) -> bool:
    return path.endswith(".name")


def get(known: Mapping[str, Setting], path: str) -> Setting:
    if path not in known:
        last = [name for name in known if name.rpartition(".")[2] == path.rpartition(".")[2] and not path.startswith("config.")]
        near = last[:1] if len(last) == 1 else difflib.get_close_matches(path, known, n=1) or last[:1]
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"unknown field {short(path)}{hint}; describe_fields lists them, sections are set by the fields inside")
    return known[path]


# --- a sweep ---


def request(
    root: Path,
    *,
    config: str | None,
    experiment: str | None,
    options: Mapping[str, Any],
    fields: Mapping[str, Any],
    grid: Mapping[str, list],
    seeds: int,
) -> Request:
    """Turn the request of a client into the words of `jaxreason.sweep`.

    Raises:
      ValueError: anything that is not allowed, or neither a config nor an experiment.
    """
    if (config is None) == (experiment is None):
        raise ValueError("needed: either `config` or `experiment`; list_experiments names them")
    if isinstance(seeds, bool) or not isinstance(seeds, int) or not 1 <= seeds <= 100:
        raise ValueError(f"seeds got {short(seeds)}; allowed: 1 to 100, the number of seeds")
    if experiment is not None:
        if grid:
            raise ValueError("got `grid` with `experiment`, which has arms of its own; allowed: with `config`")
        file = with_options(root, find(root, "experiments", experiment), options)
        path, _, arguments = file.partition(":")
        sweep = run_experiment(root, path, arguments)
        base, _, base_options = sweep.config.partition(":")
        base = find(root, "configs", base) + (f":{base_options}" if base_options else "")
        common = {field: value if isinstance(value, str) else repr(value) for field, value in sweep.common.items()}
        set_, _, tree = checked(str(root / base), common, fields, {})
        words = [f"--experiment={file}"]
    else:
        for path, values in grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"grid field {short(path)} got {short(values)}; allowed: a list of values")
        check_runs(seeds * math.prod(map(len, grid.values())))
        file = with_options(root, find(root, "configs", config), options)
        set_, arms, tree = checked(str(root / file), {}, fields, grid)
        words = [f"--config={file}", f"--grid={grid_text(arms, seeds)}"]
    words += [f"--config.{path}={value}" for path, value in set_.items()]
    words += [f"--seeds={seeds}"] if experiment is not None else []
    return Request(words, Path(file.partition(":")[0]).stem, tree["log"].get("watts"))


def check_runs(count: int) -> None:
    if count > MOST_RUNS:
        raise ValueError(f"the sweep has {short(count)} runs; allowed: {MOST_RUNS}; ask for fewer values or seeds")


def grid_text(arms: Mapping[str, Sequence[str]], seeds: int) -> str:
    """Write arms and seeds as `--grid`.

    Raises:
      ValueError: a text that would need quotes.
    """
    for path, values in arms.items():
        for value in values:
            if not PLAIN.fullmatch(value) and not re.fullmatch(r"\([\w.,+' -]*\)", value):
                raise ValueError(
                    f"grid.{path} got {short(value)}; allowed: numbers, names and lists of them; or set it in `fields`"
                )
            if ".." in value:
                raise ValueError(f"grid.{path} got {short(value)}; allowed: values without two dots")
    parts = [f"{path}={','.join(values)}" for path, values in arms.items()]
    return "; ".join([*parts, f"seed=0..{seeds - 1}"])
