"""The host loop of continuous batching: fill free slots, decode a chunk, hand finished text to its environment, refill.

The result depends on the requests alone, in their order: not on how many slots there are or who finished first.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxreason.environment import Environment, Turn
from jaxreason.sampler import RUNNING, STOPS, Sampler, attempt_keys
from jaxreason.types import Rollout, Task


class Request(NamedTuple):
    """One attempt that is wanted."""

    task: Task
    problem: int  # with `attempt`, what its random key is made from
    attempt: int
    prompt: Sequence[int]  # token ids


class Spent(NamedTuple):
    """What a collection cost."""

    sample_s: float
    verify_s: float
    tokens: int  # sampled
    slot_steps: int  # tokens that could have been sampled: decode steps x slots


class Roller(NamedTuple):
    """What turns requests into rollouts: a compiled sampler and the text around it."""

    sampler: Sampler
    encode: Callable[[str], list[int]]  # observations -> ids
    decode: Callable[[Sequence[int]], str]
    eos_ids: tuple[int, ...]
    prompt_buckets: tuple[int, ...]  # prompts are padded to the smallest that holds them
    row_buckets: tuple[int, ...]  # so many prompts are prefilled at a time
    max_tokens: int  # limit of a completion


def collect(
    roller: Roller, params, requests: Sequence[Request], environment: Environment, *, key, temperature: float
) -> tuple[list[Rollout], Spent]:
    """Sample every request and have it judged. Attempts at one problem should stand side by side: its prompt is prefilled once.

    `params` are in the sampler's layout (`sampler.prepare`); `key` stands for (seed, phase, step).

    Raises:
      ValueError: a prompt is empty, or longer than the largest bucket.
    """
    if roller.prompt_buckets[-1] > roller.sampler.length:
        raise ValueError(f"prompts of {roller.prompt_buckets[-1]} tokens do not fit a sampler of length {roller.sampler.length}")
    for request in requests:
        if not 1 <= len(request.prompt) <= roller.prompt_buckets[-1]:
            raise ValueError(
                f"prompt of problem {request.problem} has {len(request.prompt)} tokens; allowed: 1 to "
                f"{roller.prompt_buckets[-1]}; raise sampler.max_prompt_tokens"
            )
    sampler, started_s, verify_s = roller.sampler, time.perf_counter(), 0.0
    problem_R = np.array([r.problem for r in requests], np.uint32)
    attempt_R = np.array([r.attempt for r in requests], np.uint32)
    key_R = np.asarray(attempt_keys(key, problem_R, attempt_R))
    rollouts: list[Rollout | None] = [None] * len(requests)
    queue = collections.deque(range(len(requests)))
    occupant: list[int | None] = [None] * sampler.slots  # request in each slot
    state = [environment.reset(r.task) for r in requests]
    slots = sampler.empty()
    length_S, steps = np.zeros(sampler.slots, np.int32), 0

    def text_of(tokens):
        kept = tokens[:-1] if len(tokens) and tokens[-1] in roller.eos_ids else tokens
        return roller.decode([int(t) for t in kept])

    while queue or any(r is not None for r in occupant):
        free = [s for s, r in enumerate(occupant) if r is None]
        placed = {s: queue.popleft() for s in free[: len(queue)]}
        if placed:
            occupant = [placed.get(s, r) for s, r in enumerate(occupant)]
            slots = _insert(roller, params, slots, placed, requests, key_R)
            length_S[[*placed]] = [len(requests[r].prompt) for r in placed.values()]
        slots = sampler.decode(params, slots, np.float32(temperature))
        before_S, (stop_S, length_S) = length_S, jax.device_get((slots.stop_S, slots.length_S))
        length_S = length_S.copy()
        steps += int(max(length_S[s] - before_S[s] for s, r in enumerate(occupant) if r is not None))
        finished = [s for s, r in enumerate(occupant) if r is not None and stop_S[s] != RUNNING]
        if not finished:
            continue
        tokens_SC, logp_SC, sampled_SC = jax.device_get((slots.tokens_SC, slots.logp_SC, slots.sampled_SC))
        verify_started_s = time.perf_counter()
        forced: dict[int, list[int]] = {}
        for s in finished:
            r = occupant[s]
            request = requests[r]
            completion = slice(len(request.prompt), length_S[s])
            tokens, sampled = tokens_SC[s, completion].copy(), sampled_SC[s, completion].copy()
            stop = STOPS[int(stop_S[s])]
            turn = tokens[len(sampled) - _trailing(sampled) :]
            full = length_S[s] >= _limit(roller, request)  # even if its last token ends a turn
            state[r], step = environment.step(state[r], Turn(text_of(turn), stop, bool(full)))
            if step.observation is not None:
                forced[s] = roller.encode(step.observation)
                if forced[s]:
                    continue
                del forced[s]  # nothing to go on from
                state[r], step = environment.step(state[r], Turn("", stop, final=True))
            rollouts[r] = Rollout(
                task=request.task,
                problem=request.problem,
                attempt=request.attempt,
                prompt=np.asarray(request.prompt, np.int32),
                tokens=tokens,
                logp=logp_SC[s, completion].copy(),
                sampled=sampled,
                stop=stop,
                text=text_of(tokens),
                verdict=step.verdict,
                temperature=temperature,
            )
            occupant[s] = None
        verify_s += time.perf_counter() - verify_started_s
        if forced:
            slots = _force(roller, params, slots, forced)
            for s, ids in forced.items():
                length_S[s] = min(length_S[s] + len(ids), _limit(roller, requests[occupant[s]]))
    tokens = sum(int(r.sampled.sum()) for r in rollouts)
    return rollouts, Spent(time.perf_counter() - started_s - verify_s, verify_s, tokens, steps * sampler.slots)


def _limit(roller: Roller, request: Request) -> int:
    """Length at which a request stops, its prompt included."""
    return min(len(request.prompt) + roller.max_tokens, roller.sampler.length)


def _trailing(sampled) -> int:
    """How many tokens were sampled since the last forced one."""
    forced = np.flatnonzero(~sampled)
    return len(sampled) - (forced[-1] + 1 if len(forced) else 0)


def _insert(roller: Roller, params, slots, placed: dict[int, int], requests, key_R):
    """Put request `placed[s]` into slot s, for each s; each prompt is prefilled once."""
    row_of: dict[tuple, int] = {}  # prompt -> row of the prefill
    for r in placed.values():
        row_of.setdefault(tuple(requests[r].prompt), len(row_of))
    P = next(p for p in roller.row_buckets if p >= len(row_of))
    T = next(t for t in roller.prompt_buckets if t >= max(map(len, row_of)))
    S = roller.sampler.slots
    tokens_PT, length_P = np.zeros((P, T), np.int32), np.ones(P, np.int32)
    for prompt, row in row_of.items():
        length_P[row] = len(prompt)
        tokens_PT[row, : len(prompt)] = prompt
    row_S, limit_S, slot_S = np.zeros(S, np.int32), np.ones(S, np.int32), np.full(S, S, np.int32)  # S is nowhere
    key_S = np.zeros((S, *key_R.shape[1:]), key_R.dtype)
    for i, (s, r) in enumerate(placed.items()):
        row_S[i], slot_S[i], key_S[i] = row_of[tuple(requests[r].prompt)], s, key_R[r]
        limit_S[i] = _limit(roller, requests[r])
    return roller.sampler.insert(params, slots, tokens_PT, length_P, row_S, slot_S, key_S, limit_S)


def _force(roller: Roller, params, slots, forced: dict[int, list[int]]):
    """Append token ids to slots. Their number is padded to a power of two, so that few shapes are ever compiled."""
    F = 1 << (max(map(len, forced.values())) - 1).bit_length()
    tokens_SF, count_S = np.zeros((roller.sampler.slots, F), np.int32), np.zeros(roller.sampler.slots, np.int32)
    for s, ids in forced.items():
        tokens_SF[s, : len(ids)], count_S[s] = ids, len(ids)
    return roller.sampler.force(params, slots, tokens_SF, count_S)
