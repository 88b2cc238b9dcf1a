"""The KL divergence in the reward: rewards of single tokens, against loops in
float64.
"""

from __future__ import annotations

import dataclasses
import itertools
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
from jaxreason.logp import compile_token_logp
from jaxreason.objectives import penalties
from jaxreason.objectives.critic import with_values
from jaxreason.types import Outputs

LAYOUTS = [{}, {"pack": True}, {"rollouts_per_prompt": 2}, {"pack": True, "rollouts_per_prompt": 2}]
BETA = 0.3


def referred(seed: int, objective, **layout):
    """Draw rollouts and their batch, with log-probs of a reference."""
    drawn, rng = problem(seed), np.random.default_rng(seed + 50)
    drawn.reference = [[np.minimum(q + rng.normal(0, 0.7, len(q)), -0.01) for q in row] for row in drawn.q]
    batch = batch_of(drawn, objective, **layout)
    return drawn, dataclasses.replace(batch, reference_logp_BT=on_grid(drawn.reference, batch).astype(np.float32))


def advantages(batch) -> list:
    return [np.asarray(batch.advantage_BT)[batch.rollout_BT == i + 1] for i in range(P * G)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["rloo", "reinforce_pp", "grpo"])
def test_each_advantage_gets_the_penalties_from_its_token_on(name, layout):
    """2501.03262: r - beta * sum of KL(i) for i from t to T, KL = log p / q."""
    objective = objectives.make(name, kl_coefficient=BETA, kl_in="reward")
    drawn, batch = referred(0, objective, **layout)
    (prepare,) = objective.prepare
    with jax.enable_x64(True):
        found = dataclasses.replace(batch, **prepare(jax.tree.map(jnp.asarray, batch)))
    plain, rows = advantages(batch), advantages(found)
    for i, j in itertools.product(range(P), range(G)):
        for t in kept(drawn, i, j):
            later = [
                float(np.float32(drawn.q[i][j][s])) - float(np.float32(drawn.reference[i][j][s]))
                for s in kept(drawn, i, j)
                if s >= t
            ]
            np.testing.assert_allclose(rows[i * G + j][t], plain[i * G + j][t] - BETA * math.fsum(later), rtol=1e-5, atol=1e-6)
    outside = batch.rollout_BT == 0
    np.testing.assert_array_equal(found.advantage_BT[outside], batch.advantage_BT[outside])


def test_the_loss_and_its_gradient_against_the_equation():
    """RLOO with KL rewards, by finite differences; the penalty has no gradient."""
    objective = objectives.make("rloo", kl_coefficient=BETA, kl_in="reward", correct="none")
    drawn, batch = referred(1, objective)
    batch = dataclasses.replace(batch, **objective.prepare[0](batch))

    def reference(p):
        found = 0.0
        for i, j in itertools.product(range(P), range(G)):
            baseline = (drawn.reward[i].sum() - drawn.reward[i][j]) / (G - 1)
            for t in kept(drawn, i, j):
                kl = sum(drawn.q[i][j][s] - drawn.reference[i][j][s] for s in kept(drawn, i, j) if s >= t)
                found -= (drawn.reward[i][j] - baseline - BETA * kl) * p[i][j][t] / (P * G)
        return found

    logp_BT = jnp.asarray(on_grid(drawn.p, batch), jnp.float32)
    value, gradient_BT = jax.value_and_grad(lambda x: total(objective, batch, x))(logp_BT)
    np.testing.assert_allclose(value, reference(drawn.p), rtol=1e-4)
    for i, j in itertools.product(range(P), range(G)):
        for t in range(len(drawn.p[i][j])):
            moved = [[x.copy() for x in row] for row in drawn.p]
            moved[i][j][t] += 1e-6
            slope = (reference(moved) - reference(drawn.p)) / 1e-6
            where = tuple(np.argwhere(batch.rollout_BT == i * G + j + 1)[t])
            np.testing.assert_allclose(gradient_BT[where], slope, rtol=1e-3, atol=1e-5)
    _, statistics = objective.token_loss(Outputs(logp_BT, logp_BT), batch)
    np.testing.assert_allclose(statistics["kl"], logp_BT - batch.reference_logp_BT, rtol=1e-6)


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_a_critic_each_step_has_its_own_reward(discount, decay, layout):
    """2203.02155, eq. 2 in 1506.02438, eq. 16: delta of a step has its KL penalty."""
    made = objectives.make("ppo", kl_coefficient=BETA, kl_in="reward", discount=discount, decay=decay, normalise=False)
    assert not made.prepare
    drawn, batch = referred(2, made, **layout)
    rng = np.random.default_rng(0)
    values = [[rng.normal(size=len(q)) for q in row] for row in drawn.q]
    with jax.enable_x64(True):
        found = with_values(made.critic, jnp.asarray(on_grid(values, batch)), jax.tree.map(jnp.asarray, batch))
        found = {name: np.asarray(x) for name, x in found.items()}
    for i, j in itertools.product(range(P), range(G)):
        steps = kept(drawn, i, j)
        value = [values[i][j][t] for t in steps] + [0.0]
        penalty = [-BETA * (float(np.float32(drawn.q[i][j][t])) - float(np.float32(drawn.reference[i][j][t]))) for t in steps]
        reward = [x + (drawn.reward[i][j] if k == len(steps) - 1 else 0.0) for k, x in enumerate(penalty)]
        delta = [reward[k] + discount * value[k + 1] - value[k] for k in range(len(steps))]
        where = np.argwhere(batch.rollout_BT == i * G + j + 1)
        for k, t in enumerate(steps):
            expected = sum((discount * decay) ** (m - k) * delta[m] for m in range(k, len(steps)))
            np.testing.assert_allclose(found["advantage_BT"][tuple(where[t])], expected, atol=1e-6)
            np.testing.assert_allclose(found["return_BT"][tuple(where[t])], expected + value[k], atol=1e-6)


