"""Host loop of continuous batching: fill free slots, decode a chunk, hand finished text
to its environment, refill.

Environments make verdicts and tool results in threads while the other slots decode. The
result depends only on the requests and their order, not on the number of slots, the
order in which rollouts finish or the time that a verifier takes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxreason.draw import ALL, Filter
from jaxreason.environment import Environment, Failures, Playing, Step, Stop, Threads, Turn, end_of_turn, late
from jaxreason.runtime import processes
from jaxreason.sampler import MAX_SLOTS_PER_PROMPT, RUNNING, STOPS, Sampler, Weights, attempt_keys
from jaxreason.types import Group, Message, Rollout, Task

THREADS = 8  # threads that run environments
# Held while sampling: two programs on several devices, started from two threads, could
# deadlock.
SAMPLING_LOCK = threading.RLock()
TOOL_WAIT_S = 0.005  # wait before each chunk for tools that are about to answer
TICK_S = 1.0  # time between checks of deadlines; a longer gap (the machine slept) counts as this much


class Request(NamedTuple):
    """One attempt to sample."""

    task: Task
    problem: int  # its random key is made from `problem` and `attempt`
    attempt: int
    prompt: Sequence[int]  # token ids, the same for all attempts at the problem


class SamplingStats(NamedTuple):
    """Time and tokens spent on sampling a set of requests."""

    sample_s: float
    verify_s: float  # time in which sampling waited for verdicts and tools
    tokens: int  # sampled
    slot_steps: int  # tokens that could have been sampled: decode steps times slots
    prompt_tokens: int  # prefilled, each prompt once
    verdict_s: Sequence[float] = ()  # time that each verdict took in its thread


class Budget(NamedTuple):
    """Limit on thinking tokens.

    After this many tokens of a completion the end of thinking is forced, unless the
    model has written it.
    """

    tokens: int
    end: str  # the forced text; stripped of white space, the text that ends thinking
    ids: Sequence[int]  # of `end`


class Completer(NamedTuple):
    """Compiled sampler with its text handling; it turns requests into rollouts."""

    sampler: Sampler
    observe: Callable[[str | Sequence[Message], bool], list[int]]  # (observation, whether eos ended the turn) -> ids
    decode: Callable[[Sequence[int]], str]
    eos_ids: tuple[int, ...]
    prompt_buckets: tuple[int, ...]  # prompts are padded to the smallest one that holds them
    rows: int  # prompts per prefill call
    max_tokens: int  # tokens per completion, at most
    stop_strings: tuple[str, ...] = ()
    thinking: Budget | None = None


def text_of(completer: Completer, tokens: np.ndarray) -> str:
    """Decode tokens to text, without an end-of-sequence token at their end."""
    kept = tokens[:-1] if len(tokens) and tokens[-1] in completer.eos_ids else tokens
    return completer.decode(kept.tolist())


def find_stop(completer: Completer, stops: Sequence[Stop], tokens_T, turn: int, before: int, length: int) -> int | None:
    """Return the length at which a turn's first stop is complete.

    Return None if there is none after length `before`. A stop may begin and end inside
    tokens, so text is compared, not tokens.
    """
    if not stops:
        return None
    # A token has at least one byte, which bounds how many tokens before `before` a stop
    # that ends after it can begin. One that needs an opening may have it anywhere, but
    # a whole turn is decoded only where the stop itself is new.
    start = max(turn, before - max(len(stop.text.encode()) for stop in stops) - 1)
    new = text_of(completer, tokens_T[start:length])
    if not any(stop.text in new for stop in stops):
        return None
    start = turn if any(stop.after for stop in stops) else start

    def stopped(end: int) -> bool:
        text = text_of(completer, tokens_T[start:end])
        return end_of_turn(stops, text) is not None

    return next((end for end in range(before + 1, length + 1) if stopped(end)), None) if stopped(length) else None


def stops_of(completer: Completer, environment: Environment) -> tuple[Stop, ...]:
    return (*environment.stops, *(Stop(text) for text in completer.stop_strings))


@dataclasses.dataclass
class Attempt:
    """A request in progress: in a slot, with its environment, or both."""

    index: int  # of the request
    request: Request
    playing: Playing  # its environment
    limit: int  # final length, at most; every length includes the prompt
    length: int
    turn: int  # length at the start of the model's turn
    thinking: bool  # whether its thinking budget is not spent yet
    slot: int | None
    prompt_row: int = -1  # prompt row that the slot continues; negative: the prompt is in the slot's own cache
    stop: str = ""
    waits: bool = False  # whether it waits for its environment
    waited_s: float = 0.0  # time that its environment's step has been running
    rollout: Rollout | None = None  # set at its end, without a verdict
    appended: list[tuple[int, int, str]] = dataclasses.field(default_factory=list)  # (start, end, author) of tokens not sampled

    def cache_length(self, length: int) -> int:
        """Count the cache positions of its own slot that a sequence of this length
        takes.

        Its last token is not in the cache yet.
        """
        return length - 1 - (len(self.request.prompt) - 1 if self.prompt_row >= 0 else 0)


def collect(
    completer: Completer,
    weights: Weights,
    requests: Sequence[Request],
    environment: Environment,
    *,
    key,
    temperature: float,
    filter: Filter = ALL,
    judged: Callable[[Rollout], None] = lambda rollout: None,
) -> tuple[list[Rollout], SamplingStats]:
    """Sample every request and judge it.

    Attempts at one problem should be neighbours in `requests`, so that their prompt is
    prefilled once. `weights` are `sampler.prepare(params)`; `key` is derived from
    (seed, phase, step). `judged` is called with each rollout as soon as it has its
    verdict, in no fixed order.

    Raises:
      ValueError: a prompt is empty, or longer than the largest bucket.
      VerifierFailed: the environment's verifier fails all the time.
    """
    check(completer, requests)
    with SAMPLING_LOCK, contextlib.closing(Threads(THREADS)) as threads:
        collection = Collection(completer, weights, requests, environment, threads, key, temperature, filter, judged)
        with contextlib.closing(collection):
            while collection.goes_on():
                collection.hear()
                collection.fill()
                collection.compact()
                collection.decode()
    return collection.rollouts, collection.spent()


class LocalGroups(NamedTuple):
    """Groups that one process collected, by their index in `wanted`, and their cost."""

    groups: dict[int, Group]
    spent: SamplingStats


def collect_groups(
    completer: Completer, weights: Weights, wanted: Sequence[Sequence[Request]], environment: Environment, **options
) -> tuple[list[Group], SamplingStats]:
    """Collect the attempts at several problems; `wanted` has each group's requests."""
    rollouts, spent = collect(completer, weights, list(itertools.chain(*wanted)), environment, **options)
    rest = iter(rollouts)
    return [Group(tuple(itertools.islice(rest, len(requests)))) for requests in wanted], spent


