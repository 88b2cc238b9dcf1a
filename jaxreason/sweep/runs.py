"""The runs of a sweep: the command and the folder of each, and the phases that several
of them share.

    FOLDER/sweep.json           arms, seeds, config, metric
    FOLDER/runs/ARM/seedN/      a run, as `jaxreason.main` makes it
    FOLDER/shared/HASH/         a run that stopped after the phases that some runs share
    FOLDER/logs/                what each process printed
    FOLDER/state.json           what became of each run

Runs of one seed often begin alike: with the same prior, say. Such phases are trained
once, by the first of these runs, which is stopped after them (`--stop_after`); the
others begin with a copy of its folder. A run's numbers depend only on its config, so
the copy is the run up to there, bit for bit. What counts as alike is all of a config
but its later phases, the files that it names, the code, the versions of its packages,
JAX's settings in the environment, and the devices of a run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jaxreason
from jaxreason import build, objectives, optimizer
from jaxreason.options import call_with_section, command
from jaxreason.runtime.files import replacing
from jaxreason.runtime.workdir import (
    SAME_MATHS,
    differences,
    free_name,
    is_done,
    json_object,
    looks_whole,
    recorded_config,
    saved_at,
)
from jaxreason.sweep.arms import Sweep, named_arms, word_of

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "grain", "tokenizers", "jinja2", "tensorflow-datasets", "math-verify")
SETTINGS = re.compile(r"JAX_|XLA_|LIBTPU_|NVIDIA_TF32_OVERRIDE")  # environment variables that may change numbers
NO_SETTINGS = re.compile(r"JAX_(PLATFORMS|COMPILATION|PERSISTENT|ENABLE_COMPILATION|LOG|TRACEBACK)|XLA_PYTHON_CLIENT")
PATHS = ("init_from", "path", "tokenizer")  # config fields that may name a folder


class SweepRun(NamedTuple):
    """A run of an arm with a seed, or one that trains what several of them share."""

    name: str  # ARM/seedN, or shared/HASH
    arm: str
    seed: int
    words: tuple[str, ...]  # of the command, about its config
    folder: Path
    config: dict  # whole
    shared: Path | None = None  # the folder that it begins with a copy of
    stop_after: str | None = None  # a phase
    dropped: tuple[str, ...] = ()  # a line per new name that drops fields of the config file

    @property
    def steps(self) -> int:
        """Steps at its end, or where it stops."""
        names = list(self.config["phases"])
        last = names.index(self.stop_after) + 1 if self.stop_after else len(names)
        return sum(self.config[name]["steps"] for name in names[:last])

    def is_done(self) -> bool:
        if self.stop_after is None:
            return is_done(self.folder)
        return self.steps in whole_at(self.folder)

    def has_begun(self) -> bool:
        """Whether its folder has something that a copy must not replace."""
        return bool(saved_at(self.folder)) or (self.folder / "summary.json").exists()

    def command(self) -> list[str]:
        """The words behind `python`."""
        stop = [f"--stop_after={self.stop_after}"] if self.stop_after else []
        return ["-m", "jaxreason.main", *self.words, f"--workdir={self.folder}", *stop]


def make_runs(sweep: Sweep, folder: Path, share: bool = True, machine: str = "") -> list[SweepRun]:
    """Check all arms, and list the runs of a sweep: first those that others share.

    Seeds change more slowly than arms, so that a sweep that is cut short has whole
    pairs. `machine` says which devices a run gets: phases are shared on the same ones.

    Raises:
      ValueError: an arm that no run could be made of, or whose folder has a run of
        another config; one line.
    """
    runs = []
    for seed in sweep.seeds:
        for name, arm in named_arms(sweep).items():
            values = {**sweep.common, **arm, "seed": seed}
            changes = {field: placed(word_of(value), folder, seed) for field, value in values.items()}
            dropped: list[str] = []
            try:
                config = read_config(sweep.config, changes, dropped.append)
            except ValueError as error:
                raise ValueError(f"arm {name!r}: {error}") from None
            words = (f"--config={sweep.config}", *(f"--config.{field}={word}" for field, word in changes.items()))
            run = SweepRun(f"{name}/seed{seed}", name, seed, words, folder / "runs" / name / f"seed{seed}", config)
            runs.append(run._replace(dropped=tuple(dropped)))
    check_arms([run for run in runs if run.seed == sweep.seeds[0]])
    check_folders(runs)
    return with_shared(runs, folder / "shared", machine) if share else runs


def placed(word: str, folder: Path, seed: int) -> str:
    """Fill in `{folder}` and `{seed}`: what `prepare` of an experiment made for a seed
    is in the folder of the sweep.
    """
    return word.replace("{folder}", str(folder)).replace("{seed}", str(seed))


def check_arms(runs: Sequence[SweepRun]) -> None:
    """Raise ValueError if two arms have one config, as with a value that is the
    config's own: runs of one seed would be equal, and a test of them says nothing.
    """
    found: dict[str, str] = {}
    for run in runs:
        text = json.dumps(run.config, sort_keys=True, default=list)
        if found.setdefault(text, run.arm) != run.arm:
            raise ValueError(f"the arms {found[text]!r} and {run.arm!r} are the same config; allowed: arms that differ")


def check_folders(runs: Sequence[SweepRun]) -> None:
    """Raise ValueError if the folder of a run has a run of another config: the config
    file was edited, say. Its results must not be compared with those of this config.
    """
    for run in runs:
        if changed := changed_fields(run):
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ValueError(
                f"{run.folder} has a run of another config ({'; '.join(changed[:3])}{more}); choose another --folder, bring the "
                "config back, or move this run away"
            )


def changed_fields(run: SweepRun) -> list[str]:
    """List the fields in which a run differs from the config that its folder recorded.

    A run that is not done may change what leaves the maths alone. One that is done has
    been evaluated as well.
    """
    there = recorded_config(run.folder, saved_at(run.folder), say=lambda line: None)
    if there is None:
        return []
    try:
        there, _ = build.from_earlier({name: value for name, value in there.items() if name != "revisions"})
    except ValueError as error:
        return [str(error)]
    here = json.loads(json.dumps(run.config, default=list))
    text = here.get("text")
    if isinstance(text, dict) and text.get("date") is None and isinstance(there.get("text"), dict):
        there["text"].pop("date", None)  # that of the day on which the run began
        text.pop("date", None)
    done = run.is_done()
    changed = differences(there, here)
    return [line for name, line in changed.items() if not SAME_MATHS.match(name) or (done and name.startswith("evaluate."))]


def dropped_fields(runs: Sequence[SweepRun]) -> dict[str, list[str]]:
    """Return the lines about fields that the names of an arm drop: arm -> lines. Such
    an arm differs from the others in more than its overrides.
    """
    return {run.arm: list(run.dropped) for run in runs if run.dropped}


def dropped_lines(dropped: Mapping[str, Sequence[str]]) -> list[str]:
    """Write `dropped_fields` as text: a line per cause, with one of its arms."""
    arms: dict[str, list[str]] = {}
    for arm, lines in dropped.items():
        for line in lines:
            arms.setdefault(line, []).append(arm)
    return [f"{line} ({f'{len(names)} arms, as' if len(names) > 1 else 'arm'} {names[0]})" for line, names in arms.items()]


def read_config(config: str, changes: Mapping[str, str], say: Callable[[str], None] = lambda line: None) -> dict:
    """Read a whole config, and check what can be checked without devices, tasks and
    weights. `say` gets a line per new name that drops fields of the file.

    Raises:
      ValueError, FileNotFoundError: it is wrong.
    """
    found = build.settle(command.read(config, dict(changes), say).to_dict())
    if found["model"].get("weights", "random") == "random":
        build.read_shape(found["model"], found["text"])
    for name in found["phases"]:
        phase = found[name]
        call_with_section(objectives.make, phase["objective"], f"config.{name}.objective")
        read = {k: v for k, v in phase["optimizer"].items() if k not in optimizer.ignored(phase["optimizer"])}
        call_with_section(optimizer.make, read, f"config.{name}.optimizer", steps=max(1, phase["steps"]))
    return found


# --- phases that several runs share ---


def with_shared(runs: Sequence[SweepRun], folder: Path, machine: str = "") -> list[SweepRun]:
    """Add the runs that train what several runs share, each before the first of them.

    A run begins with the longest sequence of phases that another run has too, or that
    an earlier call of the same sweep has trained. Nothing is trained for runs that have
    begun already.
    """
    file = Path(runs[0].words[0].partition("=")[2].partition(":")[0])
    code = f"{code_hash(file)} {machine} {settings(os.environ)}"
    keys = {run.name: keys_of(run.config, code) for run in runs}
    count = Counter(key for run in runs if not run.has_begun() for key in keys[run.name])
    made: list[SweepRun] = []
    for run in runs:
        for key, phase in keys[run.name].items():
            trunk = SweepRun(f"shared/{key}", run.arm, run.seed, run.words, folder / key, run.config, stop_after=phase)
            if count[key] > 1 or trunk.is_done():
                made += [] if any(other.name == trunk.name for other in made) else [trunk]
                run = run._replace(shared=trunk.folder)
                break
        made.append(run)
    return made


def keys_of(config: dict, code: str) -> dict[str, str]:
    """Content addresses of what the first phases of a config compute, the longest
    sequence first, each with its last phase. All phases together are no beginning.
    """
    phases, found = list(config["phases"]), {}
    for count in range(len(phases) - 1, 0, -1):
        first = phases[:count]
        if not sum(config[name]["steps"] for name in first):
            break
        kept = {name: value for name, value in config.items() if name in first or not build.is_phase(name, value)}
        text = json.dumps(kept | {"phases": first, "files": sorted(files_of(kept))}, sort_keys=True, default=list)
        found[hashlib.sha256(f"{text} {code}".encode()).hexdigest()[:12]] = phases[count - 1]
    return found


def files_of(config: Mapping) -> Iterator[tuple[str, int, int]]:
    """Yield path, size and time of each file that a config names, or that is in a
    folder that it names: data, weights and tokenizers may be replaced.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from files_of(value)
        elif isinstance(value, str):
            path = Path(os.path.expanduser(value))
            try:
                paths = path.rglob("*") if name in PATHS and path.is_dir() else [path]
                found = [(path, path.stat()) for path in paths if path.is_file()]
            except (OSError, ValueError):  # no path: too long, or with a null byte
                continue
            yield from ((str(path), status.st_size, status.st_mtime_ns) for path, status in found if path.name != "lock")


