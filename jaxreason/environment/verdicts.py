"""Verdicts of environments: checked ones, those of verifiers that failed, and counts of
the failures.
"""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxreason.types import Verdict

VERIFIER_ERROR = "verifier error"
VERIFIER_TIMEOUT = "verifier timeout"
# Name of a count -> prefixes of the verdict reasons that it counts. Prefixes after the
# first come from child processes.
COUNTED = {
    "verifier_errors": (VERIFIER_ERROR, "crashed", "out of memory"),
    "verifier_timeouts": (VERIFIER_TIMEOUT, "timeout"),
    "bad_keys": ("bad key",),
}


def failed(what: str, name: str, why: str) -> Verdict:
    """Make the verdict of an attempt whose verifier failed; `name` may be empty."""
    return Verdict(0.0, False, None, f"{what} of {name!r}: {why}" if name else f"{what}: {why}")


def checked(verdict: Any) -> Verdict:
    """Return a verdict with plain Python values.

    Raises:
      TypeError, ValueError: not a Verdict, a field of the wrong type, or a reward that
        is not finite or above `LARGEST`.
    """
    if not isinstance(verdict, Verdict):
        raise TypeError(f"returned a {type(verdict).__name__}; allowed: a jaxreason.types.Verdict")
    allowed = {"reward": (int, float, np.number), "correct": (bool, np.bool_), "parsed": (str, type(None)), "reason": (str,)}
    for field, types in allowed.items():
        if not isinstance(value := getattr(verdict, field), types) or (field == "reward" and isinstance(value, bool)):
            raise TypeError(f"returned a Verdict whose {field} is a {type(value).__name__}; allowed: {types[0].__name__}")
    reward = float(verdict.reward)
    if not math.isfinite(reward) or abs(reward) > LARGEST:
        raise ValueError(f"returned a Verdict whose reward is {reward}; allowed: a finite number of at most {LARGEST:g}")
    numbers = checked_measures(verdict.measures), checked_attempts(verdict.attempts)
    return Verdict(reward, bool(verdict.correct), verdict.parsed, verdict.reason, *numbers)


def checked_attempts(attempts: Any) -> tuple[tuple[int, float], ...]:
    """Return the attempts of a verdict with plain numbers.

    Raises:
      TypeError, ValueError: not pairs of an end and a finite reward, in order.
    """
    try:
        found = tuple((int(end), float(reward)) for end, reward in attempts)
    except (TypeError, ValueError):
        raise TypeError(f"returned a Verdict whose attempts are {attempts!r:.60}; allowed: pairs (end, reward)") from None
    ends = [end for end, _ in found]
    if ends != sorted(ends) or min(ends, default=0) < 0 or not all(abs(reward) <= LARGEST for _, reward in found):
        raise ValueError(
            f"returned a Verdict whose attempts are {found!r:.60}; allowed: ends that do not fall and finite rewards of at most "
            f"{LARGEST:g}"
        )
    return found


def checked_measures(measures: Any) -> dict[str, float]:
    """Return the measures of a verdict as floats.

    Raises:
      TypeError, ValueError: not a mapping of names to finite numbers.
    """
    if not isinstance(measures, Mapping):
        raise TypeError(
            f"returned a Verdict whose measures are a {type(measures).__name__}; allowed: a dict of names and numbers"
        )
    found = {}
    for name, value in measures.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"returned a Verdict with the measure {name!r:.60}; allowed: letters, digits and _")
        if name in TAKEN:
            raise ValueError(f"returned a Verdict with the measure {name!r}, which is a metric of every run; choose another name")
        if not isinstance(value, (int, float, np.number, np.bool_)) or not math.isfinite(value):
            raise ValueError(f"returned a Verdict whose measure {name} is {value!r:.60}; allowed: a finite number")
        found[name] = float(value)
    return found


# Metrics of rollouts and of suites, which a measure of the same name would replace.
TAKEN = {
    *("reward", "correct", "solved", "informative_groups", "cut", "oversampling"),
    *("replayed", "replay_age", "passed_over", "filled", "kept"),
    *("accuracy", "answered", "cut_off", "length", "length_p50", "length_p90", "length_p99"),
    *("sampling_share", "majority_share", "calibration_error", *COUNTED),
}
NAME = re.compile(r"\w{1,60}", re.ASCII)
LARGEST = 1e9  # largest reward; its square is far below the largest float32


def told(error: BaseException) -> str:
    """Describe an error in one short line, even if its `str` raises."""
    try:
        words = " ".join(str(error).split())[:300]
    except BaseException:
        words = "an error without words"
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def traceback_of(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except BaseException:
        return told(error)


def count_failures(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Count the verdicts that come from a failure, not from the answer.

    The counts are those of `COUNTED`.
    """
    reasons = [verdict.reason for verdict in verdicts]
    return {name: sum(reason.startswith(starts) for reason in reasons) for name, starts in COUNTED.items()}


def measured(verdicts: Iterable[Verdict]) -> dict[str, tuple[float, float]]:
    """Sum each of the verdicts' measures; return (sum, number of verdicts that have
    it).
    """
    found: dict[str, tuple[float, float]] = {}
    for verdict in verdicts:
        for name, value in verdict.measures.items():
            total, count = found.get(name, (0.0, 0.0))
            found[name] = (total + value, count + 1.0)
    return found


def verifier_failed(verdict: Verdict) -> bool:
    counts = count_failures([verdict])
    return bool(counts["verifier_errors"] or counts["verifier_timeouts"])
