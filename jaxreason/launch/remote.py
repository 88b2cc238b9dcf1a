"""Scripts that run on the machines, as text for bash: install, start, look, stop.

Each can be run again: an install that is complete is left alone, and a run that is
alive is not started twice. Everything of a launch is in `~/jaxreason-launch/NAME`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxreason.launch.fleets import job

ROOT = "jaxreason-launch"  # in the home folder of the machine
CUT_SHORT = job.STOPPED  # exit code of a run that its machine asked to stop, and that has saved itself
FINISHED, RUNNING, STOPPED, NEVER = "finished", "running", "stopped", "never started"


def folder_of(name: str) -> str:
    return f"{ROOT}/{name}"


def archive_of(name: str, digest: str) -> str:
    """Return where the archive is sent to: in the home folder, which scp can name."""
    return f"{ROOT}-{name}-{digest}.tar.gz"


def install(name: str, digest: str, extra: str) -> str:
    """Unpack the archive and install the package, unless this was done.

    A marker is written last, so an install that was cut off is done again.
    """
    home, archive = shlex.quote(folder_of(name)), shlex.quote(archive_of(name, digest))
    source = f"{home}/source-{digest}"
    return "\n".join(
        [
            "set -e",
            f"cd; if [ -f {source}/.installed ]; then echo installed already; exit 0; fi",
            f"rm -rf {source}; mkdir -p {source}",
            f"tar -xzf {archive} -C {source}",
            "python=$(command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3)",
            f"[ -x {home}/venv/bin/python ] || $python -m venv {home}/venv",
            f"{home}/venv/bin/python -m pip install --quiet --upgrade pip",
            f"{home}/venv/bin/python -m pip install --quiet -e {source}'[{extra}]'",
            f"touch {source}/.installed",
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


def look(name: str, offset: int, most: int = 200_000) -> str:
    """Print the state of the run, and its log from a byte on: two lines of state and
    size, then the text.
    """
    home = shlex.quote(folder_of(name))
    return "\n".join(
        [
            f"cd; cd {home} 2>/dev/null || {{ echo {shlex.quote(NEVER)}; echo 0; exit 0; }}",
            "if [ -f code ]; then echo finished $(cat code)",
            'elif [ -f pid ] && kill -0 "$(cat pid)" 2>/dev/null; then echo running',
            "elif [ -f pid ]; then echo stopped; else echo never started; fi",
            "[ -f log ] || touch log",
            "wc -c < log",
            f"tail -c +{offset + 1} log | head -c {most}",
        ]
    )


def stop(name: str) -> str:
    """Ask the run to save itself and end, as Ctrl-C does; a second call ends it."""
    home = shlex.quote(folder_of(name))
    ask = 'touch asked_to_stop && kill -TERM -- "-$(cat pid)" && echo asked to stop'
    return f"cd; cd {home} && [ -f pid ] && {ask} || echo nothing runs"


class Seen(NamedTuple):
    """The state and log that `look` printed."""

    state: str  # one of the four above
    code: int | None  # exit code of a finished run
    size: int  # bytes of the log
    text: str


def read(out: str) -> Seen:
    """Read the output of `look`.

    Raises:
      ValueError: it is something else, as when the machine printed a message first.
    """
    head, _, rest = out.partition("\n")
    size, _, text = rest.partition("\n")
    words = head.split()
    if head.startswith(FINISHED) and len(words) == 2 and words[1].lstrip("-").isdigit() and size.strip().isdigit():
        return Seen(FINISHED, int(words[1]), int(size), text)
    if head.strip() in (RUNNING, STOPPED, NEVER) and size.strip().isdigit():
        return Seen(head.strip(), None, int(size), text)
    raise ValueError(f"the machine answered {out[:200]!r}")
