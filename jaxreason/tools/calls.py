"""Conventions for calls in a model's text, and for their results.

A `Dialect` is one such convention. Dialects of the text itself (`brackets`, `angles`,
`tags`) end the model's turn in the middle of its text by a stop string, and the result
continues the text: any model can learn them. Dialects of chat templates (`hermes` of
Qwen and Hermes, `llama3`) have calls in JSON; the turn ends as any other, and the
result is a message of the role that the template knows.

Everything here is total in the model's text: a malformed call becomes a `Malformed`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxreason.tools.interface import Tool

LONGEST = 100_000  # characters of a turn that are searched for calls; longer ones have none


class Call(NamedTuple):
    """A call that a model wrote."""

    name: str
    arguments: Mapping[str, Any]


class Malformed(NamedTuple):
    """A call that can't be read."""

    why: str  # a short text for the model


class Dialect(NamedTuple):
    """A convention for calls and results."""

    read: Callable[[str, Sequence[Tool]], list[Call | Malformed]]  # calls that a turn ends with; empty: none
    write: Callable[[str, bool], str]  # (result, is_error) -> text that the model reads
    stops: tuple[tuple[str, ...], ...] = ()  # (text, after, barred): see `environment.Stop`; each ends a call
    role: str = ""  # role of the message that a result is; empty: the result continues the model's text
    example: Callable[[Tool], str] | None = None  # a call, for a prompt that describes the tools
    one_tool: bool = False  # whether a call names no tool, so that there can be only one


# --- dialects of the text ---


def brackets() -> Dialect:
    """Make the dialect `[ARGUMENT=`, answered by `RESULT]`, of one tool; an error is
    `?]`.
    """
    return inline("[", "]")


def angles() -> Dialect:
    """Make the dialect of GSM8K's worked solutions: `<<ARGUMENT=`, answered by
    `RESULT>>`, of one tool.
    """
    return inline("<<", ">>")


def inline(opening: str, closing: str) -> Dialect:
    """Make a dialect in which `=` after an opening bracket ends the model's turn."""
    barred = opening[0] + closing[0]
    call = re.compile(f"{re.escape(opening)}([^{re.escape(barred)}=]*)=$")

    def read(text: str, tools: Sequence[Tool]) -> list[Call | Malformed]:
        found = call.search(text[-LONGEST:])
        return [Call(tools[0].name, first_argument(tools[0], found[1]))] if found else []

    def write(result: str, is_error: bool) -> str:
        return f"{'?' if is_error else without(result, closing)}{closing}"

    return Dialect(read, write, (("=", opening, barred),), example=lambda tool: f"{opening}{example_of(tool)}=", one_tool=True)


def tags() -> Dialect:
    """Make the dialect `<tool>NAME: ARGUMENT</tool>`, answered by
    `<result>RESULT</result>`.
    """
    call = re.compile(r"<tool>((?:(?!<tool>).)*)</tool>$", re.DOTALL)

    def read(text: str, tools: Sequence[Tool]) -> list[Call | Malformed]:
        found = call.search(text[-LONGEST:])
        if not found:
            return []
        name, colon, argument = found[1].partition(":")
        if not colon:
            return [Malformed("write <tool>name: argument</tool>")]
        tool = next((tool for tool in tools if tool.name == name.strip()), None)
        return [Call(name.strip(), {} if tool is None else first_argument(tool, argument.strip()))]

    def write(result: str, is_error: bool) -> str:
        return f"<result>{'error: ' * is_error}{without(result, '</result>')}</result>"

    return Dialect(
        read, write, stops=(("</tool>", "<tool>"),), example=lambda tool: f"<tool>{tool.name}: {example_of(tool)}</tool>"
    )


def without(text: str, mark: str) -> str:
    """Drop a mark from a text, also where dropping it makes another one."""
    while mark in text:
        text = text.replace(mark, "")
    return text


def first_argument(tool: Tool, text: str) -> dict[str, str]:
    return {next(iter(tool.parameters)): text}


def example_of(tool: Tool) -> str:
    return next(iter(tool.parameters))


# --- dialects of chat templates ---


def hermes() -> Dialect:
    """Make the dialect of Hermes and Qwen: `<tool_call>{"name": ..., "arguments":
    {...}}</tool_call>`, any number of them, outside of `<think>`.
    """
    call = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|$)", re.DOTALL)

    def read(text: str, tools: Sequence[Tool]) -> list[Call | Malformed]:
        if len(text) > LONGEST:
            return []
        said = text.rpartition("</think>")[2]
        return [
            from_json(found[1], ("arguments",)) if found[2] else Malformed("</tool_call> is missing")
            for found in call.finditer(said)
        ]

    def example(tool: Tool) -> str:
        return "<tool_call>\n" + json.dumps({"name": tool.name, "arguments": dict(tool.parameters)}) + "\n</tool_call>"

    return Dialect(read, in_words, role="tool", example=example)


def llama3() -> Dialect:
    """Make the dialect of Llama 3: the turn is one JSON object `{"name": ...,
    "parameters": {...}}`, maybe after `<|python_tag|>`.
    """

    def read(text: str, tools: Sequence[Tool]) -> list[Call | Malformed]:
        said = text.rpartition("<|python_tag|>")[2].strip()
        if len(text) > LONGEST or not said.startswith("{") or '"name"' not in said:
            return []
        return [from_json(said, ("parameters", "arguments"))]

    def example(tool: Tool) -> str:
        return json.dumps({"name": tool.name, "parameters": dict(tool.parameters)})

    return Dialect(read, in_words, role="ipython", example=example)


def in_words(result: str, is_error: bool) -> str:
    return f"error: {result}" if is_error else result


def from_json(text: str, keys: Sequence[str]) -> Call | Malformed:
    """Read a call in JSON; `keys` are the names that its arguments may have."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Malformed("the call is not JSON")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Malformed('the call has no "name"')
    arguments = next((value[key] for key in keys if key in value), {})
    if not isinstance(arguments, dict):
        return Malformed(f'"{keys[0]}" must be an object')
    return Call(value["name"], arguments)


def schema(tool: Tool) -> dict[str, Any]:
    """Describe a tool as chat templates expect it: a function of JSON schema."""
    properties = {name: {"type": "string", "description": words} for name, words in tool.parameters.items()}
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "function", "function": {"name": tool.name, "description": tool.help, "parameters": parameters}}


def described(tools: Sequence[Tool], dialect: Dialect) -> str:
    """Describe tools in words, for models whose template does not."""
    how = "After a call, stop and wait for its result."
    if not dialect.role:
        how = f"The result follows a call at once, as {dialect.write('RESULT', False)}, and you continue."
    lines = [
        f"- {tool.name}: {tool.help} Write {dialect.example(tool)}{'' if dialect.role else meanings(tool)}" for tool in tools
    ]
    return "\n".join([f"You can use tools. {how}", *lines])


def meanings(tool: Tool) -> str:
    """Say what the parameters of a tool are, which an example of a dialect of the text
    does not.
    """
    return f" ({'; '.join(f'{name}: {words}' for name, words in tool.parameters.items())})"


DIALECTS: dict[str, Callable[[], Dialect]] = {
    "brackets": brackets,
    "angles": angles,
    "tags": tags,
    "hermes": hermes,
    "llama3": llama3,
}
