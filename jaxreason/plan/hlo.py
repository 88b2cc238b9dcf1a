"""Counter of the FLOPs, HBM bytes and network bytes of a compiled program, from its
HLO.

`program_cost` walks a module from its entry computation and multiplies the body of a
loop by its trip count; XLA's own cost analysis counts a body once. The trip count is
XLA's `known_trip_count` where present (CPU and GPU), otherwise the number of increments
until the counter reaches the constant in the loop's condition (TPU). The caller gives
the trip count of loops whose length is data, such as the one over micro-batches. For a
conditional, the most expensive branch counts.

FLOPs are those of matrix products; custom kernels show none in the HLO. Bytes are those
that the scheduled instructions read from and write to HBM; a TPU's vector memory,
`S(1)`, does not count. This module does not import jax.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from typing import NamedTuple


class Program(NamedTuple):
    """Work of one run of a compiled program, per device."""

    flops: float
    bytes: float  # read from and written to HBM
    sent: dict[tuple[str, int], tuple[float, float]]  # (kind, devices in a group) -> (bytes that a device sends, times)
    loops: tuple[int, ...] = ()  # trip counts, in the order of the walk
    unknown_loops: int = 0  # loops that ran `unknown_trips` times

    @property
    def sent_bytes(self) -> float:
        return sum(size for size, _ in self.sent.values())


class Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str  # the attributes after the operands
    inside: str  # the text between the brackets
    root: bool


def program_cost(hlo: str, *, unknown_trips: int = 1, devices: int = 1) -> Program:
    """Add up the work of one run of a compiled module. Loops whose trip count is not in
    the text run `unknown_trips` times.

    `devices` is the size of an empty replica group, which means all devices.
    """
    computations, entry = parse(hlo)
    return Walk(computations, unknown_trips, devices).program(entry)


HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")


SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")


BITS = {"pred": 8, "bf16": 16, "f16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}


def parse(hlo: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Split the text of a module into its computations, each a dictionary of
    instructions, and return them with the name of the entry computation.
    """
    computations, entry, here = {}, "", None
    for line in hlo.splitlines():
        if header := HEADER.match(line):
            here = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif here is not None and (start := INSTRUCTION.match(line)):
            shape, at = shape_at(line, start.end())
            op, _, _ = line[at:].lstrip().partition("(")
            opened = line.index("(", at)
            closed = closing(line, opened)
            inside = line[opened + 1 : closed]
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            here[start[2]] = Instruction(start[2], shape, op, operands, line[closed + 1 :], inside, bool(start[1]))
    return computations, entry


def shape_at(line: str, at: int) -> tuple[str, int]:
    """Return the shape (or tuple of shapes) that starts at `at` in a line, and where it
    ends.
    """
    end = closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    return line[at:end], end


