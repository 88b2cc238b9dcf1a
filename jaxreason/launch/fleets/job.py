"""A job of an engine: a command, machines, and a folder that outlives them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxreason.launch import machines
from jaxreason.options import unknown_name_message
from jaxreason.runtime.bucket import check_url

STOPPED = 75  # exit code of a run that saved itself before its end: EX_TEMPFAIL of sysexits.h, "try again"
ENDED_AT_ONCE = 143  # of one that had nothing to save when SIGTERM came
PORT = 8476  # of process 0, where several processes of GPUs meet
SLUG = 24  # characters of a name that stay readable where a hash follows


class Job(NamedTuple):
    """A command on machines, and how they are paid."""

    name: str
    command: Sequence[str]  # behind `python`, with the folder of the run
    workdir: str  # the folder of the run, as the machines see it
    type: str  # v5litepod-16, or H100:8
    root: str = "."  # the checkout, as the engine's program sees it
    python: str = "python"  # of an engine whose machines share their files with this one
    nodes: int = 1  # machines with GPUs; the hosts of a TPU slice are part of its type
    spot: bool = False
    mounts: Mapping[str, str] = {}  # folder on the machines -> bucket, or storage of an xpk cluster
    zone: str = ""
    project: str = ""
    max_restarts: int = 20
    cluster: str = ""  # xpk
    image: str = ""  # xpk: used as it is; else base_image with this checkout
    base_image: str = "python:3.12"
    slices: int = 1
    partition: str = ""  # Slurm
    account: str = ""
    qos: str = ""
    time: str = "24:00:00"
    cpus: int = 0  # cores of each process; 0: some per GPU
    log: str = ""  # Slurm: file of the output

    @property
    def is_tpu(self) -> bool:
        return ":" not in self.type

    @property
    def extra(self) -> str:
        """Extras of the package that its machines need."""
        return ("tpu" if self.is_tpu else "gpu") + ",gcs" * ("://" in self.workdir)


class Engine(NamedTuple):
    """An engine's file, commands and answers."""

    name: str  # as a word of a command
    title: str
    suffix: str  # of its file
    options: tuple[str, ...]  # fields of Job that are flags, and that it reads
    types: Callable[[], Sequence[str]]  # that are known; none: any with a count, as Slurm's cluster names them
    check: Callable[[Job], None]
    file: Callable[[Job], str]
    submit: Callable[[Job, str], list[str]]  # (job, file)
    watch: Callable[[Job], list[list[str]]]  # commands for people
    stop: Callable[[Job], list[str]]
    overview: Callable[[Job], list[str]]  # the command that shows all jobs to people
    listing: Callable[[Job], list[str]]  # the command that lists all jobs ...
    active: Callable[[str], dict[str, str]]  # ... and what it printed: name -> state of jobs that have not ended
    no_jobs: str  # in the error of a listing that fails since there were never jobs
    needs: Sequence[str]
    longest_name: int


TEXTS = re.compile(r"[A-Za-z0-9][\w./:@=+-]*", re.ASCII)  # options that end up in a line of a file or a command
BUCKET = re.compile(r"(gs|s3)://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[\w./-]*)?", re.ASCII)
FOLDER = re.compile(r"(/(?!\.\.?(/|$))[\w.-]+)+", re.ASCII)
TIME = re.compile(r"(\d+-)?\d{1,2}:\d{2}:\d{2}", re.ASCII)
STORAGE = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def check(job: Job, engine: Engine) -> Job:
    """Check all values of a job.

    Raises:
      ValueError: an engine can't take one; in one line.
    """
    check_name(job.name, engine.longest_name)
    known = engine.types()
    if known and job.type not in known:
        raise ValueError(unknown_name_message(f"--type of {engine.title}", job.type, known))
    if not known and not re.fullmatch(r"[A-Za-z][\w.-]*:[1-9]\d?", job.type or "", re.ASCII):
        raise ValueError(
            f"--type got {job.type!r}; allowed: NAME:COUNT, such as h100:8, with the cluster's name of the GPU, or gpu:8"
        )
    for name in ("zone", "project", "cluster", "image", "base_image", "partition", "account", "qos"):
        if (value := getattr(job, name)) and not TEXTS.fullmatch(value):
            raise ValueError(f"--{name} got {value!r}; allowed: letters, digits and _ . / : @ = + -")
    if job.zone:
        machines.check_zone(job.zone)
    if not TIME.fullmatch(job.time):
        raise ValueError(f"--time got {job.time!r}; allowed: HH:MM:SS or D-HH:MM:SS")
    for name, least in (("nodes", 1), ("slices", 1), ("cpus", 0), ("max_restarts", 0)):
        if getattr(job, name) < least:
            raise ValueError(f"--{name} got {getattr(job, name)}; allowed: {least} or more")
    for folder in job.mounts:
        if not FOLDER.fullmatch(folder):
            raise ValueError(f"--mount got the folder {folder!r}; allowed: a path from /, of letters, digits and _ . -")
    if any("\0" in word or any("\ud800" <= c <= "\udfff" for c in word) for word in (*job.command, job.root, job.python)):
        raise ValueError("the command has bytes that are no UTF-8; allowed: text")
    if "://" in job.workdir:
        check_url(job.workdir)
    engine.check(job)
    return job


