"""Search for a plan that fits when the given one does not: smaller micro-batches, fewer
slots, another mesh, a larger topology. And for fewer micro-batches of a train step that
the network bounds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from jaxreason.plan import chips
from jaxreason.plan.arrays import devices_of, slot_devices
from jaxreason.plan.memory import fits, learner_stages, sampler_stages, still_stages
from jaxreason.plan.programs import compile_train
from jaxreason.plan.work import Work, microbatch_choices

MESHES = 3  # at most so many other meshes are tried
TRIES = 2  # at most so many smaller numbers of micro-batches are tried


def find_fitting(work: Work) -> Work | None:
    """Find the largest micro-batch and number of slots that fit on this mesh, or else
    on another mesh of the same topology; None if nothing fits.
    """
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


def fewer_microbatches(work: Work) -> Work | None:
    """Find a smaller number of micro-batches that fits and whose train step the network
    does not bound, with at most `TRIES` compiled; None if there is none, or the work's
    own step is not bound by the network.

    Each micro-batch gathers the weights and sums their gradient, so the bytes sent grow
    with the number.
    """
    count, tried = work.microbatches, work
    for _ in range(1 + TRIES):
        program = compile_train(tried).program
        if program is None or not fits(learner_stages(tried), tried):
            return None
        line = chips.roofline(program, work.chip)
        if line.bound != "network":
            return None if tried is work else tried
        most = min(count / 2, count * max(line.compute_s, line.memory_s) / line.network_s)
        fewer = [w.microbatches for w in microbatch_choices(work._replace(microbatches=1)) if w.microbatches < count]
        if not fewer:
            return None
        count = max([n for n in fewer if n <= most] or fewer[:1])
        tried = work._replace(microbatches=count)
    return None


def first_that_fits(choices: Sequence[Work], fit: Callable[[Work], bool]) -> Work | None:
    """Find the first choice that fits, by bisection, as later choices need less memory;
    None if even the last does not fit.
    """
    if choices and fit(choices[0]):
        return choices[0]
    if not choices or not fit(choices[-1]):
        return None
    low, high = 1, len(choices) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fit(choices[middle]) else (middle + 1, high)
    return choices[low]


def slot_choices(work: Work) -> list[Work]:
    """List the work with its number of slots, then a half, a quarter, ... of it, each
    rounded down to a multiple of the devices.
    """
    devices, counts = slot_devices(work), []
    slots = work.slots // devices * devices
    while slots:
        counts.append(slots)
        slots = slots // 2 // devices * devices
    return [work.with_slots(n) for n in counts]


def other_meshes(work: Work) -> list[tuple[tuple[str, int], ...]]:
    """List other meshes of all devices of the topology on which the train state and the
    layout of weights fit, with small `tensor` axes first.
    """
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
    """Find the smallest larger topology of the same chip on which the train state and
    the layout of weights fit. Nothing is compiled for it.
    """
    kind, count = work.topology.partition(":")[0], chips.chips_of(work.topology)
    for name in (f"{kind}:{shape}" for shape in work.chip.topologies):
        if chips.chips_of(name) > count and other_meshes(work._replace(topology=name)):
            return name
    return None
