"""Tools within an environment: calls in the model's text are answered, everything else
is judged by the environment inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxreason.environment.interface import Environment, Failures, Step, Stop, Turn, end_of_turn
from jaxreason.tools import Result, Session, Tool, run
from jaxreason.tools.calls import Call, Dialect, Malformed
from jaxreason.types import Message, Task


class Sessions:
    """Sessions of one rollout with its tools, each opened at the first call."""

    def __init__(self, task: Task):
        self.task, self.opened, self.closed, self.lock = task, {}, False, threading.Lock()

    def of(self, tool: Tool) -> Session:
        """Return the session with a tool.

        Raises:
          RuntimeError: the rollout has ended: its step was given up and goes on in its
            thread.
        """
        with self.lock:
            if self.closed:
                raise RuntimeError("the rollout has ended")
            if tool.name in self.opened:
                return self.opened[tool.name]
        session = tool.open(self.task)  # without the lock: it may hang, and then `close` must not
        with self.lock:
            if not self.closed:
                self.opened[tool.name] = session
                return session
        session.close()
        raise RuntimeError("the rollout has ended")

    def drop(self, tool: Tool) -> None:
        """Close the session with a tool; the next call opens another."""
        with self.lock:
            session = self.opened.pop(tool.name, None)
        if session is not None:
            session.close()

    def close(self) -> None:
        """Close all sessions, also if one fails to close; raise the first error."""
        with self.lock:
            opened, self.opened, self.closed = self.opened, {}, True
        with contextlib.ExitStack() as closing:
            for session in opened.values():
                closing.callback(session.close)


class ToolUse(NamedTuple):
    """State of a rollout with tools."""

    inner: Any  # state of the environment inside
    sessions: Sessions
    calls: int = 0  # malformed ones included
    errors: int = 0  # calls that were answered by an error


def check(tools: Sequence[Tool], dialect: Dialect, max_calls: int) -> None:
    """Raise ValueError for arguments of `with_tools` that are not allowed."""
    if max_calls < 1:
        raise ValueError(f"max_calls got {max_calls}; allowed: 1 or more")
    names = [tool.name for tool in tools]
    if not names or len({*names}) < len(names):
        raise ValueError(f"tools got {names}; allowed: one or more, each with its own name")
    if dialect.one_tool and len(names) > 1:
        raise ValueError(f"this dialect names no tool, so it can't tell {' and '.join(names)} apart; choose tags, or one tool")


def answer(call: Call | Malformed, by_name: Mapping[str, Tool], sessions: Sessions, failures: Failures) -> Result:
    """Answer one call, whatever it is."""
    if isinstance(call, Malformed):
        return Result(call.why, is_error=True)
    tool = by_name.get(call.name)
    if tool is None:
        return Result(f"no tool {call.name[:40]!r}; there are: {', '.join(by_name)}", is_error=True)
    try:
        session = sessions.of(tool)
    except Exception:
        return Result(f"{tool.name} does not start", is_error=True, failure=traceback.format_exc())

    def stuck(thread: threading.Thread) -> None:
        sessions.drop(tool)
        failures.give_up(thread)

    return run(tool, session, call.arguments, stuck)


def with_tools(
    environment: Environment,
    tools: Sequence[Tool],
    dialect: Dialect,
    *,
    max_calls: int = 8,
    fit: Callable[[str], str] = lambda text: text,
) -> Environment:
    """Answer the tool calls in a model's turns; the environment inside sees the other
    turns.

    A malformed call, an unknown tool, a time-out or a crash is answered by a short
    error text, and counts as a call. A turn with a call that has no answer, because of
    `max_calls` or the limit of tokens, is judged as one that was cut off. After a
    time-out a tool's session is closed, and the next call opens another: two calls
    never share one at the same time. The verdict's measures are tool_calls and
    tool_errors (calls that were answered by an error).

    Args:
      environment: judges the turns without calls; it sees only that turn's text, so a
        result is never taken for the model's answer.
      tools: at least one, of different names.
      dialect: how calls and results are written.
      max_calls: calls per rollout, at most.
      fit: shortens a result to the tokens that it may have, and drops characters that
        the tokenizer lacks.

    Raises:
      ValueError: `max_calls` below 1, no tool, two of one name, or several in a dialect
        of one.
    """
    check(tools, dialect, max_calls)
    by_name = {tool.name: tool for tool in tools}
    failures = environment.failures or Failures(environment.name)
    stops = tuple(Stop(*stop) for stop in dialect.stops)

    def answers(state: ToolUse, calls: Sequence[Call | Malformed]) -> tuple[ToolUse, Step]:
        left = max_calls - state.calls
        none_left = Result(f"no calls left after {max_calls}", is_error=True)
        results = [answer(call, by_name, state.sessions, failures) if i < left else none_left for i, call in enumerate(calls)]
        texts = [dialect.write(fit(result.text), result.is_error) for result in results]
        said = [Message(dialect.role, text) for text in texts] if dialect.role else "".join(texts)
        state = state._replace(calls=state.calls + len(calls), errors=state.errors + sum(r.is_error for r in results))
        return state, Step(observation=said, failure=next((r.failure for r in results if r.failure), ""))

    def step(state: ToolUse, turn: Turn) -> tuple[ToolUse, Step]:
        said = turn.text[: end_of_turn(stops, turn.text)]  # without the rest of the token in which the call ends
        if calls := dialect.read(said, tools):
            if not turn.final and state.calls < max_calls:
                return answers(state, calls)
            turn = turn._replace(stop="limit")  # a limit cut it off: `must_finish` rewards no number in a call
        inner, made = environment.step(state.inner, turn)
        if made.verdict is not None:
            counts = {"tool_calls": float(state.calls), "tool_errors": float(state.errors)}
            measured = dict(made.verdict.measures) | counts
            made = made._replace(verdict=dataclasses.replace(made.verdict, measures=measured))
        return state._replace(inner=inner), made

    def close(state: ToolUse) -> None:
        try:
            state.sessions.close()
        finally:
            environment.close(state.inner)

    deadline_s = environment.deadline_s
    return environment._replace(
        reset=lambda task: ToolUse(environment.reset(task), Sessions(task)),
        step=step,
        one_turn=False,
        deadline_s=None if deadline_s is None else deadline_s + max_calls * max(tool.timeout_s for tool in tools),
        failures=failures,
        stops=environment.stops + stops,
        close=close,
    )
