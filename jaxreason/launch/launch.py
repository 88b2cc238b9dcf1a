"""The steps of a launch: machines up, checkout installed, run started and followed,
started again after a preemption, folder fetched, machines deleted.

Every step first looks at what is there, so the same command continues a launch that was
interrupted anywhere, and nothing is created or started twice.
"""

from __future__ import annotations

import contextlib
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxreason.launch import gcloud, remote, state
from jaxreason.launch.gcloud import Place
from jaxreason.launch.machines import Machine
from jaxreason.launch.shell import Result, Shell
from jaxreason.launch.source import Source
from jaxreason.launch.target import Target
from jaxreason.runtime.bucket import is_url

POLL_S = 10.0  # between two looks at a machine that is coming, or at the log
DELETED = "deleted"  # step of a launch that deleted its slice
DELETIONS = 3  # tries to delete a slice
LOST_LOOKS = 3  # failed looks in a row after which the machine's own state is asked for


class LaunchFailed(Exception):
    """A launch can't go on; the message says why in one line."""


class Asked(NamedTuple):
    """The launch that the user asked for."""

    name: str
    command: Sequence[str]  # behind `python`, the same on all hosts
    source: Source
    extra: str  # of the package: tpu or gpu
    environment: Mapping[str, str] = {}
    workdir: str = ""  # of the run, on the machine
    max_restarts: int = 20  # after preemptions
    keep: bool = False  # don't delete the machines at the end
    fetch_to: str = "runs"  # local folder that gets the run's folder


class World(NamedTuple):
    """Functions through which the steps act; tests replace them."""

    shell: Shell
    say: Callable[[str], None]
    sleep: Callable[[float], None] = time.sleep
    write: Callable[[str, dict[str, Any]], Any] = state.write


# --- a TPU slice ---


def state_of(place: Place, world: World) -> str:
    """Return the state of a slice, or of its place in the queue."""
    if world.shell.dry:
        return "ABSENT"
    found = gcloud.state_of(world.shell.look(gcloud.describe(place)))
    if found == "ABSENT" and place.queued:
        queued = gcloud.state_of(world.shell.look(gcloud.describe_queued(place)))
        return "PROVISIONING" if queued == "ACTIVE" else queued
    return found


def bring_up(place: Place, machine: Machine, world: World) -> bool:
    """Create a slice, or wait for the one that there is; return whether it is new.

    Raises:
      LaunchFailed: it can't be created.
    """
    found, created = state_of(place, world), False
    if found == "READY":
        there = gcloud.type_of(world.shell.look(gcloud.describe(place)))
        if there not in (None, machine.type):
            raise LaunchFailed(f"{place.name} exists, and is {there}, not {machine.type}; choose another --name")
        world.say(f"{place.name} is ready: it is used again")
        return False
    if found in gcloud.LOST:
        world.say(f"{place.name} is {found}: it is deleted and created anew")
        delete(place, world)
        found = "ABSENT"
    if found in gcloud.HELD:
        raise LaunchFailed(
            f"{place.name} is {found}, and its disk may hold a run; start it, or delete it: {shlex.join(gcloud.delete(place))}"
        )
    if found == "ABSENT":
        world.say(f"creating {place.name}: {machine.type} in {place.zone}")
        check(world.shell.run(gcloud.create(place, machine)), f"{place.name} could not be created")
        created = True
    wait_until_ready(place, world)
    return created


def wait_until_ready(place: Place, world: World) -> None:
    told, absent = "", 0
    while not world.shell.dry:
        try:
            found = state_of(place, world)
        except ValueError as error:  # no network for a while
            found = f"{error}; asking again"
        if found == "READY":
            return
        absent = absent + 1 if found in gcloud.GONE else 0
        if absent >= LOST_LOOKS:
            raise LaunchFailed(f"{place.name} was deleted before it was ready; the same command creates it anew")
        if found in gcloud.LOST + gcloud.HELD:
            raise LaunchFailed(f"{place.name} is {found} before it was ready; the same command tries again")
        if found != told:
            world.say(f"{place.name}: {found}")
            told = found
        world.sleep(POLL_S)


