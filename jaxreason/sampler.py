"""The sampler: slots of fixed shape that are filled with prompts, decoded together and
refilled as they finish.

    empty()                        make slots without a rollout
    prefill(weights, prompts)      compute keys and values of prompts, each once
    copy_prompts(slots, ...)       copy them to where slots read them
    start_rollouts(slots, ...)     begin an attempt in some slots
    decode(weights, slots, ...)    sample up to `chunk_tokens` tokens in every running
                                   slot, in one dispatch
    append_tokens(weights, ...)    append tokens that the model did not sample (tool
                                   output); they are never trained on
    stop_slots, resize, compact    end attempts, change the cache's length, keep fewer
                                   slots
    prepare(params)                lay params out for sampling

Shared prompts have rows of their own (`prompts`), and up to `MAX_SLOTS_PER_PROMPT`
slots continue one row: a decode step reads it once for all of them. If no row is free,
or no other attempt shares the prompt, the prompt is copied to the front of the slot's
own cache.

Invariant of a running slot: prompt and cache hold the keys and values of all its tokens
but the last. A decode step feeds the last token, writes its keys and values, and
samples the next token. Cache positions past a slot's length hold old values that no
token attends to.

The cache has as many positions as the longest rollout in it needs, rounded up to one of
a few sizes (`buckets`), so early tokens do not pay for attention over the full length.
All shapes are fixed within a bucket, and each program is compiled once per bucket.

The noise of a sample depends only on the caller's key of the attempt and the position
in the sequence. Up to rounding, a rollout is therefore the same in any slot, beside any
neighbours, for any chunk size, bucket and mesh, with a shared prompt or its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason import sharding
from jaxreason.draw import ALL, Filter, sample, uniforms
from jaxreason.model import Model
from jaxreason.model import cache as kv
from jaxreason.platforms import platform_of

RUNNING, EOS, LIMIT, EMPTY = range(4)
STOPS = {EOS: "eos", LIMIT: "limit"}
APPENDED_AT_ONCE = 32  # forced tokens fed per forward pass
MAX_SLOTS_PER_PROMPT = 8  # slots that continue one prompt row, at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """State of the sampler.

    Row s of every array is slot s; T is the longest sequence, whatever the cache's
    bucket.
    """

    cache: Any
    prompts: Any  # a cache of R prompt rows; None: every slot has its prompt in its own cache
    prompt_tokens_R: jax.Array  # int32, tokens in each prompt row: a prompt without its last token
    prompt_S: jax.Array  # int32, prompt row that a slot continues; negative: none
    tokens_ST: jax.Array  # int32: prompt, then completion
    logp_ST: jax.Array  # float32, of the sampled token at that position, under the sampling distribution; 0 elsewhere
    logp_temperature_1_ST: jax.Array | None  # float32, the same at temperature 1, unfiltered; None unless asked for
    sampled_ST: jax.Array  # bool, False for prompt and forced tokens
    length_S: jax.Array  # int32, tokens so far, prompt included
    limit_S: jax.Array  # int32, length at which the slot stops
    stop_S: jax.Array  # int32, RUNNING, EOS, LIMIT or EMPTY
    key_S: jax.Array  # uint32, key data of the slot's attempt


class Weights(NamedTuple):
    """Params as sampling reads them; the same arrays if one layout suits both."""

    prefill: Any
    decode: Any


class Sampler(NamedTuple):
    """Functions over `Slots`, and the sizes they are compiled for.

    A function consumes the slots that it is given (some functions donate them).
    """

    sizes: tuple[int, ...]  # numbers of slots, falling; `compact` moves the last rollouts of a collection to fewer slots
    length: int  # tokens per sequence, prompt included, at most
    buckets: tuple[int, ...]  # lengths that the cache may have
    chunk_tokens: int
    prompt_rows: int  # number of shared prompts
    devices: int  # devices that slots and prompts are split over, in order; a slot continues a prompt on its own device
    empty: Callable
    prepare: Callable
    prefill: Callable
    copy_prompts: Callable
    start_rollouts: Callable
    decode: Callable
    append_tokens: Callable
    stop_slots: Callable
    resize: Callable
    compact: Callable

    @property
    def slots(self) -> int:
        return self.sizes[0]


def attempt_keys(key, problem_R, attempt_R):
    """Make the key data of each (problem, attempt).

    `key` is derived from (seed, phase, step).
    """
    fold = jax.random.fold_in
    return jax.vmap(lambda p, a: jax.random.key_data(fold(fold(key, p), a)))(problem_R, attempt_R)


attempt_keys = jax.jit(attempt_keys)


class Spec(NamedTuple):
    """Sizes and choices that a sampler is compiled for."""

    model: Model
    slots: int
    length: int
    buckets: tuple[int, ...]
    eos_ids: tuple[int, ...]
    chunk_tokens: int
    prefill_tokens: int
    prompt_rows: int
    prompt_length: int
    cache_dtype: Any
    logp_temperature_1: bool
    mesh: Any

    @property
    def devices(self) -> int:
        """The number of devices that slots and prompts are split over."""
        return 1 if self.mesh is None else sharding.row_devices(self.mesh)


def cache_buckets(length: int, smallest: int = 128, fine: bool = False) -> tuple[int, ...]:
    """Return the lengths that a cache may have: from `smallest`, doubling up to
    `length`.

    The last step grows by at least a quarter. If `fine`, start at half of `smallest`
    and put one more length between any two.
    """
    sizes = [smallest << i for i in range(length.bit_length())]
    if fine:
        sizes = [part for size in sizes for part in (size // 2, size * 3 // 4)]
    return (*(size for size in sizes if size * 1.25 <= length), length)


def compile_sampler(
    model: Model,
    *,
    slots: int,
    length: int,
    eos_ids: tuple[int, ...],
    chunk_tokens: int = 16,
    prefill_tokens: int | None = None,
    buckets: Sequence[int] | None = None,
    sizes: Sequence[int] = (),
    prompt_rows: int = 0,
    prompt_length: int | None = None,
    cache_dtype=None,
    logp_temperature_1: bool = False,
    mesh=None,
) -> Sampler:
    """Make the jitted sampler of `slots` sequences of at most `length` tokens, prompt
    included.

    Prefill processes `prefill_tokens` tokens at a time on a device, of one prompt or of
    several short ones; None means 128 on a CPU, where more is no faster, and 1024
    elsewhere. `buckets` are the lengths of the cache, the last of them `length`; None
    means `cache_buckets(length)`. `sizes` are smaller numbers of slots, used when few
    rollouts are left. Slots may share their prompts in `prompt_rows` rows of
    `prompt_length` positions (None: `length`). With a mesh, slots and prompts are
    split over its `data` and `fsdp` axes, heads and weights over `tensor`; `prepare`
    gathers weights over `fsdp`.

    Raises:
      ValueError: slots, prompts, heads or buckets that do not fit.
    """
    buckets, sizes = tuple(buckets or cache_buckets(length)), (slots, *sizes)
    if prefill_tokens is None:
        prefill_tokens = platform_of().prefill_tokens
    options = (chunk_tokens, prefill_tokens, prompt_rows, prompt_length or length, cache_dtype, logp_temperature_1, mesh)
    spec = Spec(model, slots, length, buckets, tuple(eos_ids), *options)
    check(spec, sizes)
    placed, moves = placement(spec), compile_moves(spec)
    return Sampler(
        sizes=sizes,
        length=length,
        buckets=buckets,
        chunk_tokens=chunk_tokens,
        prompt_rows=prompt_rows,
        devices=spec.devices,
        empty=jax.jit(functools.partial(empty, spec), out_shardings=placed.slots),
        prepare=functools.partial(prepare, spec),
        prefill=jax.jit(functools.partial(prefill, spec), out_shardings=placed.prefilled),
        copy_prompts=functools.partial(copy_prompts, moves),
        start_rollouts=functools.partial(start_rollouts, moves),
        decode=jax.jit(functools.partial(decode, spec), donate_argnums=1, static_argnums=3, out_shardings=placed.slots),
        append_tokens=jax.jit(functools.partial(append_tokens, spec), donate_argnums=1, out_shardings=placed.slots),
        stop_slots=functools.partial(stop_slots, moves),
        resize=functools.partial(resize, moves),
        compact=functools.partial(compact, moves),
    )


def check(spec: Spec, sizes: tuple[int, ...]) -> None:
    """Raise ValueError for buckets or numbers of slots that do not fit."""
    buckets, length = spec.buckets, spec.length
    if list(buckets) != sorted(set(buckets)) or buckets[0] < 1 or buckets[-1] != length:
        raise ValueError(f"sampler got cache buckets {buckets}; allowed: rising sizes that end with its length, {length}")
    if list(sizes) != sorted(set(sizes), reverse=True) or sizes[-1] < 1:
        raise ValueError(f"sampler got {spec.slots} slots and then {sizes[1:]}; allowed: falling numbers, 1 or more")
    for size, what in [*((size, "slots") for size in sizes), (spec.prompt_rows, "rows of prompts")]:
        if size % spec.devices:
            raise ValueError(f"sampler got {size} {what}, which do not divide over {spec.devices} devices; choose a multiple")


class Placement(NamedTuple):
    """Shardings of a sampler's arrays; None without a mesh."""

    slots: Any = None
    bare: Any = None  # slots without their caches
    by_slot: Any = None
    layer: Any = None  # of one cache layer
    part: Any = None  # of prompts during prefill
    prefilled: Any = None  # of prefilled prompts, which any slot may continue


