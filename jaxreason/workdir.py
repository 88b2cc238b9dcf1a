"""The folder of a run: it holds one config, and one run at a time works in it.

A change of the config that leaves the maths alone is said and allowed; any other is refused, unless it is accepted. The lock is
the file `lock`: the system's own, which ends with the process, and for file systems whose locks do not reach other hosts a
process that touches it. What a lock says of a process that has died is told and taken over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from jaxreason.options import read_object

RESUME = ("auto", "must", "never")
# Fields of a config that decide when something is written or measured, or how the same sums are split.
SAME_MATHS = re.compile(
    r"(log|checkpoint|evaluate|sharding)\."
    r"|sampler\.(slots|chunk_tokens|prompts_per_prefill|prefill_tokens|prompt_rows)$"
    r"|model\.(scan_layers|remat|attention)$"
    r"|[^.]+\.(microbatches|log_every|evaluate_every|offload_reference|max_skipped)$"
)
WRITTEN_OVER = ("config.json", "lock", "tensorboard")  # what a run finds of one before and neither replaces nor checks itself
BEAT_S = 10.0  # how often a run touches its lock


def is_done(folder: Path) -> bool:
    summary = folder / "summary.json"
    return summary.is_file() and json.loads(summary.read_text())["done"]


def begun(folder: Path, today: str) -> str | None:
    """The date on which the run in a folder began, as its config recorded it: today, if there is none."""
    path = folder / "config.json"
    section = read_object(path).get("text") if path.is_file() else {"date": today}
    return section.get("date") if isinstance(section, dict) else None


def check(folder: Path, text: str, *, resume: str, accept_config_change: bool, say: Callable[[str], None]) -> None:
    """Raise ValueError if a run of the config `text` may not go on, or start, in `folder`."""
    saved = [path.name for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    if resume == "never" and saved:
        raise ValueError(f"{folder} holds checkpoints, and --resume=never; choose another --workdir, or --resume=auto")
    if resume == "must" and not saved:
        raise ValueError(f"{folder} holds no checkpoint, and --resume=must; give the --workdir of a run, or --resume=auto")
    path = folder / "config.json"
    if path.is_file():
        changed = differences(json.loads(path.read_text()), json.loads(text))
        refused = [line for name, line in changed.items() if not SAME_MATHS.match(name)]
        if refused and not accept_config_change:
            more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
            raise ValueError(
                f"{folder} holds a run of another config ({'; '.join(refused[:3])}{more}); choose another --workdir, or "
                "--accept_config_change to go on with this one"
            )
        for line in changed.values():
            say(f"config changed: {line}")
    if is_done(folder):
        raise ValueError(f"the run in {folder} is finished; choose another --workdir")


def differences(there: dict, here: dict) -> dict[str, str]:
    """What to say of each field that two configs do not have alike, by its name."""
    there, here = flat(there), flat(here)
    names = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    return {name: f"{name}: {there.get(name, 'absent')} there, {here.get(name, 'absent')} here" for name in names}


def flat(tree, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: value for name, branch in tree.items() for key, value in flat(branch, f"{prefix}{name}.").items()}


def lock(folder: Path, say: Callable[[str], None]) -> Callable[[], None]:
    """Take the lock of a folder; return what gives it back.

    Raises:
      ValueError: another run has it.
    """
    path = folder / "lock"
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  (open for as long as the run)
    file.seek(0)
    holder = file.read().strip()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = holder and f"host {socket.gethostname()}" not in holder and beats(path, say)
    except BlockingIOError:
        held = True
    if held:
        file.close()
        raise ValueError(f"{folder} is in use by {holder}; wait for it or stop it, or choose another --workdir")
    if holder:
        say(f"the lock of {folder} was left by {holder}, which has died; taking it over")
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    ended = threading.Event()

    def beat():
        while not ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a disk that is gone for a while
                os.utime(file.fileno())

    threading.Thread(target=beat, daemon=True).start()

    def give_back() -> None:
        ended.set()
        with contextlib.suppress(OSError):  # then the next run finds it, and that its process has ended
            file.truncate(0)
        file.close()

    return give_back


def beats(path: Path, say: Callable[[str], None]) -> bool:
    """Whether somebody on another host touches a lock: watched, since clocks of hosts differ."""
    before = path.stat().st_mtime_ns
    say(f"{path} is of another host; watching for {2.5 * BEAT_S:.0f} s whether its run is alive ...")
    time.sleep(2.5 * BEAT_S)
    return path.stat().st_mtime_ns != before