def collect_local(
    completer: Completer, weights: Weights, wanted: Sequence[Sequence[Request]], environment: Environment, **options
) -> LocalGroups:
    """Collect this process's groups: every n-th problem of n processes.

    `wanted` has the groups of all processes.
    """
    mine = range(jax.process_index(), len(wanted), jax.process_count())
    groups, spent = collect_groups(completer, weights, [wanted[i] for i in mine], environment, **options)
    return LocalGroups(dict(zip(mine, groups, strict=True)), spent)


def gather_groups(share: LocalGroups, wanted: Sequence[Sequence[Request]]) -> tuple[list[Group], SamplingStats]:
    """Gather the groups of all processes, in the order of `wanted`, and their cost.

    All processes must call it.
    """
    # Every process has the tasks and prompts, so they are not sent.
    bare = {i: replaced(group, itertools.repeat({"task": None, "prompt": None})) for i, group in share.groups.items()}
    shares = processes.gather(LocalGroups(bare, share.spent))
    found = {i: group for share in shares for i, group in share.groups.items()}
    groups = [replaced(found[i], [{"task": r.task, "prompt": r.prompt} for r in wanted[i]]) for i in range(len(wanted))]
    spents = [share.spent for share in shares]
    return groups, SamplingStats(
        sample_s=max(s.sample_s for s in spents),
        verify_s=max(s.verify_s for s in spents),
        tokens=sum(s.tokens for s in spents),
        slot_steps=sum(s.slot_steps for s in spents),
        prompt_tokens=sum(s.prompt_tokens for s in spents),
        verdict_s=list(itertools.chain(*(s.verdict_s for s in spents))),
    )


