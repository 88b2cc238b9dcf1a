"""Schedules at their ends, which parameters decay, and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreason import optimizer
from jaxreason.model import transformer
from jaxreason.model.config import sized


@pytest.mark.parametrize(
    ("kind", "final_share", "middle", "last"),
    [("constant", 0.0, 1.0, 1.0), ("linear", 0.0, 0.5, 0.0), ("linear", 0.2, 0.6, 0.2), ("cosine", 0.1, 0.55, 0.1)],
)
def test_schedule_warms_up_and_ends_where_it_says(kind, final_share, middle, last):
    rate = optimizer.schedule(2e-3, 104, kind=kind, warmup_steps=4, final_share=final_share)
    got = [float(rate(step)) / 2e-3 for step in (0, 1, 2, 3, 4, 54, 104, 200)]
    # The first update is a quarter, not nothing; full from the last step of the warm-up on.
    np.testing.assert_allclose(got, [0.25, 0.5, 0.75, 1, 1, middle, last, last], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
def test_short_schedules(warmup_steps):
    rate = optimizer.schedule(1.0, 10, kind="constant", warmup_steps=warmup_steps)
    got = [float(rate(step)) for step in range(10)]
    np.testing.assert_allclose(got, np.minimum(1, np.arange(1, 11) / max(1, warmup_steps)), rtol=1e-6)


def test_unknown_names_and_impossible_numbers_are_refused():
    with pytest.raises(
        ValueError, match=r"unknown schedule 'cosin' \(did you mean 'cosine'\?\); one of: constant, cosine, linear"
    ):
        optimizer.make(10, lr=1.0, schedule_kind="cosin")
    with pytest.raises(ValueError, match=r"unknown optimizer 'adamax'.*one of: adam, adamw, sgd"):
        optimizer.make(10, name="adamax", lr=1.0)
    with pytest.raises(ValueError, match="warmup_steps got 11; allowed: 0 to the 10 steps"):
        optimizer.make(10, lr=1.0, warmup_steps=11)


def updates(made, params, grads):
    return jax.jit(lambda params, grads: made.update(grads, made.init(params), params)[0])(params, grads)


def test_decay_spares_norms_and_biases():
    config = sized("tiny", vocab_size=24, qkv_bias=True, qk_norm=True, value_head=True)
    shapes = jax.eval_shape(transformer(config).init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    made = optimizer.make(10, lr=0.5, weight_decay=0.1)
    moved = updates(made, params, jax.tree.map(jnp.zeros_like, params))
    names = set()
    for path, update in jax.tree_util.tree_leaves_with_path(moved):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        names.add(path[-1].key)
        expected = 0.0 if path[-1].key in ("scale", "bias") else -0.05
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=name)
    assert names == {"kernel", "embedding", "scale", "bias"}


def test_gradients_are_clipped_to_a_norm():
    """Gradients and not updates: the learning rate comes after."""
    params, grads = {"kernel": jnp.zeros(2)}, {"kernel": jnp.array([3.0, 4.0])}

    def update(**fields):
        return updates(optimizer.make(10, name="sgd", lr=0.1, **fields), params, grads)["kernel"]

    np.testing.assert_allclose(update(), [-0.06, -0.08], rtol=1e-6)  # the default is 1
    np.testing.assert_allclose(update(clip_norm=2.0), [-0.12, -0.16], rtol=1e-6)
    np.testing.assert_allclose(update(clip_norm=10.0), [-0.3, -0.4], rtol=1e-6)
    np.testing.assert_allclose(update(clip_norm=None), [-0.3, -0.4], rtol=1e-6)


def test_adam_by_hand():
    """Two steps against the paper's formula (Kingma and Ba 2014, arXiv 1412.6980, algorithm 1), decay as in AdamW."""
    b1, b2, eps, lr, decay = 0.8, 0.9, 1e-3, 0.1, 0.01
    made = optimizer.make(10, lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=decay, clip_norm=None)
    params = {"kernel": jnp.array([1.0])}
    state, x, m, v = made.init(params), 1.0, 0.0, 0.0
    for step, g in enumerate((0.3, -0.2), start=1):
        update, state = made.update({"kernel": jnp.array([g])}, state, params)
        params = optax.apply_updates(params, update)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        x -= lr * (m / (1 - b1**step) / ((v / (1 - b2**step)) ** 0.5 + eps) + decay * x)
    np.testing.assert_allclose(params["kernel"], x, rtol=1e-5)


def test_adam_has_no_decay():
    made = optimizer.make(10, name="adam", lr=1.0, weight_decay=0.1)
    assert updates(made, {"kernel": jnp.ones(2)}, {"kernel": jnp.zeros(2)})["kernel"].tolist() == [0, 0]
