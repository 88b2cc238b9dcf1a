"""The attempts of an evaluation by series: one suite at one temperature and one budget
of thinking. `run` makes those that are missing and summarises all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxreason import estimators, evaluation
from jaxreason.build.checkpoint import Checkpoint
from jaxreason.build.sampler import make_filter
from jaxreason.evaluate.attempts import SERIES, Attempts, rollout_of
from jaxreason.evaluate.identity import also_made_with, digest, made_with
from jaxreason.evaluate.table import Progress, series_name
from jaxreason.recovery import recovery
from jaxreason.rollout import Completer, Request
from jaxreason.runtime.files import rollout_record, write_summary
from jaxreason.runtime.workdir import json_object
from jaxreason.tasks import behaviour


class Evaluated(NamedTuple):
    """A checkpoint with what all its series share."""

    opened: Checkpoint
    settings: dict
    attempts: Attempts
    seed: int
    say: Callable[[str], None]


class Series(NamedTuple):
    """One suite at one temperature and one budget of thinking."""

    suite: evaluation.Suite
    temperature: float
    thinking_tokens: int | None

    @property
    def name(self) -> str:
        return series_name(*self.key)

    @property
    def key(self) -> tuple:
        return self.suite.name, self.temperature, self.thinking_tokens

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that tell its records from those of others."""
        return dict(zip(SERIES, self.key, strict=True))


