"""Build the `Completer`: the sampler and its text handling."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxreason import batching, rollout, sharding, text
from jaxreason.cost import layer_weights
from jaxreason.draw import Filter
from jaxreason.environment import Environment
from jaxreason.model import Model, ModelConfig
from jaxreason.model.config import count_parameters
from jaxreason.options import unknown_name_message
from jaxreason.platforms import platform_of
from jaxreason.rollout import Budget, Completer
from jaxreason.runtime.ledger import Decoding
from jaxreason.sampler import MAX_SLOTS_PER_PROMPT, Sampler, cache_buckets, compile_sampler


def make_completer(
    *,
    model,
    tokenizer: text.Tokenizer,
    format: text.Format,
    mesh,
    processes: int,
    slots: int,  # sequences decoded at the same time, on all processes together
    max_prompt_tokens: int,  # tokens per prompt, at most; longer prompts are dropped and counted
    max_tokens: int,  # tokens per completion, at most
    chunk_tokens: int = 16,  # tokens decoded between two checks for finished slots
    cache_dtype: str | None = None,  # dtype of keys and values: float32, bfloat16, int8; None: the model's
    prompts_per_prefill: int = 8,  # prompts in one prefill call
    prefill_tokens: int | None = None,  # prompt tokens processed at one time in prefill; None: by the platform
    prompt_rows: int | None = None,  # shared prompts per process; 0: each attempt has a copy; None: by size
    stop_strings: Sequence[str] = (),  # texts that end a turn and remain in it
    thinking_tokens: int | None = None,  # tokens after which the end of thinking is forced; None: never
    end_of_thinking: str = "\n</think>\n\n",  # text that is forced
    logp_temperature_1: bool = False,  # also keep log-probs at temperature 1
) -> Completer:
    """Make the sampler of `slots` sequences of at most `max_prompt_tokens` +
    `max_tokens` tokens, with its text handling.

    `slots` counts those of all processes; `mesh` is that of one process. On a CPU a
    small model is fastest with so few slots that their keys and values fit in the
    processor's caches. The end of thinking is not forced if the model has written it.
    """
    positive = {
        "slots": slots,
        "max_prompt_tokens": max_prompt_tokens,
        "max_tokens": max_tokens,
        "chunk_tokens": chunk_tokens,
        "prefill_tokens": prefill_tokens,
        "prompts_per_prefill": prompts_per_prefill,
    }
    check_fields(positive, prompt_rows, cache_dtype, stop_strings)
    thinking = thinking_budget(tokenizer, thinking_tokens, end_of_thinking)
    if slots % processes:
        raise ValueError(f"config.sampler.slots got {slots}, which do not divide over {processes} processes")
    slots //= processes
    length, devices = max_prompt_tokens + max_tokens, sharding.row_devices(mesh)
    if prompt_rows is None:
        prompt_rows = prompt_rows_for(slots, max_prompt_tokens, mesh)
    sampler = compile_sampler(
        model,
        slots=slots,
        length=length,
        eos_ids=tokenizer.eos_ids,
        chunk_tokens=chunk_tokens,
        prefill_tokens=prefill_tokens,
        buckets=buckets_for(model.config, slots, length, max_tokens, prompt_rows, mesh),
        # Compact to a quarter for the last rollouts, if worth another program.
        sizes=(slots // 4,) if slots >= 32 and slots // 4 % devices == 0 else (),
        prompt_rows=prompt_rows,
        prompt_length=max_prompt_tokens,
        cache_dtype=cache_dtype,
        logp_temperature_1=logp_temperature_1,
        mesh=mesh,
    )
    return Completer(
        sampler=sampler,
        observe=format.observe,
        decode=functools.partial(tokenizer.decode, continues=True),
        eos_ids=tokenizer.eos_ids,
        prompt_buckets=batching.length_buckets(max_prompt_tokens, count=2 if max_prompt_tokens > 64 else 1),
        rows=min(prompts_per_prefill, slots),
        max_tokens=max_tokens,
        stop_strings=tuple(stop_strings),
        thinking=thinking,
    )


CACHE_DTYPES = (None, "float32", "bfloat16", "int8")


def check_fields(
    positive: Mapping[str, int | None], prompt_rows: int | None, cache_dtype: str | None, stop_strings: Sequence[str]
) -> None:
    """Raise ValueError for a field of the sampler's section that is out of range."""
    for name, value in positive.items():
        if value is not None and value < 1:
            raise ValueError(f"config.sampler.{name} got {value}; allowed: 1 or more")
    if prompt_rows is not None and prompt_rows < 0:
        raise ValueError(f"config.sampler.prompt_rows got {prompt_rows}; allowed: 0 or more")
    if cache_dtype not in CACHE_DTYPES:
        raise ValueError(unknown_name_message("config.sampler.cache_dtype", cache_dtype, map(str, CACHE_DTYPES)))
    if isinstance(stop_strings, str) or not all(isinstance(s, str) and s for s in stop_strings):
        raise ValueError(f"config.sampler.stop_strings got {stop_strings!r}; allowed: a tuple of texts, none of them empty")


