"""The identity of an evaluation: its checkpoint, settings and tasks. A folder holds
attempts of one evaluation only.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxreason.build.checkpoint import Checkpoint, fingerprint
from jaxreason.build.run import versions
from jaxreason.evaluate.own_code import PACKAGE, digest_sources, own_names
from jaxreason.evaluation import Suite, requests
from jaxreason.runtime import workdir


def identity(opened: Checkpoint, settings: Mapping, seed: int) -> dict[str, Any]:
    """Return the checkpoint, the settings and the seed, and the digests of the user's
    own code if there is any, as JSON types.
    """
    origin = {"path": str(opened.folder), "step": opened.step, "fingerprint": fingerprint(opened)}
    found = {"checkpoint": origin, "settings": settings, "seed": seed}
    if names := own_names(settings["suites"].values(), opened.sections["verifier"], opened.sections["environment"]):
        found["own_code"] = digest_sources(names)
    return json.loads(json.dumps(found, default=list))


def compared(about: Mapping) -> dict[str, Any]:
    """Return the part of an identity that a continuation must repeat.

    The date in a chat template is not part of it: a continuation keeps the first one's.
    Nor is `recovery`, which adds to an evaluation and changes none of its attempts.
    """
    settings = {name: value for name, value in about["settings"].items() if name != "recovery"}
    settings["text"] = {name: value for name, value in settings["text"].items() if name != "date"}
    return {**about, "settings": settings}


def default_folder(opened: Checkpoint, about: Mapping) -> Path:
    name = re.sub(r"[^\w.=-]+", "_", opened.folder.name)[-60:] + (f"-{opened.step}" if opened.step is not None else "")
    made = hashlib.sha256(json.dumps(compared(about), sort_keys=True).encode()).hexdigest()
    return Path("evaluations") / f"{name}-{made[:8]}"


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
    began = {name: there.get(name) for name in about}
    if not isinstance(began["settings"], dict) or not isinstance(began["settings"].get("text"), dict):
        raise ValueError(f"{folder / 'evaluation.json'} is damaged: it has no settings; choose another --workdir")
    here = compared(about)  # without settings that an earlier version did not record
    here["settings"] = {name: value for name, value in here["settings"].items() if name in began["settings"]}
    differ = workdir.differences(compared(began), here)
    own = [name.partition(".")[2] for name in differ if name.partition(".")[0] == "own_code"]
    if own and len(own) == len(differ):
        raise ValueError(
            f"{folder} holds an evaluation by another version of your code: {', '.join(own)} changed since, and verdicts of two "
            "versions do not mix; choose another --workdir"
        )
    if differ:
        raise ValueError(f"{folder} holds another evaluation ({'; '.join(list(differ.values())[:3])}); choose another --workdir")
    changed = [name for name, made in tasks.items() if (there.get("tasks") or tasks).get(name) != made]
    if changed:
        raise ValueError(
            f"{folder} holds an evaluation of other tasks: those of {', '.join(changed)}, or their prompts, have changed since; "
            "choose another --workdir"
        )


# Libraries besides those of a run that decide verdicts and token ids.
JUDGES = ("math-verify", "sympy", "reasoning-gym", "numpy", "tokenizers", "jinja2")


def made_with() -> dict[str, Any]:
    """Return the versions of this code and its libraries, and the devices."""
    found, devices = versions(), jax.devices()
    for name in JUDGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["versions"][name] = importlib.metadata.version(name)
    found["code"] = digest(*(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))))
    return found | {"device": f"{len(devices)} x {devices[0].device_kind}"}


def also_made_with(there: Mapping, now: Mapping, say: Callable[[str], None]) -> dict[str, Any]:
    """Return what `evaluation.json` says of the versions, where attempts are added to
    those of an earlier process.

    Other versions may give other numbers, but an evaluation is worth continuing on a
    machine that was updated: they are not refused, but said, and recorded under
    `continued_with`.
    """
    first = {name: there[name] for name in now if name in there}
    every = [first, *there.get("continued_with", ())]
    differ = workdir.differences(every[-1], {name: now[name] for name in every[-1]})
    if differ:
        say(f"warning: earlier attempts were made with other versions ({'; '.join(differ.values())}); both are recorded")
        every.append(dict(now))
    return first | ({"continued_with": every[1:]} if every[1:] else {})
