"""Time two choices of the sampler's cache against their alternatives: how a decode step
writes keys and values, and how attempts read their prompt.

    python -m jaxreason.bench cache --cores=1

write: each slot writes its keys and values at its own position (`layers.write`).
Alternatives: one common position for all slots, which would need a position id per
cache entry and would waste entries of slots that wait; and a write of the whole cache
through a mask.

prefix: each attempt reads its own copy of its prompt's keys and values, or all attempts
at a problem read one copy, as rows of one matrix product, and the two softmaxes, over
the prompt and over the sampled tokens, are merged by their sums.

Found 2026-11-24: no way to write is fastest at every shape, so each slot keeps its own
position; reading a prompt once per group is faster with every prompt, and the sampler
has done so since 2026-11-26, by rows of prompts that slots point to
(`model.cache.Members`). Figures: jaxreason/bench/README.md.
"""

from __future__ import annotations

import statistics
import sys

from absl import app, flags, logging

from jaxreason.bench import machine
from jaxreason.options import command

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # they belong to the command, whose --help shows them
STEPS = 8  # decode steps per timed call


def writes() -> dict:
    """Return the alternatives of `write(cache, k_BTKH, v_BTKH, position_BT)` by name,
    for one token per slot.
    """
    import jax
    import jax.numpy as jnp

    from jaxreason.model.layers import write

    def common_column(cache, k_BTKH, v_BTKH, position_BT):
        at = position_BT[0, 0]
        return {
            "k": jax.lax.dynamic_update_slice_in_dim(cache["k"], k_BTKH.transpose(0, 2, 3, 1), at, axis=3),
            "v": jax.lax.dynamic_update_slice_in_dim(cache["v"], v_BTKH.swapaxes(1, 2), at, axis=2),
        }

    def mask(cache, k_BTKH, v_BTKH, position_BT):
        here_BC = jnp.arange(cache["v"].shape[2]) == position_BT
        return {
            "k": jnp.where(here_BC[:, None, None, :], k_BTKH.transpose(0, 2, 3, 1), cache["k"]),
            "v": jnp.where(here_BC[:, None, :, None], v_BTKH.swapaxes(1, 2), cache["v"]),
        }

    return {"own columns": write, "common column": common_column, "mask": mask}


