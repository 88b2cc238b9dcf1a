"""A set of machines that act as one: all hosts of a TPU slice, or one host behind ssh.

A target is four functions; the steps in `launch` don't know which cloud is behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxreason.launch import gcloud
from jaxreason.launch.shell import COPY_TIMEOUT_S, Result, Shell


class Target(NamedTuple):
    """Functions of a set of machines; each returns the result of its last command."""

    everywhere: Callable[[str], Result]  # run a script on all hosts at once
    first: Callable[..., Result]  # (script, timeout_s=) run a script on host 0
    send: Callable[[str, str], Result]  # (file, path) copy a file to all hosts, to a path in the home folder
    fetch: Callable[[str, str], Result]  # (path, folder) copy a folder from host 0


def tpu(place: gcloud.Place, shell: Shell) -> Target:
    return Target(
        everywhere=lambda script: shell.run(gcloud.ssh(place, script)),
        first=lambda script, timeout_s=60.0: shell.run(gcloud.ssh(place, script, worker="0"), timeout_s=timeout_s),
        send=lambda file, path: shell.run(gcloud.send(place, file, path)),
        fetch=lambda path, folder: shell.run(gcloud.fetch(place, path, folder), timeout_s=COPY_TIMEOUT_S),
    )


def over_ssh(host: str, shell: Shell) -> Target:
    """Make the target of one machine, as `ssh HOST` reaches it."""
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=20"]
    return Target(
        everywhere=lambda script: shell.run(["ssh", *options, host, script]),
        first=lambda script, timeout_s=60.0: shell.run(["ssh", *options, host, script], timeout_s=timeout_s),
        send=lambda file, path: shell.run(["scp", *options, file, f"{host}:{path}"]),
        fetch=lambda path, folder: shell.run(["scp", *options, "-r", f"{host}:{path}", folder], timeout_s=COPY_TIMEOUT_S),
    )