def delete(place: Place, world: World, costs: str = "") -> None:
    """Delete a slice, unless there is none any more.

    Raises:
      LaunchFailed: several tries failed.
    """
    for tries_left in reversed(range(DELETIONS)):
        result = world.shell.run(gcloud.delete(place))
        if result.code == 0:
            return
        with contextlib.suppress(ValueError):  # gcloud can't say
            if state_of(place, world) == "ABSENT":
                return
        if tries_left:
            world.sleep(POLL_S)
    check(result, f"{place.name} could not be deleted{costs}")


def check(result: Result, what: str) -> None:
    if result.code != 0:
        raise LaunchFailed(f"{what}: {gcloud.why(result)}")


# --- the run ---


def install(asked: Asked, target: Target, world: World) -> None:
    """Send the checkout to all hosts, and install it there.

    Raises:
      LaunchFailed: it failed on a host.
    """
    world.say(f"installing commit {asked.source.commit[:12]}" + (" with changes" if asked.source.changed else ""))
    with tempfile.TemporaryDirectory() as folder:
        name = remote.archive_of(asked.name, asked.source.digest)
        file = Path(folder) / name
        file.write_bytes(asked.source.archive)
        check(target.send(str(file), name), "the checkout could not be copied to all hosts")
    check(target.everywhere(remote.install(asked.name, asked.source.digest, asked.extra)), "the installation failed on a host")


def start(asked: Asked, target: Target, world: World) -> None:
    """Start the run on all hosts, unless it is running.

    Raises:
      LaunchFailed: it did not start on a host.
    """
    script = remote.start(asked.name, asked.source.digest, asked.command, asked.environment)
    check(target.everywhere(script), "the run did not start on a host")
    world.say(f"started: python {shlex.join(asked.command)}")


def follow(asked: Asked, target: Target, world: World, alive: Callable[[], bool]) -> int | None:
    """Show the log of host 0 until the run ends; return its exit code, or None if the
    machines were lost.

    `alive()` asks the cloud, once host 0 has not answered for some looks.

    Raises:
      LaunchFailed: the run's process is gone without an exit code.
    """
    offset, failed = 0, 0
    while not world.shell.dry:
        result = target.first(remote.look(asked.name, offset))
        try:
            seen = remote.read(result.out) if result.code == 0 else None
        except ValueError:
            seen = None
        if seen is None:
            failed += 1
            if failed == LOST_LOOKS:
                world.say(f"warning: the machine does not answer ({result.said}); trying again")
            if failed >= LOST_LOOKS and not alive():
                return None
            world.sleep(POLL_S)
            continue
        failed = 0
        if seen.size < offset:  # another terminal started the run again, with a new log
            offset = 0
            continue
        lines, is_more = remote.whole_lines(seen, offset), offset + len(seen.piece) < seen.size
        for line in lines.decode(errors="replace").splitlines():
            world.say(line)
        offset += len(lines)
        if is_more:
            continue
        if seen.state == remote.FINISHED:
            return seen.code
        if seen.state != remote.RUNNING:
            raise LaunchFailed(f"the run on {asked.name} {seen.state} without an exit code; the same command starts it again")
        world.sleep(POLL_S)
    return 0


