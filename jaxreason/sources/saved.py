"""Sampled groups as JSON values, bit for bit, for checkpoints."""

from __future__ import annotations

import base64
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from jaxreason.rollout import Request, SamplingStats
from jaxreason.sources.replay import Kept
from jaxreason.sources.sampling import Cursor, SampledGroups, Sampling, requests_at
from jaxreason.types import Group, Rollout, Verdict

# Per-token fields of a rollout, and their dtypes.
PER_TOKEN = {"tokens": np.int32, "logp": np.float32, "sampled": np.bool_, "logp_temperature_1": np.float32}


def state_of(sampling: Sampling, cursor: Cursor) -> dict:
    """Return a cursor as the state of a source, with groups that are not yet packed.

    A source has only the parts that it uses.
    """
    state: dict = {"position": cursor.position}
    if sampling.replay:
        state |= {"batch": cursor.batch, "kept": cursor.kept}
    return state if sampling.curriculum is None else state | {"measured": cursor.measured}


def cursor_of(sampling: Sampling, state: Mapping) -> Cursor:
    """Return the cursor of a state, packed or not."""
    kept = state.get("kept", ())
    if isinstance(kept, dict):
        kept = tuple(map(Kept, kept["batches"], unpack(kept, sampling)))
    return Cursor(state["position"], state.get("batch", 0), kept, state.get("measured", {}))


def pack_state(state: Mapping) -> dict:
    """Convert the groups of a state that may be replayed."""
    if "kept" not in state:
        return dict(state)
    kept = state["kept"]
    return {**state, "kept": {"batches": [one.batch for one in kept], **pack([one.group for one in kept])}}


def pack_groups(sampled: SampledGroups) -> dict:
    """Convert the groups of a batch. Of replayed ones only the names are stored: the
    groups are in the cursor.
    """
    return pack(sampled.groups) | {
        "start": sampled.start,
        "end": sampled.end,
        "spent": list(sampled.spent),
        "filled": sampled.filled,
        "replayed": [one.name for one in sampled.replayed],
    }


def unpack_groups(packed: Mapping, sampling: Sampling, cursor: Cursor) -> SampledGroups:
    """Restore the groups that `pack_groups` packed. `cursor` is that of their batch."""
    groups, start = unpack(packed, sampling), packed["start"]
    kept = {one.name: one for one in cursor.kept}
    return SampledGroups(
        cursor.batch,
        start,
        packed.get("end", start + len(groups)),  # checkpoints of earlier versions have neither it nor what follows
        groups,
        SamplingStats(*packed["spent"]),
        packed.get("filled", 0),
        tuple(kept[tuple(name)] for name in packed.get("replayed", ())),
    )


def pack(groups: Sequence[Group]) -> dict:
    """Convert groups to JSON values, bit for bit; arrays become base64 of their bytes.

    Parts that the requests have are left out.
    """
    rollouts = [r for group in groups for r in group.attempts]

    def text_of(name: str, dtype) -> str | None:
        arrays = [getattr(r, name) for r in rollouts]
        if not arrays or arrays[0] is None:
            return None
        return base64.b64encode(np.concatenate(arrays).astype(dtype).tobytes()).decode()

    return {
        "problems": [group.problem for group in groups],
        "lengths": [len(r.tokens) for r in rollouts],
        **{name: text_of(name, dtype) for name, dtype in PER_TOKEN.items()},
        "stop": [r.stop for r in rollouts],
        "text": [r.text for r in rollouts],
        "author": [r.author for r in rollouts],
        "verdict": [dataclasses.astuple(r.verdict) for r in rollouts],
        "temperature": [r.temperature for r in rollouts],
    }


def unpack(packed: Mapping, sampling: Sampling) -> list[Group]:
    """Restore the groups that `pack` packed."""
    lengths = packed["lengths"]
    ends = np.cumsum(lengths)[:-1]
    arrays = {
        name: [None] * len(lengths)
        if packed[name] is None
        else np.split(np.frombuffer(base64.b64decode(packed[name]), dtype), ends)
        for name, dtype in PER_TOKEN.items()
    }
    number = itertools.count()

    def rollout(i: int, request: Request) -> Rollout:
        return Rollout(
            task=request.task,
            problem=request.problem,
            attempt=request.attempt,
            prompt=request.prompt,
            **{name: arrays[name][i] for name in PER_TOKEN},
            stop=packed["stop"][i],
            text=packed["text"][i],
            verdict=verdict_of(*packed["verdict"][i]),
            temperature=packed["temperature"][i],
            author=packed["author"][i] if "author" in packed else "",  # checkpoints of earlier versions lack it
        )

    wanted = requests_at(sampling, positions(packed, sampling.group))
    return [Group(tuple(rollout(next(number), request) for request in requests)) for requests in wanted]


def verdict_of(reward, correct, parsed, reason, measures, attempts=()) -> Verdict:
    """Restore a verdict from JSON values; those of earlier versions lack `attempts`."""
    return Verdict(reward, correct, parsed, reason, measures, tuple(map(tuple, attempts)))


def positions(packed: Mapping, group: int) -> Sequence[int]:
    """Return the positions of packed problems: from `start` on in checkpoints of
    earlier versions.
    """
    if "problems" in packed:
        return packed["problems"]
    return range(packed["start"], packed["start"] + len(packed["lengths"]) // group)
