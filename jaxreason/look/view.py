"""A page of rollouts: filter them, read the attempts at a problem side by side, follow
a problem over training, and see what was learned and lost between two evaluations.

The page is one HTML file with the rollouts of `rollouts.jsonl` inside; its markup,
style and scripts are the files `view*` beside this one. Texts of models are only ever
inserted as texts. Since `rollouts.jsonl` may lack attempts (`log.rollouts_kept`), what
was learned and lost is counted from the verdicts in `summary.json` or
`evaluation.json`, which are complete.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxreason.look.page import escape, page
from jaxreason.runtime.files import plain_json
from jaxreason.runtime.workdir import json_object

# Fields of a record, in the order of a row of the page; texts that repeat are numbers
# of `strings`.
NUMBERS = ("step", "problem", "attempt", "reward", "advantage", "length", "sampled", "logp_sum", "temperature", "thinking_tokens")
STRINGS = ("phase", "suite", "task", "question", "prompt", "answer", "text", "parsed", "reason", "stop")
TOKENS = ("pieces", "logp", "author")
FIELDS = (*NUMBERS, *STRINGS, "correct", *TOKENS)


class Read(NamedTuple):
    """The rollouts of a folder, and what was wrong with its file."""

    records: list[dict[str, Any]]
    notes: list[str]


def read_rollouts(folder: Path) -> Read:
    """Read the rollouts of a run or an evaluation.

    Raises:
      ValueError: there are none.
    """
    path = folder / "rollouts.jsonl"
    if not path.is_file():
        what = "has no rollouts.jsonl" if folder.is_dir() else "is no folder"
        raise ValueError(
            f"{folder} {what}; allowed: the folder of a run with config.log.rollouts_kept above 0, or of an evaluation"
        )
    records, unread, whole = [], 0, True
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            record = record_of(line)
            whole = line.endswith("\n")
            if record is not None:
                records.append(record)
                whole = True
            elif whole:
                unread += 1
    if not records:
        raise ValueError(f"{path} has no rollouts")
    notes = [f"{unread} lines of {path.name} are no rollouts and are left out"] if unread else []
    notes += [] if whole else [f"the last line of {path.name} is half-written and left out; the run was writing, or was killed"]
    return Read(records, notes)


def record_of(line: str) -> dict[str, Any] | None:
    """Parse a line, keeping what the page shows; None for anything but a rollout."""
    try:
        found = json.loads(line)
        record = {name: flat(name, found[name]) for name in FIELDS if name in found} if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not all(isinstance(record.get(name), int) for name in ("step", "problem", "attempt")):
        return None
    if not all(isinstance(record.get(name), str) for name in ("text", "question")):
        return None
    return record


def flat(name: str, value: Any) -> Any:
    """Return a field without lists or dictionaries in it, except the list of a token's
    field: a deep one can be read but not written.
    """
    if isinstance(value, list) and name in TOKENS:
        return value if not any(isinstance(item, list | dict) for item in value) else None
    return str(value) if isinstance(value, list | dict) else value


def group_of(record: Mapping[str, Any]) -> tuple:
    """Name the group of a rollout: the attempts at one problem at one time."""
    names = ("step", "phase", "suite", "temperature", "thinking_tokens", "problem")
    return tuple(str(record.get(name)) for name in names)


def choose(records: Sequence[dict[str, Any]], most_bytes: int) -> tuple[list[dict[str, Any]], str]:
    """Choose rollouts that fit a size, in whole groups; also say what is left out.

    First come the first and the last evaluation, then every n-th step with as small an
    n as fits, the last step among them.
    """
    size = {id(record): bytes_of(record) for record in records}
    if sum(size.values()) <= most_bytes:
        return list(records), ""
    at_step: collections.Counter[int] = collections.Counter()
    evaluated: collections.Counter[int] = collections.Counter()
    for record in records:
        at_step[record["step"]] += size[id(record)]
        evaluated[record["step"]] += size[id(record)] if record.get("suite") else 0
    steps = sorted(at_step, reverse=True)
    ends = [step for step in steps if evaluated[step]]
    always = {*ends[:1], *ends[-1:]}
    for every in range(2, len(steps) + 1):
        chosen = set(steps[::every])
        if sum(at_step[step] for step in chosen) + sum(evaluated[step] for step in always - chosen) <= most_bytes:
            found = [r for r in records if r["step"] in chosen or (r.get("suite") and r["step"] in always)]
            return found, left_out(len(records), found, f"one step in {every}, and the first and last evaluation")
    some = [r for r in records if r["step"] == steps[0] or (r.get("suite") and r["step"] in always)]
    fit = first_groups(some, size, most_bytes)
    found = [r for r in some if id(r) in fit]
    return found, left_out(len(records), found, "the first problems of the last step and of two evaluations, as far as they fit")


def in_order(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort rollouts by step, series in the order of their first one, problem and
    attempt; an evaluation that was killed has them as they finished.
    """
    first: dict[tuple, int] = {}
    for record in records:
        first.setdefault(group_of(record)[:-1], len(first))
    return sorted(records, key=lambda r: (r["step"], first[group_of(r)[:-1]], r["problem"], r["attempt"]))


