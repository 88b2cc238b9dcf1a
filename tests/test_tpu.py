"""Programs for TPUs, compiled here without one: the train step and the sampler on eight
chips of a v5e and of a v6e.

Skipped without libtpu, the compiler: pip install 'jaxreason[tpu]'. A compiled program
has passed all the compiler's checks of shapes, layouts and memory; it has not run.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxreason import batching, logp
from jaxreason.draw import Filter
from jaxreason.learner import compile_train_step
from jaxreason.model import ModelConfig, transformer
from jaxreason.objectives import dapo
from jaxreason.plan import hlo
from jaxreason.plan.arrays import devices_of, layout_of, placed, without_cache
from jaxreason.sampler import Weights, compile_sampler
from jaxreason.sharding import gathered, make_mesh, rows, shardings
from jaxreason.types import TrainState

pytest.importorskip("libtpu", reason="no compiler for TPUs: pip install 'jaxreason[tpu]'")

TOPOLOGIES = ("v5e:2x4", "v6e:2x4")
B, T = 16, 384
CONFIG = ModelConfig(
    vocab_size=512,
    width=256,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=128,
    feed_forward=512,
    qk_norm=True,
    tied_embeddings=True,
    dtype="bfloat16",
    scan_layers=True,
    remat="full",
)


@pytest.fixture(autouse=True)
def no_cache():
    with without_cache():
        yield


@functools.cache
def mesh_of(topology: str):
    return make_mesh(data=2, fsdp=2, tensor=2, devices=devices_of(topology))


def compiled_train_step(topology: str, attention: str, **changes):
    mesh = mesh_of(topology)
    model = transformer(dataclasses.replace(CONFIG, attention=attention, **changes), mesh)
    optimizer = optax.adamw(1e-3)

    def new_state(key):
        params = model.init(key)
        return TrainState(params, optimizer.init(params), jnp.int32(0))

    state = jax.eval_shape(new_state, jax.random.key(0))
    where = shardings(state, mesh)
    step = compile_train_step(model, dapo(), optimizer, microbatches=2, state_shardings=where)
    return step.lower(placed(state, where), placed(batching.empty(B, T), rows(mesh))).compile()


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_train_step_compiles(topology):
    xla, splash = (compiled_train_step(topology, attention) for attention in ("xla", "splash"))
    for name in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{name}" in splash.as_text(), name
        assert f"splash_mha_{name}" not in xla.as_text(), name
    scores = f"{T},{T}]"  # no other array has T twice in its shape
    assert scores in xla.as_text()
    assert scores not in splash.as_text()


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_remat_dots_keeps_attention_and_copies_no_float32_heads(topology):
    text = compiled_train_step(topology, "splash", remat="dots").as_text()
    calls = re.findall(r"%splash_mha_([a-z]+)\S* = .* custom-call\(", text)
    assert sorted(calls) == ["dkv", "dq", "fwd"], calls
    assert not re.findall(rf"= f32\[\d+,{T},\d,{CONFIG.head_size}\]\S* copy\(", text)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_logits_stay_on_the_chip(topology):
    """Log-probs and their gradient move fewer bytes than writing the logits once."""
    mesh, V, T = make_mesh(data=1, fsdp=8, devices=devices_of(topology)), 2**15, 2**13
    model = transformer(dataclasses.replace(CONFIG, vocab_size=V), mesh)
    batch, limits = batching.empty(8, T), logp.logits_limits(mesh)

    def loss(head, hidden_BTD, batch):
        logp_BT, entropy_BT = logp.score_hidden(model, head, hidden_BTD, batch, limits)
        return jnp.sum(batch.weight_BT * (logp_BT + entropy_BT))

    params = jax.eval_shape(model.init, jax.random.key(0))
    head = model.head(placed(params, shardings(params, mesh)))
    hidden_BTD = jax.ShapeDtypeStruct((8, T, CONFIG.width), jnp.bfloat16)
    rest = placed((hidden_BTD, batch), rows(mesh))
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(head, *rest).compile().as_text()
    assert hlo.program_cost(text, devices=8).bytes < 4 * T * V


def test_a_v5p_has_larger_tiles_of_logits():
    limits = [logp.logits_limits(make_mesh(devices=devices_of(topology))) for topology in ("v5e:2x4", "v5p:2x2x1")]
    assert [limit.tile for limit in limits] == [(4096, 4096), (8192, 8192)]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_the_sampler_compiles(topology, cache_dtype):
    P, S, T = 8, 16, 256
    mesh = mesh_of(topology)
    model = transformer(dataclasses.replace(CONFIG, attention="splash"), mesh)
    sampler = compile_sampler(
        model,
        slots=S,
        length=T,
        buckets=(128, T),
        eos_ids=(0,),
        prefill_tokens=64,
        prompt_rows=8,
        prompt_length=128,
        cache_dtype=cache_dtype,
        mesh=mesh,
    )
    everywhere = jax.NamedSharding(mesh, jax.P())

    def numbers(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    params = jax.eval_shape(model.init, jax.random.key(0))
    layout = layout_of(placed(params, gathered(params, mesh)))
    weights = Weights(layout, layout)
    slots = placed(jax.eval_shape(sampler.empty), sampler.empty.lower().compile().output_shardings)
    row, prompt = numbers(S), numbers(S, T)
    programs = {
        "prefill": sampler.prefill.lower(weights, numbers(P, 128), numbers(P)),
        "decode": sampler.decode.lower(weights, slots, numbers(dtype=jnp.float32), Filter(top_k=4, top_p=0.9, min_p=0.1)),
        "force": sampler.append_tokens.lower(weights, slots, row, prompt, row, row),
    }
    for name, lowered in programs.items():
        text = lowered.compile().as_text()
        assert "splash" not in text, name
        assert not re.search(r"\[256,512\]\S* (copy|reshape)\(", text), f"{name} copies gate_up"


def test_a_decode_step_writes_its_key_after_attending_on_a_tpu_alone():
    def has_barriers(mesh, tokens):
        model = transformer(CONFIG, mesh)
        params, cache = (jax.eval_shape(f) for f in (lambda: model.init(jax.random.key(0)), lambda: model.init_cache(4, 8)))
        tokens_BT = jnp.zeros((4, tokens), jnp.int32)
        traced = jax.make_jaxpr(lambda params, cache: model.apply(params, tokens_BT, tokens_BT, cache=cache))(params, cache)
        return "optimization_barrier" in str(traced)

    assert has_barriers(mesh_of("v5e:2x4"), 1)
    assert not has_barriers(mesh_of("v5e:2x4"), 2)
    assert not has_barriers(make_mesh(), 1)
