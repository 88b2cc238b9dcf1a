"""Compare two evaluations of the same tasks, read from their folders."""

from __future__ import annotations

import collections
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxreason import estimators
from jaxreason.options import unknown_name_message
from jaxreason.runtime.workdir import SAME_MATHS, flat, json_object

NEEDED = {"suite", "temperature", "n", "verdicts"}  # fields of an evaluation
SHOWN = 8  # problems that are named, of those learned and lost


class Comparison(NamedTuple):
    """One suite at one temperature in two evaluations, a and b, over the tasks that
    both have.
    """

    suite: str
    temperature: float
    n: int  # tasks
    accuracy_a: float
    accuracy_b: float
    difference: float  # b - a
    low: float  # 95 %, over tasks
    high: float
    p: float  # McNemar's exact test; of a paired t-test with several samples per task
    method: str
    learned: list[tuple[int, int]]  # tasks solved more often in b: their positions in a and b
    lost: list[tuple[int, int]]
    needed: int | None  # tasks that would show a difference of this size in 4 of 5 evaluations
    notes: list[str]  # what else differs


def compare_folders(a: Path, b: Path) -> list[str]:
    """Compare the evaluations in two folders; return lines to print.

    Raises:
      ValueError: a folder without evaluations, or no evaluation of the same tasks.
    """
    ours, theirs = read_evaluations(a), read_evaluations(b)
    shared = [name for name in ours if name in theirs]
    if not shared:
        raise ValueError(
            f"nothing to compare: {a} has {listed(ours)}, {b} has {listed(theirs)}; needed: a suite at one temperature in both"
        )
    lines, line_a, line_b = [f"A: {a}", f"B: {b}", *settings_that_differ(a, b), ""], first_lines(a), first_lines(b)
    for name in shared:
        one = compare(ours[name], theirs[name])
        lines += described(one)
        for what, tasks, more in (("learned", one.learned, "more"), ("lost", one.lost, "less")):
            lines.append(f"  {what} (solved {more} often in B): {len(tasks)}{':' if tasks else ''}")
            lines += places([(j, line_a((*name, i)), line_b((*name, j))) for i, j in tasks])
        lines.append("")
    for name in (ours.keys() | theirs.keys()) - set(shared):
        lines.append(f"only in {'A' if name in ours else 'B'}: {label(name)}")
    return lines


def places(tasks: Sequence[tuple[int, str | None, str | None]]) -> list[str]:
    """Say where the rollouts of some tasks are: first those that were kept, in both
    evaluations or in one. A task is (problem of B, place in A, place in B).
    """
    tasks = sorted(tasks, key=lambda task: (task[1:].count(None), task[0]))
    kept = [task for task in tasks if any(task[1:])][:SHOWN]
    lines = [f"    problem {j} of B: {a or 'not kept'}, {b or 'not kept'}" for j, a, b in kept]
    others = tasks[len(kept) :]
    if not others or kept:
        return lines + [f"    and {len(others)} more"] * bool(others)
    numbers = ", ".join(str(j) for j, *_ in others[:SHOWN]) + f" and {len(others) - SHOWN} more" * (len(others) > SHOWN)
    return [f"    problems of B: {numbers} (rollouts not kept)"]


def read_evaluations(folder: Path) -> dict[tuple, dict[str, Any]]:
    """Read the evaluations of a folder: (suite, temperature, thinking tokens) ->
    evaluation. A run has those of its last step, RUN/checkpoints/STEP those of a step.
    """
    found = json_object(folder / "evaluation.json")
    if found is not None:
        if found.get("done") is not True:
            raise ValueError(f"{folder} is not done; give its command again, which continues")
        made = found.get("evaluations")
        if not isinstance(made, list) or not all(isinstance(e, dict) and e.keys() >= NEEDED for e in made):
            raise ValueError(f"{folder / 'evaluation.json'} is damaged: it lacks results; evaluate again in another folder")
        return {name_of(e): e for e in made}
    step = None
    run = folder
    if folder.parent.name == "checkpoints" and folder.name.isdecimal():
        run, step = folder.parents[1], int(folder.name)
    summary = json_object(run / "summary.json")
    if summary is None or not summary.get("evaluations"):
        raise ValueError(f"{folder} is no evaluation (evaluation.json) and no run that has evaluated (summary.json)")
    steps = {e["step"] for e in summary["evaluations"]}
    step = max(steps) if step is None else step
    if step not in steps:
        raise ValueError(unknown_name_message(f"step of {run}", step, steps))
    suites = summary["config"]["evaluate"]["suites"]
    # Of a step with two evaluations (the end of a phase and the start of the next) the
    # last one counts. The tasks of a run's suites are those of its config.
    return {name_of(e): e | {"section": suites.get(e["suite"])} for e in summary["evaluations"] if e["step"] == step}


