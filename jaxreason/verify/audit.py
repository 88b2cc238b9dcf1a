"""Entry point: audit verifiers on labelled answers.

    python -m jaxreason.verify.audit                     the cases of this package
    python -m jaxreason.verify.audit FILE --verifier=number

A line of FILE is a JSON object: `text` (what a model wrote), `answer` (the reference)
and `label` (true if a careful person would accept the text, else false). Optional are
`verifier` (a name or a section; `--verifier` replaces it), `kind` (a name for a row of
the table) and `data` (of the task). It prints the rates of false negatives (of the
cases labelled true) and of false positives (of those labelled false) with 95 % Wilson
intervals, the cases in which verifier and label disagree, those labelled false that
earn a reward without being accepted, and the time per verdict. `format` looks at no
answer: its label says whether the form is right.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from jaxreason.estimators import wilson
from jaxreason.options import unknown_name_message
from jaxreason.types import Task, Verdict
from jaxreason.verify import make
from jaxreason.verify.combine import Part, judge, with_tokens

SHIPPED = Path(__file__).with_name("audit_cases.jsonl")
NEEDED = {"text": (str, "a text"), "answer": (str, "a text"), "label": (bool, "true or false")}
OPTIONAL = {"verifier": (str | dict, "a name or a section"), "kind": (str, "a text"), "data": (dict, "an object")}


class Case(NamedTuple):
    """A labelled answer."""

    where: str  # FILE:LINE
    verifier: str  # name or section, as JSON text
    kind: str
    text: str
    task: Task
    label: bool  # whether the text should be accepted


class Judged(NamedTuple):
    """A case with the verdict of its verifier."""

    case: Case
    verdict: Verdict
    accepted: bool
    took_s: float

    @property
    def agrees(self) -> bool:
        return self.accepted == self.case.label


# --- the file ---


def read_cases(path: Path, verifier: str | Mapping[str, Any] | None = None) -> tuple[list[Case], str]:
    """Read the cases of a file; `verifier` replaces that of every line.

    Also return a warning, if the last line is only half written, or "".

    Raises:
      ValueError: a line that can't be read, named as FILE:LINE, or no case.
      FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; allowed: a file of JSON lines with text, answer and label")
    cases, warning = [], ""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no newline at its end: the file is still being written, or was cut
                warning = f"{where}: left out the last line, which is only half written"
                continue
            raise ValueError(f"{where}: not JSON: {error}") from None
        cases.append(to_case(row, where, verifier))
    if not cases:
        raise ValueError(f"{path} has no cases; allowed: JSON lines with text, answer and label")
    return cases, warning


