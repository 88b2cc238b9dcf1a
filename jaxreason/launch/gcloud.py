"""Command lines of `gcloud` for TPU VMs and queued resources, and the states that they
report.

Commands: docs.cloud.google.com/sdk/gcloud/reference/compute/tpus, read 2026-11-28.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxreason.launch.machines import Machine
from jaxreason.launch.shell import Result

TPU = ("gcloud", "compute", "tpus", "tpu-vm")
QUEUED = ("gcloud", "compute", "tpus", "queued-resources")
LOST = ("PREEMPTED", "TERMINATED", "FAILED", "SUSPENDED", "SUSPENDING")  # by the cloud, so a new one takes its place
HELD = ("STOPPED", "STOPPING", "UNKNOWN")  # by somebody, and its disk may hold a run: never deleted without being asked
GONE = ("ABSENT", "DELETING")  # if it was there before: deleted by somebody
COMING = ("CREATING", "STARTING", "REPAIRING", "RESTARTING", "ACCEPTED", "PROVISIONING", "WAITING_FOR_RESOURCES", "CREATING_QR")


class Place(NamedTuple):
    """Name, place and payment of a slice."""

    name: str
    zone: str
    project: str | None = None
    spot: bool = False
    reserved: bool = False
    queued: bool = False


def where(place: Place) -> list[str]:
    return [f"--zone={place.zone}", *([f"--project={place.project}"] if place.project else [])]


def create(place: Place, machine: Machine) -> list[str]:
    """Return the command that creates a slice, or asks for one in a queue."""
    paid = ["--spot"] * place.spot + ["--reserved"] * place.reserved
    if place.queued:
        node = [f"--node-id={place.name}", f"--accelerator-type={machine.type}", f"--runtime-version={machine.version}"]
        return [*QUEUED, "create", place.name, *where(place), *node, *paid]
    return [
        *TPU,
        "create",
        place.name,
        *where(place),
        f"--accelerator-type={machine.type}",
        f"--version={machine.version}",
        *paid,
    ]


def delete(place: Place) -> list[str]:
    """Return the command that deletes a slice, and its queued resource."""
    if place.queued:
        return [*QUEUED, "delete", place.name, *where(place), "--force", "--quiet"]
    return [*TPU, "delete", place.name, *where(place), "--quiet"]


def describe(place: Place) -> list[str]:
    return [*TPU, "describe", place.name, *where(place), "--format=json"]


def describe_queued(place: Place) -> list[str]:
    return [*QUEUED, "describe", place.name, *where(place), "--format=json"]


def ssh(place: Place, script: str, worker: str = "all") -> list[str]:
    """Return the command that runs a script on one worker or all of them."""
    return [*TPU, "ssh", place.name, *where(place), f"--worker={worker}", f"--command={script}"]


def send(place: Place, file: str, path: str) -> list[str]:
    return [*TPU, "scp", file, f"{place.name}:{path}", *where(place), "--worker=all"]


def fetch(place: Place, path: str, folder: str) -> list[str]:
    return [*TPU, "scp", "--recurse", f"{place.name}:{path}", folder, *where(place), "--worker=0"]


def account() -> list[str]:
    return ["gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"]


def project() -> list[str]:
    return ["gcloud", "config", "get-value", "project"]


def zones(place: Place) -> list[str]:
    return [
        *("gcloud", "compute", "tpus", "locations", "list", "--format=value(locationId)"),
        *([f"--project={place.project}"] if place.project else []),
    ]


def bucket(url: str) -> list[str]:
    """Return the command that describes the bucket of a gs:// URL."""
    return ["gcloud", "storage", "buckets", "describe", "/".join(url.split("/")[:3]), "--format=value(name)"]


def copy(url: str, folder: str) -> list[str]:
    """Return the command that copies a folder from a bucket into a local folder."""
    return ["gcloud", "storage", "cp", "--recursive", url, folder]


def state_of(result: Result) -> str:
    """Return the state in the answer of `describe`; "ABSENT" if there is no such
    resource.

    Raises:
      ValueError: gcloud failed for another reason, or its answer can't be read.
    """
    if result.code != 0:
        if "NOT_FOUND" in result.err or "was not found" in result.err or "could not be found" in result.err:
            return "ABSENT"
        raise ValueError(f"gcloud could not describe it: {result.said}")
    try:
        state = answer(result)["state"]
        return str(state["state"] if isinstance(state, dict) else state)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"gcloud's answer has no state: {result.out.strip()[:200]!r}") from None


def answer(result: Result) -> dict[str, Any]:
    """Read the JSON object that a command printed, which warnings may precede.

    Raises:
      ValueError: there is none.
    """
    start = re.search(r"^\{", result.out, re.MULTILINE)
    found, _ = json.JSONDecoder().raw_decode(result.out, start.start() if start else 0)
    return found


def type_of(result: Result) -> str | None:
    """Return the accelerator type in the answer of `describe`, if it has one."""
    try:
        return answer(result).get("acceleratorType", "").rpartition("/")[2] or None
    except (ValueError, AttributeError):
        return None


def why(result: Result) -> str:
    """Explain an error of gcloud in one line, with what to do about the usual ones."""
    said = result.said
    text = f"{result.err}\n{result.out}"
    for sign, advice in ADVICE:
        if sign.lower() in text.lower():
            return f"{said}; {advice}"
    return said


ADVICE: Sequence[tuple[str, str]] = (
    ("quota", "ask for quota at console.cloud.google.com/iam-admin/quotas, or take another zone, a smaller --type, or --spot"),
    ("no more capacity", "there is no capacity now; --queued waits for it, or take another zone"),
    ("RESOURCE_EXHAUSTED", "there is no capacity or quota; --queued waits for it, or take another zone"),
    ("PERMISSION_DENIED", "the account lacks a permission (roles/tpu.admin, roles/iam.serviceAccountUser)"),
    ("SERVICE_DISABLED", "enable the API: gcloud services enable tpu.googleapis.com"),
    ("has not been used in project", "enable the API: gcloud services enable tpu.googleapis.com"),
    ("did you mean zone", "see gcloud compute tpus locations list"),
)
