"""Resume: restore the newest complete checkpoint and cut the logs back to it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxreason import teacher
from jaxreason.learner import state_shapes
from jaxreason.runtime import files, ledger
from jaxreason.runtime.checkpoint import Checkpoints, Damaged
from jaxreason.runtime.workdir import free_name
from jaxreason.types import TrainState


class NotResumable(Exception):
    """The run has checkpoints, but can't continue from any of them."""


@dataclass
class Progress:
    """Progress and results of a run: the `host` item of a checkpoint, as JSON."""

    phase: int = 0  # index of the current phase
    phase_step: int = 0  # steps done in the phase
    source: dict | None = None  # state of the phase's source; None before its first step
    waiting: list[dict] = field(default_factory=list)  # metrics of steps not logged yet
    evaluations: list[dict] = field(default_factory=list)
    losses: list[dict] = field(default_factory=list)  # on held-out texts
    wall_s: float = 0.0
    saving_s: float = 0.0  # time that the loop waited for checkpoints
    skipped: int = 0  # consecutive batches whose update was not finite, up to the last one logged
    ledger: dict = field(default_factory=ledger.empty)
    joules_from: list[str | None] = field(default_factory=list)  # sources of the ledger's joules so far; None: not counted

    warnings: list[dict] = field(default_factory=list)  # see `alarms`
    alarms: dict = field(default_factory=dict)  # fields of `alarms.Alarms`
    verifier_warnings: int = 0  # shown so far

    @staticmethod
    def names() -> set[str]:
        return {field.name for field in dataclasses.fields(Progress)}

    @staticmethod
    def needed() -> set[str]:
        """Return the fields that every checkpoint has."""
        return Progress.names() - {"joules_from", "warnings", "alarms", "verifier_warnings"}

    @staticmethod
    def read(host: Mapping[str, Any]) -> Progress:
        """Read the `host` item of a checkpoint. Its ledger may lack kinds of work and
        units that earlier versions did not count, and where its joules are from.
        """
        found = {name: host[name] for name in Progress.needed()}
        joules_from = host.get("joules_from", ["watts" if any(used["joules"] for used in found["ledger"].values()) else None])
        more = {name: host[name] for name in ("warnings", "alarms", "verifier_warnings") if name in host}
        return Progress(**found | more | {"ledger": ledger.complete(found["ledger"]), "joules_from": joules_from})


class Found(NamedTuple):
    """The checkpoint that a run continues from."""

    step: int  # counted over the whole run
    host: dict  # the checkpoint's `host` item: `Progress`, and the provenance of the run
    state: TrainState
    reference: Any  # params, or None if the phase has no reference policy
    read_s: float = 0.0  # time to find and read the checkpoint

    @property
    def logged(self) -> int:
        """Return the last step whose metrics the checkpoint expects in the log."""
        return self.step - len(self.host["waiting"])


def find_newest(run, checkpoints: Checkpoints, say: Callable[[str], None]) -> Found | None:
    """Restore the newest undamaged checkpoint; None if there are no checkpoints.
    Damaged ones are reported and set aside.

    Raises:
      NotResumable: a checkpoint belongs to another run or version, or all are damaged.
    """
    started_s, steps = time.monotonic(), checkpoints.steps()
    for step in steps:
        try:
            found = restore(run, checkpoints, step)
            return found._replace(read_s=time.monotonic() - started_s)
        except Damaged as error:
            say(f"{error}; set aside")
            checkpoints.set_aside(step)
        except ValueError as error:
            raise NotResumable(str(error)) from None
    if steps:
        raise NotResumable(
            "none of the checkpoints is whole, so there is nothing to go on from; choose another --workdir, or start "
            "anew with --resume=never, which moves the old files aside"
        )
    return None


