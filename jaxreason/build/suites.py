"""Suites by name: the tasks of a benchmark with a prompt and a verifier.

A model that began as a jaxreason run keeps its own prompt and verifier where a suite
names none; the suites of procedural tasks, whose format a model has learnt, name none.
"""

from __future__ import annotations

import ast
from typing import Any

from jaxreason import tasks
from jaxreason.options import balanced, split_outside, unknown_name_message

NUMBER = "{question}\n\nThink step by step. Write the final answer, a number, on the last line after ####."
BOXED = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
TAGGED = "{question}\n\nThink step by step. Write the final answer, and nothing else, between <answer> and </answer>."

CODE = "{question}\n\nWrite the whole program in Python, with its imports, in one block between ```python and ```."


def benchmark(name: str, instruction: str, verifier: str, **task) -> dict[str, Any]:
    return {"name": name, **task, "instruction": instruction, "verifier": {"name": verifier, "must_finish": True}}


SUITES: dict[str, dict[str, Any]] = {
    "gsm8k": benchmark("gsm8k", NUMBER, "number", split="test"),
    "svamp": benchmark("svamp", NUMBER, "number", split="test"),
    "asdiv": benchmark("asdiv", NUMBER, "number"),
    "math500": benchmark("math500", BOXED, "math"),
    "aime24": benchmark("aime24", BOXED, "number"),
    "aime25": benchmark("aime25", BOXED, "number"),
    "amc23": benchmark("amc23", BOXED, "number"),
    "mbpp": benchmark("mbpp", CODE, "code", split="test"),
    "humaneval": benchmark("humaneval", CODE, "code"),
    # In distribution as configs/tiny.py trains on them, and out of it (longer, larger).
    "chain": {"name": "chain", "ops": 5, "verifier": {"name": "exact", "marker": ";A"}},
    "chain_ood": {"name": "chain", "ops": 8, "verifier": {"name": "exact", "marker": ";A"}},
    "chain_twins": {"name": "twins", "of": {"name": "chain", "ops": 5}, "verifier": {"name": "exact", "marker": ";A"}},
    "inverse_chain": {"name": "inverse_chain", "verifier": {"name": "exact", "marker": "A"}},
    "inverse_chain_ood": {"name": "inverse_chain", "ops": 3, "verifier": {"name": "exact", "marker": "A"}},
    "calculator": {"name": "calculator", "verifier": {"name": "exact", "marker": "A"}},
    "countdown": {"name": "countdown", "verifier": {"name": "countdown"}},
    "countdown_ood": {"name": "countdown", "numbers": 4, "verifier": {"name": "countdown"}},
    "reversal": {"name": "reversal", "verifier": {"name": "exact", "marker": "A"}},
    "sorting": {"name": "sorting", "verifier": {"name": "exact", "marker": "A"}},
}


GYM = "gym:"  # and a dataset of reasoning-gym: one suite for each, not listed in SUITES


def known_suite(name: str, own: dict[str, dict]) -> dict[str, Any] | None:
    """Return the section of a name of `own` or of `SUITES`, or of `gym:DATASET`; None
    for any other.
    """
    if name.startswith(GYM) and name != GYM and name not in own:
        return benchmark("reasoning_gym", TAGGED, "reasoning_gym", dataset=name.removeprefix(GYM), split="test")
    return own.get(name) or SUITES.get(name)


PROGRAMS = ("programs", "mbpp", "humaneval")  # their files have tests, not answers
# Fields of a file of a benchmark's authors, where they are not question and answer.
FIELDS = {"svamp": {"question": "Body+Question", "answer": "Answer"}}


OTHERS = "; or gym:DATASET of reasoning-gym, NAME=FILE.jsonl, or NAME={...}"


def read_suites(text: str, own: dict[str, dict]) -> dict[str, dict[str, Any]]:
    """Read the suites that a command asks for, as sections of `config.evaluate.suites`.

    A part between commas is a name of `SUITES` or of the run's `own` suites, which come
    first; gym:DATASET, a dataset of reasoning-gym; NAME=FILE.jsonl, the problems of a
    file with the prompt and the verifier of the suite NAME, if there is one; or
    NAME={...}, a section.

    Raises:
      ValueError: an unknown name, or a section that can't be read.
    """
    found: dict[str, dict[str, Any]] = {}
    for part in filter(None, split_outside(text, ",")):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not balanced(part):
            raise ValueError(
                f"--suites has {part!r:.80}, with a quote or bracket that has no partner; a file of such a name is "
                f"NAME={{'name': 'jsonl', 'path': \"FILE\"}}"
            )
        known = known_suite(name, own)
        if not equals and known is None:
            raise ValueError(unknown_name_message("suite", name, {*SUITES, *own}) + OTHERS)
        section = dict(known or {}) if not equals else from_value(name, value, known or {})
        if name in found:
            raise ValueError(f"--suites has {name!r} twice; allowed: each name once")
        found[name] = section
    if not found:
        raise ValueError(f"--suites is empty; allowed: one or more of {', '.join(sorted({*SUITES, *own}))}")
    return found


def from_value(name: str, value: str, known: dict[str, Any]) -> dict[str, Any]:
    """Return the section of NAME=VALUE: a file of tasks, or fields."""
    asked = {field: known[field] for field in ("instruction", "verifier") if field in known}
    if not value.startswith("{"):
        family = "programs" if known.get("name") in PROGRAMS else "jsonl"
        return {"name": family, "path": value, "split": None, **FIELDS.get(name, {}), **asked}
    try:
        section = ast.literal_eval(value)
        if not isinstance(section, dict) or not all(isinstance(key, str) for key in section):
            raise ValueError("no dictionary of fields")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(
            f"--suites: {name} got {value!r:.80}; allowed: FILE.jsonl, or a section as {{'name': 'jsonl', ...}}"
        ) from None
    if "name" not in section:
        raise ValueError(f"--suites: {name} got a section without 'name'; allowed: a task, one of {', '.join(tasks.TASKS)}")
    whole = {"split": None} if tasks.splits_files(section) else {}  # as a suite of a config whose file no source reads
    return asked | whole | section
