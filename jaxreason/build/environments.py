"""Build environments: the judge of a task family, alone or within tools and retries.

The `environment` section names one, with its fields; `inside` is the section of the
environment that it wraps, a single turn if absent. Fields that depend on the text
format (dialect, role) are decided here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxreason import text, tools, verify
from jaxreason.build.tasks import Parts, judge
from jaxreason.environment import Environment, check_environment, openenv, retry, with_tools
from jaxreason.environment import single_turn as judged_once
from jaxreason.environment.retry import TOLD
from jaxreason.options import call_with_section, fields, find, unknown_name_message
from jaxreason.text.chat import check_reply
from jaxreason.tools.calls import DIALECTS, Dialect, described, schema
from jaxreason.types import Task, Verdict

WHERE = "config.environment"


class Made(NamedTuple):
    """An environment, and the format of its prompts."""

    environment: Environment
    format: text.Format
    asks_verifier: bool = True  # whether the config's verifier judges; else its tasks need no key


def make_environment(section: Mapping[str, Any] | None, verifier: dict, items: Sequence[Task], parts: Parts, **words) -> Made:
    """Make the environment of a section around the judge of a `verifier` section, and
    the format that tells of its tools.

    `words` are those of `Parts.reword`, such as an instruction.

    Raises:
      ValueError: an unknown name, a wrong field, or something that does not fit the
        text format.
    """
    made = Made(judge(verifier, items), parts.reword(**words) if words else parts.format)
    if section is not None and section.get("name") != "single_turn":
        made = make_wrapped({"name": None} | dict(section), made, parts, words)
    elif section is not None:
        call_with_section(single_turn, section, WHERE)
    parts.environments.append(made.environment)
    if parts.completer is not None:  # None where nothing is sampled: a person writes
        warn_of_idle_penalty(verifier, parts.completer.max_tokens, parts.say)
    return made


def warn_of_idle_penalty(verifier: Mapping[str, Any], most: int, say: Callable[[str], None]) -> None:
    """Warn of a penalty for the length that no attempt of `most` tokens can earn."""
    if idle := verify.never_penalised(verifier, most):
        say(
            f"warning: verifier 'length_shaped' with max_tokens={idle['max_tokens']}, buffer_tokens={idle['buffer_tokens']} "
            f"penalises no attempt, as sampler.max_tokens is {most}; lower verifier.max_tokens"
        )


def unjudged(text: str, task: Task) -> Verdict:
    """Return the verdict of an answer that is not judged: it names the answer."""
    return Verdict(0.0, False, text, "not judged")


def make_unjudged(section: Mapping[str, Any] | None, parts: Parts, verify: Callable[[str, Task], Verdict] = unjudged) -> Made:
    """Make the environment of questions that the config's verifier does not judge, and
    the format of their prompts: the tools of a section, if it has any, answer the
    model's calls.

    Nothing is tried again: the section's `retry` is left out. `verify` judges the text
    of the last turn.

    Raises:
      ValueError: as `make_environment`.
    """
    made = Made(judged_once(verify), parts.format)
    while section is not None and section.get("name") in ("retry", "single_turn"):
        section = section.get("inside")
    if section is None or section.get("name") != "with_tools":
        return made
    made = make_wrapped({**section, "inside": None}, made, parts, {})
    parts.environments.append(made.environment)
    return made


def make_wrapped(section: dict, judged: Made, parts: Parts, words: dict) -> Made:
    """Make the environment of a section around another one, with those inside it."""
    name = section["name"]
    if not isinstance(name, str):
        raise ValueError(unknown_name_message("environment", name, SECTIONS))
    maker = find("environment", name, SECTIONS)
    check_types(maker, section)
    if ":" in name:
        asks = "environment" in inspect.signature(maker).parameters
        made = make_own(name, maker, section, judged.environment if asks else None)
        return judged._replace(environment=made, asks_verifier=asks and judged.asks_verifier)
    inside = section.get("inside")
    if inside is not None and inside.get("name") != "single_turn":
        judged = make_wrapped({"name": None} | dict(inside), judged, parts, words)
    return call_with_section(maker, section, WHERE, judged=judged, parts=parts, words=words)


def check_types(maker: Callable, section: dict) -> None:
    """Check the types of a section's fields: one of a suite on the command line may
    hold any value.

    Raises:
      ValueError: a value does not have the type of its field.
    """
    given = ("judged", "parts", "words", "environment")
    fields.check(fields.Section((single_turn, maker), given), section, WHERE)


def make_own(name: str, maker: Callable, section: dict, environment: Environment | None) -> Environment:
    """Make a user's environment. Its maker gets the judge of the config's verifier as
    `environment`, if it has such an argument; else None is given here.
    """
    own = {key: value for key, value in section.items() if key != "name"}
    given = {} if environment is None else {"environment": environment}
    made = call_with_section(maker, own, f"environment {name!r}", **given)
    if not isinstance(made, Environment):
        raise ValueError(f"environment {name!r} made a {type(made).__name__}; allowed: a jaxreason.environment.Environment")
    try:
        return check_environment(made)
    except ValueError as error:
        raise ValueError(f"environment {name!r}: {error}") from None


# --- sections by name ---


def single_turn(
    *,
    name: str,  # single_turn, with_tools, retry, openenv, or module:maker of your own
) -> None:
    """The model writes once and is judged."""


def tools_section(
    *,
    judged: Made,
    parts: Parts,
    words: dict,
    name: str,  # single_turn, with_tools, retry, openenv, or module:maker of your own
    tools: Sequence,  # names, or sections such as {"name": "search", "folder": "notes"}; module:maker for your own
    dialect: str = "auto",  # how calls are written: brackets, angles, tags, hermes, llama3; auto: by the chat template
    max_calls: int = 8,  # calls per rollout, at most
    max_tool_tokens: int = 256,  # tokens of a result, at most; a longer one is cut in its middle
    describe: bool | None = None,  # whether a chat's prompt tells of the tools; None: with hermes and llama3
    inside: dict | None = None,  # environment that judges turns without calls; None: a single turn
) -> Made:
    """Answer the tool calls that the model writes."""
    made_tools = make_tools(tools)
    chosen = dialect_of(dialect, parts.format)
    if max_tool_tokens < 1:
        raise ValueError(f"{WHERE}.max_tool_tokens got {max_tool_tokens}; allowed: 1 or more")
    fit = functools.partial(fitted, parts.tokenizer, max_tool_tokens)
    try:
        made = with_tools(judged.environment, made_tools, chosen, max_calls=max_calls, fit=fit)
    except ValueError as error:
        raise ValueError(f"{WHERE}: {error}") from None
    format = format_with_tools(judged.format, made_tools, chosen, describe, parts, words)
    if chosen.role:
        check_reply(format, parts.tokenizer, chosen.role)
    else:
        check_encodes(parts.tokenizer, chosen.write("1", False), chosen.write("", True))
    return judged._replace(environment=made, format=format)


def format_with_tools(
    format: text.Format, made_tools: Sequence[tools.Tool], dialect: Dialect, describe: bool | None, parts: Parts, words: dict
) -> text.Format:
    """Return the format whose prompts tell of tools, if they should.

    Raises:
      ValueError: they should, and there is no chat.
    """
    chats = format.reply is not None
    if describe and not chats:
        raise ValueError(f"{WHERE}.describe got True, which needs text.format='chat'; describe the tools in text.instruction")
    if describe is None and chats and not dialect.role:
        parts.say(
            "note: no prompt tells the model of its tools, as it may know them from demonstrations or text.instruction; "
            "environment.describe=True tells it, False drops this note"
        )
    if not (dialect.role != "" if describe is None else describe):
        return format
    told = described(made_tools, dialect)
    # Templates describe calls in their own dialect, not in those of the text.
    return parts.reword(**words, tools=[schema(tool) for tool in made_tools] if dialect.role else (), described=told)


make_tools = tools.make_all


def retry_section(
    *,
    judged: Made,
    parts: Parts,
    words: dict,
    name: str,  # single_turn, with_tools, retry, openenv, or module:maker of your own
    attempts: int = 2,  # attempts per rollout, at most
    tell: str = "wrong",  # wrong: say that an attempt was wrong, and end at a right one; check: only ask to check the work
    message: str | None = None,  # text that the model reads before it writes again; None: a sentence for `tell`
    discount: float = 1.0,  # factor of the reward per further attempt
    inside: dict | None = None,  # environment that judges each attempt; None: a single turn
) -> Made:
    """Let the model attempt a task again after it was wrong, or check its work."""
    chats = parts.format.reply is not None
    words = {"tell": tell, "message": message, "discount": discount, "role": "user" if chats else ""}
    try:
        made = retry(judged.environment, attempts, **words)
    except ValueError as error:
        raise ValueError(f"{WHERE}: {error}") from None
    if chats:
        check_reply(judged.format, parts.tokenizer, "user")
    else:
        check_encodes(parts.tokenizer, TOLD[tell] if message is None else message)
    return judged._replace(environment=made)


def openenv_section(
    *,
    judged: Made,
    parts: Parts,
    words: dict,
    name: str,  # single_turn, with_tools, retry, openenv, or module:maker of your own
    maker: str,  # module:function that returns a new environment, without arguments
    action: str | None = None,  # module:function from the model's text to an action; None: the text itself
    show: str | None = None,  # module:function from an observation to text; None: its text, or its fields as JSON
    max_steps: int = 16,  # steps of an episode, at most
    right: float = 1.0,  # sum of rewards from which on an answer is correct
    deadline_s: float | None = 60.0,  # seconds per step; None: no limit
) -> Made:
    """Play an environment with reset, step and state, such as those of OpenEnv; use it
    with the task family `openenv`. The verifier of the config is not asked.
    """
    role = "user" if parts.format.reply is not None else ""
    keywords = {"action": action, "show": show, "max_steps": max_steps, "right": right, "deadline_s": deadline_s}
    try:
        made = openenv(maker, role=role, **keywords)
    except ValueError as error:
        raise ValueError(f"{WHERE}: {error}") from None
    if role:
        check_reply(judged.format, parts.tokenizer, role)
    return judged._replace(environment=made, asks_verifier=False)


SECTIONS: dict[str, Callable] = {
    "single_turn": single_turn,
    "with_tools": tools_section,
    "retry": retry_section,
    "openenv": openenv_section,
}


def dialect_of(name: str, format: text.Format) -> Dialect:
    """Return the dialect of a name; "auto" is that of the chat template, or tags.

    Raises:
      ValueError: an unknown name, or a dialect of messages in a format without any.
    """
    if name == "auto":
        template = format.template or ""
        name = "tags" if format.reply is None else "llama3" if "ipython" in template else "hermes"
    if name not in DIALECTS:
        raise ValueError(unknown_name_message(f"{WHERE}.dialect", name, ["auto", *DIALECTS]))
    found = DIALECTS[name]()
    if found.role and format.reply is None:
        raise ValueError(f"{WHERE}.dialect got {name!r}, which needs text.format='chat'; allowed here: brackets, angles, tags")
    return found


def check_encodes(tokenizer: text.Tokenizer, *texts: str) -> None:
    """Raise ValueError for a text of the environment that the tokenizer lacks."""
    for one in texts:
        try:
            tokenizer.encode(one, added=False, continues=True)
        except ValueError as error:
            raise ValueError(f"{WHERE}: the model would read {one!r}, but {error}") from None


def fitted(tokenizer: text.Tokenizer, most: int, result: str) -> str:
    """Cut a tool's result to `most` tokens in its middle, and drop the characters that
    the tokenizer lacks. It is cut between characters, never inside one.
    """

    def count(text: str) -> int:
        return len(tokenizer.encode(text, added=False, continues=True))

    def shorter(kept: int) -> str:
        """Keep so many characters: of both ends, or of the start if the mark of a cut
        does not fit.
        """
        head = kept - kept // 2 if marked else kept
        return result[:head] + mark * marked + result[len(result) - (kept - head) :]

    result, mark = encodable(tokenizer, result), encodable(tokenizer, tools.interface.CUT)
    marked = count(mark) <= most
    if count(result) <= most:
        return result
    fits, too_many = 0, len(result)
    while too_many - fits > 1:
        kept = (fits + too_many) // 2
        fits, too_many = (kept, too_many) if count(shorter(kept)) <= most else (fits, kept)
    return shorter(fits)


def encodable(tokenizer: text.Tokenizer, result: str) -> str:
    """Drop the characters of a text that a tokenizer of characters lacks."""
    try:
        tokenizer.encode(result, added=False, continues=True)
        return result
    except ValueError:
        return "".join(char for char in result if fits(tokenizer, char))


def fits(tokenizer: text.Tokenizer, char: str) -> bool:
    try:
        tokenizer.encode(char, added=False, continues=True)
    except ValueError:
        return False
    return True
