"""From tasks and messages to token ids, with a mask of the tokens that may be trained
on.

A `Format` is how one run talks to its model: `plain` (the question, then the model
writes) or `chat` (a checkpoint's own Jinja template). Training and sampling see the
same ids: text that the model writes is encoded by itself and its ids are appended to
the prompt's, never re-tokenised with it. Text from outside cannot smuggle in tokens
with a meaning of their own: those written in a message are encoded as plain characters.
In the assistant's text only special tokens are: a worked solution may think and call
tools, but not end its turn.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxreason.text.template import check_arguments, clock, reads, render
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.types import Message, Task


class Format(NamedTuple):
    """Functions from tasks to token ids."""

    prompt: Callable[[Task], list[int]]
    """Ids up to where the model starts to write."""
    demonstration: Callable[[Task], tuple[list[int], list[bool]]]
    """Ids of prompt, solution and end, and which to train on: the solution and its end, but not the character spans of the
    solution that `task.data["forced"]` lists, such as tool output."""
    forced: Callable[[str], list[int]]
    """Ids of a text that is inserted between texts of the model, such as tool output."""
    template: str | None = None
    """The chat template, if there is one."""
    conversation: Callable[[Sequence[Message]], list[int]] | None = None
    """Ids of a conversation up to where the model starts to write; None without a chat template."""
    reply: Callable[[Sequence[Message], bool], list[int]] | None = None
    """Ids of messages that answer the assistant, up to where it writes again, given whether it has written the token that ends
    its turn; None without a chat template."""

    def observe(self, observation: str | Sequence[Message], ended: bool) -> list[int]:
        """Return the ids of an environment's observation: a text that continues the
        model's own, or messages.

        Raises:
          ValueError: messages, in a format without a chat template.
        """
        if isinstance(observation, str):
            return self.forced(observation)
        if self.reply is None:
            raise ValueError("the plain format has no messages; the environment must continue the model's text: role=''")
        return self.reply(observation, ended)


# --- formats ---

QUESTION = "{question}"
PROBE = "\ue004"  # the message with which a template is tested


def plain(tokenizer: Tokenizer, instruction: str = QUESTION) -> Format:
    """Make the format of a model without a chat template: bos (if there is one), the
    question, then the model's text.

    Raises:
      ValueError: an instruction without `{question}`.
    """
    check_instruction(instruction)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    forced = functools.partial(tokenizer.encode, added=False, continues=True)
    written = functools.partial(tokenizer.encode, special=False, continues=True)

    def prompt(task):
        return start + tokenizer.encode(instruction.replace(QUESTION, task.question), added=False)

    def demonstration(task):
        ids = prompt(task)
        trainable = [False] * len(ids)
        for text, is_forced in spans(task):
            piece = (forced if is_forced else written)(text)
            ids += piece
            trainable += [not is_forced] * len(piece)
        return [*ids, tokenizer.eos_ids[0]], [*trainable, True]

    return Format(prompt, demonstration, forced)


def chat(
    tokenizer: Tokenizer,
    template: str,
    system: str = "",
    instruction: str = QUESTION,
    *,
    arguments: Mapping[str, Any] = MappingProxyType({}),
    tools: Sequence[Mapping[str, Any]] = (),
    described: str = "",
    date: datetime.date | None = None,
    path: Path | None = None,
) -> Format:
    """Make the format of a chat model: the question is the user's turn, and the model
    writes the assistant's.

    Some templates open the assistant's turn differently in a prompt than in a finished
    conversation (R1 and QwQ open `<think>`). Such a template can make prompts, but it
    refuses demonstrations.

    Args:
      tokenizer: its eos ids must include the token that ends a turn in this template.
      template: Jinja source, as from `load_template`.
      system: the system message; if empty, none is sent (a template may then add its
        own).
      instruction: the user's message; `{question}` in it stands for the question.
      arguments: further variables of the template, such as `{"enable_thinking":
        False}`.
      tools: JSON schemas of the tools that the model may call, for templates that
        describe them.
      described: description of the tools in words, added to the system message if the
        template reads no `tools`.
      date: the day that the template sees as today; None: the day of this call.
      path: the file of the template, named in errors.

    Raises:
      ValueError: a template that does not work, an argument that it does not read, or
        an instruction without `{question}`.
    """
    check_instruction(instruction)
    with naming(path):
        check_arguments(template, arguments)
    arguments = {**arguments, "strftime_now": clock(date or datetime.date.today())}
    if tools and reads(template, "tools"):
        arguments["tools"], described = list(tools), ""

    def messages(question):
        # Not str.format: questions and instructions contain braces.
        asked = Message("user", instruction.replace(QUESTION, question))
        return describing(described, [Message("system", system), asked] if system else [asked])

    def prompt(task):
        with naming(path):
            return encode_chat(tokenizer, template, messages(task.question), add_generation_prompt=True, **arguments)[0]

    def conversation(said):
        with naming(path):
            return encode_chat(tokenizer, template, describing(described, said), add_generation_prompt=True, **arguments)[0]

    def demonstration(task):
        with naming(path):
            solution = {"role": "assistant", "content": [*spans(task)]}
            ids, trainable = encode_chat(tokenizer, template, [*messages(task.question), solution], **arguments)
        end = max(i for i, is_trained in enumerate(trainable) if is_trained) + 1  # drop the text after the turn
        return ids[:end], trainable[:end]

    def reply(said, ended):
        with naming(path):
            return encode_reply(tokenizer, template, messages(PROBE), said, ended, **arguments)

    with naming(path):
        check_template(tokenizer, template, messages(PROBE), **arguments)
    forced = functools.partial(tokenizer.encode, added=False, continues=True)
    return Format(prompt, demonstration, forced, template, conversation, reply)


def describing(tools: str, messages: Sequence[Message]) -> list[Message]:
    """Add a description of tools, if any, to the system message of a conversation."""
    if not tools:
        return [*messages]
    if messages and messages[0].role == "system":
        return [Message("system", f"{messages[0].content}\n\n{tools}"), *messages[1:]]
    return [Message("system", tools), *messages]


def check_instruction(instruction: str) -> None:
    if QUESTION not in instruction:
        raise ValueError(f"instruction got {instruction!r}; it must contain {QUESTION}")


def check_template(tokenizer: Tokenizer, template: str, messages: Sequence[Message], **arguments) -> None:
    """Check that a template keeps every message, and ends the assistant's turn with a
    token at which a sampler stops.

    Raises:
      ValueError: it does not.
    """
    names = special_names(tokenizer) | arguments
    asked = render(template, messages, True, **names)
    for message in messages:
        if message.content.strip() not in asked:
            raise ValueError(
                f"the chat template leaves out the {message.role}'s message, or changes it; does it belong to this model, and "
                "does it take text?"
            )
    answered = render(template, [*messages, Message("assistant", PROBE)], False, **names)
    if answered.count(PROBE) <= asked.count(PROBE):
        raise ValueError("the chat template leaves out what the assistant wrote; does it belong to this model?")
    first_end(tokenizer, tokenizer.encode(answered.rpartition(PROBE)[2], continues=True))


def encode_reply(
    tokenizer: Tokenizer, template: str, asked: Sequence[Message], said: Sequence[Message], ended: bool, **arguments
) -> list[int]:
    """Encode messages that answer an assistant's turn, up to where the assistant writes
    again.

    They begin with the token that ends the turn, unless the model has written it
    (`ended`). `asked` are the messages before that turn.

    Raises:
      ValueError: the template leaves a message out, or renders the turns before it
        differently than without it. A rollout only appends tokens, so the model would
        have read something else than the conversation.
    """
    said = [Message(m.role, m.content.replace(PROBE, "")) for m in said]
    names = special_names(tokenizer) | arguments
    before = render(template, [*asked], True, **names)
    ids = []
    for answer in answers(template, before):
        guarded = [_guarded(_plain(m), tokenizer) for m in (*asked, Message("assistant", answer), *said)]
        whole = render(template, guarded, True, **names)
        if not whole.startswith(before + answer):
            raise ValueError(
                f"the chat template renders a turn of the assistant differently once a message of the {said[0].role} follows, so "
                "it can't be used for rollouts of several turns; choose a dialect within the text (tags), or another template"
            )
        ids, _ = _encode_guarded(tokenizer, whole[len(before) + len(answer) :], continues=True)
    return ids[first_end(tokenizer, ids) + 1 :] if ended else ids


def answers(template: str, before: str) -> list[str]:
    """Return turns of an assistant that a template must keep as they are: also one that
    thinks, if the template knows about thinking.
    """
    thinks = before.rstrip().endswith("<think>")  # the prompt begins the thought
    thought = ("" if thinks else "<think>\n") + f"{PROBE}\n</think>\n\n{PROBE}"
    return [thought] if thinks else [PROBE, thought] if "</think>" in template else [PROBE]


def check_reply(format: Format, tokenizer: Tokenizer, role: str) -> None:
    """Check that a chat template can continue a conversation after a message of a role.

    Raises:
      ValueError: it leaves the message out, refuses its role, or changes earlier turns.
    """
    probe = "a result"
    if probe not in tokenizer.decode(format.reply([Message(role, probe)], False)):
        raise ValueError(
            f"the chat template leaves out a message of the role {role!r}, so the model would never read a result; choose a "
            "dialect within the text (tags), or another role"
        )


@contextlib.contextmanager
def naming(path: Path | None):
    """Prefix the message of a ValueError with the name of a file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from None


