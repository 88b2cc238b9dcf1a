"""`python -m jaxreason.launch sky|xpk|slurm`: write a job file for an engine, and
print the commands that submit, watch and stop it. Nothing is submitted here.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from absl import flags

from jaxreason.launch.fleets import ENGINES, Engine, Job
from jaxreason.launch.fleets import job as jobs
from jaxreason.launch.machines import machines
from jaxreason.options import command

FLAGS = flags.FLAGS
ALWAYS = ("name", "workdir", "out")


def define_flags() -> None:
    """Define the flags that only engines read; see `refuse`."""
    flags.DEFINE_string("out", None, "sky, xpk, slurm: file to write; - prints it. Default: launches/NAME/job.*.")
    flags.DEFINE_multi_string("mount", [], "sky, xpk: FOLDER=BUCKET, or FOLDER=STORAGE of xpk, seen by the machines.")
    flags.DEFINE_integer("nodes", 1, "sky, slurm: machines with GPUs.")
    flags.DEFINE_string("cluster", "", "xpk: name of the cluster.")
    flags.DEFINE_integer("slices", 1, "xpk: slices of TPUs.")
    flags.DEFINE_string("image", "", "xpk: image that holds jaxreason.")
    flags.DEFINE_string("base_image", Job._field_defaults["base_image"], "xpk: image into which this checkout is copied.")
    flags.DEFINE_string("partition", "", "slurm: partition.")
    flags.DEFINE_string("account", "", "slurm: account.")
    flags.DEFINE_string("qos", "", "slurm: quality of service.")
    flags.DEFINE_string("time", Job._field_defaults["time"], "slurm: most time of the job before it is queued again.")
    flags.DEFINE_integer("cpus", 0, "slurm: cores per node. Default: 4 per GPU.")
    flags.DEFINE_string("python", None, "slurm: Python that has jaxreason, seen by the nodes. Default: this one.")


def on_engine(name: str, words: command.Words, root: Path) -> int:
    """Write the file of a job; return the exit code.

    Raises:
      ValueError: a wrong flag, config or folder.
      OSError: the file can't be written.
    """
    engine = ENGINES[name]
    if FLAGS.type == "list":
        print("\n".join(engine.types() or ["NAME:COUNT, with the cluster's name of the GPU, or gpu:COUNT"]))
        return 0
    check_flags(name, engine)
    made = asked(name, words, root)
    text = engine.file(made)
    if FLAGS.out == "-":
        print(text, end="")
        print("\n".join(what_next(engine, made, f"job{engine.suffix}", root)), file=sys.stderr)
        return 0
    path = Path(FLAGS.out or root / "launches" / made.name / f"job{engine.suffix}").absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    shown = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
    print(f"written: {shown}")
    print("\n".join(what_next(engine, made, shown, root)))
    return 0


OWN = (
    "out",
    "mount",
    "nodes",
    "cluster",
    "slices",
    "image",
    "base_image",
    "partition",
    "account",
    "qos",
    "time",
    "cpus",
    "python",
)


def refuse(what: str) -> None:
    """Raise ValueError if a flag is given that only engines read."""
    if given := [name for name in OWN if FLAGS[name].present]:
        raise ValueError(f"got --{given[0]}; `launch {what}` does not read it; allowed: with {', '.join(ENGINES)}")


def check_flags(name: str, engine: Engine) -> None:
    """Raise ValueError if a flag is given that the engine does not read."""
    ours = {"mount" if option == "mounts" else option for option in engine.options}
    ours |= {*ALWAYS, *(["python"] if name == "slurm" else [])}
    others = (
        *OWN,
        "zone",
        "project",
        "host",
        "queued",
        "spot",
        "reserved",
        "keep",
        "yes",
        "plan",
        "dry_run",
        "max_restarts",
        "fetch_to",
    )
    if given := [flag for flag in others if FLAGS[flag].present and flag not in ours]:
        raise ValueError(f"got --{given[0]}; `launch {name}` reads: {', '.join(f'--{one}' for one in sorted(ours))}")


def asked(name: str, words: command.Words, root: Path) -> Job:
    """Return the job that the flags ask for.

    Raises:
      ValueError: a value that the engine can't take, or an error in the config.
    """
    engine = ENGINES[name]
    jobs.check_name(FLAGS.name, engine.longest_name)
    if words.config is None:
        raise ValueError("no --config given; for example --config=configs/gsm8k.py")
    jobs.check_config(words.config, root)
    shared = name == "slurm"
    workdir = FLAGS.workdir or f"runs/{FLAGS.name}"
    if shared and "://" not in workdir:
        workdir = str(root / workdir)
    changes = [f"--config.{field}={value}" for field, value in words.changes.items()]
    made = ["-m", "jaxreason.main", f"--config={words.config}", *changes, f"--workdir={workdir}"]
    options = {option: getattr(FLAGS, option) for option in engine.options if option != "mounts"}
    if "mounts" in engine.options:
        options["mounts"] = jobs.parse_mounts(FLAGS.mount)
    options = {option: "" if value is None else value for option, value in options.items()}
    if shared:
        options |= {"root": str(root), "python": FLAGS.python or sys.executable}
    job = Job(name=FLAGS.name, command=[*made, f"--code_when_stopped={jobs.STOPPED}"], workdir=workdir, **options)
    jobs.check(job, engine)
    command.read(words.config, words.changes, say=lambda line: print(line, file=sys.stderr))
    return job


def what_next(engine: Engine, job: Job, path: str, root: Path) -> list[str]:
    """List what the engine needs, and commands to copy, for the checkout's folder."""
    lines = ["needed:", *(f"  {need}" for need in engine.needs)]
    if job.is_tpu:
        config = [word for word in job.command if word.startswith("--config")]
        plan = ["python", "-m", "jaxreason.plan", *config, f"--topology={machines()[job.type].topology}"]
        lines += ["to see whether it fits:", f"  {shlex.join(plan)}"]
    commands = {"submit it": [engine.submit(job, path)], "watch it": engine.watch(job), "stop it": [engine.stop(job)]}
    for what, several in commands.items():
        lines += [f"to {what}:", *(f"  {shlex.join(one)}" for one in several)]
    return lines
