"""Read finished or unfinished runs from their folders, for reports.

Whatever is missing or unreadable in a folder becomes a note, which a report shows; only
a folder without `metrics.jsonl` is refused. Numbers that are not finite are left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxreason.look.figures import LARGEST
from jaxreason.runtime.bucket import is_url
from jaxreason.runtime.ledger import KINDS
from jaxreason.runtime.workdir import checkpoints_of, flat, json_object, saved_at
from jaxreason.types import Evaluation

ASIDE = re.compile(r"metrics\.jsonl\.\d+")
# Fields of a config that only decide which seed a run has and what it writes.
NOT_COMPARED = re.compile(r"seed$|(log|checkpoint)\.")
SHOWN_STEPS = 3  # numbers named in a note, at most


class Run(NamedTuple):
    """Content of the folder of a run."""

    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl: one of training and one of evaluation per step, at most
    summary: dict[str, Any]
    evaluations: list[Evaluation]  # by step; of two at one step the last
    environment: dict[str, Any]
    notes: list[str]

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def done(self) -> bool:
        return self.summary.get("done") is True

    @property
    def steps(self) -> int:
        return max([0, *(line["step"] for line in self.lines)])


class Group(NamedTuple):
    """Runs that differ in nothing but their seed."""

    label: str
    runs: list[Run]


def number(value: Any) -> float | int | None:
    """Return a finite number; None for anything else. An integer that NumPy can't hold
    becomes a float.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < LARGEST:
        return None
    return value if abs(value) < 2**53 else float(value)


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def folder_of(word: str) -> Path:
    """Return the folder of a run that a user named; of a gs:// URL a local copy of its
    records.
    """
    if not is_url(word):
        return Path(os.path.expanduser(word))
    from jaxreason.runtime.mirror import local  # imports jax

    return local(word)


def read_run(folder: Path) -> Run:
    """Read the folder of a run.

    Raises:
      ValueError: it is not the folder of a run.
      OSError: a file can't be read.
    """
    if not (folder / "metrics.jsonl").is_file():
        what = "holds no metrics.jsonl" if folder.is_dir() else "is no folder" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}; needed: the folder of a run, which holds metrics.jsonl")
    notes: list[str] = []
    lines = read_metrics(folder / "metrics.jsonl", notes)
    summary = json_object(folder / "summary.json") or {}
    if not summary:
        notes.append("summary.json is missing or unreadable: accuracies are those of metrics.jsonl, without intervals")
    config = json_object(folder / "config.json") or mapping(summary.get("config"))
    if not config:
        notes.append("config.json is missing or unreadable: the config is not known")
    for path in sorted(folder.glob("metrics.jsonl.*")):
        if ASIDE.fullmatch(path.name):
            notes.append(f"{path.name} is beside metrics.jsonl: the log before a restart, or lines that could not be read")
    run = Run(folder, config, lines, summary, read_evaluations(summary, lines, notes), {}, notes)
    if not run.done:
        total = sum(phase_steps(config).values())
        notes.append(f"not finished: {run.steps:,}{f' of {total:,}' if total else ''} steps are logged")
    return run._replace(environment=read_environment(folder, summary))