def spans(task: Task) -> list[tuple[str, bool]]:
    """Split a worked solution into pieces `(text, is_forced)`, by the forced spans of
    `task.data["forced"]`.
    """
    found, at = [], 0
    for start, end in [*sorted(task.data.get("forced", ())), (len(task.solution),) * 2]:
        if not at <= start <= end <= len(task.solution):
            raise ValueError(f"task {task.id!r}: forced span ({start}, {end}) overlaps another or leaves the solution")
        found += [(task.solution[at:start], False), (task.solution[start:end], True)]
        at = end
    return [(text, is_forced) for text, is_forced in found if text]


# --- messages ---

# Private-use characters that mark parts of a message's content, so that the rendered
# text shows which parts the template did not write: OPEN and CLOSE around tokens to
# encode as plain characters, FORCED and GIVEN around forced text.
OPEN, CLOSE, FORCED, GIVEN = "\ue000", "\ue001", "\ue002", "\ue003"
MARKED = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}|{FORCED}([^{FORCED}{GIVEN}]*){GIVEN}|[{OPEN}{CLOSE}{FORCED}{GIVEN}]")


def encode_chat(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Message | Mapping[str, Any]],
    add_generation_prompt: bool = False,
    **arguments,
) -> tuple[list[int], list[bool]]:
    """Encode a conversation, and mark the tokens to train on: the contents of the
    assistant's messages, each with the token that ends its turn.

    Each turn of the assistant is encoded separately from the text before it, as when it
    was sampled. If a template drops parts of earlier turns (Qwen3 drops their
    reasoning), they are dropped here too, and not trained on. A content may be a list
    of `(text, is_forced)`: forced text is encoded as text from outside, and not trained
    on.

    Raises:
      ValueError: the template fails, changes the prompt of an earlier turn, or ends a
        turn without an eos token.
    """
    messages = [_guarded(_plain(m), tokenizer) for m in messages]
    arguments = special_names(tokenizer) | arguments
    text = render(template, messages, add_generation_prompt, **arguments)
    cuts = []
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(template, messages[:n], True, **arguments)
            if not text.startswith(before):
                raise ValueError(
                    f"the chat template renders what stands before message {n} differently with and without that message, so "
                    "no prompt of a sampler can be trained on; split the conversation, or use a template that appends only"
                )
            cuts.append(len(before))
    ids, _ = _encode_guarded(tokenizer, text[: cuts[0]] if cuts else text)
    trainable = [False] * len(ids)
    for start, end in itertools.pairwise([*cuts, len(text)]):
        piece, forced = _encode_guarded(tokenizer, text[start:end], continues=True)
        last = first_end(tokenizer, piece)
        ids += piece
        trainable += [i <= last and not is_forced for i, is_forced in enumerate(forced)]
    return ids, trainable


