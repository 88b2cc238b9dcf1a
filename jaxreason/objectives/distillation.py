"""Distillation: losses that move the policy p to a reference q.

Each is multiplied by the advantage, which is 1 unless the objective's `advantage` is
replaced.
"""

from __future__ import annotations

import jax

from jaxreason.objectives import divergence as divergences
from jaxreason.objectives.divergence import Divergence

OVER = ("vocabulary", "token")


def check(divergence: Divergence, over: str) -> None:
    """Raise ValueError for fields of `distil` that do not fit."""
    divergences.check(divergence)
    if over not in OVER:
        raise ValueError(f"over got {over!r}; allowed: {', '.join(OVER)}")
    if over == "token" and divergence != Divergence():
        kind, beta, top_k = divergence
        raise ValueError(
            f"over='token' got divergence={kind!r}, beta={beta}, top_k={top_k}; allowed: reverse_kl, 0.5 and 0, since only the "
            "sampled token is seen; or over='vocabulary'"
        )


def distilled(outputs, batch):
    """The divergence from the reference over the vocabulary."""
    return batch.advantage_BT * outputs.divergence_BT, {"divergence": outputs.divergence_BT}


def distilled_token(outputs, batch):
    """Estimate of KL(p || q) from the sampled token: -stop(log q - log p) log p.

    On-policy its expected gradient is that of the KL.
    """
    gap_BT = jax.lax.stop_gradient(batch.reference_logp_BT - outputs.logp_BT)
    return -batch.advantage_BT * gap_BT * outputs.logp_BT, {"divergence": -gap_BT}
