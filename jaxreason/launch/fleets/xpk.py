"""A workload of xpk on GKE: the command `xpk workload create`, as a script.

Written for xpk 1.16 (github.com/AI-Hypercomputer/xpk, read 2026-11-28). xpk puts the
command of a workload as it is into YAML, inside a script of bash, and Kubernetes
replaces $(NAME) and $$ there. A command with a character that one of them might change
is therefore sent in base64.
"""

from __future__ import annotations

import base64
import re
import shlex

from jaxreason.launch import machines
from jaxreason.launch.fleets import job as jobs
from jaxreason.launch.fleets.job import Engine, Job

# xpk's names of machines with GPUs
GPUS = {
    **{f"L4:{count}": f"l4-{count}" for count in (1, 2, 4, 8)},
    **{f"A100:{count}": f"a100-40gb-{count}" for count in (1, 2, 4, 8)},
    "H100:8": "h100-80gb-8",
    "H100-MEGA:8": "h100-mega-80gb-8",
    "H200:8": "h200-141gb-8",
    "B200:8": "b200-8",
}
SMALLEST = {"v5litepod": 8}  # chips of a slice, where xpk has no smaller one
UNCHANGED = re.compile(r"[\w@%+=:,./'&\[\] -]*", re.ASCII)
PATH = re.compile(r"[\w./-]+", re.ASCII)
GRACE_S = 120  # that a run has to save itself


def types() -> list[str]:
    tpus = [name for name in machines.machines() if int(name.rpartition("-")[2]) >= SMALLEST.get(name.rpartition("-")[0], 0)]
    return [*tpus, *GPUS]


def check(job: Job) -> None:
    if not jobs.STORAGE.fullmatch(job.cluster) or len(job.cluster) > 40:
        raise ValueError(f"--cluster got {job.cluster!r}; allowed: the name of a cluster that xpk made (xpk cluster list)")
    if not job.is_tpu and job.slices > 1:
        raise ValueError(f"--slices got {job.slices}; allowed: 1 for GPUs")
    if not job.image and not PATH.fullmatch(job.root):
        raise ValueError(
            f"the checkout is in {job.root!r}, which xpk gives to a shell; allowed: a path of letters, digits and / . _ -"
        )
    for storage in job.mounts.values():
        if not jobs.STORAGE.fullmatch(storage):
            raise ValueError(f"--mount got {storage!r}; allowed: FOLDER=STORAGE, with a name of xpk storage list")
    jobs.check_survives(job)


def command(job: Job) -> str:
    """Return the words for bash in the container.

    `exec` makes the run the process that gets xpk's SIGTERM.
    """
    install = "" if job.image else f"pip install --quiet -e '.[{job.extra}]' && "
    plain = f"{install}exec python {shlex.join(job.command)}"
    if UNCHANGED.fullmatch(plain):
        return plain
    script = base64.b64encode(f"exec python {shlex.join(job.command)}\n".encode()).decode()
    return f"{install}echo {script} | base64 -d > /tmp/jaxreason-run && exec bash /tmp/jaxreason-run"


def create(job: Job) -> list[str]:
    """Return the words of the command that creates a workload."""
    image = (
        [f"--docker-image={job.image}"] if job.image else [f"--base-docker-image={job.base_image}", f"--script-dir={job.root}"]
    )
    return [
        *("xpk", "workload", "create"),
        f"--cluster={job.cluster}",
        f"--workload={job.name}",
        *([f"--tpu-type={job.type}", f"--num-slices={job.slices}"] if job.is_tpu else [f"--device-type={GPUS[job.type]}"]),
        *image,
        *(["--spot"] if job.spot else []),
        *(f"--storage={name}" for name in job.mounts.values()),
        *placed(job),
        f"--max-restarts={job.max_restarts}",
        f"--restart-on-exit-codes={jobs.STOPPED}",
        f"--termination-grace-period-seconds={GRACE_S}",
        f"--command={command(job)}",
    ]


def placed(job: Job) -> list[str]:
    return [f"--{name}={value}" for name, value in (("zone", job.zone), ("project", job.project)) if value]


def file(job: Job) -> str:
    """Write a script with the command."""
    first, *rest = create(job)[3:]
    words = " \\\n  ".join(shlex.quote(word) for word in [first, *rest])
    lines = [
        "#!/bin/bash",
        "# A workload of xpk: GKE waits for machines of the cluster, runs the command on",
        "# all hosts in a container, and starts it again after a preemption, at most",
        f"# --max-restarts times. Exit code {jobs.STOPPED} is that of a run that was asked to stop, and",
        "# saved itself; 127 to 255 (a signal) are started again anyway.",
        "#",
        *(
            ["# --docker-image is used as it is: it holds jaxreason, and is in the folder of the checkout."]
            if job.image
            else [
                "# --script-dir is copied into the image, which docker builds and pushes, without",
                "# what .dockerignore names. Run this in the checkout.",
            ]
        ),
    ]
    if "base64 -d" in command(job):
        lines += ["# The command has characters that YAML, bash or Kubernetes would change, hence base64."]
    if job.mounts:
        lines += [f"# --storage: of the cluster, where it must be mounted at {', '.join(job.mounts)}."]
    return "\n".join([*lines, f"exec xpk workload create \\\n  {words}"]) + "\n"


def active(out: str) -> dict[str, str]:
    """Read the answer of `listing`: a table with a row for each workload. A workload
    that has just been made has no status yet.

    Raises:
      ValueError: it is no table of xpk.
    """
    lines = out.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("Jobset Name ") and " Status  " in line), None)
    if first is None:
        raise ValueError(f"xpk workload list answered {out[:200]!r}; allowed: the table of xpk 1.16 or newer")
    column = lines[first].index(" Status  ") + 1
    found = {}
    for line in lines[first + 1 :]:
        name, status = line[:column].split(), line[column:]
        if name and jobs.STORAGE.fullmatch(name[0]) and line[column - 1 : column] in ("", " "):
            found[name[0]] = status.split()[0] if status and status[0] != " " else ""
    return {name: status for name, status in found.items() if status != "Finished"}


ENGINE = Engine(
    name="xpk",
    title="xpk",
    suffix=".sh",
    options=("type", "cluster", "slices", "image", "base_image", "spot", "zone", "project", "mounts", "max_restarts"),
    types=types,
    check=check,
    file=file,
    submit=lambda job, path: ["bash", path],
    watch=lambda job: [
        ["xpk", "workload", "list", f"--cluster={job.cluster}", f"--filter-by-job={job.name}", *placed(job)],
        [
            "kubectl",
            "logs",
            "--follow",
            f"--selector=jobset.sigs.k8s.io/jobset-name={job.name},batch.kubernetes.io/job-completion-index=0",
        ],
    ],
    stop=lambda job: ["xpk", "workload", "delete", "--force", f"--cluster={job.cluster}", f"--workload={job.name}", *placed(job)],
    overview=lambda job: ["xpk", "workload", "list", f"--cluster={job.cluster}", *placed(job)],
    listing=lambda job: ["xpk", "workload", "list", f"--cluster={job.cluster}", *placed(job)],
    active=active,
    no_jobs="",
    needs=(
        "xpk in an environment of its own: uv tool install xpk; gcloud, kubectl and docker, logged in",
        "a cluster of xpk with machines of this type, and a bucket that its service account may write to",
    ),
    longest_name=40,
)
