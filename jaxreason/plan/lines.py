"""The work of a compiled program by source line: which instructions move bytes that no
product needs, and how long the program takes if nothing overlaps.

The instructions are those that `hlo.Walk` counts, each with the number of its runs, so
their sums are the program's cost. This module does not import jax.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxreason.chips import Chip
from jaxreason.plan.hlo import SHAPE, Instruction, Walk, called, collective, elements, is_free, parse, product_flops

UNKNOWN = "made by the compiler"  # the source of an instruction that has none


class Line(NamedTuple):
    """Work of all runs of one instruction, per device."""

    source: str  # file:line of our own code, as far as it is known
    op: str  # name of the operation in jax
    times: float
    flops: float
    bytes: float  # read from and written to HBM
    needed: float  # of these, operands and results of matrix products and kernels
    sent: float  # over the network
    waits: bool  # whether nothing else runs while it sends

    def seconds(self, chip: Chip) -> float:
        """Return the time at the chip's peak, without overlap with other lines."""
        network_s = self.sent / chip.ici_bytes_per_s if self.waits else 0.0
        return max(self.flops / chip.flops_per_s, self.bytes / chip.hbm_bytes_per_s) + network_s

    @property
    def avoidable(self) -> float:
        return max(0.0, self.bytes - self.needed)


class Bounds(NamedTuple):
    """How fast a program can be at most, and what it moves beside what it needs."""

    together_s: float  # compute, memory and network overlap perfectly
    in_turn_s: float  # one instruction after the other, and the network where nothing hides it
    needed_bytes: float
    waiting_bytes: float  # of those sent, while nothing else runs


def lines_of(hlo: str, *, unknown_trips: int = 1, devices: int = 1, kernel_flops: float = 0.0) -> list[Line]:
    """List the instructions of a compiled module that work; the first arguments are
    those of `hlo.program_cost`. `kernel_flops`, which no HLO shows, are spread over the
    custom kernels by their bytes.
    """
    computations, entry = parse(hlo)
    walk, sources, chains = Walk(computations, unknown_trips, devices), Sources(hlo), set()
    found = [line_of(i, times, walk, name, sources, chains) for name, i, times in scheduled(walk, entry, 1.0)]
    kernels = sum(line.bytes for line, is_kernel in found if is_kernel)
    return [
        line._replace(flops=line.flops + kernel_flops * line.bytes / kernels) if is_kernel and kernels else line
        for line, is_kernel in found
    ]


def bounds(lines: Sequence[Line], chip: Chip) -> Bounds:
    flops, moved, sent = (sum(getattr(line, name) for line in lines) for name in ("flops", "bytes", "sent"))
    return Bounds(
        together_s=max(flops / chip.flops_per_s, moved / chip.hbm_bytes_per_s, sent / chip.ici_bytes_per_s),
        in_turn_s=sum(line.seconds(chip) for line in lines),
        needed_bytes=sum(line.needed for line in lines),
        waiting_bytes=sum(line.sent for line in lines if line.waits),
    )


def by_source(lines: Sequence[Line]) -> list[Line]:
    """Add up lines of the same source and operation, those with most avoidable bytes
    first.
    """
    found: dict[tuple[str, str], Line] = {}
    for line in lines:
        key = (line.source, line.op)
        before = found.get(key, Line(*key, 0.0, 0.0, 0.0, 0.0, 0.0, False))
        added = (getattr(before, name) + getattr(line, name) for name in ("times", "flops", "bytes", "needed", "sent"))
        found[key] = Line(*key, *added, before.waits or (line.waits and line.sent > 0))
    return sorted(found.values(), key=lambda line: -line.avoidable)


def scheduled(walk: Walk, name: str, times: float) -> Iterator[tuple[str, Instruction, float]]:
    """Yield (computation, instruction, runs) of each scheduled instruction."""
    computation = walk.computations[name]
    for i in computation.values():
        if i.op == "while":
            yield from scheduled(walk, called(i, "body"), times * walk.trips(i, computation))
        elif i.op == "conditional":
            yield from scheduled(walk, walk.dearest(i), times)
        elif i.op in ("call", "async-start"):
            yield from scheduled(walk, called(i, "calls") or called(i, "to_apply"), times)
        elif not is_free(i):
            yield name, i, times


