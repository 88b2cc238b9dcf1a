"""Load tasks for sources and suites, keep them apart, and check that verifiers can
judge their keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxreason import sharding, tasks, text, verify
from jaxreason.environment import Environment, single_turn
from jaxreason.model import Model
from jaxreason.options import call_with_section, find, lines_of
from jaxreason.rollout import Completer
from jaxreason.tasks import contamination
from jaxreason.types import Prompted, Task, Verdict


class Parts(NamedTuple):
    """Objects that all phases of a run share."""

    seed: int
    model: Model
    tokenizer: text.Tokenizer
    format: text.Format
    completer: Completer
    verifier: dict
    meshes: sharding.Meshes
    devices: int  # number of devices that rows are split over
    say: Callable[[str], None]
    reword: Callable[..., text.Format]  # the format with another instruction, or with tools: see `model.reword`
    loaded: list[tuple[str, Sequence]]  # (description, items) of all training data
    environments: list[Environment]  # those that were made
    environment: dict | None = None  # section of the environment of sources and suites
    trained: Mapping[str, dict] = {}  # phase -> the section of its source's tasks


def named(what: str, family: dict, values: dict) -> tuple[Callable, ...]:
    """Return the maker that a section names, as a tuple; empty if there is none."""
    name = values.get("name")
    known = isinstance(name, str) and (name in family or ":" in name)
    return (find(what, name, family),) if known else ()


def check_positive(where: str, **fields: int) -> None:
    for name, value in fields.items():
        if value < 1:
            raise ValueError(f"{where}.{name} got {value}; allowed: 1 or more")


def load_tasks(section: dict, **defaults) -> Sequence:
    """Load tasks from their section.

    `defaults` fill in fields that the family has and the section omits.
    """
    section = dict(section)
    name = section.pop("name", None)
    for maker in named("task", tasks.TASKS, {"name": name}):
        known = inspect.signature(maker).parameters
        section = {k: v for k, v in defaults.items() if k in known} | section
    return tasks.load(name, **section)


def load_trained(section: dict, parts: Parts) -> Sequence:
    """Load the tasks of a source."""
    items = load_tasks(section, seed=parts.seed)
    parts.loaded.append((f"the source task {section['name']!r}", items))
    parts.say(f"source: {len(items):,} of task {section['name']!r}{tasks.of_split(section)}")
    return items


def load_held_out(section: dict, parts: Parts, what: str, allow_overlap: bool, **defaults) -> Sequence:
    """Load the tasks of a suite or a text, from the test split by default.

    Say how many questions share a passage with training data (see `contamination`).

    Raises:
      ValueError: a source trains on some of them.
    """
    items = load_tasks(section, split="test", **defaults)
    parts.say(f"{what}: {len(items):,} of task {section['name']!r}{tasks.of_split({'split': 'test'} | section)}")
    for name, trained in parts.loaded:
        if shared := tasks.overlap(trained, items):
            message = f"{what} holds {shared:,} of its {len(items):,} questions or texts in common with {name}"
            if not allow_overlap:
                raise ValueError(f"{message}; set their split, or another path, or config.evaluate.allow_overlap=True to insist")
            parts.say(f"warning: {message}")
        if contamination.compares(trained, items) and (found := contamination.shared(trained, items)).compared:
            parts.say(contamination.told(found, what, name))
    return items


def trained_tasks(config: dict) -> dict[str, dict]:
    """Return the task sections of all phases that are run, by the phase's name or, in a
    mix, PHASE.PART.
    """
    found = {}
    for phase in config["phases"]:
        for part, source in parts_of(config[phase]["source"]).items():
            if isinstance(task := source.get("task"), dict):
                found[f"{phase}.{part}" if part else phase] = task
    return found


def parts_of(source: dict) -> dict[str, dict]:
    """Return the parts of a mix by name; any other source alone, under ""."""
    of = source.get("of")
    if source.get("name") != "mix" or not isinstance(of, dict):
        return {"": source}
    return {name: part for name, part in of.items() if isinstance(part, dict)}


def trained_sections(config: dict) -> list[dict]:
    """Return the task sections of the sources of all phases that are run."""
    return list(trained_tasks(config).values())


def held_out_sections(suites: dict | None = None, texts: dict | None = None, **_) -> list[dict]:
    """Return the task sections of all suites and texts."""
    sections = [*(suites or {}).values(), *(text.get("task") for text in (texts or {}).values())]
    return [section for section in sections if isinstance(section, dict)]


# Fields of a task that choose some of its questions, or their worked solutions, but not
# the kind of question.
OF_THE_CHOICE = (
    *("split", "size", "seed", "limit", "held_out", "revision", "path", "ops_weights"),
    *("demonstrations", "slip", "guess", "stop_early", "guess_right", "solution"),
)


def in_distribution(suite: dict, source: dict) -> bool:
    """Tell whether a suite asks questions of the kind that a source trains on: the same
    task, with each number or range inside that of the source, and all other fields
    equal. Files of one family count as one kind.
    """
    if suite.get("name") != source.get("name"):
        return False
    for maker in named("task", tasks.TASKS, source):
        for name, parameter in inspect.signature(maker).parameters.items():
            here, there = (section.get(name, parameter.default) for section in (suite, source))
            if name not in OF_THE_CHOICE and here != there and not is_inside(here, there):
                return False
    return True


def is_inside(value: object, other: object) -> bool:
    """Tell whether a number or range (lowest, highest) is inside another."""
    ranges = []
    for one in (value, other):
        low_high = tuple(one) if isinstance(one, (tuple, list)) and len(one) == 2 else (one, one)
        if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in low_high):
            return False
        ranges.append(low_high)
    (low, high), (lowest, highest) = ranges
    return lowest <= low and high <= highest


def shares_files(section: dict, others: Sequence[dict]) -> bool:
    """Tell whether a section reads a file that another section reads too."""
    files = tasks.files(section)
    return any(files & tasks.files(other) for other in others)


def drop_long_prompts(items: Sequence, prompt: Callable, limit: int, what: str, say: Callable[[str], None]) -> list[Prompted]:
    """Return the tasks whose prompts have at most `limit` tokens, with the prompts.

    Report how many were dropped.

    Raises:
      ValueError: no task is left.
    """
    if not len(items):
        raise ValueError(f"{what} has no tasks; check its split and limit")
    prompted = [Prompted(task, np.asarray(prompt(task), np.int32)) for task in items]
    kept = [p for p in prompted if len(p.prompt) <= limit]
    if not kept:
        raise ValueError(
            f"all {len(items)} prompts of {what} are longer than sampler.max_prompt_tokens={limit} (the first has "
            f"{len(prompted[0].prompt)} tokens); raise it"
        )
    if len(kept) < len(items):
        say(f"{what}: dropped {len(items) - len(kept)} of {len(items)} tasks with prompts over {limit} tokens")
    return kept


def encode_documents(documents: Sequence, parts: Parts, task: dict) -> list[list[int]]:
    """Encode texts, or tasks with their worked solutions, as token ids.

    Each document has its beginning- and end-of-sequence tokens.
    """
    tokenizer = parts.tokenizer
    if not isinstance(documents[0], str):
        return [parts.format.demonstration(d)[0] for d in check_solutions(documents, task)]
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [[*start, *tokenizer.encode(d, special=False), tokenizer.eos_ids[0]] for d in documents]


def check_solutions(items: Sequence, task: dict) -> Sequence:
    if not items[0].solution:
        raise ValueError(f"tasks of {task['name']!r} have no worked solutions; set task.demonstrations or task.solution")
    return items


OF_ENVIRONMENT = ("must_finish", "deadline_s")  # fields of a verifier section that configure the environment, not the verifier


def make_judge(
    *,
    name: str,  # a verifier, or module:maker of your own
    must_finish: bool = False,  # whether an attempt that is cut off at its limit is wrong, whatever it says
    deadline_s: float | None = None,  # seconds per verdict; None: 60, or none for a verifier with a timeout_s
    **section,
) -> Environment:
    """Make the single-turn environment of a `verifier` section."""
    bounded = verify.is_bounded({"name": name, **section})
    if bounded and deadline_s is not None:
        raise ValueError(f"verifier.deadline_s got {deadline_s}, but {name!r} has its own limit; set timeout_s instead")
    own = {"deadline_s": None} if bounded else {"deadline_s": deadline_s} if deadline_s is not None else {}
    return single_turn(verify.make(name, **section), must_finish, name=name, **own)


def equivalence_of(section: Mapping) -> Callable[[str, str], bool] | None:
    """Return whether two answers are equivalent for the verifier of a section, see
    `verify.equivalence`.
    """
    return verify.equivalence(**{key: value for key, value in section.items() if key not in OF_ENVIRONMENT})


KEYS_TRIED = 20_000  # at most; a verifier checks about ten thousand keys per second


def check_keys(items: Sequence, section: dict, what: str, say: Callable[[str], None]) -> None:
    """Warn of tasks whose keys the verifier can't judge: no answer to them earns a
    reward.

    Only verifiers of this package are tried: a user's own may be slow or cost money.

    Raises:
      ValueError: the verifier can't judge any key.
    """
    for part in verify.leaves({k: v for k, v in section.items() if k not in OF_ENVIRONMENT}):
        if part.get("name") in verify.VERIFIERS.keys() - {"taskset"}:  # which scores with the user's code
            check_keys_of(items, part, what, say)


def check_keys_of(items: Sequence, section: Mapping[str, Any], what: str, say: Callable[[str], None]) -> None:
    """Warn of tasks whose keys one verifier can't judge."""
    step = -(-len(items) // KEYS_TRIED)
    tried = items[::step]
    bad = verify.bad_keys(verify.make(**section), tried)
    if not bad:
        return
    of = f"{len(tried)} keys" if step == 1 else f"{len(tried)} keys that were tried (of {len(items)})"
    first = f"{bad[0].answer!r} of task {bad[0].id!r}" if bad[0].answer else f"that of task {bad[0].id!r}, which has no answer"
    if not bad[0].answer and bad[0].data:
        first += f" but {', '.join(bad[0].data)}"
    told = f"verifier {section['name']!r} can't judge {len(bad)} of {of}; the first is {first}"
    if len(bad) == len(tried):
        raise ValueError(f"{what}: {told}. Every reward would be 0; choose another verifier, or other fields of the task")
    say(f"warning: {what}: {told}; such attempts earn 0 and are counted in rollout/bad_keys")


def judge(section: dict, items: Sequence[Task]) -> Environment:
    """Make the environment of a `verifier` section.

    A user's own verifier is tried on the first task.

    Raises:
      ValueError: an unknown verifier, a wrong field, or a user's verifier that returns
        no Verdict.
    """
    section = {"name": None} | section
    for part in verify.leaves({key: value for key, value in section.items() if key not in OF_ENVIRONMENT}):
        if not (isinstance(name := part.get("name"), str) and ":" in name and len(items)):
            continue
        judge_one = verify.make(**part)
        for answer in (items[0].answer, ""):
            with lines_of(f"verifier {name!r} on the first task"):
                verdict = judge_one(answer, items[0])
            if not isinstance(verdict, Verdict):
                raise ValueError(f"verifier {name!r} gave {verdict!r} of the first task; allowed: a types.Verdict")
    return call_with_section(make_judge, section, "config.verifier")
