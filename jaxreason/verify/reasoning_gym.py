"""Verifier of the tasks of reasoning-gym: each dataset scores its own answers.

Some datasets evaluate the answer by sympy or `eval`, so all scores are computed in
killable processes, in the sandbox where it can be had, and names that an expression has
no need of are refused there (see `child.guarded_eval`). Without the sandbox that bounds
accidents and tricks, no attackers; one line says so.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import sys
from collections.abc import Callable

from jaxreason.sandbox import bwrap
from jaxreason.types import Task, Verdict
from jaxreason.verify import pool
from jaxreason.verify.exact import BAD_KEY, SHOWN, answer_after, verdict

OPEN, CLOSE = "<answer>", "</answer>"
NEEDED = ("dataset", "options", "entry")


def reasoning_gym(
    marker: str = "",  # without answer tags, the answer follows its last occurrence; empty: the last line that is not empty
    partial: bool = False,  # whether the reward is the dataset's score, from 0 to 1; else 1 for a score of 1, and 0
    timeout_s: float = 5.0,  # CPU time per answer; then its child is killed
    processes: int = 2,  # maximum number of child processes
    memory_mb: int = 2048,  # address space of each child
    sandbox: str = "auto",  # "bwrap" refuses where it can't be had; "none" is the process alone
    max_chars: int = 10_000,  # longest answer that is scored; a longer one is wrong unless it equals the key
) -> Callable[[str, Task], Verdict]:
    """Score the answer by the dataset's own rule: correct is a score of 1. Four rules
    that accept wrong answers are made stricter (see `child.STRICTER`).

    The answer is the text in the last `<answer>...</answer>`; without one, the text
    after the last `marker`; without that, the last line that is not empty. An answer
    that equals the key is right without a child. Reasons: right, wrong, no answer, too
    long, bad key (it is empty), timeout, crashed, out of memory.

    Raises:
      ValueError: reasoning-gym is not installed, or the task is of another family.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("verifier 'reasoning_gym' needs reasoning-gym; pip install 'jaxreason[gym]'")
    if max_chars < 1:
        raise ValueError(f"verifier 'reasoning_gym' got max_chars={max_chars}; allowed: 1 or more")
    children = pool.shared("gym", processes, timeout_s, memory_mb, is_held(sandbox))

    def verify(text: str, task: Task) -> Verdict:
        if not set(NEEDED) <= task.data.keys():
            raise ValueError(
                f"verifier 'reasoning_gym' needs data 'dataset', 'options' and 'entry', which tasks of the family "
                f"'reasoning_gym' have; task {task.id!r} has {sorted(task.data)}"
            )
        dataset, options, entry = (task.data[name] for name in NEEDED)
        key = entry["answer"]
        if key is not None and not str(key).strip():
            return verdict(False, None, BAD_KEY)
        answer = find_answer(text, marker)
        if not answer:
            return verdict(False, None, "no answer")
        if key is not None and answer == str(key).strip():
            return verdict(True, answer)
        if len(answer) > max_chars:
            return verdict(False, answer, "too long")
        try:
            score = children.ask("score", dataset, json.dumps(dict(options), sort_keys=True), entry, answer)
        except pool.Failed as failure:
            return Verdict(0.0, False, answer[:SHOWN], str(failure))
        return _verdict(score, answer, partial)

    return verify


def is_held(sandbox: str) -> bool:
    """Tell whether scores are computed in the sandbox; say so once if they should be
    and can't.

    Raises:
      ValueError: an unknown name, or `bwrap` where it can't be had.
    """
    if sandbox not in ("auto", "bwrap", "none"):
        raise ValueError(f"verifier 'reasoning_gym' got sandbox={sandbox!r}; allowed: auto, bwrap, none")
    if sandbox == "bwrap":
        bwrap.check("bwrap")
    if sandbox == "auto" and (why := bwrap.refusal()):
        _say(f"reasoning-gym evaluates answers outside the sandbox: {why.split('; ')[0]}")
        return False
    return sandbox != "none"


@functools.cache
def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def find_answer(text: str, marker: str = "") -> str:
    """Return the text in the last answer tags, else after the last marker, else the
    last line that is not empty; "" if there is none.
    """
    close = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, close) if close >= 0 else -1
    if start >= 0:
        return text[start + len(OPEN) : close].strip()
    if marker and (after := answer_after(text, marker)) is not None:
        return after
    return text.strip().rpartition("\n")[2].strip()


def _verdict(score: float, answer: str, partial: bool) -> Verdict:
    """Make a verdict of a score, which a dataset may set out of range."""
    correct = score == 1.0
    within = min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0
    return Verdict(within if partial else float(correct), correct, answer[:SHOWN], "right" if correct else "wrong")
