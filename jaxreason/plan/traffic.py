"""Bytes that a program moves beside those that its products need, and its speed at
most: as a dictionary, and as tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxreason.plan.chips import Chip
from jaxreason.plan.lines import Line, bounds, by_source

LINES = 10  # source lines that are listed


def describe(lines: Sequence[Line], chip: Chip, tokens: float, model_flops: float, floor_bytes: float = 0.0) -> dict:
    """Describe a program from its lines.

    `tokens`, `model_flops` and `floor_bytes`, the least bytes that decoding reads, are
    those of a chip in one run; 0: not known.
    """
    found, limits = totals(lines), bounds(lines, chip)
    found |= {"in_turn_s": limits.in_turn_s, "together_s": limits.together_s, "tokens": tokens}
    found |= {"needed_bytes": limits.needed_bytes, "waiting_bytes": limits.waiting_bytes}
    found |= {"floor_bytes": floor_bytes} if floor_bytes else {}
    found |= {"avoidable": [line._asdict() for line in by_source(lines)[:LINES]]}
    if model_flops:
        ideal_s = model_flops / chip.flops_per_s
        found |= {"model_flops": model_flops}
        found |= {"mfu_together": ideal_s / limits.together_s, "mfu_in_turn": ideal_s / limits.in_turn_s}
    return found


def totals(lines: Sequence[Line]) -> dict[str, Any]:
    names = {"counted_flops": "flops", "hbm_bytes": "bytes", "sent_bytes": "sent"}
    return {name: sum(getattr(line, field) for line in lines) for name, field in names.items()}


def show(name: str, p: dict, table: Callable) -> None:
    """Print what `describe` returned; `table` prints a title, heads and rows."""

    def moved(what: str, size: float, needed: float | None = None) -> list[str]:
        each = [short(size / p["tokens"] / 1e3)] if p["tokens"] else []
        return [what, short(size / 1e9), "" if needed is None else short(needed / 1e9), *each]

    rows = [moved("HBM", p["hbm_bytes"], p["needed_bytes"]), moved("network", p["sent_bytes"])]
    rows.append(moved("of it, while nothing else runs", p["waiting_bytes"]))
    if "floor_bytes" in p:
        rows.append(moved("weights and cache once per token", p["floor_bytes"]))
    table(f"Bytes of a chip, {name}", ["", "GB", "of products", *(["kB per token"] if p["tokens"] else [])], rows)
    rows = [
        [what, short(1e3 * p[f"{kind}_s"]), *([f"{p[f'mfu_{kind}']:.2f}"] if "model_flops" in p else [])]
        for what, kind in (("if all overlaps", "together"), ("one instruction after the other", "in_turn"))
    ]
    mfu = "model_flops" in p
    title = f"Least time of {short(p['counted_flops'] / 1e12)} TFLOP{', and MFU at most' if mfu else ''}"
    table(title, ["", "ms", *(["MFU"] if mfu else [])], rows)
    heads = ["line", "operation", "runs", "HBM GB", "not of products", "sent GB"]
    rows = [
        [cut(line["source"], 44), cut(line["op"], 30), f"{line['times']:,.0f}", *map(short, gigabytes(line))]
        for line in p["avoidable"]
    ]
    table("Source lines with the most bytes that no product reads or writes", heads, rows)


def gigabytes(line: dict) -> tuple[float, ...]:
    return tuple(x / 1e9 for x in (line["bytes"], line["bytes"] - line["needed"], line["sent"]))


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def short(x: float) -> str:
    """Format a number with three digits or more."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
