"""Adapters: training starts from the base model, trains only the adapters, merging
changes no number, and a whole run resumes from its folder.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_trees_close
from runs import Killed, killed_after, load_config, params_of, read_lines, run_config
from tiny_batch import B, make, random_batch, whole_logits

from jaxreason import learner, optimizer, sharding
from jaxreason.build import build
from jaxreason.learner import new_state
from jaxreason.model import weights
from jaxreason.model.config import LORA_TARGETS, Lora

ALL = Lora(rank=2, alpha=6.0, targets=tuple(LORA_TARGETS))


@pytest.fixture(scope="module")
def adapted(tiny):
    """Make `adapted(**fields of Lora) -> (model, params)`."""

    def make(lora=ALL, **fields):
        model, _ = tiny(lora=lora, **fields)
        return model, jax.jit(model.init)(jax.random.key(0))

    return functools.cache(make)


@functools.cache
def trained(model, *, axes=None, name="adamw", microbatches=2):
    """Return the state after five steps, and the metrics of the last step."""
    made = optimizer.make(10, name=name, lr=0.01)
    state = jax.jit(lambda: new_state(model.init(jax.random.key(0)), made))()
    placed, put = None, lambda batch: batch
    if axes is not None:
        mesh = sharding.make_mesh(**dict(axes))
        placed, put = sharding.shardings(state, mesh), functools.partial(sharding.put_rows, mesh=mesh)
        state = jax.device_put(state, placed)
    step = learner.compile_train_step(model, make("grpo"), made, microbatches=microbatches, state_shardings=placed)
    for seed in range(5):
        state, metrics = step(state, put(random_batch(seed, rows=2 * B)))
    assert step._cache_size() == 1
    if placed is not None:
        assert jax.tree.map(lambda x: x.sharding, state.params) == placed.params
    return state, metrics


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"qkv_bias": True, "scan_layers": True}, {"tied_embeddings": True, "remat": "full"}])
def test_the_start_is_the_base_and_merging_changes_no_number(tiny, adapted, fields):
    model, params = adapted(**fields)
    plain_model, plain = tiny(**fields)
    batch = random_batch()
    jax.tree.map(np.testing.assert_array_equal, params["frozen"], plain)
    base = whole_logits(plain_model)(plain, batch)
    np.testing.assert_allclose(whole_logits(model)(params, batch), base, atol=1e-6)

    moved = params | {"lora": jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params["lora"])}
    logits = whole_logits(model)(moved, batch)
    assert np.abs(logits - base).max() > 0.1
    merged = model.merge(moved)
    assert jax.tree.structure(merged) == jax.tree.structure(plain)
    np.testing.assert_allclose(whole_logits(plain_model)(merged, batch), logits, atol=1e-5, rtol=1e-5)
    assert model.merge(merged) is merged


@pytest.mark.slow
@pytest.mark.parametrize("target", LORA_TARGETS)
def test_an_adapter_is_what_the_paper_says(adapted, target):
    """Compare with `W + alpha / r A B`, by einsum over whole kernels."""
    model, params = adapted(lora=Lora(rank=3, alpha=6.0, targets=(target,)))
    (pair,) = params["lora"][LORA_TARGETS[target]].values()
    a, b = np.asarray(pair["a"]["kernel"]), jax.random.normal(jax.random.key(2), pair["b"]["kernel"].shape)
    assert not pair["b"]["kernel"].any()
    kernel = params["frozen"]["layers"][LORA_TARGETS[target]][target]["kernel"]
    pair["b"]["kernel"] = b
    L, fan_in = len(kernel), np.prod(a.shape[1:-1])
    assert 0.5 < a.std() * fan_in**0.5 < 1.5
    expected = np.reshape(kernel, (L, fan_in, -1)) + 2.0 * a.reshape(L, fan_in, 3) @ np.reshape(b, (L, 3, -1))
    merged = model.merge(params)["layers"][LORA_TARGETS[target]][target]["kernel"]
    np.testing.assert_allclose(merged, expected.reshape(kernel.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base_dtype", [None, "bfloat16"])
def test_only_adapters_are_trained(adapted, base_dtype):
    model, params = adapted(lora=Lora(rank=2, targets=("q", "down"), base_dtype=base_dtype), value_head=True)
    state, _ = trained(model)
    jax.tree.map(np.testing.assert_array_equal, state.params["frozen"], params["frozen"])
    assert {x.dtype for x in jax.tree.leaves(state.params["frozen"])} == {jnp.dtype(base_dtype or "float32")}
    assert {x.dtype for x in jax.tree.leaves(state.params["lora"])} == {jnp.dtype("float32")}
    for old, new in zip(jax.tree.leaves(params["lora"]), jax.tree.leaves(state.params["lora"]), strict=True):
        assert np.abs(new - old).max() > 1e-3
    trained_bytes = sum(x.nbytes for name in ("lora", "value") for x in jax.tree.leaves(params[name]))
    moments = sum(x.nbytes for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * trained_bytes
    assert params["value"]["kernel"].shape == (16,)


def test_the_base_is_an_argument_and_no_constant(adapted):
    model, params = adapted()
    made = optimizer.make(10, lr=0.01)
    state = new_state(params, made)
    step = functools.partial(learner.train_step, model=model, objective=make("grpo"), optimizer=made)
    constants = jax.make_jaxpr(step)(state, random_batch()).consts
    assert sum(np.size(x) for x in constants) < params["frozen"]["embed"]["embedding"].size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_eight_devices_train_adapters_as_one_does(adapted, name):
    model, _ = adapted()
    axes = (("data", 2), ("fsdp", 4))
    (one, _), (many, metrics) = trained(model, name=name), trained(model, axes=axes, name=name, microbatches=1)
    assert_trees_close(jax.device_get(many.params), jax.device_get(one.params), atol=1e-3 if name == "muon" else 2e-5, rtol=1e-3)
    assert float(metrics["skipped"][0]) == 0
    kernel = many.params["frozen"]["layers"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 4, 32)}


def test_impossible_adapters_are_refused_before_anything_is_compiled():
    for fields, message in (
        ({"targets": ("q", "qq")}, r"unknown target of lora 'qq' \(did you mean 'q'\?\); one of: down, gate, k, o, q, up, v"),
        ({"targets": ()}, r"lora.targets got \(\); allowed: a tuple of one or more of q, k, v, o, gate, up, down"),
        ({"rank": 0}, r"lora.rank got 0; allowed: 1 or more"),
        ({"alpha": 0.0}, r"lora.alpha got 0.0; allowed: above 0"),
        ({"base_dtype": "int8"}, r"unknown lora.base_dtype 'int8'"),
        ({"ranks": 4}, r"unknown field of config.model.lora 'ranks'"),
    ):
        config = load_config("tiny", "smoke")
        config.model.lora = fields
        with pytest.raises(ValueError, match=message) as error:
            build(config)
        assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.process
def test_a_whole_run_samples_from_its_adapters_and_goes_on_from_its_folder(tmp_path, monkeypatch):
    def config():
        config = load_config("tiny", "smoke", **{"sharding.mesh.data": 1, "prior.steps": 2, "checkpoint.every_steps": 1})
        config.rl.objective.kl_coefficient = 0.1
        config.model.lora = {"rank": 4, "targets": ("q", "v", "down")}
        config.prior.optimizer.lr = config.rl.optimizer.lr = 0.02
        config.evaluate.suites = {}
        return config

    run_config(config(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed_after(patch, 3)
        with pytest.raises(Killed):
            run_config(config(), tmp_path / "cut")
    run_config(config(), tmp_path / "cut")
    (step, whole), (_, cut) = params_of(tmp_path / "whole"), params_of(tmp_path / "cut")
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, cut, whole)
    on_policy = [line for line in read_lines(tmp_path / "whole" / "metrics.jsonl") if "rollout/logp_gap" in line]
    assert len(on_policy) == 2
    for line in on_policy:  # the sampler has the merged weights, or its log-probs would not be the learner's
        assert line["rollout/logp_gap"] < 1e-5
    assert np.abs(whole["params"]["lora"]["attention"]["q"]["b"]["kernel"]).max() > 0.01


def test_adapters_on_a_checkpoint_and_merged_into_one(tmp_path, adapted):
    model, params = adapted(vocab_size=64)
    weights.save(tmp_path, model.config, params["frozen"])
    config = load_config("tiny", "smoke")
    config.model = {"name": str(tmp_path), "weights": "pretrained", "lora": {"rank": 2, "base_dtype": "bfloat16"}}
    config.evaluate.suites = {}
    run = build(config)
    loaded = run.init()
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["frozen"])
    jax.tree.map(np.testing.assert_array_equal, loaded["frozen"], expected)
    moved = loaded | {"lora": jax.tree.map(lambda x: x + 0.1, loaded["lora"])}
    weights.save(tmp_path / "merged", run.model.config, run.model.merge(moved), dtype="float32")
    _, back = weights.load(tmp_path / "merged")
    assert_trees_close(back, jax.tree.map(lambda x: x.astype(jnp.float32), run.model.merge(moved)))
