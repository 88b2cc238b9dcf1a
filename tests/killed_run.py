"""A run that kills itself: `python killed_run.py CONFIG_FILE WORKDIR POINT COUNT`; with
`POINT` none it survives.

When it reaches the point for the COUNT-th time the process gets SIGKILL: nothing is
flushed, closed or finished.
"""

import functools
import os
import runpy
import signal
import sys
import threading
from pathlib import Path


def killer(count: int):
    """Make a function that kills the process at its count-th call, from any thread."""
    calls, lock = [0], threading.Lock()

    def call(*_):
        with lock:
            calls[0] += 1
            if calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)

    return call


def before(owner, name: str, call) -> None:
    """Patch a function so that `call` runs before it, with the same arguments."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        call(*args)
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def before_result(owner, name: str, call) -> None:
    """Patch a function so that `call` runs before each call of the function that it
    returns.
    """
    maker = getattr(owner, name)

    def make(*args, **kwargs):
        made = maker(*args, **kwargs)

        def wrapped(*args, **kwargs):
            call()
            return made(*args, **kwargs)

        return wrapped

    setattr(owner, name, make)


def in_a_line(call) -> None:
    """Run `call` when half a line of rollouts.jsonl is in the file."""
    from jaxreason.runtime import files

    write = files.write_rollouts

    def wrapped(path, rollouts, *args, **kwargs):
        write(path, rollouts, *args, **kwargs)
        if rollouts:
            whole = Path(path).read_bytes()
            with Path(path).open("r+b") as file:
                file.truncate(len(whole) - 40)
                call()
                file.seek(0)
                file.write(whole)

    files.write_rollouts = wrapped


def at_a_rename(call) -> None:
    """Run `call` while a checkpoint is written in the background, before its rename."""

    def renamed(source, *_):
        if "checkpoint" in str(source):
            call()

    for name in ("rename", "replace"):
        before(os, name, renamed)
        before(Path, name, renamed)


def set_up(point: str, count: int) -> None:
    from jaxreason import batching, learner, rollout, train
    from jaxreason.runtime import checkpoint, files
    from jaxreason.runtime.journal import Journal

    call = killer(count)
    {
        "none": lambda: None,
        "prefill": lambda: before(rollout.Prompts, "prefill", call),
        "sampling": lambda: before(rollout.Collection, "decode", call),
        "verifying": lambda: before(rollout.Collection, "hear", call),
        "answering": lambda: before(rollout.Collection, "append_tokens", lambda _, said, *__, **___: said and call()),
        "batching": lambda: before(batching, "from_groups", call),
        "reference": lambda: before_result(learner, "compile_token_logp", call),
        "update": lambda: before_result(train, "compile_train_step", call),
        "logging": lambda: before(Journal, "write_metrics", call),
        "line": lambda: in_a_line(call),
        "evaluation": lambda: before(Journal, "evaluate_at", call),
        "saving": lambda: before(checkpoint, "fingerprints", call),
        "renaming": lambda: at_a_rename(call),
        "phase": lambda: before(train, "train_phase", call),
        "summary": lambda: before(files, "write_summary", call),
    }[point]()


if __name__ == "__main__":
    config_file, workdir, point, count = sys.argv[1:5]
    set_up(point, int(count))
    from runs import run_config

    run_config(runpy.run_path(config_file)["get_config"](), Path(workdir))
