"""From tasks and messages to token ids, with a mask of what may be trained on.

A `Format` is how one run talks to its model: `plain` (the question, then the model writes) or `chat` (a checkpoint's own
Jinja template). Training and sampling see the same ids: what the model writes is encoded by itself and appended as ids to
the prompt's, never re-tokenised with it. Text that comes from outside cannot smuggle in special tokens: those written
in a message are encoded as plain characters.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxreason.text.tokenizer import Tokenizer
from jaxreason.types import Message, Task


class Format(NamedTuple):
    """How tasks become token ids."""

    prompt: Callable[[Task], list[int]]
    """Ids up to where the model starts to write."""
    demonstration: Callable[[Task], tuple[list[int], list[bool]]]
    """Ids of prompt, solution and end, and which to train on: the solution and its end, but not the character spans of the
    solution that `task.data["forced"]` lists, such as tool output."""
    forced: Callable[[str], list[int]]
    """Ids of a text that the model is shown in the middle of its own, such as tool output."""
    template: str | None = None
    """The chat template, if there is one."""


# ---------------------------------------------------------------------------------------------------------- formats


def plain(tokenizer: Tokenizer) -> Format:
    """Make the format of a model without a chat template: bos (if there is one), the question, and the model writes on."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    forced = functools.partial(tokenizer.encode, special=False)

    def prompt(task):
        return start + forced(task.question)

    return Format(prompt, functools.partial(_demonstrate, prompt, forced, tokenizer.eos_ids[0]), forced)


def chat(tokenizer: Tokenizer, template: str, system: str = "", instruction: str = "{question}", **template_kwargs) -> Format:
    """Make the format of a chat model: the question is the user's turn, and the model writes the assistant's.

    Args:
      tokenizer: its eos ids must hold the token that ends a turn in this template.
      template: Jinja source, as from `load_template`.
      system: the system message; none is sent if empty (a template may then put in its own).
      instruction: the user's message; `{question}` in it stands for the question.
      **template_kwargs: what the template reads beyond messages, such as `enable_thinking=False`.

    Raises:
      ValueError: a template that does not work, or an instruction without `{question}`.
    """
    if "{question}" not in instruction:
        raise ValueError(f"instruction got {instruction!r}; it must contain {{question}}")
    # Which of the eos tokens ends a turn only the template knows. Asking it here also shows early that it works.
    probe = [Message("user", "?"), Message("assistant", "!")]
    ids, trainable = encode_chat(tokenizer, template, probe, **template_kwargs)
    end_of_turn = ids[max(i for i, t in enumerate(trainable) if t)]
    forced = functools.partial(tokenizer.encode, special=False)

    def prompt(task):
        # Not str.format: questions and instructions contain braces.
        messages = [Message("user", instruction.replace("{question}", task.question))]
        if system:
            messages.insert(0, Message("system", system))
        return encode_chat(tokenizer, template, messages, add_generation_prompt=True, **template_kwargs)[0]

    return Format(prompt, functools.partial(_demonstrate, prompt, forced, end_of_turn), forced, template)


def _demonstrate(prompt: Callable, encode: Callable, end_id: int, task: Task) -> tuple[list[int], list[bool]]:
    """Append a task's worked solution to its prompt; forced spans are encoded by themselves, as they are when sampling."""
    ids = list(prompt(task))
    trainable = [False] * len(ids)
    at = 0
    for start, end in [*sorted(task.data.get("forced", ())), (len(task.solution),) * 2]:
        if not at <= start <= end <= len(task.solution):
            raise ValueError(f"task {task.id!r}: forced span ({start}, {end}) overlaps another or leaves the solution")
        for text, train in ((task.solution[at:start], True), (task.solution[start:end], False)):
            piece = encode(text) if text else []
            ids += piece
            trainable += [train] * len(piece)
        at = end
    return [*ids, end_id], [*trainable, True]


# --------------------------------------------------------------------------------------------------------- messages

# Private-use characters put around special tokens that stand in a message's content, to tell them, in the rendered text,
# from those that the template wrote.
OPEN, CLOSE = "\ue000", "\ue001"


