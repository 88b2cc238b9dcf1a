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

import functools
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
from jaxreason.runtime.bucket import check_url, is_url

FLAGS = flags.FLAGS
ROOT = Path(__file__).parent.parent.parent
RUN, WRITE, LOOK = ("tpu", "gpu"), tuple(ENGINES), ("status", "logs", "stop", "fetch", "delete")


def define_flags() -> None:
    flags.DEFINE_string("name", None, "Name of the launch, and of the slice.")
    flags.DEFINE_string("type", None, "Accelerator type, such as v5litepod-16; 'list' shows what is known.")
    flags.DEFINE_string("zone", None, "Zone of Google Cloud, such as us-west4-a.")
    flags.DEFINE_string("project", None, "Project of Google Cloud. Default: gcloud's.")
    flags.DEFINE_string("host", None, "Machine of `launch gpu`, as ssh names it.")
    flags.DEFINE_string("workdir", None, "Folder of the run: on the machine, or gs://BUCKET/FOLDER. Default: runs/NAME.")
    flags.DEFINE_boolean("queued", None, "Ask for the slice in a queue. Default: for v5p and v6e.")
    flags.DEFINE_boolean("spot", False, "Take a slice that may be preempted, at a lower price.")
    flags.DEFINE_boolean("reserved", False, "Use your reservation.")
    flags.DEFINE_boolean("keep", False, "Don't delete the slice at the end.")
    flags.DEFINE_boolean("yes", False, "Don't ask before it costs money.")
    flags.DEFINE_boolean("plan", True, "First plan whether the config fits the slice.")
    flags.DEFINE_boolean("dry_run", False, "tpu, gpu: print the commands, and run none.")
    flags.DEFINE_integer("max_restarts", 20, "Restarts after preemptions, at most.", lower_bound=0)
    flags.DEFINE_string("fetch_to", "runs", "Local folder that gets the run's folder.")
    write.define_flags()
    flags.adopt_module_key_flags(write)  # for --help


def asked(words: command.Words, name: str, extra: str, hosts: int = 1) -> launch.Asked:
    """Return what the flags ask for; the command is that of `jaxreason.main`."""
    if words.config is None:
        raise ValueError("no --config given; for example --config=configs/gsm8k.py")
    command.read(words.config, words.changes, say=print)  # errors in the config are told before anything costs money
    config = Path(words.config.partition(":")[0])
    if config.is_absolute() or not (ROOT / config).is_file():
        raise ValueError(
            f"--config got {str(config)!r}; allowed: a file of this checkout, since the checkout is what is installed"
        )
    workdir = check_workdir(FLAGS.workdir or f"runs/{name}", hosts)
    changes = [f"--config.{field}={value}" for field, value in words.changes.items()]
    # Beside the source, not in it: a launch of changed code continues the run.
    place = workdir if workdir.startswith("/") or is_url(workdir) else f"../{workdir}"
    made = ["-m", "jaxreason.main", f"--config={words.config}", *changes, f"--workdir={place}"]
    made.append(f"--code_when_stopped={remote.CUT_SHORT}")
    extra += ",gcs" * is_url(workdir)
    return launch.Asked(
        *(name, made, source.pack(ROOT), extra),
        workdir=workdir,
        max_restarts=FLAGS.max_restarts,
        keep=FLAGS.keep,
        fetch_to=FLAGS.fetch_to,
    )


def check_workdir(workdir: str, hosts: int) -> str:
    """Return the folder of a run on some hosts, which all of them must reach.

    Raises:
      ValueError: not a folder that they share.
    """
    if is_url(workdir):
        return check_url(workdir)
    if hosts > 1 and not workdir.startswith("/"):
        raise ValueError(
            f"--workdir got {workdir!r} for {hosts} hosts, which share no disk; allowed: gs://BUCKET/FOLDER, or the absolute "
            "path of a folder that all of them mount"
        )
    return workdir


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


def check_bucket(workdir: str, world: launch.World) -> None:
    """Raise ValueError if a run's folder is in a bucket that gcloud can't see."""
    if is_url(workdir):
        found = world.shell.look(gcloud.bucket(workdir))
        if found.code != 0:
            raise ValueError(
                f"--workdir got {workdir!r}, and gcloud can't see its bucket: {gcloud.why(found)}; create it with gcloud "
                "storage buckets create, or ask for roles/storage.objectAdmin"
            )