def placement(spec: Spec) -> Placement:
    """Split slots and prompts over data and fsdp, and key heads over tensor.

    Other arrays are whole on every device.
    """
    if spec.mesh is None:
        return Placement()
    whole, by_slot = jax.NamedSharding(spec.mesh, jax.P()), sharding.rows(spec.mesh)
    layer = jax.NamedSharding(spec.mesh, jax.P(*sharding.ROWS, "tensor"))
    stack = (None,) * (not spec.model.config.scan_layers)  # without a scan, prefill reads stacked params: see `prepare`
    shapes = jax.eval_shape(functools.partial(empty, spec))
    slots = dataclasses.replace(
        jax.tree.map(lambda _: by_slot, shapes),
        cache=jax.tree.map(lambda _: layer, shapes.cache),
        prompts=jax.tree.map(lambda _: layer, shapes.prompts),
        prompt_tokens_R=whole,
    )
    return Placement(
        slots=slots,
        bare=dataclasses.replace(slots, cache=None, prompts=None),
        by_slot=by_slot,
        layer=layer,
        part=part_sharding(spec),
        prefilled=jax.NamedSharding(spec.mesh, jax.P(*stack, None, "tensor")),
    )


# --- the programs: pure functions over slots ---


def empty(spec: Spec) -> Slots:
    """Make slots without a rollout."""
    model, S, T = spec.model, spec.slots, spec.length
    key_words = jax.random.key_data(jax.random.key(0)).shape
    rows = spec.prompt_rows
    return Slots(
        cache=model.init_cache(S, spec.buckets[0], spec.cache_dtype),
        prompts=model.init_cache(rows, spec.prompt_length, spec.cache_dtype) if rows else None,
        prompt_tokens_R=jnp.zeros(rows, jnp.int32),
        prompt_S=jnp.full(S, -1, jnp.int32),
        tokens_ST=jnp.zeros((S, T), jnp.int32),
        logp_ST=jnp.zeros((S, T), jnp.float32),
        logp_temperature_1_ST=jnp.zeros((S, T), jnp.float32) if spec.logp_temperature_1 else None,
        sampled_ST=jnp.zeros((S, T), bool),
        length_S=jnp.ones(S, jnp.int32),
        limit_S=jnp.ones(S, jnp.int32),
        stop_S=jnp.full(S, EMPTY, jnp.int32),
        key_S=jnp.zeros((S, *key_words), jnp.uint32),
    )


