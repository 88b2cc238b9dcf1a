r"""Test whether guessing tokens from the text so far would speed up sampling. This is
speculative decoding without a draft model (prompt look-up, Saxena 2023; Yang et al.
2023, arXiv 2304.04487): a step proposes the tokens that followed the last occurrence of
the last few, and checks all of them at once.

    python -m jaxreason.bench lookup --config=configs/gsm8k.py:model=FOLDER \
        --config.model.dtype=float32 --rollouts=RUN/rollouts.jsonl

The random noise of a sample belongs to its position, so the text is the same with and
without guessing, and a guess is right if it equals the token that was sampled. Recorded
rollouts therefore say exactly how many tokens a step would give. The cost is the timed
step over k + 1 tokens in each slot. Guessing pays where the gain exceeds the cost.

Found 2026-11-24: guessing pays with 1 and 4 slots, where a step waits for the weights,
and not with 16 or 64, so the sampler does not guess. Figures:
jaxreason/bench/README.md.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from jaxreason.bench import machine
from jaxreason.options import command

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # they belong to the command, whose --help shows them


NGRAMS = (3, 2)  # lengths to look up; the longest with an earlier occurrence is used


def steps_with_lookup(prompt: Sequence[int], completion: Sequence[int], guesses: int, ngrams: Sequence[int] = NGRAMS) -> int:
    """Count the decode steps of a completion if each step checks up to `guesses` tokens
    that were looked up in the text before it.
    """
    tokens = [*prompt, *completion]
    follows: dict[tuple, int] = {}  # an n-gram -> where its last occurrence ends
    known, at, steps = 0, len(prompt), 0
    while at < len(tokens):
        for end in range(known + 1, at):  # not the n-gram at the end of the text: nothing follows it yet
            for n in ngrams:
                if end >= n:
                    follows[tuple(tokens[end - n : end])] = end
        known = max(known, at - 1)
        start = next((follows[g] for n in ngrams if at >= n and (g := tuple(tokens[at - n : at])) in follows), None)
        right = 0
        if start is not None:
            # A guess may run into its own tokens: a repeated span is guessed to repeat
            # again.
            guess = tokens[start:at]
            while right < guesses and at + right < len(tokens) and guess[right % len(guess)] == tokens[at + right]:
                right += 1
        at += 1 + right
        steps += 1
    return steps


def time_step(model, weights, slots: int, tokens: int, columns: int, repeats: int) -> float:
    """Return the median seconds of a decode step that feeds `tokens` tokens in each
    slot and samples after each of them.
    """
    import jax
    import jax.numpy as jnp

    from jaxreason.draw import sample

    def step(params, cache, tokens_ST, start):
        position_ST = start + jnp.broadcast_to(jnp.arange(tokens), (slots, tokens))
        hidden_STD, cache = model.apply(params, tokens_ST, position_ST, cache=cache)
        logits = model.unembed(params, hidden_STD.reshape(slots * tokens, -1))
        uniforms = jax.random.uniform(jax.random.key(0), (slots * tokens, 2))
        return cache, sample(logits, uniforms, 1.0)[0].reshape(slots, tokens)

    @jax.jit
    def several(params, cache, tokens_ST):
        start = columns // 2
        return jax.lax.fori_loop(0, 4, lambda i, both: step(params, *both, start + i), (cache, tokens_ST))[1]

    cache = model.init_cache(slots, columns)
    tokens_ST = jnp.zeros((slots, tokens), jnp.int32)
    times = machine.seconds(lambda: jax.block_until_ready(several(weights, cache, tokens_ST)), repeats)
    return statistics.median(times) / 4


def bench(cores: int) -> None:
    """Measure gain and cost of guessing and print them."""
    import jax

    from jaxreason import build, sharding
    from jaxreason.model import transformer
    from jaxreason.options import call_with_section

    config = FLAGS.config.to_dict()
    _, tokenizer, _, shape, load = build.read_model_and_text(config["model"], config["text"])
    lines = [json.loads(line) for line in Path(os.path.expanduser(FLAGS.rollouts)).read_text().splitlines()]
    # A special token in a rollout's text was sampled as one.
    texts = [(tokenizer.encode(r["prompt"]), tokenizer.encode(r["text"], continues=True)) for r in lines]
    texts = [(prompt, completion) for prompt, completion in texts if completion]
    show = machine.printer(f"{FLAGS.config.model.name}: look-up in {len(texts)} rollouts", cores)

    guesses = [int(k) for k in FLAGS.guesses]
    total = sum(len(completion) for _, completion in texts)
    gain = {k: total / sum(steps_with_lookup(*text, k) for text in texts) for k in guesses}
    for k in guesses:
        show(f"tokens a step, {k} guessed", gain[k], "tokens", tokens=total)

    model = transformer(shape)
    mesh = call_with_section(sharding.make_mesh, {"data": 1}, "mesh", devices=jax.devices()[:1])
    weights = model.decode_layout(build.init_params(model, load, 0, mesh))
    for slots in map(int, FLAGS.slots):
        plain = time_step(model, weights, slots, 1, FLAGS.columns, FLAGS.repeats)
        show(f"step, {slots} slots", 1e3 * plain, "ms")
        for k in guesses:
            cost = time_step(model, weights, slots, k + 1, FLAGS.columns, FLAGS.repeats) / plain
            show(f"cost of a step that checks {k} guesses, {slots} slots", cost, "steps", speedup=round(gain[k] / cost, 3))


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1 or FLAGS.config is None or FLAGS.rollouts is None:
        machine.refuse(argv, "--config=FILE --rollouts=FILE, as RUN/rollouts.jsonl")
    cores = machine.pin(FLAGS.cores)
    try:
        bench(cores)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def run() -> None:
    """Define the flags and run the benchmark. Not at import: main.py defines flags of
    the same names.
    """
    command.define("As of jaxreason.main; its model and its tokenizer are used.")
    flags.DEFINE_string("rollouts", None, "JSONL file with the fields 'prompt' and 'text', as a run writes it.")
    machine.define_numbers("guesses", ["1", "3", "7"], "Tokens that are proposed at a time.")
    machine.define_numbers("slots", ["1", "4", "16", "64"], "Numbers of slots to time.")
    flags.DEFINE_integer("columns", 256, "Positions of the cache.", lower_bound=16)
    flags.DEFINE_integer("repeats", 5, "Timings of each.", lower_bound=1)
    flags.DEFINE_integer("cores", 0, "Cores of a CPU to use; 0: all that this process may.", lower_bound=0)
    app.run(main, flags_parser=command.parse_or_exit)
