"""Placement of arrays: a mesh of named axes, rules from parameter path to axes, and the
shardings of any tree.

Rows of a batch and slots of the sampler are split over `data` and `fsdp`. Params and
optimizer state are split over `fsdp`; their heads, feed-forward and vocabulary axes
over `tensor`. Mesh and shardings are arguments everywhere; there is no global mesh.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxreason.options import call_with_section

# The first pattern that matches the path of a leaf wins, so optimizer moments follow
# their parameter. A spec has one entry per axis.
RULES = (
    (r"embed/embedding", P("tensor", "fsdp")),  # V D
    (r"attention/[qkv]/kernel", P(None, "fsdp", "tensor", None)),  # L D N H
    (r"attention/[qkv]/bias", P(None, "tensor", None)),  # L N H
    (r"attention/o/kernel", P(None, "tensor", None, "fsdp")),  # L N H D
    (r"mlp/(gate|up)/kernel", P(None, "fsdp", "tensor")),  # L D F
    (r"mlp/down/kernel", P(None, "tensor", "fsdp")),  # L F D
    (r"unembed/kernel", P("fsdp", "tensor")),  # D V
    (r"", P()),  # norms, biases, counters
)
ROWS = P(("data", "fsdp"))


def make_mesh(
    *,
    data: int = -1,  # replicas of the params, each with its own rows; -1: all devices that are left
    fsdp: int = 1,  # devices that split the params, each with its own rows
    tensor: int = 1,  # devices that split heads, feed-forward and vocabulary
    devices=None,
) -> Mesh:
    """Make a mesh; one axis may be -1, for all devices that are left.

    Raises:
      ValueError: the sizes do not fit the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    if list(sizes.values()).count(-1) > 1 or any(n < 1 and n != -1 for n in sizes.values()):
        raise ValueError(f"mesh got {sizes}; allowed: positive sizes, at most one of them -1")
    known = math.prod(n for n in sizes.values() if n != -1)
    if len(devices) % known or (-1 not in sizes.values() and known > len(devices)):
        raise ValueError(
            f"mesh got {sizes}, which needs a multiple of {known} devices; there are {len(devices)}; "
            "choose data, fsdp and tensor whose product divides that number, or -1 for one of them"
        )
    sizes = {axis: len(devices) // known if n == -1 else n for axis, n in sizes.items()}
    shape = tuple(sizes.values())
    # A mesh axis may be part of an axis of the torus, which jax.make_mesh allows only
    # on a v5e.
    laid = mesh_utils.create_device_mesh(shape, devices[: math.prod(shape)], allow_split_physical_axes=True)
    return Mesh(laid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


class Meshes(NamedTuple):
    """The learner's mesh over all processes, and this process's mesh for sampling.

    Both have the same devices if possible.
    """

    learn: Mesh
    sample: Mesh


def make_meshes(
    mesh: dict,  # sizes of the axes of the learner's mesh
    *,
    devices,
    process: int,
    sampling_devices: int = 0,  # devices per process that only sample; 0: sample on the learner's devices
    sampling_tensor: int | None = None,  # sampling devices that split heads and vocabulary; None: as in the learner's mesh
) -> Meshes:
    """Make the learner's mesh over all processes, and the sampling mesh of `process`.

    Each process keeps its last `sampling_devices` devices only for sampling; with 0 it
    samples on its learner devices. The sampling mesh has `sampling_tensor` devices
    along `tensor`; None means as many as in the learner's mesh.

    Raises:
      ValueError: numbers of devices that do not fit.
    """
    by_process = [[d for d in devices if d.process_index == p] for p in sorted({d.process_index for d in devices})]
    fewest = min(map(len, by_process))
    if sampling_tensor is not None and sampling_tensor < 1:
        raise ValueError(f"sampling_tensor got {sampling_tensor}; allowed: 1 or more, or None for that of the learner's mesh")
    if not 0 <= sampling_devices < fewest:
        raise ValueError(
            f"sampling_devices got {sampling_devices}; allowed: 0, or fewer than the {fewest} devices of a process, so that some "
            "are left to learn on"
        )
    learners = [d for devices in by_process for d in devices[: len(devices) - sampling_devices]]
    learn = call_with_section(make_mesh, mesh, "config.sharding.mesh", devices=learners)
    tensor = sampling_tensor or learn.shape["tensor"]
    if not sampling_devices and len(by_process) == 1 and tensor == learn.shape["tensor"]:
        return Meshes(learn, learn)
    mine = by_process[process]
    kept = mine[len(mine) - sampling_devices :] if sampling_devices else [d for d in learn.devices.flat if d in mine]
    if not kept:
        raise ValueError(f"mesh got {dict(learn.shape)}, which leaves process {process} without a device")
    if len(kept) % tensor:
        raise ValueError(
            f"sampling on {len(kept)} devices of each process got tensor={tensor}, which does not divide them; choose "
            "sampling_tensor or the mesh's tensor so that it does"
        )
    return Meshes(learn, make_mesh(data=len(kept) // tensor, tensor=tensor, devices=kept))


def name_of(path) -> str:
    """Return the name of a leaf, such as layers/attention/q/kernel."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def rule(name: str) -> P:
    """Return the axes of a leaf, from the first of `RULES` that matches its name."""
    return next(spec for pattern, spec in RULES if re.search(pattern, name))


def shardings(tree, mesh: Mesh):
    """Give each leaf of a tree of params or optimizer state its sharding, by `RULES`.

    A vocabulary that does not divide over `tensor` stays whole, because nobody chooses
    the size of a vocabulary. Optimizer state of another rank than its parameter also
    stays whole; such state, like factored moments, is small.

    Raises:
      ValueError: another axis of a leaf does not divide by its mesh axis.
    """

    def sharding_of(path, leaf):
        name = name_of(path)
        spec = list(rule(name))
        if name.startswith(("opt_state", "control")) and len(spec) != len(leaf.shape):
            spec = []
        for axis, mesh_axis in enumerate(spec):
            if mesh_axis is None or leaf.shape[axis] % mesh.shape[mesh_axis] == 0:
                continue
            if mesh_axis == "tensor" and "embed" in name:
                spec[axis] = None
                continue
            raise ValueError(
                f"{name} has size {leaf.shape[axis]} in axis {axis}, which does not divide over {mesh_axis}="
                f"{mesh.shape[mesh_axis]}; choose a divisor, or {mesh_axis}=1"
            )
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def vocabulary_axis(path) -> int:
    """Return the axis of the vocabulary in a leaf of the head."""
    return list(rule(name_of(path))).index("tensor")


# --- inside a program: constraints where the compiler would choose badly ---


def keep_rows(x, mesh: Mesh | None):
    """Keep activations split by rows, with all other axes whole on each device.

    Without a mesh, or if the rows do not divide, leave them as they are.
    """
    if mesh is None or x.shape[0] % row_devices(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, rows(mesh))


def gather_weights(tree, mesh: Mesh | None, prefix: str, *, layer: bool = False):
    """Gather params over `fsdp` where they are used; their gradients are split again.

    `layer`: the tree is one layer of the stack. Without this the compiler multiplies
    parts of weights and sums activations over the devices, which sends six times as
    many bytes (jaxreason/plan/README.md).
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return tree

    def array_of(path, x):
        split = list(rule(f"{prefix}/{name_of(path)}"))[1 if layer else 0 :]
        if "fsdp" not in split:
            return x
        divides = [axis is None or n % mesh.shape[axis] == 0 for axis, n in zip(split, x.shape)]
        split = [axis if fits else None for axis, fits in zip(split, divides)]
        whole = [None if axis == "fsdp" else axis for axis in split]
        return checkpoint_name(gather(x, NamedSharding(mesh, P(*whole)), NamedSharding(mesh, P(*split))), GATHERED)

    return jax.tree_util.tree_map_with_path(array_of, tree)


GATHERED = "gathered"  # checkpoint name of arrays that the backward pass gathers again


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(x, whole: NamedSharding, split: NamedSharding):
    return jax.lax.with_sharding_constraint(x, whole)


def gather_forward(x, whole, split):
    return gather(x, whole, split), None


def gather_backward(whole, split, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, split),)


gather.defvjp(gather_forward, gather_backward)


def look_up(embed, tokens_BT, dtype, mesh: Mesh | None):
    """Return the embeddings of tokens in `dtype`, [B, T, D], split by rows.

    On a mesh each device looks the tokens of all devices up in its own part of D and
    sends every device its tokens' parts. That sends less than gathering the table if a
    device has fewer tokens than the table has rows.
    """
    table_VD, devices = embed["embedding"], 1 if mesh is None else row_devices(mesh)
    B, T = tokens_BT.shape
    apart = mesh is not None and mesh.shape["fsdp"] > 1 and B % devices == 0 and table_VD.shape[1] % mesh.shape["fsdp"] == 0
    if not apart or B // devices * T >= len(table_VD):
        table_VD = gather_weights(embed, mesh, "embed")["embedding"]
        return keep_rows(table_VD[tokens_BT].astype(dtype), mesh)

    def parts(table_VD, tokens_BT):
        all_BTD = table_VD[jax.lax.all_gather(tokens_BT, "fsdp", tiled=True)].astype(dtype)
        return jax.lax.all_to_all(all_BTD, "fsdp", split_axis=0, concat_axis=2, tiled=True)

    specs = P(None, "fsdp"), ROWS
    return jax.shard_map(parts, mesh=mesh, in_specs=specs, out_specs=ROWS, axis_names={"data", "fsdp"}, check_vma=False)(
        table_VD, tokens_BT
    )


# --- inside a shard_map over data and fsdp ---


def over_fsdp(tree):
    """Return the specs of a tree of params by the axis fsdp alone."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: P(*("fsdp" if axis == "fsdp" else None for axis in rule(name_of(path)))), tree
    )


def gather_over_fsdp(tree):
    """Gather params of which each device has a part."""
    gathered = functools.partial(where_split, lambda x, axis: jax.lax.all_gather(x, "fsdp", axis=axis, tiled=True))
    return apart_over_tensor(gathered, tree)


def scatter_over_fsdp(tree):
    """Sum gradients of whole params over the devices; each keeps its part.

    The parts are moved to the first axis: a TPU's compiler makes an all-reduce, which
    sends twice as much, of a reduce-scatter over the last axis.
    """
    parts = jax.lax.axis_size("fsdp")

    def scatter(x, axis):
        split = x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
        return jax.lax.psum_scatter(jnp.moveaxis(split, axis, 0), "fsdp", scatter_dimension=0)

    return apart_over_tensor(functools.partial(where_split, scatter), tree)


def apart_over_tensor(function: Callable, tree):
    """Apply function(tree) on each device along tensor to its part of the params.

    Left to itself, the compiler gathers them over tensor before a collective over
    another axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    size = dict(mesh.shape).get("tensor", 1)
    if size == 1:
        return function(tree)

    def spec(path, x):
        return P(
            *("tensor" if axis == "tensor" and x.shape[i] % size == 0 else None for i, axis in enumerate(rule(name_of(path))))
        )

    specs = jax.tree_util.tree_map_with_path(spec, tree)
    return jax.shard_map(function, in_specs=(specs,), out_specs=specs, axis_names={"tensor"}, check_vma=False)(tree)


def where_split(function: Callable, tree):
    """Apply function(x, axis) to the leaves of which `axis` is split over fsdp."""

    def leaf(path, x):
        axes = list(rule(name_of(path)))
        return function(x, axes.index("fsdp")) if "fsdp" in axes else x

    return jax.tree_util.tree_map_with_path(leaf, tree)


def gathered(tree, mesh: Mesh):
    """Give each leaf of a tree of params its sharding for sampling.

    It is that of `shardings`, but whole over `fsdp`.
    """

    def without(sharding):
        return NamedSharding(mesh, P(*(None if axis == "fsdp" else axis for axis in sharding.spec)))

    return jax.tree.map(without, shardings(tree, mesh))


def send(params, mesh: Mesh):
    """Lay params out for sampling on `mesh`.

    The mesh may have other devices than the params, and belongs to this process alone.
    """
    wanted = gathered(params, mesh)
    if jax.process_count() == 1:
        return jax.device_put(params, wanted)
    # A process can read only its own devices, so all processes first gather the params
    # together, until each has all of them.
    home = jax.tree.leaves(params)[0].sharding.mesh
    turned = within_processes(home, mesh.shape["tensor"])
    whole = NamedSharding(home, P()) if turned is None else gathered(params, turned)
    return jax.tree.map(localise, jax.device_put(params, whole), wanted)


def within_processes(mesh: Mesh, tensor: int) -> Mesh | None:
    """Rearrange a mesh so that `tensor` devices of one process are neighbours.

    Return None if they do not divide. jax places a mesh along the interconnect: on a
    v5e:4x8, whose hosts have 2 x 2 chips, four along `tensor` belong to two hosts.
    """
    of_process = collections.defaultdict(list)
    for device in mesh.devices.flat:
        of_process[device.process_index].append(device)
    if any(len(own) % tensor for own in of_process.values()):
        return None
    parts = [make_mesh(data=len(own) // tensor, tensor=tensor, devices=own).devices for _, own in sorted(of_process.items())]
    return Mesh(np.concatenate(parts), mesh.axis_names, axis_types=mesh.axis_types)


def localise(x: jax.Array, wanted: NamedSharding) -> jax.Array:
    """Make an array on this process's devices from the shards of `x` that they hold.

    Each shard is either a wanted one or the whole array.
    """
    held = {tuple(s.indices(n) for s, n in zip(shard.index, x.shape)): shard.data for shard in x.addressable_shards}
    parts = []
    for device, index in wanted.addressable_devices_indices_map(x.shape).items():
        index = tuple(s.indices(n) for s, n in zip(index, x.shape))
        whole = tuple((0, n, 1) for n in x.shape)
        part = held[index] if index in held else held[whole][tuple(slice(*s) for s in index)]
        parts.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(x.shape, wanted, parts)


def keep_in(tree, memory: str):
    """Move arrays to a memory kind of their devices: "device" or "pinned_host"."""
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind(memory), tree))


def rows(mesh: Mesh) -> NamedSharding:
    """Return the sharding of axis 0 of batches and slots."""
    return NamedSharding(mesh, ROWS)


def row_devices(mesh: Mesh) -> int:
    """Return the number of devices that rows are split over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_rows(tree, mesh: Mesh):
    """Make arrays split by rows from whole ones.

    Every process has the whole arrays, and its devices take their rows.
    """
    sharding = rows(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda index: x[index]), tree)