def plan(words: command.Words, machine: machines.Machine, say) -> None:
    """Plan the config for the slice; say how it fits, and what the run costs.

    Raises:
      ValueError: it does not fit, or can't be planned here.
    """
    changes = [f"--config.{field}={value}" for field, value in words.changes.items()]
    made = ["-m", "jaxreason.plan", f"--config={words.config}", *changes, f"--topology={machine.topology}"]
    say(f"planning for {machine.topology} (some minutes; --noplan leaves it out)")
    options = ["--nosearch", "--json"]
    done = subprocess.run(
        [sys.executable, *made, *options], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, cwd=ROOT
    )
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["it said nothing"]
    found = next((json.loads(line) for line in lines if line.startswith("{")), None)
    if found is None or not found["fits"]:
        why = lines[-1] if found is None else needs(found)
        raise ValueError(f"the config does not fit {machine.type}, or can't be planned: {why}; see python {shlex.join(made)}")
    config = command.read(words.config, words.changes, say=lambda line: None)
    say(f"fits {machine.type}: {needs(found)}")
    say(run_price(found, config[found["phase"]].steps, machine))


def needs(found: dict) -> str:
    """Say how much memory a plan needs, of its largest stage."""
    peak, hbm = found["peak_bytes"], found["hbm_bytes"]
    need = "more" if peak is None else f"{peak / 2**30:.2f} GiB"
    return f"it needs {need} of the {hbm / 2**30:.2f} GiB of a chip"


def run_price(found: dict, steps: int, machine: machines.Machine) -> str:
    """Say the time and price of a run, from its plan."""
    if found["prediction"] is None:
        return "the plan has no time for a step, so the price of the run is not known"
    hours = found["prediction"]["step_s"] * steps / 3600
    price = "" if machine.usd_per_hour is None else f" and ${hours * machine.usd_per_hour:,.2f} on demand"
    return (
        f"{steps} steps of phase {found['phase']}: about {hours:.2g} hours{price}, at {found['efficiency']:.0%} of the chips' "
        "peak rates, which is a guess; other phases, evaluations, compiling and waiting come on top"
    )