def check_name(name: str, longest: int) -> str:
    """Raise ValueError for a name that is not one of a job at each engine."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name or "") or len(name) > longest:
        raise ValueError(
            f"--name got {name!r}; allowed: up to {longest} of a-z, 0-9 and -, beginning with a letter, not ending in -"
        )
    return name


def check_bucket(url: str, flag: str) -> str:
    """Raise ValueError for what is no bucket that can be mounted."""
    if not BUCKET.fullmatch(url):
        raise ValueError(f"{flag} got {url!r}; allowed: a bucket, such as gs://my-bucket or s3://my-bucket")
    return url


def check_survives(job: Job) -> None:
    """Raise ValueError if the run's folder would be lost with its machines."""
    inside = ".." not in Path(job.workdir).parts
    if "://" in job.workdir or any(inside and job.workdir.startswith(f"{folder}/") for folder in job.mounts):
        return
    mounted = f", or a folder below a --mount ({', '.join(job.mounts)})" if job.mounts else ", or a folder below a --mount"
    raise ValueError(
        f"--workdir got {job.workdir!r}, which is lost with the machine, at a preemption and at the end; allowed: a bucket, "
        f"--workdir=gs://BUCKET/{job.name}{mounted}"
    )


def check_config(config: str, root: Path) -> str:
    """Raise ValueError for a config file that is not in the checkout, which is all that
    the machines get.
    """
    file = Path(config.partition(":")[0])
    if file.is_absolute() or ".." in file.parts or not (root / file).is_file():
        raise ValueError(f"--config got {str(file)!r}; allowed: a file of this checkout, since the checkout is what is installed")
    return config


def parse_mounts(words: Sequence[str]) -> dict[str, str]:
    """Read FOLDER=SOURCE of each --mount.

    Raises:
      ValueError: another form.
    """
    found = {}
    for word in words:
        folder, equals, source = word.partition("=")
        if not equals or not source:
            raise ValueError(f"--mount got {word!r}; allowed: FOLDER=BUCKET, such as /data=gs://my-bucket")
        found[folder.rstrip("/") or "/"] = source
    return found


def parse_options(engine: str, made: Engine, text: str) -> dict:
    """Read `type=v5litepod-16,spot=true,zone=us-west4-a` as fields of a Job.

    Raises:
      ValueError: an unknown option, or a value of the wrong kind.
    """
    allowed = {"mount" if name == "mounts" else name for name in made.options}
    found: dict = {}
    for part in filter(None, text.split(",")):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            raise ValueError(f"--engine_options has {part!r}; allowed: NAME=VALUE,NAME=VALUE")
        if name not in allowed:
            raise ValueError(unknown_name_message(f"--engine_options of {engine}", name, allowed))
        if name in found:
            raise ValueError(f"--engine_options has {name!r} twice; allowed: once")
        kind = type(Job._field_defaults.get(name))
        if name == "mount":
            for folder, source in parse_mounts([value]).items():
                if found.setdefault("mounts", {}).setdefault(folder, source) != source:
                    raise ValueError(f"--engine_options has the mount {folder!r} twice; allowed: once")
        elif kind is int:
            if not value.isdecimal() or len(value) > 9:
                raise ValueError(f"--engine_options has {part!r}; allowed: a whole number")
            found[name] = int(value)
        elif kind is bool:
            if value not in ("true", "false"):
                raise ValueError(f"--engine_options has {part!r}; allowed: true or false")
            found[name] = value == "true"
        else:
            found[name] = value
    return found


def short_name(*parts: str, longest: int) -> str:
    """Make a job's name of any texts: letters of the first, and a hash of all."""
    slug = re.sub(r"[^a-z0-9]+", "-", parts[0].lower()).strip("-")[: min(SLUG, longest - 13)].strip("-")
    slug = slug if slug[:1].isalpha() else f"job-{slug}".strip("-")[: longest - 11].strip("-")
    return f"{slug}-{hashlib.sha256(chr(0).join(parts).encode(errors='surrogateescape')).hexdigest()[:10]}"
