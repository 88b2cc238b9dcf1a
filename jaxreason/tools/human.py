"""A person as a tool: the model asks, and somebody answers.

At the terminal the question is printed and a line is read; after a question without an
answer, Enter shows the next one. Unattended, each question is
a file `NUMBER.question` in a folder, and the answer is whatever somebody (or a program)
writes into `NUMBER.answer` beside it. Without an answer in time the model reads that
nobody answered, and goes on.
"""

from __future__ import annotations

import itertools
import os
import select
import sys
import threading
import time
import uuid
from pathlib import Path

from jaxreason.tools.interface import LONGEST_S, Tool, ToolError, stateless

POLL_S = 0.2  # between two looks for an answer
NOBODY = "nobody answered"


def human(
    folder: str | None = None,  # folder of questions and answers, for runs without a terminal; None: ask at the terminal
    timeout_s: float = 300.0,  # seconds to wait for an answer
    as_name: str = "human",  # as the model calls it
) -> Tool:
    """Ask a person, at the terminal or through files in a folder.

    Raises:
      ValueError: a time-out that is not above 0, a folder that can't be written, or no
        folder and no terminal.
    """
    if not 0 < timeout_s <= LONGEST_S:
        raise ValueError(f"tool 'human': timeout_s got {timeout_s}; allowed: seconds above 0, at most {LONGEST_S:g}")
    if folder is None and not sys.stdin.isatty():
        raise ValueError("tool 'human': there is no terminal to ask at; set folder=..., for questions and answers in files")
    call = through_files(Path(os.path.expanduser(folder)), timeout_s) if folder is not None else at_terminal(timeout_s)
    return Tool(as_name, "Ask a person.", stateless(call), {"question": "what you want to know"}, timeout_s, keeps_time=True)


def through_files(folder: Path, timeout_s: float):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"tool 'human': folder {folder} can't be made: {error.strerror}; choose another") from None
    if not os.access(folder, os.W_OK):
        raise ValueError(f"tool 'human': folder {folder} can't be written; choose another")
    numbers, run = itertools.count(), uuid.uuid4().hex[:8]

    def call(question: str) -> str:
        path = folder / f"{run}-{next(numbers):05d}.question"
        written = path.with_suffix(".writing")
        written.write_text(question, encoding="utf-8", errors="replace")
        written.rename(path)  # whoever watches the folder never reads half a question
        try:
            return wait_for(path.with_suffix(".answer"), timeout_s)
        finally:
            path.unlink(missing_ok=True)  # nobody should answer a question that is no longer open

    return call


def wait_for(path: Path, timeout_s: float) -> str:
    """Return the text of a file once it has some, and has not grown for a moment."""
    end_s, before = time.monotonic() + timeout_s, ""
    while time.monotonic() < end_s:
        time.sleep(min(POLL_S, timeout_s))
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if text.strip() and text == before:
            return text.strip()
        before = text
    raise ToolError(NOBODY)


def at_terminal(timeout_s: float):
    lock = threading.Lock()  # one question at a time
    late: list[str] = []  # the last question, if it had no answer: the next line belongs to it

    def call(question: str) -> str:
        end_s = time.monotonic() + timeout_s
        if not lock.acquire(timeout=timeout_s):  # the person is busy with another rollout's question
            raise ToolError(NOBODY)
        try:
            line = ask(question, end_s, late)
        finally:
            lock.release()
        if not line.strip():
            raise ToolError(NOBODY)
        return line.strip()

    return call


def ask(question: str, end_s: float, late: list[str]) -> str:
    """Ask a question at the terminal; return the line that answers it, or "".

    After a question without an answer, the person's next line is never taken for the
    answer of another question: it may be half typed. So is no line that came earlier.
    """
    from jaxreason.runtime.terminal import visible

    if late and read_line(end_s) is None:
        return ""
    late.clear()
    while read_line(0.0):
        pass
    left_s = max(0.0, end_s - time.monotonic())
    print(f"\nthe model asks: {visible(question)}\nyour answer ({left_s:.0f} s): ", end="", flush=True)
    line = read_line(end_s)
    if line is None:
        late.append(question)
        print("\ntoo late; press Enter for the next question", flush=True)
    return line or ""


def read_line(end_s: float) -> str | None:
    """Read a line of the standard input, "" at its end; None if there is none by
    `end_s`.
    """
    ready, _, _ = select.select([sys.stdin], [], [], max(0.0, end_s - time.monotonic()))
    return sys.stdin.readline() if ready else None