def restore(run, checkpoints: Checkpoints, step: int) -> Found:
    host = checkpoints.peek(step)
    if missing := Progress.needed() - host.keys():
        lacks = ", ".join(sorted(missing))
        raise ValueError(f"checkpoint {step} lacks {lacks}: another version made it; choose another --workdir")
    if host["phase"] >= len(run.phases):
        had, has = host["phase"] + 1, len(run.phases)
        raise ValueError(f"checkpoint {step} is of phase {had}, and the config has {has}; choose another --workdir")
    phase = run.phases[host["phase"]]
    abstract, placed = state_shapes(run.model, phase.optimizer, run.mesh, phase.objective.controls)
    wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed)
    state, _ = checkpoints.restore(step, wanted)
    check_teacher(phase, host)
    reference = checkpoints.restore_reference(step, wanted.params) if teacher.is_saved(phase) else None
    return Found(step, host, state, reference)


def check_teacher(phase, host: Mapping[str, Any]) -> None:
    """Raise ValueError if a phase's teacher is not the one that the checkpoint had."""
    had = host.get("teachers", {}).get(phase.name)
    if had is None or not isinstance(phase.reference, teacher.Teacher) or had == phase.reference.identity:
        return
    (was, _), (now, _) = (tuple(identity.values()) for identity in (had, phase.reference.identity))
    steps = f"it was step {was} and is step {now}" if was != now else "its files have changed"
    raise ValueError(
        f"config.{phase.name}.reference is not what it was when the run began: {steps}; name the checkpoint "
        "(RUN/checkpoints/STEP), bring it back, or choose another --workdir"
    )


def changed_versions(found: Found, provenance: Mapping[str, Any]) -> list[str]:
    """List the packages whose version has changed since the checkpoint was made."""
    there = found.host["versions"]
    return [f"{name} {there.get(name)}, now {v}" for name, v in provenance["versions"].items() if v != there.get(name)]


def begin_logs(workdir: Path, say: Callable[[str], None]) -> None:
    """Move aside the logs of a run that ended before its first checkpoint."""
    for path in (workdir / "metrics.jsonl", workdir / "rollouts.jsonl"):
        if path.is_file() and path.stat().st_size:
            aside = free_name(path)
            with files.writing(path):
                path.rename(aside)
            say(f"there is no checkpoint, so the run starts anew; the {path.name} that was there is now {aside}")


def cut_logs(run, workdir: Path, found: Found, say: Callable[[str], None]) -> None:
    """Drop log lines after the checkpoint, and warn if lines before it are missing."""
    dropped, stretches = {}, logged_steps(run, found)
    for name, step in {"metrics.jsonl": found.logged, "rollouts.jsonl": found.step}.items():
        got = files.truncate(workdir / name, step)
        dropped[name] = got.dropped
        if got.aside is not None:
            say(
                f"warning: {workdir / name} had lines that are not log records; they are removed, and {got.aside} is the original"
            )
        if missing := files.lacking(got.steps, stretches[name]):
            say(f"warning: {workdir / name} lacks steps {missing}, which are not repeated")
    if any(dropped.values()):
        counts = ", ".join(f"{count} of {name}" for name, count in dropped.items())
        say(f"dropped lines of steps that will be repeated: {counts}")


def logged_steps(run, found: Found) -> dict[str, list[tuple[int, int, int]]]:
    """List the steps at which each log must have lines, as stretches (first step, last
    step, steps per line).
    """
    config, begun, stretches = found.host["config"], 0, {"metrics.jsonl": [(0, 0, 1)], "rollouts.jsonl": []}
    for phase in run.phases:
        first, last = begun + 1, min(begun := begun + phase.steps, found.step)
        every = max(phase.log_every, config.get(phase.name, {}).get("log_every", 1))  # an earlier start may have used another
        stretches["metrics.jsonl"].append((first, min(last, found.logged), every))
        if phase.source.samples and run.rollouts_kept and config.get("log", {}).get("rollouts_kept", 1):
            stretches["rollouts.jsonl"].append((first, last, 1))
    return stretches
