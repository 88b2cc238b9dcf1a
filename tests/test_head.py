"""`model.head_dtype`: the final norm and the output projection in float32 under
bfloat16 compute, alike in the learner and in the sampler.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_completer as t
from runs import load_config

from jaxreason import sharding
from jaxreason.build import build
from jaxreason.environment import single_turn
from jaxreason.logp import token_outputs
from jaxreason.model import ModelConfig, transformer
from jaxreason.model.config import Lora
from jaxreason.sampler import compile_sampler

HALF = {"dtype": "bfloat16"}
FULL = {"dtype": "bfloat16", "head_dtype": "float32"}
TOKENS_BT = np.random.default_rng(0).integers(0, 24, (4, 9))
POSITION_BT = np.broadcast_to(np.arange(9), (4, 9))
JUDGE = single_turn(t.verify)


def head(params, tied: bool):
    return params["embed"]["embedding"].T if tied else params["unembed"]["kernel"]


def exact(hidden_BTD, kernel_DV) -> np.ndarray:
    return np.asarray(hidden_BTD, np.float64) @ np.asarray(kernel_DV, np.float64)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fields", [HALF, HALF | {"head_dtype": "bfloat16"}, {"dtype": "float32"}], ids=str)
def test_without_it_operands_are_of_the_computation(tiny, tied, fields):
    """Bit for bit what `Model.unembed` was before the field."""
    model, params = tiny(tied_embeddings=tied, **fields)
    hidden_BTD, _ = jax.jit(model.apply)(params, TOKENS_BT, POSITION_BT)
    assert hidden_BTD.dtype == fields["dtype"]

    def before(params, hidden_BTD):
        return jnp.matmul(hidden_BTD, head(params, tied).astype(hidden_BTD.dtype), preferred_element_type=jnp.float32)

    np.testing.assert_array_equal(jax.jit(model.unembed)(params, hidden_BTD), jax.jit(before)(params, hidden_BTD))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_with_it_the_product_is_that_of_float32_in_both_layouts(tiny, tied, scan):
    model, params = tiny(tied_embeddings=tied, scan_layers=scan, **FULL)
    hidden_BTD, _ = jax.jit(model.apply)(params, TOKENS_BT, POSITION_BT)
    assert hidden_BTD.dtype == jnp.float32
    assert np.any(hidden_BTD != hidden_BTD.astype(jnp.bfloat16))  # the final norm does not round
    expected = exact(hidden_BTD, head(params, tied))
    laid = model.decode_layout(params)
    for one in (params, laid):
        np.testing.assert_allclose(jax.jit(model.unembed)(one, hidden_BTD), expected, rtol=1e-5, atol=1e-5)
    half, _ = tiny(tied_embeddings=tied, scan_layers=scan, **HALF)
    rounded = jax.jit(half.unembed)(params, hidden_BTD.astype(jnp.bfloat16))
    assert np.abs(rounded - expected).max() > 1e-3
    dtypes = {sharding.name_of(path): x.dtype for path, x in jax.tree_util.tree_leaves_with_path(laid) if "norm" not in str(path)}
    of_head = "embed/embedding" if tied else "unembed/kernel"
    assert dtypes.pop(of_head) == jnp.float32
    assert set(dtypes.values()) == {jnp.dtype("bfloat16")}


def test_it_multiplies_at_full_precision_where_float32_is_rounded(tiny):
    """A TPU would multiply float32 in bfloat16."""
    model, params = tiny(**FULL)
    text = jax.jit(model.unembed).lower(params, jnp.zeros((1, 1, 16))).as_text()
    assert "HIGHEST" in text
    model, params = tiny()
    assert "HIGHEST" not in jax.jit(model.unembed).lower(params, jnp.zeros((1, 1, 16))).as_text()


def mean_gap(**fields) -> float:
    """Return the mean |sampler - learner log-prob| over the sampled tokens."""
    model, params = t.make_model(**fields)
    rollouts = t.roll(t.make_completer(model, slots=16), params, t.make_requests(8, 2), JUDGE)
    _, logp_BT = t.rescore(model, params, rollouts)
    gaps = [np.abs(r.logp - logp_BT[i, len(r.prompt) : len(r.prompt) + len(r.tokens)])[r.sampled] for i, r in enumerate(rollouts)]
    return float(np.concatenate(gaps).mean())


@pytest.mark.parametrize("fields", [{}, {"tied_embeddings": True}, {"scan_layers": True}], ids=str)
def test_sampler_and_learner_use_the_same_head(fields):
    """A head in float32 on one side only would be 0.01 nats or more away.

    The gain is small: both sides sum the head's products in float32 without the field
    too, so most of the gap is that of the layers. Mean gap of a model of width 64, 3
    layers and 12 tokens, three seeds, about 6,000 tokens each, CPU, 2026-11-28: 0.0066
    nats without and 0.0064 with it; 0.0126 and 0.0121 with logits four times as large;
    0.0058 and 0.0056 with tied embeddings. Logits rounded to bfloat16, as engines do
    that lack such a head, gave 0.0069, 0.0133 and 0.0063.
    """
    assert mean_gap(**FULL, **fields) < 1.2 * mean_gap(**HALF, **fields) < 0.05


@pytest.mark.parametrize("tied", [False, True])
def test_tensor_parallel_logits_and_gradients_are_those_of_one_device(tied):
    from tiny_batch import random_batch

    shape = {"vocab_size": 24, "width": 16, "layers": 2, "heads": 8, "kv_heads": 4, "head_size": 4, "feed_forward": 32}
    config = ModelConfig(**shape, **FULL, tied_embeddings=tied)
    params, batch, found = jax.jit(transformer(config).init)(jax.random.key(0)), random_batch(), []
    for mesh in (None, sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        model = transformer(config, mesh)
        placed = params if mesh is None else jax.device_put(params, sharding.shardings(params, mesh))
        loss = jax.jit(jax.value_and_grad(lambda params, model=model: token_outputs(model, params, batch).logp_BT.mean()))
        value, grads = loss(placed)
        found.append((value, np.asarray(head(grads, tied))))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=5e-3)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=0.05 * np.abs(found[0][1]).max())  # layers compute in bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_a_tensor_parallel_sampler_has_the_head_of_the_learner(tied):
    model, params = t.make_model(tied_embeddings=tied, scan_layers=True, **FULL)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    completer = t.make_completer(model, slots=16, prompt_rows=8, rows=8, mesh=mesh)
    weights = completer.sampler.prepare(params)
    kernel = weights.decode["embed"]["embedding"] if tied else weights.decode["unembed"]["kernel"]
    assert kernel.dtype == jnp.float32
    assert kernel.sharding.shard_shape(kernel.shape) == ((6, 16) if tied else (16, 6))
    rollouts = t.roll(completer, params, t.make_requests(8, 2), JUDGE)
    assert t.largest_gap(model, params, rollouts) < 0.1


def test_adapters_on_a_bfloat16_base_get_a_float32_head(tiny):
    lora = Lora(rank=2, targets=("q", "down"), base_dtype="bfloat16")
    model, params = tiny(lora=lora, **FULL)
    hidden_BTD, _ = jax.jit(model.apply)(params, TOKENS_BT, POSITION_BT)
    expected = exact(hidden_BTD, head(params["frozen"], False))
    np.testing.assert_allclose(jax.jit(model.unembed)(params, hidden_BTD), expected, rtol=1e-5, atol=1e-5)
    weights = compile_sampler(model, slots=2, length=8, eos_ids=(0,)).prepare(params)
    assert weights.decode["unembed"]["kernel"].dtype == jnp.float32


def test_another_value_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^unknown head_dtype 'float16' \(.*\); one of: None, bfloat16, float32$"):
        ModelConfig(24, 16, 2, 4, 2, 8, 32, head_dtype="float16")
    with pytest.raises(ValueError, match="unknown head_dtype 'float64'"):
        build(load_config("tiny", "smoke", **{"model.head_dtype": "float64"}))
