"""Advantages: how good each attempt was. Pure numpy functions, [P, G] -> [P, G]: P
problems, G attempts at each.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

# A group whose rewards differ by less than this counts as a group of equal rewards:
# dividing by std must not amplify rounding errors.
EQUAL_REWARDS = 1e-6


def ones(reward_PG):
    """Give every rollout the advantage 1: imitation."""
    return np.ones_like(reward_PG)


def rewards(reward_PG):
    """Give the reward itself: for a critic, which makes advantages of single tokens."""
    return reward_PG


def keep_positive(reward_PG):
    """Give 1 to a positive reward and 0 to others, to imitate the former (Anthony et
    al. 2017, arXiv 1705.08439).
    """
    return (reward_PG > 0).astype(reward_PG.dtype)


# --- baselines of the batch ---


def centre_batch(reward_PG):
    """Subtract the mean reward of the batch (Williams 1992, with a baseline)."""
    return reward_PG - reward_PG.mean()


def zscore_batch(reward_PG, eps: float = 1e-6):
    """Subtract the mean reward of the batch and divide by its standard deviation (Hu
    et al. 2025, arXiv 2501.03262v2, eq. 10, REINFORCE++).
    """
    centred_PG = np.where(np.ptp(reward_PG) < EQUAL_REWARDS, 0.0, centre_batch(reward_PG))
    return centred_PG / (reward_PG.std() + eps)


# --- baselines of the group ---


def centre_group(reward_PG):
    """Subtract the mean reward of the group, as `dr_grpo` (Liu et al. 2025, arXiv
    2503.20783).
    """
    advantage_PG = reward_PG - reward_PG.mean(axis=1, keepdims=True)
    return np.where(np.ptp(reward_PG, axis=1, keepdims=True) < EQUAL_REWARDS, 0.0, advantage_PG)


def leave_one_out(reward_PG):
    """Subtract the mean reward of the *other* attempts (Kool et al. 2019; Ahmadian et
    al. 2024, arXiv 2402.14740, RLOO).
    """
    G = reward_PG.shape[1]
    return centre_group(reward_PG) * G / (G - 1)


def zscore_group(reward_PG, eps: float = 1e-6):
    """Subtract the mean reward of the group and divide by its standard deviation (Shao
    et al. 2024, arXiv 2402.03300, sec. 4.1.2).

    It is that of the population; the paper does not say which. TRL, Tunix and verl
    divide by that of a sample, larger by sqrt(G / (G - 1)).
    """
    return centre_group(reward_PG) / (reward_PG.std(axis=1, keepdims=True) + eps)


def centre_group_scale_batch(reward_PG, eps: float = 1e-6):
    """Subtract the mean reward of the group and divide by the standard deviation of
    these differences over the batch (Khatri et al. 2025, arXiv 2510.13786, sec. 4,
    ScaleRL; Hu et al. 2025, arXiv 2501.03262, appendix A, REINFORCE++ with a baseline).

    TRL's `scale_rewards="batch"` divides by that of the rewards themselves.
    """
    centred_PG = centre_group(reward_PG)
    return centred_PG / (centred_PG.std() + eps)


def normalise_each(weights: Sequence[float]):
    """Normalise each of N rewards in its group, add them up with `weights`, and divide
    by the standard deviation of these sums over the batch (Liu et al. 2026, arXiv
    2601.05242, GDPO). Sums first and normalised then, as `zscore_group` of a weighted
    reward does, different combinations of rewards get the same advantage.

    The advantage takes [P, G, N]. The sums have mean 0 in each group, so the mean over
    the batch, which the paper subtracts, is 0.
    """

    def advantage(reward_PGN, eps: float = 1e-6):
        sum_PG = sum(weight * zscore_group(reward_PGN[..., n]) for n, weight in enumerate(weights))
        return sum_PG / (sum_PG.std() + eps)

    return advantage


def divide_by_mean(reward_PG):
    """Subtract the mean reward of the group and divide by it (Tajwar et al. 2026, arXiv
    2602.02710, MaxRL).

    For rewards of 0 and 1 the expected gradient is that of the first G - 1 terms of the
    Maclaurin series of log P(right): rarely solved problems count more. A group without
    reward has advantage 0; rewards must not be negative.
    """
    if reward_PG.min(initial=0.0) < 0:
        raise ValueError(f"advantage divide_by_mean (maxrl) got a reward of {reward_PG.min()}; allowed: 0 or more")
    mean_P1 = reward_PG.mean(axis=1, keepdims=True)
    return centre_group(reward_PG) / np.where(mean_P1 < EQUAL_REWARDS, 1.0, mean_P1)


def best_of(k: int):
    """Reward what an attempt adds to the best of `k` attempts: an unbiased gradient of
    the expected best reward of k, pass@k for rewards of 0 and 1 (Walder and Karkhanis
    2025, arXiv 2505.15201, eq. 33, PKPO with its baseline `loo minus one`).

    The advantage is the mean, over the sets of k that contain the attempt, of the best
    reward of the set less the best of its other k - 1, times k / G.

    Raises:
      ValueError: k is below 2, or above the number of attempts.
    """
    if k < 2:
        raise ValueError(f"k got {k}; allowed: 2 to the number of attempts at a problem")

    def advantage(reward_PG):
        G = reward_PG.shape[1]
        if k > G:
            raise ValueError(f"k got {k} with {G} attempts at a problem; allowed: 2 to {G}")
        order_PG = np.argsort(reward_PG, axis=1, kind="stable")
        sorted_PG = np.take_along_axis(reward_PG, order_PG, axis=1)
        # The attempt of rank i exceeds the best of its k - 1 companions, of rank j < i,
        # in C(j, k - 2) of the sets: they have j as their highest rank.
        sets = np.array([comb(j, k - 2) for j in range(G)], np.float64)
        excess_PGG = sorted_PG[:, :, None] - sorted_PG[:, None, :]
        lower_GG = np.tri(G, k=-1)
        gained_PG = (excess_PGG * sets * lower_GG).sum(axis=2) / comb(G, k)
        advantage_PG = np.empty_like(reward_PG)
        np.put_along_axis(advantage_PG, order_PG, gained_PG, axis=1)
        return advantage_PG

    return advantage


def scale_negative(advantage, scale: float):
    """Multiply negative advantages by `scale`: below 1, wrong attempts count less."""
    if scale < 0:
        raise ValueError(f"negative_scale got {scale}; allowed: 0 or more")

    def scaled(reward_PG):
        advantage_PG = advantage(reward_PG)
        return np.where(advantage_PG < 0, scale * advantage_PG, advantage_PG)

    return scaled


ADVANTAGES = {
    "ones": ones,
    "centre_batch": centre_batch,
    "zscore_batch": zscore_batch,
    "centre_group": centre_group,
    "leave_one_out": leave_one_out,
    "zscore_group": zscore_group,
    "centre_group_scale_batch": centre_group_scale_batch,
    "divide_by_mean": divide_by_mean,
    "keep_positive": keep_positive,
    "rewards": rewards,
}
GROUP_BASELINES = (centre_group, leave_one_out, zscore_group, centre_group_scale_batch, divide_by_mean)
NEVER_NEGATIVE = (ones, keep_positive)
