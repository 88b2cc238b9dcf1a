r"""What a config needs of a TPU slice, found on any machine: does it fit, what bounds it, what will it cost.

    python -m jaxreason.plan --config=configs/gsm8k.py:model=qwen3_8b --topology=v5e:4x8 --config.sharding.mesh.fsdp=8 \
        --config.sharding.mesh.tensor=4 --config.sharding.mesh.data=1

Compiles the train step, the log-probs of a reference policy if there is one, prefill and decode for the topology, with libtpu,
and reads memory, FLOPs, traffic and collectives from what was compiled. Nothing is downloaded and no task is loaded: a named size
is taken from our own table, any other model from a folder with a config.json. If it does not fit, says what would.

Assumed, and worse than what will be: every sequence is as long as it may be, all micro-batches are in use, every decode step
attends to the longest cache. Assumed, and better: nothing but matrix products, memory and network takes time; `--efficiency` is
the share of that roofline that is reached, and is a guess. HBM holds at each moment what the loop of `train` holds then: params,
optimizer and reference throughout; sampler's weights, slots, and two batches of prompts while sampling. Left out: the host
(verifiers, layout of batches), checkpoints and evaluations, memory lost to fragmentation, programs but the one that runs. On
several hosts all of them are supposed to sample together, as one program.

A column "of formula" above 1 says that devices compute the same thing: of prefill they do, along data and fsdp.

Findings, 2026-11-24 (jax 0.10.2, libtpu 0.0.42, no TPU at hand: nothing here has been held against one).
- FLOPs of train step and decode equal the formula to three digits: Qwen3-8B on v5e:4x8, Qwen2.5-0.5B on v5e:2x4.
- On one CPU the compiler's sizes are what a train step takes: temporaries of 2,902, 4,478 and 15,951 MiB, and the process grew by
  2,999, 4,541 and 15,938 (SmolLM2-135M, 8 x 256, remat full; the same in 2 micro-batches, none; Qwen3-0.6B, 4 x 256 in 2, dots).
- XLA does not gather weights over `fsdp` here but adds up activations: with fsdp=8 a device of v5e:2x4 sends 731 GB in a step of
  `configs/gsm8k.py` in 4 micro-batches. With activations held to rows between layers (tried, not in) it would send 88 GB and
  compute half as much again.
- Making the sampler's weights is the fullest moment of Qwen3-8B on v5e:4x8 with fsdp=8, tensor=4 (14.3 of 15.75 GiB), and what
  keeps Qwen3-32B off any v5e: they are gathered in the dtype of the params, then cast.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags, logging
from ml_collections import config_flags

from jaxreason import cost
from jaxreason.options import call, unknown

FLAGS = flags.FLAGS
PREFILL_TOKENS = 1024  # what the sampler takes on an accelerator
MESHES = 3  # other meshes that are tried, at most


class Work(NamedTuple):
    """What is planned. Hashable, so that what was compiled for one part of it is kept."""

    topology: str
    mesh: tuple[tuple[str, int], ...]
    shape: Any  # ModelConfig
    phase: str
    objective: Any
    optimizer: Any
    rows: int
    length: int  # of a row
    microbatches: int
    updates: int  # of a batch
    samples: bool  # in every step; otherwise only for evaluations, if there is a sampler at all
    sampler: tuple[tuple[str, Any], ...] | None  # its section
    problems: int  # of a batch that is sampled
    group: int
    new_tokens: int  # of an attempt, at most

    @property
    def chip(self) -> cost.Chip:
        return cost.CHIPS[self.topology.partition(":")[0]]

    @property
    def devices(self) -> int:
        return math.prod(size for _, size in self.mesh)

    @property
    def row_devices(self) -> int:
        return dict(self.mesh)["data"] * dict(self.mesh)["fsdp"]

    @property
    def slots(self) -> int:
        return dict(self.sampler)["slots"]

    def with_slots(self, slots: int) -> Work:
        return self._replace(sampler=tuple({**dict(self.sampler), "slots": slots}.items()))


# --- what a config asks for ---


def read(config: dict, topology: str, phase: str | None) -> Work:
    """Read a config as `build` does, but for tasks, tokenizer and weights.

    Raises:
      ValueError: anything wrong with it, in one line.
    """
    from jaxreason import build, objectives, optimizer, sharding

    for key in build.SECTIONS:
        if key not in config:
            raise ValueError(f"the config lacks {key!r}; it has: {', '.join(sorted(config))}")
    names = tuple(config["phases"])
    phase = names[-1] if phase is None else phase
    if phase not in config or phase in build.SECTIONS or not isinstance(config[phase], dict):
        raise ValueError(unknown("phase", phase, names))
    section = config[phase]
    mesh = dict(call(sharding.make_mesh, config["sharding"]["mesh"], "config.sharding.mesh", devices=devices_of(topology)).shape)
    shape = read_shape(config)
    objective = call(objectives.make, section["objective"], f"config.{phase}.objective")
    updates, steps = section.get("updates_per_batch", 1), section["steps"]
    source = section["source"]
    sizes = call(read_source, {"name": None} | source, f"config.{phase}.source", sampler=config["sampler"])
    evaluated = bool(config["evaluate"].get("suites"))
    sampler = {key: tuple(v) if isinstance(v, list) else v for key, v in config["sampler"].items()}
    sampler["prefill_tokens"] = sampler.get("prefill_tokens") or PREFILL_TOKENS
    work = Work(
        topology=topology,
        mesh=tuple(mesh.items()),
        shape=shape,
        phase=phase,
        objective=objective,
        optimizer=call(optimizer.make, section["optimizer"], f"config.{phase}.optimizer", steps=steps * updates),
        microbatches=section.get("microbatches", 1),
        updates=updates,
        samples=source["name"] == "rollouts",
        sampler=tuple(sampler.items()) if evaluated or source["name"] == "rollouts" else None,
        **sizes,
    )
    check(work)
    return work


def read_shape(config: dict):
    """The shape of the model, by `build.make_model`."""
    from jaxreason import build
    from jaxreason.model import attention
    from jaxreason.model.config import SIZES

    section, folder, tokenizer = dict(config["model"]), None, None
    name = section["name"]
    if section.get("weights") == "pretrained":
        section["weights"] = "random"
        if name not in SIZES:
            folder = Path(name)
            if not (folder / "config.json").is_file():
                raise ValueError(f"{unknown('model', name, SIZES)}; or a folder with a config.json (a plan downloads nothing)")
    elif name == "tiny":
        tokenizer, _ = call(build.make_text, config["text"], "config.text", folder=None)
    if section.get("scan_layers") is None:
        section["scan_layers"] = True  # as build chooses on an accelerator
    shape, _ = call(build.make_model, section, "config.model", folder=folder, tokenizer=tokenizer)
    attention.check_platform(shape, "tpu")
    return shape


def read_source(*, name: str, sampler: dict, **section) -> dict:
    """How many rows a source's batches have, how long they are at most, and what is sampled for them."""
    from jaxreason import build

    if name not in build.SOURCES:
        raise ValueError(unknown("source", name, build.SOURCES))
    allowed = inspect.signature(build.SOURCES[name]).parameters
    for key in section:
        if key not in allowed:
            raise ValueError(unknown("field of the source", key, allowed))
    new_tokens = sampler["max_tokens"]
    if name != "rollouts":
        return {
            "rows": section["rows"],
            "length": section["max_tokens" if name == "demonstrations" else "length"],
            "problems": 0,
            "group": 0,
            "new_tokens": new_tokens,
        }
    if section.get("max_tokens") is not None:
        new_tokens = section["max_tokens"]
    problems, group = section["problems"], section["group"]
    return {
        "rows": problems * group,
        "length": sampler["max_prompt_tokens"] + new_tokens,
        "problems": problems,
        "group": group,
        "new_tokens": new_tokens,
    }


