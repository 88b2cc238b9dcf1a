"""Start or continue the run of a config in its folder, on all processes together."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxreason.build import build, from_earlier, settle
from jaxreason.runtime import preemption, workdir
from jaxreason.runtime.bucket import is_url
from jaxreason.runtime.checkpoint import Checkpoints, check_writable, saved_steps
from jaxreason.runtime.files import replacing, writing
from jaxreason.runtime.mirror import mirrored
from jaxreason.runtime.processes import gather, on_all_processes, writes
from jaxreason.runtime.workdir import config_text
from jaxreason.train import Run


class Opened(NamedTuple):
    """A run in its folder, ready to be trained."""

    run: Run
    folder: Path  # of its records
    name: str  # of the folder, as the user knows it: a path, or a URL of a bucket
    checkpoints: Checkpoints
    stop: Callable[[], str]  # why the run was asked to stop, "" if it was not
    check_stays: Callable[[], None]  # raises if the folder was moved or removed


@contextlib.contextmanager
def open_run(
    config: ConfigDict, folder: Path | str, *, resume: str, accept_config_change: bool, say: Callable[[str], None]
) -> Iterator[Opened]:
    """Build the run of a config, check and lock its folder, and open its checkpoints.

    All processes of a run call it; the folder is the `folder` of process 0: a path, or
    the URL of a folder in a bucket. Signals that ask the run to stop are handled until
    the end of the block.

    Raises:
      ValueError, OSError, Unwritable: the config or the folder does not allow it; one
        line.
    """
    anew = resume == "never"
    texts, folders, dates = zip(*gather((config_text(config), folder, datetime.date.today().isoformat())), strict=True)
    folder = name = folders[0]
    with contextlib.ExitStack() as opened:
        locked = contextlib.ExitStack()

        def ending() -> str:
            locked.close()
            return f"interrupted; {workdir.continues(folder)}"

        stop = opened.enter_context(preemption.watch(ending))
        if differ := [process for process, other in enumerate(texts) if other != texts[0]]:
            raise ValueError(f"process {differ[0]} has another config than process 0; start all with the same command")
        mirror = None
        if is_url(name):
            if anew:
                raise ValueError(f"--resume=never can't move aside what is in {name}; choose another --workdir")
            folder, mirror = opened.enter_context(mirrored(name, say))
        begun = dates[0] if anew else on_all_processes(workdir.begun, folder, dates[0])
        config = on_all_processes(settled, dated(config, gather(begun)[0]))
        options = {"resume": resume, "accept_config_change": accept_config_change, "say": say}
        on_all_processes(workdir.check, folder, config_text(config), read=from_earlier, **options)
        run = build_pinned(config, folder, anew, accept_config_change, say)
        on_all_processes(check_writable, folder, over=workdir.WRITTEN_OVER)
        check_stays = on_all_processes(lock if writes() else lambda *_: lambda: None, folder, locked, say)
        opened.callback(locked.close)
        on_all_processes(workdir.set_aside if anew and writes() else lambda *_: None, folder, say)
        before_save = (mirror.send if mirror is not None else lambda: None) if is_url(name) else None
        checkpoints = on_all_processes(run.open_checkpoints, folder=workdir.checkpoints_of(folder), before_save=before_save)
        opened.callback(checkpoints.close)
        if writes():
            write_config(folder / "config.json", config, run.provenance["revisions"])
        yield Opened(
            run, folder, str(name), checkpoints, stop, check_stays if mirror is None else both(check_stays, mirror.check)
        )


def both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def check() -> None:
        first()
        second()

    return check


def lock(folder: Path, locked: contextlib.ExitStack, say: Callable[[str], None]) -> Callable[[], None]:
    """Lock a folder until `locked` is closed; return the check that it still exists."""
    locked.callback(workdir.lock(folder, say))
    return workdir.stays(folder)


def build_pinned(config: ConfigDict, folder: Path, anew: bool, accept_config_change: bool, say: Callable[[str], None]) -> Run:
    """Build the run of a config at the hub commits that its folder recorded.

    Report commits that changed.
    """
    recorded = {} if anew else workdir.revisions(folder)
    pinned = {} if accept_config_change else recorded
    run = on_all_processes(
        build, config, resumes=not anew and bool(saved_steps(workdir.checkpoints_of(folder))), revisions=pinned
    )
    if not anew:
        on_all_processes(workdir.check_steps, folder, sum(phase.steps for phase in run.phases))
    used = run.provenance["revisions"]
    if len(set(gather(json.dumps(used)))) > 1:
        raise ValueError(f"processes found different commits on the hub, {used} here; set revision=... of task and model")
    now = {name: used.get(name, commit) for name, commit in recorded.items()}
    for line in workdir.differences({"revisions": recorded}, {"revisions": now}).values():
        say(f"config changed: {line}")
    return run


def write_config(path: Path, config: ConfigDict, revisions: dict[str, str]) -> None:
    """Write a config and the hub commits that it read.

    The file is replaced atomically: a full disk must not truncate it, because a run
    without a config can't be continued.
    """
    with writing(path), replacing(path) as file:
        file.write(json.dumps(json.loads(config_text(config)) | {"revisions": revisions}, indent=2, sort_keys=True))


def dated(config: ConfigDict, date: str | None) -> ConfigDict:
    """Return a config with `date` as its chat template's date, unless it has one."""
    section = config.get("text", {})
    if section.get("format") != "chat" or section.get("date") is not None:
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.text.date = date
    return config


def settled(config: ConfigDict) -> ConfigDict:
    """Return a config with the splits of its sources and suites: see `build.settle`."""
    return ConfigDict(settle(config.to_dict()))
