"""The folder of a run: it holds one config, and one run at a time works in it.

A change of the config that leaves the maths alone is said and allowed; any other is
refused, unless it is accepted. The lock is the file `lock`: the system's own, which
ends with the process, and for file systems whose locks do not reach other hosts a
process that touches it. What a lock says of a process that has died is told and taken
over.

A folder that once had checkpoints is never begun anew by itself, and what it holds is
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

RESUME = ("auto", "must", "never")
# Fields of a config that decide when something is written or measured, or how the same
# sums are split.
SAME_MATHS = re.compile(
    r"(log|checkpoint|evaluate|sharding)\."
    r"|sampler\.(slots|chunk_tokens|prompts_per_prefill|prefill_tokens|prompt_rows)$"
    r"|model\.(scan_layers|remat|attention)$"
    r"|[^.]+\.(microbatches|log_every|evaluate_every|offload_reference|max_skipped)$"
)
FOLDERS = ("checkpoints", "tensorboard")
RECORDS = ("checkpoints", "config.json", "summary.json", "metrics.jsonl", "rollouts.jsonl", "tensorboard")  # what a run leaves
WRITTEN_OVER = ("config.json", "lock", "tensorboard")  # what a run finds of one before and neither replaces nor checks itself
BEAT_S = 10.0  # how often a run touches its lock


def config_text(config) -> str:
    """A config as `config.json` has it."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=list)


def is_done(folder: Path) -> bool:
    try:
        return (json_object(folder / "summary.json") or {}).get("done") is True
    except OSError:
        return False


def json_object(path: Path) -> dict | None:
    """The JSON object in a file; None if there is no such file, or anything else in
    it.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def saved_at(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run's folder, whole or damaged, oldest first."""
    found = (folder / "checkpoints").glob("*") if (folder / "checkpoints").is_dir() else ()
    return sorted(int(path.name) for path in found if re.fullmatch(r"0|[1-9]\d*", path.name) and path.is_dir())


def looks_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has what every complete one has; one that is empty or half
    made has not.
    """
    host = json_object(checkpoint / "host" / "metadata") or {}
    return "host" in host and (checkpoint / "state" / "_METADATA").is_file()


def continues(folder: Path) -> str:
    """Say from which step the same command continues, as far as the folder tells."""
    steps = saved_at(folder)
    return f"the same command continues from {f'step {steps[-1]}' if steps else 'the start'}"


def begun(folder: Path, today: str) -> str | None:
    """The date on which the run in a folder began, as its config recorded it: today, if
    there is none.
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
    """Raise ValueError if a run of the config `text` may not go on, or start, in
    `folder`.

    `read` makes of a config that an earlier version wrote what this one would have
    written, and names the fields that it lacked. It raises ValueError for one that it
    can't read.
    """
    check_kinds(folder)
    if resume == "never":  # `set_aside` makes room for it
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
            if split is not None:  # which nobody has written: it follows from the suites that read the same file
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
        say(f"{summary} is no summary of a run; the next evaluation writes it anew, with all that the checkpoint has of it")


def check_is_open(folder: Path, more: str = "") -> None:
    """Raise ValueError if the run in a folder is finished."""
    if is_done(folder):
        raise ValueError(
            f"the run in {folder} is finished{more}; choose another --workdir (--config.init_from={folder} begins with its "
            "params), or --resume=never to start anew in it"
        )


def check_steps(folder: Path, steps: int) -> None:
    """Raise ValueError if a run has made more steps than its phases have in all.

    Checkpoints that are not whole say nothing of it: `train` sets them aside.
    """
    saved = [step for step in saved_at(folder) if looks_whole(folder / "checkpoints" / str(step))]
    if saved and saved[-1] > steps:
        raise ValueError(
            f"{folder} has a checkpoint of step {saved[-1]}, and the phases have {steps} steps in all; raise the steps of a "
            "phase, or choose another --workdir"
        )


def check_kinds(folder: Path) -> None:
    """Raise ValueError if a folder stands in the place of a file of a run, or the other
    way round.
    """
    for name in (*RECORDS, "lock"):
        if (path := folder / name).exists() and path.is_file() == (name in FOLDERS):
            is_one, wanted = ("no folder", "folder") if name in FOLDERS else ("no file", "file")
            raise ValueError(f"{path} is {is_one}, and a run has a {wanted} of this name; move it away")