def run(
    opened: Checkpoint,
    suites: Sequence[evaluation.Suite],
    settings: dict,
    folder: Path,
    about: dict,
    *,
    seed: int,
    recoveries: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Make all attempts that are missing, and write and return `evaluation.json`.

    `about` begins it. `recoveries` is the number of attempts per series in which a step
    is corrupted; 0 keeps what an earlier command measured.
    """
    every = [
        Series(suite, temperature, budget)
        for suite in suites
        for temperature in (settings["temperatures"] if suite.temperatures is None else suite.temperatures)
        for budget in settings["thinking_tokens"]
    ]
    of = Evaluated(opened, settings, Attempts(folder / "rollouts.jsonl"), seed, say)
    there = json_object(folder / "evaluation.json") or {}
    missing = any(unrecorded(of, one) for one in every)
    about = about | versions_of(there, of, missing)
    recoveries = recoveries or (there.get("settings") or {}).get("recovery") or 0
    about["settings"] = about["settings"] | {"recovery": recoveries}
    if missing:
        unfinished = {"evaluations": there["evaluations"]} if "evaluations" in there else {}
        write_summary(folder / "evaluation.json", {"done": False} | about | unfinished)

    @functools.cache
    def weights():
        say(f"loading {opened.folder}")
        return opened.parts.completer.sampler.prepare(opened.load())

    for one in every:
        if wanted := requests_left(of, one):
            make_attempts(of, one, wanted, weights())
    records = of.attempts.sort([(*one.key, r.problem, r.attempt) for one in every for r in requests_of(of, one)])
    evaluations = [summarise(of, one, records[one.key]) for one in every]
    before = {} if missing else recovered_before(there)
    for one, found in zip(every, evaluations, strict=True):
        if recoveries:
            kept = before.get(one.key)
            same = kept is not None and kept.get("most") == recoveries
            found["recovery"] = kept if same else recover(of, one, records[one.key], recoveries, weights())
        elif one.key in before:  # of an earlier version, which did not record its setting
            found["recovery"] = before[one.key]
    whole = {"done": True} | about | {"evaluations": evaluations}
    write_summary(folder / "evaluation.json", whole)
    return whole


def versions_of(there: dict, of: Evaluated, missing: bool) -> dict[str, Any]:
    """Return the versions that made the attempts of this and of earlier processes."""
    now = made_with()
    if not there or not of.attempts.outcomes:
        return now
    if not missing:  # this process adds nothing
        return {name: there[name] for name in (*now, "continued_with") if name in there}
    return also_made_with(there, now, of.say)


def recovered_before(there: dict) -> dict[tuple, dict]:
    """Return the recovery that a finished evaluation measured, by series."""
    return {tuple(e[name] for name in SERIES): e["recovery"] for e in there.get("evaluations", ()) if "recovery" in e}


def requests_of(of: Evaluated, one: Series) -> list[Request]:
    return [r for group in evaluation.requests(one.suite, of.settings["n"], one.temperature) for r in group]


def unrecorded(of: Evaluated, one: Series) -> list[Request]:
    return [r for r in requests_of(of, one) if (*one.key, r.problem, r.attempt) not in of.attempts.outcomes]


def requests_left(of: Evaluated, one: Series) -> list[Request]:
    """List the attempts that are not recorded yet.

    An attempt under a larger budget that ended within this one is the same under this
    one, so it is copied.
    """
    left = unrecorded(of, one)
    wanted = {(r.problem, r.attempt) for r in left}
    for record in list(of.attempts.read()) if left and one.thinking_tokens is not None else ():
        larger = record["thinking_tokens"] is not None and record["thinking_tokens"] > one.thinking_tokens
        alike = record["suite"] == one.suite.name and record["temperature"] == one.temperature
        name = (record["problem"], record["attempt"])
        if larger and alike and record["length"] <= one.thinking_tokens and name in wanted:
            wanted.remove(name)
            of.attempts.add(record | one.fields)
    return [r for r in left if (r.problem, r.attempt) in wanted]


def make_attempts(of: Evaluated, one: Series, wanted: list[Request], weights) -> None:
    """Make attempts of a series, and record each as soon as it is judged."""
    opened = of.opened
    completer, decode = completer_of(opened, one), opened.parts.tokenizer.decode

    def judged(rollout) -> None:
        record = rollout_record(rollout, lambda ids: decode([int(i) for i in ids]))
        of.attempts.add({"step": opened.step or 0, "phase": "evaluate"} | record | one.fields)
        shown.count(rollout)

    keywords = {"temperature": one.temperature, "seed": of.seed, "filter": make_filter(**of.settings["filter"], where="evaluate")}
    if recorded := len(requests_of(of, one)) - len(wanted):
        of.say(f"{one.name}: {recorded:,} attempts are recorded already; the other {len(wanted):,} follow")
    shown = Progress(one.name, len(wanted), opened.parts.completer.sampler.slots)
    evaluation.attempt(completer, weights, one.suite, [[r] for r in wanted], judged=judged, **keywords)
    shown.end()


def completer_of(opened: Checkpoint, one: Series) -> Completer:
    """Return the sampler with the budget of thinking of a series."""
    completer = opened.parts.completer
    if one.thinking_tokens is None:
        return completer
    return completer._replace(thinking=completer.thinking._replace(tokens=one.thinking_tokens))


def summarise(of: Evaluated, one: Series, records: Sequence[dict]) -> dict[str, Any]:
    """Return the entry of a series in `evaluation.json`; `records` are its
    attempts.
    """
    wanted = evaluation.requests(one.suite, of.settings["n"], one.temperature)
    outcomes_NK = [[of.attempts.outcomes[(*one.key, r.problem, r.attempt)] for r in group] for group in wanted]
    step = of.opened.step or 0
    found = evaluation.summarise(outcomes_NK, one.suite, one.temperature, phase="evaluate", step=step)._asdict()
    rollouts = [rollout_of(r, one.suite.tasks[r["problem"]].task, ()) for r in records]
    found["measures"] |= behaviour.summarise(rollouts, one.suite.parser)
    found["thinking_tokens"] = one.thinking_tokens
    decode = of.opened.parts.tokenizer.decode
    found["questions"] = [digest(group[0].task.question, group[0].task.answer) for group in wanted]
    found["prompts"] = [digest(decode([int(i) for i in group[0].prompt])) for group in wanted]
    if found["samples"] > 1:
        found["curves"] = evaluation.curves(outcomes_NK, one.suite.same)
        share_N, right_N = evaluation.majorities(outcomes_NK, one.suite.same)
        found["calibration"] = estimators.calibration(share_N, right_N)._asdict()
    return found


def recover(of: Evaluated, one: Series, records: Sequence[dict], most: int, weights) -> dict[str, float]:
    """Corrupt a step of at most `most` correct attempts and let the model continue: see
    `recovery`.
    """
    rollouts = []
    for record in records:
        task, prompt = one.suite.tasks[record["problem"]]
        rollouts.append(rollout_of(record, task, prompt))
    of.say(f"{one.name}: corrupting steps")
    words = {"key": jax.random.key(of.seed), "temperature": one.temperature, "most": most}
    words["filter"] = make_filter(**of.settings["filter"], where="evaluate")
    encode = functools.partial(of.opened.parts.tokenizer.encode, continues=True)
    completer = evaluation.completer_for(one.suite, completer_of(of.opened, one))
    found = recovery(completer, weights, rollouts, one.suite.environment, encode, one.suite.parser, **words)
    return {"most": most} | found.measures()
