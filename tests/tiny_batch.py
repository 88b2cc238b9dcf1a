"""A hand-made batch of rollouts, for the tests of losses and gradients."""

import functools

import jax
import numpy as np

from jaxreason import batching, objectives

B, T = 8, 12
# Prompt and whole length of each row: right-padded, as `batching` makes them.
SPANS = [(3, 12), (2, 7), (5, 6), (1, 12), (4, 9), (2, 3), (6, 11), (3, 8)]


def random_batch(seed=0, *, temperature=1.0, rows=B):
    """Make a batch as of rollouts: prompts, completions, padding, per-sequence weights,
    advantages of both signs.
    """
    rng = np.random.default_rng(seed)
    batch = batching.empty(rows, T)
    for i in range(rows):
        start, stop = SPANS[i % B]
        batch.tokens_BT[i, :stop] = rng.integers(1, 24, stop)
        batch.segment_BT[i, :stop] = 1
        batch.weight_BT[i, start:stop] = 1 / (rows * (stop - start))
        batch.advantage_BT[i, start:stop] = rng.normal()
        batch.behaviour_logp_BT[i, start:stop] = rng.normal(-2.7, 0.2, stop - start)
    batch.temperature_BT[:] = temperature
    return batch


# Of one name and one set of numbers there is one objective, and so one compiled
# gradient, for all tests.
make = functools.cache(objectives.make)


@functools.cache
def whole_logits(model):
    def logits(params, batch):
        return model.unembed(params, model.apply(params, batch.tokens_BT, batch.position_BT, batch.segment_BT)[0])

    return jax.jit(logits)
