"""The budget of the user: amounts of FLOPs, device-seconds and joules, and the rest of
them.

A sweep reserves an upper bound of its cost before it begins. At its end the cost
replaces the reservation. Both are lines of the audit log, so neither a
restart of the server nor a deleted folder gives anything back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxreason.options import unknown_name_message

UNITS = ("flops", "device_s", "joules")
NAMES = {"flops": "FLOPs", "device_s": "device-seconds", "joules": "joules"}


def parse(text: str | None) -> dict[str, float]:
    """Read `flops=2e15,device_s=3600` as unit -> amount.

    Raises:
      ValueError: no unit, an unknown one, one twice, or an amount that is not above 0.
    """
    found: dict[str, float] = {}
    for part in (text or "").split(","):
        unit, equals, amount = (word.strip() for word in part.partition("="))
        if not equals:
            raise ValueError(
                f"--budget got {text or ''!r}; needed: UNIT=AMOUNT, several with commas, as flops=2e15,device_s=3600; "
                f"units: {', '.join(UNITS)}"
            )
        if unit not in UNITS:
            raise ValueError(unknown_name_message("unit of --budget", unit, UNITS))
        if unit in found:
            raise ValueError(f"--budget has the unit {unit!r} twice; allowed: once")
        try:
            found[unit] = float(amount)
        except ValueError:
            found[unit] = 0.0
        if not 0 < found[unit] < math.inf:
            raise ValueError(f"--budget got {part.strip()!r}; allowed: {unit}=AMOUNT, a finite amount above 0")
    return found


def reservations(lines: Sequence[Mapping]) -> dict[str, dict]:
    """Return the sweeps of an audit log: id -> its line `reserve`, with the cost
    `used` once it has ended.
    """
    found: dict[str, dict] = {}
    for line in lines:
        if line["event"] == "reserve":
            found[line["sweep"]] = dict(line) | {"used": None, "status": "running"}
        elif line["event"] == "ended" and line["sweep"] in found:
            found[line["sweep"]] |= {"used": line["used"], "status": line["status"], "ended": line["time"]}
    return found


def spent(lines: Sequence[Mapping], unit: str) -> float:
    """Return the cost of all sweeps that ended, in a unit."""
    return sum(one["used"].get(unit) or 0.0 for one in reservations(lines).values() if one["used"] is not None)


def reserved(lines: Sequence[Mapping], unit: str) -> float:
    """Return the reservations of all sweeps that run, in a unit."""
    return sum(one["reserved"].get(unit) or 0.0 for one in reservations(lines).values() if one["used"] is None)


def state(budget: Mapping[str, float], lines: Sequence[Mapping]) -> dict[str, dict[str, float]]:
    """Return budget, spent, reserved and remaining for each unit of the budget."""
    found = {}
    for unit, amount in budget.items():
        used, held = spent(lines, unit), reserved(lines, unit)
        found[unit] = {"budget": amount, "spent": used, "reserved": held, "remaining": max(0.0, amount - used - held)}
    return found


def to_reserve(
    budget: Mapping[str, float],
    lines: Sequence[Mapping],
    *,
    flops: float | None,
    asked: Mapping[str, float | None],
    joules_known: bool,
) -> dict[str, float]:
    """Return the reservation of a sweep: of FLOPs its bound by formula, of other units
    the amount that the client `asked` for.

    Raises:
      ValueError: a cost that can't be predicted or limited, or more than is left.
    """
    found: dict[str, float] = {}
    for unit, left in ((unit, values["remaining"]) for unit, values in state(budget, lines).items()):
        if unit == "flops":
            if flops is None:
                raise ValueError("the FLOPs of this sweep can't be predicted, and the budget is in FLOPs; choose another config")
            amount = flops
        else:
            if unit == "joules" and not joules_known:
                raise ValueError(
                    "the budget is in joules, and nothing counts them: no counter can be read and the config has no log.watts"
                )
            given = asked.get(unit)
            if given is None or not 0 < given < math.inf:
                raise ValueError(f"most_{unit} got {given}; needed: the {NAMES[unit]} that the sweep may use at most, above 0")
            amount = given
        if amount > left:
            raise ValueError(
                f"refused: the sweep needs up to {amount:.3g} {NAMES[unit]}, and {left:.3g} of {budget[unit]:.3g} are left; "
                "ask for fewer runs or steps"
            )
        found[unit] = amount
    return found
