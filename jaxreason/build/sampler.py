"""Build the sampler and the text handling around it: a `Completer`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from jaxreason import batching, rollout, sharding, text
from jaxreason.draw import Filter
from jaxreason.model import ModelConfig
from jaxreason.model.config import count_parameters
from jaxreason.options import unknown_name_message
from jaxreason.platforms import platform_of
from jaxreason.rollout import Budget, Completer
from jaxreason.sampler import MAX_SLOTS_PER_PROMPT, cache_buckets, compile_sampler


def make_completer(
    *,
    model,
    tokenizer: text.Tokenizer,
    format: text.Format,
    mesh,
    processes: int,
    slots: int,  # sequences that are decoded at once, on all processes together
    max_prompt_tokens: int,  # longer prompts are dropped, and counted
    max_tokens: int,  # of a completion
    chunk_tokens: int = 16,  # decoded between two looks at which slots have finished
    cache_dtype: str | None = None,  # of keys and values: float32, bfloat16, int8; None: that of the model
    prompts_per_prefill: int = 8,  # prompts in one prefill call
    prefill_tokens: int | None = None,  # tokens of a prompt in one prefill call; None: by the platform
    prompt_rows: int | None = None,  # prompts that attempts share, per process; 0: each attempt has a copy; None: by size
    stop_strings: Sequence[str] = (),  # texts that end a turn, and stay in it
    thinking_tokens: int | None = None,  # after which the end of thinking is forced; None: never
    end_of_thinking: str = "\n</think>\n\n",  # the text that is forced
    logp_temperature_1: bool = False,  # also keep log-probs at temperature 1
) -> Completer:
    """Compile-to-be sampler of `slots` sequences of at most `max_prompt_tokens` +
    `max_tokens` tokens, and the text around it. The slots are those of all processes
    together, and the mesh is that of one. On a CPU a small model is fastest with so few
    that their keys and values stay in the processor's caches.

    A turn ends with any of `stop_strings`, which stays in its text. After
    `thinking_tokens` tokens of a completion `end_of_thinking` is forced, unless it was
    written. `cache_dtype` is that of the model, or float32, bfloat16 or int8. Attempts
    at a problem share its prompt in one of `prompt_rows` rows of a process; 0: each has
    a copy; None: by their size.
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
        # A quarter for the stragglers, where that is worth another program to compile.
        sizes=(slots // 4,) if slots >= 32 and slots // 4 % devices == 0 else (),
        prompt_rows=prompt_rows,
        prompt_columns=max_prompt_tokens,
        cache_dtype=cache_dtype,
        logp_temperature_1=logp_temperature_1,
        mesh=mesh,
    )
    return Completer(
        sampler=sampler,
        encode=format.forced,
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
    return Budget(tokens, end, tuple(tokenizer.encode(end, continues=True)))


def prompt_rows_for(slots: int, longest_prompt: int, mesh) -> int:
    """Choose the number of prompts that the slots of a process share, if the config
    leaves it open.
    """
    if longest_prompt < platform_of(mesh).share_prompts_from:
        return 0
    devices = sharding.row_devices(mesh)
    # Twice as many as full slots need, since the last attempts of a group are beside
    # those of other problems; none where a few slots are alone.
    return 2 * slots // MAX_SLOTS_PER_PROMPT // devices * devices


def buckets_for(shape: ModelConfig, slots: int, length: int, completion: int, prompt_rows: int, mesh) -> list[int]:
    """The lengths of the cache that decode steps are compiled for."""
    smallest = length if shape.attention == "cudnn" else 128  # that kernel reads only the tokens that are there
    # Finely stepped where a decode step reads more of the cache than of the weights;
    # but each length is a program, and takes long to compile on accelerators.
    cached = 2 * shape.layers * shape.kv_heads * shape.head_size * slots * length
    fine = platform_of(mesh).fine_buckets and cached > count_parameters(shape)
    # An attempt that continues a shared prompt takes room for its completion alone.
    shared = [completion] if prompt_rows and length > smallest else []
    return sorted({*cache_buckets(length, smallest, fine), *shared})


def warm_up(completer: Completer, filters: Sequence[Filter], params) -> None:
    """Compile the sampler for all lengths."""
    # Every verifier judges a turn at once, so only the end of thinking is ever forced.
    rollout.warm_up(completer, completer.sampler.prepare(params), filters, appends_tokens=completer.thinking is not None)


def make_filter(top_k: int, top_p: float, min_p: float, where: str) -> Filter:
    """Check the fields of a filter and make it."""
    if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p < 1:
        raise ValueError(
            f"{where} got top_k={top_k}, top_p={top_p}, min_p={min_p}; allowed: top_k 0 (all) or more, top_p above 0 and at "
            "most 1, min_p from 0 to below 1"
        )
    return Filter(top_k, top_p, min_p)
