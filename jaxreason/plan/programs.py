"""The compiled programs of a `Work`, each with its cost and its memory."""

from __future__ import annotations

import functools
import itertools
import math
import re
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxreason import cost, learner
from jaxreason import logp as logp_
from jaxreason.draw import Filter
from jaxreason.plan import hlo
from jaxreason.plan.arrays import (
    batch_of,
    completer_of,
    meshes_of,
    model_of,
    number,
    processes_of,
    size_of,
    slot_devices,
    slots_of,
    state_of,
    weights_of,
    without_cache,
)
from jaxreason.plan.lines import Line, lines_of
from jaxreason.plan.work import Work
from jaxreason.sampler import MAX_SLOTS_PER_PROMPT


class Compiled(NamedTuple):
    """One compiled program, or, if the compiler refused it, the memory that it
    needed.
    """

    name: str
    compile_s: float
    needed_bytes: float  # of HBM; for a refused program the compiler's figure
    arguments: float = 0.0
    results: float = 0.0  # those that do not reuse the memory of an argument
    temporaries: float = 0.0  # `results` included
    code: float = 0.0
    program: hlo.Program | None = None  # None: the compiler refused it
    flops: float = 0.0  # per device, by formula
    times: int = 1  # runs per step
    lines: tuple[Line, ...] = ()  # of `program`
    kernel_flops: float = 0.0  # per device, of custom kernels by formula
    floor_bytes: float = 0.0  # of a decode program: the weights and the cache, read once per token
    model_flops: float = 0.0  # per device, of forward and backward pass without anything computed twice; 0: not a train step


def compile_program(
    name: str,
    work: Work,
    mesh: Mesh,
    lower: Callable,
    *,
    trips: int,
    flops: float,
    kernel_flops: float,
    times: int,
    model_flops: float = 0.0,
    floor_bytes: float = 0.0,
) -> Compiled:
    """Lower, compile and read one program of a mesh. `flops` and `kernel_flops` are
    summed over all its devices; `trips` is the trip count of loops whose length is
    data.
    """
    started_s = time.perf_counter()
    say(f"compiling {name} for {work.topology}, mesh {' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())} ...")
    try:
        with without_cache():
            compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(name, time.perf_counter() - started_s, needed(str(error)))
    memory = compiled.memory_analysis()
    text, sizes = compiled.as_text(), {"unknown_trips": trips, "devices": mesh.size}
    program = hlo.program_cost(text, **sizes)
    lines = lines_of(text, **sizes, kernel_flops=kernel_flops / mesh.size)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        name=name,
        compile_s=time.perf_counter() - started_s,
        needed_bytes=memory.argument_size_in_bytes + results + memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        results=results,
        temporaries=results + memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        program=program._replace(flops=program.flops + kernel_flops / mesh.size),
        flops=flops / mesh.size,
        times=times,
        lines=tuple(lines),
        kernel_flops=kernel_flops / mesh.size,
        model_flops=model_flops / mesh.size,
        floor_bytes=floor_bytes,
    )


def needed(message: str) -> float:
    """Read from a compiler's refusal how many bytes it would have needed."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT])|temporaries \(([\d.]+)([KMGT])\)", message)
    if not found:
        return math.inf
    number, unit = [group for group in found.groups() if group]
    return float(number) * 1024 ** ("KMGT".index(unit) + 1)


def say(text: str) -> None:
    """Print progress to stderr, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def once_for(part: Callable[[Work], Work]) -> Callable:
    """Make a decorator that compiles a program once for all works with the same `part`:
    `part` resets the fields that the program does not depend on.
    """

    def decorate(compile: Callable[[Work], Compiled]) -> Callable[[Work], Compiled]:
        kept = functools.cache(compile)
        return functools.wraps(compile)(lambda work: kept(part(work)))

    return decorate


def learner_part(work: Work) -> Work:
    return work._replace(sampler=None)


def decode_part(work: Work) -> Work:
    return work._replace(microbatches=1)


