"""Build the hints of a source."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxreason.options import unknown_name_message
from jaxreason.sources import hints as hints_
from jaxreason.types import Prompted


def make_hints(
    kind: str,
    text: str | None,
    tokens: int | None,
    *,
    tasks: Sequence[Prompted],
    prompt: Callable,
    longest_prompt: int,
    completion: int,
    share: int,
) -> hints_.Hints | None:
    """Make the hints of a source whose tasks have prompts of at most `longest_prompt`
    tokens and attempts of `completion`, `share` of which follow one copy of a prompt.

    Raises:
      ValueError: an unknown kind, fields without a hint, a text that lacks one of its
        two parts or that the tokenizer can't encode, or no task with a hint.
    """
    if kind not in hints_.KINDS:
        raise ValueError(unknown_name_message("hint", kind, hints_.KINDS))
    if kind == "none":
        if text is not None or tokens is not None:
            raise ValueError(
                f"source got hint_text={text!r}, hint_tokens={tokens} without a hint; allowed: None, or set source.hint"
            )
        return None
    text = hints_.TEXTS[kind] if text is None else text
    if any(part not in text for part in ("{question}", "{hint}")):
        raise ValueError(f"source.hint_text got {text!r}; it must contain {{question}} and {{hint}}")
    if tokens is not None and tokens < 1:
        raise ValueError(f"source.hint_tokens got {tokens}; allowed: 1 or more, or None for as many as the hints need")
    made = hints_.Hints(kind, prompt, text, 0, 0)
    task, ids = tasks[0]
    try:
        added = len(hints_.with_hint(made, task, "")) - len(ids)
    except ValueError as error:
        raise ValueError(f"source.hint_text got {text!r}, which the tokenizer can't encode: {error}") from None
    if kind in ("answer", "solution"):
        given = [(t, getattr(t, kind)) for t, _ in tasks]
        if not any(hint for _, hint in given):
            raise ValueError(f"source.hint got {kind!r}, but no task has one; allowed: {others(kind)}")
        if tokens is None:
            tokens = max(len(hints_.with_hint(made, t, hint)) - len(p.prompt) for p, (t, hint) in zip(tasks, given, strict=True))
    tokens = added + completion if tokens is None else tokens
    tokens = max(tokens, 1)
    return made._replace(tokens=tokens, columns=(share - 1) * longest_prompt + share * tokens)


def others(kind: str) -> str:
    return ", ".join(other for other in hints_.TEXTS if other != kind)
