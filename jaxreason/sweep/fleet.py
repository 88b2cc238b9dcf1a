"""Runs as jobs of an engine, one per run: `--engine=sky|xpk|slurm`.

A sweep's runs are handed over, and the command ends. The same command again collects
the folders of runs that are done, submits the runs that have no job yet, and writes the
report. All jobs write to one place, `--place`: a bucket, or for Slurm a folder that the
nodes see.

    state.json      per run: submitting, queued, running, done or failed, and its job
    jobs/NAME.*     the file of each job
    jobs/stop.sh    stops all jobs that have not ended

A run is "submitting" while its job is on its way. If the command is interrupted then,
the next one asks the engine whether it has that job, so that no run is submitted twice.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from jaxreason.launch import shell as shells
from jaxreason.launch.fleets import ENGINES, Engine, Job
from jaxreason.launch.fleets import job as jobs
from jaxreason.launch.shell import Result, Shell
from jaxreason.runtime.bucket import check_url
from jaxreason.sweep.arms import Sweep
from jaxreason.sweep.queue import State, read_states
from jaxreason.sweep.runs import SweepRun, check_folders, with_shared
from jaxreason.sweep.runs import make_runs as runs_of

FLAGS = flags.FLAGS
ROOT = Path(__file__).parents[2]
HANDED_OVER = ("submitting", "queued", "running")
ATTEMPTS = 10  # whose jobs are looked for where the file of states does not know them
NOT_COPIED = r"(.*/)?((checkpoints|profile)/.*|lock)$"  # of a run's folder in a bucket
EMPTY_WORDS = "XPK failed, error code"  # the cause is in the line before
NOTHING_THERE = "Did not find existing container"  # gcloud, while no run has written anything


class Fleet(NamedTuple):
    """An engine, and what all jobs of a sweep have in common."""

    engine: Engine
    title: str  # of the jobs' names
    folder: Path  # of the sweep
    place: str  # gs://BUCKET/FOLDER; "" for the sweep's folder
    fields: Mapping[str, Any]  # of each Job
    shell: Shell
    say: Callable[[str], None]


def make_runs(sweep: Sweep, folder: Path) -> list[SweepRun]:
    """List the runs of a sweep, each with all its phases: jobs share nothing."""
    jobs.check_config(sweep.config, ROOT)
    return runs_of(sweep, folder, share=False)


def read_flags(folder: Path, say: Callable[[str], None] = print) -> Fleet:
    """Make the fleet that the flags ask for.

    Raises:
      ValueError: a wrong option.
    """
    name, engine = FLAGS.engine, ENGINES[FLAGS.engine]
    fields = jobs.parse_options(name, engine, FLAGS.engine_options)
    if "type" not in fields:
        known = ", ".join(engine.types()) or "gpu:1, h100:8 ..."
        raise ValueError(f"--engine_options has no type; allowed: type=TYPE,... with one of: {known}")
    place = (FLAGS.place or "").rstrip("/")
    if place:
        check_url(place, "--place")
    elif name != "slurm":
        raise ValueError(
            f"--engine={name} needs --place=gs://BUCKET/FOLDER: its machines, and what is on them, end with each job"
        )
    fields |= {"root": str(ROOT)} | ({"python": sys.executable} if name == "slurm" else {})
    # Not the folder's name: another folder with the same place finds the jobs.
    title = place.rpartition("/")[2] or folder.name
    return Fleet(engine, title, folder, place, fields, shells.real(), say)


# --- jobs ---


def job_of(run: SweepRun, fleet: Fleet, attempt: int) -> tuple[Job, Path]:
    """Return the job of a run and its file.

    Its name is the same in every call, and differs between sweeps and attempts.

    Raises:
      ValueError: the engine can't take a value.
    """
    folder = fleet.folder.resolve()
    workdir = f"{fleet.place}/{folder_in_place(run)}" if fleet.place else str(folder / folder_in_place(run))
    unique = (fleet.place or str(folder), run.name, str(attempt))
    name = jobs.short_name(f"{fleet.title}-{run.arm}", *unique, longest=fleet.engine.longest_name)
    command = ["-m", "jaxreason.main", *run.words, f"--workdir={workdir}", f"--code_when_stopped={jobs.STOPPED}"]
    file = fleet.folder / "jobs" / f"{name}{fleet.engine.suffix}"
    log = str(file.resolve().with_suffix(".log")).replace("%", "%%")
    made = Job(name=name, command=command, workdir=workdir, log=log, **fleet.fields)
    return jobs.check(made, fleet.engine), file


def folder_in_place(run: SweepRun) -> str:
    return f"runs/{run.arm}/seed{run.seed}"


def listed(fleet: Fleet, a_job: Job) -> dict[str, str]:
    """Ask the engine for its jobs that have not ended: name -> state.

    Raises:
      ValueError: it does not answer, so nothing may be submitted.
    """
    result = fleet.shell.look(fleet.engine.listing(a_job))
    if result.code == 0:
        return fleet.engine.active(result.out)
    if fleet.engine.no_jobs and fleet.engine.no_jobs in f"{result.out}{result.err}":
        return {}
    raise ValueError(f"{fleet.engine.title} does not list its jobs, so none is submitted: {why(result, fleet.engine)}")


def why(result: Result, engine: Engine) -> str:
    """Explain an error of an engine in one line: its last line that says something."""
    text = result.out if EMPTY_WORDS in result.out else result.err.strip() or result.out
    lines = [line for line in text.splitlines() if line.strip() and EMPTY_WORDS not in line]
    said = " ".join(lines[-1].split()) if lines else result.said
    return f"{said}; needed: {'; '.join(engine.needs)}" if result.code == 127 else said


def collect(fleet: Fleet) -> None:
    """Copy the folders of all runs here, without their checkpoints.

    Raises:
      ValueError: they could not be copied.
    """
    if not fleet.place:
        return
    target = fleet.folder / "runs"
    target.mkdir(parents=True, exist_ok=True)
    words = ["gcloud", "storage", "rsync", "--recursive", f"--exclude={NOT_COPIED}", f"{fleet.place}/runs", str(target)]
    result = fleet.shell.run(words)
    if result.code == 127:
        raise ValueError("gcloud is not installed, and copies runs from the bucket; see cloud.google.com/sdk/docs/install")
    if result.code != 0 and NOTHING_THERE not in result.err:
        raise ValueError(f"the runs in {fleet.place} could not be copied here: {' '.join(result.said.split())}")


# --- handing over ---


def hand_over(
    runs: Sequence[SweepRun],
    state: State,
    fleet: Fleet,
    provenance: Callable[[], Mapping[str, str]] = dict,
    retries: int = 0,
    workers: int | None = None,
) -> None:
    """Collect what is done, and submit the runs that have no job: at most until
    `workers` have not ended. A run whose job failed is submitted `retries` times more.

    Raises:
      ValueError: the engine does not answer or refuses a job; the others are not
        submitted.
    """
    check_place(runs, state, fleet)
    for run in runs:
        job_of(run, fleet, 1)  # errors are told before anything is submitted
    try:
        # Listed first: a job that ends in between has its run collected.
        active = listed(fleet, job_of(runs[0], fleet, 1)[0])
        if any(handed_over(run, state) or is_unknown(run, state) for run in runs):
            collect(fleet)
            check_collected(runs, fleet)
        waiting = [run for run in runs if update(run, state, fleet, active, retries)]
        free = len(waiting) if workers is None else max(0, workers - sum(handed_over(run, state) for run in runs))
        for run in waiting[:free]:
            submit(run, state, fleet, provenance())
    except KeyboardInterrupt:
        fleet.say("\nstopped here; jobs that were submitted run on")
        raise
    finally:
        tell(runs, state, fleet)


def handed_over(run: SweepRun, state: State) -> bool:
    return is_handed_over(state.of(run))


def is_handed_over(found: Mapping) -> bool:
    """Return whether a run has a job, by its state: of an engine, as it has a place."""
    return found.get("status") in HANDED_OVER and "place" in found


def is_unknown(run: SweepRun, state: State) -> bool:
    """Return whether no job is known of a run that is not done. It may have one, or be
    done in the bucket: of another folder, or the file of states was lost.
    """
    return "place" not in state.of(run) and not run.is_done()


def check_collected(runs: Sequence[SweepRun], fleet: Fleet) -> None:
    """Raise ValueError if the place has runs of another sweep: with these names, and
    another config. Nothing of them may be reported, or continued.
    """
    try:
        check_folders(runs)
    except ValueError as error:
        raise ValueError(f"{error}; it is from {fleet.place or fleet.folder}: choose a --place of this sweep alone") from None


def where(fleet: Fleet) -> str:
    return f"--engine={fleet.engine.name}" + (f" --place={fleet.place}" if fleet.place else "")


def check_place(runs: Sequence[SweepRun], state: State, fleet: Fleet) -> None:
    """Raise ValueError if a run has a job of another engine, or at another place."""
    for run in runs:
        there = state.of(run).get("place")
        if handed_over(run, state) and there != where(fleet):
            raise ValueError(f"{run.name} has a job of {there}; allowed: the same flags, until all jobs have ended")


def check_none_handed_over(folder: Path) -> None:
    """Raise ValueError if a run has a job: this machine must not run it as well."""
    for name, found in read_states(folder / "state.json").items():
        if is_handed_over(found):
            raise ValueError(
                f"{name} has a job of {found['place']}; allowed: the same flags, which collect it, until it has ended"
            )


def update(run: SweepRun, state: State, fleet: Fleet, active: Mapping[str, str], retries: int) -> bool:
    """Record what became of a run; return whether it is to be submitted."""
    found = state.of(run)
    status, attempts = found["status"], found["attempts"]
    if is_unknown(run, state):
        attempts = next((n for n in range(1, ATTEMPTS + 1) if job_of(run, fleet, n)[0].name in active), attempts)
    job, _ = job_of(run, fleet, max(1, attempts))
    if run.is_done():
        state.set(run, status="done", reason="")
    elif job.name in active:
        waits = active[job.name] in ("PENDING", "QuotaReserved", "STARTING")
        state.set(run, status="queued" if waits else "running", attempts=max(1, attempts), reason=active[job.name])
        state.set(run, job=job.name, place=where(fleet))
    elif "place" in found and (status in ("queued", "running") or (status == "failed" and attempts)):
        again = attempts <= retries
        reason = f"job {job.name} ended before the run did; --retries={attempts} submits it again"
        state.set(run, status="waiting" if again else "failed", reason="" if again else reason)
        return again
    else:
        # Never submitted, or interrupted in the middle of it: no attempt was made.
        made = attempts - 1 if status == "submitting" else attempts if "place" in found else 0
        state.set(run, status="waiting", attempts=max(0, made), reason="")
        return True
    return False


def submit(run: SweepRun, state: State, fleet: Fleet, version: Mapping[str, str]) -> None:
    """Submit the job of a run.

    Raises:
      ValueError: the engine refused it, or did not answer in time.
    """
    attempt = state.of(run)["attempts"] + 1
    job, file = job_of(run, fleet, attempt)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(fleet.engine.file(job), encoding="utf-8")
    state.set(run, status="submitting", attempts=attempt, job=job.name, place=where(fleet), **version)
    result = fleet.shell.run(fleet.engine.submit(job, str(file)))
    if result.code == 0:
        state.set(run, status="queued", reason="")
        fleet.say(f"{run.name}: submitted as {job.name}")
    elif result.code == 124:
        raise ValueError(
            f"{run.name}: {result.said}; the same command asks {fleet.engine.title} whether it has the job {job.name}"
        )
    elif job.name in listed(fleet, job):  # it failed after the engine had taken the job
        state.set(run, status="queued", reason="")
        fleet.say(f"{run.name}: submitted as {job.name}, although {fleet.engine.title} said: {why(result, fleet.engine)}")
    else:
        state.set(run, status="waiting", attempts=attempt - 1, reason=why(result, fleet.engine))
        raise ValueError(f"{run.name} could not be submitted: {why(result, fleet.engine)}; the same command tries again")


def tell(runs: Sequence[SweepRun], state: State, fleet: Fleet) -> None:
    """Say how many runs are where, and how to look at their jobs and stop them."""
    by_status: dict[str, int] = {}
    for run in runs:
        by_status[state.of(run)["status"]] = by_status.get(state.of(run)["status"], 0) + 1
    fleet.say(f"{len(runs)} runs: {', '.join(f'{count} {status}' for status, count in sorted(by_status.items()))}")
    for run in runs:
        if state.of(run)["status"] == "failed":
            fleet.say(f"{run.name}: {state.of(run).get('reason', '')}")
    alive = [
        job_of(run, fleet, state.of(run)["attempts"])[0] for run in runs if handed_over(run, state) and state.of(run)["attempts"]
    ]
    script = fleet.folder / "jobs" / "stop.sh"
    if not alive:
        script.unlink(missing_ok=True)
        return
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text("".join(f"{shlex.join(fleet.engine.stop(job))}\n" for job in alive), encoding="utf-8")
    fleet.say(f"{len(alive)} jobs run, or wait, and may cost money. To collect runs: the same command. To look at jobs:")
    fleet.say(f"  {shlex.join(fleet.engine.overview(alive[0]))}")
    fleet.say(f"to stop all:\n  bash {shlex.quote(os.path.relpath(script))}")


def dry_run(sweep: Sweep, folder: Path) -> list[str]:
    """List the commands that would submit the runs that are not done."""
    fleet = read_flags(folder)
    runs = make_runs(sweep, folder)
    lines = ["", f"to be submitted to {fleet.engine.title}, unless it has the job:"]
    for run in runs:
        if not run.is_done():
            job, file = job_of(run, fleet, 1)
            lines.append(f"  {run.name}: {shlex.join(fleet.engine.submit(job, str(file)))}")
    if shared := len(with_shared(runs, folder / "shared")) - len(runs):
        lines.append(f"phases that runs share ({shared}) are trained by each of them, since each job has its own machine")
    return lines
