"""Tools by name: functions that a model calls while it thinks.

A `Tool` takes arguments from the model's text and returns a text. It is total: a wrong
argument, a time-out or a crash becomes a short error text that the model reads, and is
counted. A tool with a state (a Python interpreter) opens a `Session` for each rollout.
A human is a tool too. How a call is written in the model's text, and its result, is in
`calls`; `environment.with_tools` brings both together. To add a tool, write a file with
one maker and name it here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxreason.options import call_with_section, find, unknown_name_message
from jaxreason.tools import calculator, human, python, search
from jaxreason.tools.interface import Result, Session, Tool, ToolError, run

TOOLS: dict[str, Callable[..., Tool]] = {
    "calculator": calculator.calculator,
    "python": python.python,
    "search": search.search,
    "human": human.human,
}

__all__ = ["TOOLS", "Result", "Session", "Tool", "ToolError", "make", "make_all", "run"]


def make(
    name: str,  # a tool of this package, or your own as module:maker
    **kwargs,
) -> Tool:
    """Make a tool of this package by name, or of your own `module:maker`. The keywords
    are those of the maker.

    Raises:
      ValueError: an unknown name or keyword, a missing dependency, or a maker that
        returns no `Tool`.
    """
    made = call_with_section(find("tool", name, TOOLS), kwargs, f"tool {name!r}")
    if not isinstance(made, Tool):
        raise ValueError(f"tool {name!r} made a {type(made).__name__}; allowed: a jaxreason.tools.Tool")
    return made


def make_all(wanted: Sequence[str | Mapping[str, Any]]) -> tuple[Tool, ...]:
    """Make tools from their names, or from sections such as {"name": "search",
    "folder": "notes"}.

    Raises:
      ValueError: no tool, a wrong section, or two tools of one name.
    """
    if isinstance(wanted, str) or not all(isinstance(one, str | Mapping) for one in wanted):
        raise ValueError(f"tools got {wanted!r:.80}; allowed: a list of names or of sections, such as ('calculator',)")
    if not wanted:
        raise ValueError(f"tools is empty; allowed: one or more of {', '.join(sorted(TOOLS))}, or module:maker of your own")
    made = []
    for one in wanted:
        section = {"name": one} if isinstance(one, str) else dict(one)
        if not isinstance(section.get("name"), str):
            raise ValueError(unknown_name_message("tool", section.get("name"), TOOLS))
        made.append(make(**section))
    names = [tool.name for tool in made]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two tools are called {twice[0]!r}, so a call can't tell them apart; give each another name")
    return tuple(made)
