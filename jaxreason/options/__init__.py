"""Checks of names and numbers that a user gives: options of a config file, fields of a
section, names in a family, JSON files.

Options follow the colon in `--config=configs/tiny.py:task=countdown,smoke`. A name that
contains a colon refers to the user's own code: `my_rewards:brevity` is the function
`brevity` of the module `my_rewards`.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import importlib
import inspect
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Renamed fields: `"config.*.source.old": "new"`, or `"new=value"` where a value of the
# new field replaces the old one. Old names are refused, in configs and in run folders.
RENAMED: dict[str, str] = {
    "config.*.objective.clip": "clip_low and clip_high",
    "config.*.objective.lo": "clip_low",
    "config.*.objective.hi": "clip_high",
    "config.*.optimizer.final_share": "final_fraction",
    "config.*.optimizer.warmup_share": "warmup_fraction",
    "config.*.source.share_prompts": "rollouts_per_prompt",
    "config.sampler.untempered_logp": "logp_temperature_1",
    "config.log.tensorboard": "tracker=tensorboard, or tracker=none for no tracker",
    "config.log.wandb": "tracker=wandb",
    "config.log.trackio": "tracker=trackio",
}


def unknown_name_message(what: str, got: str, allowed: Iterable[str]) -> str:
    """Say that `got` is not one of `allowed`, and suggest the nearest name if one is
    close.
    """
    allowed = sorted(map(str, allowed))
    by_lower = {name.lower(): name for name in allowed}
    near = difflib.get_close_matches(str(got).lower(), by_lower, n=1)
    hint = f" (did you mean {by_lower[near[0]]!r}?)" if near else ""
    return f"unknown {what} {got!r}{hint}; one of: {', '.join(allowed) or 'none'}"


def new_name(where: str, name: str) -> str:
    """Return the new name of a renamed field, or "" if it was not renamed."""
    return next((new for old, new in RENAMED.items() if fnmatch.fnmatchcase(f"{where}.{name}", old)), "")


def renamed(where: str, name: str) -> str:
    """Say that a field was renamed; "" if it was not."""
    if not (new := new_name(where, name)):
        return ""
    if "=" in new:
        return f"field {name!r} of {where} is gone; write {where}.{new}"
    written = " and ".join(f"{where}.{field}" for field in new.split(" and "))
    return f"field {name!r} of {where} is called {new!r} now; write {written}"


def parse(arg: str, *, choices: dict[str, Iterable[Any]] | None = None, **defaults) -> SimpleNamespace:
    """Parse `"size=small,smoke"` into a namespace that has each of `defaults`, cast to
    the type of its default.

    A bare name sets an option whose default is False. `choices` limits the values of an
    option.

    Raises:
      ValueError: an unknown option, a value of the wrong type, or a value not among
        the choices.
    """
    if not OFFERED:
        OFFERED.update({name: (default, (choices or {}).get(name)) for name, default in defaults.items()})
    values = dict(defaults)
    for part in filter(None, (p.strip() for p in (arg or "").split(","))):
        name, given, text = part.partition("=")
        if name not in defaults:
            raise ValueError(unknown_name_message("config option", name, defaults))
        default = defaults[name]
        if isinstance(default, bool):
            if given and text.lower() not in ("true", "false", "1", "0"):
                raise ValueError(f"config option {name} got {text!r}; allowed: true, false, or the bare name {name}")
            values[name] = not given or text.lower() in ("true", "1")
            continue
        if not given:
            raise ValueError(f"config option {name} needs a value: {name}=...")
        try:
            values[name] = type(default)(text)
        except ValueError:
            raise ValueError(f"config option {name} got {text!r}; allowed: {type(default).__name__}") from None
        if choices and name in choices and values[name] not in choices[name]:
            raise ValueError(unknown_name_message(f"value of config option {name}", text, choices[name]))
    return SimpleNamespace(**values)


# Options of the first call of `parse` since this was cleared, with their defaults and
# choices: those of a config file, not those of a file that it builds on. `--describe`
# reads them from here.
OFFERED: dict[str, tuple[Any, Iterable[Any] | None]] = {}


def split_outside(text: str, separator: str) -> list[str]:
    """Split a text where the separator is in no brackets and no quotes."""
    parts, depth, quote, start, escaped = [], 0, "", 0, False
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote and not escaped else quote
            escaped = char == "\\" and not escaped
        elif char in "'\"":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
        if char == separator and not depth and not quote:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in [*parts, text[start:]]]


def balanced(text: str) -> bool:
    """Return whether every quote and bracket of a text has its partner."""
    bare = re.sub(r"'(?:\\[\s\S]|[^'\\])*'|\"(?:\\[\s\S]|[^\"\\])*\"", "", text)
    while bare != (bare := re.sub(r"\([^][(){}]*\)|\[[^][(){}]*\]|\{[^][(){}]*\}", "", bare)):
        pass
    return not re.search(r"[][(){}'\"]", bare)


def call_with_section(function: Callable, section: Mapping[str, Any], where: str, /, **given):
    """Call `function(**section, **given)`. The user wrote `section`, and errors refer
    to it as `where`.

    Raises:
      ValueError: the section has a field that the function lacks, or lacks one that
        it needs.
    """
    parameters = inspect.signature(function).parameters
    allowed = [n for n, p in parameters.items() if n not in given and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in section:
        if name in given or (name not in allowed and not passes_on):
            raise ValueError(renamed(where, name) or unknown_name_message(f"field of {where}", name, allowed))
    for name in allowed:
        if parameters[name].default is inspect.Parameter.empty and name not in section:
            raise ValueError(f"{where} needs {name}=...")
    return function(**section, **given)


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, without the byte order mark that some editors write.

    Raises:
      ValueError: the file is not UTF-8; the message names it.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
      ValueError: the file is not JSON or contains no object; the message names it.
    """
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); it is damaged: write or download it anew") from None
    except RecursionError:
        raise ValueError(f"{path} is JSON that is nested too deep; write or download it anew") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; allowed: a JSON object, {{...}}")
    return value


