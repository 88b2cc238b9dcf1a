"""Sources: where batches come from. A paradigm is a source and an objective.

`Source(init, next)`: `init() -> state`, a small dict of plain numbers that goes into the checkpoint;
`next(state, params, key) -> (state, Drawn)`. The key stands for (seed, phase, step): a source that is given the same state,
params and key draws the same batch.

    corpus           windows of a token stream          the old paradigm
    demonstrations   worked solutions                   imitation
    rollouts         its own verified attempts          reinforcement learning
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxreason import batching
from jaxreason.environment import VERIFIER_ERROR, Environment
from jaxreason.objectives import Objective
from jaxreason.options import unknown
from jaxreason.rollout import Request, Roller, collect
from jaxreason.types import Batch, Rollout, Task


class Drawn(NamedTuple):
    """A batch of numpy arrays and what is to be said of it."""

    batch: Batch
    metrics: dict  # name -> (sum, count)
    rollouts: Sequence[Rollout] = ()


class Source(NamedTuple):
    """Where batches come from."""

    init: Callable[[], dict]
    next: Callable[..., tuple[dict, Drawn]]
    rows: int  # of every batch it draws
    samples: bool = False  # it draws from the params it is given


def corpus(batches: Sequence, objective: Objective, *, rows: int) -> Source:
    """Draw windows of a token stream: `batches[i]`, for any i, is an int array of shape [rows, T]."""

    def next(state, params, key):
        tokens_BT = np.asarray(batches[state["position"]], np.int32)
        metrics = {"train/tokens": (float(tokens_BT.size), 1.0)}
        return {"position": state["position"] + 1}, Drawn(batching.from_windows(tokens_BT, objective), metrics)

    return Source(lambda: {"position": 0}, next, rows)


def demonstrations(
    tasks: Sequence[Task],
    encode: Callable[[Task], tuple[list[int], list[bool]]],
    objective: Objective,
    *,
    rows: int,
    buckets: Sequence[int],
    pack: bool = False,
    microbatches: int = 1,
) -> Source:
    """Draw worked solutions in the order of `tasks`, an endless random-access sequence; `encode` gives (ids, trainable)."""

    def next(state, params, key):
        start = state["position"]
        pairs = [encode(tasks[start + i]) for i in range(rows)]
        batch = batching.from_demonstrations(pairs, objective, buckets=buckets, pack=pack, microbatches=microbatches)
        tokens = float(sum(min(len(ids), buckets[-1]) for ids, _ in pairs))
        metrics = {
            "train/tokens": (tokens, 1.0),
            "train/cut": (float(sum(len(ids) > buckets[-1] for ids, _ in pairs)), float(rows)),
            "train/packing_efficiency": (tokens, float(batching.computed_tokens(batch, microbatches))),
        }
        return {"position": start + rows}, Drawn(batch, metrics)

    return Source(lambda: {"position": 0}, next, rows)


REWARDS = ("verdict", "random")


def rollouts(
    tasks: Sequence[Task],
    prompt: Callable[[Task], list[int]],
    environment: Environment,
    roller: Roller,
    objective: Objective,
    *,
    problems: int,
    group: int,
    temperature: float,
    buckets: Sequence[int],
    reward: str = "verdict",
    pack: bool = False,
    microbatches: int = 1,
) -> Source:
    """Sample `group` attempts at each of `problems` tasks from the current params and have them judged.

    `reward="random"` is the control: each attempt earns 1 with the batch's own share of right answers, whatever it says.

    Raises:
      ValueError: an unknown reward.
    """

    if reward not in REWARDS:
        raise ValueError(unknown("reward", reward, REWARDS))

    def next(state, params, key):
        start = state["position"]
        wanted = [tasks[start + p] for p in range(problems)]
        prompts = [prompt(task) for task in wanted]
        requests = [Request(wanted[p], start + p, g, prompts[p]) for p in range(problems) for g in range(group)]
        drawn, spent = collect(roller, roller.sampler.prepare(params), requests, environment, key=key, temperature=temperature)
        if reward == "random":
            drawn = shuffle_rewards(drawn, key)
        batch = batching.from_rollouts(
            drawn, objective, group=group, buckets=buckets, limit=roller.max_tokens, pack=pack, microbatches=microbatches
        )
        tokens = float(sum(len(r.prompt) + len(r.tokens) for r in drawn))
        metrics = measure(drawn, group) | {
            "time/sample_s": (spent.sample_s, 1.0),
            "time/verify_s": (spent.verify_s, 1.0),
            "train/tokens": (tokens, 1.0),
            "train/packing_efficiency": (tokens, float(batching.computed_tokens(batch, microbatches))),
            "perf/sample_tokens_per_s": (float(spent.tokens), spent.sample_s),
            "rollout/slot_occupancy": (float(spent.tokens), float(spent.slot_steps)),
        }
        return {"position": start + problems}, Drawn(batch, metrics, drawn)

    return Source(lambda: {"position": 0}, next, problems * group, samples=True)


def shuffle_rewards(drawn: Sequence[Rollout], key) -> list[Rollout]:
    """Deal the batch's rewards out anew at random: as many are paid, but for nothing."""
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 2**32 - 1), len(drawn)))
    dealt = [drawn[i].verdict.reward for i in order]
    return [
        dataclasses.replace(r, verdict=dataclasses.replace(r.verdict, reward=reward))
        for r, reward in zip(drawn, dealt, strict=True)
    ]


def measure(drawn: Sequence[Rollout], group: int) -> dict:
    """What there is to say of rollouts, as (sum, count) pairs."""
    R = float(len(drawn))
    correct_PG = np.array([r.verdict.correct for r in drawn]).reshape(-1, group)
    reward_PG = np.array([r.verdict.reward for r in drawn]).reshape(-1, group)
    length_R = np.array([len(r.tokens) for r in drawn])
    return {
        "rollout/reward": (float(reward_PG.sum()), R),
        "rollout/correct": (float(correct_PG.sum()), R),
        "rollout/solved": (float(correct_PG.any(axis=1).sum()), float(len(correct_PG))),
        "rollout/informative_groups": (float((np.ptp(reward_PG, axis=1) > 0).sum()), float(len(reward_PG))),
        "rollout/length": (float(length_R.sum()), R),
        "rollout/cut": (float(sum(r.stop == "limit" for r in drawn)), R),
        "rollout/verifier_errors": (float(sum(r.verdict.reason.startswith(VERIFIER_ERROR) for r in drawn)), R),
    }
