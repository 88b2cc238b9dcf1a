"""Verifiers made of other verifiers: their sections are in `of`.

    parts = {"name": "number"}, {"name": "format"}
    {"name": "all_of", "of": parts}
    {"name": "weighted", "of": parts, "weights": (1.0, 0.2)}
    {"name": "length_shaped", "of": parts[0], "max_tokens": 512, "buffer_tokens": 128}

The first part judges the answer: the verdict is correct only if it says so, so a reward
for form can never make an attempt correct. The reward of each part is a measure of the
verdict, `reward_number` and `reward_format` here, and so is logged.

A verifier may take a third argument, `tokens`: the number of tokens that the model has
sampled in the rollout, with its end-of-sequence token; None where only a text is
judged.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxreason.types import Task, Verdict
from jaxreason.verify.exact import BAD_KEY

Counted = Callable[[str, Task, int | None], Verdict]  # a verifier that takes the number of tokens
UNJUDGED = (BAD_KEY, "timeout", "crashed", "out of memory")  # reasons that are counted apart


class Part(NamedTuple):
    """A verifier inside another one."""

    name: str
    verify: Counted


def all_of(
    of: Sequence[Mapping[str, Any]],  # sections of verifiers; the first judges the answer
) -> Counted:
    """Reward an attempt only if all parts do: the reward is the lowest of theirs.

    It is correct if the first part says so and every other part finds it correct or
    gives a reward of at least 1, as `format` does. The reason is that of the first part
    that does not, or of one that could not judge.

    Raises:
      ValueError: no part, or a wrong section.
    """
    parts = make_parts("all_of", of)

    def verify(text: str, task: Task, tokens: int | None = None) -> Verdict:
        found = judge(parts, text, task, tokens)
        missed = [v for v in found if not (v.correct or v.reward >= 1.0)]
        reason = reason_of(found) or (missed[0].reason if missed else found[0].reason)
        correct = found[0].correct and not missed
        return Verdict(min(v.reward for v in found), correct, found[0].parsed, reason, measures(parts, found))

    return verify


def weighted(
    of: Sequence[Mapping[str, Any]],  # sections of verifiers; the first judges the answer
    weights: Sequence[float],  # factor of the reward of each part
) -> Counted:
    """Add up the rewards of the parts, each times its weight. An attempt is correct if
    the first part says so, whatever the others say.

    Raises:
      ValueError: no part, a wrong section, or weights that do not fit.
    """
    parts = make_parts("weighted", of)
    if len(weights) != len(parts) or not all(math.isfinite(w) for w in weights) or not weights[0] > 0:
        raise ValueError(
            f"verifier 'weighted' got weights={tuple(weights)} for {len(parts)} parts; allowed: a finite number for each, the "
            "first above 0"
        )

    def verify(text: str, task: Task, tokens: int | None = None) -> Verdict:
        found = judge(parts, text, task, tokens)
        reward = math.fsum(weight * v.reward for weight, v in zip(weights, found, strict=True))
        reason = reason_of(found) or found[0].reason
        return Verdict(reward, found[0].correct, found[0].parsed, reason, measures(parts, found))

    return verify


def length_shaped(
    of: Mapping[str, Any],  # section of the verifier whose reward is shaped
    max_tokens: int,  # from here on the penalty is 1
    buffer_tokens: int,  # tokens before max_tokens in which the penalty grows from 0 to 1
) -> Counted:
    """Add the overlong penalty of DAPO to the reward of another verifier.

    It is 0 up to `max_tokens` - `buffer_tokens` sampled tokens, falls linearly to -1 at
    `max_tokens` and is -1 above (Yu et al., 2025, arXiv 2503.14476, eq. 13). `correct`
    is that of the other verifier. The verdict measures `length_penalty`. A text alone,
    of no known number of tokens, has no penalty.

    Raises:
      ValueError: a wrong section, or numbers that are out of range.
    """
    if not 1 <= buffer_tokens <= max_tokens:
        raise ValueError(
            f"verifier 'length_shaped' got max_tokens={max_tokens}, buffer_tokens={buffer_tokens}; allowed: a buffer of 1 to "
            "max_tokens"
        )
    (part,) = make_parts("length_shaped", (of,))

    def verify(text: str, task: Task, tokens: int | None = None) -> Verdict:
        (found,) = judge([part], text, task, tokens)
        if tokens is None:
            return found
        penalty = overlong(tokens, max_tokens, buffer_tokens)
        more = {f"reward_{part.name}": found.reward, "length_penalty": penalty}
        return dataclasses.replace(found, reward=found.reward + penalty, measures={**found.measures, **more})

    return verify


def overlong(tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """Return the penalty for a length: 0 to -1 (arXiv 2503.14476, eq. 13)."""
    return -min(1.0, max(0.0, (tokens - (max_tokens - buffer_tokens)) / buffer_tokens))


COMBINATORS = {"all_of": all_of, "weighted": weighted, "length_shaped": length_shaped}


# --- parts ---


def make_parts(name: str, sections: Sequence[Mapping[str, Any]]) -> list[Part]:
    """Make the verifiers of the sections in `of`.

    Raises:
      ValueError: no section, one without a name, or one that makes no verifier.
    """
    from jaxreason.verify import make

    if not isinstance(sections, Sequence) or isinstance(sections, str) or not sections:
        raise ValueError(f"verifier {name!r} got of={sections!r}; allowed: one or more sections, such as ({{'name': 'number'}},)")
    for section in sections:
        if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
            raise ValueError(
                f"verifier {name!r} got of={section!r:.80}; allowed: a section with a name, such as {{'name': 'number'}}"
            )
    return [Part(part, with_tokens(make(**section))) for part, section in zip(part_names(sections), sections, strict=True)]


def part_names(sections: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of parts in measures; the second of one name gets a 2."""
    names = [short_name(section["name"]) for section in sections]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name}_{count}" for name, count in zip(names, counts, strict=True)]


