"""The arms of a sweep: lists of overrides of config fields, from Python or from a grid
in one line.

    names, groups = ["grpo", "dapo"], [4, 8]
    product(over("rl.objective.name", names), over("rl.source.group", groups))
    "rl.objective.name=grpo,dapo; rl.source.group=4,8; seed=0..4"

An arm is a dictionary: name of a field -> value. The functions below take and return
lists of arms (after `hyper` of big_vision). Seeds are no field of an arm: every arm
is run with every seed, so that arms can be compared seed by seed.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxreason.options import balanced, split_outside

Arm = dict[str, Any]

MOST_ARMS = 10_000  # of a grid: each has a config and, per seed, a folder
LONGEST_NAME = 100  # bytes, without the hash
LONGEST_GIVEN_NAME = 200  # bytes; a file's name may have 255, and that of a log has the seed as well


class Sweep(NamedTuple):
    """A comparison of configs that differ in some fields."""

    config: str  # FILE:OPTIONS
    # Overrides of fields; the first arm is the baseline. `{folder}` and `{seed}` in a
    # text become the sweep's folder and the run's seed.
    arms: Sequence[Mapping[str, Any]]
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    names: Sequence[str] | None = None  # of the arms; None: their overrides
    common: Mapping[str, Any] = {}  # overrides of all arms, in no name
    metric: str | None = None  # eval/SUITE/MODE/accuracy; None: the first suite at the first temperature


def over(field: str, values: Iterable) -> list[Arm]:
    """One arm for each value of a field."""
    return [{field: value} for value in values]


def fixed(field: str, value: Any) -> list[Arm]:
    """One arm, with one field set: for `product`."""
    return [{field: value}]


def product(*lists: Sequence[Mapping]) -> list[Arm]:
    """Every combination of an arm from each list."""
    return [_joined(arms) for arms in itertools.product(*lists)]


def zip_(*lists: Sequence[Mapping]) -> list[Arm]:
    """The first arms of all lists together, then the second ones, and so on.

    Raises:
      ValueError: lists of different lengths.
    """
    if len({len(arms) for arms in lists}) > 1:
        raise ValueError(f"zip_ got lists of {', '.join(str(len(arms)) for arms in lists)} arms; allowed: lists of one length")
    return [_joined(arms) for arms in zip(*lists, strict=True)]


def chain(*lists: Sequence[Mapping]) -> list[Arm]:
    """The arms of all lists, one list after the other."""
    return [dict(arm) for arms in lists for arm in arms]


def _joined(arms: Sequence[Mapping]) -> Arm:
    made: Arm = {}
    for arm in arms:
        if twice := made.keys() & arm.keys():
            raise ValueError(f"two lists of arms set the field {min(twice)!r}; allowed: each field in one of them")
        made |= arm
    return made


# --- a grid in one line ---


def parse_grid(text: str) -> tuple[list[Arm], tuple[int, ...] | None]:
    """Read `"field=value,value; field=first..last; seed=0..4"`: the product of its
    fields, and the seeds if it names them.

    Raises:
      ValueError: no field, one without values, or one twice.
    """
    fields: dict[str, list] = {}
    for part in filter(None, split_outside(text, ";")):
        name, equals, values = (word.strip() for word in part.partition("="))
        if not balanced(part):
            raise ValueError(f"--grid has {part!r}, with a quote or bracket that has no partner; put such a value in quotes")
        name = name.removeprefix("--").removeprefix("config.")
        if not equals or not name or not values:
            raise ValueError(f"--grid has {part!r}; allowed: field=value,value or field=first..last, parted by semicolons")
        if name in fields:
            raise ValueError(f"--grid has the field {name!r} twice; allowed: once, with all its values")
        fields[name] = parse_values(values)
    seeds = fields.pop("seed", None)
    if seeds is not None and not all(seed.isdecimal() for seed in seeds):
        raise ValueError(f"--grid has seed={','.join(seeds)}; allowed: whole numbers from 0, as 0..4 or 0,1,2")
    if not fields and seeds is None:
        raise ValueError("--grid is empty; allowed: field=value,value or field=first..last, parted by semicolons")
    if (count := math.prod(map(len, fields.values()))) > MOST_ARMS:
        raise ValueError(f"--grid has {count:,} arms; allowed: {MOST_ARMS:,}; give fields fewer values")
    arms = product(*(over(name, values) for name, values in fields.items()))
    return arms, None if seeds is None else tuple(map(int, seeds))


def parse_values(text: str) -> list[str]:
    """Read the values of a field: `a,b`, `(1, 2),(3, 4)`, `0..4`, ends included, or
    `0..2,8`.

    Raises:
      ValueError: an empty value, or a range that can't be counted out.
    """
    values = split_outside(text, ",")
    if "" in values:
        raise ValueError(f"--grid has an empty value in {text!r}; allowed: a value on each side of a comma, '' for an empty text")
    return [one for value in values for one in (_range(value) if RANGE.fullmatch(value) else [_unquoted(value)])]


RANGE = re.compile(r"([-+]?[\d.]*\d(?:e[-+]?\d+)?)\s*\.\.\s*([-+]?\.?\d[\d.]*(?:e[-+]?\d+)?)", re.IGNORECASE)


def _range(text: str) -> list[str]:
    """The whole numbers of `first..last`."""
    try:
        first, last = map(int, RANGE.fullmatch(text).groups())
    except ValueError:
        raise ValueError(f"--grid has the range {text}; allowed: whole numbers; list other values: 0.1,0.2") from None
    if last < first:
        raise ValueError(f"--grid has the range {text}; allowed: first..last, the last one not below the first")
    if last - first >= MOST_ARMS:
        raise ValueError(f"--grid has the range {text}, {last - first + 1:,} values; allowed: {MOST_ARMS:,}")
    return [str(value) for value in range(first, last + 1)]


def _unquoted(text: str) -> str:
    """The text inside quotes: they only keep its commas together."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def word_of(value: Any) -> str:
    """Write a value as a command's word."""
    return value if isinstance(value, str) else repr(value)


