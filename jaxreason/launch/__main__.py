r"""Entry point: run a config on a Cloud TPU slice, or on a machine behind ssh.

    python -m jaxreason.launch tpu --name=mine --type=v5litepod-16 \
        --zone=us-west4-a --config=configs/gsm8k.py [--config.rl.steps=50]
    python -m jaxreason.launch gpu --name=mine --host=me@machine \
        --config=configs/gsm8k.py
    python -m jaxreason.launch sky | xpk | slurm --name=mine --type=v5litepod-16 \
        --config=configs/gsm8k.py --workdir=gs://my-bucket/runs/mine
    python -m jaxreason.launch status | logs | stop | fetch | delete NAME

It plans the config for the slice, says what it costs and asks; creates the slice or
uses the one that there is; installs this checkout with its changes on every host; runs
the same command on each; shows the log; starts again after a preemption; copies the
run's folder here; and deletes the slice. Stop it with Ctrl-C at any time: it says what
still runs and costs money. The same command goes on from there.

`sky`, `xpk` and `slurm` write the file of a job for SkyPilot, xpk on GKE or Slurm, with
a comment on each part, and print the commands that submit, watch and stop it (`write`).
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from jaxreason.launch import gcloud, launch, machines, remote, shell, source, state, target, write
from jaxreason.launch.fleets import ENGINES
from jaxreason.options import command, unknown_name_message

FLAGS = flags.FLAGS
ROOT = Path(__file__).parent.parent.parent
RUN, WRITE, LOOK = ("tpu", "gpu"), tuple(ENGINES), ("status", "logs", "stop", "fetch", "delete")


def define_flags() -> None:
    flags.DEFINE_string("name", None, "Name of the launch, and of the slice.")
    flags.DEFINE_string("type", None, "Accelerator type, such as v5litepod-16; 'list' shows what is known.")
    flags.DEFINE_string("zone", None, "Zone of Google Cloud, such as us-west4-a.")
    flags.DEFINE_string("project", None, "Project of Google Cloud. Default: gcloud's.")
    flags.DEFINE_string("host", None, "Machine of `launch gpu`, as ssh names it.")
    flags.DEFINE_string("workdir", None, "Folder of the run on the machine. Default: runs/NAME.")
    flags.DEFINE_boolean("queued", None, "Ask for the slice in a queue. Default: for v5p and v6e.")
    flags.DEFINE_boolean("spot", False, "Take a slice that may be preempted, at a lower price.")
    flags.DEFINE_boolean("reserved", False, "Use your reservation.")
    flags.DEFINE_boolean("keep", False, "Don't delete the slice at the end.")
    flags.DEFINE_boolean("yes", False, "Don't ask before it costs money.")
    flags.DEFINE_boolean("plan", True, "First plan whether the config fits the slice.")
    flags.DEFINE_boolean("dry_run", False, "Print the commands, and run none.")
    flags.DEFINE_integer("max_restarts", 20, "Restarts after preemptions, at most.", lower_bound=0)
    flags.DEFINE_string("fetch_to", "runs", "Local folder that gets the run's folder.")
    write.define_flags()
    flags.adopt_module_key_flags(write)  # for --help


def asked(words: command.Words, name: str, extra: str) -> launch.Asked:
    """Return what the flags ask for; the command is that of `jaxreason.main`."""
    if words.config is None:
        raise ValueError("no --config given; for example --config=configs/gsm8k.py")
    command.read(words.config, words.changes, say=print)  # errors in the config are told before anything costs money
    config = Path(words.config.partition(":")[0])
    if config.is_absolute() or not (ROOT / config).is_file():
        raise ValueError(
            f"--config got {str(config)!r}; allowed: a file of this checkout, since the checkout is what is installed"
        )
    workdir = FLAGS.workdir or f"runs/{name}"
    if "://" in workdir:
        raise ValueError(f"--workdir got {workdir!r}; allowed: a folder on the machine, which is copied here at the end")
    changes = [f"--config.{field}={value}" for field, value in words.changes.items()]
    # Beside the source, not in it: a launch of changed code continues the run.
    place = workdir if workdir.startswith("/") else f"../{workdir}"
    made = ["-m", "jaxreason.main", f"--config={words.config}", *changes, f"--workdir={place}"]
    packed = source.pack(ROOT)
    return launch.Asked(
        name, made, packed, extra, workdir=workdir, max_restarts=FLAGS.max_restarts, keep=FLAGS.keep, fetch_to=FLAGS.fetch_to
    )


# --- before it costs money ---


def check_gcloud(place: gcloud.Place, world: launch.World) -> None:
    """Check that gcloud is there, logged in, and has TPUs in the zone.

    Raises:
      ValueError: it is not; in one line.
    """
    found = world.shell.look(gcloud.account())
    if found.code == 127:
        raise ValueError("gcloud is not installed; see cloud.google.com/sdk/docs/install")
    if found.code != 0 or not found.out.strip():
        raise ValueError("gcloud is not logged in; gcloud auth login")
    if place.project is None and world.shell.look(gcloud.project()).out.strip() in ("", "(unset)"):
        raise ValueError("gcloud has no project; gcloud config set project PROJECT, or --project=PROJECT")
    zones = world.shell.look(gcloud.zones(place))
    if zones.code != 0:
        raise ValueError(f"gcloud can't list the zones of TPUs: {gcloud.why(zones)}")
    if place.zone not in zones.out.split():
        raise ValueError(unknown_name_message("--zone", place.zone, zones.out.split()))


def plan(words: command.Words, machine: machines.Machine, say) -> None:
    """Plan the config for the slice.

    Raises:
      ValueError: it does not fit, or can't be planned here.
    """
    changes = [f"--config.{field}={value}" for field, value in words.changes.items()]
    made = [sys.executable, "-m", "jaxreason.plan", f"--config={words.config}", *changes, f"--topology={machine.topology}"]
    say(f"planning for {machine.topology} (some minutes; --noplan leaves it out)")
    done = subprocess.run([*made, "--nosearch"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    last = next((line for line in reversed((done.stderr or done.stdout).splitlines()) if line.strip()), "")
    if done.returncode != 0:
        raise ValueError(
            f"the config does not fit {machine.type}, or can't be planned: {last}; see python {shlex.join(made[1:])}"
        )
    say(done.stdout.rstrip())


def agree(machine: machines.Machine, spot: bool) -> bool:
    """Say the price, and ask whether to go on."""
    print(f"{machine.type}: {machine.chips} chips on {machine.hosts} host(s), {launch.costs(machine)}" + ", less as spot" * spot)
    return FLAGS.yes or FLAGS.dry_run or input("create it? [y/N] ").strip().lower() in ("y", "yes")


# --- commands ---


def on_tpu(words: command.Words) -> int:
    machine = machines.machine_of(FLAGS.type)
    name = machines.check_name(FLAGS.name)
    queued = machines.needs_queue(machine) if FLAGS.queued is None else FLAGS.queued
    place = gcloud.Place(name, machines.check_zone(FLAGS.zone), FLAGS.project, FLAGS.spot, FLAGS.reserved, queued)
    if FLAGS.spot and FLAGS.reserved:
        raise ValueError("got --spot and --reserved; allowed: one of them")
    world = launch.World(shell.printing(print) if FLAGS.dry_run else shell.real(), lambda line: print(line, flush=True))
    wanted = asked(words, name, "tpu")
    if FLAGS.spot:
        print("warning: a preempted slice loses its disk, so the run begins again on the next one")
    if not FLAGS.dry_run:
        check_gcloud(place, world)
        if FLAGS.plan:
            plan(words, machine, world.say)
    if not agree(machine, FLAGS.spot):
        return 1
    try:
        return launch.on_tpu(wanted, place, machine, target.tpu(place, world.shell), world)
    except KeyboardInterrupt:
        print(f"\nstopped here. {launch.left(name, place, machine, again())}")
        return 130
    except launch.LaunchFailed as error:
        print(f"error: {error}\n{launch.left(name, place, machine, again())}", file=sys.stderr)
        return 1


def on_gpu(words: command.Words) -> int:
    name = machines.check_name(FLAGS.name)
    if not FLAGS.host or FLAGS.host.startswith("-"):
        raise ValueError(f"--host got {FLAGS.host!r}; allowed: a machine as ssh names it, such as me@machine")
    world = launch.World(shell.printing(print) if FLAGS.dry_run else shell.real(), lambda line: print(line, flush=True))
    wanted = asked(words, name, "gpu")
    if not FLAGS.dry_run:
        state.write(name, {"kind": "gpu", "host": FLAGS.host, "workdir": wanted.workdir, "digest": wanted.source.digest})
    try:
        return launch.on_ssh(wanted, target.over_ssh(FLAGS.host, world.shell), world)
    except KeyboardInterrupt:
        print(
            f"\nstopped here; the run on {FLAGS.host} goes on. Look: python -m jaxreason.launch status {name}. Go on: {again()}"
        )
        return 130
    except launch.LaunchFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def again() -> str:
    return shlex.join(["python", "-m", "jaxreason.launch", *sys.argv[1:]])


def look_at(what: str, names: Sequence[str]) -> int:
    """Do one of `LOOK` for a launch; `status` without a name lists all."""
    if what == "status" and not names:
        for name in state.names():
            print(summary(name))
        return 0
    if len(names) != 1:
        raise ValueError(f"`launch {what}` got {len(names)} names; allowed: one of {', '.join(state.names()) or 'none yet'}")
    name = names[0]
    found = state.read(name)
    world = launch.World(shell.real(), print)
    place = gcloud.Place(**found["place"]) if found["kind"] == "tpu" else None
    reached = target.tpu(place, world.shell) if place is not None else target.over_ssh(found["host"], world.shell)
    if what == "status":
        print(summary(name))
        if place is not None:
            print(f"slice: {launch.state_of(place, world)}")
        seen = reached.first(remote.look(name, 0, 0))
        print(f"run: {seen.out.splitlines()[0] if seen.code == 0 and seen.out else seen.said}")
    elif what == "logs":
        seen = reached.first(remote.look(name, 0, 10_000_000))
        print(remote.read(seen.out).text if seen.code == 0 else seen.said)
    elif what == "stop":
        print(reached.everywhere(remote.stop(name)).said)
    elif what == "fetch":
        launch.check(
            reached.fetch(f"{remote.folder_of(name)}/source-{found['digest']}/{found['workdir']}", FLAGS.fetch_to), "not copied"
        )
        print(f"the run is in {FLAGS.fetch_to}")
    elif place is None:
        raise ValueError(f"{name} runs on {found['host']}, which is not ours to delete; allowed: a launch on TPUs")
    else:
        launch.check(world.shell.run(gcloud.delete(place)), f"{name} could not be deleted")
        state.forget(name)
        print(f"{name} is deleted")
    return 0


def summary(name: str) -> str:
    found = state.read(name)
    if found["kind"] == "gpu":
        return f"{name}: on {found['host']}, {found['workdir']}"
    usd = found.get("usd_per_hour")
    price = "unknown price" if usd is None else f"${usd:,.2f} per hour"
    where = f"{found['type']} in {found['place']['zone']}, {found['step']}"
    return f"{name}: {where}, {price} while it exists; delete: {shlex.join(found['delete'])}"


def parse_flags(argv: list[str]) -> list[str]:
    try:
        words = command.split(argv)
        rest = FLAGS(words.rest)
        WORDS[:] = [words]
        return rest
    except (flags.Error, ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)
    what, *names = [*argv[1:], None][: max(1, len(argv) - 1)]
    try:
        if what in WRITE and not names:
            sys.exit(write.on_engine(what, WORDS[0], ROOT))
        if FLAGS.type == "list":
            for machine in machines.machines().values():
                print(f"{machine.type}: {machine.topology}, {machine.hosts} host(s), {launch.costs(machine)}")
            sys.exit(0)
        if what in RUN and not names:
            write.refuse(what)
            sys.exit((on_tpu if what == "tpu" else on_gpu)(WORDS[0]))
        if what in LOOK:
            sys.exit(look_at(what, names))
        got = " ".join(map(str, argv[1:])) or "nothing"
        raise ValueError(f"got {got!r}; allowed: {', '.join((*RUN, *WRITE))} with flags, or {', '.join(LOOK)} and a NAME")
    except (ValueError, OSError, launch.LaunchFailed, json.JSONDecodeError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


WORDS: list[command.Words] = []


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config file of this checkout, and options, as for jaxreason.main.")
    define_flags()
    app.run(main, flags_parser=parse_flags)