def replaced(group: Group, changes: Iterable[dict]) -> Group:
    """Return a group with some fields of each attempt replaced."""
    return Group(tuple(dataclasses.replace(r, **new) for r, new in zip(group.attempts, changes, strict=False)))


def check(completer: Completer, requests: Sequence[Request]) -> None:
    """Raise ValueError for a prompt that is empty or too long."""
    longest = completer.prompt_buckets[-1]
    if longest > completer.sampler.length:
        raise ValueError(f"prompts of {longest} tokens do not fit a sampler of length {completer.sampler.length}")
    for request in requests:
        if not 1 <= len(request.prompt) <= longest:
            raise ValueError(
                f"prompt of problem {request.problem} has {len(request.prompt)} tokens; allowed: 1 to {longest}; "
                "raise sampler.max_prompt_tokens"
            )


def keys_of(key, requests: Sequence[Request], at_once: int = 256) -> np.ndarray:
    """Make the key data of each request, [R, ...].

    The keys are made `at_once` at a time, so that one shape serves any number of
    requests.
    """
    ids = np.array([(r.problem, r.attempt) for r in requests], np.uint32).reshape(-1, 2).T
    ids = np.pad(ids, ((0, 0), (0, -len(requests) % at_once)))
    made = [attempt_keys(key, *ids[:, i : i + at_once]) for i in range(0, ids.shape[1], at_once)]
    return np.concatenate(made)[: len(requests)] if made else np.zeros((0, 0), np.uint32)


def warm_up(
    completer: Completer,
    weights: Weights,
    filters: Iterable[Filter] = (ALL,),
    appends_tokens: bool = True,
    stops_slots: bool = False,
) -> None:
    """Compile all programs that `collect` can need, by running them on empty slots.

    `appends_tokens` says whether tokens are ever forced: observations, or the end of
    thinking. `stops_slots` says whether an environment has stops; a completer's are
    known.
    """
    sampler, T = completer.sampler, completer.sampler.length

    def prefill(longest: int):
        return sampler.prefill(weights, np.zeros((completer.rows, longest), np.int32), np.ones(completer.rows, np.int32))

    def decode(slots):
        """Decode with this many slots, in every cache bucket."""
        S = len(slots.stop_S)
        for cache_length in sampler.buckets:
            slots = sampler.resize(slots, cache_length)
            for filter in dict.fromkeys(filters):
                slots = sampler.decode(weights, slots, np.float32(1), filter)
            if appends_tokens:
                slots = sampler.append_tokens(weights, slots, *nothing(S, T))
        return sampler.stop_slots(slots, np.zeros(S, bool)) if completer.stop_strings or stops_slots else slots

    def all_sizes(slots, sizes):
        """Decode with this many slots and fewer, compacting from every cache bucket."""
        slots = decode(slots)
        for cache_length in reversed(sampler.buckets):
            slots = sampler.resize(slots, cache_length)
            few = [sampler.compact(slots, np.arange(size, dtype=np.int32)) for size in sizes]
        if sizes:
            all_sizes(few[0], sizes[1:])

    with ThreadPoolExecutor(2) as threads:  # compile the slowest program in parallel with the others
        decoded = threads.submit(all_sizes, sampler.empty(), sampler.sizes[1:])
        prefilled = [prefill(longest) for longest in completer.prompt_buckets]
        decoded.result()
    S, none_R = sampler.slots, np.full(sampler.prompt_rows, -1, np.int32)
    key_S = np.repeat(keys_of(jax.random.key(0), [Request(None, 0, 0, ())]), S, axis=0)
    none_S, tokens_ST, one_S, _ = nothing(S, T)
    slots = sampler.empty()
    for cache_length in sampler.buckets:
        slots = sampler.resize(slots, cache_length)
        for prompts in prefilled:
            slots = sampler.copy_prompts(slots, prompts, none_S, none_R)
    slots = sampler.start_rollouts(slots, np.zeros(S, bool), tokens_ST, one_S, one_S, key_S, none_S, np.zeros_like(none_R))
    jax.block_until_ready(slots)


