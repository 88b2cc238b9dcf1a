r"""Measure the sampler and its fraction of the machine's roofline.

    python -m jaxreason.bench sampler --config=configs/tiny.py \
        --prompts=8 --group=8 --prompt_tokens=32 --tokens=128
    python -m jaxreason.bench sampler --config=configs/gsm8k.py:model=FOLDER \
        --config.model.dtype=float32 --work=natural --questions=QUESTIONS.jsonl \
        --prompts=8 --group=8 --slots=16 --tokens=256 --prompt_tokens=256

`--work=exact`: every rollout has exactly `prompt_tokens` random digits and `tokens`
sampled tokens. `--work=natural`: a rollout ends at the model's end-of-sequence token or
after `tokens` tokens. `--questions` replaces the random prompts by the questions of a
JSONL file. A batch ends when all text is on the host. The weights are already in the
sampler's layout; making that layout, once per update, is timed separately.

A floor is the least possible time at the machine's measured rates: the longer of
computing and reading memory. "2N" counts two FLOPs per matrix weight and generated
token. "full" adds attention over earlier positions, and prefill, with each prompt
computed and read once per group, as this sampler does. "full, unshared" computes and
reads the prompt once per attempt, as other samplers do.
"""

from __future__ import annotations

import ast
import functools
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from absl import app, flags, logging

from jaxreason.bench import machine
from jaxreason.cost import layer_weights
from jaxreason.options import command

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # they belong to the command, whose --help shows them

STARTED_S = time.perf_counter()


class Cost(NamedTuple):
    """Least FLOPs and bytes of some work."""

    flops: float
    bytes: float

    def seconds(self, ceiling: machine.Ceiling) -> float:
        return max(self.flops / ceiling.flops_per_s, self.bytes / ceiling.bytes_per_s)


def decode_cost(c, groups, slots: int, attention: bool = True, shared: bool = True, itemsize: int = 4) -> Cost:
    """Compute the least cost of sampling in `slots` slots: `groups` are pairs of
    (prompt tokens, tokens sampled in each attempt).

    Each token needs 2 FLOPs per matrix weight, and 4 L N H per position that it attends
    to, itself included. Each step reads the weights once, and there are at least tokens
    / slots steps. Each token reads the keys and values before it; a prompt is read once
    for all attempts that share it, which assumes that they all run at the same time.
    """
    tokens = sum(sum(attempts) for _, attempts in groups)
    # The first sampled token is predicted at the last prompt position, which attends to
    # p positions; the last one at a position that attends to p + g - 1.
    own = sum(g * (g - 1) / 2 for _, attempts in groups for g in attempts) if attention else 0
    prompts = sum(p * sum(attempts) for p, attempts in groups) if attention else 0
    once = sum(p * max(attempts) for p, attempts in groups) if attention and shared else prompts
    weights = c.layers * layer_weights(c) + c.width * c.vocab_size
    return Cost(
        flops=2 * weights * tokens + 4 * c.layers * c.heads * c.head_size * (own + prompts),
        bytes=itemsize * (weights * tokens / slots + 2 * c.layers * c.kv_heads * c.head_size * (own + once)),
    )


def prefill_cost(c, prompts, itemsize: int = 4) -> Cost:
    """Compute the least cost of the keys and values of prompts of these lengths, in one
    pass over the weights and without logits.
    """
    attended = sum(p * (p + 1) / 2 for p in prompts)
    weights = c.layers * layer_weights(c)
    return Cost(2 * weights * sum(prompts) + 4 * c.layers * c.heads * c.head_size * attended, itemsize * weights)


def floors(c, groups, slots: int, ceiling: machine.Ceiling) -> dict[str, float]:
    """Return the least seconds of sampling some rollouts, by name of the floor;
    `groups` are those of `decode_cost`.
    """

    def decode(**keywords):
        return decode_cost(c, groups, slots, itemsize=itemsize, **keywords).seconds(ceiling)

    def prefill(prompts):
        return prefill_cost(c, prompts, itemsize).seconds(ceiling)

    itemsize = 2 if c.dtype == "bfloat16" else 4
    return {
        "2N": decode(attention=False),
        "full": decode() + prefill([p for p, _ in groups]),
        "full, unshared": decode(shared=False) + prefill([p for p, attempts in groups for _ in attempts]),
        "decode": decode(),
    }


def lengths_of(groups) -> list[tuple[int, list[int]]]:
    """Return the prompt's length and the attempts' lengths of each group."""
    return [(len(group.prompt), [len(r.tokens) for r in group.attempts]) for group in groups]