def prepare(spec: Spec, params) -> Weights:
    """Lay params out for sampling, once per update."""
    model, mesh = spec.model, spec.mesh
    params = model.cast(model.merge(params))  # cast before gathering: fewer bytes to move and to hold
    send = (lambda part: part) if mesh is None else functools.partial(sharding.send, mesh=mesh)
    layout = model.decode_layout(params, send)
    # A CPU prefills from the original layout, which it holds anyway; an accelerator
    # prefills from the decode layout, to hold only one.
    return Weights(layout if model.config.scan_layers else send(params), layout)


def prefill(spec: Spec, weights: Weights, tokens_PT, length_P):
    """Compute the keys and values of prompts, which are padded on the right.

    Rows of length 1 cost nothing.
    """
    P, T = tokens_PT.shape
    width = min(spec.prefill_tokens, T)
    # Rows computed together: the same number on each device.
    rows = -(-min(spec.prefill_tokens // width * spec.devices, P) // spec.devices) * spec.devices
    tokens_PT, length_P = jnp.pad(tokens_PT, ((0, -P % rows), (0, 0))), jnp.pad(length_P, (0, -P % rows))
    # The last token of a prompt is left out: the first decode step feeds it.
    index_PT = jnp.broadcast_to(jnp.arange(T), tokens_PT.shape)
    position_PT = jnp.where(index_PT < length_P[:, None] - 1, index_PT, -1)
    stacked = not isinstance(weights.prefill["layers"], tuple)

    def prefill_rows(i, cache):
        cut = (jax.lax.dynamic_slice_in_dim(x, i * rows, rows) for x in (tokens_PT, position_PT))
        tokens, position = (sharding.keep_rows(x, spec.mesh) for x in cut)
        part = spec.model.init_cache(rows, T, spec.cache_dtype, stacked=stacked)
        part = part if spec.mesh is None else jax.lax.with_sharding_constraint(part, part_sharding(spec))
        part = feed(spec, weights.prefill, tokens, position, part, width)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * rows, axis=int(stacked))
        return jax.tree.map(put, cache, part)

    cache = spec.model.init_cache(len(length_P), T, spec.cache_dtype, stacked=stacked)
    cache = jax.lax.fori_loop(0, len(length_P) // rows, prefill_rows, cache)
    return jax.tree.map(lambda x: x[:, :P] if stacked else x[:P], cache)


def part_sharding(spec: Spec):
    """Return the sharding of prompts during prefill."""
    stack = (None,) * (not spec.model.config.scan_layers)
    return jax.NamedSharding(spec.mesh, jax.P(*stack, *sharding.ROWS, "tensor"))


def feed(spec: Spec, params, tokens_BF, position_BF, cache, width: int, prefix=None):
    """Write the keys and values of tokens into a cache, `width` positions at a time.

    It stops after the last position that is not negative in any row.
    """
    pad = ((0, 0), (0, -tokens_BF.shape[1] % width))
    tokens_BF, position_BF = jnp.pad(tokens_BF, pad), jnp.pad(position_BF, pad, constant_values=-1)
    last = jnp.max(jnp.where(position_BF >= 0, jnp.arange(position_BF.shape[1]) + 1, 0))

    def feed_part(i, cache):
        cut = [jax.lax.dynamic_slice_in_dim(x, i * width, width, axis=1) for x in (tokens_BF, position_BF)]
        return spec.model.apply(params, *cut, cache=cache, prefix=prefix)[1]

    return jax.lax.fori_loop(0, -(-last // width), feed_part, cache)


def prefix_of(spec: Spec, slots: Slots, read_S):
    """Return the prompts that the slots `read_S` continue, for `model.apply`.

    A stopped slot still names its prompt row. It must not count among the
    `MAX_SLOTS_PER_PROMPT` of that row, or it would displace a running slot.
    """
    if slots.prompts is None:
        return None
    row_S = jnp.where(read_S, slots.prompt_S, -1)
    return kv.Prefix(slots.prompts, kv.members(row_S, slots.prompt_tokens_R, MAX_SLOTS_PER_PROMPT, spec.devices))


def decode(spec: Spec, weights: Weights, slots: Slots, temperature, filter: Filter = ALL) -> Slots:
    """Decode until `chunk_tokens` steps are done or no slot runs.

    The cache must have room for all of these tokens.
    """

    def goes_on(carry):
        step, slots = carry
        return (step < spec.chunk_tokens) & jnp.any(slots.stop_S == RUNNING)

    def advance(carry):
        step, slots = carry
        return step + 1, decode_one(spec, weights.decode, slots, prefix, u_CS2[step], temperature, filter)

    prefix = prefix_of(spec, slots, slots.stop_S == RUNNING)  # the same for all steps
    # Make the uniforms of all steps at once: a running slot advances one position per
    # step.
    step_C1 = jnp.arange(spec.chunk_tokens)[:, None]
    u_CS2 = jax.vmap(uniforms, in_axes=(None, 0))(slots.key_S, slots.length_S + step_C1)
    return jax.lax.while_loop(goes_on, advance, (0, slots))[1]


def decode_one(spec: Spec, params, slots: Slots, prefix, u_S2, temperature, filter: Filter) -> Slots:
    """Sample one token in every running slot."""
    running_S = slots.stop_S == RUNNING
    last_S1 = jnp.take_along_axis(slots.tokens_ST, slots.length_S[:, None] - 1, axis=1)
    position_S = jnp.where(running_S, slots.length_S - 1, -1)  # an idle slot writes nothing
    hidden_S1D, cache = spec.model.apply(params, last_S1, position_S[:, None], cache=slots.cache, prefix=prefix)
    logits_SV = spec.model.unembed(params, hidden_S1D[:, 0])
    token_S, logp_S = sample(logits_SV, u_S2, temperature, filter)
    position_S = jnp.where(running_S, slots.length_S, spec.length)

    def append(into_ST, value_S):
        return into_ST.at[jnp.arange(len(position_S)), position_S].set(value_S, mode="drop")

    logp_temperature_1_ST = slots.logp_temperature_1_ST
    if logp_temperature_1_ST is not None:
        logp_temperature_1_ST = append(
            logp_temperature_1_ST, jnp.take_along_axis(jax.nn.log_softmax(logits_SV), token_S[:, None], axis=1)[:, 0]
        )
    length_S = slots.length_S + running_S
    stop_S = jnp.where(length_S >= slots.limit_S, LIMIT, RUNNING)
    stop_S = jnp.where(jnp.isin(token_S, jnp.asarray(spec.eos_ids, jnp.int32)), EOS, stop_S)
    return dataclasses.replace(
        slots,
        cache=cache,
        tokens_ST=append(slots.tokens_ST, token_S),
        logp_ST=append(slots.logp_ST, logp_S),
        logp_temperature_1_ST=logp_temperature_1_ST,
        sampled_ST=append(slots.sampled_ST, True),
        length_S=length_S,
        stop_S=jnp.where(running_S, stop_S, slots.stop_S),
    )


def append_tokens(spec: Spec, weights: Weights, slots: Slots, start_S, tokens_ST, count_S, limit_S) -> Slots:
    """Append `count_S[s]` tokens of `tokens_ST[s]` at length `start_S[s]`.

    The slot then runs to `limit_S[s]`. A negative `start_S[s]` leaves the slot
    unchanged. A slot longer than `start_S[s]` is cut back to it; tokens past the limit
    are dropped.
    """
    T = spec.length
    forced_S = start_S >= 0
    start_S = jnp.where(forced_S, start_S, T)
    end_S = jnp.where(forced_S, jnp.minimum(start_S + count_S, limit_S), 0)
    index_T = jnp.arange(T)
    new_ST = (index_T >= start_S[:, None]) & (index_T < end_S[:, None])
    shifted_ST = jnp.take_along_axis(tokens_ST, jnp.maximum(index_T - start_S[:, None], 0), axis=1)
    tokens_ST = jnp.where(new_ST, shifted_ST, slots.tokens_ST)
    # Keep the invariant: feed the slot's last token and all forced tokens but the last.
    fed_SF = start_S[:, None] - 1 + index_T
    position_SF = jnp.where(fed_SF < end_S[:, None] - 1, fed_SF, -1)
    token_SF = jnp.take_along_axis(tokens_ST, jnp.clip(fed_SF, 0, T - 1), axis=1)
    cut_ST = forced_S[:, None] & (index_T >= start_S[:, None])
    length_S = jnp.where(forced_S, end_S, slots.length_S)
    limit_S = jnp.where(forced_S, limit_S, slots.limit_S)
    prefix = prefix_of(spec, slots, forced_S)
    return dataclasses.replace(
        slots,
        cache=feed(spec, weights.decode, token_SF, position_SF, slots.cache, APPENDED_AT_ONCE, prefix),
        tokens_ST=tokens_ST,
        logp_ST=jnp.where(cut_ST, 0.0, slots.logp_ST),
        logp_temperature_1_ST=None
        if slots.logp_temperature_1_ST is None
        else jnp.where(cut_ST, 0.0, slots.logp_temperature_1_ST),
        sampled_ST=slots.sampled_ST & ~cut_ST,
        length_S=length_S,
        limit_S=limit_S,
        stop_S=jnp.where(forced_S, jnp.where(length_S < limit_S, RUNNING, LIMIT), slots.stop_S),
    )


# --- moving slots: small programs, called layer by layer ---


class Moves(NamedTuple):
    """Jitted parts of `copy_prompts`, `start_rollouts`, `stop_slots`, `resize`,
    `compact`.
    """

    copy_rows: Callable
    start_bare: Callable
    halted: Callable
    resize_layer: Callable
    take_layer: Callable
    take_bare: Callable


def compile_moves(spec: Spec) -> Moves:
    placed = placement(spec)
    return Moves(
        copy_rows=jax.jit(kv.copy_rows, donate_argnums=0, out_shardings=placed.layer),
        start_bare=jax.jit(start_bare, donate_argnums=0, out_shardings=placed.bare),
        halted=jax.jit(lambda stop_S, halted_S: jnp.where(halted_S, EMPTY, stop_S), out_shardings=placed.by_slot),
        resize_layer=jax.jit(kv.resize, static_argnums=1, out_shardings=placed.layer),
        take_layer=jax.jit(kv.take_rows, out_shardings=placed.layer),
        take_bare=jax.jit(take_bare, out_shardings=placed.bare),
    )


def copy_prompts(moves: Moves, slots: Slots, prefilled, own_S, prompt_R) -> Slots:
    """Copy prefilled prompts to slots and prompt rows.

    Row `own_S[s]` of `prefilled` goes to the own cache of slot s, and row `prompt_R[r]`
    to prompt row r. A negative index copies nothing.
    """
    fits = slots.prompts is None or kv.length_of(prefilled) <= kv.length_of(slots.prompts)
    assert fits, "a row of prompts must hold the longest"

    def copy_into(cache, from_B):
        """Copy rows of `prefilled` into a cache.

        All rows are passed, the copied ones first, with their number, so that one
        program serves any choice of rows.
        """
        placed_B = from_B >= 0
        to_B = np.argsort(~placed_B, kind="stable")
        count = np.int32(placed_B.sum())
        return kv.by_layer(lambda layer, i: moves.copy_rows(layer, kv.layer(prefilled, i), i, to_B, from_B[to_B], count), cache)

    prompts = slots.prompts if slots.prompts is None else copy_into(slots.prompts, prompt_R)
    return dataclasses.replace(slots, cache=copy_into(slots.cache, own_S), prompts=prompts)


def start_rollouts(moves: Moves, slots: Slots, start_S, tokens_ST, length_S, limit_S, key_S, prompt_S, prompt_tokens_R) -> Slots:
    """Start an attempt in each slot of `start_S`, with the prompt `tokens_ST[s]`.

    The keys and values of all its tokens but the last must be in place. Slot s
    continues prompt row `prompt_S[s]`, if that is not negative. `prompt_tokens_R` has
    the lengths of all prompt rows.
    """
    bare, cache, prompts = bare_of(slots)
    begun = (start_S, tokens_ST, length_S, limit_S, key_S, prompt_S, prompt_tokens_R)
    return with_caches(moves.start_bare(bare, *begun), cache, prompts)


def start_bare(slots: Slots, start_S, tokens_ST, length_S, limit_S, key_S, prompt_S, prompt_tokens_R) -> Slots:
    def replace_started(old, new):
        return jnp.where(jnp.expand_dims(start_S, tuple(range(1, old.ndim))), new, old)

    return dataclasses.replace(
        slots,
        prompt_tokens_R=prompt_tokens_R,
        prompt_S=replace_started(slots.prompt_S, prompt_S),
        tokens_ST=replace_started(slots.tokens_ST, tokens_ST),
        logp_ST=replace_started(slots.logp_ST, 0.0),
        logp_temperature_1_ST=None if slots.logp_temperature_1_ST is None else replace_started(slots.logp_temperature_1_ST, 0.0),
        sampled_ST=replace_started(slots.sampled_ST, False),
        length_S=replace_started(slots.length_S, length_S),
        limit_S=replace_started(slots.limit_S, limit_S),
        stop_S=replace_started(slots.stop_S, jnp.where(length_S < limit_S, RUNNING, LIMIT)),
        key_S=replace_started(slots.key_S, key_S),
    )


def stop_slots(moves: Moves, slots: Slots, halted_S) -> Slots:
    return dataclasses.replace(slots, stop_S=moves.halted(slots.stop_S, halted_S))


def resize(moves: Moves, slots: Slots, cache_length: int) -> Slots:
    """Give the cache another length; no running slot may need more."""
    if kv.length_of(slots.cache) == cache_length:
        return slots
    return dataclasses.replace(slots, cache=kv.by_layer(lambda layer, _: moves.resize_layer(layer, cache_length), slots.cache))


def compact(moves: Moves, slots: Slots, row_R) -> Slots:
    """Keep the slots `row_R`, in this order; their number must be one of the sizes."""
    bare, cache, prompts = bare_of(slots)
    cache = kv.by_layer(lambda layer, _: moves.take_layer(layer, row_R), cache)
    return with_caches(moves.take_bare(bare, row_R), cache, prompts)


def take_bare(bare: Slots, row_R) -> Slots:
    taken = jax.tree.map(lambda x: x[row_R], dataclasses.replace(bare, prompt_tokens_R=None))
    return dataclasses.replace(taken, prompt_tokens_R=bare.prompt_tokens_R)


def bare_of(slots: Slots) -> tuple[Slots, Any, Any]:
    """Separate slots from their caches, so that moving slots need not move caches."""
    return dataclasses.replace(slots, cache=None, prompts=None), slots.cache, slots.prompts


def with_caches(bare: Slots, cache, prompts) -> Slots:
    return dataclasses.replace(bare, cache=cache, prompts=prompts)
