"""Sampled groups as JSON values, bit for bit, for checkpoints."""

from __future__ import annotations

import base64
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from jaxreason.rollout import Request, SamplingStats
from jaxreason.sources.sampling import SampledGroups
from jaxreason.types import Group, Rollout, Verdict

# Per-token fields of a rollout, and their dtypes.
PER_TOKEN = {"tokens": np.int32, "logp": np.float32, "sampled": np.bool_, "logp_temperature_1": np.float32}


def pack_groups(sampled: SampledGroups) -> dict:
    """Convert groups to JSON values, bit for bit; arrays become base64 of their bytes.

    Parts that the requests have are left out.
    """
    rollouts = [r for group in sampled.groups for r in group.attempts]

    def text_of(name: str, dtype) -> str | None:
        arrays = [getattr(r, name) for r in rollouts]
        if arrays[0] is None:
            return None
        return base64.b64encode(np.concatenate(arrays).astype(dtype).tobytes()).decode()

    return {
        "start": sampled.start,
        "lengths": [len(r.tokens) for r in rollouts],
        **{name: text_of(name, dtype) for name, dtype in PER_TOKEN.items()},
        "stop": [r.stop for r in rollouts],
        "text": [r.text for r in rollouts],
        "author": [r.author for r in rollouts],
        "verdict": [dataclasses.astuple(r.verdict) for r in rollouts],
        "temperature": [r.temperature for r in rollouts],
        "spent": list(sampled.spent),
    }


def unpack(packed: dict, wanted: Sequence[Sequence[Request]]) -> SampledGroups:
    """Restore the groups that `pack_groups` packed."""
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

    groups = [Group(tuple(rollout(next(number), request) for request in requests)) for requests in wanted]
    return SampledGroups(packed["start"], groups, SamplingStats(*packed["spent"]))


def verdict_of(reward, correct, parsed, reason, measures, attempts=()) -> Verdict:
    """Restore a verdict from JSON values; those of earlier versions lack `attempts`."""
    return Verdict(reward, correct, parsed, reason, measures, tuple(map(tuple, attempts)))