def make_work():
    """Build `(model, params, completer, requests)` from the flags, with params
    loaded.
    """
    import jax

    from jaxreason import build, sharding
    from jaxreason.model import transformer
    from jaxreason.options import call_with_section
    from jaxreason.rollout import Request
    from jaxreason.types import Task

    config = FLAGS.config.to_dict()
    fields = dict(part.split("=", 1) for part in FLAGS.model.split(",") if part)
    config["model"] |= {name: ast.literal_eval(value) for name, value in fields.items()}
    mesh = call_with_section(sharding.make_mesh, config["sharding"]["mesh"], "config.sharding.mesh")
    _, tokenizer, format, shape, load = build.read_model_and_text(config["model"], config["text"])
    model = transformer(shape, mesh)

    if FLAGS.work == "exact":
        tokenizer = tokenizer._replace(eos_ids=())
    elif FLAGS.eos_id is not None:
        tokenizer = tokenizer._replace(eos_ids=(FLAGS.eos_id,))
    tasks = [Task("", "")] * FLAGS.prompts
    if FLAGS.questions:
        lines = Path(os.path.expanduser(FLAGS.questions)).read_text().splitlines()
        if len(lines) < FLAGS.prompts:
            raise ValueError(f"--prompts got {FLAGS.prompts}; allowed: at most the {len(lines)} lines of {FLAGS.questions}")
        tasks = [Task(json.loads(line)["question"], "") for line in lines[: FLAGS.prompts]]
        prompts = [format.prompt(task) for task in tasks]
    else:
        draw = random.Random(0)
        digits = ["".join(draw.choice("0123456789") for _ in range(4 * FLAGS.prompt_tokens)) for _ in tasks]
        prompts = [tokenizer.encode(text)[: FLAGS.prompt_tokens] for text in digits]
    section = config["sampler"] | {"max_prompt_tokens": FLAGS.prompt_tokens, "max_tokens": FLAGS.tokens}
    section["slots"] = FLAGS.slots or FLAGS.prompts * FLAGS.group
    arguments = {"model": model, "tokenizer": tokenizer, "format": format, "mesh": mesh, "processes": 1}
    completer = call_with_section(build.make_completer, section, "config.sampler", **arguments)
    wanted = [[Request(task, p, g, prompts[p]) for g in range(FLAGS.group)] for p, task in enumerate(tasks)]
    params = jax.block_until_ready(build.init_params(model, load, config["seed"], mesh))
    return model, params, completer, wanted


def batch(completer, weights, wanted, number: int):
    """Sample the wanted groups once, with a random key of its own for each batch."""
    import jax

    from jaxreason.environment import single_turn
    from jaxreason.rollout import collect_groups
    from jaxreason.types import Verdict

    free = single_turn(lambda text, task: Verdict(0.0, False))
    return collect_groups(completer, weights, wanted, free, key=jax.random.key(number), temperature=FLAGS.temperature)


def first_batch() -> None:
    """Print the seconds until this process's first batch is done: from loaded params,
    and from the start of the process.
    """
    from jaxreason.rollout import warm_up

    _, params, completer, wanted = make_work()
    started_s = time.perf_counter()
    weights = completer.sampler.prepare(params)
    warm_up(completer, weights, appends_tokens=False)
    batch(completer, weights, wanted, 0)
    print(json.dumps({"first_s": time.perf_counter() - started_s, "start_s": time.perf_counter() - STARTED_S}))


def in_fresh_processes(show) -> None:
    """Time the first batch of a new process with an empty compilation cache, then with
    the cache that the first process filled.
    """
    with tempfile.TemporaryDirectory() as folder:
        kept = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
        for name in ("cold", "compiled programs kept"):
            command = [sys.executable, "-m", "jaxreason.bench", "sampler", *sys.argv[1:], "--only_first"]
            done = subprocess.run(command, env=os.environ | kept, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"error: the first batch of a fresh process failed: {done.stderr.strip().splitlines()[-1]}")
            found = json.loads(done.stdout.splitlines()[-1])
            show(
                f"first batch, {name}",
                found["first_s"],
                "s",
                note="params are there; layout, all compilation and the batch included",
            )
            show(f"start to first batch, {name}", found["start_s"], "s", note="imports and params included")