# --- names of folders ---


def name_of(arm: Mapping[str, Any]) -> str:
    """Name an arm by its overrides: the same overrides give the same name, whatever
    their order.

    A name that would be too long, or lose characters that a folder's name should not
    have, ends in a hash.
    """
    if not arm:
        return "base"
    whole = ",".join(f"{field}={_plain(word_of(arm[field]))}" for field in sorted(arm))
    name = re.sub(r"[^\w.=,+()-]+", "_", whole)
    cut = name.encode()[:LONGEST_NAME].decode(errors="ignore")
    if cut == whole:
        return name
    return f"{cut}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _plain(word: str) -> str:
    """One way to write a value: (1,2) for (1, 2), 0.001 for 1e-3."""
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word
    return word if isinstance(value, str) else repr(value).replace(" ", "")


def named_arms(sweep: Sweep) -> dict[str, Arm]:
    """The arms of a sweep by name; the first is the baseline.

    Raises:
      ValueError: there is none, or two have one name.
    """
    if not sweep.arms:
        raise ValueError("the sweep has no arms; allowed: one or more, [{}] is the config as it is")
    if not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds):
        raise ValueError(f"the sweep has the seeds {tuple(sweep.seeds)}; allowed: one or more, each once")
    if sweep.names is not None and len(sweep.names) != len(sweep.arms):
        raise ValueError(f"the sweep has {len(sweep.names)} names and {len(sweep.arms)} arms; allowed: a name each")
    found: dict[str, Arm] = {}
    for i, arm in enumerate(sweep.arms):
        if "seed" in arm or "seed" in sweep.common:
            raise ValueError("an arm sets the field 'seed'; allowed: seeds=... of the sweep, which every arm is run with")
        name = name_of(arm) if sweep.names is None else str(sweep.names[i])
        if not re.fullmatch(r"[\w.=,+()-]+", name) or name.startswith("."):
            raise ValueError(f"the sweep has an arm named {name!r}; allowed: letters, digits and _ . = , + - ( )")
        if len(name.encode()) > LONGEST_GIVEN_NAME:
            raise ValueError(
                f"the sweep has an arm named {name[:40]}..., {len(name.encode())} bytes; allowed: {LONGEST_GIVEN_NAME}"
            )
        if name in found:
            raise ValueError(f"two arms have the folder {name!r}: {found[name]} and {dict(arm)}; allowed: arms that differ")
        found[name] = dict(arm)
    return found