def special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """Collect the special tokens' texts that a template reads from a tokenizer."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_ids[0], "pad_token": tokenizer.pad_id}
    return {name: tokenizer.token_text(i) for name, i in ids.items() if i is not None}


def first_end(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """Return the index of the first eos token, which ends the assistant's turn.

    Raises:
      ValueError: there is none.
    """
    for i, token in enumerate(ids):
        if token in tokenizer.eos_ids:
            return i
    raise ValueError(
        f"the chat template ends an assistant's turn with none of the tokenizer's eos tokens "
        f"({', '.join(map(tokenizer.token_text, tokenizer.eos_ids))}), so a sampler would never stop there; add the "
        "right one: text.eos=('...',)"
    )


def _plain(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    return {"role": message.role, "content": message.content} if isinstance(message, Message) else dict(message)


def _guarded(message: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Put marks around the forced parts of a message, and around tokens that the
    message may not contain.
    """
    content = message["content"]
    pieces = [(content, False)] if isinstance(content, str) else content
    if not all(isinstance(piece, tuple) for piece in pieces):
        raise ValueError(f"a message's content got {type(content).__name__}; allowed: str (text only)")
    words = [*tokenizer.special] + ([] if message["role"] == "assistant" else [*tokenizer.added])
    longest_first = "|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)"
    barred = {(tokenizer.special | tokenizer.added)[word] for word in words} if tokenizer.rewrites else set()

    def guard(part):
        """Mark a token, or a text that a normalizer turns into one."""
        hidden = barred and barred.intersection(tokenizer.encode(part, continues=True))
        hidden = hidden and hidden.difference(tokenizer.encode(part, added=False, continues=True))  # drops the unknown token
        return f"{OPEN}{part}{CLOSE}" if hidden or part in words else part

    def guarded(text):
        parts = re.split(f"({longest_first}|[{OPEN}{CLOSE}{FORCED}{GIVEN}])", text)  # also at forged marks
        return "".join(part if i % 2 and part not in words else guard(part) for i, part in enumerate(parts))

    content = "".join(f"{FORCED}{text}{GIVEN}" if is_forced else guarded(text) for text, is_forced in pieces)
    return {**message, "content": content}


def _encode_guarded(tokenizer: Tokenizer, text: str, continues: bool = False) -> tuple[list[int], list[bool]]:
    """Encode rendered text, with marked parts as plain characters; return the ids, and
    for each whether it is forced.

    A mark without its partner is dropped.
    """
    ids, forced = [], []
    for i, part in enumerate(MARKED.split(text)):
        if part:
            piece = tokenizer.encode(part, added=i % 3 == 0, continues=continues or bool(ids))
            ids += piece
            forced += [i % 3 == 2] * len(piece)
    return ids, forced
