"""Schedules at their ends, which parameters decay, clipping, each optimizer by hand,
and the same results on eight devices.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreason import optimizer, sharding
from jaxreason.model import transformer
from jaxreason.model.config import sized


@pytest.mark.parametrize(
    ("kind", "final_fraction", "middle", "last"),
    [("constant", 0.0, 1.0, 1.0), ("linear", 0.0, 0.5, 0.0), ("linear", 0.2, 0.6, 0.2), ("cosine", 0.1, 0.55, 0.1)],
)
def test_schedule_warms_up_and_ends_where_it_says(kind, final_fraction, middle, last):
    rate = optimizer.schedule(2e-3, 104, kind=kind, warmup_steps=4, final_fraction=final_fraction)
    got = [float(rate(step)) / 2e-3 for step in (0, 1, 2, 3, 4, 54, 104, 200)]
    # The first update is a quarter, not nothing; full from the last step of the warm-up
    # on.
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
    for fields, message in {
        ("warmup_fraction", 1.5): r"warmup_fraction got 1.5; allowed: 0 to 1",
        ("state_dtype", "int8"): r"unknown state_dtype 'int8'; one of: None, bfloat16, float32",
        ("muon_scale", "with"): r"unknown muon_scale 'with' \(did you mean 'width'\?\)",
        ("adam_lr", 0.1): r"adam_lr got 0.1, but adamw does not read it; allowed with: muon; else adam_lr=None",
    }.items():
        with pytest.raises(ValueError, match=message):
            optimizer.make(10, lr=1.0, **dict([fields]))
    with pytest.raises(ValueError, match=r"warmup_steps=2 and warmup_fraction=0.5; allowed: one of them"):
        optimizer.make(10, lr=1.0, warmup_steps=2, warmup_fraction=0.5)


# A value of each field that is not its default.
OTHER = {"b1": 0.8, "b2": 0.9, "eps": 1e-6, "weight_decay": 0.1, "state_dtype": "bfloat16"}
OTHER |= {"adam_lr": 0.2, "muon_momentum": 0.9, "muon_scale": "width"}


@pytest.mark.slow
@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_a_field_changes_the_updates_or_is_refused(name):
    params, grads = wide()

    def two_steps(**fields):
        made = optimizer.make(10, name=name, lr=0.1, clip_norm=None, **fields)
        state, moved = made.init(params), params
        for another in (grads, jax.tree.map(lambda g: 0.01 * jnp.roll(g, 1), grads)):
            update, state = made.update(another, state, moved)
            moved = optax.apply_updates(moved, update)
        return moved, state

    before, refused = two_steps(), []
    for field, value in OTHER.items():
        if name in optimizer.READ_BY[field]:
            pairs = zip(jax.tree.leaves(two_steps(**{field: value})), jax.tree.leaves(before), strict=True)
            assert any(a.dtype != b.dtype or np.any(a != b) for a, b in pairs), field
            continue
        readers = ", ".join(optimizer.READ_BY[field])
        with pytest.raises(ValueError, match=f"{field} got .*, but {name} does not read it; allowed with: {readers}; else"):
            optimizer.make(10, name=name, lr=0.1, **{field: value})
        default = inspect.signature(optimizer.make).parameters[field].default
        optimizer.make(10, name=name, lr=0.1, **{field: default})
        refused.append(field)
    assert bool(refused) == (name != "muon")


def test_a_share_at_the_end_of_a_constant_schedule_is_refused():
    with pytest.raises(ValueError, match=r"final_fraction got 0.1, but a constant schedule does not read it; allowed with: cos"):
        optimizer.make(10, lr=0.1, final_fraction=0.1)
    optimizer.make(10, lr=0.1, final_fraction=0.1, schedule_kind="cosine")


def test_warmup_as_a_share_of_the_phase():
    by_share, by_steps = (
        optimizer.schedule(1.0, 40, kind="cosine", **f) for f in ({"warmup_fraction": 0.1}, {"warmup_steps": 4})
    )
    np.testing.assert_array_equal([by_share(i) for i in range(40)], [by_steps(i) for i in range(40)])


def updates(made, params, grads):
    return jax.jit(lambda params, grads: made.update(grads, made.init(params), params)[0])(params, grads)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor"])
def test_decay_spares_norms_and_biases(name):
    config = sized("tiny", vocab_size=24, qkv_bias=True, qk_norm=True, value_head=True)
    shapes = jax.eval_shape(transformer(config).init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    made = optimizer.make(10, name=name, lr=0.5, weight_decay=0.1)
    moved = updates(made, params, jax.tree.map(jnp.zeros_like, params))
    names = set()
    for path, update in jax.tree_util.tree_leaves_with_path(moved):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        names.add(path[-1].key)
        expected = 0.0 if path[-1].key in ("scale", "bias") else -0.05
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=name)
    assert names == {"kernel", "embedding", "scale", "bias"}


def test_gradients_are_clipped_to_a_norm():
    """Gradients are clipped, not updates, before the learning rate applies."""
    params, grads = {"kernel": jnp.zeros(2)}, {"kernel": jnp.array([3.0, 4.0])}

    def update(**fields):
        return updates(optimizer.make(10, name="sgd", lr=0.1, **fields), params, grads)["kernel"]

    np.testing.assert_allclose(update(), [-0.06, -0.08], rtol=1e-6)  # the default is 1
    np.testing.assert_allclose(update(clip_norm=2.0), [-0.12, -0.16], rtol=1e-6)
    np.testing.assert_allclose(update(clip_norm=10.0), [-0.3, -0.4], rtol=1e-6)
    np.testing.assert_allclose(update(clip_norm=None), [-0.3, -0.4], rtol=1e-6)


def test_adam_by_hand():
    """Compare two steps with the paper's formula (Kingma and Ba 2014, arXiv 1412.6980,
    algorithm 1); decay as in AdamW.
    """
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


# --- muon, lion, adafactor ---


@functools.cache
def wide():
    """Make params and gradients large enough for Adafactor to factor (two axes of 128),
    with every kind of leaf.
    """
    config = sized(
        "tiny", vocab_size=128, width=128, heads=8, kv_heads=8, head_size=16, feed_forward=160, layers=2, qkv_bias=True
    )
    params = jax.jit(transformer(config).init)(jax.random.key(0))
    return params, jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)


def test_muon_makes_each_layer_s_matrix_orthogonal():
    params, grads = wide()
    moved = updates(optimizer.make(10, name="muon", lr=1.0, clip_norm=None), params, grads)["layers"]
    for name, ins in {
        ("attention", "q"): 1,
        ("attention", "v"): 1,
        ("attention", "o"): 2,
        ("mlp", "gate"): 1,
        ("mlp", "down"): 1,
    }.items():
        update = np.asarray(moved[name[0]][name[1]]["kernel"])
        for layer in update:
            matrix = layer.reshape(np.prod(layer.shape[:ins]), -1)
            singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
            # Newton-Schulz ends at 0.7 to 1.2, whatever the gradient has (0 to 23
            # here), the very smallest aside.
            assert np.quantile(singular, 0.1) > 0.6, name
            assert singular.max() < 1.3, name


def test_muon_leaves_the_rest_to_adamw():
    params, grads = wide()
    fields = {"lr": 0.1, "b1": 0.8, "weight_decay": 0.1, "clip_norm": None}
    muon = updates(optimizer.make(10, name="muon", **fields), params, grads)
    adamw = updates(optimizer.make(10, **fields), params, grads)
    own = updates(optimizer.make(10, name="muon", **fields, adam_lr=0.2), params, grads)
    for path, x in jax.tree_util.tree_leaves_with_path(muon):
        other, doubled = adamw, own
        for key in path:
            other, doubled = other[key.key], doubled[key.key]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("layers/") and name.endswith("kernel"):
            assert np.abs(x - other).max() > 0.01, name
            np.testing.assert_array_equal(doubled, x, err_msg=name)
        else:
            np.testing.assert_allclose(x, other, rtol=1e-5, err_msg=name)
            np.testing.assert_allclose(doubled, 2 * x, rtol=1e-5, err_msg=name)


def test_muon_scales():
    """For the same gradient, the update by width is the update by root mean square
    times sqrt(max(1, out / in)) / 0.2 sqrt(max(in, out)).
    """
    params, grads = wide()
    rms, width = (
        updates(optimizer.make(10, name="muon", lr=1.0, muon_scale=scale), params, grads)["layers"]["mlp"]
        for scale in ("rms", "width")
    )
    longest = 0.2 * 160**0.5
    np.testing.assert_allclose(width["up"]["kernel"], rms["up"]["kernel"] * (160 / 128) ** 0.5 / longest, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(width["down"]["kernel"], rms["down"]["kernel"] / longest, rtol=1e-4, atol=1e-7)


def test_lion_by_hand():
    b1, b2, lr, decay = 0.8, 0.9, 0.1, 0.01
    made = optimizer.make(10, name="lion", lr=lr, b1=b1, b2=b2, weight_decay=decay, clip_norm=None)
    params = {"kernel": jnp.array([1.0])}
    state, x, m = made.init(params), 1.0, 0.0
    for g in (0.3, -0.1, -2.0):
        update, state = made.update({"kernel": jnp.array([g])}, state, params)
        params = optax.apply_updates(params, update)
        x -= lr * (np.sign(b1 * m + (1 - b1) * g) + decay * x)
        m = b2 * m + (1 - b2) * g
    np.testing.assert_allclose(params["kernel"], x, rtol=1e-5)


def test_adafactor_factors_large_matrices_and_its_decay_is_times_the_rate():
    params, grads = wide()
    made = optimizer.make(10, name="adafactor", lr=0.1, weight_decay=0.1)
    (state,) = (s for s in jax.tree.leaves(made.init(params), is_leaf=lambda x: hasattr(x, "v_row")) if hasattr(s, "v_row"))
    up = [getattr(state, name)["layers"]["mlp"]["up"]["kernel"].shape for name in ("v_row", "v_col", "v")]
    assert up == [(2, 128), (2, 160), (1,)]
    plain = updates(optimizer.make(10, name="adafactor", lr=0.1), params, grads)
    difference = jax.tree.map(jnp.subtract, updates(made, params, grads), plain)
    expected = -0.01 * params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_allclose(difference["layers"]["mlp"]["up"]["kernel"], expected, atol=1e-6)
    assert not np.any(difference["final_norm"]["scale"])


@pytest.mark.parametrize("name", ["adamw", "adam", "muon", "lion"])
def test_state_dtype_is_that_of_the_first_moment(name):
    params, _ = wide()
    made = optimizer.make(10, name=name, lr=0.1, state_dtype="bfloat16")
    kinds = {"mu": set(), "nu": set()}
    for path, x in jax.tree_util.tree_leaves_with_path(jax.eval_shape(made.init, params)):
        for moment in kinds.keys() & {getattr(key, "name", None) for key in path}:
            kinds[moment].add(str(x.dtype))
    assert kinds["mu"] == {"bfloat16"}
    assert kinds["nu"] == ({"float32"} if name != "lion" else set())


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 1, "fsdp": 8}, {"data": 1, "fsdp": 4, "tensor": 2}])
@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_eight_devices_make_the_update_of_one(name, axes):
    params, grads = wide()
    decay = {"weight_decay": 0.1} if name in optimizer.READ_BY["weight_decay"] else {}
    made, mesh = optimizer.make(10, name=name, lr=0.1, **decay), sharding.make_mesh(**axes)

    def two_steps(params, grads):
        state = made.init(params)
        for _ in range(2):
            update, state = made.update(grads, state, params)
            params = optax.apply_updates(params, update)
        return {"params": params, "opt_state": state}

    placed = sharding.shardings(jax.eval_shape(two_steps, params, grads), mesh)
    put = [jax.device_put(tree, placed["params"]) for tree in (params, grads)]
    one, many = jax.jit(two_steps)(params, grads), jax.jit(two_steps, out_shardings=placed)(*put)
    for path, x in jax.tree_util.tree_leaves_with_path(many):
        large = x.size >= 128 * 16 * 2 and x.ndim > 1
        assert not (large and x.sharding.is_fully_replicated), jax.tree_util.keystr(path)
    # Newton-Schulz makes much of the last digit of a small singular value.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3 if name == "muon" else 1e-5, rtol=1e-4), one, many)


@pytest.mark.parametrize("name", ["adamw", "adam", "muon"])
def test_second_moments_decay_where_params_are_bfloat16(name):
    """0.999 rounds to 1 in bfloat16, so second moments in bfloat16 would only grow."""
    made = optimizer.make(10, name=name, lr=1e-3, b2=0.999)
    params = {"embed": {"embedding": jnp.ones((2, 2), jnp.bfloat16)}}
    state, found = made.init(params), []
    for gradient in (0.1, 0.0):
        grads = {"embed": {"embedding": jnp.full((2, 2), gradient, jnp.bfloat16)}}
        updates, state = made.update(grads, state, params)
        moments = [x for path, x in jax.tree_util.tree_leaves_with_path(state) if ".nu" in jax.tree_util.keystr(path)]
        found.append(float(moments[0][0, 0]))
    assert found[1] / found[0] == pytest.approx(0.999, abs=1e-5)
    assert optax.apply_updates(params, updates)["embed"]["embedding"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "lr got 0.0; allowed: above 0"),
        ({"lr": float("nan")}, "lr got nan"),
        ({"lr": float("inf")}, "lr got inf"),
        ({"lr": -1e-3}, "lr got -0.001"),
        ({"eps": 0.0}, "eps got 0.0; allowed: above 0"),
        ({"b1": 1.0}, "b1 got 1.0; allowed: 0 to below 1"),
        ({"b2": 2.0}, "b2 got 2.0"),
        ({"b2": -0.1}, "b2 got -0.1"),
        ({"weight_decay": -0.1}, "weight_decay got -0.1; allowed: 0 or more"),
        ({"weight_decay": float("inf")}, "weight_decay got inf"),
        ({"clip_norm": 0.0}, "clip_norm got 0.0; allowed: None, or above 0"),
        ({"final_fraction": 1.5}, "final_fraction got 1.5; allowed: 0 to 1"),
        ({"lr": 1e-50}, "lr got 1e-50, in float32 0; allowed: above 0"),
        ({"lr": 1e39}, r"lr got 1e\+39, in float32 inf"),
        ({"eps": 1e-40}, "eps got 1e-40, in float32 0; allowed: above 0"),
        ({"b2": 1 - 1e-12}, "b2 got 0.99.*, in float32 1; allowed: 0 to below 1"),
        ({"name": "muon", "adam_lr": -1.0}, "adam_lr got -1.0"),
        ({"name": "muon", "muon_momentum": 1.0}, "muon_momentum got 1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        optimizer.make(10, **{"lr": 1e-3} | fields)