def settings_that_differ(a: Path, b: Path) -> list[str]:
    """Name the settings of two evaluations, besides the model's, that differ: a
    difference of the accuracies may be due to them.
    """
    if a.resolve() == b.resolve():
        return ["note: A and B are the same folder"]
    found = [settings_of(folder) for folder in (a, b)]
    if not all(isinstance(settings, dict) for settings in found):
        return []
    suites = set.intersection(*(set(settings.get("suites", ())) for settings in found))
    ours, theirs = (
        flat(settings | {"suites": {name: section for name, section in settings.get("suites", {}).items() if name in suites}})
        for settings in found
    )
    if not all("verifier.name" in settings for settings in (ours, theirs)):  # earlier versions did not record it
        ours, theirs = ({k: v for k, v in settings.items() if not k.startswith("verifier.")} for settings in (ours, theirs))
    names = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    names = [name for name in names if not SAME_MATHS.match(name)]
    return [f"note: {name} is {ours.get(name)!r:.60} in A, {theirs.get(name)!r:.60} in B" for name in names]


# Of the model, told of each comparison, or without effect on attempts.
OF_MODEL = ("model", "text", "n", "temperatures", "thinking_tokens", "recovery")
FILTER = ("top_k", "top_p", "min_p")


def settings_of(folder: Path) -> dict[str, Any] | None:
    """Return the settings that decide accuracies, besides the model's. Those of an
    evaluation leave out `text`, since its prompts are compared one by one.
    """
    if (found := json_object(folder / "evaluation.json")) is not None:
        if not isinstance(settings := found.get("settings"), dict):
            return None
        settings = {name: value for name, value in settings.items() if name not in OF_MODEL}
        return settings | {name: found[name] for name in ("own_code", "versions") if name in found}
    config = (json_object(run_of(folder) / "summary.json") or {}).get("config")
    if not isinstance(config, dict):
        return None
    found = {name: dict(config.get(name) or {}) for name in ("text", "verifier", "environment", "sampler", "evaluate")}
    evaluate = found.pop("evaluate")
    found["sampler"].pop("logp_temperature_1", None)
    filter = {name: evaluate[name] for name in FILTER if name in evaluate}
    return found | {"filter": filter, "suites": evaluate.get("suites") or {}}


def run_of(folder: Path) -> Path:
    """Return the folder of a run, given it or RUN/checkpoints/STEP."""
    return folder.parents[1] if folder.parent.name == "checkpoints" else folder


def name_of(evaluation: Mapping) -> tuple:
    return evaluation["suite"], evaluation["temperature"], evaluation.get("thinking_tokens")


def label(name: tuple) -> str:
    suite, temperature, budget = name
    return f"{suite}, T={temperature:g}" + ("" if budget is None else f", {budget} thinking tokens")


def listed(found: Mapping[tuple, Any]) -> str:
    return "; ".join(map(label, found)) or "none"


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """Compare two evaluations of one suite at one temperature.

    With one sample per task the interval is that of a posterior, as a bootstrap is too
    narrow where few verdicts differ; p is exact. With several samples it is that of
    the tasks' mean differences (see `estimators.difference_interval`), and p is that of
    a t-test.

    Raises:
      ValueError: they have no task in common.
    """
    notes, pairs = [], paired_tasks(a, b)
    if len(pairs) < max(a["n"], b["n"]):
        notes.append(f"{len(pairs)} tasks are in both, of {a['n']} in A and {b['n']} in B")
    if prompts_differ(a, b, pairs):
        notes.append("the prompts differ, by template or instruction")
    mean_N = {side: means(e) for side, e in (("a", a), ("b", b))}
    value_N, other_N = (np.array([mean_N[side][pair[i]] for pair in pairs]) for i, side in enumerate("ab"))
    single = a.get("samples", 1) == b.get("samples", 1) == 1
    p = estimators.mcnemar(value_N, other_N) if single else estimators.paired_t(other_N - value_N)
    difference = float((other_N - value_N).mean())
    low, high, method = paired_interval(value_N, other_N, single)
    learned, lost = ([pair for pair, x, y in zip(pairs, value_N, other_N) if sign * (y - x) > 0] for sign in (1, -1))
    needed = estimators.problems_needed(difference, float(np.var(other_N - value_N)))
    accuracies = float(value_N.mean()), float(other_N.mean())
    return Comparison(
        b["suite"], b["temperature"], len(pairs), *accuracies, difference, low, high, p, method, learned, lost, needed, notes
    )


