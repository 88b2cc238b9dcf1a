"""Log-probs, entropies and their gradients with the vocabulary in tiles, as on a TPU:
the numbers of the whole vocabulary at once.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_trees_close
from tiny_batch import B, T, make, random_batch

from jaxreason import learner, platforms, sharding
from jaxreason import logp as logp_
from jaxreason.logp.tiles import tiles_of
from jaxreason.model import transformer

V = 29  # a prime: the last tile overlaps the one before it
TILES = [(7, 8), (2 * T, 5), (1, 3), (B * T, 12), (5, V), (5, 100)]


@pytest.mark.parametrize("vocabulary", [1, 5, 29, 128, 300, 32_000, 151_936])
@pytest.mark.parametrize("most", [4, 128, 384, 4096])
def test_each_symbol_belongs_to_one_tile(vocabulary, most):
    tiles = tiles_of(vocabulary, most)
    found = [jax.tree.map(np.asarray, tiles.symbols(t)) for t in range(tiles.count)]
    assert all(len(symbols) == tiles.size <= most for symbols, _ in found)
    assert np.concatenate([symbols[own] for symbols, own in found]).tolist() == list(range(vocabulary))
    if vocabulary > most:
        assert tiles.size > most / 2
        assert tiles.size % math.gcd(128, most) == 0


def test_sizes_are_chosen_that_compute_few_symbols_twice():
    assert tiles_of(151_936, 4096) == (151_936, 3456, 44)  # 44 x 3456 = 152,064
    assert tiles_of(151_936, 8192) == (151_936, 6912, 22)


def rows_of(model, scale=1.0):
    """Make the arguments of `scored`: a third of the tokens wanted, and none of the
    last row; temperatures; hidden states whose logits are about `scale`.
    """
    rng = np.random.default_rng(0)
    wanted_BT = rng.random((B, T)) < 1 / 3
    wanted_BT[-1] = False
    hidden_BTD = scale * rng.normal(size=(B, T, model.config.width))
    temperature_BT = rng.uniform(0.5, 2, (B, T))
    parts = wanted_BT, hidden_BTD.astype(np.float32), rng.integers(V, size=(B, T)), temperature_BT.astype(np.float32)
    return logp_.Rows(*map(jnp.asarray, parts))


def scored_with(model, tile, *, at_once=7 * V):
    return logp_.Scoring(model.unembed, V, logp_.Limits(at_once, 0), logp_.head_dtype(model), tile and logp_.Tile(*tile))


def results(score, head, rows):
    """Return log-probs and entropies of wanted tokens, and gradients of a sum of both
    with random weights by head and hidden states.
    """
    rng = np.random.default_rng(1)
    weights = [np.where(rows.wanted, rng.normal(size=(B, T)), 0).astype(np.float32) for _ in range(2)]

    def loss(head, hidden):
        found = [jnp.where(rows.wanted, x, 0) for x in score(head, rows._replace(hidden=hidden))]
        return sum(jnp.sum(w * x) for w, x in zip(weights, found, strict=True)), found

    (_, found), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(head, rows.hidden)
    return jax.device_get((found, gradients))


def scored_by(model, tile, head, rows):
    return results(lambda head, rows: logp_.scored(scored_with(model, tile), head, rows, None), head, rows)


def assert_same(found, expected, tolerance):
    """Compare arrays by the largest deviation: of log-probs and entropies relative to
    the largest log-prob, since an entropy is a difference of such numbers; of a
    gradient relative to its largest value.
    """
    most = np.abs(expected[0][0]).max()
    for x, y in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * most)
    for x, y in zip(*map(jax.tree.leaves, (found[1], expected[1])), strict=True):
        assert x.dtype == y.dtype
        x, y = (a.astype(np.float32) for a in (x, y))
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles_change_nothing(tiny, tile, tied):
    model, params = tiny(vocab_size=V, tied_embeddings=tied)
    head, rows = model.head(params), rows_of(model)
    found = scored_by(model, tile, head, rows)
    assert_same(found, scored_by(model, None, head, rows), 1e-6)

    def plain(head, rows):
        logp_BTV = jax.nn.log_softmax(model.unembed(head, rows.hidden) / rows.temperature[..., None])
        logp_BT = jnp.take_along_axis(logp_BTV, rows.target[..., None], axis=-1)[..., 0]
        return logp_BT, -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)

    assert_same(found, results(plain, head, rows), 1e-6)


def test_large_logits_do_not_overflow(tiny):
    model, params = tiny(vocab_size=V)
    head, rows = model.head(params), rows_of(model, 1e4)
    tiled, untiled = (scored_by(model, tile, head, rows) for tile in ((7, 8), None))
    assert np.abs(untiled[0][0]).max() > 1e4
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(tiled))
    np.testing.assert_allclose(tiled[0][0], untiled[0][0], rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("fields", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "head_dtype": "float32"}], ids=str)
def test_products_have_the_dtype_of_the_head(tiny, fields):
    """Sums of rounded products in another order: as close as those in chunks of another
    size.
    """
    model, params = tiny(vocab_size=V, **fields)
    head, rows = model.head(params), rows_of(model)
    rows = rows._replace(hidden=rows.hidden.astype(fields.get("head_dtype", "bfloat16")))
    tiled, untiled = (scored_by(model, tile, head, rows) for tile in ((7, 8), None))
    assert_same(tiled, untiled, 1e-6 if "head_dtype" in fields else 2**-7)


def test_chunks_without_a_wanted_token_are_skipped(tiny):
    model, params = tiny(vocab_size=V)
    computed = []

    def unembed(head, hidden):
        jax.debug.callback(lambda x: computed.append(len(x)), hidden)
        return model.unembed(head, hidden)

    rows, how = rows_of(model), scored_with(model, (1, 8))._replace(unembed=unembed)
    logp, entropy = logp_.scored(how, model.head(params), rows, None)
    jax.effects_barrier()
    assert sum(computed) == rows.wanted.sum() * tiles_of(V, 8).count
    for found in (logp, entropy):
        assert np.isfinite(found).all()
        assert not np.any(np.where(rows.wanted, 0, found))


@pytest.mark.parametrize("tile", [(7, 8), None], ids=str)
def test_rows_that_nobody_wants_have_no_gradient(tiny, tile):
    """Their first chunk is computed all the same; its logits are too large for exp."""
    model, params = tiny(vocab_size=V)
    rows = rows_of(model, 1e4)
    rows = rows._replace(wanted=jnp.zeros_like(rows.wanted))
    for x in jax.tree.leaves(scored_by(model, tile, model.head(params), rows)):
        assert not x.any()


def test_a_logit_that_is_no_number_is_not_hidden(tiny):
    model, params = tiny(vocab_size=V)
    rows = rows_of(model)
    b, t = np.argwhere(rows.wanted)[0]
    rows = rows._replace(hidden=rows.hidden.at[b, t].set(jnp.nan))
    logp, entropy = logp_.scored(scored_with(model, (7, 8)), model.head(params), rows, None)
    assert np.isnan(logp[b, t])
    assert np.isnan(entropy[b, t])


# --- where tiles are used ---


def set_tile(monkeypatch, tile, kept=0):
    row = platforms.PLATFORMS["cpu"]._replace(logits_tile=tile, logits_kept=kept)
    monkeypatch.setitem(platforms.PLATFORMS, "cpu", row)


def gradient_of(config, params, axes=None):
    """Compute loss, metrics and gradient of a batch, on a mesh if there are `axes`."""
    mesh = None if axes is None else sharding.make_mesh(**axes)
    model, batch = transformer(config, mesh), random_batch(temperature=0.7)
    if mesh is not None:
        params = jax.device_put(params, sharding.shardings(params, mesh))
        batch = sharding.put_rows(batch, mesh)
    loss = functools.partial(learner.loss, model=model, objective=make("grpo", entropy_coefficient=0.1))
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
    text = str(jax.make_jaxpr(loss)(params, batch=batch))
    return jax.device_get(compiled(params, batch)), text


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("axes", [None, {"data": 1, "fsdp": 8}, {"data": 4, "fsdp": 2}], ids=str)
def test_a_step_with_tiles_is_that_without(tiny, monkeypatch, axes, tied):
    _, params = tiny(vocab_size=V, layers=1, tied_embeddings=tied)
    config = tiny(vocab_size=V, layers=1, tied_embeddings=tied)[0].config
    expected, whole = gradient_of(config, params)
    set_tile(monkeypatch, (4, 6))
    found, tiled = gradient_of(config, params, axes)
    assert_trees_close(found, expected, rtol=1e-5, atol=5e-7)
    assert re.findall(rf"f32\[\d+,{V}\] = exp", whole)
    assert not re.findall(rf"f32\[\d+,{V}\] = exp", tiled)
    assert re.findall(r"f32\[\d+,6\] = exp", tiled)


@pytest.mark.parametrize("tied", [False, True])
def test_a_small_head_is_gathered_once_for_both_passes(tiny, monkeypatch, tied):
    model, params = tiny(vocab_size=V, layers=1, tied_embeddings=tied)
    expected, _ = gradient_of(model.config, params)
    gathers, axes, of_head = {}, {"data": 1, "fsdp": 2}, re.compile(r":f32\[6,16\] = all_gather|:f32\[16,6\] = all_gather")
    for kept in (1000, 400):  # the head has 464 numbers
        set_tile(monkeypatch, (4, 6), kept)
        found, _ = gradient_of(model.config, params, axes)
        assert_trees_close(found, expected, rtol=1e-5, atol=5e-7)
        mesh = sharding.make_mesh(**axes)
        loss = functools.partial(learner.loss, model=transformer(model.config, mesh), objective=make("grpo"))
        text = str(jax.make_jaxpr(jax.grad(loss, has_aux=True))(params, batch=random_batch()))
        gathers[kept] = len(of_head.findall(text))
    assert gathers == {1000: 2, 400: 4}  # of the first tile, and of the next one


def test_few_logits_a_divided_vocabulary_and_a_reference_have_no_tiles(tiny):
    model, _ = tiny()
    tile = logp_.Tile(4, 6)
    how = logp_.Scoring(model.unembed, 24, logp_.Limits(1000, 24 * B * T, tile), jnp.float32)
    split, not_split = (sharding.make_mesh(data=-1, tensor=n) for n in (2, 1))
    assert logp_.tile_of(how, B * T + 1, None) == logp_.tile_of(how, B * T + 1, not_split) == tile
    assert logp_.tile_of(how, B * T, None) is None
    assert logp_.tile_of(how, B * T + 1, split) is None
    assert logp_.tile_of(how._replace(divergence=object()), B * T + 1, None) is None
    assert platforms.PLATFORMS["tpu"].logits_tile
    assert not platforms.PLATFORMS["cpu"].logits_tile
