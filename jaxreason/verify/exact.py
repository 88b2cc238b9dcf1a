"""Verifier that compares texts for equality."""

from __future__ import annotations

from collections.abc import Callable

from jaxreason.types import Task, Verdict

SHOWN = 200  # characters of an answer that a verdict keeps
# Characters without width, which a reader can't see: between digits they would make
# two numbers of one.
UNSEEN = dict.fromkeys([0xAD, *range(0x200B, 0x2010), *range(0x2060, 0x2065), 0xFEFF], "")
BAD_KEY = "bad key"  # the reason for every text if no text could equal the key


def answer_after(text: str, marker: str = "", end: str = "") -> str | None:
    """Return the text after the last `marker`, up to `end` if present, stripped; None
    without the marker.
    """
    start = text.rfind(marker) if marker else 0
    if start < 0:
        return None
    stop = text.find(end, start + len(marker)) if end else -1
    return text[start + len(marker) : stop if stop >= 0 else None].strip()


def verdict(correct: bool, parsed: str | None, reason: str = "") -> Verdict:
    """Make a verdict that rewards correctness and nothing else."""
    shown = None if parsed is None else parsed[:SHOWN]
    return Verdict(1.0 if correct else 0.0, correct, shown, reason or ("right" if correct else "wrong"))


def exact(
    marker: str = "",  # the answer follows its last occurrence; empty: the whole text
    end: str = "",  # the answer ends before it; empty: at the end of the text
) -> Callable[[str, Task], Verdict]:
    """Compare the text after the last `marker` with `task.answer`, or with any of
    `task.data["answers"]` where a task has several.

    Reasons: right, wrong, no answer, bad key (no text could be equal: the key is empty,
    has white space at an end, or contains `marker` or `end`).
    """

    def verify(text: str, task: Task) -> Verdict:
        keys = (task.answer, *task.data.get("answers", ()))
        if not any(key and answer_after(f"{marker}{key}{end}", marker, end) == key for key in keys):
            return verdict(False, None, BAD_KEY)
        answer = answer_after(text, marker, end)
        if not answer:
            return verdict(False, None, "no answer")
        return verdict(answer in keys, answer)

    return verify
