"""Sampling the groups of a batch, by all processes together."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax

from jaxreason.environment import Environment
from jaxreason.objectives.credit import are_mixed
from jaxreason.rollout import Completer, LocalGroups, Request, SamplingStats, collect_local, gather_groups
from jaxreason.sources.curriculum import Picked, SuccessRate, measure, pick
from jaxreason.sources.keeping import Keep
from jaxreason.sources.replay import Kept, draw_kept, keep
from jaxreason.sources.rewards import paid
from jaxreason.types import Group, Prompted


class Sampling(NamedTuple):
    """Fixed arguments of sampling: tasks, environment, completer and sizes."""

    tasks: Sequence[Prompted]
    environment: Environment
    completer: Completer
    problems: int  # problems per batch
    group: int  # attempts per problem
    temperature: float
    reward: str  # one of `REWARDS`
    same: Callable[[str, str], bool] | None = None  # whether two answers are equivalent, for votes
    measures: tuple[str, ...] = ()  # those that the objective takes in the place of the reward
    credit: str = "rollout"  # one of `CREDITS`
    replay: int = 0  # problems per batch that come from earlier batches
    replay_age: int = 1  # batches; older groups are not replayed
    curriculum: SuccessRate | None = None
    keep: Keep | None = None  # attempts to learn from; None: all


class Cursor(NamedTuple):
    """How far sampling is in the stream of tasks, and what it remembers of earlier
    batches.
    """

    position: int  # of the next problem
    batch: int = 0  # number of the next batch
    kept: tuple[Kept, ...] = ()  # groups that may be replayed
    measured: Mapping[str, int] = {}  # tasks to pass over: see `curriculum.measure`


class Wanted(NamedTuple):
    """Contents of a batch: the problems to sample, and groups to replay."""

    cursor: Cursor
    requests: list[list[Request]]  # of each group
    end: int  # position after the last problem that was looked at
    filled: int = 0  # problems that should be passed over, but there are not enough others
    replayed: tuple[Kept, ...] = ()


class SampledGroups(NamedTuple):
    """Groups that were sampled for a batch, and those that are replayed in it."""

    batch: int  # its number
    start: int  # position in the stream at which its problems begin
    end: int  # position at which the next batch starts
    groups: list[Group]
    spent: SamplingStats
    filled: int = 0  # see `Wanted`
    replayed: tuple[Kept, ...] = ()


class Draw(NamedTuple):
    """The two parts of sampling a batch's groups.

    Threads must not communicate with other processes, so `collect` may run in a thread
    and `finish` may not.
    """

    collect: Callable[..., LocalGroups]  # (wanted, weights, key): samples this process's groups; may run in a thread
    finish: Callable[..., SampledGroups]  # (local, wanted, weights, key): gathers the groups; all processes call it


def one_round(sampling: Sampling) -> Draw:
    """Make a `Draw` that samples only the wanted groups."""

    @functools.partial(jax.profiler.annotate_function, name="sample")
    def collect(wanted, weights, key):
        keywords = {"key": key, "temperature": sampling.temperature}
        return collect_local(sampling.completer, weights, wanted.requests, sampling.environment, **keywords)

    def finish(local, wanted, weights, key):
        groups, spent = gather_groups(local, wanted.requests)
        groups = paid(groups, sampling.reward, key, sampling.same)
        cursor = wanted.cursor
        return SampledGroups(cursor.batch, cursor.position, wanted.end, groups, spent, wanted.filled, wanted.replayed)

    return Draw(collect, finish)


def next_wanted(sampling: Sampling, cursor: Cursor, key) -> Wanted:
    """Decide what the next batch consists of. `key` is that of the phase."""
    replayed = draw_kept(cursor.kept, sampling.replay, cursor.batch, key) if sampling.replay else ()
    return new_problems(sampling, cursor, sampling.problems - len(replayed))._replace(replayed=replayed)


def new_problems(sampling: Sampling, cursor: Cursor, count: int) -> Wanted:
    """Return the requests for the next `count` problems of the stream."""
    start = cursor.position
    picked = Picked(list(range(start, start + count)), start + count)
    if sampling.curriculum is not None:
        picked = pick(sampling.curriculum, cursor.measured, sampling.tasks, start, count)
    return Wanted(cursor, requests_at(sampling, picked.positions), picked.end, picked.filled)


def requests_at(sampling: Sampling, positions: Sequence[int]) -> list[list[Request]]:
    """Return the requests for the problems at some positions of the stream."""
    tasks = [sampling.tasks[p] for p in positions]
    return [[Request(t.task, p, g, t.prompt) for g in range(sampling.group)] for p, t in zip(positions, tasks, strict=True)]


def advance(sampling: Sampling, cursor: Cursor, sampled: SampledGroups) -> Cursor:
    """Return the cursor of the batch after one that was sampled."""
    kept, measured = cursor.kept, cursor.measured
    if sampling.replay:
        mixed = [group for group in sampled.groups if are_mixed(group, sampling.measures, sampling.credit)]
        kept = keep(kept, mixed, cursor.batch, sampling.replay_age)
    if sampling.curriculum is not None:
        measured = measure(sampling.curriculum, measured, sampled.groups, sampling.reward)
    return Cursor(sampled.end, cursor.batch + 1, kept, measured)


def key_of(sampling: Sampling, wanted: Wanted, key):
    """Return the random key of a batch. Each attempt adds the position of its problem,
    which no other batch has.
    """
    return jax.random.fold_in(key, wanted.cursor.position // sampling.problems + 1)


def with_dynamic_sampling(draw: Draw, sampling: Sampling, most: int) -> Draw:
    """Draw further problems until enough have mixed rewards, or `most` times as many.

    Attempts at a problem that all earn the same teach nothing to an objective that
    compares them (Yu et al. 2025, arXiv 2503.14476, sec. 3.2). The batch has the first
    problems with mixed rewards and, if they are too few, the first other ones (see
    `most_mixed`). The number of problems drawn decides where the next step begins.
    Further rounds are part of `finish`, because the need for another round depends on
    the groups of all processes.
    """

    def finish(local, wanted, weights, key):
        sampled, problems = draw.finish(local, wanted, weights, key), len(wanted.requests)
        while count := missing(sampled.groups, problems, most, sampling.measures, sampling.credit):
            further = new_problems(sampling, wanted.cursor._replace(position=sampled.end), count)
            more = draw.finish(draw.collect(further, weights, key), further, weights, key)
            sampled = sampled._replace(
                end=more.end,
                groups=sampled.groups + more.groups,
                spent=SamplingStats(*map(operator.add, sampled.spent, more.spent)),  # lists are joined
                filled=sampled.filled + more.filled,
            )
        return sampled

    return Draw(draw.collect, finish) if most > 1 else draw


def missing(groups: Sequence[Group], problems: int, most: int, measures: Sequence[str] = (), credit: str = "rollout") -> int:
    """Estimate how many further problems to draw, at most a batch at a time.

    The estimate assumes the rate of mixed rewards so far.
    """
    drawn, mixed = len(groups), sum(are_mixed(group, measures, credit) for group in groups)
    wanted = math.ceil((problems - mixed) * drawn / max(mixed, 1))
    return max(0, min(wanted, problems, most * problems - drawn))


def most_mixed(groups: Sequence[Group], problems: int, measures: Sequence[str] = (), credit: str = "rollout") -> list[Group]:
    """Choose `problems` groups: the first with mixed rewards, then the first others.

    They keep their order.
    """
    mixed_first = sorted(range(len(groups)), key=lambda p: not are_mixed(groups[p], measures, credit))
    return [groups[p] for p in sorted(mixed_first[:problems])]


def begin(draw: Draw, submit: Callable, wanted: Wanted, weights, key) -> Callable[[], SampledGroups]:
    """Begin to sample a batch with `submit`, such as that of an executor.

    Return a function that waits for the sampled groups.
    """
    if submit is at_once or jax.process_count() == 1:
        return submit(lambda: draw.finish(draw.collect(wanted, weights, key), wanted, weights, key)).result
    local, held = submit(draw.collect, wanted, weights, key), [weights]
    # Release the weights as soon as possible: those of the next batch need the memory.
    return functools.cache(lambda: draw.finish(local.result(), wanted, held.pop(), key))


def at_once(function: Callable, *args, **kwargs) -> Future:
    """Call a function now; return its result in a future, as an executor would."""
    future: Future = Future()
    future.set_result(function(*args, **kwargs))
    return future