def settings(environment: Mapping[str, str]) -> str:
    """Return the environment variables that a run's numbers may depend on, as text."""
    found = {name: value for name, value in environment.items() if SETTINGS.match(name) and not NO_SETTINGS.match(name)}
    return json.dumps(found, sort_keys=True)


def code_hash(config_file: Path) -> str:
    """A hash of everything but the config that a run's numbers depend on: this package,
    the modules beside the config, and the versions of other packages.
    """
    theirs = sorted(Path(os.path.expanduser(config_file)).resolve().parent.glob("*.py"))
    versions = " ".join(f"{name} {version_of(name)}" for name in PACKAGES)
    return hashlib.sha256(f"{versions} {sources_hash()} {files_hash(theirs)}".encode()).hexdigest()


def sources_hash() -> str:
    """A hash of the sources of this package."""
    return files_hash(sorted(Path(jaxreason.__file__).parent.rglob("*.py")))


def files_hash(paths: Sequence[Path]) -> str:
    """A hash of the names and contents of files. Those that can't be read don't count:
    the lock of an editor, `.#x.py`, is a link to no file.
    """
    made = hashlib.sha256()
    for path in paths:
        if path.is_file() and os.access(path, os.R_OK):
            content = path.read_bytes()
            made.update(f"{path.name} {len(content)} ".encode(errors="surrogateescape") + content)
    return made.hexdigest()


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def whole_at(folder: Path) -> list[int]:
    """Return the steps of a run's complete checkpoints, oldest first."""
    return [step for step in saved_at(folder) if looks_whole(folder / "checkpoints" / str(step))]