def encode_chat(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Message | Mapping[str, Any]],
    add_generation_prompt: bool = False,
    **template_kwargs,
) -> tuple[list[int], list[bool]]:
    """Encode a conversation; mark what the assistant wrote: its contents, each with the token that ends its turn.

    Each turn of the assistant is encoded apart from what stands before it, as when it was sampled. Where a template drops
    parts of earlier turns (Qwen3 drops their reasoning), they are dropped here too, and not trained on.

    Raises:
      ValueError: the template fails, changes the prompt of an earlier turn, or ends a turn with no eos token.
    """
    messages = [_guarded(_plain(m), tokenizer.special) for m in messages]
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_ids[0], "pad_token": tokenizer.pad_id}
    kwargs = {k: tokenizer.token_text(i) for k, i in names.items() if i is not None} | template_kwargs
    text = render(template, messages, add_generation_prompt, **kwargs)
    cuts = []
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(template, messages[:n], True, **kwargs)
            if not text.startswith(before):
                raise ValueError(
                    f"the chat template renders what stands before message {n} differently with and without that message, so "
                    "no prompt of a sampler can be trained on; split the conversation, or use a template that appends only"
                )
            cuts.append(len(before))
    ids = _encode_guarded(tokenizer, text[: cuts[0]] if cuts else text)
    trainable = [False] * len(ids)
    for start, end in itertools.pairwise([*cuts, len(text)]):
        piece = _encode_guarded(tokenizer, text[start:end])
        ends = [i for i, token in enumerate(piece) if token in tokenizer.eos_ids]
        if not ends:
            raise ValueError(
                f"the chat template ends an assistant's turn with none of the tokenizer's eos tokens "
                f"({', '.join(map(tokenizer.token_text, tokenizer.eos_ids))}), so a sampler would never stop there; add the "
                "right one: tokenizer._replace(eos_ids=...)"
            )
        ids += piece
        trainable += [i <= ends[0] for i in range(len(piece))]
    return ids, trainable


def _plain(message: Message | Mapping[str, Any]) -> dict[str, Any]:
    return {"role": message.role, "content": message.content} if isinstance(message, Message) else dict(message)


def _guarded(message: dict[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
    """Put marks around special tokens in what a message says."""
    if not isinstance(message["content"], str):
        raise ValueError(f"a message's content got {type(message['content']).__name__}; allowed: str (text only)")
    text = message["content"]
    if special:
        longest_first = sorted(special, key=len, reverse=True)
        text = re.sub("|".join(map(re.escape, longest_first)), lambda m: f"{OPEN}{m[0]}{CLOSE}", text)
    return {**message, "content": text}


def _encode_guarded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode rendered text; what stands between marks as plain characters. A mark that lost its partner is dropped."""
    ids = []
    for i, part in enumerate(re.split(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}|[{OPEN}{CLOSE}]", text)):
        if part:
            ids += tokenizer.encode(part, special=i % 2 == 0)
    return ids


# --------------------------------------------------------------------------------------------------------- templates


def load_template(folder: str | Path) -> str:
    """Read the chat template of a checkpoint: chat_template.jinja, or the entry of tokenizer_config.json.

    Raises:
      FileNotFoundError: it has none, as a base model.
    """
    folder = Path(folder)
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    template = json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.is_file() else None
    if isinstance(template, list):  # named templates; the others are for tools and retrieval
        template = {t["name"]: t["template"] for t in template}.get("default")
    if not template:
        raise FileNotFoundError(f"{folder} has no chat template; use the plain format, or write one to chat_template.jinja")
    return template


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote; renders as find where that is without it, so it does nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    # The environment that templates are written for: the settings and names of transformers' apply_chat_template.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def render(template: str, messages: Sequence[Message | Mapping[str, Any]], add_generation_prompt: bool, **template_kwargs) -> str:
    """Render a conversation to text; `add_generation_prompt` ends it where the assistant starts to write.

    Raises:
      ValueError: the template is not valid, or refuses these messages.
    """
    try:
        return _compiled(template).render(
            messages=[_plain(m) for m in messages], add_generation_prompt=add_generation_prompt, **template_kwargs
        )
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError, IndexError) as error:
        line = f" (line {error.lineno})" if getattr(error, "lineno", None) else ""
        raise ValueError(f"the chat template failed{line}: {error}; does it belong to this model and these roles?") from None