def thinking_budget(tokenizer: text.Tokenizer, tokens: int | None, end: str) -> Budget | None:
    if tokens is None:
        return None
    if tokens < 1 or not end.strip():
        raise ValueError(
            f"config.sampler got thinking_tokens={tokens}, end_of_thinking={end!r}; allowed: 1 or more, and a text that is more "
            "than white space"
        )
    try:
        return Budget(tokens, end, tuple(tokenizer.encode(end, continues=True)))
    except ValueError as error:
        raise ValueError(
            f"config.sampler.end_of_thinking got {end!r}, but {error}; allowed: a text that the model can write (of an "
            "evaluation: --end_of_thinking)"
        ) from None


def prompt_rows_for(slots: int, longest_prompt: int, mesh) -> int:
    """Choose the number of prompts that the slots of a process share."""
    if longest_prompt < platform_of(mesh).share_prompts_from:
        return 0
    devices = sharding.row_devices(mesh)
    # Twice as many as the slots need, since the last attempts of a group run beside
    # those of other problems; 0 if there are only a few slots.
    return 2 * slots // MAX_SLOTS_PER_PROMPT // devices * devices


def buckets_for(shape: ModelConfig, slots: int, length: int, completion: int, prompt_rows: int, mesh) -> list[int]:
    """Return the cache lengths that decode steps are compiled for."""
    smallest = length if shape.attention == "cudnn" else 128  # cudnn reads only the tokens that exist
    # Use fine steps if a decode step reads more of the cache than of the weights, but
    # not on accelerators, where the program of each length takes long to compile.
    cached = 2 * shape.layers * shape.kv_heads * shape.head_size * slots * length
    fine = platform_of(mesh).fine_buckets and cached > count_parameters(shape)
    # An attempt with a shared prompt needs cache only for its completion.
    shared = [completion] if prompt_rows and length > smallest else []
    return sorted({*cache_buckets(length, smallest, fine), *shared})


def decoding_of(model: Model, sampler: Sampler, cache_dtype: str | None) -> Decoding:
    """Return how a sampler reads memory. Each device that slots are split over reads
    all weights, or its part of them with tensor parallelism.
    """
    c, positions = model.config, 8
    cache = jax.tree.leaves(jax.eval_shape(lambda: model.init_cache(1, positions, cache_dtype)))
    return Decoding(
        slots=sampler.slots / sampler.devices,
        weight_bytes=jnp.dtype(c.dtype).itemsize * c.layers * layer_weights(c)
        + jnp.dtype(c.head_dtype or c.dtype).itemsize * c.width * c.vocab_size,
        position_bytes=sum(x.size * x.dtype.itemsize for x in cache) / positions,
        shares_prompts=sampler.prompt_rows > 0,
    )


def warm_up(completer: Completer, filters: Sequence[Filter], environments: Sequence[Environment], params) -> None:
    """Compile the sampler for all lengths, and for what the environments do."""
    appends = completer.thinking is not None or not all(environment.one_turn for environment in environments)
    stops = any(environment.stops for environment in environments)
    rollout.warm_up(completer, completer.sampler.prepare(params), filters, appends_tokens=appends, stops_slots=stops)


def make_filter(top_k: int, top_p: float, min_p: float, where: str) -> Filter:
    """Check the fields of a filter and make it."""
    if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p < 1:
        raise ValueError(
            f"{where} got top_k={top_k}, top_p={top_p}, min_p={min_p}; allowed: top_k 0 (all) or more, top_p above 0 and at "
            "most 1, min_p from 0 to below 1"
        )
    return Filter(top_k, top_p, min_p)