def begin_with_shared(run: SweepRun) -> None:
    """Make the folder of a run a copy of the one that it shares phases with, unless it
    has begun already.

    The copy appears at once, under its final name, so that no half of one is continued.
    A run begins by itself if what it shares has no complete checkpoint or no config.
    """
    if run.shared is None or run.has_begun():
        return
    whole = whole_at(run.shared)
    if not whole or json_object(run.shared / "config.json") is None:
        return
    copied = run.folder.with_name(f"{run.folder.name}.copy")
    shutil.rmtree(copied, ignore_errors=True)
    copied.parent.mkdir(parents=True, exist_ok=True)
    newest = str(max(whole))
    for path in sorted(run.shared.iterdir()):
        if path.name == "checkpoints":
            shutil.copytree(path / newest, copied / "checkpoints" / newest, copy_function=_link)
        elif path.is_dir():
            shutil.copytree(path, copied / path.name)
        elif path.name != "lock":
            copied.mkdir(exist_ok=True)
            shutil.copy2(path, copied / path.name)
    write_config(copied / "config.json", run.config)
    if run.folder.exists():  # a run that ended before its first checkpoint
        run.folder.rename(free_name(run.folder))
    copied.rename(run.folder)


def write_config(path: Path, config: dict) -> None:
    """Put the phases of a config into the config.json of a run that began alike."""
    there = json.loads(path.read_text(encoding="utf-8"))
    first = [name for name in there if not build.is_phase(name, there[name])]
    own = {name: value for name, value in config.items() if build.is_phase(name, value)}
    found = {name: there[name] for name in first} | own | {"phases": config["phases"]}
    with replacing(path) as file:
        file.write(json.dumps(found, indent=2, sort_keys=True, default=list))


def _link(source: str, target: str) -> None:
    """Give a file of a checkpoint a second name: nothing writes into one again."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
