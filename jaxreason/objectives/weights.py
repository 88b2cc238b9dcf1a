"""Aggregation: the weight of one token of each rollout. Pure numpy functions,
(length_PG, advantage_PG, limit) -> weight_PG, over the whole batch: a micro-batch or a
device has no denominator of its own. `limit` is the longest allowed completion.

Lengths count sampled tokens. Demonstrations and windows are groups of one.
"""

from __future__ import annotations

import numpy as np


def token_sum(length_PG, advantage_PG, limit):
    """Sum over the tokens of each rollout, mean over rollouts.

    With the score function this is an unbiased gradient of the expected reward, as in
    Williams 1992 and Ahmadian et al. 2024 (arXiv 2402.14740): the log-prob of a rollout
    is the sum of the log-probs of its tokens.
    """
    return np.full(length_PG.shape, 1.0 / length_PG.size)


def per_sequence(length_PG, advantage_PG, limit):
    """Mean over the tokens of each rollout, then over rollouts (arXiv 2402.03300, eq.
    3).

    Biased as a gradient of the expected reward: dividing by the length makes long wrong
    rollouts cost less, and long right ones earn less (arXiv 2503.20783, sec. 3.1).
    """
    return 1.0 / (length_PG.size * np.maximum(length_PG, 1))


def per_token(length_PG, advantage_PG, limit):
    """Mean over all tokens of the batch: every token weighs the same, and a group of
    long rollouts more than one of short rollouts, as in TRL and verl.
    """
    return np.full(length_PG.shape, 1.0 / max(length_PG.sum(), 1))


def per_prompt(length_PG, advantage_PG, limit):
    """Mean over the tokens of each group, then over groups (Yu et al. 2025, arXiv
    2503.14476, eq. 8 and 12; Khatri et al. 2025, arXiv 2510.13786, sec. 3.2, "prompt
    average").
    """
    tokens_P1 = np.maximum(length_PG.sum(axis=1, keepdims=True), 1)
    return np.broadcast_to(1.0 / (len(length_PG) * tokens_P1), length_PG.shape)


def per_mixed_prompt(length_PG, advantage_PG, limit):
    """Mean over the tokens of each group, then over the groups with a nonzero
    advantage; the tokens of others weigh 0 (Khatri et al. 2025, arXiv 2510.13786, sec.
    3.2, "zero-variance filtering"; unlike dynamic sampling, nothing is sampled in their
    place).
    """
    mixed_P1 = np.any((advantage_PG != 0) & (length_PG > 0), axis=1, keepdims=True)
    return mixed_P1 * per_prompt(length_PG, advantage_PG, limit) * (len(length_PG) / max(mixed_P1.sum(), 1))


def per_kept_token(length_PG, advantage_PG, limit):
    """Mean over the tokens of rollouts with a nonzero advantage; others weigh 0."""
    kept_PG = advantage_PG != 0
    return kept_PG / max((length_PG * kept_PG).sum(), 1)


def per_max_length(length_PG, advantage_PG, limit):
    """Sum over tokens, divided by the longest allowed length: no length bias (Liu et
    al. 2025, arXiv 2503.20783: sec. 3.2 has the sum, its authors' code the divisor).
    """
    return np.full(length_PG.shape, 1.0 / (length_PG.size * limit))


WEIGHTINGS = {
    "token_sum": token_sum,
    "per_sequence": per_sequence,
    "per_token": per_token,
    "per_prompt": per_prompt,
    "per_mixed_prompt": per_mixed_prompt,
    "per_kept_token": per_kept_token,
    "per_max_length": per_max_length,
}
READ_ADVANTAGES = (per_mixed_prompt, per_kept_token)
