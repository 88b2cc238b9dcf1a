"""A batch script of Slurm, mainly for GPUs: one process per node, which sees all its
GPUs.

Written for Slurm 23.11 and newer (slurm.schedmd.com: sbatch, preempt, read 2026-11-28).
"""

from __future__ import annotations

import re
import shlex

from jaxreason.launch.fleets import job as jobs
from jaxreason.launch.fleets.job import Engine, Job

CPUS_PER_GPU = 4  # cores for verifiers and data; Slurm's own default is often one per process
STATE = re.compile(r"\|[A-Z_]+$")
GRACE_S = 300  # before the end of its time in which a run is asked to save itself


def check(job: Job) -> None:
    if job.mounts:
        raise ValueError("got --mount; allowed: with sky or xpk; the nodes of Slurm share their folders")


def count_of(job: Job) -> int:
    return int(job.type.rpartition(":")[2])


def file(job: Job) -> str:
    """Write the batch script of a job."""
    name, count = job.type.rpartition(":")[::2]
    gpus = str(count) if name == "gpu" else f"{name}:{count}"
    given = [(flag, getattr(job, flag)) for flag in ("partition", "account", "qos")]
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={job.name}",
        "# One process per node; it sees all GPUs of the node.",
        f"#SBATCH --nodes={job.nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={gpus}",
        f"#SBATCH --cpus-per-task={job.cpus or CPUS_PER_GPU * count_of(job)}",
        *(f"#SBATCH --{flag}={value}" for flag, value in given if value),
        f"#SBATCH --time={job.time}",
        "# A job that is preempted waits in the queue again, under the same number, and",
        "# continues its run. Before its time is up the run is asked to save itself.",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f"#SBATCH --signal=TERM@{GRACE_S}",
        "",
        f"cd {shlex.quote(job.root)} || exit 1",
    ]
    if job.nodes > 1:
        all_gpus = ",".join(map(str, range(count_of(job))))
        lines += [
            "# Where JAX finds Slurm it takes one GPU per process, unless it is told otherwise.",
            f"export JAX_LOCAL_DEVICE_IDS={all_gpus}",
        ]
    return "\n".join([*lines, *run(job)]) + "\n"


def run(job: Job) -> list[str]:
    """Return the lines that run the command, and queue the job again if it was asked
    to stop.
    """
    command = shlex.join([job.python, *job.command])
    return [
        f'srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 {command}',
        "code=$?",
        f"# {jobs.STOPPED}: the run was asked to stop and saved itself ({jobs.ENDED_AT_ONCE}: there was nothing to save yet).",
        "# A job that was cancelled is no longer RUNNING, and is not queued again.",
        f'if [ "$code" = {jobs.STOPPED} ] || [ "$code" = {jobs.ENDED_AT_ONCE} ]; then',
        f'  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_restarts} ] &&',
        '    [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "  fi",
        "fi",
        'exit "$code"',
    ]


def submit(job: Job, path: str) -> list[str]:
    log = job.log or f"{path.rpartition('/')[0] or '.'}/%j.log"
    return ["sbatch", "--parsable", f"--output={log}", path]


def active(out: str) -> dict[str, str]:
    """Read the answer of `listing`: NAME|STATE of the jobs that have not ended.

    Raises:
      ValueError: it has lines, and none of them is about a job.
    """
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    found = dict(line.rpartition("|")[::2] for line in lines if STATE.search(line))
    if lines and not found:
        raise ValueError(f"squeue answered {out[:200]!r}; allowed: a line NAME|STATE for each job, or nothing")
    return found


ENGINE = Engine(
    name="slurm",
    title="Slurm",
    suffix=".sbatch",
    options=("type", "nodes", "cpus", "partition", "account", "qos", "time", "max_restarts"),
    types=tuple,
    check=check,
    file=file,
    submit=submit,
    watch=lambda job: [["squeue", "--me", f"--name={job.name}"]],
    stop=lambda job: ["scancel", "--me", f"--name={job.name}"],
    overview=lambda job: ["squeue", "--me"],
    listing=lambda job: ["squeue", "--me", "--noheader", "--format=%j|%T"],
    active=active,
    no_jobs="",
    needs=("sbatch on this machine, and this checkout and its Python in folders that the nodes see",),
    longest_name=60,
)