def prefill_part(work: Work) -> Work:
    """Reset the fields that prefill does not depend on. The program is the same for
    every number of slots, except for very few.
    """
    devices = slot_devices(work)
    return decode_part(work).with_slots(-(-completer_of(work).rows * processes_of(work) // devices) * devices)


@once_for(learner_part)
def compile_train(work: Work) -> Compiled:
    state, c, mesh = state_of(work), work.shape, meshes_of(work).learn
    where = jax.tree.map(lambda x: x.sharding, state)
    step = learner.compile_train_step(
        model_of(work), work.objective, work.optimizer, microbatches=work.microbatches, state_shardings=where
    )
    refers = work.objective.divergence is not None
    head = (model_of(work).head(state.params),) if refers else ()
    # The decision of `logp.score`.
    logits = work.rows // work.microbatches * work.length * c.vocab_size * (2 if refers else 1)
    remade = logits > logp_.logits_limits(mesh).kept
    return compile_program(
        f"train step, {work.microbatches} micro-batches",
        work,
        mesh,
        lambda: step.lower(state, batch_of(work), *head),
        trips=work.microbatches,
        flops=cost.train_flops(c, work.rows, work.length, remade),
        kernel_flops=0.0 if c.attention == "xla" else cost.flash_flops(c, work.rows, work.length),
        times=work.updates,
        model_flops=3 * cost.forward_flops(c, [(0, work.length)] * work.rows),
    )


def passes_of(work: Work) -> list[str]:
    """Name the forward passes over a batch before its updates, a key of `PASSES`
    each, in the order in which they run.
    """
    objective = work.objective
    asked = (
        *(objective.needs_reference, objective.divergence is not None),
        *(objective.critic is not None, objective.needs_entropy),
    )
    return list(itertools.compress(PASSES, asked))


PASSES = {
    "reference log-probs": logp_.compile_token_logp,
    "reference hidden states": logp_.compile_hidden,
    "values": logp_.compile_token_values,
    "entropies": logp_.compile_token_entropy,
}


def compile_passes(work: Work) -> list[Compiled]:
    return [compile_pass(work, name) for name in passes_of(work)]


def compile_pass(work: Work, name: str) -> Compiled:
    return compiled_pass(learner_part(work), name)


@functools.cache
def compiled_pass(work: Work, name: str) -> Compiled:
    mesh = meshes_of(work).learn
    score = PASSES[name](model_of(work), work.microbatches, mesh)
    plain = work.shape.attention == "xla"
    keys = cost.causal_keys(work.length) if plain else work.length / 2
    logits = 0 if name in ("values", "reference hidden states") else work.rows * work.length
    parts = cost.dense_flops(work.shape, work.rows, work.length, keys, logits)
    return compile_program(
        f"{name}, {work.microbatches} micro-batches",
        work,
        mesh,
        lambda: score.lower(state_of(work).params, batch_of(work)),
        trips=work.microbatches,
        flops=sum(parts.values()) + cost.adapter_flops(work.shape, work.rows * work.length),
        kernel_flops=0.0 if plain else parts["attention"],
        times=1,
    )


@once_for(prefill_part)
def compile_prefill(work: Work) -> Compiled:
    completer, (weights, _, _) = completer_of(work), weights_of(work)
    longest, width = completer.prompt_buckets[-1], dict(work.sampler)["prefill_tokens"]
    prompts = [number(work, completer.rows, longest), number(work, completer.rows)]
    return compile_program(
        f"prefill, {completer.rows} prompts",
        work,
        meshes_of(work).sample,
        lambda: completer.sampler.prefill.lower(weights, *prompts),
        trips=-(-longest // width),
        flops=cost.prefill_flops(work.shape, completer.rows, longest),
        kernel_flops=0.0,
        times=-(-problems_each(work) // completer.rows),
    )


@once_for(decode_part)
def compile_decode(work: Work) -> Compiled:
    completer, (weights, _, weight_bytes) = completer_of(work), weights_of(work)
    sampler = completer.sampler
    steps = -(-problems_each(work) * work.group // sampler.slots) * work.new_tokens  # in waves of `slots` attempts
    one = sum(cost.dense_flops(work.shape, sampler.slots, 1, sampler.length, sampler.slots).values())
    one += cost.dense_flops(work.shape, sampler.prompt_rows * MAX_SLOTS_PER_PROMPT, 1, completer.prompt_buckets[-1], 0)[
        "attention"
    ]
    return compile_program(
        f"decode, {sampler.chunk_tokens} tokens in {sampler.slots} slots",
        work,
        meshes_of(work).sample,
        lambda: sampler.decode.lower(weights, slots_of(work), number(work, dtype=jnp.float32), Filter()),
        trips=sampler.chunk_tokens,
        flops=sampler.chunk_tokens * one,
        kernel_flops=0.0,
        times=-(-steps // sampler.chunk_tokens),
        floor_bytes=sampler.chunk_tokens * (weight_bytes + size_of(slots_of(work).cache)),
    )


def problems_each(work: Work) -> int:
    """Count the problems that a process samples, at most."""
    return -(-work.problems // processes_of(work))


def programs_of(work: Work) -> list[Compiled]:
    """Compile the programs of a step, in the order in which they run."""
    sampling = [compile_prefill(work), compile_decode(work)] if work.sampler is not None else []
    return [*sampling, *compile_passes(work), compile_train(work)]
