"""The ledger: resources used by a run, separately for sampling, learning, evaluating
and compiling. It is saved in checkpoints and summaries.

    tokens      sampled (sample, evaluate), or read by the learner (learn)
    flops       of this work by formula (`cost.forward_flops`), without padding and
                recomputation
    device_s    seconds x devices from start to end of the work; waiting for verdicts
                is included, compilation is a separate kind
    bytes       least bytes of memory that decoding reads (sample, evaluate; see
                `decode_bytes`); not counted for other work
    joules      from a counter, or device_s x `config.log.watts`, an estimate; 0 without
                either (see `runtime.energy`). A counter also counts other programs on
                the same hardware. A stretch of work in which something compiles is
                divided by time

Time between these kinds of work (logging, saving) is in none of them. `joules_from` in
the summary says whether joules were metered or estimated. A ledger is {kind of work:
{unit: amount}}; the amounts are floats that only grow. Work after the last checkpoint
of a killed run is done again on resume, and counts once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxreason.cost import adapter_flops, forward_flops
from jaxreason.runtime.peak import Peak
from jaxreason.types import Batch, Rollout

KINDS = ("sample", "learn", "evaluate", "compile")
UNITS = ("tokens", "flops", "bytes", "device_s", "joules")
DECODING = ("sample", "evaluate")  # kinds of work whose bytes are counted


class Decoding(NamedTuple):
    """How a sampler reads memory, for `decode_bytes`."""

    slots: float  # that share one reading of the weights
    weight_bytes: float  # read by a decode step
    position_bytes: float  # keys and values of one position, in all layers
    shares_prompts: bool  # attempts at a problem read one copy of its prompt


def empty() -> dict:
    """Return a ledger whose amounts are all 0."""
    return {kind: dict.fromkeys(UNITS, 0.0) for kind in KINDS}


def complete(ledger: dict) -> dict:
    """Add the kinds of work and the units that an earlier version did not count."""
    return {kind: amounts | ledger.get(kind, {}) for kind, amounts in empty().items()}


def add(
    ledger: dict, kind: str, *, tokens: float, flops: float, device_s: float, bytes: float = 0.0, joules: float = 0.0
) -> dict:
    """Return the ledger with the given work added."""
    more = {"tokens": tokens, "flops": flops, "bytes": bytes, "device_s": device_s, "joules": joules}
    return ledger | {kind: {unit: ledger[kind][unit] + float(more[unit]) for unit in UNITS}}


def named(ledger: dict) -> dict[str, float]:
    """Name the ledger's entries for a line of metrics. Seconds and joules vary between
    identical runs, so their names begin with `time/`.
    """
    values = {}
    for kind, amounts in ledger.items():
        for unit, amount in amounts.items():
            if (kind == "compile" and unit in ("tokens", "flops")) or (kind not in DECODING and unit == "bytes"):
                continue
            values[f"time/ledger/{kind}_{unit}" if unit in ("device_s", "joules") else f"ledger/{kind}_{unit}"] = amount
    return values


# --- what was got for it ---


def utilisation(ledger: dict, peak: Peak | None) -> dict[str, dict] | None:
    """Return the fractions of the peak rates of the devices, by kind of work; None if
    the peak rates are not known.

    `mfu` is model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix
    B): FLOPs of this ledger, without padding and recomputation, per device-second and
    peak FLOP/s. `bandwidth` is the same of the bytes that decoding reads at least; None
    for work whose bytes are not counted. The time is all that is booked: with waiting
    for verdicts, prefill, idle slots and the host's part.
    """
    if peak is None:
        return None
    found = {}
    for kind, used in ledger.items():
        if kind != "compile" and used["device_s"] > 0:
            mfu = used["flops"] / used["device_s"] / peak.flops_per_s
            bandwidth = used["bytes"] / used["device_s"] / peak.bytes_per_s if kind in DECODING else None
            found[kind] = {"mfu": mfu, "bandwidth": bandwidth}
    return found


def per_correct_answer(ledger: dict, evaluations: Sequence[Mapping], has_joules: bool) -> dict | None:
    """Return what a run used per correct answer that it gained; None without a gain.

    Correct answers gained are the gain in accuracy between the first and the last
    evaluation of the first suite at its first temperature, times the number of problems
    of the last one. Everything in the ledger counts, evaluations and compilation too,
    but nothing of an earlier run that this one continued from (`init_from`). A suite
    with more problems makes an answer cheaper, so only runs with the same suite can be
    compared. Joules are None unless the ledger `has_joules`, metered or estimated.
    """
    if not evaluations:
        return None
    first = evaluations[0]
    last = [e for e in evaluations if (e["suite"], e["temperature"]) == (first["suite"], first["temperature"])][-1]
    gained = (last["accuracy"] - first["accuracy"]) * last["n"]
    if not gained > 0:
        return None
    units = ("tokens", "flops", "device_s", "joules")
    used = {unit: sum(amounts[unit] for amounts in ledger.values()) / gained for unit in units}
    used |= {} if has_joules else {"joules": None}
    return {"suite": first["suite"], "temperature": first["temperature"], "gained": gained, **used}


JOULES_FROM = {  # for the final report
    "nvml": "metered by the GPUs, without the host",
    "rapl": "metered by the CPU packages, other programs included",
    "watts": "estimated from config.log.watts, not metered",
    "mixed": "from several sources, or of a part of the run",
}


def report(summary: Mapping) -> list[str]:
    """Return lines about a run's cost from its summary, for the final report."""
    source, fractions = summary["joules_from"], summary["utilisation"] or {}
    lines = []
    for kind, used in summary["ledger"].items():
        parts = [] if kind == "compile" else [f"{used['tokens']:,.0f} tokens", f"{used['flops']:.3g} FLOPs"]
        parts.append(f"{used['device_s']:,.1f} device seconds")
        parts += [f"{used['joules']:,.0f} J"] if source else []
        shares = {"FLOP/s": fractions.get(kind, {}).get("mfu"), "bandwidth": fractions.get(kind, {}).get("bandwidth")}
        told = [f"{share:.1%} of peak {name}" for name, share in shares.items() if share is not None]
        lines.append(f"{kind}: {', '.join(parts + told)}")
    if source:
        lines.append(f"joules: {JOULES_FROM[source]}")
    if peak := summary["peak"]:
        rates = f"{peak['flops_per_s'] / 1e12:.3g} TFLOP/s, {peak['bytes_per_s'] / 1e9:.4g} GB/s per device"
        lines.append(f"peak of {peak['device']} ({peak['source']}): {rates}")
    if cost := summary["per_correct_answer_gained"]:
        used = f"{cost['flops']:.3g} FLOPs, {cost['tokens']:,.0f} tokens, {cost['device_s']:,.3g} device seconds"
        used += "" if cost["joules"] is None else f", {cost['joules']:,.3g} J"
        where = f"{cost['gained']:,.0f} on {cost['suite']} at temperature {cost['temperature']:g}"
        lines.append(f"per correct answer gained ({where}): {used}")
    return lines


