"""The rewards of groups, as an objective's advantage takes them: one number per
rollout, or one per rollout and measure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxreason.objectives.advantages import EQUAL_REWARDS
from jaxreason.types import Group, Verdict


def of_groups(groups: Sequence[Group], measures: Sequence[str] = ()) -> np.ndarray:
    """Return the rewards of groups of one size, [P, G]; with `measures`, the names of N
    measures of the verdicts, their values, [P, G, N].

    A verdict that lacks a measure counts 0, such as that of a verifier that failed.

    Raises:
      ValueError: no verdict has a measure, though the verifier judged one of them.
    """
    if not measures:
        return np.array([[r.verdict.reward for r in group.attempts] for group in groups], np.float64)
    check_measured([r.verdict for group in groups for r in group.attempts], measures)
    return np.array([[values(r.verdict, measures) for r in group.attempts] for group in groups], np.float64)


def values(verdict: Verdict, measures: Sequence[str]) -> list[float]:
    return [verdict.measures.get(name, 0.0) for name in measures]


def check_measured(verdicts: Sequence[Verdict], measures: Sequence[str]) -> None:
    """Raise ValueError if no verdict has one of some measures.

    Verdicts of answers that could not be judged do not count: a model that never ends
    its answers must not end the run.
    """
    there = {name for verdict in verdicts for name in verdict.measures}
    judged = any(verdict.correct or verdict.parsed is not None or verdict.reward for verdict in verdicts)
    if (lost := [name for name in measures if name not in there]) and judged:
        raise ValueError(
            f"no verdict of the batch has the measure {lost[0]!r}, which the objective's `rewards` names; there are: "
            f"{', '.join(sorted(there)) or 'none'}. Verifiers made of parts have the reward of each: see verifier 'weighted'"
        )


def are_mixed(group: Group, measures: Sequence[str] = ()) -> bool:
    """Tell whether the attempts of a group earned different rewards, by any of the
    measures if there are some.
    """
    reward_G = [values(r.verdict, measures) if measures else [r.verdict.reward] for r in group.attempts]
    return bool(np.any(np.ptp(reward_G, axis=0) >= EQUAL_REWARDS))