def check(work: Work) -> None:
    """Raise ValueError for what does not divide."""
    if work.microbatches < 1 or work.rows % (work.row_devices * work.microbatches):
        allowed = ", ".join(str(w.microbatches) for w in microbatch_choices(work._replace(microbatches=1)))
        raise ValueError(
            f"config.{work.phase} has {work.rows} rows a batch, which do not divide over {work.row_devices} devices (data x "
            f"fsdp) x {work.microbatches} micro-batches; on this mesh --config.{work.phase}.microbatches may be "
            f"{allowed or 'nothing'}; or change problems x group (or rows), or config.sharding.mesh"
        )
    state_of(work)  # raises if an axis of a parameter does not divide
    if work.sampler is not None:
        roller_of(work)


@functools.cache
def devices_of(topology: str):
    """The devices of a topology, of which none need be there.

    Raises:
      ValueError: it is unknown, or libtpu is missing.
    """
    if topology not in cost.topology_names():
        raise ValueError(f"{unknown('topology', topology, cost.topology_names())}; --topology=list shows them")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu, the compiler for TPUs, is not installed; pip install -e '.[tpu]'")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no cloud around that could say which TPU this is
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no TPU is opened, so several processes may compile at a time
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # whatever it is: libtpu complains of having none
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    bounds = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds).devices


# --- what stands for arrays ---


@functools.cache
def mesh_of(topology: str, sizes: tuple[tuple[str, int], ...]):
    from jaxreason import sharding

    return sharding.make_mesh(**dict(sizes), devices=devices_of(topology))


@functools.cache
def model_of(work: Work):
    from jaxreason.model import transformer

    return transformer(work.shape, mesh_of(work.topology, work.mesh))


def placed(tree, where):
    """What stands for arrays in `where`, a sharding or a tree of them."""
    import jax

    if isinstance(where, jax.sharding.Sharding):
        where = jax.tree.map(lambda _: where, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)


def state_of(work: Work):
    """The train state."""
    import jax

    from jaxreason import sharding
    from jaxreason.train import new_state

    state = jax.eval_shape(lambda: new_state(model_of(work).init(jax.random.key(0)), work.optimizer))
    return placed(state, sharding.shardings(state, mesh_of(work.topology, work.mesh)))


