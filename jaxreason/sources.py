"""Sources: where batches come from. A paradigm is a source and an objective.

`Source(init, next, save)`: `init() -> state`; `next(state, params, key) -> (state, Drawn)`; `save(state)` is what of a state goes
into the checkpoint, as JSON has it, and `next` goes on from that as well. The key stands for (seed, phase): a source given the
same state, params and key draws the same batch. Every process draws the same, whole batch; what costs, they share out.

    corpus           windows of a token stream          the old paradigm
    demonstrations   worked solutions                   imitation
    rollouts         its own verified attempts          reinforcement learning
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from jaxreason import batching, processes
from jaxreason.environment import Environment, count_failures
from jaxreason.objectives import EQUAL_REWARDS, Objective
from jaxreason.options import unknown
from jaxreason.rollout import Request, Roller, Share, Spent, collect_share, join_shares
from jaxreason.types import Batch, Rollout, Task, Verdict


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
    save: Callable[[dict], dict] = dict


class Sampled(NamedTuple):
    """All that was sampled for a batch."""

    start: int  # position of its first problem
    rollouts: list[Rollout]
    spent: Spent


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
        mine = range(jax.process_index(), rows, jax.process_count())
        shares = processes.gather([encode(tasks[start + i]) for i in mine])
        pairs = [shares[i % len(shares)][i // len(shares)] for i in range(rows)]
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
    share: int = 1,
    lag: int = 0,
    background: bool = False,
    steps: int | None = None,
    dynamic_sampling: int = 1,
) -> Source:
    """Sample `group` attempts at each of `problems` tasks a batch and have them judged, each process its share of the problems.

    With `lag` 0 a batch is of the params at hand. Else it was sampled when the params were `lag` updates younger (the first ones
    of a phase are all of its first params), in the `background` if the sampler has devices of its own: while the learner makes
    an update, the batch of the next one is under way. Nothing is sampled for a step after the last of `steps`.

    Attempts at a problem that all earn the same teach nothing to an objective that compares them. With `dynamic_sampling` of n
    further problems are drawn until `problems` of them teach something, or n times as many were drawn (Yu et al. 2025, arXiv
    2503.14476, sec. 3.2); the batch has the first that do, and if they are too few, the first others. How many problems a step
    draws is where the next begins, and all the state there is. Of several processes that sample in the background each does
    only the first round there: to know whether another is needed, they must exchange what they have, which is not for threads.

    In the batch `share` attempts at a problem stand behind one copy of its prompt (see `batching.from_rollouts`).

    `reward="random"` is the control: each attempt earns 1 with the batch's own share of right answers, whatever it says.

    Raises:
      ValueError: an unknown reward, a negative lag, dynamic sampling below 1 or for an objective that compares no attempts.
    """
    if reward not in REWARDS:
        raise ValueError(unknown("reward", reward, REWARDS))
    if lag < 0:
        raise ValueError(f"source.lag got {lag}; allowed: 0 or more updates")
    if dynamic_sampling < 1 or (dynamic_sampling > 1 and not objective.needs_group):
        raise ValueError(
            f"source.dynamic_sampling got {dynamic_sampling}; allowed: 1 (off), or more for an objective that compares the "
            "attempts at a problem, such as grpo, dr_grpo, dapo, rloo"
        )
    submit = ThreadPoolExecutor(1, "sampling").submit if background else at_once

    def requests_from(position: int, count: int) -> list[Request]:
        wanted = [tasks[position + p] for p in range(count)]
        prompts = [prompt(task) for task in wanted]
        return [Request(wanted[p], position + p, g, prompts[p]) for p in range(count) for g in range(group)]

    def begin(start: int, weights, key) -> Callable[[], Sampled]:
        """Begin to sample the batch whose problems start at a position; what is returned waits for all of it."""
        key = jax.random.fold_in(key, start // problems + 1)
        first = requests_from(start, problems)

        def collect_mine(requests) -> Share:
            return collect_share(roller, weights, requests, environment, key=key, temperature=temperature)

        def judged(share: Share, requests) -> tuple[list[Rollout], Spent]:
            rollouts, spent = join_shares(share, requests)
            return (shuffle_rewards(rollouts, key) if reward == "random" else rollouts), spent

        def finish(share: Share) -> Sampled:
            nonlocal weights
            rollouts, spent = judged(share, first)
            while count := missing(rollouts):
                requests = requests_from(start + len(rollouts) // group, count)
                more, cost = judged(collect_mine(requests), requests)
                rollouts, spent = rollouts + more, Spent(*map(operator.add, spent, cost))
            weights = None  # the next ones shall not stand beside them
            return Sampled(start, rollouts, spent)

        if background and jax.process_count() > 1:
            share = submit(collect_mine, first)
            return functools.cache(lambda: finish(share.result()))
        return submit(lambda: finish(collect_mine(first))).result

    def missing(rollouts: Sequence[Rollout]) -> int:
        """How many further problems to draw: as many as it takes at the rate so far, but no more than a batch at a time."""
        drawn, taught = len(rollouts) // group, int(teaches(rollouts, group).sum())
        wanted = math.ceil((problems - taught) * drawn / max(taught, 1))
        return max(0, min(wanted, problems, dynamic_sampling * problems - drawn))

    def kept(rollouts: Sequence[Rollout]) -> list[Rollout]:
        """What the batch is made of, in the order of the problems."""
        useful_first = np.argsort(~teaches(rollouts, group), kind="stable")[:problems]
        return [r for p in sorted(useful_first) for r in rollouts[p * group : (p + 1) * group]]

    def saved(packed: dict) -> Callable[[], Sampled]:
        requests = requests_from(packed["start"], len(packed["lengths"]) // group)
        sampled = Sampled(packed["start"], *unpack(packed, requests))
        return lambda: sampled

    def next(state, params, key):
        ahead = [saved(batch) if isinstance(batch, dict) else batch for batch in state.get("ahead", ())]
        begun, weights = state.get("begun", 0), None
        while len(ahead) <= lag and (not ahead or steps is None or begun < steps):
            # Where a batch begins is known when the one before it has ended; then nothing runs on the sampler's devices, either.
            start = end_of(ahead[-1]()) if ahead else state["position"]
            weights = roller.sampler.prepare(params) if weights is None else weights
            ahead.append(begin(start, weights, key))
            begun += 1
        sampled = ahead.pop(0)()
        rollouts, spent = sampled.rollouts, sampled.spent
        taught = kept(rollouts)
        batch = batching.from_rollouts(
            taught,
            objective,
            group=group,
            buckets=buckets,
            limit=roller.max_tokens,
            pack=pack,
            microbatches=microbatches,
            share=share,
        )
        tokens = float((batch.segment_BT > 0).sum())
        metrics = measure(rollouts, group) | {
            "rollout/oversampling": (float(len(rollouts)), float(len(taught))),
            "time/sample_s": (spent.sample_s, 1.0),
            "time/verify_s": (spent.verify_s, 1.0),
            "train/tokens": (tokens, 1.0),
            "train/packing_efficiency": (
                float((batch.segment_BT > 0).sum()),
                float(batching.computed_tokens(batch, microbatches)),
            ),
            "perf/sample_tokens_per_s": (float(spent.tokens), spent.sample_s),
            "rollout/slot_occupancy": (float(spent.tokens), float(spent.slot_steps)),
        }
        state = {"position": end_of(sampled)} | ({"begun": begun, "ahead": ahead} if lag else {})
        return state, Drawn(batch, metrics, rollouts)

    def end_of(sampled: Sampled) -> int:
        return sampled.start + len(sampled.rollouts) // group

    def save(state):
        return state | ({"ahead": [pack_rollouts(*batch()) for batch in state["ahead"]]} if lag else {})

    init = {"position": 0} | ({"begun": 0, "ahead": []} if lag else {})
    return Source(lambda: dict(init), next, problems * group // share, samples=True, save=save)


def teaches(rollouts: Sequence[Rollout], group: int) -> np.ndarray:
    """Whether the attempts of each group earned different rewards, bool [P]."""
    reward_PG = np.array([r.verdict.reward for r in rollouts]).reshape(-1, group)
    return np.ptp(reward_PG, axis=1) >= EQUAL_REWARDS


def at_once(function: Callable, *args, **kwargs) -> Future:
    """Call a function now; return its result as an executor would."""
    future: Future = Future()
    future.set_result(function(*args, **kwargs))
    return future


# What rollouts have for each token, and its dtype.
PER_TOKEN = {"tokens": np.int32, "logp": np.float32, "sampled": np.bool_, "untempered_logp": np.float32}


def pack_rollouts(start: int, rollouts: Sequence[Rollout], spent: Spent) -> dict:
    """Rollouts as JSON has them, bit for bit, without what their requests have: arrays as base64 of all their bytes in a row."""

    def text_of(name: str, dtype) -> str | None:
        arrays = [getattr(r, name) for r in rollouts]
        if arrays[0] is None:
            return None
        return base64.b64encode(np.concatenate(arrays).astype(dtype).tobytes()).decode()

    return {
        "start": start,
        "lengths": [len(r.tokens) for r in rollouts],
        **{name: text_of(name, dtype) for name, dtype in PER_TOKEN.items()},
        "stop": [r.stop for r in rollouts],
        "text": [r.text for r in rollouts],
        "verdict": [dataclasses.astuple(r.verdict) for r in rollouts],
        "temperature": [r.temperature for r in rollouts],
        "spent": list(spent),
    }


def unpack(packed: dict, requests: Sequence[Request]) -> tuple[list[Rollout], Spent]:
    """What `pack_rollouts` has packed."""
    ends = np.cumsum(packed["lengths"])[:-1]
    arrays = {
        name: [None] * len(requests)
        if packed[name] is None
        else np.split(np.frombuffer(base64.b64decode(packed[name]), dtype), ends)
        for name, dtype in PER_TOKEN.items()
    }
    rollouts = [
        Rollout(
            task=r.task,
            problem=r.problem,
            attempt=r.attempt,
            prompt=np.asarray(r.prompt, np.int32),
            **{name: arrays[name][i] for name in PER_TOKEN},
            stop=packed["stop"][i],
            text=packed["text"][i],
            verdict=Verdict(*packed["verdict"][i]),
            temperature=packed["temperature"][i],
        )
        for i, r in enumerate(requests)
    ]
    return rollouts, Spent(*packed["spent"])


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
        "rollout/informative_groups": (float(teaches(drawn, group).sum()), float(len(reward_PG))),
        "rollout/length": (float(length_R.sum()), R),
        "rollout/cut": (float(sum(r.stop == "limit" for r in drawn)), R),
        **{f"rollout/{name}": (float(n), R) for name, n in count_failures(r.verdict for r in drawn).items()},
    }
