"""Names and numbers that a user gives, checked: options of a config file, fields of a section, names of a family, JSON files.

Options are the part after the colon of `--config=configs/tiny.py:task=countdown,smoke`.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def unknown(what: str, got: str, allowed: Iterable[str]) -> str:
    """Say that `got` is not one of `allowed`, with the nearest of them first if one is near."""
    allowed = sorted(map(str, allowed))
    near = difflib.get_close_matches(str(got), allowed, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown {what} {got!r}{hint}; one of: {', '.join(allowed) or 'none'}"


def parse(arg: str, *, choices: dict[str, Iterable[Any]] | None = None, **defaults) -> SimpleNamespace:
    """Parse `"size=small,smoke"` into a namespace that has each of `defaults`, cast to the type of its default.

    A bare name sets a flag whose default is False. `choices` limits the values of an option.

    Raises:
      ValueError: an unknown option, a value of the wrong type, or one that is not among the choices.
    """
    values = dict(defaults)
    for part in filter(None, (p.strip() for p in (arg or "").split(","))):
        name, given, text = part.partition("=")
        if name not in defaults:
            raise ValueError(unknown("config option", name, defaults))
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
            raise ValueError(unknown(f"value of config option {name}", text, choices[name]))
    return SimpleNamespace(**values)


def call(function: Callable, section: Mapping[str, Any], where: str, /, **given):
    """Call `function(**section, **given)`, where `section` is a user's and `where` is what to call it.

    Raises:
      ValueError: a field that the function does not have, or one missing that it needs.
    """
    parameters = inspect.signature(function).parameters
    allowed = [n for n, p in parameters.items() if n not in given and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in section:
            if name not in allowed:
                raise ValueError(unknown(f"field of {where}", name, allowed))
    for name in allowed:
        if parameters[name].default is inspect.Parameter.empty and name not in section:
            raise ValueError(f"{where} needs {name}=...")
    return function(**section, **given)


def read_text(path: Path) -> str:
    """Read a text file of UTF-8, without the byte order mark that some editors put in front.

    Raises:
      ValueError: it is not UTF-8; the message names the file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
      ValueError: it is not JSON, or holds something else; the message names the file.
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
