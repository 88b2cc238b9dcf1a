"""The rewards of groups, as an objective's advantage takes them: one number per
rollout, one per rollout and measure, or one per attempt within a rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxreason.objectives.advantages import EQUAL_REWARDS
from jaxreason.objectives.losses import nll
from jaxreason.types import Group, Rollout, Verdict

if TYPE_CHECKING:
    from jaxreason.objectives import Objective


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


def are_mixed(group: Group, measures: Sequence[str] = (), credit: str = "rollout") -> bool:
    """Tell whether the attempts of a group earned different rewards, by any of the
    measures if there are some; with the credit "attempt", those within a rollout too.
    """
    if credit == "attempt":
        found = [[reward] for r in group.attempts for _, reward in attempts_of(r)]
    else:
        found = [values(r.verdict, measures) if measures else [r.verdict.reward] for r in group.attempts]
    return bool(np.any(np.ptp(found, axis=0) >= EQUAL_REWARDS))


# --- credit for each attempt within a rollout ---

CREDITS = ("rollout", "attempt")


def attempts_of(rollout: Rollout) -> tuple[tuple[int, float], ...]:
    """Return the end, in sampled tokens, and the reward of each attempt."""
    return rollout.verdict.attempts or ((int(rollout.sampled.sum()), rollout.verdict.reward),)


def have_several(groups: Sequence[Group]) -> bool:
    return any(len(r.verdict.attempts) > 1 for group in groups for r in group.attempts)


def by_attempt(groups: Sequence[Group], objective: Objective) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for each rollout the advantages of its attempts and, for each of its
    tokens, the index of the attempt that it is part of.

    The rewards of all attempts at a problem, of all rollouts of its group, are compared
    with each other, as if each were a rollout: the baseline of an attempt is that of
    all others at the problem, earlier and later ones. So a first attempt that is right
    where others needed two is better than theirs, and a second one earns what it adds
    to a wrong first. Baselines of the batch are those of all its attempts. This is
    credit per turn, as in multi-turn reinforcement learning; SCoRe (Kumar et al. 2024,
    arXiv 2409.12917), in contrast, adds the progress between two attempts to the reward
    of the second. Tokens behind the last end are part of the last attempt.
    """
    attempts = [[attempts_of(r) for r in group.attempts] for group in groups]
    reward = [[reward for rollout in group for _, reward in rollout] for group in attempts]
    if objective.needs_group:
        advantage = [np.asarray(objective.advantage(np.array([row], np.float64)))[0] for row in reward]
    else:
        every = np.asarray(objective.advantage(np.array([[x for row in reward for x in row]], np.float64)))[0]
        advantage = np.split(every, np.cumsum([len(row) for row in reward])[:-1])
    found = []
    for group, rollouts, row in zip(groups, attempts, advantage, strict=True):
        own = np.split(row, np.cumsum([len(rollout) for rollout in rollouts])[:-1])
        for r, rollout, values_ in zip(group.attempts, rollouts, own, strict=True):
            ends = [end for end, _ in rollout]
            index_T = np.searchsorted(ends, np.cumsum(r.sampled), side="left")
            found.append((values_, np.minimum(index_T, len(ends) - 1)))
    return found


def check_credit(objective: Objective, what: str) -> None:
    """Raise ValueError if attempts within a rollout can't have advantages of their own;
    `what` is the objective's name.
    """
    why = ""
    if objective.critic is not None:
        why = "makes advantages of single tokens by a critic"
    elif objective.token_loss is nll:
        why = "imitates whole rollouts"
    elif objective.of_sets:
        why = "rewards sets of rollouts"
    elif objective.measures:
        why = "takes measures of whole rollouts"
    elif objective.needs_group and not is_separable(objective.advantage):
        why = "compares each group with the whole batch"
    if why:
        raise ValueError(
            f"source.credit got 'attempt', but objective {what!r} {why}; allowed: 'rollout', or an objective such as grpo or rloo"
        )


def is_separable(advantage: Callable) -> bool:
    """Tell whether the advantages of a group do not depend on other groups."""
    reward_PG = np.array([[0.0, 1.0, 0.25], [1.0, 4.0, 0.5]])
    alone = np.concatenate([advantage(row[None]) for row in reward_PG])
    return bool(np.allclose(alone, advantage(reward_PG)))
