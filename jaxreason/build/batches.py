"""Sizes of batches: rows, their length, attempts behind a prompt, micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from jaxreason.cost import attempts_behind_a_prompt, shared_length
from jaxreason.model import ModelConfig
from jaxreason.model.config import count_parameters
from jaxreason.platforms import Platform, cache_bytes

MOST_ATTEMPTS = 2**20  # attempts per problem, at most


def choose_rollouts_per_prompt(
    asked: int | None, shape: ModelConfig, *, group: int, rows: int, multiple: int, longest_prompt: int, completion: int
) -> int:
    """Choose the number of attempts at a problem that follow one copy of its prompt.

    None asks for the number with the least work, for a typical prompt of half the
    longest one and the longest `completion`. The number of rows must stay a multiple of
    `multiple`: devices x micro-batches.
    """
    if not 1 <= group <= MOST_ATTEMPTS:
        raise ValueError(f"source.group got {group}; allowed: 1 to {MOST_ATTEMPTS:,}")
    alone = shape.attention != "xla"  # other kernels support segments, but not branches of a segment
    if asked is None:
        choices = [n for n in range(1, group + 1) if group % n == 0 and rows // n % multiple == 0]
        return 1 if alone else attempts_behind_a_prompt(shape, choices or [1], longest_prompt // 2, completion)
    if asked < 1 or group % asked:
        raise ValueError(f"source.rollouts_per_prompt got {asked}; allowed: a divisor of group={group}, or None to choose")
    if asked > 1 and alone:
        raise ValueError(
            f"source.rollouts_per_prompt got {asked} with attention={shape.attention!r}; allowed: 1, or attention='xla'"
        )
    return asked


class BatchSize(NamedTuple):
    """Size of the batches of a source."""

    rows: int
    length: int  # tokens per row, at most


class Attempts(NamedTuple):
    """Limits of the sampler, in tokens."""

    completion: int
    prompt: int


def batch_size(source: dict, shape: ModelConfig, limits: Attempts, multiple: int) -> BatchSize | None:
    """Return the size of the batches of a source's section; None if only the source
    knows it, or the section lacks a field.

    The number of rows of attempts is a multiple of `multiple`, where that is possible.
    """
    name, given = source.get("name"), source.get
    if name == "corpus" and given("rows") and given("length"):
        return BatchSize(source["rows"], source["length"])
    if name == "demonstrations" and given("rows") and given("max_tokens"):
        return BatchSize(source["rows"], source["max_tokens"])
    if name not in ("rollouts", "kept_rollouts") or not given("problems") or not given("group"):
        return None
    completion, rows = given("max_tokens") or limits.completion, source["problems"] * source["group"]
    sizes = {"group": source["group"], "rows": rows, "multiple": multiple, "longest_prompt": limits.prompt}
    asked = 1 if name == "kept_rollouts" else given("rollouts_per_prompt")
    share = choose_rollouts_per_prompt(asked, shape, **sizes, completion=completion)
    return BatchSize(rows // share, shared_length(limits.prompt, [completion] * share))


def choose_microbatches(sources: Iterable[dict], shape: ModelConfig, limits: Attempts, devices: int, platform: Platform) -> int:
    """Choose the number of micro-batches for a batch with a part from each of `sources`
    (sections of a config): the divisor of the rows of all parts with which a device
    computes about `tokens_at_once` tokens. It is 1 if a source does not say its size,
    or says one that can't be.
    """
    try:
        found = [batch_size(source, shape, limits, devices) for source in sources]
    except ValueError:  # making the source says it too, with the name of the part
        return 1
    if not found or not all(found) or any(size.length < 1 or size.rows < 1 or size.rows % devices for size in found):
        return 1  # making the source says what is wrong with its size
    rows = math.gcd(*(size.rows for size in found)) // devices
    tokens = sum(size.rows * size.length for size in found) / devices
    wanted = tokens / tokens_at_once(shape, platform)
    return min(divisors(rows), key=lambda n: abs(math.log(n / wanted)))


def divisors(number: int) -> list[int]:
    """Return all divisors, in about sqrt(number) steps."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def tokens_at_once(shape: ModelConfig, platform: Platform) -> int:
    """Return the number of tokens that a device trains on fastest at a time.

    On a CPU the arrays of one layer should take a sixth of the cache
    (jaxreason/bench/README.md). A micro-batch reads the params once and adds a gradient
    to another once: 16 bytes per parameter, which may be a quarter of what its tokens
    would move through memory without a cache.
    """
    if platform.tokens_at_once is not None:
        return platform.tokens_at_once
    layer = 4 * (8 * shape.width + 4 * shape.feed_forward)  # bytes of the arrays of a layer per token, float32
    return max(cache_bytes() // (6 * layer), 4 * 16 * count_parameters(shape) // (3 * shape.layers * layer))
