"""A table at the bottom of a terminal, below all other output.

The table is drawn below the cursor, and the cursor returns to where it was. Whatever
else is written to the terminal, by a library, the compiler or a signal handler, appears
above the table and stays: the next drawing only moves the table down. The cursor is
never hidden, so a process that dies leaves nothing to restore. (`rich.live` draws above
the cursor, and erases as many lines as the table has, whoever wrote them.)
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TextIO

EVERY_S = 0.25  # between two drawings
ERASE = "\x1b[J"  # from the cursor to the end of the screen


def frame(lines: Sequence[str]) -> str:
    """Return the characters that draw lines below the cursor and return to it.

    Index (`ESC D`) scrolls the screen if necessary and stays in the column, so that the
    cursor may be in the middle of a line that somebody else has begun.
    """
    n = len(lines)
    room = "\x1bD" * n + f"\x1b[{n}A" if n else ""
    return "".join([ERASE, room, "\x1b7", *("\r\n" + line for line in lines), "\x1b8"])


class Live:
    """A table that a thread draws anew. `lines()` returns it, one string per line, none
    wider than the terminal.
    """

    def __init__(self, file: TextIO, lines: Callable[[], list[str]]):
        self._file, self._lines, self._lock, self._ended = file, lines, threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="live table", daemon=True)
        self._before: dict[str, Above] = {}

    def start(self) -> None:
        """Draw the table until `stop`, and erase it before anything that Python prints
        to the terminal.
        """
        for name in ("stdout", "stderr"):
            file = getattr(sys, name)
            if file is not None and file.isatty():
                self._before[name] = Above(file, self.erase)
                setattr(sys, name, self._before[name])
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(EVERY_S):
            self.draw()

    def draw(self) -> None:
        with self._lock:
            if not self._ended.is_set():
                self._write(frame(self._lines()))

    def erase(self) -> None:
        """Erase the table until the next drawing."""
        with self._lock:
            if not self._ended.is_set():
                self._write(ERASE)

    def say(self, text: str) -> None:
        """Print a line above the table."""
        with self._lock:
            self._write(f"{ERASE}{text}\n")
            self.draw()

    def stop(self) -> None:
        """Leave the last table on the screen, with the cursor below it."""
        for name, above in self._before.items():
            if getattr(sys, name) is above:
                setattr(sys, name, above.file)
        with self._lock:
            if not self._ended.is_set():
                self._ended.set()
                self._write(ERASE + "".join(f"{line}\n" for line in self._lines()))
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a terminal that is gone must not end the run
            self._file.write(text)
            self._file.flush()


class Above:
    """A text file on the terminal, printed to above the table."""

    def __init__(self, file: TextIO, erase: Callable[[], None]):
        self.file, self.erase = file, erase

    def write(self, text: str) -> int:
        self.erase()
        return self.file.write(text)

    def writelines(self, lines) -> None:
        self.erase()
        self.file.writelines(lines)

    def __getattr__(self, name: str):
        return getattr(self.file, name)