def batch_of(work: Work):
    """A batch of full rows."""
    import dataclasses

    from jaxreason import batching, sharding

    batch = batching.empty(work.rows, work.length)
    if work.objective.needs_reference:
        batch = dataclasses.replace(batch, reference_logp_BT=batch.weight_BT)
    return placed(batch, sharding.rows(mesh_of(work.topology, work.mesh)))


@functools.cache
def roller_of(work: Work):
    """The sampler and the sizes of its prompts. Its tokenizer is not the model's; programs know the end of a sequence only."""
    from jaxreason import build, text

    tokenizer = text.make("byte_level")
    return call(
        build.make_roller,
        dict(work.sampler),
        "config.sampler",
        model=model_of(work),
        tokenizer=tokenizer,
        format=text.plain(tokenizer),
        mesh=mesh_of(work.topology, work.mesh),
    )


def weights_of(work: Work):
    """The sampler's weights in their layout, and how many bytes of a device making them takes and leaves beside the params."""
    import jax

    from jaxreason import sharding
    from jaxreason.sampler import Weights

    model, mesh = model_of(work), mesh_of(work.topology, work.mesh)
    params = state_of(work).params
    gathered = placed(params, sharding.gathered(params, mesh))
    merged = jax.eval_shape(model.merge, params)
    merged = placed(merged, sharding.gathered(merged, mesh))
    layout = jax.eval_shape(model.decode_layout, merged)
    layout = placed(layout, sharding.gathered(layout, mesh))

    def flat(tree):
        return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}

    old, moved = flat(params), flat(gathered)
    new = {path for path, x in moved.items() if not x.sharding.is_equivalent_to(old[path].sharding, x.ndim)}
    peak = sum(size_of(moved[path]) for path in new)
    adapted = {path.removeprefix("['lora']").rpartition("['a']")[0] for path in moved if path.startswith("['lora']")} - {""}
    left = 0.0
    for path, x in flat(layout).items():
        base = f"['frozen']{path}" if f"['frozen']{path}" in moved else path
        before = flat(merged)[path]
        is_merged = path.startswith("['layers']") and any(f"['layers']{name}['kernel']" == path for name in adapted)
        is_cast = x.dtype != before.dtype
        peak += is_merged * size_of(before) + is_cast * size_of(x)
        left += (is_merged or is_cast or base in new) * size_of(x)
    return Weights(layout, layout), peak, left


def size_of(tree) -> float:
    """Bytes of what stands for arrays, on one device."""
    import jax

    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


# --- compiling ---


class Compiled(NamedTuple):
    """One program, or what it lacked."""

    name: str
    compile_s: float
    needed_bytes: float  # of HBM; of one that was refused, what the compiler says
    arguments: float = 0.0
    temporaries: float = 0.0  # and results that are not in the place of arguments
    code: float = 0.0
    program: cost.Program | None = None  # None: the compiler refused it
    flops: float = 0.0  # by formula
    times: int = 1  # in a step


def compile_program(
    name: str, work: Work, lower: Callable, *, trips: int, flops: float, kernel_flops: float, times: int
) -> Compiled:
    """Lower, compile and read one program."""
    import jax

    started_s = time.perf_counter()
    say(f"compiling {name} for {work.topology}, mesh {show_mesh(work)} ...")
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(name, time.perf_counter() - started_s, needed(str(error)))
    memory = compiled.memory_analysis()
    program = cost.program_cost(compiled.as_text(), unknown_trips=trips, devices=work.devices)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        name=name,
        compile_s=time.perf_counter() - started_s,
        needed_bytes=memory.argument_size_in_bytes + results + memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        temporaries=results + memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        program=program._replace(flops=program.flops + kernel_flops / work.devices),
        flops=flops / work.devices,
        times=times,
    )


