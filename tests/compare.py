"""Compare trees of arrays, and the logits of two models."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.model import transformer


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 1e-4, "atol": 1e-6, **tolerance}), a, b)


def logits(config, params, tokens):
    model = transformer(config)

    @jax.jit
    def run(params, tokens_BT):
        position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return model.unembed(params, model.apply(params, tokens_BT, position_BT)[0])

    return np.asarray(run(params, jnp.asarray(tokens)))


def leaves(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def assert_equal(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)