def on_tpu(asked: Asked, place: Place, machine: Machine, target: Target, world: World) -> int:
    """Run a config on a TPU slice, to its end.

    Raises:
      LaunchFailed: a step failed; the machines are left as they are.
    """
    remember(asked, place, machine, world, "creating")
    for restart in range(asked.max_restarts + 1):
        bring_up(place, machine, world)
        remember(asked, place, machine, world, "installing")
        try:
            install(asked, target, world)
            if restart:
                target.everywhere(remote.await_end(asked.name))
            start(asked, target, world)
            remember(asked, place, machine, world, "running")
            code = follow(asked, target, world, lambda: is_ready(place, world))
        except LaunchFailed:
            if is_ready(place, world):
                raise
            code = None
        if code not in (None, remote.CUT_SHORT):
            break
        what = "was preempted" if code is None else "ended the run early"
        world.say(f"{place.name} {what}; restart {restart + 1} of at most {asked.max_restarts}")
    else:
        raise LaunchFailed(f"the run on {place.name} was cut short {asked.max_restarts + 1} times; the same command goes on")
    remember(asked, place, machine, world, "ended")
    bring_home(asked, target, world)
    if asked.keep:
        world.say(f"{place.name} is kept, and costs money: {costs(machine)}; delete it: {shlex.join(gcloud.delete(place))}")
    else:
        delete(place, world, f", and costs {costs(machine)}")
        remember(asked, place, machine, world, DELETED)
        world.say(f"{place.name} is deleted")
    return code


def is_ready(place: Place, world: World) -> bool:
    """Return whether a slice that was there is still ready, or gcloud can't say.

    Raises:
      LaunchFailed: somebody has deleted it, so it must not be created anew.
    """
    try:
        found = state_of(place, world)
    except ValueError:  # no network for a while
        return True
    if found in gcloud.GONE:
        raise LaunchFailed(f"{place.name} was deleted by somebody else; the same command creates it anew")
    return found == "READY"


def on_ssh(asked: Asked, target: Target, world: World) -> int:
    """Run a config on a machine behind ssh, to its end.

    Raises:
      LaunchFailed: a step failed.
    """
    install(asked, target, world)
    start(asked, target, world)
    code = follow(asked, target, world, lambda: True)
    if code == remote.CUT_SHORT:
        raise LaunchFailed("the machine asked the run to stop, and it has saved itself; the same command goes on")
    bring_home(asked, target, world)
    return 1 if code is None else code


def bring_home(asked: Asked, target: Target, world: World) -> None:
    """Copy the run's folder here, unless it is in a bucket.

    Raises:
      LaunchFailed: it could not be copied; the machine that has it is then kept.
    """
    if is_url(asked.workdir):
        world.say(f"the run is in {asked.workdir}; see python -m jaxreason.report {asked.workdir} --out=report.html")
        return
    path = run_folder(asked.name, asked.workdir)
    if not world.shell.dry:
        Path(asked.fetch_to).mkdir(parents=True, exist_ok=True)
    check(target.fetch(path, asked.fetch_to), f"the run's folder {path} could not be copied, so the machine is kept")
    world.say(f"the run is in {asked.fetch_to}/{Path(asked.workdir).name}")


def run_folder(name: str, workdir: str) -> str:
    """Return the folder of a run on its machine."""
    return workdir if workdir.startswith("/") else f"{remote.folder_of(name)}/{workdir}"


def costs(machine: Machine) -> str:
    return "an unknown price" if machine.usd_per_hour is None else f"${machine.usd_per_hour:,.2f} per hour on demand"


def remember(asked: Asked, place: Place, machine: Machine, world: World, step: str) -> None:
    """Write the file by which another terminal finds the launch."""
    if world.shell.dry:
        return
    values = {
        "kind": "tpu",
        "step": step,
        "place": place._asdict(),
        "type": machine.type,
        "usd_per_hour": machine.usd_per_hour,
        "command": list(asked.command),
        "commit": asked.source.commit,
        "digest": asked.source.digest,
        "workdir": asked.workdir,
        "delete": gcloud.delete(place),
    }
    world.write(asked.name, values)


def left(name: str, place: Place, machine: Machine, again: str) -> str:
    """Say what still runs and costs money after Ctrl-C or an error."""
    return (
        f"{name} may exist, or be on its way, and then costs {costs(machine)}; the run on it goes on. Look: python -m "
        f"jaxreason.launch status {name}. Go on: {again}. Delete it: {shlex.join(gcloud.delete(place))}"
    )