# --- a user's own code ---


def find(what: str, name: str, family: Mapping[str, Callable]) -> Callable:
    """Find a function by name: one of a family, or the user's `module:function`.

    Raises:
      ValueError: there is no such function, or the user's module can't be imported.
    """
    if isinstance(name, str) and ":" in name:
        return own(what, name)
    if name not in family:
        raise ValueError(unknown_name_message(what, name, family) + (OWN if isinstance(name, str) else ""))
    return family[name]


OWN = "; or module:function of your own"


def own(what: str, name: str) -> Callable:
    """Import a user's function, and wrap it so that its errors name the line in the
    user's file.
    """
    module, _, attribute = name.partition(":")
    what = f"{what} {name!r}"
    with lines_of(what):
        try:
            loaded = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0]:
                raise
            raise ValueError(f"{what}: no module {module!r} beside the config, in this folder or installed") from None
        except (TypeError, ValueError) as error:
            if not module or module.startswith("."):
                raise ValueError(f"{what}: {module!r} names no module; write module:function") from None
            raise error
    found = functools.reduce(lambda at, part: getattr(at, part, None), attribute.split("."), loaded)
    if found is None:
        names = [n for n, value in vars(loaded).items() if callable(value) and not n.startswith("_")]
        raise ValueError(f"{what}: {unknown_name_message(f'name in {module}', attribute, names)}")
    if not callable(found):
        raise ValueError(f"{what} is a {type(found).__name__}; allowed: a function")

    @functools.wraps(found)
    def called(*arguments, **kwargs):
        with lines_of(what):
            return found(*arguments, **kwargs)

    return called


@contextlib.contextmanager
def lines_of(what: str) -> Iterator[None]:
    """Turn errors of a user's code in this block into a ValueError with `what`, the
    file and the line.

    A ValueError raised by this package passes unchanged.
    """
    try:
        yield
    except Exception as error:
        place = line_of(error)
        if isinstance(error, ValueError) and not place and not is_of_the_compiler(error):
            raise
        said = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(": ".join(filter(None, ("" if place.startswith(what) else what, place, said)))) from None


def line_of(error: BaseException) -> str:
    """Return the file:line in a user's file where an error arose; "" if this package
    raised it.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    lines, traceback = [], error.__traceback__
    while traceback is not None:
        lines.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    ours = str(Path(__file__).parents[1])
    if lines and lines[-1][0].startswith(ours) and isinstance(error, ValueError):
        return ""
    library = (ours, *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), "<")
    return next((f"{file}:{line}" for file, line in reversed(lines) if not file.startswith(library)), "")


def is_of_the_compiler(error: BaseException) -> bool:
    """Tell whether an error arose while a file was compiled, as a ValueError does of a
    null byte in early releases of Python 3.11.
    """
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and "runpy" in traceback.tb_frame.f_code.co_filename


def first_line(error: BaseException) -> str:
    """Return the message of an error as one line; for a SyntaxError, without its
    location.
    """
    said = error.msg if isinstance(error, SyntaxError) else error
    return " ".join(str(said).split())