def read_metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read the lines of `metrics.jsonl`, by step; of two lines about the same the last.

    A last line that was being written when the run was killed is left out, and noted.
    """
    found: dict[tuple[int, bool], dict] = {}
    strange, half, last = [], False, 0
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for last, text in enumerate(file, 1):
            line = parse(text)
            if line is not None:
                found[line["step"], number(line.get("phase_step")) is None] = line
            elif text.strip():
                half = not text.endswith("\n")
                strange += [last] * (not half)
    if half:
        notes.append(f"the last line of metrics.jsonl (line {last}) is incomplete and left out")
    if strange:
        more = f" and {len(strange) - SHOWN_STEPS} more" if len(strange) > SHOWN_STEPS else ""
        shown = ", ".join(map(str, strange[:SHOWN_STEPS]))
        notes.append(f"metrics.jsonl has lines that can't be read, which are left out: {shown}{more}")
    return [found[key] for key in sorted(found)]


def parse(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_line = isinstance(line, dict) and type(line.get("step")) is int and isinstance(line.get("phase"), str)
    return line if is_line and 0 <= line["step"] < 2**53 else None


def mode(temperature: float) -> str:
    """Name a temperature as the log does."""
    return "greedy" if temperature == 0 else f"t{temperature:g}"


def read_evaluations(summary: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], notes: list[str]) -> list[Evaluation]:
    """Return the evaluations of a summary, and those that only the log has, without
    intervals.
    """
    found: dict[tuple[int, str, str], Evaluation] = {}
    for line in lines:
        for name, raw in line.items():
            value = number(raw)
            parts = name.removeprefix("eval/").rsplit("/", 2) if name.startswith("eval/") else []
            if len(parts) == 3 and parts[2] == "accuracy" and value is not None:
                suite, how, _ = parts
                temperature = 0.0 if how == "greedy" else to_number(how.removeprefix("t"))
                if temperature is not None:
                    found[line["step"], suite, how] = Evaluation(
                        line["phase"], line["step"], suite, value, None, None, 0, temperature
                    )
    listed = summary.get("evaluations")
    listed = listed if isinstance(listed, list) else []
    good = [e for e in map(to_evaluation, listed) if e is not None]
    if len(good) < len(listed):
        notes.append(f"{len(listed) - len(good)} of {len(listed)} evaluations in summary.json can't be read and are left out")
    found |= {(e.step, e.suite, mode(e.temperature)): e for e in good}
    return sorted(found.values(), key=lambda e: e.step)


def to_number(text: str) -> float | None:
    try:
        return number(float(text))
    except ValueError:
        return None


def to_evaluation(record: Any) -> Evaluation | None:
    """Return the evaluation in a record of a summary; None if it is none."""
    record = mapping(record)
    names = [record.get(name) for name in ("phase", "suite")]
    numbers = {name: number(record.get(name)) for name in ("step", "accuracy", "n", "temperature")}
    if not all(isinstance(name, str) for name in names) or None in numbers.values():
        return None
    if not (0 <= numbers["step"] < 2**53 and 0 <= numbers["n"] < 2**53):
        return None
    n, samples, verdicts = int(numbers["n"]), record.get("samples", 1), record.get("verdicts")
    samples = samples if type(samples) is int and samples > 0 else 1
    whole = isinstance(verdicts, str) and set(verdicts) <= {"0", "1"} and len(verdicts) == n * samples
    measures = {name: value for name, raw in mapping(record.get("measures")).items() if (value := number(raw)) is not None}
    return Evaluation(
        names[0],
        int(numbers["step"]),
        names[1],
        numbers["accuracy"],
        number(record.get("low")),
        number(record.get("high")),
        n,
        numbers["temperature"],
        verdicts=verdicts if whole else "",
        samples=samples,
        measures=measures,
    )


def read_environment(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return versions, revision and devices of a run: from its summary, or else from
    its newest checkpoint that has them.
    """
    if found := mapping(summary.get("environment")):
        return flat(found)
    for step in reversed(saved_at(folder)):
        host = mapping(json_object(checkpoints_of(folder) / str(step) / "host" / "metadata")).get("host")
        found = {name: mapping(host).get(name) for name in ("versions", "revision", "revisions")}
        if any(found.values()):
            return {name: value for name, value in flat(found).items() if value}
    return {}