def paired_interval(value_N: np.ndarray, other_N: np.ndarray, single: bool, draws: int = 20_000) -> tuple[float, float, str]:
    """Return the 95 % interval of the mean of other - value over tasks, and its method.

    `single`: they are verdicts of one sample per task. `draws` are of the posterior.
    The interval always has a width, also where all tasks differ by the same.
    """
    if not single:
        difference_N = other_N - value_N
        same = "all tasks differ by the same"
        return *estimators.difference_interval(difference_N), "paired interval over tasks" if estimators.varies(
            difference_N
        ) else same
    _, low, high, _ = estimators.paired_posterior(value_N, other_N, draws=draws)
    difference = float((other_N - value_N).mean())
    # The prior moves the posterior of few tasks towards 0.
    return min(low, difference), max(high, difference), "posterior over tasks"


def paired_tasks(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the positions in a and b of the tasks that both have."""
    if "questions" in a and "questions" in b:
        position = {question: i for i, question in enumerate(numbered(a["questions"]))}
        pairs = [(position[question], i) for i, question in enumerate(numbered(b["questions"])) if question in position]
    elif "section" in a and "section" in b and tasks_of(a["section"]) == tasks_of(b["section"]):
        pairs = [(i, i) for i in range(min(a["n"], b["n"]))]
    elif "section" in a and "section" in b:
        raise ValueError(f"suite {b['suite']!r} has other tasks in A and B ({a['section']}; {b['section']}); needed: the same")
    else:
        raise ValueError("a run can't be compared with an evaluation; evaluate the run too: --checkpoint=RUN with the same flags")
    if not pairs:
        raise ValueError(f"suite {b['suite']!r} has no task that is in both A and B; needed: evaluations of the same tasks")
    return pairs


# Fields of a suite besides its tasks.
ATTEMPTED = ("verifier", "environment", "samples", "temperatures", "max_tokens", "instruction")


def tasks_of(section: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the fields of a suite that decide its tasks."""
    return None if section is None else {name: value for name, value in section.items() if name not in ATTEMPTED}


def prompts_differ(a: Mapping[str, Any], b: Mapping[str, Any], pairs: Sequence[tuple[int, int]]) -> bool:
    """Tell whether tasks that both have were asked in other words.

    Earlier versions wrote one digest of all prompts, which only tells if the tasks are
    the same.
    """
    ours, theirs = a.get("prompts"), b.get("prompts")
    if isinstance(ours, list) and isinstance(theirs, list):
        return any(ours[i] != theirs[j] for i, j in pairs)
    same_tasks = a.get("questions") == b.get("questions")
    return same_tasks and isinstance(ours, list) == isinstance(theirs, list) and ours != theirs


def numbered(questions: Sequence[str]) -> list[tuple[str, int]]:
    """Return each question with how often it came before: some files repeat one."""
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for question in questions:
        found.append((question, seen[question]))
        seen[question] += 1
    return found


def means(evaluation: Mapping[str, Any]) -> np.ndarray:
    """Return the accuracy on each task."""
    verdicts = evaluation.get("verdicts") or ""
    if len(verdicts) != evaluation["n"] * evaluation.get("samples", 1):
        raise ValueError(
            f"suite {evaluation['suite']!r} has no verdicts per task (an earlier version made it); evaluate it again"
        )
    return np.array([letter == "1" for letter in verdicts], np.float64).reshape(evaluation["n"], -1).mean(axis=1)


def described(one: Comparison) -> list[str]:
    lines = [
        f"{one.suite}, T={one.temperature:g}, {one.n} tasks: A {one.accuracy_a:.3f}, B {one.accuracy_b:.3f}, "
        f"B - A {one.difference:+.3f} [{one.low:+.3f}, {one.high:+.3f}] (95 %, {one.method}), p {one.p:.2g}"
    ]
    lines += [f"  note: {note}" for note in one.notes]
    # With a few tasks their spread, and so `needed`, may be far too low.
    if one.needed is not None and one.needed > one.n and one.low <= 0 <= one.high:
        lines.append(f"  not shown; about {one.needed:,} tasks would show a difference of this size in 4 of 5 evaluations")
    return lines


def first_lines(folder: Path) -> Callable[[tuple], str | None]:
    """Return a function that says where the first attempt at a task is: FILE:LINE, or
    None if it was not kept.

    A task is (suite, temperature, thinking tokens, position). A run keeps only the
    first rollouts of its evaluations.
    """
    file = run_of(folder) / "rollouts.jsonl"
    found: dict[tuple, int] = {}
    with contextlib.suppress(OSError), file.open(encoding="ascii", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # of another kind, or half-written
                record = json.loads(line)
                if record["attempt"] == 0:  # of a run, the last evaluation counts
                    found[record["suite"], record["temperature"], record.get("thinking_tokens"), record["problem"]] = number
    return lambda task: f"{file}:{found[task]}" if task in found else None