def bench(cores: int) -> None:
    """Measure the sampler and print the times."""
    import jax

    from jaxreason.runtime import memory

    memory.give_back()  # as `jaxreason.main` does
    model, params, completer, wanted = make_work()
    c, slots = model.config, completer.sampler.slots
    lengths = f"{FLAGS.prompt_tokens}+{FLAGS.tokens} tokens, {slots} slots, {c.dtype}"
    show = machine.printer(f"{FLAGS.config.model.name} {FLAGS.work}: {FLAGS.prompts}x{FLAGS.group} rollouts, {lengths}", cores)
    ceiling = machine.measure([(slots, c.width, c.feed_forward), (slots, c.width, c.vocab_size)], c.dtype)
    show("matrix products, best", ceiling.flops_per_s / 1e9, "GFLOP/s")
    show("memory read", ceiling.bytes_per_s / 1e9, "GB/s")

    prepare = functools.partial(completer.sampler.prepare, params)
    show("layout of weights, once an update", machine.seconds(lambda: jax.block_until_ready(prepare())), "s")
    weights = prepare()
    requests = list(itertools.chain(*wanted))
    prefill_s, prompt_tokens = time_prefill(completer, weights, requests)
    show("prefill", [prompt_tokens / s for s in prefill_s], "tokens/s")

    found = []
    for number in range(FLAGS.warmup + FLAGS.repeats):
        started_s = time.perf_counter()
        groups, spent = batch(completer, weights, wanted, number)
        found.append((time.perf_counter() - started_s, groups, spent))
    found = found[FLAGS.warmup :]
    show("batch", [s for s, *_ in found], "s")
    show("generated tokens", [spent.tokens / s for s, _, spent in found], "tokens/s", note="prefill included")
    show("decode", [spent.tokens / (s - prefill_s[0]) for s, _, spent in found], "tokens/s", note="prefill's best time taken off")
    show("completed rollouts", [len(requests) / s for s, *_ in found], "rollouts/s")
    show("rollout length", [spent.tokens / len(requests) for _, _, spent in found], "tokens")
    show("slot occupancy", [spent.tokens / spent.slot_steps for *_, spent in found], "")
    least = [floors(c, lengths_of(groups), slots, ceiling) for _, groups, _ in found]
    for name in least[0]:
        rate = [spent.tokens / floor[name] for floor, (*_, spent) in zip(least, found, strict=True)]
        taken = [s - (prefill_s[0] if name == "decode" else 0.0) for s, *_ in found]
        share = [floor[name] / s for floor, s in zip(least, taken, strict=True)]
        show(f"floor, {name}", rate, "tokens/s")
        show(f"share of the floor, {name}", share, "")
    show("peak memory", machine.peak_bytes() / 2**20, "MiB")
    if FLAGS.first:
        in_fresh_processes(show)


def time_prefill(completer, weights, requests) -> tuple[list[float], int]:
    """Time the prefill of all prompts, each once, and return the times and the number
    of tokens.
    """
    import jax

    from jaxreason.rollout import Prompts

    def prefill():
        prompts = Prompts(completer, weights, requests)
        for request in requests:
            if request.problem not in prompts.ready:
                prompts.prefill(requests)
        jax.block_until_ready([cache for cache, _ in prompts.ready.values()])
        return prompts.tokens

    return machine.seconds(prefill), prefill()


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)  # at INFO jax lists the backends that it did not find
    if len(argv) > 1 or FLAGS.config is None:
        machine.refuse(argv, "--config=FILE, for example --config=configs/tiny.py")
    cores = machine.pin(FLAGS.cores)
    try:
        first_batch() if FLAGS.only_first else bench(cores)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def define_flags() -> None:
    """Define the flags that describe the work. Not at import: main.py defines the same
    names.
    """
    command.define("As of jaxreason.main; its model, text, sampler and mesh are used.")
    flags.DEFINE_string("model", "", "Fields of the ModelConfig that replace those of the config: layers=4,width=128")
    flags.DEFINE_enum("work", "exact", ["exact", "natural"], "Whether rollouts end by themselves.")
    flags.DEFINE_integer("prompts", 8, "How many prompts.", lower_bound=1)
    flags.DEFINE_integer("group", 8, "Rollouts of each prompt.", lower_bound=1)
    flags.DEFINE_integer("slots", 0, "Slots of the sampler; 0: one for each rollout.", lower_bound=0)
    flags.DEFINE_integer("prompt_tokens", 64, "Length of random prompts, and the longest of others.", lower_bound=1)
    flags.DEFINE_integer("tokens", 64, "Tokens sampled in each rollout, at most.", lower_bound=1)
    flags.DEFINE_float("temperature", 1.0, "0 is greedy.", lower_bound=0.0)
    flags.DEFINE_string("questions", None, "JSONL file with a field 'question'; default: random digits.")
    flags.DEFINE_integer("eos_id", None, "With --work=natural: the token that ends a rollout, if not the tokenizer's.")
    flags.DEFINE_integer("repeats", 5, "Batches that are timed.", lower_bound=1)
    flags.DEFINE_integer("warmup", 1, "Batches before them.", lower_bound=1)
    flags.DEFINE_integer("cores", 0, "Cores of a CPU to use; 0: all that this process may.", lower_bound=0)


def run() -> None:
    """Define the flags and run the benchmark."""
    define_flags()
    flags.DEFINE_boolean("first", True, "Also time the first batch of a fresh process, without and with compiled programs kept.")
    flags.DEFINE_boolean("only_first", False, "Only print the seconds of this process's first batch.")
    app.run(main, flags_parser=command.parse_or_exit)