def closing(text: str, opened: int) -> int:
    """Find the bracket that closes the one at `opened`."""
    depth = 0
    for at in range(opened, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    raise ValueError(f"brackets do not close in: {text[:80]}")


def sizes(shape: str) -> list[int]:
    """Return the sizes of an array's axes."""
    return [int(n) for n in SHAPE.search(shape)[2].replace("<=", "").split(",") if n]


def elements(shape: str, everywhere: bool = False) -> list[float]:
    """Return the bytes of each array of a shape; arrays in a TPU's vector memory count
    0 unless `everywhere`.
    """
    found = []
    for kind, dimensions, layout in SHAPE.findall(shape):
        number = re.search(r"\d+", kind)
        bits = BITS[kind] if kind in BITS else int(number[0]) if number else 8
        count = math.prod(int(n) for n in dimensions.replace("<=", "").split(",") if n)
        found.append(0.0 if "S(" in layout and not everywhere else count * bits / 8)
    return found


def copied(part: str, source: str, destination: str) -> float:
    """Return the HBM bytes of copying a part: its size once for each end, source and
    destination, that is in HBM.
    """
    return sum(elements(part, everywhere=True)) * sum(any(elements(end)) for end in (source, destination))


# Instructions that move no bytes: they only name values. `is_free` adds the second
# halves of asynchronous instructions.
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id", "iota"}


# Custom calls that only name memory which later instructions write.
ALLOCATES = re.compile(r'custom_call_target="(AllocateBuffer|CreateBuffer)"')


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


def is_free(i: Instruction) -> bool:
    """Tell whether an instruction moves no bytes by itself."""
    return i.op in FREE or i.op.endswith(("-done", "-update")) or bool(i.op == "custom-call" and ALLOCATES.search(i.rest))


class Walk:
    """One walk over the computations of a module; the cost of each computation is
    cached.
    """

    def __init__(self, computations, unknown_trips: int, devices: int):
        self.computations, self.unknown_trips, self.devices = computations, unknown_trips, devices
        self.loops: list[int] = []
        self.unknown = 0
        self.of = functools.cache(self.of)

    def program(self, entry: str) -> Program:
        flops, moved, sent = self.of(entry, False)
        return Program(flops, moved, dict(sent), tuple(self.loops), self.unknown)

    def of(self, name: str, fused: bool):
        """Return FLOPs, bytes and collectives of a computation. Inside a fusion nothing
        is written to memory.
        """
        computation = self.computations[name]
        flops, moved, sent = 0.0, 0.0, collections.Counter()
        chained = {}
        for i in computation.values():
            if i.op in ("dot", "convolution"):
                flops += product_flops(i, computation)
            if i.op == "while":
                times = self.trips(i, computation)
                inner = self.of(called(i, "body"), False)
                flops, moved = flops + times * inner[0], moved + times * inner[1]
                add(sent, inner[2], times)
            elif i.op == "conditional":
                inner = self.of(self.dearest(i), False)
                flops, moved = flops + inner[0], moved + inner[1]
                add(sent, inner[2], 1)
            elif i.op in ("fusion", "call", "async-start"):
                inside = fused or i.op == "fusion"
                inner = self.of(called(i, "calls") or called(i, "to_apply"), inside)
                flops, moved = flops + inner[0], moved + inner[1]
                for key, value in inner[2].items():
                    if len(key) > 2:  # part of a chain: the same collective appears in every fusion that it runs beside
                        chained[key] = value
                    else:
                        add(sent, {key: value}, 1)
                if inside and not fused:
                    moved += self.moved(i, computation)
            elif (kind := collective(i)) is not None:
                key, value = self.sends(kind, i, computation, name)
                if fused and "chain_id" in i.rest:
                    channel = re.search(r"channel_id=(\d+)", i.rest)
                    chained[(*key, channel[1] if channel else i.name)] = value
                else:
                    add(sent, {key: value}, 1)
                moved += 0 if fused else self.moved(i, computation)
            elif not fused and not is_free(i):
                moved += self.moved(i, computation)
        if fused:
            sent.update(chained)
        else:
            for key, value in chained.items():
                add(sent, {key[:2]: value}, 1)
        return flops, moved, sent

    def dearest(self, conditional: Instruction) -> str:
        """Return the branch of a conditional with the most work."""
        return max(branches(conditional), key=lambda branch: self.of(branch, False)[:2])

    # --- loops ---

    def trips(self, loop: Instruction, computation) -> int:
        known = re.search(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)', loop.rest)
        found = int(known[1]) if known else self.constant_trips(loop, computation)
        self.unknown += found is None
        found = self.unknown_trips if found is None else found
        self.loops.append(found)
        return found

    def constant_trips(self, loop: Instruction, computation) -> int | None:
        """Return the trip count of a loop that counts up to a constant; None for other
        loops.
        """
        condition = self.computations[called(loop, "condition")]
        root = next(i for i in condition.values() if i.root)
        if root.op != "compare" or "direction=LT" not in root.rest:
            return None
        counter, limit = (condition[name] for name in root.operands)
        if counter.op != "get-tuple-element" or limit.op != "constant":
            return None
        index = int(re.search(r"index=(\d+)", counter.rest)[1])
        start = self.initial(loop, computation, index)
        return max(0, -(-(int(limit.inside) - (start or 0)) // self.step(loop, index)))

    def initial(self, loop: Instruction, computation, index: int) -> int | None:
        """Return the constant that a loop's counter starts from; None if it can't be
        read.
        """
        state = computation.get(loop.operands[0])
        if state is None or state.op != "tuple":
            return None
        value = computation.get(state.operands[index])
        while value is not None and value.op in ("copy", "bitcast"):
            value = computation.get(value.operands[0])
        return int(value.inside) if value is not None and value.op == "constant" and value.inside.isdigit() else None

    def step(self, loop: Instruction, index: int) -> int:
        """Read the increment of a loop's counter: above 1 where the compiler unrolled
        the loop.
        """
        body = self.computations[called(loop, "body")]
        root = next(i for i in body.values() if i.root)
        added = body.get(root.operands[index]) if root.op == "tuple" else None
        constants = [body[name] for name in added.operands if body[name].op == "constant"] if added and added.op == "add" else []
        return int(constants[0].inside) if constants else 1

    # --- collectives ---

    def sends(self, kind: str, i: Instruction, computation, name: str):
        """Return the kind and group size of a collective, and the bytes that each
        device sends in a ring: (n - 1) / n of the whole.

        The whole is the array that is gathered, scattered or exchanged. An all-reduce
        counts as a reduce-scatter and an all-gather.
        """
        n = group_size(i.rest, self.devices)
        given = sum(sum(elements(computation[o].shape, everywhere=True)) for o in i.operands if o in computation)
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # a TPU compiler's form of a reduce-scatter
            kind = "reduce-scatter"
        if kind == "collective-permute":
            return (kind, n), (given, 1.0)
        whole = given * n if kind == "all-gather" else given
        return (kind, n), (whole * (n - 1) / n * (2 if kind == "all-reduce" else 1), 1.0)

    # --- bytes ---

    def moved(self, i: Instruction, computation) -> float:
        """Count the bytes that a scheduled instruction reads and writes; for a slice or
        an in-place update, only those of the part concerned.
        """
        if i.op == "fusion":
            inner = called(i, "calls")
            return self.written(inner, i.shape) + sum(
                self.read(inner, at, computation[o].shape) for at, o in enumerate(i.operands) if o in computation
            )
        operands = [computation[o].shape for o in i.operands if o in computation]
        if i.op in ("dynamic-slice", "slice", "gather"):
            return copied(i.shape, operands[0], i.shape)
        if i.op in ("dynamic-update-slice", "scatter"):
            part = operands[1 if i.op == "dynamic-update-slice" else -1]
            return copied(part, part, i.shape)
        if i.op.endswith("-start"):  # its result shape repeats the operands
            return 0.0 if i.op == "copy-start" and not operands else self.started(i, operands)
        return sum(elements(i.shape)) + sum(sum(elements(shape)) for shape in operands)

    def started(self, i: Instruction, operands) -> float:
        """Count the bytes that an asynchronous instruction reads, and those it will
        have written.
        """
        read, results = sum(sum(elements(s)) for s in operands), elements(i.shape)
        if i.op == "copy-start":  # (destination, source, context)
            return read + results[0]
        half = len(operands)
        if i.op == "slice-start":  # ((source, ...), destination, ...)
            parts = elements(i.shape, everywhere=True)[half : 2 * half]
            from_hbm = (part for part, source in zip(parts, operands, strict=True) if sum(elements(source)))
            return sum(from_hbm) + sum(results[half : 2 * half])
        if i.op in ("all-gather-start", "collective-permute-start"):  # (source, destination, ...)
            return read + sum(results[half : 2 * half])
        return read + sum(results)

    def read(self, name: str, at: int, shape: str) -> float:
        """Count the bytes that a fusion reads of its operand number `at`."""
        whole = sum(elements(shape))
        if not whole:
            return 0.0
        computation = self.computations[name]
        parameter = next((i for i in computation.values() if i.op == "parameter" and i.inside == str(at)), None)
        return whole if parameter is None else min(whole, self.used(computation, parameter.name, shape))

    def used(self, computation, name: str, shape: str) -> float:
        """Count the bytes of a value that the instructions of a fused computation read,
        or pass on as a result.
        """
        whole, total = sum(elements(shape)), 0.0
        if computation[name].root:
            return whole
        for user in computation.values():
            if name not in user.operands:
                continue
            if user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += sum(elements(user.shape, everywhere=True))
            elif user.op in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
                continue  # updated in place, not read
            elif user.op in ("bitcast", "reshape"):
                total += self.used(computation, user.name, shape)
            elif user.op == "fusion":
                inner = called(user, "calls")
                for at in (at for at, operand in enumerate(user.operands) if operand == name):
                    passes = self.passes(inner, at)
                    total += self.used(computation, user.name, shape) if passes else self.read(inner, at, shape)
            else:
                return whole
        return total

    def passes(self, name: str, at: int) -> bool:
        """Tell whether a fusion only passes its operand number `at` on as its
        result.
        """
        computation = self.computations[name]
        part = next(i for i in computation.values() if i.root)
        while part.op == "bitcast" and part.operands[0] in computation:
            part = computation[part.operands[0]]
        return part.op == "parameter" and part.inside == str(at)

    def written(self, name: str, shape: str) -> float:
        """Count the bytes that a fusion writes."""
        computation = self.computations[name]
        root = next(i for i in computation.values() if i.root)
        results = elements(shape)
        parts = [computation[o] for o in root.operands] if root.op == "tuple" else [root]
        if len(parts) != len(results):
            return sum(results)
        return sum(min(size, self.updated(part, computation)) for size, part in zip(results, parts, strict=True))

    def updated(self, part: Instruction, computation) -> float:
        """Count the bytes written to make a value of a fused computation: the updated
        part if the value is an in-place update, otherwise all (infinity).
        """
        while part.op == "bitcast" and part.operands[0] in computation:
            part = computation[part.operands[0]]
        if part.op in ("dynamic-update-slice", "scatter"):
            return sum(
                elements(computation[part.operands[1 if part.op == "dynamic-update-slice" else -1]].shape, everywhere=True)
            )
        if part.op == "fusion":
            return self.written(called(part, "calls"), part.shape)
        return math.inf


def add(sent, more, times: float) -> None:
    """Add the collectives of `more`, repeated `times` times, to `sent`."""
    for key, (size, count) in more.items():
        before = sent.get(key, (0.0, 0.0))
        sent[key] = (before[0] + times * size, before[1] + times * count)


def called(i: Instruction, name: str) -> str:
    """Return the computation that attribute `name` of an instruction names, '' if
    none.
    """
    found = re.search(rf"\b{name}=%?([\w.\-]+)", i.rest)
    return found[1] if found else ""


def branches(i: Instruction) -> list[str]:
    """List the computations of a conditional."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return [called(i, "true_computation"), called(i, "false_computation")]


def collective(i: Instruction) -> str | None:
    """Return the kind of a collective; None for any other instruction, and for the
    second half of an asynchronous one.
    """
    kind = i.op.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def group_size(attributes: str, devices: int) -> int:
    """Count the devices of a collective's group, written as `{{0,1},{2,3}}`,
    `[2,4]<=[8]` or `mesh['x'=2,'y'=4] {'y'}`.
    """
    if "source_target_pairs=" in attributes:
        return 2
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(tiled[1])
    if mesh := re.search(r"replica_groups=(?:@\w+)?mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else axes[name] for name, part in named)
    return devices


def product_flops(i: Instruction, computation) -> float:
    """Count the FLOPs of a matrix product, which a TPU's compiler writes as a
    convolution.
    """
    left, right = (sizes(computation[name].shape) for name in i.operands[:2])
    if i.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1]
        return 2.0 * math.prod(sizes(i.shape)) * math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    left_names, right_names, out_names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
    out = dict(zip(out_names, sizes(i.shape), strict=True))
    left, right = dict(zip(left_names, left, strict=True)), dict(zip(right_names, right, strict=True))
    window = window_of(i.rest, sum(name.isdigit() for name in out_names))
    valid = math.prod(valid_positions(left[str(n)], right[str(n)], out[str(n)], **w) for n, w in enumerate(window))
    groups = re.search(r"batch_group_count=(\d+)", i.rest)
    return 2.0 * left["b"] / int(groups[1] if groups else 1) * out["f"] * right["i"] * valid


def window_of(attributes: str, axes: int) -> list[dict[str, int]]:
    """Read stride, padding and dilations of each axis of a convolution's window."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in text[1].split()) if text else {}

    def numbers(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * axes

    return [
        {"stride": int(s), "pad": int(p.split("_")[0]), "left_dilation": int(a), "right_dilation": int(b)}
        for s, p, a, b in zip(
            numbers("stride", "1"), numbers("pad", "0_0"), numbers("lhs_dilate", "1"), numbers("rhs_dilate", "1"), strict=True
        )
    ]


def valid_positions(left: int, right: int, out: int, *, stride: int, pad: int, left_dilation: int, right_dilation: int) -> int:
    """Count the pairs of a window entry and an output that meet an entry of the input,
    not padding or a dilation gap.
    """
    if (left_dilation, right_dilation, pad) == (1, 1, 0) and (out - 1) * stride + right <= left:
        return out * right
    count = 0
    for k in range(right):
        at = [o * stride - pad + k * right_dilation for o in range(out)]
        count += sum(a % left_dilation == 0 and 0 <= a // left_dilation < left for a in at)
    return count