# --- counting work ---


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


def decode_bytes(decoding: Decoding, rollouts: Iterable[Rollout]) -> float:
    """Count the least bytes that decoding reads: the weights once per step with all
    slots in use, and the keys and values before each token.

    If slots share prompts, a prompt is read once per step for all attempts at its
    problem that still run. Prefill, logits, and what is written are not counted.
    """
    tokens, positions, prompts = 0.0, 0.0, {}
    for r in rollouts:
        prompt, length = len(r.prompt), len(r.tokens)
        tokens, positions = tokens + length, positions + length * (length - 1) / 2
        prompts.setdefault((r.problem, r.task.question, r.temperature), []).append((prompt, length))
    for attempts in prompts.values():
        times = max if decoding.shares_prompts else sum
        positions += attempts[0][0] * times(length for _, length in attempts)
    return decoding.weight_bytes * tokens / decoding.slots + decoding.position_bytes * positions


def learning(c, batch: Batch, *, updates: int, passes: int = 0) -> dict[str, float]:
    """Count tokens and FLOPs of `updates` updates from a batch, and of `passes` forward
    passes over it (see `Objective.passes`); those of a reference are `referring`.

    The backward pass costs two forward passes, or one if the base is frozen: its
    weights then have no gradient.
    """
    tokens, forward = float((batch.segment_BT > 0).sum()), reading(c, [batch])
    adapters = adapter_flops(c, tokens)
    update = (3 if c.lora is None else 2) * forward + 3 * adapters
    return {"tokens": tokens * updates, "flops": updates * update + passes * (forward + adapters)}


def referring(c, batch: Batch) -> float:
    """Count FLOPs of a pass of a reference policy over the rows that it reads."""
    hinted = batch.hinted
    if hinted is not None:
        scored_BU = np.zeros(hinted.tokens_BU.shape, np.float32)
        rows, columns = np.nonzero(batch.weight_BT)
        scored_BU[rows, hinted.column_BT[rows, columns]] = 1.0
        rows_ = {"position_BT": hinted.position_BU, "segment_BT": hinted.segment_BU, "weight_BT": scored_BU}
        batch = dataclasses.replace(batch, **rows_)
    return reading(c, [batch]) + adapter_flops(c, float((batch.segment_BT > 0).sum()))


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
