"""Batches of the model's own verified attempts, sampled with the newest params or with
those of some updates ago.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jaxreason import batching
from jaxreason.environment import Environment, count_failures, measured
from jaxreason.objectives import Objective
from jaxreason.options import unknown_name_message
from jaxreason.rollout import Completer
from jaxreason.sources.hints import Hints, hinted_prompts
from jaxreason.sources.interface import NextBatch, Source
from jaxreason.sources.rewards import REWARDS
from jaxreason.sources.sampling import (
    Draw,
    SampledGroups,
    Sampling,
    at_once,
    begin,
    has_mixed_rewards,
    key_of,
    most_mixed,
    one_round,
    wanted_groups,
    with_dynamic_sampling,
)
from jaxreason.sources.saved import pack_groups, unpack
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
    pack: bool = False,
    microbatches: int = 1,
    rollouts_per_prompt: int = 1,
    lag: int = 0,
    background: bool = False,
    steps: int | None = None,
    dynamic_sampling: int = 1,
    hints: Hints | None = None,
) -> Source:
    """Sample and judge `group` attempts at each of `problems` tasks per batch.

    The processes divide the problems. The state is the position of the next problem.
    `lag`, `background` and `steps` are those of `with_lag`; `dynamic_sampling` is
    `most` of `with_dynamic_sampling`. In the batch `rollouts_per_prompt` attempts at a
    problem follow one copy of its prompt (see `batching.from_groups`).

    `reward` says what is paid: the verdict's reward or, as controls, that reward given
    to another attempt ("random", see `shuffle_rewards`) or 1 for any answer that the
    verifier can read ("format"); "majority" needs no answer key (see `pay_majority`).
    `hints` make the rows of a teacher that is shown more than the policy.

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
        hinted = None if hints is None else hinted_prompts(hints, learned)
        batch = batching.from_groups(
            learned,
            objective,
            buckets=buckets,
            limit=completer.max_tokens,
            pack=pack,
            microbatches=microbatches,
            rollouts_per_prompt=rollouts_per_prompt,
            hinted=hinted,
            hint_columns=0 if hints is None else hints.columns,
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
        if hinted is not None:
            metrics["rollout/hinted"] = (float(sum(prompt is not None for prompt in hinted)), float(len(hinted)))
        found = dict(zip(map(id, (r for group in learned for r in group.attempts)), batching.advantages(batch), strict=True))
        sampled_R = [r for group in sampled.groups for r in group.attempts]
        return NextBatch(batch, metrics, sampled_R, [found.get(id(r)) for r in sampled_R])

    def next(state, params, key):
        start, weights = state["position"], completer.sampler.prepare(params)
        sampled = begin(draw, at_once, wanted_groups(sampling, start, problems), weights, key_of(sampling, start, key))()
        return {"position": sampled.end}, drawn(sampled)

    source = Source(lambda: {"position": 0}, next, problems * group // rollouts_per_prompt, samples=True)
    return with_lag(source, draw, drawn, sampling, lag, background=background, steps=steps) if lag else source


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


def latency(verdict_s: Sequence[float]) -> dict[str, float]:
    """Return quantiles of the time per verdict, in ms; a verdict that was given up has
    none.
    """
    if not len(verdict_s):
        return {}
    p50_s, p99_s = np.quantile(verdict_s, (0.5, 0.99))
    return {"time/verify_p50_ms": 1e3 * float(p50_s), "time/verify_p99_ms": 1e3 * float(p99_s)}