def phase_steps(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the steps of each phase of a config."""
    phases = config.get("phases")
    names = [name for name in phases if isinstance(name, str)] if isinstance(phases, list) else []
    steps = {name: mapping(config.get(name)).get("steps") for name in names}
    return {name: count for name, count in steps.items() if type(count) is int}


# --- groups ---


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs that differ in nothing but their seed.

    A second run of the same config and seed begins another group: it is no new sample.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        key, seed = compared(run), json.dumps(run.seed)
        if not run.config:
            key = str(run.folder)  # nothing says that it is like another
        again = next(i for i in range(len(runs)) if all(json.dumps(r.seed) != seed for r in groups.get((key, i), ())))
        groups.setdefault((key, again), []).append(run)
    found = list(groups.values())
    labels = name_groups(found)
    return [Group(label, members) for label, members in zip(labels, found)]


def compared(run: Run) -> str:
    fields = {name: value for name, value in flat(run.config).items() if not NOT_COMPARED.match(name)}
    return json.dumps(fields, sort_keys=True)


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the fields in which configs differ, with the value of each: "absent" if it
    has none.
    """
    flats = [flat(config) for config in configs]
    names = sorted({name for fields in flats for name in fields if not NOT_COMPARED.match(name)})
    found = {name: [fields.get(name, "absent") for fields in flats] for name in names}
    return {name: values for name, values in found.items() if len({json.dumps(v, sort_keys=True) for v in values}) > 1}


def name_groups(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Name groups by what they differ in, or by their folders if that is long or not
    unique.
    """
    shared = [common_folder(members) for members in groups]
    if len(groups) == 1:
        return name_folders(shared)
    unique = len(set(shared)) == len(shared)
    folders = name_folders(shared if unique else [members[0].folder for members in groups])
    fields = differing([members[0].config for members in groups])
    ends = [name.rpartition(".")[2] for name in fields]
    short = {name: name if ends.count(end) > 1 else end for name, end in zip(fields, ends)}
    labels = [", ".join(f"{short[name]}={values[i]}" for name, values in fields.items()) for i in range(len(groups))]
    if len(set(labels)) == len(labels) and all(0 < len(label) <= 48 for label in labels):
        return labels
    return folders


def common_folder(members: Sequence[Run]) -> Path:
    """Return the folder that holds the runs of a group, if it is one, else the first
    run's: ARM of ARM/seed0, ARM/seed1 and so on.
    """
    parents = {run.folder.absolute().parent for run in members}
    return members[0].folder if len(members) == 1 or len(parents) > 1 else parents.pop()


def name_folders(folders: Sequence[Path]) -> list[str]:
    """Name folders by the parts of their paths in which they differ."""
    parts = [folder.absolute().parts for folder in folders]
    first = next((i for i, same in enumerate(zip(*parts)) if len(set(same)) > 1), min(map(len, parts)) - 1)
    return ["/".join(part[min(first, len(part) - 1) :]) for part in parts]


# --- what a run used ---


def used(run: Run) -> dict[str, dict[str, float]]:
    """Return the ledger of a run as {unit: {kind of work: amount}}: of its summary, or
    else of its last evaluation. Units without an amount are left out.
    """
    amounts: dict[str, dict[str, float]] = {}
    ledger = mapping(run.summary.get("ledger")) or {}
    if not ledger:
        last = next((line for line in reversed(run.lines) if ledger_of(line)), {})
        for kind, unit, amount in ledger_of(last):
            ledger.setdefault(kind, {})[unit] = amount
    for kind, by_unit in ledger.items():
        for unit, amount in mapping(by_unit).items():
            if (amount := number(amount)) is not None:
                amounts.setdefault(unit, {})[kind] = amount
    return {unit: by_kind for unit, by_kind in amounts.items() if any(by_kind.values())}


def ledger_of(line: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Return (kind of work, unit, amount) of each entry of the ledger in a line."""
    found = []
    for name, value in line.items():
        _, is_entry, entry = name.partition("ledger/")
        kind, _, unit = entry.partition("_")
        if is_entry and kind in KINDS and (amount := number(value)) is not None:
            found.append((kind, unit, amount))
    return found


TRAINING = ("sample", "learn")  # kinds of work that a curve is drawn against: not those that only measure


def spent(run: Run, unit: str) -> dict[int, float]:
    """Return what sampling and learning had used at each step that has a ledger."""
    found = {}
    for line in run.lines:
        amounts = [amount for kind, of, amount in ledger_of(line) if of == unit and kind in TRAINING]
        if amounts:
            found[line["step"]] = sum(amounts)
    return found if any(found.values()) else {}


def wall_s(run: Run) -> float | None:
    """Return the seconds that a run took, or has taken so far."""
    times = [time for line in run.lines if (time := number(line.get("time_s"))) is not None]
    whole = number(run.summary.get("wall_s")) if run.done else None
    return whole if whole is not None else max(times, default=None)


def time_split(run: Run) -> dict[str, float]:
    """Return the seconds of a run's wall time by kind of work; "other" is the rest.

    Steps have times of their own. The ledger has the time of evaluations and of
    compilation, times the number of devices that waited for it.
    """
    seconds = dict.fromkeys(("sample", "verify", "learn"), 0.0)
    compiling, ledger = 0.0, used(run).get("device_s", {})
    for steps, line in training_lines(run):
        value = {
            name: (number(line.get(f"time/{name}_s")) or 0.0) * steps for name in ("sample", "verify", "learn", "step", "compile")
        }
        samples = "time/sample_s" in line
        seconds["sample"] += value["sample"]
        seconds["verify"] += value["verify"]
        seconds["learn"] += value["learn"] if samples else value["step"]
        compiling += value["compile"]
    learn_devices = ratio(ledger.get("learn", 0.0), seconds["learn"])
    sample_devices = ratio(ledger.get("sample", 0.0), seconds["sample"] + seconds["verify"], learn_devices)
    seconds["evaluate"] = ledger.get("evaluate", 0.0) / sample_devices
    seconds["compile"] = compiling + max(0.0, ledger.get("compile", 0.0) - compiling * learn_devices) / sample_devices
    total = wall_s(run) or 0.0
    seconds["other"] = max(0.0, total - sum(seconds.values()))
    return seconds


def ratio(device_s: float, seconds: float, otherwise: int = 1) -> int:
    """Return the number of devices that were booked for some seconds."""
    return max(1, round(device_s / seconds)) if device_s and seconds else otherwise


def training_lines(run: Run) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the lines about train steps, each with the number of steps that it is the
    mean of.
    """
    before: dict[str, int] = {}
    for line in run.lines:
        step = number(line.get("phase_step"))
        if step is not None:
            yield max(1, int(step) - before.get(line["phase"], 0)), line
            before[line["phase"]] = int(step)


# --- curves ---


class Phase(NamedTuple):
    """A phase of a run, with the number of steps before it."""

    name: str
    before: int


def phases(run: Run) -> list[Phase]:
    """Return the phases of a run that have begun, in order."""
    found: dict[str, int] = {}
    for _, line in training_lines(run):
        found.setdefault(line["phase"], line["step"] - int(line["phase_step"]))
    return [Phase(name, max(0, before)) for name, before in found.items()]


def training_curve(run: Run, metric: str, phase: str) -> dict[int, float]:
    """Return a metric of a phase over its steps."""
    return {
        int(line["phase_step"]): value
        for _, line in training_lines(run)
        if line["phase"] == phase and (value := number(line.get(metric))) is not None
    }


def steps_to(run: Run, unit: str, steps: Sequence[int]) -> list[float] | None:
    """Return what a run had used at some steps; None if its log does not say.

    `unit` is "steps", "seconds" or a unit of the ledger, which is interpolated between
    evaluations.
    """
    if unit == "steps":
        return list(steps)
    if unit == "seconds":
        known = {line["step"]: time for line in run.lines if (time := number(line.get("time_s"))) is not None}
    else:
        known = spent(run, unit)
    if not known:
        return None
    return np.interp(steps, list(known), list(known.values())).tolist()
