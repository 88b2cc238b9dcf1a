"""Batches of the model's own verified attempts, sampled with the newest params or with
those of some updates ago.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jaxreason import batching
from jaxreason.environment import Environment, count_failures, measured
from jaxreason.objectives import Objective
from jaxreason.objectives.credit import CREDITS, are_mixed
from jaxreason.options import unknown_name_message
from jaxreason.rollout import Completer
from jaxreason.sources.curriculum import SuccessRate
from jaxreason.sources.hints import Hints, hinted_prompts
from jaxreason.sources.interface import NextBatch, Source
from jaxreason.sources.keeping import Keep, as_groups, check_keep
from jaxreason.sources.replay import check_replay
from jaxreason.sources.rewards import REWARDS
from jaxreason.sources.sampling import (
    Cursor,
    Draw,
    SampledGroups,
    Sampling,
    advance,
    at_once,
    begin,
    key_of,
    most_mixed,
    next_wanted,
    one_round,
    with_dynamic_sampling,
)
from jaxreason.sources.saved import cursor_of, pack_groups, pack_state, state_of, unpack_groups
from jaxreason.types import Group, Prompted


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
    same: Callable[[str, str], bool] | None = None,
    pack: bool = False,
    microbatches: int = 1,
    rollouts_per_prompt: int = 1,
    lag: int = 0,
    background: bool = False,
    steps: int | None = None,
    dynamic_sampling: int = 1,
    credit: str = "rollout",
    replay: int = 0,
    replay_age: int = 1,
    curriculum: SuccessRate | None = None,
    keep: Keep | None = None,
    hints: Hints | None = None,
) -> Source:
    """Sample and judge `group` attempts at each of `problems` tasks per batch.

    The processes divide the problems. The state is the position of the next problem,
    and what `replay` and `curriculum` remember. Up to `replay` of the problems are not
    sampled: their groups are drawn at random from those with mixed rewards of the last
    `replay_age` batches, each once per batch. `curriculum` passes over tasks that are
    too easy or too hard (see `curriculum.SuccessRate`). With `keep` only some attempts
    are learned from, each as a demonstration (see `keeping`). `lag`, `background` and
    `steps` are those of `with_lag`; `dynamic_sampling` is `most` of
    `with_dynamic_sampling`. In the batch `rollouts_per_prompt` attempts at a problem
    follow one copy of its prompt (see `batching.from_groups`).

    `reward` says what is paid: the verdict's reward or, as controls, that reward given
    to another attempt ("random", see `shuffle_rewards`) or 1 for any answer that the
    verifier can read ("format"); "majority" needs no answer key (see `pay_majority`);
    `same` tells whether two answers of a vote are equivalent.
    `credit` says for what: the whole rollout, or each attempt within it (see
    `objectives.credit`).
    `hints` make the rows of a teacher that is shown more than the policy.

    Raises:
      ValueError: an unknown reward or credit, a negative lag, an impossible replay, or
        dynamic sampling that is below 1 or for an objective that does not compare
        attempts.
    """
    check(objective, reward, credit, lag, dynamic_sampling)
    check_replay(replay, replay_age, problems, group, objective)
    words = {"replay": replay, "replay_age": replay_age, "curriculum": curriculum, "keep": keep}
    words |= {"measures": objective.measures, "credit": credit, "same": same}
    sampling = Sampling(tasks, environment, completer, problems, group, temperature, reward, **words)
    draw = with_dynamic_sampling(one_round(sampling), sampling, dynamic_sampling)

    if keep is not None:
        check_keep(keep)
    layout = {"buckets": buckets, "limit": completer.max_tokens, "pack": pack, "microbatches": microbatches}
    layout |= {"rollouts_per_prompt": rollouts_per_prompt, "credit": credit}
    drawn = functools.partial(make_batch, sampling, objective, layout, hints)

    def next(state, params, key):
        cursor, weights = cursor_of(sampling, state), completer.sampler.prepare(params)
        wanted = next_wanted(sampling, cursor, key)
        sampled = begin(draw, at_once, wanted, weights, key_of(sampling, wanted, key))()
        return state_of(sampling, advance(sampling, cursor, sampled)), drawn(sampled)

    source = Source(
        lambda: state_of(sampling, Cursor(0)),
        next,
        problems * group // rollouts_per_prompt,
        samples=True,
        save=pack_state,
        replay=replay,
        lengths=buckets,
    )
    return with_lag(source, draw, drawn, sampling, lag, background=background, steps=steps) if lag else source


def check(objective: Objective, reward: str, credit: str, lag: int, dynamic_sampling: int) -> None:
    """Raise ValueError for arguments of `rollouts` that are not allowed."""
    if reward not in REWARDS:
        raise ValueError(unknown_name_message("reward", reward, REWARDS))
    if credit not in CREDITS:
        raise ValueError(f"source.credit got {credit!r}; allowed: {', '.join(CREDITS)}")
    if credit == "attempt" and reward != "verdict":
        raise ValueError(f"source.credit got 'attempt' and reward {reward!r}, which pays whole rollouts; allowed: 'verdict'")
    if lag < 0:
        raise ValueError(f"source.lag got {lag}; allowed: 0 or more updates")
    if dynamic_sampling < 1 or (dynamic_sampling > 1 and not objective.needs_group):
        raise ValueError(
            f"source.dynamic_sampling got {dynamic_sampling}; allowed: 1 (off), or more for an objective that compares the "
            "attempts at a problem, such as grpo, dr_grpo, dapo, rloo"
        )


@functools.partial(jax.profiler.annotate_function, name="batch")
def make_batch(sampling: Sampling, objective: Objective, layout: dict, hints: Hints | None, sampled: SampledGroups) -> NextBatch:
    """Make the batch and the metrics of sampled groups. `layout` has the further
    arguments of `batching.from_groups`.
    """
    group, spent = sampling.group, sampled.spent
    fresh = most_mixed(sampled.groups, sampling.problems - len(sampled.replayed), sampling.measures, sampling.credit)
    learned = fresh + [one.group for one in sampled.replayed]
    if sampling.keep is not None:
        learned, layout = as_groups(learned, sampling.keep, sampling.reward), layout | {"rows": len(learned) * group}
    if hints is not None:
        layout = layout | {"hinted": hinted_prompts(hints, learned), "hint_columns": hints.columns}
    batch = batching.from_groups(learned, objective, **layout)
    tokens = float((batch.segment_BT > 0).sum())
    metrics = measure(sampled.groups, sampling.measures, sampling.credit) | {
        "rollout/oversampling": (float(len(sampled.groups) * group), float(len(fresh) * group)),
        "time/sample_s": (spent.sample_s, 1.0),
        "time/verify_s": (spent.verify_s, 1.0),
        **{name: (value, 1.0) for name, value in latency(spent.verdict_s).items()},
        **remembered(sampling, sampled),
        **({} if sampling.keep is None else {"rollout/kept": (float(len(learned)), float(len(fresh) * group))}),
        **({} if hints is None else {"rollout/hinted": count_hinted(layout["hinted"])}),
        "train/tokens": (tokens, 1.0),
        "train/packing_efficiency": (tokens, float(batching.computed_tokens(batch, layout["microbatches"]))),
        "perf/sample_tokens_per_s": (float(spent.tokens), spent.sample_s),
        "perf/slot_occupancy": (float(spent.tokens), float(spent.slot_steps)),
    }
    found = dict(zip(map(id, (r for group in learned for r in group.attempts)), batching.advantages(batch), strict=True))
    sampled_R = [r for group in sampled.groups for r in group.attempts]
    return NextBatch(batch, metrics, sampled_R, [found.get(id(r)) for r in sampled_R])


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

    def next(state, params, key):
        cursor, ahead = cursor_of(sampling, state), batches_ahead(sampling, state)
        begun, weights = state.get("begun", 0), None
        while len(ahead) <= lag and (not ahead or steps is None or begun < steps):
            # What a batch consists of is known when those before it are sampled, so
            # this waits until the sampler's devices are idle.
            wanted = next_wanted(sampling, functools.reduce(following, (batch() for batch in ahead), cursor), key)
            weights = sampling.completer.sampler.prepare(params) if weights is None else weights
            ahead.append(begin(draw, submit, wanted, weights, key_of(sampling, wanted, key)))
            begun += 1
        sampled = ahead.pop(0)()
        return state_of(sampling, following(cursor, sampled)) | {"begun": begun, "ahead": ahead}, drawn(sampled)

    def save(state):
        return pack_state(state) | {"ahead": [pack_groups(batch()) for batch in state["ahead"]]}

    following = functools.partial(advance, sampling)
    start = state_of(sampling, Cursor(0)) | {"begun": 0, "ahead": []}
    return source._replace(init=lambda: dict(start), next=next, save=save, lag=lag)


def batches_ahead(sampling: Sampling, state: Mapping) -> list[Callable[[], SampledGroups]]:
    """Return functions that wait for the batches that a state has sampled ahead."""
    ahead, cursor = [], cursor_of(sampling, state)
    for batch in state.get("ahead", ()):
        if isinstance(batch, dict):
            batch = functools.partial(lambda sampled: sampled, unpack_groups(batch, sampling, cursor))
            cursor = advance(sampling, cursor, batch())
        ahead.append(batch)
    return ahead


def count_hinted(prompts: Sequence) -> tuple[float, float]:
    return float(sum(prompt is not None for prompt in prompts)), float(len(prompts))


def remembered(sampling: Sampling, sampled: SampledGroups) -> dict:
    """Return the metrics of replay and curriculum, if they are in use: the shares of
    replayed groups and of tasks passed over, and the mean age of replayed groups in
    batches.
    """
    found = {}
    if sampling.replay:
        found["rollout/replayed"] = (float(len(sampled.replayed)), float(sampling.problems))
    if sampled.replayed:
        ages = [sampled.batch - one.batch for one in sampled.replayed]
        found["rollout/replay_age"] = (float(sum(ages)), float(len(ages)))
    if sampling.curriculum is not None:
        looked_at, drawn = sampled.end - sampled.start, len(sampled.groups)
        found["rollout/passed_over"] = (float(looked_at - drawn), float(looked_at))
        found["rollout/filled"] = (float(sampled.filled), float(drawn))
    return found


def measure(groups: Sequence[Group], measures: Sequence[str] = (), credit: str = "rollout") -> dict:
    """Measure groups; return (sum, count) pairs. Groups are informative if their
    rewards differ, or any of `measures` if those are what an objective learns from, or
    the rewards of attempts within rollouts if these have the credit.
    """
    rollouts = [r for group in groups for r in group.attempts]
    R, P = float(len(rollouts)), float(len(groups))
    return {
        "rollout/reward": (float(np.sum([r.verdict.reward for r in rollouts])), R),
        "rollout/correct": (float(sum(r.verdict.correct for r in rollouts)), R),
        "rollout/solved": (float(sum(any(r.verdict.correct for r in group.attempts) for group in groups)), P),
        "rollout/informative_groups": (float(sum(are_mixed(group, measures, credit) for group in groups)), P),
        "rollout/length": (float(sum(len(r.tokens) for r in rollouts)), R),
        "rollout/cut": (float(sum(r.stop == "limit" for r in rollouts)), R),
        **{f"rollout/{name}": (float(n), R) for name, n in count_failures(r.verdict for r in rollouts).items()},
        **{f"rollout/{name}": pair for name, pair in measured(r.verdict for r in rollouts).items()},
    }


def latency(verdict_s: Sequence[float]) -> dict[str, float]:
    """Return quantiles of the time per verdict, in ms; a verdict that was given up has
    none.
    """
    if not len(verdict_s):
        return {}
    p50_s, p99_s = np.quantile(verdict_s, (0.5, 0.99))
    return {"time/verify_p50_ms": 1e3 * float(p50_s), "time/verify_p99_ms": 1e3 * float(p99_s)}
