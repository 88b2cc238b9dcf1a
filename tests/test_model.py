"""The transformer: initialisation, gradients, and that its ways to compute agree: scan,
decode layout, cache, dtypes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.model import ModelConfig, transformer

VARIANTS = {
    "plain": {},
    "qkv_bias": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True},
    "tied": {"tied_embeddings": True},
    "value_head": {"value_head": True},
    "scan": {"scan_layers": True},
}
B, T = 3, 9
TOKENS_BT = np.random.default_rng(0).integers(0, 24, (B, T))
POSITION_BT = np.broadcast_to(np.arange(T), (B, T))


@functools.cache
def jitted(model):
    """Compile `apply`."""
    return jax.jit(model.apply)


def forward(model, params, tokens_BT=TOKENS_BT, position_BT=POSITION_BT, segment_BT=None):
    """Return log-probs over the vocabulary, teacher-forced."""
    hidden_BTD, _ = jitted(model)(params, tokens_BT, position_BT, segment_BT)
    return jax.nn.log_softmax(model.unembed(params, hidden_BTD))


def lively(params):
    """Make params whose biases and norms differ from 0 and 1, so that omitting one
    changes results.
    """
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), params)


# --- initialisation and gradients ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(tiny, variant):
    model, params = tiny(**VARIANTS[variant])

    @jax.jit
    def gradient(params):
        def loss(params):
            hidden_BTD, _ = model.apply(params, TOKENS_BT, POSITION_BT)
            logp_BTV = jax.nn.log_softmax(model.unembed(params, hidden_BTD))
            value = 0.0 if model.value is None else jnp.sum(jnp.sin(model.value(params, hidden_BTD)))
            return value - jnp.sum(jnp.take_along_axis(logp_BTV[:, :-1], TOKENS_BT[:, 1:, None], axis=2))

        return jax.grad(loss)(params)

    names = set()
    for path, x in jax.tree_util.tree_leaves_with_path(gradient(params)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        names.add(name)
        assert jnp.isfinite(x).all(), name
        for layer in x if name.startswith("layers/") else [x]:
            assert jnp.linalg.norm(layer) > 1e-4, name
    assert ("unembed/kernel" in names) == (variant != "tied")
    assert ("value/kernel" in names) == (variant == "value_head")
    assert {f"layers/attention/{x}/bias" in names for x in "qkv"} == {variant == "qkv_bias"}
    assert {f"layers/attention/{x}_norm/scale" in names for x in "qk"} == {variant == "qk_norm"}


def test_initial_std_follows_fan_in_and_depth():
    c = ModelConfig(
        vocab_size=96, width=64, layers=8, heads=4, kv_heads=2, head_size=24, feed_forward=160, qkv_bias=True, value_head=True
    )
    params = jax.jit(transformer(c).init)(jax.random.key(3))
    depth = (2 * c.layers) ** -0.5
    into_heads = dict.fromkeys("qkv", c.width**-0.5)
    kernels = {"attention": {**into_heads, "o": depth * (c.heads * c.head_size) ** -0.5}}
    kernels["mlp"] = {"gate": c.width**-0.5, "up": c.width**-0.5, "down": depth * c.feed_forward**-0.5}
    for part, expected in kernels.items():
        for name, std in expected.items():
            kernel = np.asarray(params["layers"][part][name]["kernel"])
            assert kernel.std() == pytest.approx(std, rel=0.03), f"{part}/{name}"
            assert abs(kernel.mean()) < 0.05 * std
            assert not np.allclose(kernel[0], kernel[1]), "layers start alike"
    assert params["embed"]["embedding"].std() == pytest.approx(c.width**-0.5, rel=0.05)
    assert params["unembed"]["kernel"].std() == pytest.approx(c.width**-0.5, rel=0.05)
    assert not np.allclose(params["unembed"]["kernel"].T, params["embed"]["embedding"])
    for name in "qkv":
        assert not params["layers"]["attention"][name]["bias"].any()
    assert (params["layers"]["mlp_norm"]["scale"] == 1).all()
    assert params["value"]["kernel"].shape == (c.width,)


def test_value_is_a_linear_map_of_what_is_unembedded(tiny):
    model, params = tiny(value_head=True)
    hidden_BTD, _ = jitted(model)(params, TOKENS_BT, POSITION_BT)
    np.testing.assert_allclose(model.value(params, hidden_BTD), hidden_BTD @ params["value"]["kernel"], rtol=1e-6)
    assert tiny()[0].value is None


# --- visibility ---


def test_a_token_sees_what_came_before_it(tiny):
    model, params = tiny()
    other = TOKENS_BT.copy()
    other[:, 5] = (other[:, 5] + 1) % 24
    before, after = forward(model, params), forward(model, params, other)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before - after).max(axis=-1)[:, 5:] > 1e-4).all()


def test_a_token_sees_its_own_segment_only(tiny):
    model, params = tiny()
    segment_BT = np.where(np.arange(T) < 4, 1, 2) * np.ones((B, 1), int)
    position_BT = np.where(np.arange(T) < 4, np.arange(T), np.arange(T) - 4) * np.ones((B, 1), int)
    logp = forward(model, params, TOKENS_BT, position_BT, segment_BT)
    alone = forward(model, params, TOKENS_BT[:, 4:], POSITION_BT[:, : T - 4])
    np.testing.assert_allclose(logp[:, 4:], alone, atol=1e-5)


def test_positions_matter_and_only_their_differences(tiny):
    model, params = tiny()
    near = forward(model, params)
    np.testing.assert_allclose(forward(model, params, position_BT=POSITION_BT + 50), near, atol=1e-4)
    assert np.abs(forward(model, params, position_BT=POSITION_BT * 3) - near).max() > 1e-2
    model, _ = tiny(rope_theta=100.0)
    assert np.abs(forward(model, params) - near).max() > 1e-3


def test_cosines_are_computed_once_a_pass(tiny):
    """They are not computed anew in each fusion that reads them, as the CPU program
    shows.
    """
    model, params = tiny()

    def loss(params, *tokens):
        return jnp.sum(model.apply(params, *tokens)[0])

    compiled = jax.jit(jax.grad(loss)).lower(params, TOKENS_BT, POSITION_BT).compile()
    assert compiled.as_text().count(" cosine(") == 1


# --- ways of computing the same ---


@pytest.mark.parametrize("variant", ["plain", "qkv_bias", "qk_norm", "tied"])
def test_scan_is_the_unrolled_loop(tiny, variant):
    fields = VARIANTS[variant]
    model, params = tiny(**fields)
    params = lively(params)
    scanned, _ = tiny(**fields, scan_layers=True)
    np.testing.assert_allclose(forward(scanned, params), forward(model, params), atol=1e-5)


def test_decode_layout_of_large_kernels_is_only_a_layout(tiny):
    """Use kernels that are not transposed, and one whose rows span whole pages and are
    padded.
    """
    wide = {"width": 256, "heads": 16, "kv_heads": 16, "head_size": 16, "feed_forward": 512, "tied_embeddings": False}
    model, params = tiny(layers=1, scan_layers=False, **wide)
    layout = model.decode_layout(params)
    shapes = {jax.tree_util.keystr(path[-3:]): x.shape for path, x in jax.tree_util.tree_leaves_with_path(layout["layers"])}
    assert shapes["['mlp']['gate_up']['kernel']"] == (256, 1024 + 16)
    assert shapes["['mlp']['down']['kernel']"] == (256, 512)  # small enough to be transposed
    np.testing.assert_allclose(forward(model, layout), forward(model, params), atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_decode_layout_is_only_a_layout(tiny, scan_layers):
    model, params = tiny(scan_layers=scan_layers, qkv_bias=True)
    params = lively(params)
    np.testing.assert_allclose(forward(model, model.decode_layout(params)), forward(model, params), atol=1e-5)


def decode(model, params, *, prompts, length, filler=0, stale=None, cache_dtype=None, stacked=False):
    """Prefill right-padded prompts of different lengths, then feed one token per row
    and step; return log-probs and cache.
    """
    cache = model.init_cache(B, length, cache_dtype, stacked)
    if stale is not None:
        cache = jax.tree.map(lambda x: jnp.full_like(x, stale), cache)
    column, prompts = np.arange(T), np.asarray(prompts)[:, None]
    tokens_BT = np.where(column < prompts, TOKENS_BT, filler)
    hidden_BTD, cache = jitted(model)(params, tokens_BT, np.where(column < prompts, column, -1), cache=cache)
    logp_BTV = np.array(jax.nn.log_softmax(model.unembed(params, hidden_BTD)))
    prefilled = cache
    for step in range(T):
        at = prompts + step  # rows that have no token left are idle: position -1
        position_B1 = np.where(at < T, at, -1)
        fed_B1 = np.take_along_axis(TOKENS_BT, np.minimum(at, T - 1), axis=1)
        hidden_B1D, cache = jitted(model)(params, fed_B1, position_B1, cache=cache)
        logp_B1V = jax.nn.log_softmax(model.unembed(params, hidden_B1D))
        assert jnp.isfinite(logp_B1V).all()
        for row in range(B):
            if at[row, 0] < T:
                logp_BTV[row, at[row, 0]] = logp_B1V[row, 0]
    return logp_BTV, prefilled, cache


PROMPTS = (5, 1, 8)


@pytest.mark.parametrize("variant", ["plain", "qkv_bias", "qk_norm", "scan"])
def test_decoding_is_teacher_forcing(tiny, variant):
    model, params = tiny(**VARIANTS[variant])
    params = lively(params)
    expected = forward(model, params)
    for length in (T, T + 7) if variant == "plain" else (T + 7,):
        logp_BTV, _, _ = decode(model, model.decode_layout(params), prompts=PROMPTS, length=length)
        np.testing.assert_allclose(logp_BTV, expected, atol=1e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_padding_leaves_no_trace_in_a_cache(tiny, stacked):
    model, params = tiny(scan_layers=True)
    logp_BTV, prefilled, _ = decode(model, params, prompts=PROMPTS, length=T + 7, stacked=stacked)
    other_BTV, other, _ = decode(model, params, prompts=PROMPTS, length=T + 7, filler=7, stacked=stacked)
    jax.tree.map(np.testing.assert_array_equal, prefilled, other)
    np.testing.assert_array_equal(logp_BTV, other_BTV)
    for path, x in jax.tree_util.tree_leaves_with_path(prefilled):
        x = x if stacked else x[None]
        x = x.swapaxes(-1, -2) if path[-1].key == "k" else x  # columns to the last axis but one
        for row, prompt in enumerate(PROMPTS):
            assert x[:, row, :, :prompt].any(axis=-1).all()
            assert not x[:, row, :, prompt:].any()


def test_idle_rows_and_positions_past_the_end_write_nothing(tiny):
    model, params = tiny()
    _, _, cache = decode(model, params, prompts=PROMPTS, length=T)
    for position in (-1, T, T + 5):
        _, after = jitted(model)(params, TOKENS_BT[:, :1], np.full((B, 1), position), cache=cache)
        assert jax.tree.all(jax.tree.map(np.array_equal, after, cache)), position


def test_the_cache_of_an_earlier_rollout_is_never_read(tiny):
    model, params = tiny()
    fresh, *_ = decode(model, params, prompts=PROMPTS, length=T + 7)
    reused, *_ = decode(model, params, prompts=PROMPTS, length=T + 7, stale=100.0)
    np.testing.assert_array_equal(reused, fresh)


# --- dtypes ---


def test_bfloat16_compute_stays_near_float32(tiny):
    model, params = tiny()
    half, _ = tiny(dtype="bfloat16")
    hidden_BTD, _ = jitted(half)(params, TOKENS_BT, POSITION_BT)
    assert hidden_BTD.dtype == jnp.bfloat16
    assert half.unembed(params, hidden_BTD).dtype == jnp.float32
    error = np.abs(forward(half, params) - forward(model, params))
    # Log-probs in nats, logits of size 1, two layers. Measured: 0.047 at most, 0.008 on
    # average; other seeds to 0.11.
    assert 0 < error.max() < 0.1
    assert error.mean() < 0.015


def test_a_bfloat16_cache_costs_little(tiny):
    model, params = tiny()
    logp_BTV, _, cache = decode(model, params, prompts=PROMPTS, length=T, cache_dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}
    error = np.abs(logp_BTV - forward(model, params))
    # Measured: 0.035 at most, 0.003 on average.
    assert 0 < error.max() < 0.07
    assert error.mean() < 0.006


def test_params_are_kept_in_their_dtype(tiny):
    model, params = tiny(param_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    _, whole = tiny()
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole)
    jax.tree.map(np.testing.assert_array_equal, params, rounded)
    assert forward(model, params).dtype == jnp.float32
