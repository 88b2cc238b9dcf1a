"""Sampling the groups of a batch, by all processes together."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax

from jaxreason.environment import Environment
from jaxreason.objectives.credit import are_mixed
from jaxreason.rollout import Completer, LocalGroups, Request, SamplingStats, collect_local, gather_groups
from jaxreason.sources.rewards import paid
from jaxreason.types import Group, Prompted


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
    measures: tuple[str, ...] = ()  # those that the objective takes in the place of the reward
    credit: str = "rollout"  # one of `CREDITS`


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
        while count := missing(sampled.groups, sampling.problems, most, sampling.measures, sampling.credit):
            wanted = wanted_groups(sampling, sampled.end, count)
            more = draw.finish(draw.collect(wanted, weights, key), wanted, weights, key)
            spent = SamplingStats(*map(operator.add, sampled.spent, more.spent))  # lists are joined
            sampled = SampledGroups(sampled.start, sampled.groups + more.groups, spent)
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


def begin(draw: Draw, submit: Callable, wanted: list[list[Request]], weights, key) -> Callable[[], SampledGroups]:
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