def check_is_new(folder: Path, resume: str) -> None:
    """Raise ValueError if there are no checkpoints where there must be some, or have
    been some.
    """
    damaged = [path.name for path in (folder / "checkpoints").glob("*.damaged*")]
    last = (json_object(folder / "summary.json") or {}).get("saved")
    if damaged or last:
        only = f"only damaged checkpoints ({', '.join(sorted(damaged))})"
        had = only if damaged else f"none of its checkpoints any more (the last known was of step {last})"
        raise ValueError(
            f"{folder} has {had}; bring one back, choose another --workdir, or start anew with --resume=never, which "
            "moves all that is there aside"
        )
    if resume == "must":
        raise ValueError(f"{folder} holds no checkpoint, and --resume=must; give the --workdir of a run, or --resume=auto")


def recorded_config(folder: Path, saved: Sequence[int], say: Callable[[str], None]) -> dict | None:
    """The config that a run was begun with: of `config.json`, or else of its newest
    checkpoint that tells.
    """
    path = folder / "config.json"
    if (found := json_object(path)) is not None:
        return found
    what = "is no config of a run" if path.is_file() else "is missing"
    for step in reversed(saved):
        held = (json_object(folder / "checkpoints" / str(step) / "host" / "metadata") or {}).get("host")
        if isinstance(held, dict) and isinstance(held.get("config"), dict):
            say(f"{path} {what}; written anew, after a comparison with the config in the checkpoint of step {step}")
            return held["config"]
    if path.is_file():
        say(f"{path} {what}; written anew")
    return None


def set_aside(folder: Path, say: Callable[[str], None]) -> None:
    """Make room for a new run: give all that there is of earlier ones names that end in
    .1, .2, ..., the same for all.
    """
    paths = [folder / name for name in RECORDS]
    there = [path.name for path in paths if path.is_file() or (path.is_dir() and any(path.iterdir()))]
    if not there:
        return
    number = next(n for n in itertools.count(1) if not any(os.path.lexists(folder / f"{name}.{n}") for name in RECORDS))
    for name in there:
        (folder / name).rename(folder / f"{name}.{number}")
    say(f"--resume=never: what {folder} held is now {', '.join(f'{name}.{number}' for name in there)}")


def free_name(path: Path) -> Path:
    """The first of `path`.1, `path`.2, ... that is not there."""
    return next(name for n in itertools.count(1) if not os.path.lexists(name := path.with_name(f"{path.name}.{n}")))


class Moved(Exception):
    """The folder of a run is no longer where it was."""


def stays(folder: Path) -> Callable[[], None]:
    """Return what raises Moved once `folder`, which this process has locked, is
    renamed, removed or replaced.
    """
    handle = os.open(folder, os.O_RDONLY)
    began, mine = os.fstat(handle), (folder / "lock").read_bytes()

    def check_stays() -> None:
        with contextlib.suppress(OSError):
            # The lock counts too, since some network file systems give the same folder
            # another number now and then.
            if os.path.samestat(began, os.stat(folder)) or (folder / "lock").read_bytes() == mine:
                return
        # Linux knows under which name an open folder is now.
        where = Path(os.path.realpath(f"/proc/self/fd/{handle}"))
        if where.is_dir() and os.path.samestat(began, os.stat(where)):
            raise Moved(f"{folder} was moved to {where} while the run wrote in it; with --workdir={where} {continues(where)}")
        raise Moved(f"{folder} was removed or replaced while the run wrote in it; {continues(folder)}")

    return check_stays


def revisions(folder: Path) -> dict[str, str]:
    """The commits of the hub that the run in a folder was begun with; none where it has
    no config.
    """
    found = (json_object(folder / "config.json") or {}).get("revisions")
    return found if isinstance(found, dict) else {}


def differences(there: dict, here: dict) -> dict[str, str]:
    """Describe each field in which two configs differ, by its name."""
    there, here = flat(json.loads(json.dumps(there, default=list))), flat(here)
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
    file = open(path, "a+", encoding="ascii", errors="backslashreplace")  # noqa: SIM115  (open for as long as the run)
    file.seek(0)
    holder = file.read(200).strip().encode("unicode_escape").decode()  # whatever it holds, it is shown and not obeyed
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
        if ended.is_set():
            return
        ended.set()
        with contextlib.suppress(OSError):  # then the next run finds it, and that its process has ended
            file.truncate(0)
        file.close()

    return give_back


def beats(path: Path, say: Callable[[str], None]) -> bool:
    """Whether somebody on another host touches a lock: watched, since clocks of hosts
    differ.
    """
    before = path.stat().st_mtime_ns
    say(f"{path} is of another host; watching for {2.5 * BEAT_S:.0f} s whether its run is alive ...")
    time.sleep(2.5 * BEAT_S)
    return path.stat().st_mtime_ns != before
