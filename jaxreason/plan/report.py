"""Report of a plan, as a dictionary for scripts and as tables: memory, work,
collectives, and the time and price of a step.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from jaxreason.model.config import count_parameters
from jaxreason.options import unknown_name_message
from jaxreason.plan import chips, traffic
from jaxreason.plan.arrays import devices_of, processes_of
from jaxreason.plan.lines import lines_of
from jaxreason.plan.memory import KINDS, Stage, fits, learner_stages, stages_of
from jaxreason.plan.programs import Compiled, compile_train, programs_of
from jaxreason.plan.traffic import short
from jaxreason.plan.work import Work, flags_for

# --- time and price ---


def read_prices(path: str | None) -> dict[str, float]:
    """Read a JSON file of dollars per chip-hour by chip name."""
    try:
        prices = {} if path is None else json.loads(Path(os.path.expanduser(path)).read_text())
    except ValueError as error:
        raise ValueError(f'--prices got {path}, which is no JSON ({error}); needed: an object such as {{"v5e": 1.2}}') from None
    if not isinstance(prices, dict):
        raise ValueError(f'{path} holds a {type(prices).__name__}; needed: an object such as {{"v5e": 1.2}}')
    for name, price in prices.items():
        if name not in chips.CHIPS:
            raise ValueError(unknown_name_message(f"chip in {path}", name, chips.CHIPS))
        if not isinstance(price, (int, float)) or price < 0:
            raise ValueError(f"price of {name} in {path} got {price!r}; allowed: a number, in dollars per chip-hour")
    return prices


class Prediction(NamedTuple):
    """Time and price of one step at a given fraction of the roofline."""

    step_s: float
    sampling_s: float
    learning_s: float
    sampled_tokens_per_s: float
    trained_tokens_per_s: float  # while learning
    steps_per_hour: float
    chip_hours: float  # of 1,000 steps
    usd: float | None  # of 1,000 steps


def predict(work: Work, programs: Sequence[Compiled], efficiency: float, usd_per_hour: float | None) -> Prediction:
    """Predict the time of a step. `usd_per_hour` is the price of one chip."""
    seconds = {p.name: p.times * chips.roofline(p.program, work.chip).seconds / efficiency for p in programs}
    sampling = sum(s for name, s in seconds.items() if work.samples and name.startswith(("prefill", "decode")))
    learning = sum(s for name, s in seconds.items() if not name.startswith(("prefill", "decode")))
    step_s = sampling + learning
    devices = len(devices_of(work.topology))  # all of them are paid for, even those outside the mesh
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


# --- dictionary and tables ---


def describe(work: Work, efficiency: float, prices: dict[str, float]) -> dict:
    """Describe one work's plan in a JSON-serialisable dictionary."""
    kind, chip = work.topology.partition(":")[0], work.chip
    stages = stages_of(work)
    compiled = any(stage.name == "train step" for stage in stages)
    programs = [p for p in (programs_of(work) if compiled else []) if p.program is not None]
    usd = prices.get(kind, chip.usd_per_hour)
    whole = compiled and len(programs) == len(programs_of(work))
    return {
        "topology": work.topology,
        "chips": chips.chips_of(work.topology),
        "devices": len(devices_of(work.topology)),
        "processes": processes_of(work),
        "mesh": dict(work.mesh),
        "parameters": count_parameters(work.shape),
        "phase": work.phase,
        "rows": work.rows,
        "row_tokens": work.length,
        "microbatches": work.microbatches,
        "slots": work.slots if work.sampler is not None else None,
        "fits": fits(stages, work),
        "hbm_bytes": chip.hbm_bytes,
        "peak_bytes": finite(max(stage.bytes for stage in stages)),
        "stages": {stage.name: describe_stage(stage) for stage in stages},
        "programs": {p.name: describe_program(p, chip, tokens_of(p, work)) for p in programs},
        "efficiency": efficiency,
        "usd_per_chip_hour": usd,
        "price_source": "--prices" if kind in prices else chip.price_source,
        "prediction": predict(work, programs, efficiency, usd)._asdict() if whole else None,
    }


def describe_fewer(work: Work, fewer: Work) -> dict:
    """Describe the train step with fewer micro-batches than `work` has, which the
    network does not bound.
    """
    before, after = (chips.roofline(compile_train(w).program, w.chip) for w in (work, fewer))
    peak = max(stage.bytes for stage in learner_stages(fewer))
    return {
        "flags": flags_for(work, fewer),
        "bound": after.bound,
        "seconds": after.seconds,
        "seconds_before": before.seconds,
        "peak_bytes": peak,
    }


def faster(fewer: dict) -> str:
    """Say in one line what `describe_fewer` found."""
    return (
        f"the network bounds the train step; with {' '.join(fewer['flags'])} {fewer['bound']} does: at the chip's peak "
        f"{short(1e3 * fewer['seconds'])} ms instead of {short(1e3 * fewer['seconds_before'])}, in "
        f"{fewer['peak_bytes'] / chips.GIB:.2f} GiB"
    )


