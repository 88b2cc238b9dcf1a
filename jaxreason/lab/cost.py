"""The cost of a sweep, read from the folders of its runs. Nothing here imports jax.

A run costs the amounts of its ledger: in `summary.json` if it is done, in its last
checkpoint if it was stopped and saved itself. A run that ended in another way may have
worked after its last record, so its cost is an upper bound: the amounts of its last
record, the FLOPs between two records by formula, and its whole time. Otherwise a client
could start runs and have them killed, for nothing.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxreason.lab.budget import UNITS
from jaxreason.runtime.workdir import is_done, json_object, last_metrics, saved_at

TAIL_BYTES = 65_536  # of metrics.jsonl that are read
LARGEST = 1e300  # amount of a unit; sums of them are finite


def zero() -> dict[str, float]:
    return dict.fromkeys(UNITS, 0.0)


def booked(folder: Path) -> dict[str, float]:
    """Return the cost of a run so far, by its records: the largest of its metrics,
    its newest checkpoint and its summary, since a ledger only grows.
    """
    found = zero()
    for ledger in (_of_metrics(folder), _of_checkpoint(folder), (json_object(folder / "summary.json") or {}).get("ledger")):
        for unit in UNITS:
            found[unit] = max(found[unit], _sum(ledger, unit))
    return found


def _sum(ledger: object, unit: str) -> float:
    """Add the amounts of all kinds of work. A damaged one is infinite, so that a sweep
    costs its whole reservation.
    """
    kinds = ledger.values() if isinstance(ledger, Mapping) else ()
    amounts = [kind[unit] for kind in kinds if isinstance(kind, Mapping) and kind.get(unit) is not None]
    return float(sum(amounts)) if all(map(is_amount, amounts)) else math.inf


def is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LARGEST


def _of_metrics(folder: Path) -> dict[str, dict[str, float]]:
    ledger: dict[str, dict[str, float]] = {}
    for name, amount in last_metrics(folder, TAIL_BYTES).items():
        kind, _, unit = name.partition("ledger/")[2].partition("_")
        if unit in UNITS:
            ledger.setdefault(kind, {})[unit] = amount
    return ledger


def _of_checkpoint(folder: Path) -> object:
    steps = saved_at(folder)
    host = (json_object(folder / "checkpoints" / str(steps[-1]) / "host" / "metadata") or {}).get("host") if steps else None
    return host.get("ledger") if isinstance(host, Mapping) else None


def less(used: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    known = {unit: before[unit] if before[unit] < math.inf else 0.0 for unit in UNITS}
    return {unit: max(0.0, used[unit] - known[unit]) for unit in UNITS}


def added(amounts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {unit: sum(one[unit] for one in amounts) for unit in UNITS}


def so_far(plan: Mapping, states: Mapping[str, Mapping], now_s: float) -> dict[str, float]:
    """Return the cost of a running sweep, at most: that of the records, and for the
    time since each run's last record device-seconds, and joules at the rate so far.
    """
    found = []
    for run in plan["runs"]:
        folder, state = Path(run["folder"]), states.get(run["name"], {})
        used = _own(run)
        if state.get("status") == "running":
            last_s = _begun_s(folder, state, now_s)
            with contextlib.suppress(OSError):
                last_s = max(last_s, (folder / "metrics.jsonl").stat().st_mtime)
            since_s = max(0.0, now_s - last_s) * plan["devices_per_run"]
            used["joules"] *= 1.0 + since_s / used["device_s"] if used["device_s"] else 1.0  # at the rate so far
            used["device_s"] += since_s
        found.append(used)
    return added(found)


def _own(run: Mapping) -> dict[str, float]:
    """Return the amounts booked for a run, without those of shared phases."""
    folder = Path(run["folder"])
    if not (folder / "config.json").exists():
        return zero()
    return less(booked(folder), booked(Path(run["shared"])) if run["shared"] else zero())


def at_end(plan: Mapping, states: Mapping[str, Mapping]) -> dict[str, float]:
    """Return the cost of a sweep that ended."""
    found, all_known = [], True
    for run in plan["runs"]:
        folder, state = Path(run["folder"]), states.get(run["name"], {})
        used = _own(run)
        if state.get("attempts", 0) and (folder / "config.json").exists() and not _is_booked(folder, state):
            all_known = False
            now_s = time.time()
            seconds = _seconds(state.get("ended"), now_s) - _begun_s(folder, state, now_s)
            used["flops"] += run["flops_unrecorded"] or 0.0
            used["device_s"] = max(used["device_s"], seconds * plan["devices_per_run"])
        found.append(used)
    total = added(found)
    if not all_known:  # of joules there is no bound but the reservation
        total["joules"] = max(total["joules"], plan["reserved"].get("joules", 0.0))
    if any(states.get(run["name"], {}).get("status") == "done" and not Path(run["folder"]).exists() for run in plan["runs"]):
        total = {unit: max(total[unit], plan["reserved"].get(unit, 0.0)) for unit in UNITS}  # its records were removed
    return total


def _is_booked(folder: Path, state: Mapping) -> bool:
    """Whether a run's records have all that it used: it is done, or saved itself."""
    return is_done(folder) or (state.get("exit") in (0, 130) and bool(saved_at(folder)))


def _begun_s(folder: Path, state: Mapping, otherwise: float) -> float:
    """When a run began to use devices, at the earliest: it writes its config first."""
    try:
        return max(_seconds(state.get("started"), 0.0), (folder / "config.json").stat().st_mtime)
    except OSError:
        return otherwise


def _seconds(text: object, otherwise: float) -> float:
    """Seconds since 1970 of a time in `state.json`."""
    try:
        return time.mktime(time.strptime(str(text), "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return otherwise


def read_states(folder: Path) -> dict[str, dict]:
    """Read the states of the runs of a sweep: name -> state."""
    runs = (json_object(folder / "state.json") or {}).get("runs")
    return {name: state for name, state in runs.items() if isinstance(state, dict)} if isinstance(runs, dict) else {}
