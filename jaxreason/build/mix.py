"""Build a mix: several sources whose batches are joined, each with its weight."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from jaxreason import objectives, sources
from jaxreason.build.objective import NO_REWARDS, check_demonstrations
from jaxreason.build.tasks import Parts
from jaxreason.objectives import Objective
from jaxreason.objectives.losses import nll
from jaxreason.options import call_with_section, unknown_name_message
from jaxreason.options import fields as fields_

TAKEN = ("eval", "perf", "rollout", "time", "train")  # first parts of the names of metrics


def make_mix(
    make_source: Callable[..., sources.Source],
    *,
    parts: Parts,
    objective: Objective,
    microbatches: int,
    steps: int,
    of: Mapping[str, dict],
    weights: Mapping[str, float] | None,
) -> sources.Source:
    """Make the source `mix`. `make_source` makes each part.

    A part has the objective of the phase, or an `objective` of its own that imitates.
    Parts that give demonstrations imitate by default.

    Raises:
      ValueError: a part or its weight is impossible.
    """
    weights = {} if weights is None else weights
    check_names(of, weights)
    made = {}
    for name, section in of.items():
        where = f"source.of.{name}"
        weight = weights.get(name, 1.0)
        if not fields_.fits(weight, float) or weight < 0:
            raise ValueError(f"source.weights.{name} got {weight!r:.60}; allowed: a finite number, 0 or more")
        own = imitating(section, objective, where)
        given = {"parts": parts, "objective": objective if own is None else own, "microbatches": microbatches, "steps": steps}
        fields = {"name": None} | {field: value for field, value in section.items() if field != "objective"}
        try:
            source = call_with_section(make_source, fields, where, **given)
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
        if source.rows % microbatches:
            raise ValueError(
                f"{where} has {source.rows} rows a batch, which do not divide over {microbatches} micro-batches; change its "
                "rows, or problems x group, or the phase's microbatches"
            )
        made[name] = sources.Part(source, float(weight), own is not None)
    if not any(part.weight for part in made.values()):
        raise ValueError(f"source.weights got {dict(weights)}, so nothing is learned; allowed: a weight above 0 for some part")
    return sources.mix(made, microbatches=microbatches)


def check_names(of: Mapping[str, dict], weights: Mapping[str, float]) -> None:
    """Raise ValueError for parts without a usable name, or weights of other parts."""
    if not of:
        raise ValueError("source.of of a mix is empty; allowed: one or more parts by name, each a source")
    for name, section in of.items():
        if not re.fullmatch(r"\w{1,40}", name, re.ASCII) or name in TAKEN:
            raise ValueError(
                f"source.of has a part {name!r}; allowed: letters, digits and _, and not {', '.join(TAKEN)}, which begin the "
                "names of other metrics"
            )
        if not isinstance(section, Mapping):
            raise ValueError(f"source.of.{name} got {section!r}; allowed: a source, such as {{'name': 'rollouts', ...}}")
        if section.get("name") == "mix":
            raise ValueError(f"source.of.{name} is a mix inside a mix; allowed: its parts here, with their weights multiplied")
    for name in weights:
        if name not in of:
            raise ValueError(unknown_name_message("part in source.weights", name, of))


def imitating(section: Mapping, objective: Objective, where: str) -> Objective | None:
    """Return the objective of a part whose tokens are imitated, or None if it has the
    token loss of the phase.
    """
    asked = section.get("objective")
    if asked is None:
        if is_scored(section):
            return None
        if objective.token_loss is nll:  # tokens that nobody sampled count in no comparison with the sampler
            return objective if section.get("name") in NO_REWARDS else None
        return objectives.make("sft")
    if not isinstance(asked, Mapping):
        raise ValueError(f"{where}.objective got {asked!r:.60}; allowed: None, or a section, such as {{'name': 'sft'}}")
    made = call_with_section(objectives.make, {"name": None} | dict(asked), f"{where}.objective")
    if made.token_loss is not nll or made.prepare:
        raise ValueError(
            f"{where}.objective got {asked.get('name')!r}; allowed: None (the objective of the phase), or one that imitates, "
            "without a penalty or a choice of tokens: sft, lm, expert_iteration. A batch has one token loss besides that of "
            "imitation"
        )
    check_demonstrations(made, what=asked.get("name"), where=f"{where}.objective", source=section)
    return made


def is_scored(section: Mapping) -> bool:
    """Tell whether a source gives attempts to be scored, not demonstrations. A user's
    own is taken for such a source.
    """
    return section.get("name") not in ("corpus", "demonstrations", "kept_rollouts")
