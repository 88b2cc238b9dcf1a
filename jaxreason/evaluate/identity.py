"""What makes two evaluations the same: the checkpoint, the settings and the tasks. Only
attempts of the same evaluation are in one folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxreason.build.checkpoint import Checkpoint, fingerprint
from jaxreason.build.run import versions
from jaxreason.evaluation import Suite, requests
from jaxreason.runtime import workdir


def identity(opened: Checkpoint, settings: Mapping, seed: int) -> dict[str, Any]:
    """Return the checkpoint, the settings and the seed, as JSON types."""
    origin = {"path": str(opened.folder), "step": opened.step, "fingerprint": fingerprint(opened)}
    return json.loads(json.dumps({"checkpoint": origin, "settings": settings, "seed": seed}, default=list))


def default_folder(opened: Checkpoint, about: Mapping) -> Path:
    name = re.sub(r"[^\w.=-]+", "_", opened.folder.name)[-60:] + (f"-{opened.step}" if opened.step is not None else "")
    return Path("evaluations") / f"{name}-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]}"


def digest_tasks(suites: Sequence[Suite], n: int) -> dict[str, str]:
    """Digest the tasks of each suite with their prompts: a file may change under its
    path, and a template under its name.
    """
    found = {}
    for suite in suites:
        first = [group[0] for group in requests(suite, n, 0.0)]
        found[suite.name] = digest(
            *(f"{r.task.question}\0{r.task.answer}\0{' '.join(str(int(i)) for i in r.prompt)}" for r in first)
        )
    return found


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()[:10]


def check_same(folder: Path, about: Mapping, tasks: Mapping[str, str]) -> None:
    """Raise ValueError if a folder holds another evaluation.

    `tasks` are the digests of the suites' tasks; earlier versions wrote none.
    """
    there = workdir.json_object(folder / "evaluation.json")
    if there is None:
        # Attempts are of unknown settings without their evaluation.json.
        if any((folder / name).exists() for name in ("evaluation.json", "config.json", "rollouts.jsonl")):
            raise ValueError(f"{folder} holds something else; choose another --workdir")
        return
    differ = workdir.differences({k: there.get(k) for k in about}, dict(about))
    if differ:
        raise ValueError(f"{folder} holds another evaluation ({'; '.join(list(differ.values())[:3])}); choose another --workdir")
    changed = [name for name, made in tasks.items() if (there.get("tasks") or tasks).get(name) != made]
    if changed:
        raise ValueError(
            f"{folder} holds an evaluation of other tasks: those of {', '.join(changed)}, or their prompts, have changed since; "
            "choose another --workdir"
        )


def made_with() -> dict[str, Any]:
    """Return the versions of this code and its libraries, and the devices."""
    devices = jax.devices()
    return versions() | {"device": f"{len(devices)} x {devices[0].device_kind}"}
