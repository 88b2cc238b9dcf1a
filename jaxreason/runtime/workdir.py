"""The folder of a run. It belongs to one config, and one run at a time may use it.

A config change that leaves the maths alone is reported and allowed. Any other change is
refused, unless the user accepts it. The file `lock` is locked with `flock`, which the
system releases when the process dies. Some file systems don't share these locks between
hosts, so the run also touches the file regularly. If the holder of a lock has died, the
next run reports it and takes the lock over.

A folder that once had checkpoints never starts anew by itself. Its old contents are
moved aside, never removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxreason.runtime.bucket import is_url, remote

RESUME = ("auto", "must", "never")
# Config fields that only decide when something is written or measured, or how the same
# sums are split.
SAME_MATHS = re.compile(
    r"(log|checkpoint|evaluate|sharding)\."
    r"|sampler\.(slots|chunk_tokens|prompts_per_prefill|prefill_tokens|prompt_rows)$"
    r"|model\.(scan_layers|remat|attention)$"
    r"|[^.]+\.(microbatches|log_every|evaluate_every|offload_reference|max_skipped)$"
)
FOLDERS = ("checkpoints", "tensorboard")
# Left by a run.
RECORDS = (
    "checkpoints",
    "config.json",
    "summary.json",
    "metrics.jsonl",
    "rollouts.jsonl",
    "report.html",
    "view.html",
    "tensorboard",
    "tracker.json",
    "wandb",
)
POINTER = "bucket.json"  # in a mirror of a folder in a bucket: {"url": ...}, where its checkpoints are
WRITTEN_OVER = ("config.json", "lock", "tensorboard")  # existing files that must be writable when a run starts
BEAT_S = 10.0  # interval at which a run touches its lock


def config_text(config) -> str:
    """Return the text of a config as written to `config.json`."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=list)


def is_done(folder: Path) -> bool:
    try:
        return (json_object(folder / "summary.json") or {}).get("done") is True
    except OSError:
        return False


def json_object(path: Path) -> dict | None:
    """Read the JSON object in a file; None if the file is missing or contains anything
    else.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes().decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def last_metrics(folder: Path, tail_bytes: int = 16_384) -> dict:
    """Return the newest value of each metric in the last bytes of a run's metrics; an
    empty dictionary if there are none.
    """
    found: dict = {}
    with contextlib.suppress(OSError), (folder / "metrics.jsonl").open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - tail_bytes))
        for line in file.read().splitlines():
            with contextlib.suppress(ValueError, RecursionError):  # the first may be cut, the last not yet whole
                value = json.loads(line)
                found |= value if isinstance(value, dict) else {}
    return found


def checkpoints_of(folder: Path) -> Any:
    """Return the folder of a run's checkpoints. That of a mirror is in the bucket, and
    has the methods of a `Path` (see `runtime.mirror`).
    """
    if (found := json_object(folder / POINTER)) is None:
        return folder / "checkpoints"
    return remote(found["url"]) / "checkpoints"


def saved_at(folder: Path) -> list[int]:
    """Return the steps of a run's checkpoints, complete or damaged, oldest first."""
    there = checkpoints_of(folder)
    named = [path for path in there.iterdir() if re.fullmatch(r"0|[1-9]\d*", path.name)] if there.is_dir() else []
    if "://" in str(there):  # a folder in a bucket has its name before it is complete
        return sorted(int(path.name) for path in named if (path / "commit_success.txt").is_file())
    return sorted(int(path.name) for path in named if path.is_dir())