def attend_shared(q_BTNH, prompt: dict, own: dict, visible_P, visible_BTC):
    """Attend to the prompt of each problem once for its G attempts (rows B = P x G, in
    order), and to each attempt's own cache.

    `prompt` is a cache of P rows; `visible_P` is the number of its positions that
    count.
    """
    import jax.numpy as jnp

    B, T, N, H = q_BTNH.shape
    P, K = prompt["v"].shape[:2]
    G = B // P
    q = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # B K n T H
    q_own = q.reshape(B, K, N // K * T, H)
    q_prompt = q.reshape(P, G, K, N // K * T, H).swapaxes(1, 2).reshape(P, K, G * (N // K) * T, H)
    far = jnp.matmul(q_prompt, prompt["k"])
    far = jnp.where(jnp.arange(far.shape[-1]) < visible_P[:, None, None, None], far, -1e30)
    near = jnp.where(visible_BTC[:, None], jnp.matmul(q_own, own["k"]), -1e30)

    def by_attempt(x):
        return x.reshape(P, K, G, N // K * T, x.shape[-1]).swapaxes(1, 2).reshape(B, K, N // K * T, x.shape[-1])

    highest = jnp.maximum(by_attempt(far.max(-1, keepdims=True)), near.max(-1, keepdims=True))
    back = highest.reshape(P, G, K, -1, 1).swapaxes(1, 2).reshape(*far.shape[:-1], 1)
    far, near = jnp.exp(far - back), jnp.exp(near - highest)
    total = by_attempt(far.sum(-1, keepdims=True)) + near.sum(-1, keepdims=True)
    mixed = (by_attempt(jnp.matmul(far, prompt["v"])) + jnp.matmul(near, own["v"])) / total
    return mixed.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def bench(cores: int) -> None:
    """Measure both choices and print the times."""
    import jax
    import jax.numpy as jnp

    from jaxreason.model.cache import make
    from jaxreason.model.layers import attend

    L, N, K, H, G = FLAGS.layers, FLAGS.heads, FLAGS.kv_heads, FLAGS.head_size, FLAGS.group
    show = machine.printer(f"{L} layers, {N} heads, {K} key heads of {H}, float32", cores)

    def median_ms(program, *arguments) -> float:
        return 1e3 * statistics.median(machine.seconds(lambda: jax.block_until_ready(program(*arguments)))) / STEPS

    def over_layers(of_layer):
        """Compile a program that runs STEPS decode steps over the caches of all
        layers.
        """

        @jax.jit
        def program(q_BTNH, caches):
            def step(i, state):
                q, caches = state
                new = []
                for cache in caches:
                    q, cache = of_layer(q, cache, i)
                    new.append(cache)
                return q, tuple(new)

            return jax.lax.fori_loop(0, STEPS, step, (q_BTNH, caches))

        return program

    for S in map(int, FLAGS.slots):
        q = jnp.ones((S, 1, N, H))
        for C in map(int, FLAGS.columns):
            caches = tuple(make(S, C, K, H, "float32") for _ in range(L))
            for name, write in writes().items():

                def of_layer(q, cache, i, write=write, C=C):
                    position = jnp.full((len(q), 1), C // 2) + i
                    cache = write(cache, q[:, :, :K], q[:, :, :K], position)
                    return attend(q, cache["k"], cache["v"], jnp.arange(C) <= position[..., None]), cache

                show(
                    f"write and attend, {name}, {S} slots x {C} columns", median_ms(over_layers(of_layer), q, caches), "ms a step"
                )
        if S % G:
            sys.stderr.write(f"prompts are not timed in {S} slots, which do not divide into groups of {G}: --group\n")
            continue
        for prompt in map(int, FLAGS.prompts):
            own = int(FLAGS.columns[0])
            shared = tuple((make(S // G, prompt, K, H, "float32"), make(S, own, K, H, "float32")) for _ in range(L))
            copied = tuple(make(S, prompt + own, K, H, "float32") for _ in range(L))

            def once(q, cache, i, prompt=prompt, own=own):
                visible = jnp.full((len(q), 1, own), True)
                return attend_shared(q, *cache, jnp.full(len(q) // G, prompt), visible), cache

            def each(q, cache, i, prompt=prompt, own=own):
                return attend(q, cache["k"], cache["v"], jnp.full((len(q), 1, prompt + own), True)), cache

            for name, of_layer, caches in (("a copy each", each, copied), ("once a group", once, shared)):
                what = f"attend to a prompt of {prompt}, {name}, {S} slots, {own} columns of their own"
                show(what, median_ms(over_layers(of_layer), q, caches), "ms a step")


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        machine.refuse(argv, "flags alone; --help lists them")
    bench(machine.pin(FLAGS.cores))


def run() -> None:
    """Define the flags and run the benchmark."""
    flags.DEFINE_integer("layers", 30, "Layers; the default shape is SmolLM2-135M's.", lower_bound=1)
    flags.DEFINE_integer("heads", 9, "Query heads.", lower_bound=1)
    flags.DEFINE_integer("kv_heads", 3, "Key heads.", lower_bound=1)
    flags.DEFINE_integer("head_size", 64, "Size of a head.", lower_bound=1)
    flags.DEFINE_integer("group", 8, "Attempts at a problem.", lower_bound=1)
    machine.define_numbers("slots", ["16", "64"], "Numbers of slots.")
    machine.define_numbers("columns", ["128", "512"], "Positions of the cache; the first is also that of the attempts' own.")
    machine.define_numbers("prompts", ["64", "256", "1024"], "Lengths of the shared prompt.")
    flags.DEFINE_integer("cores", 0, "Cores of a CPU to use; 0: all that this process may.", lower_bound=0)
    app.run(main, flags_parser=command.parse_or_exit)