def agree(machine: machines.Machine, spot: bool) -> bool:
    """Say the price, and ask whether to go on."""
    print(f"{machine.type}: {machine.chips} chips on {machine.hosts} host(s), {launch.costs(machine)}" + ", less as spot" * spot)
    try:
        return FLAGS.yes or FLAGS.dry_run or input("create it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        raise ValueError("nobody can be asked whether to create it; --yes agrees") from None


# --- commands ---


def the_world() -> launch.World:
    if FLAGS.dry_run:
        print("dry run: the steps and their commands; none is run, and nothing is created or deleted")
    return launch.World(shell.printing(print) if FLAGS.dry_run else shell.real(), lambda line: print(line, flush=True))


def on_tpu(words: command.Words) -> int:
    machine = machines.machine_of(FLAGS.type)
    name = machines.check_name(FLAGS.name)
    queued = machines.needs_queue(machine) if FLAGS.queued is None else FLAGS.queued
    place = gcloud.Place(name, machines.check_zone(FLAGS.zone), FLAGS.project, FLAGS.spot, FLAGS.reserved, queued)
    if FLAGS.spot and FLAGS.reserved:
        raise ValueError("got --spot and --reserved; allowed: one of them")
    world = the_world()
    wanted = asked(words, name, "tpu", machine.hosts)
    if FLAGS.spot and not is_url(wanted.workdir):
        print("warning: a preempted slice loses its disk, so the run begins again on the next one, unless --workdir=gs://...")
    if not FLAGS.dry_run:
        check_gcloud(place, world)
        check_bucket(wanted.workdir, world)
        if FLAGS.plan:
            plan(words, machine, world.say)
    if not agree(machine, FLAGS.spot):
        return 1
    try:
        return launch.on_tpu(wanted, place, machine, target.tpu(place, world.shell), world)
    except KeyboardInterrupt:
        print(f"\nstopped here. {launch.left(name, place, machine, again())}")
        return 130
    except (launch.LaunchFailed, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}\n{launch.left(name, place, machine, again())}", file=sys.stderr)
        return 1


def on_gpu(words: command.Words) -> int:
    name = machines.check_name(FLAGS.name)
    if not FLAGS.host or FLAGS.host.startswith("-"):
        raise ValueError(f"--host got {FLAGS.host!r}; allowed: a machine as ssh names it, such as me@machine")
    world = the_world()
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
        if not state.names():
            print("no launches on this machine yet")
        for name in state.names():
            try:
                print(summary(name))
            except ValueError as error:  # the others are worth seeing
                print(f"error: {error}")
        return 0
    if len(names) != 1:
        raise ValueError(
            f"`launch {what}` got {len(names)} names; allowed: one name, of: {', '.join(state.names()) or 'no launches yet'}"
        )
    name = names[0]
    found = state.read(name)
    world = launch.World(shell.real(), print)
    place = gcloud.Place(**found["place"]) if found["kind"] == "tpu" else None
    reached = target.tpu(place, world.shell) if place is not None else target.over_ssh(found["host"], world.shell)
    if what == "status":
        print(summary(name))
        if place is not None:
            slice_state = launch.state_of(place, world)
            print(f"slice: {slice_state}")
            if slice_state == "ABSENT":
                return 0
        seen = looked(reached, name, 0, 0)
        print(f"run: {seen.state}" + ("" if seen.code is None else f" {seen.code}"))
    elif what in ("logs", "stop") and place is not None and launch.state_of(place, world) == "ABSENT":
        raise ValueError(f"{name} has no slice, so `launch {what}` can't reach it; {where_is_the_run(found)}")
    elif what == "logs":
        show_log(reached, name)
    elif what == "stop":
        done = reached.everywhere(remote.stop(name))
        launch.check(done, f"the machines of {name} could not be reached")
        print("asked to stop" if "asked to stop" in done.out else "nothing runs")
    elif what == "fetch":
        Path(FLAGS.fetch_to).mkdir(parents=True, exist_ok=True)
        from_bucket = is_url(found["workdir"])
        copy = gcloud.copy(found["workdir"], FLAGS.fetch_to)
        run = functools.partial(world.shell.run, copy, timeout_s=shell.COPY_TIMEOUT_S)
        path = launch.run_folder(name, found["workdir"])
        launch.check(run() if from_bucket else reached.fetch(path, FLAGS.fetch_to), "not copied")
        print(f"the run is in {FLAGS.fetch_to}/{Path(found['workdir']).name}")
    elif place is None:
        raise ValueError(f"{name} runs on {found['host']}, which is not ours to delete; allowed: a launch on TPUs")
    else:
        there = launch.state_of(place, world) != "ABSENT"
        if there:
            launch.delete(place, world)
        state.forget(name)
        print(f"{name} is deleted" if there else f"{name} has no slice, and costs nothing; `launch status` forgets it")
    return 0


def where_is_the_run(found: dict) -> str:
    return f"the run is in {found['workdir']}" if is_url(found["workdir"]) else "the run's folder was on it"


def looked(reached: target.Target, name: str, offset: int, most: int) -> remote.Seen:
    """Look at a run on its machine.

    Raises:
      LaunchFailed, ValueError: it does not answer, or something else.
    """
    found = reached.first(remote.look(name, offset, most), timeout_s=300.0)
    launch.check(found, f"the machines of {name} could not be reached")
    return remote.read(found.out)


def show_log(reached: target.Target, name: str, most: int = 5_000_000) -> None:
    """Print the whole log of a run, which may be long, in parts."""
    offset = 0
    while (seen := looked(reached, name, offset, most)).piece:
        sys.stdout.flush()
        sys.stdout.buffer.write(seen.piece)
        offset += len(seen.piece)
    sys.stdout.buffer.flush()


def summary(name: str) -> str:
    found = state.read(name)
    if found["kind"] == "gpu":
        return f"{name}: on {found['host']}, {found['workdir']}"
    if found["step"] == launch.DELETED:
        run = f"; {where_is_the_run(found)}" if is_url(found["workdir"]) else ""
        return f"{name}: {found['type']} in {found['place']['zone']}, deleted, costs nothing{run}"
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
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # the terminal may lack a character of the log
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
        if what in (*RUN, *WRITE):
            raise ValueError(f"`launch {what}` got {' '.join(names)!r}; allowed: flags only, such as --name={names[0]}")
        got = " ".join(map(str, argv[1:])) or "nothing"
        raise ValueError(f"got {got!r}; allowed: {', '.join((*RUN, *WRITE))} with flags, or {', '.join(LOOK)} and a NAME")
    except KeyboardInterrupt:
        sys.exit("stopped here; nothing was created or changed by this command" if what in RUN else "stopped here")
    except (ValueError, OSError, launch.LaunchFailed, json.JSONDecodeError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


WORDS: list[command.Words] = []


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Config file of this checkout, and options, as for jaxreason.main.")
    define_flags()
    app.run(main, flags_parser=parse_flags)
