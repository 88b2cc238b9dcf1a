"""Search within a budget: optuna chooses arms, and stops those that do worse than
others did.

    random, tpe     arms are drawn from the values of the grid's fields
    halving         a run stops at a rung if it is not among the best there (Li et al.
                    2018, arXiv 1810.05934)
    wilcoxon        an arm gets no further seeds once those that it has are worse than
                    the best arm's on the same seeds

The study is a file in the folder of the sweep, so nothing is lost if the sweep is
killed. An arm that was stopped early is recorded with the reason, and is in no test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxreason.options import unknown_name_message
from jaxreason.sweep.runs import SweepRun

SEARCHES = ("random", "tpe")
PRUNERS = ("halving", "wilcoxon", "none")
UNITS = ("steps", "flops", "device_s", "joules")


def parse_budget(text: str | None) -> tuple[str, float] | None:
    """Read `flops=1e15` as a unit and an amount.

    Raises:
      ValueError: another unit, or an amount that is not above 0.
    """
    if text is None:
        return None
    unit, _, amount = text.partition("=")
    if unit not in UNITS:
        raise ValueError(unknown_name_message("unit of --budget", unit, UNITS))
    try:
        value = float(amount)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"--budget got {text!r}; allowed: {unit}=AMOUNT, above 0")
    return unit, value


def spent(runs: Sequence[SweepRun], unit: str) -> float:
    """What runs have used by their last lines of metrics, shared phases once."""
    from jaxreason.sweep.progress import last_metrics

    total = 0.0
    for run in runs:
        values, before = last_metrics(run.folder), last_metrics(run.shared) if run.shared else {}
        total += _used(values, unit) - (_used(before, unit) if values else 0.0)
    return total


def _used(values: Mapping[str, Any], unit: str) -> float:
    if unit == "steps":
        return float(values.get("step", 0))
    return sum(amount for name, amount in values.items() if name.partition("ledger/")[2].endswith(f"_{unit}"))


def best_so_far(values: Sequence[float], value: float, factor: int) -> bool:
    """Whether a value is among the best 1 / factor of those that reached its rung,
    itself included; at least one always is.
    """
    kept = max(1, (len(values) + 1) // factor)
    return sum(other > value for other in values) < kept


def replay_halving(curves: Mapping[str, Sequence[tuple[int, float, float]]], *, first: int, factor: int = 2) -> tuple[str, float]:
    """Replay asynchronous successive halving on the curves of finished runs, in their
    order, one at a time.

    A curve has (step, value, cost so far) at each evaluation. Rungs are at `first`,
    `first * factor`, ... steps. Return the arm with the best value among those that
    were not stopped, and the cost of all.
    """
    seen: dict[int, list[float]] = {}
    finished, cost = {}, 0.0
    for arm, curve in curves.items():
        for step, value, used in curve[:-1]:
            if not _is_rung(step, first, factor):
                continue
            stays = best_so_far(seen.get(step, []), value, factor)
            seen.setdefault(step, []).append(value)
            if not stays:
                cost += used
                break
        else:
            finished[arm] = curve[-1][1]
            cost += curve[-1][2]
    return max(finished, key=finished.get), cost


def _is_rung(step: int, first: int, factor: int) -> bool:
    rung = first
    while rung < step:
        rung *= factor
    return rung == step
