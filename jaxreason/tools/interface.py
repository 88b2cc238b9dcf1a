"""The contract of tools, and the function that runs a call within its limits."""

from __future__ import annotations

import json
import re
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxreason.types import Task


class ToolError(Exception):
    """A tool can't answer; the model reads the message."""


def no_close() -> None:
    """Close nothing: the default of `Session.close`."""


class Session(NamedTuple):
    """A tool in one rollout."""

    call: Callable[..., str]  # (**arguments) -> text; raises ToolError with words for the model
    close: Callable[[], None] = no_close  # called once, maybe while a call runs, which it should then end


class Tool(NamedTuple):
    """A function for the model. Without a state, `open` returns the same session for
    all rollouts; it may be called from several threads at once.
    """

    name: str
    help: str  # one line, for the prompt
    open: Callable[[Task], Session]
    parameters: Mapping[str, str] = {"text": "the text"}  # name -> description; each is a text
    timeout_s: float = 10.0  # seconds per call
    keeps_time: bool = False  # whether the tool ends its calls itself by then; else they run in a thread that is given up
    max_chars: int = 10_000  # of a result; a longer one is cut in its middle


NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
LONGEST_S = 1e6  # largest time-out


def check(tool: Tool) -> Tool:
    """Return a tool whose fields have the right types and values.

    Raises:
      ValueError: one has not.
    """
    if not isinstance(tool.name, str) or not NAME.fullmatch(tool.name):
        raise ValueError(f"name got {tool.name!r:.80}; allowed: up to 64 letters, digits and . _ -")
    if not isinstance(tool.help, str) or not tool.help or len(tool.help.splitlines()) != 1:
        raise ValueError(f"help got {tool.help!r:.80}; allowed: one line")
    if not callable(tool.open):
        raise ValueError(f"open got {tool.open!r:.80}; allowed: a function from a task to a Session")
    words = tool.parameters if isinstance(tool.parameters, Mapping) else {}
    if not words or not all(isinstance(word, str) for pair in words.items() for word in pair):
        raise ValueError(f"parameters got {tool.parameters!r:.80}; allowed: one or more, name -> description")
    check_number("timeout_s", tool.timeout_s, (int, float), LONGEST_S)
    check_number("max_chars", tool.max_chars, (int,), 10**9)
    return tool


def check_number(field: str, value: Any, types: tuple[type, ...], most: float) -> None:
    if not isinstance(value, types) or isinstance(value, bool) or not 0 < value <= most:
        raise ValueError(f"{field} got {value!r:.80}; allowed: a number above 0, at most {most:g}")


class Result(NamedTuple):
    """Result of a call."""

    text: str
    is_error: bool = False
    failure: str = ""  # traceback of a tool that crashed


def stateless(call: Callable[..., str]) -> Callable[[Task], Session]:
    """Make the `open` of a tool without a state."""
    session = Session(call)
    return lambda task: session


def run(tool: Tool, session: Session, arguments: Mapping[str, Any], stuck: Callable[[threading.Thread], None]) -> Result:
    """Call a tool within its limits; whatever it does, return a result.

    `stuck` gets the thread of a call that did not end in time, and still runs.
    """
    unknown = [name for name in arguments if name not in tool.parameters]
    missing = [name for name in tool.parameters if name not in arguments]
    if unknown or missing:
        what = f"unknown argument {unknown[0][:40]}" if unknown else f"missing argument {missing[0]}"
        return Result(f"{what}; {tool.name} takes: {', '.join(tool.parameters)}", is_error=True)
    try:
        words = {name: value if isinstance(value, str) else as_json(value) for name, value in arguments.items()}
    except RecursionError:  # writing JSON recurses from deeper in the stack than reading it did
        return Result("an argument is nested too deep", is_error=True)
    if tool.keeps_time:
        return outcome(tool, session, words)
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(outcome(tool, session, words)), daemon=True, name=f"tool {tool.name}")
    thread.start()
    thread.join(tool.timeout_s)
    if not results:
        stuck(thread)
        return Result(f"no answer in {tool.timeout_s:g} s", is_error=True)
    return results[0]


def as_json(value: Any) -> str:
    """Write an argument that is no text as the model wrote it, true and not True."""
    return json.dumps(value, ensure_ascii=False, default=str)


def outcome(tool: Tool, session: Session, arguments: Mapping[str, str]) -> Result:
    try:
        text = session.call(**arguments)
    except ToolError as error:
        return Result(shortened(str(error), tool.max_chars), is_error=True)
    except BaseException as error:  # sys.exit in a tool must not end the run in silence
        told = traceback.format_exc()
        return Result(f"the tool failed with {type(error).__name__}", is_error=True, failure=told)
    if not isinstance(text, str):
        return Result(
            "the tool failed", is_error=True, failure=f"tool {tool.name!r} returned a {type(text).__name__}, not a text"
        )
    return Result(shortened(text, tool.max_chars))


CUT = " ... "  # marks where a text was cut


def shortened(text: str, most: int) -> str:
    """Cut a text that is too long in its middle."""
    if len(text) <= most:
        return text
    kept = max(0, most - len(CUT))
    return text[: kept - kept // 2] + CUT + text[len(text) - kept // 2 :]