def nothing(S: int, T: int) -> tuple:
    """Make arguments that append or copy nothing: starts, tokens and two counts."""
    return np.full(S, -1, np.int32), np.zeros((S, T), np.int32), np.ones(S, np.int32), np.ones(S, np.int32)


class Collection:
    """State of one `collect`."""

    def __init__(self, completer, weights, requests, environment, threads, key, temperature, filter, judged=lambda rollout: None):
        self.completer, self.sampler, self.weights = completer, completer.sampler, weights
        self.environment = environment._replace(failures=environment.failures or Failures(environment.name))
        self.verdict_s: list[float] = []
        self.judge = jax.profiler.annotate_function(timed(Playing.answer, self.verdict_s), name="verify")
        self.stops = stops_of(completer, environment)
        self.threads, self.temperature, self.filter, self.judged = threads, temperature, filter, judged
        self.key_R = keys_of(key, requests)
        self.queue = collections.deque(enumerate(requests))
        self.prompts, self.rows = Prompts(completer, weights, requests), PromptRows(self.sampler)
        self.attempt_by_slot: list[Attempt | None] = [None] * self.sampler.slots
        self.asked: dict[Future, Attempt] = {}
        self.rollouts: list[Rollout | None] = [None] * len(requests)
        self.slots, self.cache_length = self.sampler.empty(), self.sampler.buckets[0]
        self.started_s, self.verify_s, self.slot_steps = time.perf_counter(), 0.0, 0
        self.ticked_s = self.started_s

    def close(self) -> None:
        """Close the environments of attempts that have no verdict, as after Ctrl-C."""
        for attempt in [*self.asked.values(), *filter(None, self.attempt_by_slot)]:
            attempt.playing.close()

    def goes_on(self) -> bool:
        return bool(self.queue or self.asked or any(self.attempt_by_slot))

    def running(self) -> list[Attempt]:
        return [a for a in self.attempt_by_slot if a is not None and not a.waits]

    def spent(self) -> SamplingStats:
        return SamplingStats(
            sample_s=time.perf_counter() - self.started_s - self.verify_s,
            verify_s=self.verify_s,
            tokens=sum(map(sampled, self.rollouts)),
            slot_steps=self.slot_steps,
            prompt_tokens=self.prompts.tokens,
            verdict_s=list(self.verdict_s),
        )

    # --- environments ---

    def ask(self, attempt: Attempt, turn: Turn) -> None:
        """Hand a turn to the attempt's environment.

        If the environment can only judge, the attempt leaves its slot at once.
        """
        attempt.waits, attempt.waited_s = True, 0.0
        self.asked[self.threads.submit(self.judge, attempt.playing, turn)] = attempt
        if self.environment.one_turn:
            self.leave(attempt)

    def leave(self, attempt: Attempt) -> None:
        if attempt.slot is not None:
            self.rows.leave(attempt.prompt_row)
            self.attempt_by_slot[attempt.slot], attempt.slot = None, None

    def hear(self) -> None:
        """Process the answers of environments.

        Wait for one only if nothing can be decoded, or briefly for an observation.
        """
        started_s = time.perf_counter()
        if self.running() or (self.queue and None in self.attempt_by_slot):
            answered = wait(self.asked, timeout=0 if self.environment.one_turn else TOOL_WAIT_S).done
        else:
            limit_s = None if self.environment.deadline_s is None else TICK_S
            answered = wait(self.asked, timeout=limit_s, return_when=FIRST_COMPLETED).done
        self.verify_s += time.perf_counter() - started_s
        said = []
        for future, step in itertools.chain(((f, None) for f in answered), self.overdue(answered)):
            attempt = self.asked.pop(future)
            attempt.waits = False
            if step is None:
                step, ids = future.result()
            else:
                attempt.playing.close()
            self.environment.failures.hear(step)
            if step.verdict is not None:
                self.rollouts[attempt.index] = dataclasses.replace(attempt.rollout, verdict=step.verdict)
                self.judged(self.rollouts[attempt.index])
                self.leave(attempt)
            elif attempt.slot is None:
                raise ValueError("an environment with one_turn=True gave an observation; it must give a verdict at every step")
            elif ids:
                said.append((attempt, ids))
            else:  # an empty observation: ask for the verdict
                self.ask(attempt, Turn("", attempt.stop, final=True, tokens=sampled(attempt.rollout)))
        self.append_tokens(said, author="t")
        for attempt, _ in said:
            attempt.turn = attempt.length

    def overdue(self, answered: Iterable[Future]) -> list[tuple[Future, Step]]:
        """Give up steps past their deadline; return the steps that replace them."""
        now_s = time.perf_counter()
        passed_s, self.ticked_s = min(now_s - self.ticked_s, TICK_S), now_s
        if self.environment.deadline_s is None:
            return []
        found = []
        for future, attempt in self.asked.items():
            attempt.waited_s += passed_s if future.running() else 0.0
            if attempt.waited_s > self.environment.deadline_s and future not in answered:
                thread = self.threads.give_up(future)
                found += [(future, late(self.environment, thread))] if thread is not None else []
        return found

    # --- the device ---

    def fill(self) -> None:
        """Start the next requests in the free slots."""
        started = []
        for s in (s for s, a in enumerate(self.attempt_by_slot) if a is None):
            if not self.queue:
                break
            index, request = self.queue.popleft()
            start = len(request.prompt)
            self.attempt_by_slot[s] = Attempt(
                index=index,
                request=request,
                playing=Playing(self.environment, request.task, self.completer.observe),
                limit=min(start + self.completer.max_tokens, self.sampler.length),
                length=start,
                turn=start,
                thinking=self.completer.thinking is not None,
                slot=s,
            )
            started.append(self.attempt_by_slot[s])
        S, T, R = len(self.attempt_by_slot), self.sampler.length, self.sampler.prompt_rows
        copies = [a for a in started if self.rows.enter(a, S, self.prompts.starts(a))]
        self.resize()
        if not started:
            return
        for prefilled, placed in self.prompts.of(copies, self.queue):
            own_S, prompt_R = np.full(S, -1, np.int32), np.full(R, -1, np.int32)
            for a, row in placed:
                into, at = (own_S, a.slot) if a.prompt_row < 0 else (prompt_R, a.prompt_row)
                into[at] = row
            self.slots = self.sampler.copy_prompts(self.slots, prefilled, own_S, prompt_R)
        start_S, tokens_ST, prompt_S = np.zeros(S, bool), np.zeros((S, T), np.int32), np.full(S, -1, np.int32)
        length_S, limit_S = np.ones(S, np.int32), np.ones(S, np.int32)
        key_S = np.zeros((S, *self.key_R.shape[1:]), self.key_R.dtype)
        for a in started:
            start_S[a.slot], tokens_ST[a.slot, : a.length], key_S[a.slot] = True, a.request.prompt, self.key_R[a.index]
            length_S[a.slot], limit_S[a.slot], prompt_S[a.slot] = a.length, self.next_limit(a), a.prompt_row
        begun = (start_S, tokens_ST, length_S, limit_S, key_S, prompt_S, self.rows.tokens_R.copy())
        self.slots = self.sampler.start_rollouts(self.slots, *begun)

    def next_limit(self, attempt: Attempt) -> int:
        """Return the length of an attempt's next stop: its limit or its thinking
        budget.
        """
        budget = len(attempt.request.prompt) + self.completer.thinking.tokens if attempt.thinking else attempt.limit
        return min(budget, attempt.limit)

    def append_tokens(self, said: list[tuple[Attempt, list[int]]], author: str) -> None:
        """Append tokens to attempts, which may have been cut back; continue them.

        `author` is their letter in `Rollout.author`.
        """
        if not said:
            return
        S, T = len(self.attempt_by_slot), self.sampler.length
        start_S, count_S, limit_S = np.full(S, -1, np.int32), np.zeros(S, np.int32), np.zeros(S, np.int32)
        tokens_ST = np.zeros((S, T), np.int32)
        for attempt, ids in said:
            s, ids = attempt.slot, ids[: attempt.limit - attempt.length]
            start_S[s], count_S[s], tokens_ST[s, : len(ids)] = attempt.length, len(ids), ids
            attempt.appended.append((attempt.length, attempt.length + len(ids), author))
            attempt.length += len(ids)
            limit_S[s] = max(self.next_limit(attempt), attempt.length)
        self.resize()
        self.slots = self.sampler.append_tokens(self.weights, self.slots, start_S, tokens_ST, count_S, limit_S)

    def resize(self) -> None:
        """Resize the cache for the next chunk, one bucket at a time."""
        chunk, buckets = self.sampler.chunk_tokens, self.sampler.buckets
        ends = [(a, a.length if a.waits else min(a.length + chunk, a.limit)) for a in self.attempt_by_slot if a is not None]
        if not ends:
            return
        needed = max(a.cache_length(end) for a, end in ends)
        wanted = next(i for i, cache_length in enumerate(buckets) if cache_length >= needed)
        while (now := buckets.index(self.cache_length)) != wanted:
            self.cache_length = buckets[now + (1 if wanted > now else -1)]
            self.slots = self.sampler.resize(self.slots, self.cache_length)

    def compact(self) -> None:
        """Continue with fewer slots if no request waits and few rollouts run.

        Each rollout stays on its device, which has its prompt.
        """
        S, D = len(self.attempt_by_slot), self.sampler.devices
        on = [range(d * S // D, (d + 1) * S // D) for d in range(D)]
        most = max(sum(self.attempt_by_slot[s] is not None for s in slots) for slots in on)
        size = min(n for n in self.sampler.sizes if n // D >= most)
        if self.queue or size >= S or not most:
            return
        kept = [sorted(slots, key=lambda s: self.attempt_by_slot[s] is None)[: size // D] for slots in on]
        rows = list(itertools.chain(*kept))
        self.slots = self.sampler.compact(self.slots, np.array(rows, np.int32))
        self.attempt_by_slot = [self.attempt_by_slot[s] for s in rows]
        for s, attempt in enumerate(self.attempt_by_slot):
            if attempt is not None:
                attempt.slot = s

    def decode(self) -> None:
        """Decode a chunk.

        Hand finished texts to their environments; force the end of thinking where it is
        due.
        """
        running = self.running()
        if not running:
            return
        self.slots = self.sampler.decode(self.weights, self.slots, np.float32(self.temperature), self.filter)
        stop_S, length_S = jax.device_get((self.slots.stop_S, self.slots.length_S))
        self.slot_steps += len(self.attempt_by_slot) * int(max(length_S[a.slot] - a.length for a in running))
        if not self.stops and all(stop_S[a.slot] == RUNNING for a in running):
            for a in running:
                a.length = int(length_S[a.slot])
            return
        slots = self.slots
        written = Written(*jax.device_get((slots.tokens_ST, slots.logp_ST, slots.sampled_ST, slots.logp_temperature_1_ST)))
        halted_S, said = np.zeros(len(self.attempt_by_slot), bool), []
        for a in running:
            tokens_T = written.tokens_ST[a.slot]
            a.length, a.stop = ended(self.completer, self.stops, a, tokens_T, int(length_S[a.slot]), int(stop_S[a.slot]))
            halted_S[a.slot] = a.stop == "stop"
            if not a.stop:
                continue
            if (ids := end_of_thinking(self.completer, a, tokens_T)) is not None:
                said.append((a, ids))
                continue
            a.rollout = to_rollout(self.completer, a, written, self.temperature)
            begun = len(a.request.prompt)
            text = a.rollout.text if a.turn == begun else text_of(self.completer, tokens_T[a.turn : a.length])
            self.ask(a, Turn(text, a.stop, final=a.length >= a.limit, tokens=sampled(a.rollout)))
        if halted_S.any():
            self.slots = self.sampler.stop_slots(self.slots, halted_S)
        self.append_tokens(said, author="f")


def timed(answer: Callable, verdict_s: list[float]) -> Callable:
    """Return `Playing.answer` that also appends the seconds of each verdict to
    `verdict_s`. A thread may do so while others do.
    """

    def call(playing, turn):
        started_s = time.perf_counter()
        step, ids = answer(playing, turn)
        if step.verdict is not None:
            verdict_s.append(time.perf_counter() - started_s)
        return step, ids

    return call


class Written(NamedTuple):
    """Host copy of the slots' per-token arrays."""

    tokens_ST: np.ndarray
    logp_ST: np.ndarray
    sampled_ST: np.ndarray
    logp_temperature_1_ST: np.ndarray | None


def ended(
    completer: Completer, stops: Sequence[Stop], attempt: Attempt, tokens_T: np.ndarray, length: int, stop: int
) -> tuple[int, str]:
    """Return an attempt's length after a chunk, and why it stopped or "" if it runs.

    A stop cuts the attempt back.
    """
    end = find_stop(completer, stops, tokens_T, attempt.turn, attempt.length, length)
    if end is not None:
        return end, "stop"
    return length, "" if stop == RUNNING else STOPS[stop]


def end_of_thinking(completer: Completer, attempt: Attempt, tokens_T: np.ndarray) -> Sequence[int] | None:
    """Return the tokens to append to an attempt that has spent its thinking budget.

    They are empty if the model has ended its thinking. Return None if the attempt has
    ended.
    """
    if attempt.stop != "limit" or not attempt.thinking:
        return None
    attempt.thinking = False
    if attempt.length >= attempt.limit:
        return None
    start, tokens = len(attempt.request.prompt), tokens_T[: attempt.length]
    own = np.ones(len(tokens), bool)
    for begin, end, author in attempt.appended:
        own[begin:end] = author != "t"  # a result may say anything
    has_ended = completer.thinking.end.strip() in text_of(completer, tokens[start:][own[start:]])
    return [] if has_ended else completer.thinking.ids


def sampled(rollout: Rollout) -> int:
    """Count the tokens that the model sampled, without the forced ones."""
    return int(rollout.sampled.sum())


def to_rollout(completer: Completer, attempt: Attempt, written: Written, temperature: float) -> Rollout:
    """Make the rollout of an ended attempt, without a verdict."""
    request, s = attempt.request, attempt.slot
    completion = slice(len(request.prompt), attempt.length)
    return Rollout(
        task=request.task,
        problem=request.problem,
        attempt=request.attempt,
        prompt=np.asarray(request.prompt, np.int32),
        tokens=written.tokens_ST[s, completion].copy(),
        logp=written.logp_ST[s, completion].copy(),
        logp_temperature_1=None if written.logp_temperature_1_ST is None else written.logp_temperature_1_ST[s, completion].copy(),
        sampled=written.sampled_ST[s, completion].copy(),
        stop=attempt.stop,
        text=text_of(completer, written.tokens_ST[s, completion]),
        verdict=None,
        temperature=temperature,
        author=authors(len(request.prompt), attempt),
    )


def authors(start: int, attempt: Attempt) -> str:
    """Return a letter per token of a completion (see `Rollout.author`)."""
    letters = ["m"] * (attempt.length - start)
    for begin, end, author in attempt.appended:
        letters[begin - start : end - start] = author * (end - begin)
    return "".join(letters)


class PromptRows:
    """Rows of shared prompts: the problem of each, and how many slots continue it."""

    def __init__(self, sampler: Sampler):
        self.devices = sampler.devices
        self.problem: list[int | None] = [None] * sampler.prompt_rows
        self.members = [0] * sampler.prompt_rows
        self.tokens_R = np.zeros(sampler.prompt_rows, np.int32)  # tokens in each row: its prompt without the last token

    def enter(self, attempt: Attempt, slots: int, left: int) -> bool:
        """Choose an attempt's prompt row; return whether its prompt must be copied.

        It is copied to that row or, if no row is chosen, to the slot itself. `slots` is
        the number of slots; `left` is the number of attempts at the problem that have
        not started, this one included.
        """
        request, R = attempt.request, len(self.problem)
        device = attempt.slot * self.devices // slots
        mine = range(device * R // self.devices, (device + 1) * R // self.devices)
        row = next((r for r in mine if self.problem[r] == request.problem and self.members[r] < MAX_SLOTS_PER_PROMPT), -1)
        found = row >= 0
        if not found and left > 1:
            row = next((r for r in mine if not self.members[r]), -1)
        if row >= 0:
            self.problem[row], self.tokens_R[row] = request.problem, len(request.prompt) - 1
            self.members[row] += 1
        attempt.prompt_row = row
        return not found

    def leave(self, row: int) -> None:
        if row >= 0:
            self.members[row] -= 1


class Prompts:
    """Prefilled prompts, some made ahead, kept until their attempts have started."""

    def __init__(self, completer: Completer, weights: Weights, requests: Sequence[Request]):
        self.completer, self.weights, self.tokens = completer, weights, 0
        self.left = collections.Counter(r.problem for r in requests)
        self.ready: dict[int, tuple[Any, int]] = {}  # problem -> a prefilled cache and the row of its prompt

    def starts(self, attempt: Attempt) -> int:
        """Count an attempt as started; return how many at its problem were left.

        The count includes this attempt.
        """
        self.left[attempt.request.problem] -= 1
        return self.left[attempt.request.problem] + 1

    def of(self, attempts: Sequence[Attempt], queue: Iterable) -> list[tuple[Any, list[tuple[Attempt, int]]]]:
        """Return prefilled caches, each with its attempts and their rows in it."""
        found: dict[int, tuple[Any, list]] = {}
        for i, attempt in enumerate(attempts):
            problem = attempt.request.problem
            if problem not in self.ready:
                coming = itertools.chain((a.request for a in attempts[i:]), (request for _, request in queue))
                self.prefill(coming)
            prefilled, row = self.ready[problem]
            found.setdefault(id(prefilled), (prefilled, []))[1].append((attempt, row))
        self.ready = {problem: where for problem, where in self.ready.items() if self.left[problem]}
        return list(found.values())

    def prefill(self, coming: Iterable[Request]) -> None:
        """Prefill the first of these prompts that are not ready, for one call."""
        P, prompts = self.completer.rows, {}
        for request in coming:
            if len(prompts) == P:
                break
            if request.problem not in self.ready:
                prompts[request.problem] = request.prompt
        T = next(t for t in self.completer.prompt_buckets if t >= max(map(len, prompts.values())))
        tokens_PT, length_P = np.zeros((P, T), np.int32), np.ones(P, np.int32)
        for row, prompt in enumerate(prompts.values()):
            tokens_PT[row, : len(prompt)], length_P[row] = prompt, len(prompt)
        prefilled = self.completer.sampler.prefill(self.weights, tokens_PT, length_P)
        self.ready |= {problem: (prefilled, row) for row, problem in enumerate(prompts)}
        self.tokens += sum(map(len, prompts.values()))
