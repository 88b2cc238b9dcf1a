"""The train step: log-probs by hand, and that its loss and gradient do not depend on how a batch is cut, placed or padded."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreason import batching, learner, objectives, sharding
from jaxreason.types import Batch, TrainState

B, T = 8, 12
# Prompt and whole length of each row: right-padded, as `batching` makes them.
SPANS = [(3, 12), (2, 7), (5, 6), (1, 12), (4, 9), (2, 3), (6, 11), (3, 8)]


def random_batch(seed=0, *, temperature=1.0, rows=B):
    """A batch as of rollouts: prompts, completions, padding, per-sequence weights, advantages of both signs."""
    rng = np.random.default_rng(seed)
    batch = batching.empty(rows, T)
    for i in range(rows):
        start, stop = SPANS[i % B]
        batch.tokens_BT[i, :stop] = rng.integers(1, 16, stop)
        batch.segment_BT[i, :stop] = 1
        batch.weight_BT[i, start:stop] = 1 / (rows * (stop - start))
        batch.advantage_BT[i, start:stop] = rng.normal()
        batch.behaviour_logp_BT[i, start:stop] = rng.normal(-2.7, 0.2, stop - start)
    batch.temperature_BT[:] = temperature
    return batch


def fresh(params, optimizer):
    """A state of its own buffers, for a step that donates them."""
    params = jax.tree.map(jnp.copy, params)
    return TrainState(params, optimizer.init(params), jnp.int32(0))


def loss_and_gradient(model, params, batch, objective):
    value_and_grad = jax.value_and_grad(functools.partial(learner.loss, model=model, objective=objective), has_aux=True)
    (value, metrics), gradient = jax.jit(value_and_grad)(params, batch)
    return value, metrics, gradient


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 1e-4, "atol": 1e-6, **tolerance}), a, b)


def reference_logp(model, params, batch):
    """Log-probs and entropies token by token, from the whole softmax, in float64."""
    hidden, _ = model.apply(params, batch.tokens_BT, batch.position_BT, batch.segment_BT)
    logits_BTV = np.asarray(model.unembed(params, hidden), np.float64)
    logp, entropy = np.zeros(batch.tokens_BT.shape), np.zeros(batch.tokens_BT.shape)
    for i, t in np.ndindex(*batch.tokens_BT.shape):
        if t > 0:
            scaled = logits_BTV[i, t - 1] / batch.temperature_BT[i, t]
            all_logp = scaled - np.log(np.exp(scaled).sum())
            logp[i, t] = all_logp[batch.tokens_BT[i, t]]
            entropy[i, t] = -(np.exp(all_logp) * all_logp).sum()
    return logp, entropy


# --- log-probs ---


def test_column_t_is_about_token_t(tiny):
    model, params = tiny()
    batch = random_batch(temperature=np.random.default_rng(1).uniform(0.5, 2.0, (B, T)))
    outputs = learner.token_outputs(model, params, batch)
    logp, entropy = reference_logp(model, params, batch)
    np.testing.assert_allclose(outputs.logp_BT, logp, atol=1e-5)
    np.testing.assert_allclose(outputs.entropy_BT, entropy, atol=1e-5)
    assert not outputs.logp_BT[:, 0].any()
    assert not outputs.entropy_BT[:, 0].any()
    assert outputs.value_BT is None
    np.testing.assert_allclose(learner.compile_token_logp(model)(params, batch), logp, atol=1e-5)


def test_ratio_is_one_on_policy_at_temperature_0_7(tiny):
    model, params = tiny()
    batch = random_batch(temperature=0.7)
    batch.behaviour_logp_BT[:] = reference_logp(model, params, batch)[0]
    _, metrics, _ = loss_and_gradient(model, params, batch, objectives.make("grpo"))
    mean = {name: total / count for name, (total, count) in metrics.items()}
    np.testing.assert_allclose(mean["ratio"], 1, atol=1e-5)
    np.testing.assert_allclose([mean["behaviour_gap"], mean["behaviour_kl"], mean["clip_fraction"]], 0, atol=1e-5)
    # ... and would not be, if the learner took log-probs at another temperature than the sampler.
    warm = dataclasses.replace(batch, temperature_BT=np.ones((B, T), np.float32))
    gap, count = loss_and_gradient(model, params, warm, objectives.make("grpo"))[1]["behaviour_gap"]
    assert gap / count > 0.05


@pytest.mark.parametrize("chunks", [2, 8, B * T])
def test_chunks_of_logits_change_nothing(tiny, monkeypatch, chunks):
    model, params = tiny()
    batch = random_batch()
    objective = objectives.make("grpo", entropy_coefficient=0.1)
    whole = loss_and_gradient(model, params, batch, objective)
    monkeypatch.setattr(learner, "LOGITS_PER_CHUNK", B * T * 16 // chunks)
    text = str(jax.make_jaxpr(functools.partial(learner.token_outputs, model))(params, batch))
    assert f"f32[{B * T // chunks},16]" in text
    assert f"f32[{B * T},16]" not in text
    assert_trees_close(loss_and_gradient(model, params, batch, objective), whole)


@pytest.mark.parametrize("limit", [B * T * 16 - 1, B * T * 16 * 2 // 3, 100])
def test_no_more_logits_exist_than_the_limit_says(tiny, monkeypatch, limit):
    model, params = tiny()
    monkeypatch.setattr(learner, "LOGITS_PER_CHUNK", limit)
    text = str(jax.make_jaxpr(functools.partial(learner.token_outputs, model))(params, random_batch()))
    rows = [n for n in range(1, B * T + 1) if f"f32[{n},16]" in text]
    assert max(n * 16 for n in rows if n != model.config.width) <= limit


# --- the same loss and gradient, however the batch is cut and placed ---


@functools.cache
def one_step(model_and_params, microbatches, mesh_sizes, steps=1, optimizer=None):
    """Loss by step, metrics of the last one and params after `steps` updates."""
    model, params = model_and_params.model, model_and_params.params
    optimizer = optimizer or optax.sgd(1.0)  # then a difference of params is a gradient
    state, put, placed = fresh(params, optimizer), lambda batch: batch, None
    if mesh_sizes is not None:
        mesh = sharding.make_mesh(**dict(mesh_sizes))
        placed = sharding.shardings(state, mesh)
        state, put = jax.device_put(state, placed), functools.partial(sharding.put_rows, mesh=mesh)
    objective = objectives.make("grpo", entropy_coefficient=0.01)
    step = learner.compile_train_step(model, objective, optimizer, microbatches=microbatches, state_shardings=placed)
    losses = []
    for i in range(steps):
        state, metrics = step(state, put(random_batch(i, rows=16)))
        losses.append(metrics["loss"][0])
    assert int(state.step) == steps
    assert step._cache_size() == 1
    return jax.device_get((losses, metrics, state.params))


@pytest.fixture(scope="module")
def plain(tiny):
    model, params = tiny()
    return types.SimpleNamespace(model=model, params=params, __hash__=None) and Pair(model, params)


class Pair:
    """Model and params, hashed by identity."""

    def __init__(self, model, params):
        self.model, self.params = model, params


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_microbatches_change_nothing(plain, microbatches):
    assert_trees_close(one_step(plain, microbatches, None), one_step(plain, 1, None), rtol=1e-4, atol=2e-6)


ADAMW = optax.adamw(1e-2)


@pytest.mark.parametrize(
    ("sizes", "microbatches"),
    [({"data": 8}, 1), ({"data": 1, "fsdp": 8}, 1), ({"data": 2, "fsdp": 4}, 1), ({"data": 2, "fsdp": 4}, 2)],
)
def test_eight_devices_change_nothing(plain, sizes, microbatches):
    one = one_step(plain, 1, None, steps=3, optimizer=ADAMW)
    eight = one_step(plain, microbatches, tuple(sizes.items()), steps=3, optimizer=ADAMW)
    # Adam divides by the root of a square: where a gradient is near zero, its rounding is blown up.
    assert_trees_close(eight, one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_changes_no_gradient(tiny, remat, scan_layers):
    batch, objective = random_batch(), objectives.make("grpo")
    model, params = tiny(remat=remat, scan_layers=scan_layers)
    assert_trees_close(loss_and_gradient(model, params, batch, objective), loss_and_gradient(*tiny(), batch, objective))


def test_what_stands_in_padding_changes_nothing(tiny):
    model, params = tiny()
    objective = objectives.make("grpo", kl_coefficient=0.1, entropy_coefficient=0.1)
    batch = dataclasses.replace(random_batch(), reference_logp_BT=np.full((B, T), -2.5, np.float32))
    rng = np.random.default_rng(1)
    padding_BT = batch.segment_BT == 0

    def soil(x, filler):
        return np.where(padding_BT, filler, x).astype(x.dtype)

    soiled = dataclasses.replace(
        batch,
        tokens_BT=soil(batch.tokens_BT, rng.integers(0, 16, (B, T))),
        position_BT=soil(batch.position_BT, 0),
        advantage_BT=soil(batch.advantage_BT, 7.0),
        behaviour_logp_BT=soil(batch.behaviour_logp_BT, -3.0),
        reference_logp_BT=soil(batch.reference_logp_BT, -9.0),
        temperature_BT=soil(batch.temperature_BT, 0.5),
    )
    assert (soiled.tokens_BT != batch.tokens_BT).any()
    clean = loss_and_gradient(model, params, batch, objective)
    assert_trees_close(loss_and_gradient(model, params, soiled, objective), clean, rtol=1e-6, atol=1e-8)


def test_prompts_are_read_but_not_trained_on(tiny):
    """What the sampler knows of a prompt token never enters the loss; the token itself does, as context."""
    model, params = tiny()
    batch, objective = random_batch(), objectives.make("grpo")
    prompt_BT = (batch.segment_BT == 1) & (batch.weight_BT == 0)
    clean, metrics, _ = loss_and_gradient(model, params, batch, objective)
    other = dataclasses.replace(
        batch,
        advantage_BT=np.where(prompt_BT, 5.0, batch.advantage_BT),
        behaviour_logp_BT=np.where(prompt_BT, -9.0, batch.behaviour_logp_BT),
    )
    np.testing.assert_allclose(loss_and_gradient(model, params, other, objective)[0], clean, rtol=1e-6)
    assert metrics["nll"][1] == sum(stop - start for start, stop in SPANS)
    reworded = dataclasses.replace(batch, tokens_BT=np.where(prompt_BT, 15 - batch.tokens_BT, batch.tokens_BT))
    assert abs(loss_and_gradient(model, params, reworded, objective)[0] - clean) > 1e-4


def test_two_sequences_in_a_row_are_as_in_two_rows(tiny):
    model, params = tiny()
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 16, 5), rng.integers(0, 16, 7)
    apart, packed = batching.empty(2, T), batching.empty(1, T)
    for i, ids in enumerate((first, second)):
        apart.tokens_BT[i, : len(ids)], apart.segment_BT[i, : len(ids)] = ids, 1
    packed.tokens_BT[0] = [*first, *second]
    packed.position_BT[0] = [*range(5), *range(7)]
    packed.segment_BT[0] = [1] * 5 + [2] * 7
    logp = learner.compile_token_logp(model)
    apart, packed = logp(params, apart), logp(params, packed)
    np.testing.assert_allclose(packed[0, 1:5], apart[0, 1:5], atol=1e-6)
    np.testing.assert_allclose(packed[0, 6:], apart[1, 1:7], atol=1e-6)


# --- training ---


@pytest.mark.parametrize("name", ["lm", "sft"])
def test_loss_falls_on_a_fixed_batch(tiny, name):
    model, params = tiny()
    objective = objectives.make(name)
    rng = np.random.default_rng(0)
    if name == "lm":
        batch = batching.from_windows(rng.integers(0, 16, (4, T)), objective)
    else:
        pairs = [(rng.integers(0, 16, n), np.arange(n) >= 3) for n in (6, 9, 12, 5)]
        batch = batching.from_demonstrations(pairs, objective, buckets=(T,))
    optimizer = optax.adam(1e-2)
    step, state = learner.compile_train_step(model, objective, optimizer), fresh(params, optimizer)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"][0]))
    assert abs(losses[0] - np.log(16)) < 1  # a fresh model is close to uniform
    np.testing.assert_allclose(losses[0], metrics["nll"][1] * 0 + losses[0])
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("clipped", ["grpo", "dapo"])
def test_reinforce_and_clipped_have_one_gradient_on_policy(tiny, clipped):
    model, params = tiny()
    batch = random_batch(temperature=0.8)
    batch.behaviour_logp_BT[:] = learner.compile_token_logp(model)(params, batch)
    score = loss_and_gradient(model, params, batch, objectives.make("reinforce"))[2]
    ratio = loss_and_gradient(model, params, batch, objectives.make(clipped))[2]
    assert optax.global_norm(score) > 0.01
    assert_trees_close(ratio, score)


def test_metrics_are_sums_and_counts(tiny):
    model, params = tiny()
    batch, optimizer = random_batch(), optax.sgd(0.5)
    step = learner.compile_train_step(model, objectives.make("grpo"), optimizer)
    state, metrics = step(fresh(params, optimizer), batch)
    trained_BT = batch.weight_BT > 0
    for name, pair in metrics.items():
        assert [x.shape for x in pair] == [(), ()], name
    once = {"loss", "grad_norm", "update_norm", "param_norm"}
    per_token = {"entropy", "nll", "behaviour_gap", "behaviour_kl", "ratio", "clip_fraction"}
    assert metrics.keys() == once | per_token
    assert {float(metrics[name][1]) for name in once} == {1.0}
    assert {float(metrics[name][1]) for name in per_token} == {float(trained_BT.sum())}
    logp, entropy = reference_logp(model, params, batch)
    np.testing.assert_allclose(metrics["nll"][0], -logp[trained_BT].sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"][0], entropy[trained_BT].sum(), rtol=1e-5)
    gap = np.abs(logp - batch.behaviour_logp_BT)[trained_BT].sum()
    np.testing.assert_allclose(metrics["behaviour_gap"][0], gap, rtol=1e-5)
    np.testing.assert_allclose(metrics["update_norm"][0], 0.5 * metrics["grad_norm"][0], rtol=1e-5)
    np.testing.assert_allclose(metrics["param_norm"][0], optax.global_norm(state.params), rtol=1e-5)


@pytest.mark.parametrize(("param_dtype", "microbatches"), [("float32", 1), ("bfloat16", 1), ("bfloat16", 2)])
def test_step_compiles_once_and_donates_its_state(tiny, param_dtype, microbatches):
    model, params = tiny(param_dtype=param_dtype)
    optimizer = optax.adamw(1e-3)
    step = learner.compile_train_step(model, objectives.make("dapo"), optimizer, microbatches=microbatches)
    state = fresh(params, optimizer)
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for seed in range(4):
        before = state
        state, _ = step(state, random_batch(seed))
        assert all(x.is_deleted() for x in jax.tree.leaves(before.params))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == kinds
    assert step._cache_size() == 1
    assert int(state.step) == 4


GOLDEN_LOSS, GOLDEN_GRAD_NORM = 0.0, 0.0


def test_golden_train_step(tiny):
    model, params = tiny()
    objective = objectives.make("grpo", kl_coefficient=0.1, kl_estimator="k3", entropy_coefficient=0.01)
    batch = dataclasses.replace(random_batch(temperature=0.9), reference_logp_BT=np.full((B, T), -2.5, np.float32))
    optimizer = optax.sgd(0.1)
    _, metrics = learner.compile_train_step(model, objective, optimizer)(fresh(params, optimizer), batch)
    np.testing.assert_allclose(
        [metrics["loss"][0], metrics["grad_norm"][0]],
        [GOLDEN_LOSS, GOLDEN_GRAD_NORM],
        rtol=2e-5,
        err_msg="""The numbers of one train step at a fixed seed changed: the same config now trains another way than before.
