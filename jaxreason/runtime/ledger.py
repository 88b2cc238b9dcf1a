"""The ledger: resources used by a run, separately for sampling, learning, evaluating
and compiling. It is saved in checkpoints and summaries.

    tokens      sampled (sample, evaluate), or read by the learner (learn)
    flops       of this work by formula (`cost.forward_flops`), without padding and
                recomputation
    device_s    seconds x devices from start to end of the work; waiting for verdicts
                is included, compilation is a separate kind
    joules      device_s x `config.log.watts`, the stated watts per device; 0 if unset.
                An estimate: nothing is metered

A ledger is {kind of work: {unit: amount}}; the amounts are floats that only grow. Work
after the last checkpoint of a killed run is done again on resume, and counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from jaxreason.cost import adapter_flops, forward_flops
from jaxreason.types import Batch, Rollout

KINDS = ("sample", "learn", "evaluate", "compile")
UNITS = ("tokens", "flops", "device_s", "joules")


def empty() -> dict:
    """Return a ledger whose amounts are all 0."""
    return {kind: dict.fromkeys(UNITS, 0.0) for kind in KINDS}


def add(ledger: dict, kind: str, *, tokens: float, flops: float, device_s: float, watts: float | None) -> dict:
    """Return the ledger with the given work added."""
    more = {"tokens": tokens, "flops": flops, "device_s": device_s, "joules": device_s * (watts or 0.0)}
    return ledger | {kind: {unit: ledger[kind][unit] + float(more[unit]) for unit in UNITS}}


def named(ledger: dict) -> dict[str, float]:
    """Name the ledger's entries for a line of metrics. Seconds and joules vary between
    identical runs, so their names begin with `time/`.
    """
    values = {}
    for kind, amounts in ledger.items():
        for unit, amount in amounts.items():
            if kind == "compile" and unit in ("tokens", "flops"):
                continue
            values[f"ledger/{kind}_{unit}" if unit in ("tokens", "flops") else f"time/ledger/{kind}_{unit}"] = amount
    return values


def sampling(c, rollouts: Iterable[Rollout]) -> dict[str, float]:
    """Count tokens and FLOPs of sampling. The prompt of a problem counts once, however
    many attempts share it.
    """
    tokens, flops, prompts = 0.0, 0.0, {}
    for r in rollouts:
        prompt = len(r.prompt)
        tokens += float(r.sampled.sum())
        flops += forward_flops(c, [(prompt, len(r.tokens))]) - forward_flops(c, [(prompt, 0)])
        prompts[r.problem, r.task.question, r.temperature] = prompt  # every suite numbers its problems from 0
    return {"tokens": tokens, "flops": flops + forward_flops(c, [(prompt, 0) for prompt in prompts.values()])}


def learning(c, batch: Batch, *, updates: int, reference: bool) -> dict[str, float]:
    """Count tokens and FLOPs of `updates` passes over a batch, plus its log-probs under
    a reference policy if `reference` is true.

    The backward pass costs two forward passes, or one if the base is frozen: its
    weights then have no gradient.
    """
    tokens, forward = float((batch.segment_BT > 0).sum()), reading(c, [batch])
    adapters = adapter_flops(c, tokens)
    update = (3 if c.lora is None else 2) * forward + 3 * adapters
    return {"tokens": tokens * updates, "flops": updates * update + reference * (forward + adapters)}


def reading(c, batches: Sequence[Batch]) -> float:
    """Count FLOPs of scoring every token of the batches that has a weight."""
    branches = [branch for batch in batches for branch in branches_of(batch)]
    whole = forward_flops(c, [(first + rest, trained) for first, rest, trained in branches])
    return whole - forward_flops(c, [(first, 0) for first, *_ in branches])


def branches_of(batch: Batch) -> list[tuple[int, int, int]]:
    """Return (first position, tokens without weight, tokens with weight) of each branch
    in a numpy batch (see `attention.causal`).

    Tokens before a branch's first position are counted with another branch.
    """
    begins_BT = (np.diff(batch.position_BT, axis=1, prepend=-2) != 1) | (np.diff(batch.segment_BT, axis=1, prepend=0) != 0)
    begins_BT[:, 0] = True
    branch_N = np.cumsum(begins_BT) - 1
    first_N, real_N = batch.position_BT[begins_BT], batch.segment_BT[begins_BT] > 0
    trained_BT = batch.weight_BT != 0
    rest_N, trained_N = (np.bincount(branch_N, x.ravel()) for x in (~trained_BT, trained_BT))
    return [tuple(map(int, branch)) for branch in np.stack([first_N, rest_N, trained_N], axis=1)[real_N]]