def short_name(name: str) -> str:
    """Return the name of a part in measures: `brevity` for `my_rewards:brevity`."""
    return re.sub(r"\W", "_", name.rpartition(":")[2], flags=re.ASCII)[:40]


def with_tokens(verify: Callable[..., Verdict]) -> Counted:
    """Return a verifier that takes the number of tokens, whether or not this one
    does.
    """
    return verify if takes_tokens(verify) else lambda text, task, tokens=None: verify(text, task)


def takes_tokens(verify: Callable[..., Verdict]) -> bool:
    """Tell whether a verifier has the argument `tokens`."""
    try:
        return "tokens" in inspect.signature(verify).parameters
    except (TypeError, ValueError):  # some functions written in C have no signature
        return False


def judge(parts: Sequence[Part], text: str, task: Task, tokens: int | None) -> list[Verdict]:
    """Return the verdicts of all parts.

    Raises:
      TypeError, ValueError: a part's reward can't be combined, which is an error of a
        user's own verifier.
    """
    found = []
    for part in parts:
        verdict = part.verify(text, task, tokens)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"part {part.name!r} returned a {type(verdict).__name__}; allowed: a jaxreason.types.Verdict")
        if not math.isfinite(verdict.reward):  # min() and a comparison could hide a nan
            raise ValueError(f"part {part.name!r} returned the reward {verdict.reward}; allowed: a finite number")
        found.append(verdict)
    return found


def measures(parts: Sequence[Part], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return the measures of all parts, and the reward of each under its name."""
    found: dict[str, float] = {}
    for verdict in reversed(verdicts):
        found |= verdict.measures
    return found | {f"reward_{part.name}": float(v.reward) for part, v in zip(parts, verdicts, strict=True)}


def reason_of(verdicts: Sequence[Verdict]) -> str:
    """Return the reason of the first part that could not judge; "" if all could."""
    return next((v.reason for v in verdicts if v.reason.startswith(UNJUDGED)), "")


# --- sections ---


def sections(section: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a verifier's section and those of all verifiers inside it, the one that
    judges the answer first among parts.
    """
    yield section
    inside = section.get("of", ()) if section.get("name") in COMBINATORS else ()
    for one in (inside,) if isinstance(inside, Mapping) else inside:
        if isinstance(one, Mapping):
            yield from sections(one)


def leaves(section: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the sections of the verifiers that a section is made of; the section itself
    if it combines none.
    """
    return (one for one in sections(section) if one.get("name") not in COMBINATORS)


def reward_measures(section: Mapping[str, Any]) -> list[str] | None:
    """Return the measures of a verifier that are rewards of its parts; None if a part
    is the user's own, which may measure anything.
    """
    found: list[str] = []
    for one in sections(section):
        if ":" in str(one.get("name")) or one.get("name") == "taskset":
            return None
        inside = one.get("of", ()) if one.get("name") in COMBINATORS else ()
        found += [f"reward_{name}" for name in part_names((inside,) if isinstance(inside, Mapping) else inside)]
    return list(dict.fromkeys(found))


def never_penalised(section: Mapping[str, Any], most_tokens: int) -> Mapping[str, Any] | None:
    """Return a section of `length_shaped` without a penalty for any attempt of up to
    `most_tokens`; None if there is none.
    """
    shaped = (one for one in sections(section) if one.get("name") == "length_shaped")
    return next((one for one in shaped if one["max_tokens"] - one["buffer_tokens"] >= most_tokens), None)