If you did not mean to change initialisation, model, log-probs, losses or weights, this is a bug: look there, in that order.
A change in the last digit only, with a new jax: rounding; write the new numbers here.
If you meant it: write the new numbers here, and say in the commit that earlier results are not comparable.""",
    )


# --- the reference policy ---


def test_reference_costs_nothing_when_off(tiny):
    model, params = tiny()
    batch = random_batch()
    assert batch.reference_logp_BT is None
    assert len(jax.tree.leaves(batch)) == len(dataclasses.fields(Batch)) - 1

    def program(**fields):
        one = functools.partial(learner.loss, model=model, objective=objectives.make("grpo", **fields))
        return jax.jit(jax.value_and_grad(one, has_aux=True)).lower(params, batch).as_text()

    assert program(kl_coefficient=0.0) == program()


def test_reference_pulls_towards_itself(tiny):
    """With the policy as its own reference the KL and its gradient are zero; towards another, its k1 gradient is not."""
    model, params = tiny()
    batch = random_batch()
    batch.advantage_BT[:] = 0
    own = np.asarray(learner.compile_token_logp(model)(params, batch))
    for estimator in objectives.KL_ESTIMATORS:
        objective = objectives.make("grpo", kl_coefficient=1.0, kl_estimator=estimator)
        same = loss_and_gradient(model, params, dataclasses.replace(batch, reference_logp_BT=own), objective)
        np.testing.assert_allclose([same[0], optax.global_norm(same[2])], 0, atol=1e-5)
        other = loss_and_gradient(model, params, dataclasses.replace(batch, reference_logp_BT=own - 0.3), objective)
        assert optax.global_norm(other[2]) > 0.01
        assert other[1]["kl"][0] > 0
