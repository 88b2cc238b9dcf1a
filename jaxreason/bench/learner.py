r"""Measure the learner and its fraction of the machine's matrix-product rate; with
sampling, a whole RL step.

    python -m jaxreason.bench learner --config=configs/tiny.py \
        --prompts=8 --group=8 --prompt_tokens=32 --tokens=128
    python -m jaxreason.bench step --config=configs/gsm8k.py:model=FOLDER \
        --config.model.dtype=float32 --config.model.remat=none \
        --prompts=2 --group=4 --prompt_tokens=64 --tokens=64

The flags that define the work are those of `bench sampler`. `learner` trains on random
tokens, `step` on sampled ones. Objective, optimizer and micro-batches come from the
last phase of the config; `--kl` and `--microbatches` replace two of its fields. The
passes that the objective needs before an update, such as the log-probs of a reference
policy with a KL coefficient, are timed as `reference`. An update ends when the new
params are ready.

The floor is the time of the unavoidable matrix products at the best rate measured here:
one forward pass, and two more for the backward pass; logits of trained tokens only;
prompts as often as the batch holds them (`--rollouts_per_prompt`). Norms, softmax,
rotations, the optimizer and padding are not in the floor. Tokens per second count every
rollout with its prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import time

from absl import app, flags, logging

from jaxreason.bench import machine
from jaxreason.bench import sampler as sampling
from jaxreason.cost import shared_length
from jaxreason.options import command

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # they belong to the command, whose --help shows them


def random_groups(wanted, vocab_size: int):
    """Make groups as if they had been sampled: `--tokens` random tokens per rollout, or
    with `--work=natural` a random number of them.
    """
    import numpy as np

    from jaxreason.types import Group, Rollout, Verdict

    draw = np.random.default_rng(0)

    def rollout(r) -> Rollout:
        n = min(FLAGS.tokens, int(draw.geometric(2 / FLAGS.tokens))) if FLAGS.work == "natural" else FLAGS.tokens
        return Rollout(
            task=r.task,
            problem=r.problem,
            attempt=r.attempt,
            prompt=np.asarray(r.prompt, np.int32),
            tokens=draw.integers(0, vocab_size, n, np.int32),
            logp=np.full(n, -np.log(vocab_size), np.float32),
            sampled=np.ones(n, bool),
            stop="limit",
            text="",
            verdict=Verdict(float(r.attempt % 2), False),
        )

    return [Group(tuple(map(rollout, requests))) for requests in wanted]


def paid_alternately(group):
    """Give every other attempt of a group a reward of 1, so that gradients are not
    zero.
    """
    from jaxreason.types import Group, Verdict

    return Group(tuple(dataclasses.replace(r, verdict=Verdict(float(r.attempt % 2), False)) for r in group.attempts))


def microbatches_for(shape, completer, mesh) -> int:
    """Choose the number of micro-batches as a run does whose config names none."""
    from jaxreason import build, platforms, sharding

    source = {"name": "rollouts", "problems": FLAGS.prompts, "group": FLAGS.group}
    source["rollouts_per_prompt"] = FLAGS.rollouts_per_prompt
    limits = build.Attempts(completer.max_tokens, completer.sampler.length - completer.max_tokens)
    return build.choose_microbatches([source], shape, limits, sharding.row_devices(mesh), platforms.platform_of(mesh))


def bench(cores: int, whole: bool) -> None:
    """Measure the learner (with `whole`, also sampling) and print the times."""
    import jax

    from jaxreason import batching, learner, objectives, optimizer, sharding
    from jaxreason.build import choose_rollouts_per_prompt
    from jaxreason.learner import new_state
    from jaxreason.options import call_with_section
    from jaxreason.runtime import ledger, memory

    memory.give_back()  # as `jaxreason.main` does
    model, params, completer, wanted = sampling.make_work()
    c, config = model.config, FLAGS.config.to_dict()
    phase = config[config["phases"][-1]]
    section = phase["objective"] | ({} if FLAGS.kl is None else {"kl_coefficient": FLAGS.kl})
    objective = call_with_section(objectives.make, section, "objective")
    made = call_with_section(optimizer.make, phase["optimizer"] | {"warmup_steps": 0}, "optimizer", steps=phase["steps"])
    mesh = call_with_section(sharding.make_mesh, config["sharding"]["mesh"], "config.sharding.mesh")
    longest_prompt = completer.sampler.length - completer.max_tokens
    microbatches = FLAGS.microbatches or phase.get("microbatches") or microbatches_for(c, completer, mesh)
    R, multiple = len(wanted) * FLAGS.group, microbatches * sharding.row_devices(mesh)
    sizes = {"group": FLAGS.group, "rows": R, "multiple": multiple}
    sizes |= {"longest_prompt": longest_prompt, "completion": completer.max_tokens}
    share = choose_rollouts_per_prompt(FLAGS.rollouts_per_prompt, c, **sizes)
    if R // share % multiple:
        raise ValueError(f"{R // share} rows do not divide over {microbatches} micro-batches; set --microbatches")
    placed = learner.state_shapes(model, made, mesh, objective.controls)[1]
    reference = jax.tree.map(jax.numpy.copy, params) if objective.refers else None
    begin = jax.jit(new_state, static_argnums=(1, 2), donate_argnums=0, out_shardings=placed)
    state = begin(params, made, objective.controls)
    step = learner.compile_train_step(model, objective, made, microbatches=microbatches, state_shardings=placed)
    complete = learner.compile_completion(model, objective, microbatches=microbatches, mesh=mesh)
    head = () if objective.divergence is None else (model.head(reference),)
    to_batch = functools.partial(
        batching.from_groups,
        objective=objective,
        buckets=batching.length_buckets(shared_length(longest_prompt, [completer.max_tokens] * share)),
        limit=completer.max_tokens,
        pack=FLAGS.pack,
        microbatches=microbatches,
        rollouts_per_prompt=share,
    )
    sizes = f"{FLAGS.prompt_tokens}+{FLAGS.tokens} tokens, {share} to a prompt, {microbatches} micro-batches"
    work = f"{FLAGS.config.model.name} {FLAGS.work}: {FLAGS.prompts}x{FLAGS.group} rollouts, {sizes}, {c.dtype}, remat {c.remat}"
    show = machine.printer(work, cores)
    ceiling = machine.measure([], c.dtype)
    show("matrix products, best", ceiling.flops_per_s / 1e9, "GFLOP/s")

    parts: dict[str, list[float]] = {"rollout": [], "reference": [], "update": [], "step": []}
    found = []
    random = random_groups(wanted, c.vocab_size)
    for number in range(FLAGS.warmup + FLAGS.repeats):
        times = [time.perf_counter()]
        groups = random
        if whole:
            groups, _ = sampling.batch(completer, completer.sampler.prepare(state.params), wanted, number)
            groups = list(map(paid_alternately, groups))
            memory.trim_soon()
        times.append(time.perf_counter())
        host = to_batch(groups)
        batch = sharding.put_rows(host, mesh)
        batch = jax.block_until_ready(complete(batch, state.params, reference, state.control))
        times.append(time.perf_counter())
        state, _ = step(state, batch, *head)
        jax.block_until_ready(state)
        times.append(time.perf_counter())
        if number >= FLAGS.warmup:
            for name, seconds in zip(parts, [b - a for a, b in itertools.pairwise(times)] + [times[-1] - times[0]], strict=True):
                parts[name].append(seconds)
            found.append((groups, host))
    tokens = [sum(len(r.prompt) + len(r.tokens) for group in groups for r in group.attempts) for groups, _ in found]
    floor = [ledger.reading(c, [host]) / ceiling.flops_per_s for _, host in found]
    efficiency = [(host.segment_BT > 0).sum() / batching.computed_tokens(host, microbatches) for _, host in found]
    show("packing efficiency", efficiency, "")
    for name, passes in (("reference", objective.passes), ("update", 3)):
        if passes:
            show(name, parts[name], "s")
            show(f"{name}, tokens", [n / s for n, s in zip(tokens, parts[name], strict=True)], "tokens/s")
            share = [passes * least / s for least, s in zip(floor, parts[name], strict=True)]
            show(f"{name}, share of the floor (model FLOPs utilisation)", share, "")
    if whole:
        show("rollout", parts["rollout"], "s", note="layout of the weights included")
        show("step", parts["step"], "s")
    show("peak memory", machine.peak_bytes() / 2**20, "MiB")


def run(whole: bool = False) -> None:
    """Define the flags and run the benchmark."""
    sampling.define_flags()
    flags.DEFINE_float("kl", None, "KL coefficient, in the place of the config's.", lower_bound=0.0)
    flags.DEFINE_integer("microbatches", 0, "0: those of the config; if it has none, as suits the machine.", lower_bound=0)
    flags.DEFINE_integer(
        "rollouts_per_prompt", None, "Attempts behind one copy of a prompt; default: as many as pay.", lower_bound=1
    )
    flags.DEFINE_boolean("pack", True, "Let short rollouts share a row.")

    def main(argv) -> None:
        logging.set_verbosity(logging.WARNING)
        if len(argv) > 1 or FLAGS.config is None:
            machine.refuse(argv, "--config=FILE, for example --config=configs/tiny.py")
        cores = machine.pin(FLAGS.cores)
        try:
            bench(cores, whole)
        except (ValueError, FileNotFoundError) as error:
            sys.exit(f"error: {' '.join(str(error).split())}")

    app.run(main, flags_parser=command.parse_or_exit)