def describe_stage(stage: Stage) -> dict:
    kinds = {kind: finite(size) for kind, size in stage.kinds.items()}
    return kinds | {"total": finite(stage.bytes)} | ({"refused": stage.refused} if stage.refused else {})


def finite(size: float) -> float | None:
    """Return None for a size that the compiler did not report."""
    return size if math.isfinite(size) else None


def tokens_of(p: Compiled, work: Work) -> float:
    """Count the tokens of a run of a program per chip of the mesh."""
    if p.name.startswith(("prefill", "decode")):
        return 0.0
    return work.rows * work.length / math.prod(dict(work.mesh).values())


def describe_program(p: Compiled, chip: chips.Chip, tokens: float) -> dict:
    line, sent = chips.roofline(p.program, chip), sorted(p.program.sent.items())
    return {
        "compile_s": p.compile_s,
        "times_a_step": p.times,
        "flops": p.program.flops,
        "flops_by_formula": p.flops,
        "kernel_flops": p.kernel_flops,
        "bytes": p.program.bytes,
        "sent": {f"{kind} of {n}": {"bytes": size, "times": times} for (kind, n), (size, times) in sent},
        "loops": p.program.loops,
        "loops_of_given_length": p.program.unknown_loops,
        **line._asdict(),
        "seconds": line.seconds,
        "bound": line.bound,
        **traffic.describe(p.lines, chip, tokens, p.model_flops, p.floor_bytes),
    }


def make_console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 130, highlight=False)


def print_table(console: Console, title: str, names: Sequence[str], rows) -> None:
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for at, name in enumerate(names):
        made.add_column(name, justify="right" if at else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    console.print(made)


def read_hlo(path: str) -> str:
    """Read the text of a compiled HLO module.

    Raises:
      ValueError: the file holds something else.
    """
    text = Path(os.path.expanduser(path)).read_text(errors="replace")
    if not text.startswith("HloModule") or "is_scheduled=true" not in text:
        raise ValueError(f"--compare got {path}, which is no compiled HLO module; allowed: the text of compiled.as_text()")
    return text


def compare(path: str, topology: str, found: dict | None) -> dict:
    """Describe the program in an HLO file, as a chip of a topology would run it.

    `found` is the plan of a config whose train step does the same work; it gives tokens
    and FLOPs of the model.

    Raises:
      ValueError: the file has no compiled module.
    """
    if topology not in chips.topology_names():
        raise ValueError(unknown_name_message("topology", topology, chips.topology_names()))
    text = read_hlo(path)
    chip, devices = chips.CHIPS[topology.partition(":")[0]], chips.chips_of(topology)
    ours = next((p for p in (found or {"programs": {}})["programs"].values() if "model_flops" in p), {})
    sizes = {"devices": devices, "unknown_trips": (found or {}).get("microbatches", 1)}
    lines = lines_of(text, **sizes, kernel_flops=ours.get("kernel_flops", 0.0))
    return traffic.describe(lines, chip, ours.get("tokens", 0.0), ours.get("model_flops", 0.0))


def show_compared(path: str, described: dict) -> None:
    traffic.show(Path(path).name, described, functools.partial(print_table, make_console()))


def show(found: dict) -> None:
    """Print what `describe` returned as tables."""
    console = make_console()
    table = functools.partial(print_table, console)

    def gib(size: float | None) -> str:
        if not size:
            return "?" if size is None else ""
        return f"{size / chips.GIB:,.2f}" if size > chips.GIB / 200 else "<0.01"

    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    console.print(
        f"{short(found['parameters'] / 1e6)} M parameters on {found['topology']} ({counted(found['chips'], 'chip')}), mesh {mesh}"
        + (f", each of {found['processes']} processes sampling on its own chips" if found["processes"] > 1 else "")
        + f"; phase {found['phase']}: {found['rows']} rows of {found['row_tokens']} tokens "
        + f"in {counted(found['microbatches'], 'micro-batch')}"
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


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'es' if what.endswith('ch') else 's'}" if number != 1 else f"1 {what}"


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
    for name, p in found["programs"].items():
        if "model_flops" in p or p.get("floor_bytes"):
            traffic.show(name, p, table)


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
    """Say in one line whether the plan fits."""
    sizes = {name: stage["total"] for name, stage in found["stages"].items()}
    worst = max(sizes, key=lambda name: math.inf if sizes[name] is None else sizes[name])
    need = "an unknown amount" if sizes[worst] is None else f"{sizes[worst] / chips.GIB:.2f}"
    return f"{'fits' if found['fits'] else 'does not fit'}: needs {need} of {found['hbm_bytes'] / chips.GIB:.2f} GiB ({worst})"
