"""Where arrays live: a mesh of named axes, a short table of rules from parameter path to axes, and shardings of any tree.

Rows of a batch and slots of the sampler are split over `data` and `fsdp`; params and optimizer state over `fsdp`, and their
heads, feed-forward and vocabulary over `tensor`. Mesh and shardings are arguments everywhere: no global mesh.
"""

from __future__ import annotations

import math
import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# First match wins; matched against the path of a leaf, so optimizer moments follow their parameter. One entry an axis.
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


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Make a mesh; one axis may be -1, for all devices that are left.

    Raises:
      ValueError: the axes do not multiply to a number of devices that is there.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    if list(sizes.values()).count(-1) > 1 or any(n < 1 and n != -1 for n in sizes.values()):
        raise ValueError(f"mesh got {sizes}; allowed: positive sizes, at most one of them -1")
    known = math.prod(n for n in sizes.values() if n != -1)
    if len(devices) % known or (-1 not in sizes.values() and known > len(devices)):
        raise ValueError(f"mesh got {sizes}, which needs a multiple of {known} devices; there are {len(devices)}")
    sizes = {axis: len(devices) // known if n == -1 else n for axis, n in sizes.items()}
    count = math.prod(sizes.values())
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices[:count], axis_types=(AxisType.Auto,) * len(sizes))


def shardings(tree, mesh: Mesh):
    """Give each leaf of a tree of params or optimizer state its sharding, by `RULES`.

    A vocabulary that does not divide over `tensor` stays whole; sizes of vocabularies are nobody's choice. So does optimizer
    state of another rank than its parameter, such as factored moments, which are small.

    Raises:
      ValueError: another axis of a leaf does not divide by its mesh axis.
    """

    def of(path, leaf):
        name = "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
        spec = list(next(spec for pattern, spec in RULES if re.search(pattern, name)))
        if name.startswith("opt_state") and len(spec) != len(leaf.shape):
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

    return jax.tree_util.tree_map_with_path(of, tree)


def gathered(tree, mesh: Mesh):
    """Give each leaf of a tree of params its sharding for sampling: as `shardings`, but whole over `fsdp`."""

    def without(sharding):
        return NamedSharding(mesh, P(*(None if axis == "fsdp" else axis for axis in sharding.spec)))

    return jax.tree.map(without, shardings(tree, mesh))


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of axis 0 of batches and slots."""
    return NamedSharding(mesh, ROWS)


def row_devices(mesh: Mesh) -> int:
    """Over how many devices rows are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_rows(tree, mesh: Mesh):
    """Make global arrays from this process's rows (all processes give the same number)."""
    sharding = rows(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)
