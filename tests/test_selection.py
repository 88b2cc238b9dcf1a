"""Selections of tokens over the whole batch, against slow loops in float64; the same
tokens in any layout, on any devices.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ragged import G, P, batch_of, kept, on_grid, problem, total
from runs import load_config
from tiny_batch import random_batch

from jaxreason import learner, objectives, sharding
from jaxreason.build import build
from jaxreason.logp import compile_token_entropy, token_outputs
from jaxreason.objectives import selection
from jaxreason.types import Outputs

LAYOUTS = [{}, {"pack": True}, {"rollouts_per_prompt": 2}, {"pack": True, "rollouts_per_prompt": 2}]


def by_rollout(x_BT, batch) -> list:
    return [np.asarray(x_BT)[batch.rollout_BT == i + 1].tolist() for i in range(P * G)]


def tokens(drawn) -> list[tuple]:
    """List the sampled tokens as (rollout, position, log-prob of the sampler)."""
    return [(i * G + j, t, drawn.q[i][j][t]) for i in range(P) for j in range(G) for t in kept(drawn, i, j)]


def slow_covariance(drawn, batch) -> dict:
    """2505.22617: (A - mean A) * (log q - mean log q), over all tokens of the batch."""
    advantage = [row[0] for row in by_rollout(batch.advantage_BT, batch)]
    found = [(r, t, float(advantage[r]), float(np.float32(q))) for r, t, q in tokens(drawn)]
    mean_a, mean_q = (math.fsum(x[k] for x in found) / len(found) for k in (2, 3))
    return {(r, t): (a - mean_a) * (q - mean_q) for r, t, a, q in found}


def chosen_of(x_BT, batch, drawn) -> set:
    rows = by_rollout(x_BT, batch)
    return {(r, t) for r, t, _ in tokens(drawn) if rows[r][t]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 1.0])
def test_the_tokens_of_highest_entropy_against_a_sorted_list(fraction, layout):
    drawn = problem(0)
    batch = batch_of(drawn, objectives.make("dapo"), **layout)
    rng = np.random.default_rng(7)
    entropy = [[rng.uniform(0, 2, len(q)) for q in row] for row in drawn.q]
    batch = dataclasses.replace(batch, entropy_BT=on_grid(entropy, batch).astype(np.float32))
    values = sorted((float(np.float32(entropy[r // G][r % G][t])) for r, t, _ in tokens(drawn)), reverse=True)
    # As numpy's linear quantile of 1 - fraction: the values at or above it.
    above = [v for v in values if v >= np.quantile(values, 1 - fraction) - 1e-9]
    found_BT = selection.top_entropy(fraction)(batch)["advantage_BT"]
    plain, found = by_rollout(batch.advantage_BT, batch), by_rollout(found_BT, batch)
    for r, t, _ in tokens(drawn):
        inside = float(np.float32(entropy[r // G][r % G][t])) in above
        assert found[r][t] == (plain[r][t] if inside else 0.0)
    assert len(above) >= max(1, math.floor(fraction * (len(values) - 1)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_only_selected_tokens_have_a_gradient_and_the_denominator_stays(seed):
    """2506.01939: the indicator is in the sum, and the sum over all tokens before it."""
    drawn, objective = problem(seed), objectives.make("dapo")
    batch = batch_of(drawn, objective)
    rng = np.random.default_rng(seed)
    entropy = [[rng.uniform(0, 2, len(q)) for q in row] for row in drawn.q]
    batch = dataclasses.replace(batch, entropy_BT=on_grid(entropy, batch).astype(np.float32))
    selected = dataclasses.replace(batch, **selection.top_entropy(0.2)(batch))
    logp_BT = jnp.asarray(on_grid(drawn.p, batch), jnp.float32)
    whole, part = (np.asarray(jax.grad(lambda x, b=b: total(objective, b, x))(logp_BT)) for b in (batch, selected))
    kept_BT = np.asarray(selected.advantage_BT) != 0
    np.testing.assert_array_equal(part, np.where(kept_BT, whole, 0.0))
    np.testing.assert_array_equal(selected.weight_BT, batch.weight_BT)
    assert 0 < np.count_nonzero(part) < np.count_nonzero(whole)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.4])
def test_the_highest_covariances_against_a_sorted_list(fraction, layout):
    drawn = problem(1)
    batch = batch_of(drawn, objectives.make("grpo"), **layout)
    slow = slow_covariance(drawn, batch)
    count = max(1, math.floor(fraction * len(slow)))
    expected = set(sorted(slow, key=slow.get, reverse=True)[:count])
    found = selection.choose_covariance(fraction)(batch)["chosen_BT"]
    assert chosen_of(found, batch, drawn) == expected
    assert int(np.sum(found)) == count


@pytest.mark.parametrize("advantage", [0.0, 0.1, 0.7])
def test_equal_advantages_have_no_covariance(advantage):
    """Such as those of a batch without a right attempt: rounding of the mean, or ties,
    must not restrain every token.
    """
    batch = batch_of(problem(1), objectives.make("grpo"))
    batch = dataclasses.replace(batch, advantage_BT=np.full_like(batch.advantage_BT, advantage))
    assert not selection.choose_covariance(0.02)(batch)["chosen_BT"].any()
    assert not selection.clip_covariance(0.02, 0.0, 1.0)(batch)["chosen_BT"].any()


def mixed(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def slow_hash(r: int, t: int, q: float) -> int:
    """Of a token in a rollout behind a prompt of three tokens."""
    found = 0
    for part in (r + 1, 3 + t, int(np.float32(q).view(np.uint32))):
        found = mixed(found ^ part)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("fraction", "low", "high"), [(0.05, 0.1, 5.0), (0.2, -0.5, 0.5), (0.9, 0.3, 2.0), (0.1, 90.0, 91.0)])
def test_clipped_covariances_against_loops(fraction, low, high, layout):
    drawn = problem(2)
    batch = batch_of(drawn, objectives.make("grpo"), **layout)
    slow = slow_covariance(drawn, batch)
    band = [(slow_hash(r, t, q), (r, t)) for r, t, q in tokens(drawn) if low < slow[r, t] < high]
    expected = {where for _, where in sorted(band, reverse=True)[: max(1, math.floor(fraction * len(slow)))]}
    found = selection.clip_covariance(fraction, low, high)(batch)
    assert chosen_of(found["chosen_BT"], batch, drawn) == expected
    np.testing.assert_array_equal(found["advantage_BT"], np.where(found["chosen_BT"], 0.0, batch.advantage_BT))


def test_the_choice_in_a_band_is_spread_over_it():
    """Of 400 batches with other log-probs each token is chosen about as often."""
    rng, counts = np.random.default_rng(0), np.zeros((8, 12))
    for seed in range(400):
        batch = random_batch(3)
        batch.behaviour_logp_BT[:] += np.where(batch.weight_BT != 0, rng.normal(0, 1e-3, (8, 12)), 0)
        batch.rollout_BT[:] = np.arange(1, 9)[:, None] + seed
        counts += selection.clip_covariance(0.25, -99.0, 99.0)(batch)["chosen_BT"]
    trained = random_batch(3).weight_BT != 0
    share = counts[trained] / 400
    assert abs(share.mean() - 0.25) < 0.03
    assert share.std() < 2 * math.sqrt(0.25 * 0.75 / 400)
    assert not counts[~trained].any()


def test_the_penalty_of_chosen_tokens_by_hand_and_its_gradient():
    drawn = problem(0)
    plain, penalised = objectives.make("grpo"), objectives.make("grpo", covariance="kl", covariance_coefficient=0.7)
    batch = batch_of(drawn, plain)
    batch = dataclasses.replace(batch, **selection.choose_covariance(0.2)(batch))
    logp_BT = jnp.asarray(on_grid(drawn.p, batch), jnp.float32)
    found, expected = (jax.value_and_grad(lambda x, o=o: total(o, batch, x))(logp_BT) for o in (penalised, plain))
    chosen_BT, gap_BT = np.asarray(batch.chosen_BT), np.asarray(logp_BT) - batch.behaviour_logp_BT
    extra = math.fsum((batch.weight_BT * 0.7 * np.abs(gap_BT))[chosen_BT].tolist())
    np.testing.assert_allclose(found[0] - expected[0], extra, rtol=1e-4)
    np.testing.assert_allclose(
        found[1] - expected[1], np.where(chosen_BT, 0.7 * batch.weight_BT * np.sign(gap_BT), 0), rtol=1e-4, atol=1e-7
    )
    _, statistics = penalised.token_loss(Outputs(logp_BT, logp_BT), batch)
    assert "covariance_chosen" in statistics


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("devices", [None, 8])
def test_the_completion_selects_over_the_whole_batch(tiny, microbatches, devices):
    """A threshold of each micro-batch or device would choose other tokens."""
    model, params = tiny(layers=1)
    batch = random_batch(rows=32)
    batch.rollout_BT[:] = np.arange(1, 33)[:, None]
    objective = objectives.make("dapo", entropy_top=0.2, covariance="clip", covariance_low=-9.0, covariance_fraction=0.1)
    mesh = None if devices is None else sharding.make_mesh(data=devices)
    rows = batch if mesh is None else sharding.put_rows(batch, mesh)
    found = learner.compile_completion(model, objective, microbatches=microbatches, mesh=mesh)(rows, params)
    entropy_BT = np.asarray(jax.jit(lambda p, b: token_outputs(model, p, b).entropy_BT)(params, batch), np.float64)
    clipped = selection.clip_covariance(0.1, -9.0, 5.0)(batch)
    trained = batch.weight_BT != 0
    least = np.quantile(entropy_BT[trained], 0.8)
    expected = np.where(trained & (entropy_BT >= least - 1e-6), clipped["advantage_BT"], 0.0)
    np.testing.assert_allclose(found.advantage_BT, expected, rtol=1e-6)
    np.testing.assert_array_equal(found.chosen_BT, clipped["chosen_BT"])
    assert found.entropy_BT is found.control is None
    assert 0 < np.count_nonzero(found.advantage_BT) < 0.3 * trained.sum()


def test_entropies_of_the_policy_cost_a_pass_only_when_asked_for(tiny, monkeypatch):
    model, params = tiny(layers=1)
    made = []
    monkeypatch.setattr(learner, "compile_token_entropy", lambda *args: made.append(args) or compile_token_entropy(*args))
    batch = random_batch()
    assert learner.compile_completion(model, objectives.make("grpo"))(batch, params) is batch
    learner.compile_completion(model, objectives.make("grpo", covariance="kl"))(batch, params)
    assert not made
    asked = {}, {"covariance": "kl"}, {"entropy_top": 0.2}, {"kl_coefficient": 0.1}
    assert [objectives.make("grpo", **fields).passes for fields in asked] == [0, 0, 1, 1]
    learner.compile_completion(model, objectives.make("grpo", entropy_top=0.2))(batch, params)
    assert len(made) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"entropy_top": 0.0}, "entropy_top got 0.0; allowed: above 0, at most 1"),
        ({"entropy_top": 1.5}, "entropy_top got 1.5; allowed: above 0, at most 1"),
        ({"covariance": "clamp"}, "unknown covariance 'clamp'.*one of: clip, kl, none"),
        (
            {"covariance": "clip", "covariance_low": 6.0},
            "covariance_low=6.0, covariance_high=5.0; allowed: .*a lower bound below",
        ),
        ({"covariance": "kl", "covariance_fraction": 0.0}, "covariance_fraction=0.0, .*allowed: a fraction above 0"),
        ({"covariance": "kl", "covariance_coefficient": 0.0}, "covariance_coefficient got 0.0; allowed: above 0"),
    ],
)
def test_wrong_selections_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        objectives.make("grpo", **fields)


def test_texts_that_nobody_sampled_have_no_covariance():
    for fields in ({"covariance": "clip"}, {"covariance": "kl"}):
        config = load_config("tiny", "smoke")
        config.prior.objective = {"name": "sft", **fields}
        with pytest.raises(ValueError, match=r"^config\.prior\.objective compares .* source 'corpus' samples nothing"):
            build(config, say=[].append)