def needed(message: str) -> float:
    """Read from a compiler's refusal how many bytes it would have needed."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT])|temporaries \(([\d.]+)([KMGT])\)", message)
    if not found:
        return math.inf
    number, unit = [group for group in found.groups() if group]
    return float(number) * 1024 ** ("KMGT".index(unit) + 1)


def compile_train(work: Work) -> Compiled:
    return compile_update(work._replace(sampler=None))


@functools.cache
def compile_update(work: Work) -> Compiled:
    import jax

    from jaxreason import learner

    state, c = state_of(work), work.shape
    where = jax.tree.map(lambda x: x.sharding, state)
    step = learner.compile_train_step(
        model_of(work), work.objective, work.optimizer, microbatches=work.microbatches, state_shardings=where
    )
    # As `token_outputs` decides it.
    at_once = learner.logits_at_once(mesh_of(work.topology, work.mesh))
    chunked = work.rows // work.microbatches * work.length * c.vocab_size > at_once
    return compile_program(
        f"train step, {work.microbatches} micro-batches",
        work,
        lambda: step.lower(state, batch_of(work)),
        trips=work.microbatches,
        flops=cost.train_flops(c, work.rows, work.length, chunked),
        kernel_flops=0.0 if c.attention == "xla" else cost.flash_flops(c, work.rows, work.length),
        times=work.updates,
    )


def compile_reference(work: Work) -> Compiled:
    return compile_logp(work._replace(sampler=None))


@functools.cache
def compile_logp(work: Work) -> Compiled:
    from jaxreason import learner

    logp = learner.compile_token_logp(model_of(work), work.microbatches, mesh_of(work.topology, work.mesh))
    parts = cost.dense_flops(work.shape, work.rows, work.length, work.length, work.rows * work.length)
    kernel = 0.0 if work.shape.attention == "xla" else parts["attention"] / 2
    parts["attention"] = kernel or parts["attention"]
    return compile_program(
        f"reference log-probs, {work.microbatches} micro-batches",
        work,
        lambda: logp.lower(state_of(work).params, batch_of(work)),
        trips=work.microbatches,
        flops=sum(parts.values()) + cost.adapter_flops(work.shape, work.rows * work.length),
        kernel_flops=kernel,
        times=1,
    )


def compile_prefill(work: Work) -> Compiled:
    """Prefill; the same program whatever the number of slots, but for very few."""
    rows = roller_of(work).rows
    return compile_prompts(work._replace(microbatches=1).with_slots(-(-rows // work.row_devices) * work.row_devices))


@functools.cache
def compile_prompts(work: Work) -> Compiled:
    roller, (weights, _, _) = roller_of(work), weights_of(work)
    columns, width = roller.prompt_buckets[-1], dict(work.sampler)["prefill_tokens"]
    together = min(max(1, width // columns), roller.rows)
    rows = -(-roller.rows // together) * together
    prompts = [number(work, roller.rows, columns), number(work, roller.rows)]
    return compile_program(
        f"prefill, {roller.rows} prompts",
        work,
        lambda: roller.sampler.prefill.lower(weights, *prompts),
        trips=-(-columns // width),
        flops=sum(cost.dense_flops(work.shape, rows, columns, columns, 0).values()),
        kernel_flops=0.0,
        times=-(-work.problems // roller.rows),
    )


def compile_decode(work: Work) -> Compiled:
    return compile_chunk(work._replace(microbatches=1))


@functools.cache
def compile_chunk(work: Work) -> Compiled:
    import jax.numpy as jnp

    from jaxreason.sampler import Filter

    sampler, (weights, _, _) = roller_of(work).sampler, weights_of(work)
    tokens = -(-work.problems * work.group // sampler.slots) * work.new_tokens  # steps: as many waves as it takes
    one = sum(cost.dense_flops(work.shape, sampler.slots, 1, sampler.length, sampler.slots).values())
    return compile_program(
        f"decode, {sampler.chunk_tokens} tokens in {sampler.slots} slots",
        work,
        lambda: sampler.decode.lower(weights, slots_of(work), number(work, dtype=jnp.float32), Filter()),
        trips=sampler.chunk_tokens,
        flops=sampler.chunk_tokens * one,
        kernel_flops=0.0,
        times=-(-tokens // sampler.chunk_tokens),
    )


def number(work: Work, *shape: int, dtype="int32"):
    """What stands for a small array that every device has."""
    import jax

    everywhere = jax.NamedSharding(mesh_of(work.topology, work.mesh), jax.P())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)


@functools.cache
def slots_of(work: Work, columns: int | None = None):
    """What stands for the slots of the sampler, with the longest cache or one of so many columns."""
    import jax

    sampler = roller_of(work).sampler
    slots = jax.eval_shape(lambda: sampler.resize(sampler.empty(), columns or sampler.length))
    return placed(slots, sampler.empty.lower().compile().output_shardings)


# --- what is in memory when ---


class Stage(NamedTuple):
    """A moment of the loop, and what stands in a device's HBM then, in bytes by kind."""

    name: str
    kinds: dict[str, float]
    refused: str = ""  # what the compiler said, if it compiled nothing

    @property
    def bytes(self) -> float:
        return sum(self.kinds.values())


KINDS = ("params", "optimizer", "reference", "sampler's weights", "KV cache", "batch", "temporaries", "programs")


def resident(work: Work) -> dict[str, float]:
    """What is there throughout."""
    state = state_of(work)
    params = size_of(state.params)
    return {
        "params": params,
        "optimizer": size_of(state.opt_state),
        "reference": params if work.objective.needs_reference else 0.0,
    }


def layout_stage(work: Work) -> Stage:
    """Making the sampler's weights. No program of ours: its size is computed, and needs no compiling."""
    return Stage("lay out weights", resident(work) | {"sampler's weights": weights_of(work)[1]})


def program_stage(name: str, compiled: Compiled, kinds: dict[str, float], given: str) -> Stage:
    """A program that runs beside what is there: its arguments that are not in `kinds` are called `given`."""
    if compiled.program is None:
        return Stage(name, {"temporaries": compiled.needed_bytes}, refused="by the compiler, without what stands beside it")
    return Stage(name, kinds | {given: kinds.get(given, 0.0), "temporaries": compiled.temporaries, "programs": compiled.code})


