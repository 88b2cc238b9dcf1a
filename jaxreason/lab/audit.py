"""The audit log: one line of JSON for each request of a client, and for each
reservation and its end.

The log is also the ledger of the budget: costs in it stay spent, even if the folder of
a sweep is deleted. A sweep begins after its line is on the disk, so no sweep began from
a last line that is cut off, and that line is dropped.
"""

from __future__ import annotations

import contextvars
import errno
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LONGEST_TEXT = 2000  # characters of a text in a line
FIELDS: dict[str, dict[str, type]] = {  # of the lines that are the ledger
    "reserve": {"sweep": str, "reserved": dict},
    "ended": {"sweep": str, "used": dict, "status": str, "time": str},
}

client: contextvars.ContextVar[str] = contextvars.ContextVar("client", default="unknown")  # name and version of who asks


class Audit:
    """The log in a folder. One process writes it: the server has locked the folder.

    Raises:
      ValueError: a line other than the last is damaged, so the spending is unknown.
    """

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        self.lines: list[dict] = []
        if path.exists():
            whole = self._read()
            if whole < path.stat().st_size:
                os.truncate(path, whole)
                self.write("repaired", dropped="the last line, which was cut off")

    def _read(self) -> int:
        """Read all lines; return the bytes of those that end."""
        whole = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            try:
                found = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                found = None
            if isinstance(found, dict) and is_line(found):
                self.lines.append(found)
                whole += len(line)
            elif line.endswith(b"\n"):
                raise ValueError(
                    f"line {number} of {self.path} is damaged, so what is spent is not known; mend the line, or choose another "
                    "--folder"
                )
        return whole

    def write(self, event: str, **fields: Any) -> None:
        """Append a line, and wait until it is on the disk.

        Raises:
          OSError: it could not be written; the file is as it was.
        """
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, "client": client.get()} | short(fields)
        with self._lock, self.path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                written = file.write(json.dumps(line).encode() + b"\n")
                if written < len(json.dumps(line)) + 1:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
            self.lines.append(line)


def is_line(found: Mapping) -> bool:
    """Return whether a line has the fields that the budget is read from."""
    fields = FIELDS.get(str(found.get("event")), {"event": str})
    return all(isinstance(found.get(name), kind) for name, kind in fields.items())


def short(value: Any) -> Any:
    """Return a value of JSON with its texts cut to a length that a log can bear."""
    if isinstance(value, Mapping):
        return {str(name)[:200]: short(inside) for name, inside in list(value.items())[:200]}
    if isinstance(value, list | tuple):
        return [short(inside) for inside in value[:200]]
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"{value[:LONGEST_TEXT]}... ({len(value)} characters)"
    if isinstance(value, int) and abs(value) >= 10**18:
        return f"a number of {value.bit_length()} bits"
    return value if isinstance(value, str | bool | int | float) or value is None else str(value)[:LONGEST_TEXT]


def write_json(path: Path, value: Any) -> None:
    """Write a file of JSON: a reader finds the old file or the new one."""
    unfinished = path.with_name(f".{path.name}.tmp")
    with unfinished.open("w", encoding="ascii") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
