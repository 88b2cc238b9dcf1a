"""Run commands of other programs, or print them.

A command is a list of words, never text for a shell, so no quoting is ours except that
of the scripts in `remote`.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Sequence
from typing import NamedTuple

TIMEOUT_S = 900.0


class Result(NamedTuple):
    """Exit code and output of a command."""

    code: int  # 124: it did not end in time; 127: there is no such program
    out: str
    err: str

    @property
    def said(self) -> str:
        """Its last line of errors, else of output."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}"


class Shell(NamedTuple):
    """Runs commands. `looks` are commands that change nothing and cost nothing."""

    run: Callable[..., Result]  # (words, timeout_s=) -> Result
    look: Callable[..., Result]
    dry: bool = False


def run(words: Sequence[str], timeout_s: float = TIMEOUT_S) -> Result:
    """Run a command to its end, without input.

    The command has its own process group, so Ctrl-C ends the wait and not the command:
    half a creation of a machine would be worse than a whole one.
    """
    try:
        done = subprocess.run(
            list(words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            start_new_session=True,
        )
    except FileNotFoundError:
        return Result(127, "", f"{words[0]}: not installed")
    except subprocess.TimeoutExpired:
        return Result(124, "", f"{words[0]} did not end in {timeout_s:g} s")
    return Result(done.returncode, done.stdout, done.stderr)


def real() -> Shell:
    return Shell(run, run)


def printing(say: Callable[[str], None]) -> Shell:
    """Make a shell that prints what would be run, and runs nothing."""

    def show(words: Sequence[str], timeout_s: float = TIMEOUT_S) -> Result:
        say(shlex.join(words))
        return Result(0, "", "")

    return Shell(show, show, dry=True)
