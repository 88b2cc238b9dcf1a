"""A managed job of SkyPilot: the file of its task, and the commands of `sky`.

Written for SkyPilot 0.14 (docs.skypilot.co: reference/yaml-spec,
examples/managed-jobs, read 2026-11-28).
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex

from jaxreason.launch import machines
from jaxreason.launch.fleets import job as jobs
from jaxreason.launch.fleets import yaml
from jaxreason.launch.fleets.job import Engine, Job

GPUS = ("A100", "A100-80GB", "B200", "H100", "H200", "L4", "L40S")  # SkyPilot's names
COUNTS = (1, 2, 4, 8)
ENDED = ("SUCCEEDED", "CANCELLED")  # and all that begin with FAILED
VENV = "$HOME/jaxreason-venv"
COMMENTS = {
    "name": "Managed job: SkyPilot finds machines, runs this, and deletes the machines.",
    "resources": "Machines. After a preemption SkyPilot takes new ones, first in other\n"
    f"regions. It also starts a job again that ends with exit code {jobs.STOPPED}: such a run\n"
    f"was asked to stop, and saved itself ({jobs.ENDED_AT_ONCE}: it had nothing to save yet).",
    "num_nodes": "A slice of TPUs counts as one, and SkyPilot runs the commands on all its hosts.",
    "workdir": "This checkout with its changes, without what .gitignore names.",
    "file_mounts": "Buckets, as folders of the machines.",
    "setup": "On each machine, also on a new one after a preemption. jaxreason needs\n"
    "Python 3.11 or newer, and the image of TPUs has 3.10, hence uv.",
    "run": "The same command on all hosts; it continues the run in --workdir.",
}


def types() -> list[str]:
    return [*machines.machines(), *(f"{name}:{count}" for name in GPUS for count in COUNTS)]


def check(job: Job) -> None:
    if job.is_tpu and job.nodes > 1:
        raise ValueError(f"--nodes got {job.nodes}; allowed: 1 for TPUs, whose --type counts all hosts of a slice")
    for source in job.mounts.values():
        jobs.check_bucket(source, "--mount")
    jobs.check_survives(job)


def file(job: Job) -> str:
    """Write the task of a job as YAML."""
    resources: dict = {"accelerators": f"tpu-{job.type}" if job.is_tpu else job.type, "use_spot": job.spot}
    if job.zone:
        resources = {"infra": f"gcp/{job.zone.rpartition('-')[0]}/{job.zone}"} | resources
    if job.is_tpu:
        resources["accelerator_args"] = {"runtime_version": machines.machine_of(job.type).version}
    resources["job_recovery"] = {"strategy": "EAGER_NEXT_REGION", "recover_on_exit_codes": [jobs.STOPPED, jobs.ENDED_AT_ONCE]}
    setup = [
        "set -e",
        'export PATH="$HOME/.local/bin:$PATH"',
        "command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh",
        f'uv venv --allow-existing --python 3.12 "{VENV}"',
        f"uv pip install --python \"{VENV}/bin/python\" -e '.[{job.extra}]'",
    ]
    values = {
        "name": job.name,
        "resources": resources,
        "num_nodes": job.nodes,
        "workdir": job.root,
        **(
            {"file_mounts": {folder: {"source": url, "mode": "MOUNT"} for folder, url in job.mounts.items()}}
            if job.mounts
            else {}
        ),
        "setup": "\n".join(setup) + "\n",
        "run": "\n".join(run(job)) + "\n",
    }
    return yaml.write(values, COMMENTS)


def run(job: Job) -> list[str]:
    """Return the script of a host. Hosts of TPUs find each other by themselves."""
    command = f'exec "{VENV}/bin/python" {shlex.join(job.command)}'
    if job.nodes == 1:
        return ["set -e", command]
    return [
        "set -e",
        'first=$(printf "%s\\n" "$SKYPILOT_NODE_IPS" | head -n 1)',
        f'{command} --coordinator_address="$first:{jobs.PORT}" --num_processes="$SKYPILOT_NUM_NODES" '
        '--process_id="$SKYPILOT_NODE_RANK"',
    ]


def active(out: str) -> dict[str, str]:
    """Read the answer of `listing`.

    Raises:
      ValueError: it is something else.
    """
    lists = []
    for begin in re.finditer(r"^\[", out.replace("\r", "\n"), re.MULTILINE):  # other lines may come first: [info] Starting
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            found, _ = json.JSONDecoder().raw_decode(out[begin.start() :])
            lists.append([(str(one["job_name"]), str(one["status"])) for one in found])
    if not lists:
        raise ValueError(f"sky jobs queue answered {out[:200]!r}; allowed: the JSON of SkyPilot 0.14 or newer")
    states = max(lists, key=len)
    return {name: state for name, state in states if state not in ENDED and not state.startswith("FAILED")}


ENGINE = Engine(
    name="sky",
    title="SkyPilot",
    suffix=".yaml",
    options=("type", "nodes", "spot", "zone", "mounts"),
    types=types,
    check=check,
    file=file,
    submit=lambda job, path: ["sky", "jobs", "launch", "--yes", "--detach-run", path],
    watch=lambda job: [["sky", "jobs", "queue"], ["sky", "jobs", "logs", "--name", job.name]],
    stop=lambda job: ["sky", "jobs", "cancel", "--yes", "--name", job.name],
    overview=lambda job: ["sky", "jobs", "queue"],
    listing=lambda job: ["sky", "jobs", "queue", "--all", "--output", "json"],
    active=active,
    no_jobs="No in-progress managed jobs",  # its controller was never made, or has stopped since all jobs have ended
    needs=(
        "SkyPilot in an environment of its own: uv tool install 'skypilot[gcp]', then sky check",
        "credentials of the cloud, and a bucket that the machines may write to",
    ),
    longest_name=40,
)
