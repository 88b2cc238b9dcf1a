"""The sampler: slots of fixed shape that are filled with prompts, decoded together and refilled as they finish.

    empty()                          no rollout anywhere
    insert(params, slots, ...)       prefill each prompt once, copy it to the slots of its attempts
    force(params, slots, ...)        append tokens that the model did not sample (tool output); never trained on
    decode(params, slots, t)         sample up to `chunk_tokens` tokens in every running slot, in one dispatch

Invariant of a running slot: its cache holds the keys and values of all its tokens but the last; one decode step feeds the
last token, writes its column and samples the next. Columns past a slot's length hold leftovers that no token can see.

The noise of a sample is keyed by (the caller's key of the attempt, position in the sequence) and by nothing else: a rollout
is the same in any slot, beside any neighbours, under any chunk size and on any mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxreason.model import Model
from jaxreason.sharding import replicated, row_devices, rows

RUNNING, EOS, LIMIT, EMPTY = range(4)
STOPS = {EOS: "eos", LIMIT: "limit"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """State of the sampler. Row s of every array is slot s."""

    cache: Any
    tokens_SC: jax.Array  # int32: prompt, then completion
    logp_SC: jax.Array  # float32, of the token in that column under the distribution it was sampled from; 0 elsewhere
    sampled_SC: jax.Array  # bool, False for prompt and forced tokens
    length_S: jax.Array  # int32, tokens so far, the prompt's included
    limit_S: jax.Array  # int32, length at which the slot stops
    stop_S: jax.Array  # int32, RUNNING, EOS, LIMIT or EMPTY
    key_S: jax.Array  # uint32 key data of the slot's attempt


class Sampler(NamedTuple):
    """Jitted functions over `Slots`, and the sizes they were compiled for. All but `empty` donate the slots they are given."""

    slots: int
    length: int
    empty: Callable
    insert: Callable
    force: Callable
    decode: Callable
    prepare: Callable


def attempt_keys(key, problem_R, attempt_R):
    """Key data of each (problem, attempt) under `key`, which stands for (seed, phase, step)."""
    fold = jax.random.fold_in
    return jax.vmap(lambda p, a: jax.random.key_data(fold(fold(key, p), a)))(problem_R, attempt_R)


attempt_keys = jax.jit(attempt_keys)


def sample(logits_SV, keys_S, temperature):
    """Sample a token a row, and its log-prob under the tempered distribution.

    Temperature 0 takes the most likely token; the log-prob is then the one at temperature 1.
    """
    greedy = temperature <= 0
    scaled_SV = logits_SV / jnp.where(greedy, 1.0, temperature)
    highest_S = jnp.max(scaled_SV, axis=-1)
    p_SV = jnp.exp(scaled_SV - highest_S[:, None])
    token_S = jnp.where(greedy, jnp.argmax(scaled_SV, axis=-1), draw(p_SV, keys_S)).astype(jnp.int32)
    chosen_S = jnp.take_along_axis(scaled_SV, token_S[:, None], axis=1)[:, 0]
    return token_S, chosen_S - highest_S - jnp.log(jnp.sum(p_SV, axis=-1))


def draw(p_SV, keys_S, width: int = 128):
    """Draw an index a row in proportion to `p_SV`, which need not sum to one: the inverse of its cumulative sum at two uniforms.

    One picks a block of `width` words, the other a word in it. Gumbel noise, one number for each word, took a quarter of a
    decode step on a CPU (16 rows of SmolLM2-135M's shape, one EPYC core, 2026-11-24: 99 ms with it, 73 ms so).
    """
    S, V = p_SV.shape
    p_SNW = jnp.pad(p_SV, ((0, 0), (0, -V % width))).reshape(S, -1, width)
    u_S2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_S)
    block_S = invert(jnp.sum(p_SNW, axis=-1), u_S2[:, 0])
    word_S = invert(jnp.take_along_axis(p_SNW, block_S[:, None, None], axis=1)[:, 0], u_S2[:, 1])
    return block_S * width + word_S


def invert(p_SN, u_S):
    """Return the first index of each row at which the cumulative sum is above the share `u_S` of the whole."""
    sum_SN = jnp.cumsum(p_SN, axis=-1)
    # A sum made in parallel may rise by a rounding where p is 0, and may nowhere be above u times itself.
    above_SN = (sum_SN > u_S[:, None] * sum_SN[:, -1:]) & (p_SN > 0)
    return jnp.where(jnp.any(above_SN, axis=-1), jnp.argmax(above_SN, axis=-1), jnp.argmax(p_SN, axis=-1))


def compile_sampler(
    model: Model, *, slots: int, length: int, eos_ids: tuple[int, ...], chunk_tokens: int = 16, cache_dtype=None, mesh=None
) -> Sampler:
    """Make the jitted sampler of `slots` sequences of at most `length` tokens, prompt included.

    With a mesh, slots are split over its devices and params are gathered to every one of them by `prepare`.

    Raises:
      ValueError: the slots do not divide over the mesh.
    """
    S, C = slots, length
    if mesh is not None and S % row_devices(mesh):
        raise ValueError(f"sampler got {S} slots, which do not divide over {row_devices(mesh)} devices; choose a multiple")
    every_S = jnp.arange(S)
    eos = jnp.asarray(eos_ids, jnp.int32)
    stacked = model.config.scan_layers  # then the slot axis of the cache is axis 1

    def empty() -> Slots:
        key_words = jax.random.key_data(jax.random.key(0)).shape
        return Slots(
            cache=model.init_cache(S, C, cache_dtype),
            tokens_SC=jnp.zeros((S, C), jnp.int32),
            logp_SC=jnp.zeros((S, C), jnp.float32),
            sampled_SC=jnp.zeros((S, C), bool),
            length_S=jnp.ones(S, jnp.int32),
            limit_S=jnp.ones(S, jnp.int32),
            stop_S=jnp.full(S, EMPTY, jnp.int32),
            key_S=jnp.zeros((S, *key_words), jnp.uint32),
        )

    def insert(params, slots: Slots, tokens_PT, length_P, row_R, slot_R, key_R, limit_R) -> Slots:
        """Fill slot `slot_R[r]` with prompt `row_R[r]`; a slot of S or more is nowhere. Prompts are padded on the right."""
        P, T = tokens_PT.shape
        column_PT = jnp.broadcast_to(jnp.arange(T), (P, T))
        # All but the last token of the prompt: the first decode step feeds that one.
        position_PT = jnp.where(column_PT < length_P[:, None] - 1, column_PT, -1)
        _, prefilled = model.apply(params, tokens_PT, position_PT, cache=model.init_cache(P, T, cache_dtype))

        def copy(into, prompt):
            *_, a, b = prompt.shape  # keys have their columns last, values last but one
            if stacked:
                return into.at[:, slot_R, :, :a, :b].set(prompt[:, row_R], mode="drop")
            return into.at[slot_R, :, :a, :b].set(prompt[row_R], mode="drop")

        def put(into_S, value_R):
            return into_S.at[slot_R].set(value_R, mode="drop")

        tokens_RC = jnp.zeros((len(slot_R), C), jnp.int32).at[:, :T].set(tokens_PT[row_R])
        return Slots(
            cache=jax.tree.map(copy, slots.cache, prefilled),
            tokens_SC=put(slots.tokens_SC, tokens_RC),
            logp_SC=put(slots.logp_SC, 0.0),
            sampled_SC=put(slots.sampled_SC, False),
            length_S=put(slots.length_S, length_P[row_R]),
            limit_S=put(slots.limit_S, limit_R),
            stop_S=put(slots.stop_S, jnp.where(length_P[row_R] < limit_R, RUNNING, LIMIT)),
            key_S=put(slots.key_S, key_R),
        )

    def force(params, slots: Slots, tokens_SF, count_S) -> Slots:
        """Append the first `count_S` of `tokens_SF` to each slot that has any, up to its limit, and let it run on."""
        F = tokens_SF.shape[1]
        count_S = jnp.minimum(count_S, slots.limit_S - slots.length_S)
        forced_S = count_S > 0
        offset_F = jnp.arange(F)
        column_SF = jnp.where(offset_F < count_S[:, None], slots.length_S[:, None] + offset_F, C)
        tokens_SC = slots.tokens_SC.at[every_S[:, None], column_SF].set(tokens_SF, mode="drop")
        # Feed the slot's last token and all but the last forced one, to keep the invariant.
        fed_SF = jnp.take_along_axis(tokens_SC, jnp.clip(column_SF - 1, 0, C - 1), axis=1)
        position_SF = jnp.where(column_SF < C, column_SF - 1, -1)
        _, cache = model.apply(params, fed_SF, position_SF, cache=slots.cache)
        length_S = slots.length_S + jnp.maximum(count_S, 0)
        running_S = jnp.where(length_S < slots.limit_S, RUNNING, LIMIT)
        return dataclasses.replace(
            slots,
            cache=cache,
            tokens_SC=tokens_SC,
            length_S=length_S,
            stop_S=jnp.where(forced_S, running_S, slots.stop_S),
        )

    def decode_one(params, slots: Slots, temperature) -> Slots:
        running_S = slots.stop_S == RUNNING
        last_S = slots.tokens_SC[every_S, slots.length_S - 1]
        position_S = jnp.where(running_S, slots.length_S - 1, -1)  # an idle slot writes nothing
        hidden_SD, cache = model.apply(params, last_S[:, None], position_S[:, None], cache=slots.cache)
        keys_S = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(slots.key_S), slots.length_S)
        token_S, logp_S = sample(model.unembed(params, hidden_SD[:, 0]), keys_S, temperature)
        column_S = jnp.where(running_S, slots.length_S, C)
        length_S = slots.length_S + running_S
        stop_S = jnp.where(length_S >= slots.limit_S, LIMIT, RUNNING)
        stop_S = jnp.where(jnp.isin(token_S, eos), EOS, stop_S)
        return dataclasses.replace(
            slots,
            cache=cache,
            tokens_SC=slots.tokens_SC.at[every_S, column_S].set(token_S, mode="drop"),
            logp_SC=slots.logp_SC.at[every_S, column_S].set(logp_S, mode="drop"),
            sampled_SC=slots.sampled_SC.at[every_S, column_S].set(True, mode="drop"),
            length_S=length_S,
            stop_S=jnp.where(running_S, stop_S, slots.stop_S),
        )

    def decode(params, slots: Slots, temperature) -> Slots:
        """Decode until `chunk_tokens` steps are done or no slot runs."""

        def go_on(carry):
            step, slots = carry
            return (step < chunk_tokens) & jnp.any(slots.stop_S == RUNNING)

        def advance(carry):
            step, slots = carry
            return step + 1, decode_one(params, slots, temperature)

        return jax.lax.while_loop(go_on, advance, (0, slots))[1]

    def by_slot(slots):
        """The sharding of each array of the slots: split along its slot axis."""

        def of(path, x):
            in_cache = path[0].name == "cache"
            spec = rows(mesh).spec
            return jax.NamedSharding(mesh, jax.P(None, *spec) if in_cache and stacked else spec)

        return jax.tree_util.tree_map_with_path(of, slots)

    out = None if mesh is None else by_slot(jax.eval_shape(empty))
    gathered = None if mesh is None else replicated(mesh)
    return Sampler(
        slots=S,
        length=C,
        empty=jax.jit(empty, out_shardings=out),
        insert=jax.jit(insert, donate_argnums=1, out_shardings=out),
        force=jax.jit(force, donate_argnums=1, out_shardings=out),
        decode=jax.jit(decode, donate_argnums=1, out_shardings=out),
        prepare=jax.jit(model.decode_layout, out_shardings=gathered),
    )