@pytest.mark.parametrize(("microbatches", "devices"), [(1, None), (4, None), (1, 8), (4, 8)])
def test_the_completion_pays_the_reference_of_the_phase(tiny, microbatches, devices):
    model, params = tiny(layers=1)
    reference = jax.tree.map(lambda x: 0.8 * x, params)
    batch = random_batch(rows=32)
    batch.rollout_BT[:] = np.where(batch.weight_BT != 0, np.arange(1, 33)[:, None], 0)
    objective = objectives.make("grpo", kl_coefficient=0.1, kl_target=0.1, kl_in="reward")
    control = {"kl": {"coefficient": jnp.float32(BETA)}}  # the value of this step, not that at the start
    mesh = None if devices is None else sharding.make_mesh(data=devices)
    rows = batch if mesh is None else sharding.put_rows(batch, mesh)
    complete = learner.compile_completion(model, objective, microbatches=microbatches, mesh=mesh)
    found = complete(rows, params, reference, control)
    logp_BT = np.asarray(compile_token_logp(model)(reference, batch))
    kl_BT = np.where(batch.weight_BT != 0, batch.behaviour_logp_BT - logp_BT, 0)
    later_BT = np.cumsum(kl_BT[:, ::-1], axis=1)[:, ::-1]
    expected = batch.advantage_BT - BETA * np.where(batch.weight_BT != 0, later_BT, 0)
    np.testing.assert_allclose(found.advantage_BT, expected, rtol=1e-4, atol=1e-5)
    assert found.control is None


def test_a_coefficient_of_0_changes_no_advantage():
    objective = objectives.make("grpo")
    _, batch = referred(3, objective)
    np.testing.assert_array_equal(penalties.kl_to_go(0.0)(batch)["advantage_BT"], batch.advantage_BT)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("grpo", {"kl_in": "advantage"}, "kl_in got 'advantage'; allowed: loss, reward"),
        ("expert_iteration", {"kl_in": "reward"}, "kl_in got 'reward', but the objective imitates and so has no reward"),
    ],
)
def test_wrong_places_are_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        objectives.make(name, kl_coefficient=0.1, **fields)


def test_a_reward_needs_rollouts():
    config = load_config("tiny", "smoke")
    config.prior.objective = {"name": "reinforce", "kl_coefficient": 0.1, "kl_in": "reward"}
    with pytest.raises(ValueError, match=r"^config\.prior\.objective compares .*source 'corpus' samples nothing"):
        build(config, say=[].append)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "sft", "kl_coefficient": 0.1},
        {"name": "lm", "stale_limit": 0.1},
        {"name": "reinforce_pp", "correct": "token", "correct_by": "mask"},
    ],
)
def test_ratios_need_tokens_that_were_sampled(fields):
    """k3_weighted would multiply the KL of each token by its probability."""
    config = load_config("tiny", "smoke")
    config.prior.objective = fields
    with pytest.raises(ValueError, match=r"^config\.prior\.objective compares .*source 'corpus' samples nothing"):
        build(config, say=[].append)


def test_the_exact_kl_to_the_start_needs_none():
    config = load_config("tiny", "smoke")
    config.prior.objective = {"name": "sft", "kl_coefficient": 0.1, "kl_estimator": "exact"}
    build(config, say=[].append)


@pytest.mark.parametrize(("name", "advantage"), [("reinforce", None), ("reinforce_pp", None), ("sft", "centre_batch")])
def test_demonstrations_have_no_rewards_to_compare(name, advantage):
    config = load_config("tiny", "smoke")
    config.prior.objective = {"name": name, "advantage": advantage}
    with pytest.raises(ValueError, match=r"learns from differences between rewards, but source 'corpus' has none"):
        build(config, say=[].append)
