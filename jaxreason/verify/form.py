"""A control, not a verifier of answers: it rewards the form alone, to measure how much
of a gain is form.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from jaxreason.types import Task, Verdict
from jaxreason.verify import pool

READ = 20_000  # characters from the end that a pattern is matched against


def format(
    open: str = "<think>",  # opening tag, exactly one; empty if the prompt wrote it
    close: str = "</think>",  # closing tag, exactly one, followed by some text
    pattern: str | None = None,  # regular expression to search for instead of the tags
    timeout_s: float = 2.0,  # CPU time per match
) -> Callable[[str, Task], Verdict]:
    """Reward 1.0 for exactly one `open`, then exactly one `close`, then some text; or
    for a match of `pattern` in the text.

    `correct` is always False, because the answer is not looked at. A pattern runs in a
    killable process for at most `timeout_s` of CPU time, because a careless one may
    never end. Reasons: form, no form, timeout, crashed.
    """
    if pattern is not None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"verifier 'format' got pattern {pattern!r}, which is not a regular expression: {error}") from None
        children = pool.shared("match", timeout_s=timeout_s)

    def verify(text: str, task: Task) -> Verdict:
        if pattern is None:
            return _verdict(_tagged(text, open, close))
        try:
            return _verdict(children.ask(pattern, text[-READ:]))
        except pool.Failed as failure:
            return Verdict(0.0, False, None, str(failure))

    return verify


def _tagged(text: str, open: str, close: str) -> bool:
    """Tell whether the text has one of each tag, in order. An empty `open` stands for
    one that the prompt wrote.
    """
    before, found, answer = text.partition(close)
    once = (not open or (text.count(open) == 1 and open in before)) and text.count(close) == 1
    return bool(found and once and answer.strip())


def _verdict(matches: bool) -> Verdict:
    return Verdict(1.0 if matches else 0.0, False, None, "form" if matches else "no form")
