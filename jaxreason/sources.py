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
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import jax
import numpy as np

from jaxreason import batching, processes
from jaxreason.environment import VERIFIER_ERROR, Environment
from jaxreason.objectives import Objective
from jaxreason.options import unknown
from jaxreason.rollout import Request, Roller, Spent, collect_share, join_shares
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


class Begun(NamedTuple):
    """A batch of rollouts that is being sampled."""

    requests: list[Request]
    share: Future  # this process's


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
    lag: int = 0,
    background: bool = False,
    steps: int | None = None,
) -> Source:
    """Sample `group` attempts at each of `problems` tasks a batch and have them judged, each process its share of the problems.

    With `lag` 0 a batch is of the params at hand. Else it was sampled when the params were `lag` updates younger (the first ones
    of a phase are all of its first params), in the `background` if the sampler has devices of its own: while the learner makes
    an update, the batch of the next one is under way. Nothing is sampled for a step after the last of `steps`.

    `reward="random"` is the control: each attempt earns 1 with the batch's own share of right answers, whatever it says.

    Raises:
      ValueError: an unknown reward, a negative lag.
    """
    if reward not in REWARDS:
        raise ValueError(unknown("reward", reward, REWARDS))
    if lag < 0:
        raise ValueError(f"source.lag got {lag}; allowed: 0 or more updates")
    submit = ThreadPoolExecutor(1, "sampling").submit if background else at_once

    def requests_from(position: int) -> list[Request]:
        wanted = [tasks[position + p] for p in range(problems)]
        prompts = [prompt(task) for task in wanted]
        return [Request(wanted[p], position + p, g, prompts[p]) for p in range(problems) for g in range(group)]

    def step_key(position: int, key):
        return jax.random.fold_in(key, position // problems + 1)

    def begin(position: int, weights, key) -> Begun:
        """Begin to sample the batch that starts at a position."""
        requests, how = requests_from(position), {"key": step_key(position, key), "temperature": temperature}
        return Begun(requests, submit(collect_share, roller, weights, requests, environment, **how))

    def finish(position: int, batch: Begun | dict) -> tuple[list[Rollout], Spent]:
        """Take a batch that was begun, or saved."""
        if isinstance(batch, dict):
            return unpack(batch, requests_from(position))
        return join_shares(batch.share.result(), batch.requests)

    def next(state, params, key):
        position, ahead = state["position"], list(state.get("ahead", ()))
        end = math.inf if steps is None else steps * problems
        wanted = [at for at in range(position, position + (lag + 1) * problems, problems) if at < end or at == position]
        if len(ahead) < len(wanted):
            wait([batch.share for batch in ahead if isinstance(batch, Begun)])  # nothing else runs on the sampler's devices
            weights = roller.sampler.prepare(params)
            ahead += [begin(at, weights, key) for at in wanted[len(ahead) :]]
        drawn, spent = finish(position, ahead.pop(0))
        if reward == "random":
            drawn = shuffle_rewards(drawn, step_key(position, key))
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
        return {"position": position + problems} | ({"ahead": ahead} if lag else {}), Drawn(batch, metrics, drawn)

    def save(state):
        ahead = enumerate(state.get("ahead", ()))
        packed = [pack_rollouts(*finish(state["position"] + i * problems, batch)) for i, batch in ahead]
        return {"position": state["position"]} | ({"ahead": packed} if lag else {})

    init = {"position": 0} | ({"ahead": []} if lag else {})
    return Source(lambda: dict(init), next, problems * group, samples=True, save=save)


def at_once(function: Callable, *args, **kwargs) -> Future:
    """Call a function now; return its result as an executor would."""
    future: Future = Future()
    future.set_result(function(*args, **kwargs))
    return future


# What rollouts have for each token, and its dtype.
PER_TOKEN = {"tokens": np.int32, "logp": np.float32, "sampled": np.bool_, "untempered_logp": np.float32}


def pack_rollouts(rollouts: Sequence[Rollout], spent: Spent) -> dict:
    """Rollouts as JSON has them, bit for bit, without what their requests have: arrays as base64 of all their bytes in a row."""

    def text_of(name: str, dtype) -> str | None:
        arrays = [getattr(r, name) for r in rollouts]
        if arrays[0] is None:
            return None
        return base64.b64encode(np.concatenate(arrays).astype(dtype).tobytes()).decode()

    return {
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
        "rollout/informative_groups": (float((np.ptp(reward_PG, axis=1) > 0).sum()), float(len(reward_PG))),
        "rollout/length": (float(length_R.sum()), R),
        "rollout/cut": (float(sum(r.stop == "limit" for r in drawn)), R),
        "rollout/verifier_errors": (float(sum(r.verdict.reason.startswith(VERIFIER_ERROR) for r in drawn)), R),
    }
