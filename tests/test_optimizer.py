"""Schedules at their ends, which parameters decay, and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreason import optimizer, sharding
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
    with pytest.raises(ValueError, match=r"unknown optimizer 'adamax'.*one of: adafactor, adam, adamw, lion, muon, sgd"):
        optimizer.make(10, name="adamax", lr=1.0)
    with pytest.raises(ValueError, match="warmup_steps got 11; allowed: 0 to the 10 steps"):
        optimizer.make(10, lr=1.0, warmup_steps=11)
    with pytest.raises(ValueError, match=r"warmup_share got 1.5; allowed: 0 to 1"):
        optimizer.make(10, lr=1.0, warmup_share=1.5)
    with pytest.raises(ValueError, match=r"warmup_steps=3 and warmup_share=0.1; give one"):
        optimizer.make(10, lr=1.0, warmup_share=0.1, warmup_steps=3)
    with pytest.raises(ValueError, match=r"state_dtype got 'bfloat16' with optimizer 'sgd'; allowed with: adamw"):
        optimizer.make(10, name="sgd", lr=1.0, state_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"unknown state_dtype 'int8'; one of: bfloat16, float32"):
        optimizer.make(10, lr=1.0, state_dtype="int8")
    with pytest.raises(ValueError, match=r"weight_decay got 0.1 with optimizer 'adafactor'; allowed with: adamw, lion, muon"):
        optimizer.make(10, name="adafactor", lr=1.0, weight_decay=0.1)


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


def test_the_warm_up_may_be_a_share():
    params, grads = {"kernel": jnp.zeros(1)}, {"kernel": jnp.ones(1)}

    def first(steps, **fields):
        return updates(optimizer.make(steps, name="sgd", lr=1.0, clip_norm=None, **fields), params, grads)["kernel"]

    assert first(40, warmup_share=0.1) == first(40, warmup_steps=4) == -0.25
    assert first(40) == -1


def test_lion_by_hand():
    """Signs of a mixture, and decay, as in Chen et al. 2023, arXiv 2302.06675, algorithm 2."""
    made = optimizer.make(10, name="lion", lr=0.1, b1=0.9, weight_decay=0.01, clip_norm=None)
    params = {"kernel": jnp.array([1.0, -2.0])}
    state, x, m = made.init(params), np.array([1.0, -2.0]), np.zeros(2)
    for g in ([0.3, -0.1], [-0.01, -5.0]):
        update, state = made.update({"kernel": jnp.array(g)}, state, params)
        params = optax.apply_updates(params, update)
        x -= 0.1 * (np.sign(0.9 * m + 0.1 * np.array(g)) + 0.01 * x)
        m = 0.99 * m + 0.01 * np.array(g)
    np.testing.assert_allclose(params["kernel"], x, rtol=1e-5)


def tiny_params(**fields):
    config = sized("tiny", vocab_size=24, layers=2, width=16, heads=4, kv_heads=2, head_size=8, feed_forward=32, **fields)
    params = transformer(config).init(jax.random.key(0))
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
    return params, grads


def test_muon_makes_each_layer_of_each_matrix_orthogonal():
    params, grads = tiny_params(tied_embeddings=False)
    moved = updates(optimizer.make(10, name="muon", lr=0.1, clip_norm=None), params, grads)
    sides = {"q": (16, 32), "k": (16, 16), "v": (16, 16), "o": (32, 16), "gate": (16, 32), "up": (16, 32), "down": (32, 16)}
    seen = set()
    for path, update in jax.tree_util.tree_leaves_with_path(moved["layers"]):
        if path[-1].key != "kernel":
            continue
        name = path[-2].key
        seen.add(name)
        for layer in update:  # five Newton-Schulz steps leave singular values of 0.7 to 1.2, where they were not tiny
            matrix = np.asarray(layer).reshape(sides[name])
            singular = np.linalg.svd(matrix, compute_uv=False) / (0.1 * 0.2 * max(sides[name]) ** 0.5)
            assert singular.max() < 1.3, (name, singular)
            if len(set(sides[name])) == 2:  # a square matrix has tiny ones; of an oblong raw gradient they spread from 0.2 to 1
                assert singular.min() > 0.6, (name, singular)
    assert seen == set(sides)
    # What is not a matrix of a layer is moved by AdamW, whose first step is a sign, and with Nesterov momentum a longer one.
    first = 0.1 * (0.9 * 0.1 / (1 - 0.9**2) + 0.1 / (1 - 0.9))
    for one in (moved["embed"]["embedding"], moved["unembed"]["kernel"], moved["layers"]["mlp_norm"]["scale"]):
        np.testing.assert_allclose(np.abs(one), first, rtol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "muon"])
def test_first_moments_in_bfloat16(name):
    params, grads = tiny_params()

    def state_bytes(**fields):
        state = jax.eval_shape(optimizer.make(10, name=name, lr=0.1, **fields).init, params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim > 1)

    elements = sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1)
    assert state_bytes() - state_bytes(state_dtype="bfloat16") >= 2 * elements
    full, half = (updates(optimizer.make(10, name=name, lr=0.1, **f), params, grads) for f in ({}, {"state_dtype": "bfloat16"}))
    same = [jnp.mean(jnp.abs(a - b) < 0.02) for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(half), strict=True)]
    assert min(same) > 0.9


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_eight_devices_make_the_update_of_one(name):
    params, grads = tiny_params(tied_embeddings=False)
    made = optimizer.make(10, name=name, lr=0.1)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)

    def update(params, grads):
        state = made.init(params)
        for _ in range(2):
            moved, state = made.update(grads, state, params)
            params = optax.apply_updates(params, moved)
        return params, state

    placed = sharding.shardings(jax.eval_shape(update, params, grads), mesh)
    split = jax.device_put((params, grads), sharding.shardings((params, grads), mesh))
    one, eight = jax.jit(update)(params, grads)[0], jax.jit(update, out_shardings=placed)(*split)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, eight)