def to_case(row: Any, where: str, verifier: str | Mapping[str, Any] | None) -> Case:
    """Make a case of a line's object."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got a JSON {type(row).__name__}; allowed: an object with text, answer and label")
    for name in row.keys() - NEEDED.keys() - OPTIONAL.keys():
        raise ValueError(f"{where}: {unknown_name_message('field', name, [*NEEDED, *OPTIONAL])}")
    for name, (type_, allowed) in (NEEDED | OPTIONAL).items():
        if name in NEEDED and name not in row:
            raise ValueError(f"{where}: no field {name!r}; needed: {', '.join(NEEDED)}")
        if name in row and not isinstance(row[name], type_):
            raise ValueError(f"{where}: field {name!r} got {row[name]!r:.60}; allowed: {allowed}")
    chosen = row.get("verifier") if verifier is None else verifier
    if chosen is None:
        raise ValueError(f"{where}: names no verifier; add the field 'verifier', or the flag --verifier=number")
    section = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
    task = Task("", row["answer"], id=where, data=row.get("data", {}))
    return Case(where, json.dumps(section, sort_keys=True), row.get("kind", ""), row["text"], task, row["label"])


# --- judging ---


def judge_cases(cases: Sequence[Case]) -> list[Judged]:
    """Judge every case, one after the other, and time each verdict.

    Each verifier judges its first case once more beforehand, because that starts child
    processes. A verifier that raises has accepted nothing.

    Raises:
      ValueError: a wrong section of a verifier.
    """
    made: dict[str, Callable[[str, Task], Verdict]] = {}
    for case in cases:
        if case.verifier not in made:
            section = json.loads(case.verifier)
            if not isinstance(section.get("name"), str):
                raise ValueError(f"{case.where}: the verifier {case.verifier} has no name; allowed: such as {{'name': 'number'}}")
            made[case.verifier] = functools.partial(total, make(**section))
            made[case.verifier](case.text, case.task)
    found = []
    for case in cases:
        started_s = time.perf_counter()
        verdict = made[case.verifier](case.text, case.task)
        took_s = time.perf_counter() - started_s
        found.append(Judged(case, verdict, verdict.correct or verdict.reason == "form", took_s))
    return found


def total(verify: Callable[[str, Task], Verdict], text: str, task: Task) -> Verdict:
    """Return the verdict of a verifier, or one that tells of its error: also if it
    exits, which must not end the audit as if all were well.
    """
    try:
        return judge([Part("verifier", with_tokens(verify))], text, task, None)[0]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Verdict(0.0, False, None, f"raised {type(error).__name__}: {error}")


# --- the report ---


class Rates(NamedTuple):
    """Errors of a verifier on some cases."""

    missed: int  # labelled true and not accepted
    true: int  # labelled true
    paid: int  # labelled false and accepted
    false: int  # labelled false


def rates(judged: Sequence[Judged]) -> Rates:
    true, false = ([j for j in judged if j.case.label is label] for label in (True, False))
    return Rates(sum(not j.accepted for j in true), len(true), sum(j.accepted for j in false), len(false))


def report(judged: Sequence[Judged], most: int | None = None) -> Iterator[str]:
    """Yield the lines of the report, with at most `most` disagreeing cases."""
    by_row: dict[tuple[str, str], list[Judged]] = {}
    for j in judged:
        for kind in (j.case.kind, "all"):
            by_row.setdefault((title(j.case.verifier), kind), []).append(j)
    order = list(dict.fromkeys(verifier for verifier, _ in by_row))
    rows = [("verifier", "kind", "cases", "false negatives", "false positives")]
    for (verifier, kind), members in sorted(by_row.items(), key=lambda row: (order.index(row[0][0]), row[0][1] == "all")):
        found = rates(members)
        rows.append((verifier, kind or "-", str(len(members)), share(found.missed, found.true), share(found.paid, found.false)))
    found = rates(judged)
    rows.append(("all", "all", str(len(judged)), share(found.missed, found.true), share(found.paid, found.false)))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    yield from ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
    yield ""
    differ = [j for j in judged if not j.agrees]
    yield f"{len(differ)} of {len(judged)} cases in which verifier and label disagree{':' if differ else ''}"
    yield from map(disagreement, differ[:most])
    if most is not None and len(differ) > most:
        yield f"  ... and {len(differ) - most} more; --most={len(differ)} shows all"
    if paid := [j for j in judged if not j.case.label and not j.accepted and j.verdict.reward > 0]:
        mean = np.mean([j.verdict.reward for j in paid])
        yield f"{len(paid)} cases labelled false are not accepted and yet earn a reward, {mean:.3g} on average; the first:"
        yield disagreement(paid[0])
    yield ""
    yield from map(functools.partial(speed, judged), [*order, "all"])


def title(verifier: str) -> str:
    """Return the name of a verifier in the table: `number`, `exact(marker='A')`."""
    section = json.loads(verifier)
    name = section.pop("name")
    inside = section.pop("of", ())
    parts = [title(json.dumps(one)) for one in ((inside,) if isinstance(inside, dict) else inside)]
    parts += [f"{field}={value!r}" for field, value in section.items()]
    return f"{name}({', '.join(parts)})" if parts else name


def share(count: int, n: int) -> str:
    """Return `2/40 = 5.0% [1.4, 16.5]`, or "-" of no cases."""
    if not n:
        return "-"
    low, high = wilson(count, n)
    return f"{count}/{n} = {100 * count / n:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def disagreement(judged: Judged) -> str:
    case, verdict = judged.case, judged.verdict
    label = "false negative" if case.label else "false positive" if judged.accepted else f"reward {verdict.reward:.3g}"
    parsed = "" if verdict.parsed is None else f" {shown(verdict.parsed, 40)}"
    words = f"{label}  {title(case.verifier)}, {case.kind or '-'}: {shown(verdict.reason, 80)}{parsed}"
    return f"  {case.where.rpartition('/')[2]}  {words}\n    answer {shown(case.task.answer, 60)}  text {shown(case.text, 160)}"


def shown(text: str, most: int) -> str:
    """Return a text on one line, cut in its middle, with characters that can't be seen
    written as escapes.
    """
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[len(text) - most // 2 :]}"
    return "".join(c if c.isprintable() and c != "\\" else visible(c) for c in text)


def visible(char: str) -> str:
    return char if char == "\\" else char.encode("unicode_escape").decode()


def speed(judged: Sequence[Judged], verifier: str) -> str:
    """Return the line about the time per verdict of a verifier, or of all."""
    times_s = np.array([j.took_s for j in judged if verifier in ("all", title(j.case.verifier))])
    p50, p99 = 1e3 * np.quantile(times_s, (0.5, 0.99))
    return f"{verifier}: {len(times_s) / times_s.sum():,.0f} cases/s, p50 {p50:.3f} ms, p99 {p99:.3f} ms"


# --- the command ---


def define_flags() -> None:
    flags.DEFINE_string("verifier", None, "Name or section of the verifier of all lines. Default: that of each line.")
    flags.DEFINE_integer("most", 200, "Disagreeing cases to print, at most.", lower_bound=0)


def read_verifier(text: str | None) -> str | dict | None:
    """Read the flag --verifier: a name, or a section in braces."""
    if text is None or not text.strip().startswith("{"):
        return text
    try:
        section = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        section = None
    if not isinstance(section, dict):
        raise ValueError(
            f"--verifier got {text!r:.80}; allowed: a name, or a section such as {{'name': 'number', 'strict': True}}"
        )
    return section


def parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def main(argv: Sequence[str]) -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack a character of a case
    try:
        if len(argv) > 2:
            raise ValueError(f"got {len(argv) - 1} files; allowed: one, or none for the cases of this package")
        path = Path(argv[1]).expanduser() if len(argv) == 2 else SHIPPED
        cases, warning = read_cases(path, read_verifier(flags.FLAGS.verifier))
        judged = judge_cases(cases)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    lines = [*report(judged, flags.FLAGS.most), *([f"warning: {warning}"] if warning else [])]
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has enough; the interpreter would flush once more at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