def evaluations_of(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluations of a run, or of an evaluation, with every verdict; those
    that can't be read are left out.
    """
    every: list[Any] = []
    for name in ("summary.json", "evaluation.json"):
        found = (json_object(folder / name) or {}).get("evaluations")
        every += found if isinstance(found, list) else []
    names = ("step", "suite", "temperature", "thinking_tokens", "samples", "verdicts")
    readable = [{"samples": 1} | e for e in every if isinstance(e, dict)]  # older runs lack `samples`
    return [{name: e.get(name) for name in names} for e in readable if is_evaluation(e)]


def is_evaluation(e: Mapping[str, Any]) -> bool:
    whole = all(isinstance(e.get(name), int) for name in ("step", "samples", "n")) and e["samples"] > 0
    texts = all(isinstance(e.get(name), str) for name in ("suite", "verdicts"))
    return whole and texts and len(e["verdicts"]) == e["n"] * e["samples"] and isinstance(e.get("temperature"), int | float)


def group_sizes(folder: Path) -> dict[str, int]:
    """Return the number of attempts at a problem in each phase of a run's config."""
    config = json_object(folder / "config.json") or {}
    sources = {phase: fields.get("source") for phase, fields in config.items() if isinstance(fields, dict)}
    found = {}
    for phase, source in sources.items():
        parts = [source, *of.values()] if isinstance(source, dict) and isinstance(of := source.get("of"), dict) else [source]
        sizes = {part.get("group") for part in parts if isinstance(part, dict)} - {None}
        if len(sizes) == 1 and isinstance(size := sizes.pop(), int):  # the parts of a mix may differ
            found[phase] = size
    return found


def bytes_of(record: Mapping[str, Any]) -> int:
    """Return the size of a record in a page at most: "<" is an escape there."""
    text = json.dumps(plain_json(record))
    return len(text) + 5 * text.count("<")


def first_groups(records: Sequence[Mapping[str, Any]], size: Mapping[int, int], most_bytes: int) -> set[int]:
    """Return the ids of the records of the first groups that fit, and of one at least,
    taken in turn from the last step and each evaluation.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(group_of(record), []).append(record)
    earlier: collections.Counter[tuple] = collections.Counter()  # groups of the same step and suite
    turns = []
    for key, group in groups.items():
        turns.append((earlier[key[:-1]], -group[0]["step"], group))
        earlier[key[:-1]] += 1
    found: set[int] = set()
    used = 0
    for _, _, group in sorted(turns, key=lambda turn: turn[:2]):
        used += sum(size[id(r)] for r in group)
        if found and used > most_bytes:
            break
        found |= {id(r) for r in group}
    return found


def left_out(count: int, kept: Sequence, what: str) -> str:
    missing = f"{count - len(kept):,} of {count:,} rollouts are left out, to keep the file small"
    return f"{missing}; there are {what}; --max_mb raises the limit"


def compact(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return records as rows of numbers, with each text once."""
    position: dict[str, int] = {}

    def number(value: Any) -> int | None:
        return None if value is None else position.setdefault(str(value), len(position))

    rows = []
    for r in records:
        row = [r.get(name) if isinstance(r.get(name), int | float) else None for name in NUMBERS]
        row += [number(r.get(name)) for name in STRINGS]
        row.append(int(bool(r.get("correct"))))
        pieces, logp, author = (r.get(name) for name in TOKENS)
        whole = isinstance(pieces, list) and isinstance(logp, list) and isinstance(author, str)
        row.append([list(map(str, pieces)), logp, author] if whole and len(pieces) == len(logp) == len(author) else None)
        rows.append(row)
    return {"numbers": NUMBERS, "texts": STRINGS, "rows": rows, "strings": list(position)}


def make_view(folder: Path, most_bytes: int) -> tuple[str, list[str]]:
    """Return the page of a folder's rollouts, and notes about it.

    Raises:
      ValueError: there are no rollouts.
    """
    read = read_rollouts(folder)
    records, missing = choose(read.records, most_bytes)
    notes = [*read.notes, *([missing] if missing else [])]
    title = f"Rollouts of {folder.resolve().name}"
    said = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    names = ("view.html", "view.css", "view_detail.js", "view.js")
    markup, style, *scripts = ((Path(__file__).parent / name).read_text("utf-8") for name in names)
    body = markup.replace("{notes}", said).replace("{title}", escape(title), 1)
    data = compact(in_order(records)) | {"evaluations": evaluations_of(folder), "sizes": group_sizes(folder)}
    return page(title, body, style=style, script="".join(scripts), data=data), notes
