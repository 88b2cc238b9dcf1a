"""Divergences of the policy p from a reference q over the vocabulary, with their
gradients by the logits of p.

With g = dD/dp and "slope" p * g, the gradient by the logits is slope - p * sum(slope).
A constant in g cancels there and is left out. `logp` computes these in its chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

KINDS = ("reverse_kl", "forward_kl", "jensen_shannon")
SMALLEST = jnp.finfo(jnp.float32).tiny  # a bucket without tokens has the logarithm of this, and no share


class Divergence(NamedTuple):
    """Which divergence of p from q is measured.

    reverse_kl: KL(p || q). forward_kl: KL(q || p). jensen_shannon: beta KL(q || m) +
    (1 - beta) KL(p || m) with m = beta q + (1 - beta) p (Agarwal et al. 2024, arXiv
    2306.13649, the generalised Jensen-Shannon divergence).
    """

    kind: str = "reverse_kl"
    beta: float = 0.5  # weight of q in a jensen_shannon
    top_k: int = 0  # tokens of q that count one by one, the most likely ones; all others are one bucket; 0: all do


def check(divergence: Divergence) -> None:
    """Raise ValueError for a kind that is unknown, or numbers out of range."""
    kind, beta, top_k = divergence
    if kind not in KINDS:
        raise ValueError(f"divergence got {kind!r}; allowed: {', '.join(KINDS)}")
    if not 0 < beta < 1:
        raise ValueError(f"beta got {beta}; allowed: above 0 and below 1 (for 0 and 1 set forward_kl and reverse_kl)")
    if top_k < 0:
        raise ValueError(f"top_k got {top_k}; allowed: 1 or more tokens, or 0 for the whole vocabulary")


def measure(divergence: Divergence, logp_RV, logq_RV):
    """Return the divergence of each row, in nats, and its gradient by the logits of p,
    [R, V].

    With `top_k` the tokens of q's k highest probabilities count one by one (tokens as
    likely as the k-th too), and all others as one token. Merging tokens makes a
    divergence smaller or keeps it; with k = V it is exact.
    """
    share_RV, slope_RV = terms(divergence, logp_RV, logq_RV)
    p_RV = jnp.exp(logp_RV)
    if not 0 < divergence.top_k < logq_RV.shape[-1]:
        value_R = jnp.sum(share_RV, axis=-1)
        return value_R, slope_RV - p_RV * jnp.sum(slope_RV, axis=-1, keepdims=True)
    alone_RV = among_highest(logq_RV, divergence.top_k)
    # Sum the others instead of subtracting from 1, which would leave only rounding
    # errors of a small bucket.
    log_bucket_R1 = [
        jnp.log(jnp.maximum(jnp.sum(jnp.where(alone_RV, 0.0, jnp.exp(x_RV)), axis=-1, keepdims=True), SMALLEST))
        for x_RV in (logp_RV, logq_RV)
    ]
    share_R1, slope_R1 = terms(divergence, *log_bucket_R1)
    value_R = jnp.sum(jnp.where(alone_RV, share_RV, 0.0), axis=-1) + share_R1[:, 0]
    # All tokens of the bucket have the g of the bucket.
    slope_RV = jnp.where(alone_RV, slope_RV, slope_R1 * jnp.exp(logp_RV - log_bucket_R1[0]))
    return value_R, slope_RV - p_RV * jnp.sum(slope_RV, axis=-1, keepdims=True)


def among_highest(x_RV, k: int):
    """Tell which values are among the k highest of their row, or equal to the k-th.

    The k-th is found bit by bit, from counts of the values above a bound, since XLA
    gathers the whole array on each device for `lax.top_k`.
    """
    bits_RV = jax.lax.bitcast_convert_type(x_RV.astype(jnp.float32), jnp.uint32)
    # Unsigned numbers in the order of the values: those of negative ones are reversed.
    order_RV = jnp.where(bits_RV >> 31 == 1, ~bits_RV, bits_RV | jnp.uint32(1 << 31))

    def add_bit(i, bound_R):
        higher_R = bound_R | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        enough_R = jnp.sum(order_RV >= higher_R[:, None], axis=-1) >= k
        return jnp.where(enough_R, higher_R, bound_R)

    bound_R = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros(len(x_RV), jnp.uint32))
    return order_RV >= bound_R[:, None]


def terms(divergence: Divergence, logp, logq):
    """Return the share of each token in the divergence, and its slope."""
    p, q = jnp.exp(logp), jnp.exp(logq)
    if divergence.kind == "reverse_kl":
        share = p * (logp - logq)
        return share, share
    if divergence.kind == "forward_kl":
        return q * (logq - logp), -q
    beta = divergence.beta
    logm = jnp.logaddexp(jnp.log(beta) + logq, jnp.log1p(-beta) + logp)
    slope = (1.0 - beta) * p * (logp - logm)
    return beta * q * (logq - logm) + slope, slope