def line_of(i: Instruction, times: float, walk: Walk, name: str, sources: Sources, chains: set) -> tuple[Line, bool]:
    """Return the line of an instruction, and whether it is a custom kernel.

    A collective that runs beside several fusions is named by each; `chains` has those
    that were counted.
    """
    computation, waits = walk.computations[name], not i.op.endswith("-start")
    is_kernel = i.op == "custom-call" and "tpu_custom_call" in i.rest
    if i.op == "fusion":
        inner = called(i, "calls")
        flops, _, collectives = walk.of(inner, True)
        new = {key: size for key, (size, _) in collectives.items() if len(key) < 3 or (name, key) not in chains}
        waits = all(len(key) < 3 for key in collectives)
        chains |= {(name, key) for key in collectives if len(key) > 2}
        sent, needed = sum(new.values()), products(walk, inner)
    else:
        flops = product_flops(i, computation) if i.op in ("dot", "convolution") else 0.0
        kind = collective(i)
        sent = walk.sends(kind, i, computation, name)[1][0] if kind else 0.0
        needed = array_bytes(i, computation) if flops or is_kernel else 0.0
    moved = walk.moved(i, computation)
    source, op = sources.of(i)
    op = op if source != UNKNOWN else f"{i.op} {SHAPE.search(i.shape)[0].partition('{')[0]}"
    sums = (times * x for x in (flops, moved, min(needed, moved), sent))
    return Line(source, op, times, *sums, waits), is_kernel


def products(walk: Walk, name: str) -> float:
    """Sum the bytes of operands and results of the products in a fused computation."""
    computation, total = walk.computations[name], 0.0
    for i in computation.values():
        if i.op in ("dot", "convolution"):
            total += array_bytes(i, computation)
        elif i.op in ("fusion", "call"):
            total += products(walk, called(i, "calls") or called(i, "to_apply"))
    return total


def array_bytes(i: Instruction, computation) -> float:
    operands = [computation[o].shape for o in i.operands if o in computation]
    return sum(sum(elements(shape, everywhere=True)) for shape in (i.shape, *operands))


class Sources:
    """The tables of source lines at the top of a module's text."""

    def __init__(self, hlo: str):
        self.files = dict(re.findall(r'^(\d+) "(.*)"$', section(hlo, "FileNames"), re.M))
        self.functions = dict(re.findall(r'^(\d+) "(.*)"$', section(hlo, "FunctionNames"), re.M))
        rows = re.findall(r"^(\d+) \{(.*)\}$", section(hlo, "FileLocations"), re.M)
        self.places = {row: dict(re.findall(r"(\w+)=(\d+)", fields)) for row, fields in rows}
        rows = re.findall(r"^(\d+) \{(.*)\}$", section(hlo, "StackFrames"), re.M)
        self.frames = {row: dict(re.findall(r"(\w+)=(\d+)", fields)) for row, fields in rows}

    def of(self, i: Instruction) -> tuple[str, str]:
        """Return the innermost line of our own code, and the name of the operation."""
        named = re.search(r'op_name="([^"]*)"', i.rest)
        op = named[1].rpartition("/")[2] if named else ""
        if plain := re.search(r'source_file="([^"]*)" source_line=(\d+)', i.rest):
            return f"{short(plain[1])}:{plain[2]}", op or i.op
        found = re.search(r"stack_frame_id=(\d+)", i.rest)
        frame, first = found[1] if found else "", ""
        while frame in self.frames:
            place = self.places[self.frames[frame]["file_location_id"]]
            file = self.files[place["file_name_id"]]
            function = self.functions.get(place.get("function_name_id", ""), "").rpartition(".")[2]
            where = f"{short(file)}:{place['line']} {function}"
            if "/jaxreason/" in file or "site-packages" not in file:
                return where, op or i.op
            first, above = first or where, self.frames[frame].get("parent_frame_id", "")
            frame = "" if above == frame else above
        return first or UNKNOWN, op or i.op


def section(hlo: str, name: str) -> str:
    """Return the rows of a table of a module, up to the next empty line."""
    found = re.search(rf"^{name}\n(.*?)\n\n", hlo, re.M | re.S)
    return found[1] if found else ""


def short(path: str) -> str:
    """Return a path from the name of the package on."""
    return re.sub(r"^.*?/(?=(jaxreason|site-packages|MaxText|maxtext)/)", "", path)
