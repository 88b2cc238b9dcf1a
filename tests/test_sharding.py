"""Meshes that cannot be made are refused, and the rules place every parameter of every
kind of model, and its optimizer state.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxreason import batching, optimizer, sharding
from jaxreason.learner import compile_train_step, loss, new_state
from jaxreason.model import ModelConfig, transformer
from jaxreason.model.config import SIZES
from jaxreason.objectives import dapo, lm
from jaxreason.plan import hlo
from jaxreason.types import TrainState

VARIANTS = {
    "plain": {},
    "qkv_bias": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True},
    "tied": {"tied_embeddings": True},
    "value_head": {"value_head": True},
    "scan": {"scan_layers": True},
}


def shapes(**fields):
    shape = {"vocab_size": 24, "width": 16, "layers": 2, "heads": 8, "kv_heads": 8, "head_size": 8, "feed_forward": 32}
    return jax.eval_shape(transformer(ModelConfig(**shape | fields)).init, jax.random.key(0))


def named(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


# --- meshes ---


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({}, (8, 1, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1)),
        ({"fsdp": 8}, (1, 8, 1)),
        ({"data": 2, "fsdp": 2}, (2, 2, 1)),
        ({"tensor": 4}, (2, 1, 4)),
    ],
)
def test_mesh_has_the_axes_asked_for(axes, expected):
    mesh = sharding.make_mesh(**axes)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), expected, strict=True))
    assert sharding.row_devices(mesh) == expected[0] * expected[1]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": -1, "fsdp": -1}, r"'data': -1, 'fsdp': -1.*at most one of them -1"),
        ({"data": 16}, r"'data': 16.*16 devices; there are 8"),
        ({"data": 4, "fsdp": 4}, r"16 devices; there are 8"),
        ({"data": -1, "fsdp": 3}, r"'fsdp': 3.*multiple of 3 devices; there are 8"),
        ({"data": 0}, r"'data': 0.*positive"),
        ({"fsdp": -2}, r"'fsdp': -2.*positive"),
    ],
)
def test_impossible_meshes_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**axes)


def test_an_axis_that_does_not_divide_is_named_with_a_fix():
    mesh = sharding.make_mesh(data=1, fsdp=8)
    with pytest.raises(ValueError, match=r"size 20 in axis 1.*does not divide over fsdp=8; choose a divisor, or fsdp=1") as error:
        sharding.shardings(shapes(width=20), mesh)
    assert str(error.value).startswith("embed/embedding")


# --- rules ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_large_parameter_is_replicated(variant):
    mesh, params = sharding.make_mesh(data=2, fsdp=4), shapes(**VARIANTS[variant])
    placed, sizes = named(sharding.shardings(params, mesh)), named(params)
    for name, x in sizes.items():
        split = "fsdp" in placed[name].spec
        small = name.rpartition("/")[2] in ("scale", "bias") or name == "value/kernel"  # a width at most, and a few heads
        assert split != small, f"{name} {x.shape} got {placed[name].spec}: give it a row in sharding.RULES"
        if split:
            assert np.prod(placed[name].shard_shape(x.shape)) == np.prod(x.shape) / 4, name
        if name.startswith("layers/") and split:
            assert placed[name].spec[0] is None, f"{name}: layers are stacked on axis 0, which is not to be split"


def test_tensor_splits_heads_feed_forward_and_vocabulary():
    mesh, params = sharding.make_mesh(data=1, fsdp=2, tensor=4), shapes(qkv_bias=True)
    placed, sizes = named(sharding.shardings(params, mesh)), named(params)
    for name, x in sizes.items():
        whole = "norm" in name
        assert np.prod(placed[name].shard_shape(x.shape)) * (1 if whole else 4 if "bias" in name else 8) == np.prod(x.shape), name
    for name, sampled in named(sharding.gathered(params, mesh)).items():
        assert sampled.spec == P(*(None if axis == "fsdp" else axis for axis in placed[name].spec))


def test_a_vocabulary_that_does_not_divide_stays_whole_and_heads_are_refused():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    placed = named(sharding.shardings(shapes(vocab_size=25), mesh))
    assert placed["embed/embedding"].spec == P(None, "fsdp")
    assert placed["unembed/kernel"].spec == P("fsdp", None)
    with pytest.raises(ValueError, match=r"layers/attention/k/kernel has size 2 in axis 2.*does not divide over tensor=4"):
        sharding.shardings(shapes(kv_heads=2), mesh)


@pytest.mark.parametrize("name", SIZES)
def test_named_sizes_divide_over_eight(name):
    fields = {"vocab_size": 64} if name == "tiny" else {}
    params = jax.eval_shape(transformer(SIZES[name](**fields)).init, jax.random.key(0))
    placed = sharding.shardings(params, sharding.make_mesh(data=1, fsdp=8))
    assert any("fsdp" in leaf.spec for leaf in jax.tree.leaves(placed))


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_optimizer_moments_lie_where_their_parameter_lies(name):
    mesh = sharding.make_mesh(data=1, fsdp=8)
    params = shapes(qkv_bias=True, value_head=True)
    made = optimizer.make(10, name=name, lr=1e-3, schedule_kind="cosine")
    state = jax.eval_shape(lambda p: TrainState(p, made.init(p), jnp.int32(0)), params)
    placed = sharding.shardings(state, mesh)
    (moments,) = (x for x in jax.tree.leaves(placed.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))
    assert moments.mu == placed.params
    assert moments.nu == placed.params
    assert moments.count.spec == P()
    assert placed.step.spec == P()
    assert named(placed.params)["layers/mlp/down/kernel"].spec == P(None, "tensor", "fsdp")


def test_state_comes_to_lie_in_its_shardings(tiny):
    _, params = tiny()
    mesh = sharding.make_mesh(data=2, fsdp=4)
    made = optax.adam(1e-3)
    state = TrainState(params, made.init(params), jnp.int32(0))
    put = jax.device_put(state, sharding.shardings(state, mesh))
    kernel = put.params["layers"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 4, 32)}
    jax.tree.map(np.testing.assert_array_equal, put, state)


def test_rows_are_split_over_both_axes():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    batch = batching.empty(16, 8)
    batch.tokens_BT[:] = np.arange(128).reshape(16, 8)
    put = sharding.put_rows(batch, mesh)
    shards = sorted(put.tokens_BT.addressable_shards, key=lambda s: s.index[0].start)
    assert [s.data.shape for s in shards] == [(2, 8)] * 8
    assert put.reference_logp_BT is None
    np.testing.assert_array_equal(np.concatenate([s.data for s in shards]), batch.tokens_BT)


@pytest.mark.parametrize(
    ("axes", "most"),
    [
        # Two micro-batches gather the params forward and backward, 7/8 each time, and
        # add up gradients once: 2 x (2 + 2) x 7/8.
        ({"fsdp": 8}, 7.5),
        # Beside that tensor parallelism adds up activations, which are large here
        # beside so few params.
        ({"data": 2, "fsdp": 2, "tensor": 2}, 26),
    ],
    ids=str,
)
def test_a_train_step_sends_its_params_and_not_its_activations(axes, most):
    """Without `gather_weights` and `keep_rows` these were 429 and 88 times the params
    (jax 0.10.2, CPU, 2026-11-24).
    """
    shape = {"vocab_size": 96, "width": 64, "layers": 3, "heads": 4, "kv_heads": 2, "head_size": 32, "feed_forward": 128}
    mesh = sharding.make_mesh(**{"data": 1} | axes)
    model = transformer(ModelConfig(**shape, scan_layers=True, remat="full"), mesh)
    descent = optax.sgd(1e-2)
    state = jax.eval_shape(lambda: new_state(model.init(jax.random.key(0)), descent))
    placed = sharding.shardings(state, mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.rows(mesh)), batching.empty(64, 128))
    step = compile_train_step(model, dapo(), descent, microbatches=2, state_shardings=placed)
    found = hlo.program_cost(step.lower(state, rows).compile().as_text(), unknown_trips=2, devices=8)
    params_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    assert 3 < found.sent_bytes / params_bytes < most


@pytest.mark.parametrize("tokens", [3, 6])  # per row: fewer on a device than the table has rows, and as many
@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_embeddings_are_looked_up_apart_if_that_sends_less(axes, tokens):
    mesh, rng = sharding.make_mesh(**{"data": 1} | axes), np.random.default_rng(0)
    each = 2 * sharding.row_devices(mesh)
    embed = {"embedding": jnp.asarray(rng.normal(size=(12, 16)), jnp.float32)}
    tokens_BT, weight = rng.integers(0, 12, (each, tokens)), jnp.asarray(rng.normal(size=(each, tokens, 16)), jnp.bfloat16)

    def looked_up(embed, mesh=None):
        x_BTD = sharding.look_up(embed, tokens_BT, jnp.bfloat16, mesh)
        return jnp.sum((x_BTD * weight).astype(jnp.float32)), x_BTD

    gradient = jax.jit(jax.grad(looked_up, has_aux=True), static_argnums=1)
    (expected, x_BTD), (found, y_BTD) = gradient(embed), gradient(embed, mesh)
    np.testing.assert_array_equal(y_BTD, x_BTD)
    np.testing.assert_allclose(found["embedding"], expected["embedding"], rtol=1e-5, atol=1e-6)
    assert y_BTD.sharding.is_equivalent_to(sharding.rows(mesh), 3)
    assert ("all_to_all" in str(jax.make_jaxpr(lambda e: looked_up(e, mesh))(embed))) == (tokens == 3)


def test_a_head_split_over_tensor_is_never_whole():
    """Neither its parts nor their gradients are gathered over tensor."""
    V, D = 96, 64
    shape = {"vocab_size": V, "width": D, "layers": 1, "heads": 4, "kv_heads": 4, "head_size": 32, "feed_forward": 128}
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    model = transformer(ModelConfig(**shape, scan_layers=True), mesh)
    params = jax.eval_shape(model.init, jax.random.key(0))
    place = functools.partial(jax.tree.map, lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s))
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.rows(mesh)), batching.empty(8, 128))
    gradient = jax.jit(jax.grad(functools.partial(loss, model=model, objective=lm()), has_aux=True))
    text = gradient.lower(place(params, sharding.shardings(params, mesh)), rows).compile().as_text()
    assert re.search(rf"f32\[{D},{V // 4}\]", text)
    assert not re.search(rf"f32\[(\d+,)*{V}(,\d+)*\]\S* (all-gather|all-reduce|reduce-scatter)\(", text)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("scan", [False, True])
def test_weights_gathered_where_they_are_used_leave_the_loss_and_its_gradient_alone(scan, remat):
    shape = {"vocab_size": 24, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8, "feed_forward": 32}
    config = ModelConfig(**shape, scan_layers=scan, remat=remat)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    plain, split = transformer(config), transformer(config, mesh)
    params = jax.jit(plain.init)(jax.random.key(0))
    batch = batching.from_windows(np.random.default_rng(0).integers(0, 24, (8, 12)).astype(np.int32), lm())

    def gradient(model, params, batch):
        return jax.jit(jax.value_and_grad(functools.partial(loss, model=model, objective=lm()), has_aux=True))(params, batch)

    (value, _), grads = gradient(plain, params, batch)
    placed = jax.device_put(params, sharding.shardings(params, mesh))
    (split_value, _), split_grads = gradient(split, placed, sharding.put_rows(batch, mesh))
    np.testing.assert_allclose(split_value, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), split_grads, grads)
