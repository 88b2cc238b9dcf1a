"""Sources: streams of batches. A paradigm is a source and an objective.

`Source(init, next, save)`: `init() -> state`; `next(state, params, key) -> (state,
NextBatch)`; `save(state)` is the part of a state that the checkpoint stores, as JSON,
and `next` also accepts a saved state. The key is derived from (seed, phase): equal
state, params and key give an equal batch. Every process draws the same, whole batch;
the processes divide expensive work among them.

    corpus           windows of a token stream          pretraining
    demonstrations   worked solutions                   imitation
    rollouts         its own verified attempts          reinforcement learning
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from jaxreason import batching
from jaxreason.environment import Environment, count_failures, measured
from jaxreason.objectives import EQUAL_REWARDS, Objective
from jaxreason.options import unknown_name_message
from jaxreason.rollout import Completer, LocalGroups, Request, SamplingStats, collect_local, gather_groups
from jaxreason.runtime import processes
from jaxreason.types import Batch, Group, Prompted, Rollout, Task, Verdict


class NextBatch(NamedTuple):
    """A batch of numpy arrays with its metrics and rollouts."""

    batch: Batch
    metrics: dict  # name -> (sum, count)
    rollouts: Sequence[Rollout] = ()
    advantages: Sequence[float | None] = ()  # the objective's, of each rollout; None for one that is not in the batch


class Source(NamedTuple):
    """Stream of batches."""

    init: Callable[[], dict]
    next: Callable[..., tuple[dict, NextBatch]]
    rows: int  # rows per batch
    samples: bool = False  # whether it samples from the params that it is given
    save: Callable[[dict], dict] = dict
    lag: int = 0  # updates between the params that sample and those that learn


def corpus(batches: Sequence, objective: Objective, *, rows: int) -> Source:
    """Draw windows of a token stream.

    `batches[i]`, for any i, is an int array of shape [rows, T].
    """

    def next(state, params, key):
        tokens_BT = np.asarray(batches[state["position"]], np.int32)
        metrics = {"train/tokens": (float(tokens_BT.size), 1.0)}
        return {"position": state["position"] + 1}, NextBatch(batching.from_windows(tokens_BT, objective), metrics)

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
    """Draw worked solutions in the order of `tasks`, an endless random-access sequence.

    `encode` returns (ids, trainable).
    """

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
        return {"position": start + rows}, NextBatch(batch, metrics)

    return Source(lambda: {"position": 0}, next, rows)


REWARDS = ("verdict", "random", "format", "majority")


class SampledGroups(NamedTuple):
    """Groups that were sampled for a batch."""

    start: int  # position of the first problem
    groups: list[Group]
    spent: SamplingStats

    @property
    def end(self) -> int:
        """The position at which the next batch starts."""
        return self.start + len(self.groups)


class Sampling(NamedTuple):
    """Fixed arguments of sampling: tasks, environment, completer and sizes."""

    tasks: Sequence[Prompted]
    environment: Environment
    completer: Completer
    problems: int  # problems per batch
    group: int  # attempts per problem
    temperature: float
    reward: str  # one of `REWARDS`


class Draw(NamedTuple):
    """The two parts of sampling a batch's groups.

    Threads must not communicate with other processes, so `collect` may run in a thread
    and `finish` may not.
    """

    collect: Callable[..., LocalGroups]  # (wanted, weights, key): samples this process's groups; may run in a thread
    finish: Callable[..., SampledGroups]  # (local, wanted, weights, key): gathers the groups; all processes call it


def rollouts(
    tasks: Sequence[Prompted],
    environment: Environment,
    completer: Completer,
    objective: Objective,
    *,
    problems: int,
    group: int,
    temperature: float,
    buckets: Sequence[int],
    reward: str = "verdict",
    pack: bool = False,
    microbatches: int = 1,
    rollouts_per_prompt: int = 1,
    lag: int = 0,
    background: bool = False,
    steps: int | None = None,
    dynamic_sampling: int = 1,
) -> Source:
    """Sample and judge `group` attempts at each of `problems` tasks per batch.

    The processes divide the problems. The state is the position of the next problem.
    `lag`, `background` and `steps` are those of `with_lag`; `dynamic_sampling` is
    `most` of `with_dynamic_sampling`. In the batch `rollouts_per_prompt` attempts at a
    problem follow one copy of its prompt (see `batching.from_groups`).

    `reward` says what is paid: the verdict's reward or, as controls, that reward given
    to another attempt ("random", see `shuffle_rewards`) or 1 for any answer that the
    verifier can read ("format"); "majority" needs no answer key (see `pay_majority`).

    Raises:
      ValueError: an unknown reward, a negative lag, or dynamic sampling that is below 1
        or for an objective that does not compare attempts.
    """
    if reward not in REWARDS:
        raise ValueError(unknown_name_message("reward", reward, REWARDS))
    if lag < 0:
        raise ValueError(f"source.lag got {lag}; allowed: 0 or more updates")
    if dynamic_sampling < 1 or (dynamic_sampling > 1 and not objective.needs_group):
        raise ValueError(
            f"source.dynamic_sampling got {dynamic_sampling}; allowed: 1 (off), or more for an objective that compares the "
            "attempts at a problem, such as grpo, dr_grpo, dapo, rloo"
        )
    sampling = Sampling(tasks, environment, completer, problems, group, temperature, reward)
    draw = with_dynamic_sampling(one_round(sampling), sampling, dynamic_sampling)

    @functools.partial(jax.profiler.annotate_function, name="batch")
    def drawn(sampled: SampledGroups) -> NextBatch:
        """Make the batch and the metrics of sampled groups."""
        learned = most_mixed(sampled.groups, problems)
        batch = batching.from_groups(
            learned,
            objective,
            buckets=buckets,
            limit=completer.max_tokens,
            pack=pack,
            microbatches=microbatches,
            rollouts_per_prompt=rollouts_per_prompt,
        )
        tokens, spent = float((batch.segment_BT > 0).sum()), sampled.spent
        metrics = measure(sampled.groups) | {
            "rollout/oversampling": (float(len(sampled.groups) * group), float(len(learned) * group)),
            "time/sample_s": (spent.sample_s, 1.0),
            "time/verify_s": (spent.verify_s, 1.0),
            **{name: (value, 1.0) for name, value in latency(spent.verdict_s).items()},
            "train/tokens": (tokens, 1.0),
            "train/packing_efficiency": (tokens, float(batching.computed_tokens(batch, microbatches))),
            "perf/sample_tokens_per_s": (float(spent.tokens), spent.sample_s),
            "perf/slot_occupancy": (float(spent.tokens), float(spent.slot_steps)),
        }
        found = dict(zip(map(id, (r for group in learned for r in group.attempts)), batching.advantages(batch), strict=True))
        sampled_R = [r for group in sampled.groups for r in group.attempts]
        return NextBatch(batch, metrics, sampled_R, [found.get(id(r)) for r in sampled_R])

    def next(state, params, key):
        start, weights = state["position"], completer.sampler.prepare(params)
        sampled = begin(draw, at_once, wanted_groups(sampling, start, problems), weights, key_of(sampling, start, key))()
        return {"position": sampled.end}, drawn(sampled)

    source = Source(lambda: {"position": 0}, next, problems * group // rollouts_per_prompt, samples=True)
    return with_lag(source, draw, drawn, sampling, lag, background=background, steps=steps) if lag else source


def one_round(sampling: Sampling) -> Draw:
    """Make a `Draw` that samples only the wanted groups."""

    @functools.partial(jax.profiler.annotate_function, name="sample")
    def collect(wanted, weights, key):
        keywords = {"key": key, "temperature": sampling.temperature}
        return collect_local(sampling.completer, weights, wanted, sampling.environment, **keywords)

    def finish(local, wanted, weights, key):
        groups, spent = gather_groups(local, wanted)
        return SampledGroups(wanted[0][0].problem, paid(groups, sampling.reward, key), spent)

    return Draw(collect, finish)


def wanted_groups(sampling: Sampling, start: int, count: int) -> list[list[Request]]:
    """Return the requests for `count` problems from a position on."""
    tasks = [sampling.tasks[start + p] for p in range(count)]
    return [[Request(t.task, start + p, g, t.prompt) for g in range(sampling.group)] for p, t in enumerate(tasks)]


def key_of(sampling: Sampling, start: int, key):
    """Return the random key of the batch whose problems start at a position."""
    return jax.random.fold_in(key, start // sampling.problems + 1)


def with_dynamic_sampling(draw: Draw, sampling: Sampling, most: int) -> Draw:
    """Draw further problems until enough have mixed rewards, or `most` times as many.

    Attempts at a problem that all earn the same teach nothing to an objective that
    compares them (Yu et al. 2025, arXiv 2503.14476, sec. 3.2). The batch has the first
    problems with mixed rewards and, if they are too few, the first other ones (see
    `most_mixed`). The number of problems drawn decides where the next step begins; that
    position is the whole state. Further rounds are part of `finish`, because the need
    for another round depends on the groups of all processes.
    """

    def finish(local, wanted, weights, key):
        sampled = draw.finish(local, wanted, weights, key)
        while count := missing(sampled.groups, sampling.problems, most):
            wanted = wanted_groups(sampling, sampled.end, count)
            more = draw.finish(draw.collect(wanted, weights, key), wanted, weights, key)
            spent = SamplingStats(*map(operator.add, sampled.spent, more.spent))  # lists are joined
            sampled = SampledGroups(sampled.start, sampled.groups + more.groups, spent)
        return sampled

    return Draw(draw.collect, finish) if most > 1 else draw


def missing(groups: Sequence[Group], problems: int, most: int) -> int:
    """Estimate how many further problems to draw, at most a batch at a time.

    The estimate assumes the rate of mixed rewards so far.
    """
    drawn, mixed = len(groups), sum(map(has_mixed_rewards, groups))
    wanted = math.ceil((problems - mixed) * drawn / max(mixed, 1))
    return max(0, min(wanted, problems, most * problems - drawn))


def most_mixed(groups: Sequence[Group], problems: int) -> list[Group]:
    """Choose `problems` groups: the first with mixed rewards, then the first others.

    They keep their order.
    """
    mixed_first = sorted(range(len(groups)), key=lambda p: not has_mixed_rewards(groups[p]))
    return [groups[p] for p in sorted(mixed_first[:problems])]


def begin(draw: Draw, submit: Callable, wanted: list[list[Request]], weights, key) -> Callable[[], SampledGroups]:
    """Begin to sample a batch with `submit`, such as that of an executor.

    Return a function that waits for the sampled groups.
    """
    if submit is at_once or jax.process_count() == 1:
        return submit(lambda: draw.finish(draw.collect(wanted, weights, key), wanted, weights, key)).result
    local, held = submit(draw.collect, wanted, weights, key), [weights]
    # Release the weights as soon as possible: those of the next batch need the memory.
    return functools.cache(lambda: draw.finish(local.result(), wanted, held.pop(), key))


def with_lag(
    source: Source,
    draw: Draw,
    drawn: Callable[[SampledGroups], NextBatch],
    sampling: Sampling,
    lag: int,
    *,
    background: bool = False,
    steps: int | None = None,
) -> Source:
    """Sample a source's batches with the params of `lag` updates ago.

    The first batches of a phase use its first params. With `background`, which needs
    devices of its own for the sampler, the batch of the next step is sampled while the
    learner makes an update. With several processes only the first round of a batch runs
    in the background: see `Draw`. Nothing is sampled for steps after the last of
    `steps`. The state includes the batches that were sampled ahead.
    """
    submit = ThreadPoolExecutor(1, "sampling").submit if background else at_once

    def saved(packed: dict) -> Callable[[], SampledGroups]:
        sampled = unpack(packed, wanted_groups(sampling, packed["start"], len(packed["lengths"]) // sampling.group))
        return lambda: sampled

    def next(state, params, key):
        ahead = [saved(batch) if isinstance(batch, dict) else batch for batch in state.get("ahead", ())]
        begun, weights = state.get("begun", 0), None
        while len(ahead) <= lag and (not ahead or steps is None or begun < steps):
            # A batch's first position is known when the batch before it is sampled, so
            # this waits until the sampler's devices are idle.
            start = ahead[-1]().end if ahead else state["position"]
            weights = sampling.completer.sampler.prepare(params) if weights is None else weights
            wanted = wanted_groups(sampling, start, sampling.problems)
            ahead.append(begin(draw, submit, wanted, weights, key_of(sampling, start, key)))
            begun += 1
        sampled = ahead.pop(0)()
        return {"position": sampled.end, "begun": begun, "ahead": ahead}, drawn(sampled)

    def save(state):
        return state | {"ahead": [pack_groups(batch()) for batch in state["ahead"]]}

    return source._replace(init=lambda: {"position": 0, "begun": 0, "ahead": []}, next=next, save=save, lag=lag)


def has_mixed_rewards(group: Group) -> bool:
    """Tell whether the attempts of a group earned different rewards."""
    return np.ptp([r.verdict.reward for r in group.attempts]) >= EQUAL_REWARDS


def at_once(function: Callable, *args, **kwargs) -> Future:
    """Call a function now; return its result in a future, as an executor would."""
    future: Future = Future()
    future.set_result(function(*args, **kwargs))
    return future


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
            verdict=Verdict(*packed["verdict"][i]),
            temperature=packed["temperature"][i],
            author=packed["author"][i] if "author" in packed else "",  # checkpoints of earlier versions lack it
        )

    groups = [Group(tuple(rollout(next(number), request) for request in requests)) for requests in wanted]
    return SampledGroups(packed["start"], groups, SamplingStats(*packed["spent"]))


def paid(groups: Sequence[Group], reward: str, key) -> list[Group]:
    """Replace the rewards of verdicts by those that a source pays, one of `REWARDS`."""
    if reward == "verdict":
        return list(groups)
    if reward == "random":
        return shuffle_rewards(groups, key)
    if reward == "majority":
        return [pay(group, pay_majority(group)) for group in groups]
    return [pay(group, [float(r.verdict.parsed is not None) for r in group.attempts]) for group in groups]


def pay(group: Group, reward_G: Sequence[float]) -> Group:
    """Return a group with other rewards. Its verdicts still say what is correct."""
    pairs = zip(group.attempts, reward_G, strict=True)
    return Group(tuple(dataclasses.replace(r, verdict=dataclasses.replace(r.verdict, reward=x)) for r, x in pairs))


def pay_majority(group: Group) -> list[float]:
    """Return 1 for attempts whose answer is the most frequent one of their group, and 0
    for others: test-time reinforcement learning (Zuo et al. 2025, arXiv 2504.16084).

    Answers are those that the verifier read. Of answers that are equally frequent the
    first one counts. Without any answer nobody is paid.
    """
    answers = [r.verdict.parsed for r in group.attempts]
    votes = Counter(answer for answer in answers if answer is not None)
    elected = votes.most_common(1)[0][0] if votes else None
    return [float(elected is not None and answer == elected) for answer in answers]


def shuffle_rewards(groups: Sequence[Group], key) -> list[Group]:
    """Shuffle the rewards over the attempts of all groups.

    As many attempts are rewarded as before, but at random.
    """
    reward_R = [r.verdict.reward for group in groups for r in group.attempts]
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 2**32 - 1), len(reward_R)))
    dealt = iter([reward_R[i] for i in order])
    return [pay(group, [next(dealt) for _ in group.attempts]) for group in groups]


def latency(verdict_s: Sequence[float]) -> dict[str, float]:
    """Return quantiles of the time per verdict, in ms; a verdict that was given up has
    none.
    """
    if not len(verdict_s):
        return {}
    p50_s, p99_s = np.quantile(verdict_s, (0.5, 0.99))
    return {"time/verify_p50_ms": 1e3 * float(p50_s), "time/verify_p99_ms": 1e3 * float(p99_s)}


def measure(groups: Sequence[Group]) -> dict:
    """Measure groups; return (sum, count) pairs."""
    rollouts = [r for group in groups for r in group.attempts]
    R, P = float(len(rollouts)), float(len(groups))
    return {
        "rollout/reward": (float(np.sum([r.verdict.reward for r in rollouts])), R),
        "rollout/correct": (float(sum(r.verdict.correct for r in rollouts)), R),
        "rollout/solved": (float(sum(any(r.verdict.correct for r in group.attempts) for group in groups)), P),
        "rollout/informative_groups": (float(sum(map(has_mixed_rewards, groups))), P),
        "rollout/length": (float(sum(len(r.tokens) for r in rollouts)), R),
        "rollout/cut": (float(sum(r.stop == "limit" for r in rollouts)), R),
        **{f"rollout/{name}": (float(n), R) for name, n in count_failures(r.verdict for r in rollouts).items()},
        **{f"rollout/{name}": pair for name, pair in measured(r.verdict for r in rollouts).items()},
    }