def looks_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint has the files that every complete one has."""
    host = json_object(checkpoint / "host" / "metadata") or {}
    return "host" in host and (checkpoint / "state" / "_METADATA").is_file()


def continues(folder: Path) -> str:
    """Say from which step the same command continues, judging by the folder alone."""
    steps = saved_at(folder)
    return f"the same command continues from {f'step {steps[-1]}' if steps else 'the start'}"


def begun(folder: Path, today: str) -> str | None:
    """Return the date on which the run in a folder began, as its config recorded it;
    `today` if there is no recorded config.
    """
    there = recorded_config(folder, saved_at(folder), say=lambda line: None)
    section = {"date": today} if there is None else there.get("text")
    return section.get("date") if isinstance(section, dict) else None


def check(
    folder: Path,
    text: str,
    *,
    resume: str,
    accept_config_change: bool,
    say: Callable[[str], None],
    read: Callable[[dict], tuple[dict, list[str]]] = lambda config: (config, []),
) -> None:
    """Raise ValueError if a run with the config `text` may not continue, or start, in
    `folder`.

    `read` converts a config written by an earlier version into this version's form, and
    lists the fields that were absent from it. It raises ValueError for a config that it
    can't convert.
    """
    check_kinds(folder)
    if resume == "never":  # `set_aside` moves the old run away
        return
    saved, summary = saved_at(folder), folder / "summary.json"
    if not saved:
        check_is_new(folder, resume)
    there = recorded_config(folder, saved, say)
    if there is not None:
        path = folder / "config.json"
        there = {name: value for name, value in there.items() if name != "revisions"}
        try:
            there, new = read(there)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; choose another --workdir, or go on with the version that began it") from None
        changed = differences(there, json.loads(text))
        refused = [line for name, line in changed.items() if not SAME_MATHS.match(name)]
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        check_is_open(folder, f", of another config ({'; '.join(refused[:3])}{more})" if refused else "")
        if refused and not accept_config_change:
            split = next((name for name in changed if name.endswith("source.task.split")), None)
            if split is not None:  # nobody set this field: it follows from the suites that read the same file
                more += f"; a suite that reads the source's file decides {split}: keep the suite, or set --config.{split}"
            raise ValueError(
                f"{folder} holds a run of another config ({'; '.join(refused[:3])}{more}); choose another --workdir, or "
                "--accept_config_change to go on with this one"
            )
        if new:
            more = f" and {len(new) - 6} more" if len(new) > 6 else ""
            plural = "field takes its default" if len(new) == 1 else "fields take their defaults"
            say(f"{path} is of an earlier version: {len(new)} {plural}: {', '.join(new[:6])}{more}")
        for line in changed.values():
            say(f"config changed: {line}")
    check_is_open(folder)
    if summary.is_file() and not isinstance((json_object(summary) or {}).get("done"), bool):
        say(f"{summary} is not a summary of a run; the next evaluation rewrites it with the results in the checkpoint")


def check_is_open(folder: Path, more: str = "") -> None:
    """Raise ValueError if the run in a folder is finished."""
    if is_done(folder):
        raise ValueError(
            f"the run in {folder} is finished{more}; choose another --workdir (--config.init_from={folder} begins with its "
            "params), or --resume=never to start anew in it"
        )


def check_steps(folder: Path, steps: int) -> None:
    """Raise ValueError if a folder has a checkpoint beyond the last step of the phases.

    Incomplete checkpoints don't count: `train` sets them aside.
    """
    saved = [step for step in saved_at(folder) if looks_whole(checkpoints_of(folder) / str(step))]
    if saved and saved[-1] > steps:
        raise ValueError(
            f"{folder} has a checkpoint of step {saved[-1]}, and the phases have {steps} steps in all; raise the steps of a "
            "phase, or choose another --workdir"
        )


def check_kinds(folder: Path) -> None:
    """Raise ValueError if a folder has the name of one of a run's files, or a file the
    name of one of its folders.
    """
    for name in (*RECORDS, "lock"):
        if (path := folder / name).exists() and path.is_file() == (name in FOLDERS):
            is_one, wanted = ("no folder", "folder") if name in FOLDERS else ("no file", "file")
            raise ValueError(f"{path} is {is_one}, and a run has a {wanted} of this name; move it away")


def check_is_new(folder: Path, resume: str) -> None:
    """Raise ValueError if the folder must have checkpoints, or once had some."""
    there = checkpoints_of(folder)
    damaged = [path.name for path in there.glob("*.damaged*")] if there.is_dir() else []
    last = (json_object(folder / "summary.json") or {}).get("saved")
    if damaged or last:
        only = f"only damaged checkpoints ({', '.join(sorted(damaged))})"
        had = only if damaged else f"none of its checkpoints any more (the last known was of step {last})"
        raise ValueError(
            f"{folder} has {had}; bring one back, choose another --workdir, or start anew with --resume=never, which "
            "moves the old files aside"
        )
    if resume == "must":
        raise ValueError(f"{folder} holds no checkpoint, and --resume=must; give the --workdir of a run, or --resume=auto")


def recorded_config(folder: Path, saved: Sequence[int], say: Callable[[str], None]) -> dict | None:
    """Return the config that a run began with: from `config.json`, or else from the
    newest checkpoint that contains it. None if neither has it.
    """
    path = folder / "config.json"
    if (found := json_object(path)) is not None:
        return found
    what = "is no config of a run" if path.is_file() else "is missing"
    for step in reversed(saved):
        held = (json_object(checkpoints_of(folder) / str(step) / "host" / "metadata") or {}).get("host")
        if isinstance(held, dict) and isinstance(held.get("config"), dict):
            say(f"{path} {what}; written anew, after a comparison with the config in the checkpoint of step {step}")
            return held["config"]
    if path.is_file():
        say(f"{path} {what}; written anew")
    return None


def set_aside(folder: Path, say: Callable[[str], None]) -> None:
    """Rename everything that earlier runs left, to make room for a new run. All names
    get the same ending: .1, .2, ...
    """
    paths = [folder / name for name in RECORDS]
    there = [path.name for path in paths if path.is_file() or (path.is_dir() and any(path.iterdir()))]
    if not there:
        return
    number = next(n for n in itertools.count(1) if not any(os.path.lexists(folder / f"{name}.{n}") for name in RECORDS))
    for name in there:
        (folder / name).rename(folder / f"{name}.{number}")
    say(f"--resume=never: what {folder} held is now {', '.join(f'{name}.{number}' for name in there)}")


def free_name(path: Any) -> Any:
    """Return the first of `path`.1, `path`.2, ... that doesn't exist."""
    names = (path.with_name(f"{path.name}.{n}") for n in itertools.count(1))
    return next(name for name in names if not (name.exists() if is_url(name) else os.path.lexists(name)))


