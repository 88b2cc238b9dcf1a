"""Shapes with shardings that represent a run's arrays on the devices of a topology:
train state, batch, sampler's weights, slots. None of these devices has to exist here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from jaxreason import batching, build, sharding, text
from jaxreason.learner import new_state
from jaxreason.model import transformer
from jaxreason.model.decode_layout import decode_layer
from jaxreason.options import call_with_section, unknown_name_message
from jaxreason.plan import chips
from jaxreason.plan.work import Work
from jaxreason.sampler import Weights


@functools.cache
def devices_of(topology: str):
    """Return the devices of a topology; none of them has to exist here.

    Raises:
      ValueError: the topology is unknown, or libtpu is missing.
    """
    if topology not in chips.topology_names():
        raise ValueError(f"{unknown_name_message('topology', topology, chips.topology_names())}; --topology=list shows them")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("libtpu, the compiler for TPUs, is not installed; pip install -e '.[tpu]'")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no cloud metadata server could say which TPU this is
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no TPU is opened, so several processes may compile at once
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # any value will do: libtpu only complains if it is unset
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # A host has four chips, unless it is a whole slice by itself.
    on_one_host = {"1x1": (1, 1, 1), "2x4": (2, 4, 1)}.get(topology.partition(":")[2])
    bounds = {} if on_one_host is None else {"chips_per_host_bounds": on_one_host}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds).devices


@contextlib.contextmanager
def without_cache():
    """Turn jax's persistent cache off: it stores programs for a topology, but can't
    load them without a device.
    """
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax decides only once whether the cache is used
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def processes_of(work: Work) -> int:
    """Return the number of processes: one per host."""
    return len({d.process_index for d in devices_of(work.topology)})


@functools.cache
def meshes_of(work: Work) -> sharding.Meshes:
    """Make the meshes of the learner and of the sampler on the last process. A mesh too
    small for all processes leaves the last one without a device, and is refused here.
    """
    section, placement = {"mesh": dict(work.mesh), **dict(work.sampling)}, {"process": processes_of(work) - 1}
    return call_with_section(sharding.make_meshes, section, "config.sharding", devices=devices_of(work.topology), **placement)


def samples_apart(work: Work) -> bool:
    """Tell whether sampling has devices of its own."""
    return not set(meshes_of(work).sample.devices.flat) & set(meshes_of(work).learn.devices.flat)


def slot_devices(work: Work) -> int:
    """Count the devices over which the slots of all processes are split."""
    return sharding.row_devices(meshes_of(work).sample) * processes_of(work)


@functools.cache
def model_of(work: Work):
    return transformer(work.shape, meshes_of(work).learn)


def placed(tree, where):
    """Give shapes the shardings of `where`, which is one sharding or a tree of them."""
    if isinstance(where, jax.sharding.Sharding):
        where = jax.tree.map(lambda _: where, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)


@functools.cache
def state_of(work: Work):
    """Make the shapes of the train state."""
    state = jax.eval_shape(lambda: new_state(model_of(work).init(jax.random.key(0)), work.optimizer, work.objective.controls))
    return placed(state, sharding.shardings(state, meshes_of(work).learn))


def batch_of(work: Work):
    """Make the shapes of a batch of full rows."""
    batch = batching.empty(work.rows, work.length)
    more = {"reference_logp_BT": batch.weight_BT} if work.objective.needs_reference else {}
    if work.objective.divergence is not None:
        hidden = jax.ShapeDtypeStruct((work.rows, work.length, work.shape.width), work.shape.head_dtype or work.shape.dtype)
        more["reference_hidden_BTD"] = hidden
    if work.objective.critic is not None:
        more |= {"value_BT": batch.weight_BT, "return_BT": batch.weight_BT}
    if work.objective.chooses:
        more["chosen_BT"] = batch.weight_BT != 0
    batch = dataclasses.replace(batch, **more)
    return placed(batch, sharding.rows(meshes_of(work).learn))


@functools.cache
def completer_of(work: Work):
    """Make the completer of one process: its sampler and the lengths of its prompts.

    It has a byte-level tokenizer, not the model's: of a tokenizer, the compiled
    programs depend on the end-of-sequence ids alone.
    """
    tokenizer, mesh = text.make("byte_level"), meshes_of(work).sample
    return call_with_section(
        build.make_completer,
        dict(work.sampler),
        "config.sampler",
        model=transformer(work.shape, mesh),
        tokenizer=tokenizer,
        format=text.plain(tokenizer),
        mesh=mesh,
        processes=processes_of(work),
    )


def weights_of(work: Work):
    """Return the sampler's weights in their decode layout, the peak bytes per device
    while they are made, and the bytes per device that remain afterwards, both beside
    the params.
    """
    model, meshes, params = model_of(work), meshes_of(work), state_of(work).params
    merged = jax.eval_shape(model.merge, params)
    cast = jax.eval_shape(model.cast, merged)
    split, whole = sharding.shardings(cast, meshes.learn), sharding.gathered(cast, meshes.sample)
    sent = placed(cast, whole)
    targets = [(part, target) for part, targets in params.get("lora", {}).items() for target in targets]
    adapted = {f"['layers']['{part}']['{target}']['kernel']" for part, target in targets}
    peak = left = 0.0
    found = map(jax.tree_util.tree_leaves_with_path, (placed(merged, split), placed(cast, split), sent))
    for (path, merged), (_, cast), (_, gathered) in zip(*found, strict=True):  # steps of `prepare`
        made = [size_of(merged)] if jax.tree_util.keystr(path) in adapted else []
        made += [size_of(cast)] if cast.dtype != merged.dtype else []
        copied = path[0].key == "layers" or size_of(gathered) != size_of(cast) or samples_apart(work)
        made += [size_of(gathered)] if copied else []
        peak += sum(made)
        left += size_of(gathered) if made else 0.0
    layout = layout_of(sent)
    return Weights(layout, layout), peak, left


def layout_of(sent) -> dict:
    """Compile the decode layout of an accelerator (see `Model.decode_layout`) for the
    shapes of params that were already sent there, and return the shapes of the result.
    """
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype, sharding=x.sharding), sent["layers"])
    with without_cache():
        layer = decode_layer.lower(one, False).compile()
    count = sent["layers"]["attention_norm"]["scale"].shape[0]
    return {**sent, "layers": (placed(layer.out_info, layer.output_shardings),) * count}


def size_of(tree) -> float:
    """Return the bytes that a tree of sharded shapes takes on one device."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def number(work: Work, *shape: int, dtype="int32"):
    """Make the shape of a small array that is replicated over a sampler's devices."""
    everywhere = jax.NamedSharding(meshes_of(work).sample, jax.P())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)


@functools.cache
def slots_of(work: Work, cache_length: int | None = None):
    """Make the shapes of the sampler's slots, with a cache of `cache_length` positions
    (None: the longest).
    """
    sampler = completer_of(work).sampler
    slots = jax.eval_shape(lambda: sampler.resize(sampler.empty(), cache_length or sampler.length))
    with without_cache():
        empty = sampler.empty.lower().compile()
    return placed(slots, empty.output_shardings)
