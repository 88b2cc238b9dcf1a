"""Names and numbers that a user gives, checked: options of a config file, fields of a section, names of a family.

Options are the part after the colon of `--config=configs/tiny.py:task=countdown,smoke`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
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