class Moved(Exception):
    """The folder of a run was moved, removed or replaced."""


def stays(folder: Path) -> Callable[[], None]:
    """Return a function that raises Moved once `folder`, which this process has locked,
    is renamed, removed or replaced.
    """
    handle = os.open(folder, os.O_RDONLY)
    began, mine = os.fstat(handle), (folder / "lock").read_bytes()

    def check_stays() -> None:
        with contextlib.suppress(OSError):
            # Compare the lock as well: some network file systems occasionally give the
            # same folder another inode number.
            if os.path.samestat(began, os.stat(folder)) or (folder / "lock").read_bytes() == mine:
                return
        # Linux reports the current path of an open folder.
        where = Path(os.path.realpath(f"/proc/self/fd/{handle}"))
        if where.is_dir() and os.path.samestat(began, os.stat(where)):
            raise Moved(f"{folder} was moved to {where} while the run wrote in it; with --workdir={where} {continues(where)}")
        raise Moved(f"{folder} was removed or replaced while the run wrote in it; {continues(folder)}")

    return check_stays


def revisions(folder: Path) -> dict[str, str]:
    """Return the hub commits that the run in a folder began with; an empty dictionary
    if it has no config.
    """
    found = (json_object(folder / "config.json") or {}).get("revisions")
    return found if isinstance(found, dict) else {}


def differences(there: dict, here: dict) -> dict[str, str]:
    """Describe each field in which two configs differ, by field name."""
    there, here = flat(json.loads(json.dumps(there, default=list))), flat(here)
    names = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    return {name: f"{name}: {there.get(name, 'absent')} there, {here.get(name, 'absent')} here" for name in names}


def flat(tree, prefix: str = "") -> dict:
    """Flatten a nested dictionary: {"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: value for name, branch in tree.items() for key, value in flat(branch, f"{prefix}{name}.").items()}


def lock(folder: Path, say: Callable[[str], None], flag: str = "--workdir", name: str = "") -> Callable[[], None]:
    """Take the lock of a folder, which `flag` named, and return a function that
    releases it. Messages call the folder `name`, if that is given.

    Raises:
      ValueError: another run holds the lock.
    """
    path = folder / "lock"
    file = open(path, "a+", encoding="ascii", errors="backslashreplace")  # noqa: SIM115 (stays open until the run ends)
    file.seek(0)
    holder = file.read(200).strip().encode("unicode_escape").decode()  # may be any text, so only print it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = holder and f"host {socket.gethostname()}" not in holder and beats(path, say)
    except BlockingIOError:
        held = True
    if held:
        file.close()
        raise ValueError(f"{name or folder} is in use by {holder}; wait for it or stop it, or choose another {flag}")
    if holder:
        say(f"the lock of {name or folder} was left by {holder}, which has died; taking it over")
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    ended = threading.Event()

    def beat():
        while not ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the disk may be unavailable for a while
                os.utime(file.fileno())

    threading.Thread(target=beat, daemon=True).start()

    def give_back() -> None:
        if ended.is_set():
            return
        ended.set()
        with contextlib.suppress(OSError):  # if this fails, the next run finds the lock and sees that its process has ended
            file.truncate(0)
        file.close()

    return give_back


def beats(path: Path, say: Callable[[str], None]) -> bool:
    """Watch whether a run on another host touches a lock. Comparing times would not do,
    since the clocks of hosts differ.
    """
    before = path.stat().st_mtime_ns
    say(f"{path} is of another host; watching for {2.5 * BEAT_S:.0f} s whether its run is alive ...")
    time.sleep(2.5 * BEAT_S)
    return path.stat().st_mtime_ns != before
