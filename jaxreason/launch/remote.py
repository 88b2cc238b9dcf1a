"""Scripts that run on the machines, as text for bash: install, start, look, stop.

Each can be run again: an install that is complete is left alone, and a run that is
alive is not started twice. Everything of a launch is in `~/jaxreason-launch/NAME`.
"""

from __future__ import annotations

import base64
import binascii
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxreason.launch.fleets import job

ROOT = "jaxreason-launch"  # in the home folder of the machine
CUT_SHORT = job.STOPPED  # exit code of a run that its machine asked to stop, and that has saved itself
MARK = "jaxreason-launch"  # around what `look` prints
PYTHON = "3.12"  # version that is installed where there is none that jaxreason can use
MOST = 200_000  # bytes of a log that are read at once
FINISHED, RUNNING, STOPPED, NEVER = "finished", "running", "stopped", "never started"


def folder_of(name: str) -> str:
    return f"{ROOT}/{name}"


def archive_of(name: str, digest: str) -> str:
    """Return where the archive is sent to: in the home folder, which scp can name."""
    return f"{ROOT}-{name}-{digest}.tar.gz"


def install(name: str, digest: str, extra: str) -> str:
    """Unpack the archive and install the package, unless this was done.

    A marker of the extras is written last, so an install that was cut off, or had
    others, is done again.
    """
    home, archive = shlex.quote(folder_of(name)), shlex.quote(archive_of(name, digest))
    source = f"{home}/source-{digest}"
    marker = f"{source}/.installed-{extra}"
    return "\n".join(
        [
            "set -e",
            f"cd; if [ -f {marker} ]; then echo installed already; exit 0; fi",
            f"rm -rf {source}; mkdir -p {source}",
            f"tar -xzf {archive} -C {source}",
            "python=$(command -v python3.13 || command -v python3.12 || command -v python3.11 || true)",
            f"has_pip() {{ {home}/venv/bin/python -m pip --version > /dev/null 2>&1; }}",
            f'if ! has_pip && [ -n "$python" ]; then rm -rf {home}/venv; $python -m venv {home}/venv > /dev/null || true; fi',
            # Some images have only an older Python, or lack its venv; uv brings
            # a Python along.
            "if ! has_pip; then",
            f"rm -rf {home}/venv; PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv",
            f"python3 -m uv venv --quiet --seed --python {PYTHON} {home}/venv",
            "fi",
            f"{home}/venv/bin/python -m pip install --quiet --upgrade pip",
            f"{home}/venv/bin/python -m pip install --quiet -e {source}'[{extra}]'",
            f"touch {marker}",
            "echo installed",
        ]
    )


def start(name: str, digest: str, command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Start a command in the background, in the source's folder, unless it runs or has
    finished there.

    Its output goes to `log` (that of earlier starts to `earlier.log`), its process id
    to `pid`, and its exit code to `code`. A run that `stop` asked to stop has exit code
    0, and one that its machine asked to stop has CUT_SHORT.
    """
    home = folder_of(name)
    words = shlex.join(["../venv/bin/python", *command])
    exports = "".join(f"export {key}={shlex.quote(value)}; " for key, value in environment.items())
    code = f"code=$?; [ $code = {CUT_SHORT} ] && [ -f ../asked_to_stop ] && code=0; echo $code > ../code.part"
    # `stop` signals the whole process group, and this shell must live to write the
    # code.
    inner = f"trap : TERM; {exports}{words} >> ../log 2>&1; {code}; mv ../code.part ../code"
    return "\n".join(
        [
            "set -e",
            f"cd; cd {shlex.quote(home)}",
            'if [ -f pid ] && [ ! -f code ] && kill -0 "$(cat pid)" 2>/dev/null; then echo runs already; exit 0; fi',
            "rm -f code asked_to_stop; if [ -f log ]; then cat log >> earlier.log; rm log; fi",
            f"cd source-{digest}",
            f"setsid nohup bash -c {shlex.quote(inner)} > /dev/null 2>&1 < /dev/null &",
            "echo $! > ../pid",
            "echo started",
        ]
    )


def look(name: str, offset: int, most: int = MOST) -> str:
    """Print the state of the run, the size of its log, and the log from a byte on, on
    one line between marks: what a machine prints at a login stands before it, and the
    bytes of the log arrive as they are.
    """
    home = shlex.quote(folder_of(name))
    return "\n".join(
        [
            f"cd; cd {home} 2>/dev/null || {{ echo {shlex.quote(f'{MARK}|{NEVER}|0||')}; exit 0; }}",
            'if [ -f code ]; then state="finished $(cat code)"',
            'elif [ -f pid ] && kill -0 "$(cat pid)" 2>/dev/null; then state=running',
            'elif [ -f pid ]; then state=stopped; else state="never started"; fi',
            "[ -f log ] || touch log",
            f"printf '%s|' {MARK} \"$state\" \"$(wc -c < log | tr -d ' ')\"",
            f"tail -c +{offset + 1} log | head -c {most} | base64 | tr -d '\\n'; echo '|'",
        ]
    )


def stop(name: str) -> str:
    """Ask the run to save itself and end, as Ctrl-C does; a second call ends it."""
    home = shlex.quote(folder_of(name))
    ask = 'touch asked_to_stop && kill -TERM -- "-$(cat pid)" && echo asked to stop'
    return f"cd; cd {home} && [ -f pid ] && [ ! -f code ] && {ask} || echo nothing runs"


def await_end(name: str, timeout_s: int = 60) -> str:
    """Wait until no process of the run is left, and end those that don't end by
    themselves. A run whose other hosts have ended can't go on.
    """
    home = shlex.quote(folder_of(name))
    return "\n".join(
        [
            f"cd; cd {home} 2>/dev/null || exit 0",
            "[ -f pid ] && [ ! -f code ] || exit 0",
            f'for i in $(seq {timeout_s}); do kill -0 "$(cat pid)" 2>/dev/null || exit 0; [ -f code ] && exit 0; sleep 1; done',
            'kill -KILL -- "-$(cat pid)" 2>/dev/null; exit 0',
        ]
    )


class Seen(NamedTuple):
    """The state and log that `look` printed."""

    state: str  # one of the four above
    code: int | None  # exit code of a finished run
    size: int  # bytes of the log
    piece: bytes  # of the log


SEEN = re.compile(rf"{MARK}\|(?:({RUNNING}|{STOPPED}|{NEVER})|{FINISHED} (-?\d+))\|(\d+)\|([A-Za-z0-9+/=]*)\|")


def read(out: str) -> Seen:
    """Read the output of `look`.

    Raises:
      ValueError: it is something else, or was cut off.
    """
    if (found := SEEN.search(out)) is None:
        raise ValueError(f"the machine answered {out[:200]!r}")
    state, code, size, piece = found.groups()
    try:
        return Seen(state or FINISHED, None if code is None else int(code), int(size), base64.b64decode(piece, validate=True))
    except binascii.Error:
        raise ValueError(f"the machine answered {out[:200]!r}") from None


def whole_lines(seen: Seen, offset: int, most: int = MOST) -> bytes:
    """Return the part of the log, read from a byte on, that can be shown: to the end of
    a line, unless the run has ended or the line is very long.
    """
    if (seen.state != RUNNING and offset + len(seen.piece) >= seen.size) or (len(seen.piece) >= most and b"\n" not in seen.piece):
        return seen.piece
    return seen.piece[: seen.piece.rfind(b"\n") + 1]