def learner_stages(work: Work) -> list[Stage]:
    """The moments of an update."""
    kinds, compiled = resident(work), compile_train(work)
    kinds["batch"] = max(0.0, compiled.arguments - kinds["params"] - kinds["optimizer"])
    stages = [program_stage("train step", compiled, kinds, "batch")]
    if work.objective.needs_reference:
        stages.append(program_stage("reference log-probs", compile_reference(work), kinds, "batch"))
    return stages


def sampler_stages(work: Work) -> list[Stage]:
    """The moments of sampling, the layout of weights included."""
    roller, (_, _, left) = roller_of(work), weights_of(work)
    sampler = roller.sampler
    decode, prefill = compile_decode(work), compile_prefill(work)
    slots, prompts = size_of(slots_of(work)), prompts_bytes(work)
    before = size_of(slots_of(work, sampler.buckets[-2])) if len(sampler.buckets) > 1 else 0.0
    kinds = resident(work) | {"sampler's weights": left, "KV cache": slots + prompts}
    return [
        layout_stage(work),
        program_stage("prefill", prefill, kinds, "KV cache"),
        program_stage("decode", decode, kinds, "KV cache"),
        # The grown cache is a copy: both are there for a moment.
        Stage("grow the cache", kinds | {"KV cache": slots + before + prompts, "programs": decode.code}),
    ]


def prompts_bytes(work: Work) -> float:
    """Bytes of a batch of prefilled prompts on a device, which waits while others are placed or prefilled."""
    import jax

    roller, model = roller_of(work), model_of(work)
    cache = dict(work.sampler).get("cache_dtype")
    made = jax.eval_shape(lambda: model.init_cache(roller.rows, roller.prompt_buckets[-1], cache, stacked=True))
    where = jax.NamedSharding(mesh_of(work.topology, work.mesh), jax.P(None, None, "tensor"))
    return size_of(placed(made, where))


def fits(stages: Sequence[Stage], work: Work) -> bool:
    return all(stage.bytes <= work.chip.hbm_bytes and not stage.refused for stage in stages)


def stages_of(work: Work) -> list[Stage]:
    """All moments; if params and optimizer alone do not fit, only those that need no compiling."""
    alone = [Stage("between steps", resident(work))]
    if work.sampler is not None:
        alone.append(layout_stage(work))
    if not fits(alone[:1], work):
        return alone
    return learner_stages(work) + (sampler_stages(work) if work.sampler is not None else [])


def programs_of(work: Work) -> list[Compiled]:
    """What was compiled, in the order of a step."""
    sampling = [compile_prefill(work), compile_decode(work)] if work.sampler is not None else []
    learning = [*([compile_reference(work)] if work.objective.needs_reference else []), compile_train(work)]
    return sampling + learning


# --- what would fit ---


def find_fitting(work: Work) -> Work | None:
    """The largest micro-batch and number of slots that fit, on this mesh or else on another of as many devices."""
    for mesh in [work.mesh, *other_meshes(work)][: 1 + MESHES]:
        tried = work._replace(mesh=mesh)
        if not fits(still_stages(tried), tried):
            continue
        learner = first_that_fits(microbatch_choices(tried), lambda w: fits(learner_stages(w), w))
        if learner is None:
            continue
        if work.sampler is None:
            return learner
        sampler = first_that_fits(slot_choices(learner), lambda w: fits(sampler_stages(w), w))
        if sampler is not None:
            return sampler
    return None


def still_stages(work: Work) -> list[Stage]:
    """What needs no compiling."""
    return [Stage("between steps", resident(work))] + ([layout_stage(work)] if work.sampler is not None else [])


def first_that_fits(choices: Sequence[Work], fit: Callable[[Work], bool]) -> Work | None:
    """The first choice that fits: the first, or by bisection, as what comes later needs less; None if not even the last does."""
    if choices and fit(choices[0]):
        return choices[0]
    if not choices or not fit(choices[-1]):
        return None
    low, high = 1, len(choices) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fit(choices[middle]) else (middle + 1, high)
    return choices[low]


def microbatch_choices(work: Work) -> list[Work]:
    """As many micro-batches as asked for, or more: those that divide."""
    each, rest = divmod(work.rows, work.row_devices)
    counts = [n for n in range(1, each + 1) if each % n == 0] if not rest else []
    enough = [n for n in counts if n >= work.microbatches]
    return [work._replace(microbatches=n) for n in enough or counts[-1:]]


def slot_choices(work: Work) -> list[Work]:
    """As many slots as asked for, or a half, a quarter, ..., that divide over the devices."""
    slots = work.slots // work.row_devices * work.row_devices
    counts = []
    while slots:
        counts.append(slots)
        slots = slots // 2 // work.row_devices * work.row_devices
    return [work.with_slots(n) for n in counts]


def other_meshes(work: Work) -> list[tuple[tuple[str, int], ...]]:
    """Meshes of all devices of the topology that hold the state and the layout of weights: `tensor` as small as may be."""
    devices, found = len(devices_of(work.topology)), []
    for tensor, fsdp in itertools.product(range(1, devices + 1), range(devices, 0, -1)):
        if devices % (tensor * fsdp):
            continue
        mesh = (("data", devices // tensor // fsdp), ("fsdp", fsdp), ("tensor", tensor))
        tried = work._replace(mesh=mesh)
        if mesh == work.mesh or tensor in (dict(m)["tensor"] for m in found) or work.shape.kv_heads % tensor:
            continue
        try:
            if microbatch_choices(tried) and fits(still_stages(tried), tried) and (not work.sampler or slot_choices(tried)):
                found.append(mesh)
        except ValueError:  # an axis does not divide
            continue
    return found


def larger_topology(work: Work) -> str | None:
    """The smallest topology of the same chips that would hold the state and the layout of weights; nothing is compiled for it."""
    kind, chips = work.topology.partition(":")[0], cost.chips_of(work.topology)
    for name in (f"{kind}:{shape}" for shape in work.chip.topologies):
        if cost.chips_of(name) > chips and other_meshes(work._replace(topology=name)):
            return name
    return None


def flags_for(work: Work, found: Work) -> list[str]:
    """The flags that change one piece of work into the other."""
    changed = []
    if found.mesh != work.mesh:
        changed += [f"--config.sharding.mesh.{axis}={size}" for axis, size in found.mesh]
    if found.microbatches != work.microbatches:
        changed.append(f"--config.{work.phase}.microbatches={found.microbatches}")
    if work.sampler is not None and found.slots != work.slots:
        changed.append(f"--config.sampler.slots={found.slots}")
    return changed


# --- what it will take ---


class Prediction(NamedTuple):
    """Of one step at a share of the roofline."""

    step_s: float
    sampling_s: float
    learning_s: float
    sampled_tokens_per_s: float
    trained_tokens_per_s: float  # of learning
    steps_per_hour: float
    chip_hours: float  # of 1,000 steps
    usd: float | None  # of 1,000 steps


def predict(work: Work, programs: Sequence[Compiled], efficiency: float, usd_per_hour: float | None) -> Prediction:
    """Time a step. `usd_per_hour` is that of a chip."""
    seconds = {p.name: p.times * cost.roofline(p.program, work.chip).seconds / efficiency for p in programs}
    sampling = sum(s for name, s in seconds.items() if work.samples and name.startswith(("prefill", "decode")))
    learning = sum(s for name, s in seconds.items() if name.startswith(("train", "reference")))
    step_s = sampling + learning
    devices = len(devices_of(work.topology))  # all are paid for, whatever the mesh
    hours = 1000 * step_s / 3600
    tokens = work.problems * work.group * work.new_tokens
    return Prediction(
        step_s=step_s,
        sampling_s=sampling,
        learning_s=learning,
        sampled_tokens_per_s=tokens / sampling if sampling else 0.0,
        trained_tokens_per_s=work.rows * work.length / learning,
        steps_per_hour=3600 / step_s,
        chip_hours=hours * devices,
        usd=None if usd_per_hour is None else hours * devices * usd_per_hour,
    )


# --- what is said ---


def say(text: str) -> None:
    """Tell what is going on, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def show_mesh(work: Work) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in work.mesh)


def describe(work: Work, efficiency: float, prices: dict[str, float]) -> dict:
    """All that was found of one piece of work, as a script reads it."""
    from jaxreason.model.config import count_parameters

    kind, chip = work.topology.partition(":")[0], work.chip
    stages = stages_of(work)
    fitting = fits(stages, work)
    compiled = any(stage.name == "train step" for stage in stages)
    programs = [p for p in (programs_of(work) if compiled else []) if p.program is not None]
    usd = prices.get(kind, chip.usd_per_hour)
    whole = compiled and len(programs) == len(programs_of(work))
    return {
        "topology": work.topology,
        "chips": cost.chips_of(work.topology),
        "devices": len(devices_of(work.topology)),
        "mesh": dict(work.mesh),
        "parameters": count_parameters(work.shape),
        "phase": work.phase,
        "rows": work.rows,
        "row_tokens": work.length,
        "microbatches": work.microbatches,
        "slots": work.slots if work.sampler is not None else None,
        "fits": fitting,
        "hbm_bytes": chip.hbm_bytes,
        "peak_bytes": finite(max(stage.bytes for stage in stages)),
        "stages": {stage.name: describe_stage(stage) for stage in stages},
        "programs": {p.name: describe_program(p, chip) for p in programs},
        "efficiency": efficiency,
        "usd_per_chip_hour": usd,
        "price_source": "--prices" if kind in prices else chip.price_source,
        "prediction": predict(work, programs, efficiency, usd)._asdict() if whole else None,
    }


def describe_stage(stage: Stage) -> dict:
    kinds = {kind: finite(size) for kind, size in stage.kinds.items()}
    return kinds | {"total": finite(stage.bytes)} | ({"refused": stage.refused} if stage.refused else {})


def finite(size: float) -> float | None:
    """None for a size that the compiler did not tell."""
    return size if math.isfinite(size) else None


def describe_program(p: Compiled, chip: cost.Chip) -> dict:
    line, sent = cost.roofline(p.program, chip), sorted(p.program.sent.items())
    return {
        "compile_s": p.compile_s,
        "times_a_step": p.times,
        "flops": p.program.flops,
        "flops_by_formula": p.flops,
        "bytes": p.program.bytes,
        "sent": {f"{kind} of {n}": {"bytes": size, "times": times} for (kind, n), (size, times) in sent},
        "loops": p.program.loops,
        "loops_of_given_length": p.program.unknown_loops,
        **line._asdict(),
        "seconds": line.seconds,
        "bound": line.bound,
    }


def show(found: dict) -> None:
    """Print what was found as tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)

    def table(title: str, names: Sequence[str], rows) -> None:
        made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for at, name in enumerate(names):
            made.add_column(name, justify="right" if at else "left", no_wrap=True)
        for row in rows:
            made.add_row(*row)
        console.print(made)

    def gib(size: float | None) -> str:
        if not size:
            return "?" if size is None else ""
        return f"{size / cost.GIB:,.2f}" if size > cost.GIB / 200 else "<0.01"

    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    console.print(
        f"{found['parameters'] / 1e9:.2f} G parameters on {found['topology']} ({found['chips']} chips), mesh {mesh}; phase "
        f"{found['phase']}: {found['rows']} rows of {found['row_tokens']} tokens in {found['microbatches']} micro-batches"
        + (f", {found['slots']} slots" if found["slots"] else "")
        + ("" if math.prod(found["mesh"].values()) == found["devices"] else "; the mesh leaves devices idle")
    )
    used = [kind for kind in KINDS if any(stage.get(kind) for stage in found["stages"].values())]
    rows = [[name, *(gib(s.get(kind, 0)) for kind in used), gib(s["total"])] for name, s in found["stages"].items()]
    hbm = gib(found["hbm_bytes"])
    table(f"HBM of a chip, GiB, of {hbm} that a program may use", ["when", *used, "all"], rows)
    for name, stage in found["stages"].items():
        if "refused" in stage:
            console.print(f"{name}: refused {stage['refused']}; that alone needs {gib(stage['total'])} of {hbm} GiB")
    if found["programs"]:
        show_programs(found, table)
    if found["prediction"]:
        show_prediction(found, console)


def short(x: float) -> str:
    """Three digits or more."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def show_programs(found: dict, table: Callable) -> None:
    rows = []
    for name, p in found["programs"].items():
        work = [p["flops"] / 1e12, p["bytes"] / 1e9, *(1e3 * p[kind] for kind in ("compute_s", "memory_s", "network_s"))]
        tflop, *rest = map(short, work)
        rows.append([name, str(p["times_a_step"]), tflop, f"{p['flops'] / p['flops_by_formula']:.2f}", *rest, p["bound"]])
    names = ["program, a run", "runs a step", "TFLOP", "of formula", "HBM GB", "compute ms", "HBM ms", "network ms", "bound by"]
    table("Work of a chip, and its time at the chip's peak", names, rows)
    rows = [
        [name, kind, f"{sent['times']:,.0f}", short(sent["bytes"] / 1e6)]
        for name, p in found["programs"].items()
        for kind, sent in p["sent"].items()
        if sent["bytes"] > 0.001 * sum(other["bytes"] for other in p["sent"].values())
    ]
    if rows:
        table("Collectives of a run, those above a thousandth", ["program", "kind", "times", "MB sent by a chip"], rows)


def show_prediction(found: dict, console) -> None:
    p = found["prediction"]
    sampled = f"{short(p['sampled_tokens_per_s'])} tokens/s sampled and " if p["sampling_s"] else ""
    console.print(
        f"At {found['efficiency']:.0%} of that roofline, which is a guess: {short(p['step_s'])} s a step "
        f"({short(p['sampling_s'])} sampling, {short(p['learning_s'])} learning), {short(p['steps_per_hour'])} steps an hour, "
        f"{sampled}{short(p['trained_tokens_per_s'])} tokens/s learned from"
    )
    price = "no price known; give --prices"
    if p["usd"] is not None:
        price = f"${short(p['usd'])} at ${found['usd_per_chip_hour']:.2f} a chip and hour ({found['price_source']})"
    console.print(f"1,000 steps: {short(p['chip_hours'])} chip-hours, {price}")


def verdict(found: dict) -> str:
    """Whether it fits, in a line."""
    sizes = {name: stage["total"] for name, stage in found["stages"].items()}
    worst = max(sizes, key=lambda name: math.inf if sizes[name] is None else sizes[name])
    need = "more than was told" if sizes[worst] is None else f"{sizes[worst] / cost.GIB:.2f}"
    return f"{'fits' if found['fits'] else 'does not fit'}: needs {need} of {found['hbm_bytes'] / cost.GIB:.2f} GiB ({worst})"


def show_topologies() -> None:
    """Print what is known."""
    for name, chip in cost.CHIPS.items():
        usd = chip.usd_per_hour
        price = "no price known" if usd is None else f"${usd:.2f} a chip and hour"
        print(
            f"{name}: {chip.hbm_bytes / cost.GIB:.2f} GiB, {chip.flops_per_s / 1e12:.0f} TFLOP/s, "
            f"{chip.hbm_bytes_per_s / 1e9:.0f} GB/s a chip, {chip.chips_per_host} chips a host, {price}"
        )
        print("  " + " ".join(f"{name}:{shape}" for shape in chip.topologies))


# --- the door ---


def define_flags() -> None:
    """Define flags. Not at import: other doors have flags of the same names."""
    config_flags.DEFINE_config_file("config", None, "As of jaxreason.main; --config.rl.microbatches=64 changes a field.")
    flags.DEFINE_string("topology", None, "As v5e:4x8; 'list' shows what is known.")
    flags.DEFINE_string("phase", None, "The phase to plan; default: the last.")
    flags.DEFINE_float("efficiency", 0.5, "Share of the roofline that is supposed to be reached.", 0.01, 1.0)
    flags.DEFINE_string("prices", None, 'JSON file of dollars a chip and hour, as {"v5e": 1.2}.')
    flags.DEFINE_boolean("search", True, "If it does not fit, compile more to say what does.")
    flags.DEFINE_boolean("json", False, "Print one JSON object and no tables.")


def read_prices(path: str | None) -> dict[str, float]:
    """Read dollars per chip-hour."""
    prices = {} if path is None else json.loads(Path(path).read_text())
    if not isinstance(prices, dict):
        raise ValueError(f'{path} holds a {type(prices).__name__}; needed: an object such as {{"v5e": 1.2}}')
    for name, price in prices.items():
        if name not in cost.CHIPS:
            raise ValueError(unknown(f"chip in {path}", name, cost.CHIPS))
        if not isinstance(price, (int, float)) or price < 0:
            raise ValueError(f"price of {name} in {path} got {price!r}; allowed: a number, dollars a chip and hour")
    return prices


def plan() -> bool:
    """Plan what the flags say, print it, and return whether it fits."""
    prices = read_prices(FLAGS.prices)
    if FLAGS.topology is None:
        raise ValueError("no --topology given; for example --topology=v5e:4x8, and --topology=list shows what is known")
    devices_of(FLAGS.topology)
    work = read(FLAGS.config.to_dict(), FLAGS.topology, FLAGS.phase)
    found = describe(work, FLAGS.efficiency, prices)
    other = find_fitting(work) if not found["fits"] and FLAGS.search else None
    if not found["fits"] and FLAGS.search and other is None:
        found["larger_topology"] = larger_topology(work)
    if other is not None:
        found["fits_with"] = {"flags": flags_for(work, other), **describe(other, FLAGS.efficiency, prices)}
    if FLAGS.json:
        print(json.dumps(found))
        return found["fits"]
    show(found)
    print(verdict(found))
    if other is not None:
        print(f"\nfits with: {' '.join(found['fits_with']['flags'])}\n")
        show(found["fits_with"])
    elif not found["fits"] and FLAGS.search:
        larger = found["larger_topology"]
        hint = f"; params, optimizer and the sampler's weights would fit on {larger}, with another mesh" if larger else ""
        print(f"nothing that was tried fits on {work.topology}: take other chips, a smaller model or shorter sequences{hint}")
    return found["fits"]


def fail(error: Exception) -> None:
    """Bad input: one line, no traceback."""
    sys.exit(f"error: {' '.join(str(error.args[0] if error.args else error).split())}")


def parse_flags(argv):
    define_flags()
    file = next((word.partition("=")[2].partition(":")[0] for word in argv if re.match("--?config=", word)), "")
    if file and not Path(file).is_file():
        fail(ValueError(f"no config file {file!r}; configs are in configs/, options follow a colon: configs/tiny.py:smoke"))
    try:
        rest = FLAGS(argv)
        if len(rest) > 1:
            raise ValueError(f"got the words {' '.join(rest[1:])!r}; options of a config follow a colon: configs/tiny.py:smoke")
        if FLAGS.config is None and FLAGS.topology != "list":
            raise ValueError("no --config given; for example --config=configs/gsm8k.py:model=qwen3_8b")
        return rest
    except (flags.Error, ValueError, AttributeError, KeyError, TypeError, OSError) as error:
        fail(error)


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)
    if FLAGS.topology == "list":
        show_topologies()
        return
    os.environ["JAX_PLATFORMS"] = "cpu"  # also on a machine that has a TPU: it may be in use
    try:
        fitting = plan()
    except (ValueError, KeyError, FileNotFoundError) as error:
        fail(error)
    sys.exit(0 if fitting else 1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
