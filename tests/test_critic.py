"""The critic: generalised advantages against slow loops and rlax, the loss of values,
and PPO as a phase of a run.
"""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import load_config, maths, run_config

from jaxreason import learner, logp, objectives, optimizer
from jaxreason.build import build
from jaxreason.objectives.critic import Critic, add_value_loss, with_values
from jaxreason.types import Outputs


def rows(seed: int, lengths, forced=0.0) -> SimpleNamespace:
    """Make a batch of packed rollouts with rewards and values; a prompt of two tokens
    comes before each.
    """
    rng = np.random.default_rng(seed)
    width = max(sum(n + 2 for n in row) for row in lengths) + 1
    shape = (len(lengths), width)
    batch = SimpleNamespace(
        weight_BT=np.zeros(shape, np.float32), advantage_BT=np.zeros(shape), rollout_BT=np.zeros(shape, np.int32)
    )
    number, rollouts = 0, []
    for b, row in enumerate(lengths):
        start = 0
        for n in row:
            number, start = number + 1, start + 2
            span = slice(start, start + n)
            reward, sampled = rng.normal(), rng.random(n) >= forced
            sampled[0] = True
            batch.rollout_BT[b, span] = number
            batch.weight_BT[b, span] = sampled * rng.uniform(0.1, 1)
            batch.advantage_BT[b, span] = reward
            rollouts.append((b, [start + t for t in range(n) if sampled[t]], reward))
            start += n
    batch.value_BT, batch.rollouts = rng.normal(size=shape), rollouts
    return batch


LENGTHS = ((3, 1, 4), (5,), (1, 2))


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
@pytest.mark.parametrize("forced", [0.0, 0.4])
def test_advantages_against_the_equation(discount, decay, forced):
    """1506.02438, eq. 16: a double sum over the later steps of a rollout."""
    batch = rows(0, LENGTHS, forced)
    expected_BT, return_BT = np.zeros(batch.value_BT.shape), np.zeros(batch.value_BT.shape)
    for b, steps, reward in batch.rollouts:
        value = [batch.value_BT[b, t] for t in steps] + [0.0]
        delta = [(reward if i == len(steps) - 1 else discount * value[i + 1]) - value[i] for i in range(len(steps))]
        for i, t in enumerate(steps):
            expected_BT[b, t] = sum((discount * decay) ** (j - i) * delta[j] for j in range(i, len(steps)))
            return_BT[b, t] = expected_BT[b, t] + value[i]
    with jax.enable_x64(True):
        found = jax.tree.map(np.asarray, with_values(Critic(discount, decay, False), jnp.asarray(batch.value_BT), batch))
    np.testing.assert_allclose(found["advantage_BT"], expected_BT, atol=1e-12)
    np.testing.assert_allclose(found["return_BT"], return_BT, atol=1e-12)
    with jax.enable_x64(True):
        found = jax.tree.map(np.asarray, with_values(Critic(discount, decay), jnp.asarray(batch.value_BT), batch))
    trained = batch.weight_BT != 0
    np.testing.assert_allclose(found["advantage_BT"][trained].mean(), 0, atol=1e-9)
    np.testing.assert_allclose(found["advantage_BT"][trained].std(), 1, atol=1e-5)
    assert not np.any(found["advantage_BT"][~trained])
    np.testing.assert_allclose(found["return_BT"], return_BT, atol=1e-12)


def test_advantages_against_rlax():
    rlax = pytest.importorskip("rlax")
    batch = rows(1, ((7,),))
    b, steps, reward = batch.rollouts[0]
    found = with_values(Critic(0.9, 0.8, False), jnp.asarray(batch.value_BT, jnp.float32), batch)["advantage_BT"]
    reward_T = np.zeros(7)
    reward_T[-1] = reward
    value_T = np.append(batch.value_BT[b, steps], 0.0)
    discount_T = np.full(7, 0.9)
    discount_T[-1] = 0.0
    theirs = rlax.truncated_generalized_advantage_estimation(reward_T, discount_T, 0.8, value_T)
    np.testing.assert_allclose(np.asarray(found)[b, steps], theirs, rtol=1e-5)


def with_policies(batch, seed: int):
    """Add log-probs of the sampler to a batch; return those of the learner."""
    rng = np.random.default_rng(seed)
    batch.behaviour_logp_BT = rng.uniform(-2, -0.1, batch.value_BT.shape)
    return jnp.asarray(batch.behaviour_logp_BT + rng.normal(0, 0.5, batch.value_BT.shape))


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 1.0), (0.9, 0.8)])
def test_vtrace_against_rlax(discount, decay):
    """rlax's advantage of the policy has the ratio of its own token as well."""
    rlax = pytest.importorskip("rlax")
    batch = rows(3, ((7,),))
    b, steps, reward = batch.rollouts[0]
    logp_BT = with_policies(batch, 0)
    with jax.enable_x64(True):
        found = with_values(Critic(discount, decay, False, trace_clip=1.0), jnp.asarray(batch.value_BT), batch, logp_BT)
        found = jax.tree.map(np.asarray, found)
    value_T, ratio_T = batch.value_BT[b, steps], np.exp(np.asarray(logp_BT) - batch.behaviour_logp_BT)[b, steps]
    assert (ratio_T < 1).any()
    assert (ratio_T > 1).any()
    reward_T, discount_T = np.zeros(7), np.full(7, discount)
    reward_T[-1], discount_T[-1] = reward, 0.0
    theirs = rlax.vtrace_td_error_and_advantage(value_T, np.append(value_T[1:], 0.0), reward_T, discount_T, ratio_T, decay)
    np.testing.assert_allclose(found["return_BT"][b, steps], theirs.errors + value_T, rtol=1e-5, atol=1e-6)
    advantage_T = found["advantage_BT"][b, steps] * np.minimum(ratio_T, 1.0)
    np.testing.assert_allclose(advantage_T, theirs.pg_advantage, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("forced", [0.0, 0.4])
def test_vtrace_against_the_equation(forced):
    """1802.01561, eq. 1: a sum over later steps, each times the ratios up to it."""
    batch, discount, decay, bound = rows(4, LENGTHS, forced), 0.97, 0.9, 1.2
    logp_BT = with_policies(batch, 1)
    with jax.enable_x64(True):
        critic = Critic(discount, decay, False, trace_clip=bound)
        found = jax.tree.map(np.asarray, with_values(critic, jnp.asarray(batch.value_BT), batch, logp_BT))
    trust_BT = np.minimum(np.exp(np.asarray(logp_BT) - batch.behaviour_logp_BT), bound)
    for b, steps, reward in batch.rollouts:
        value, trust = [batch.value_BT[b, t] for t in steps] + [0.0], [trust_BT[b, t] for t in steps]
        delta = [(reward if i == len(steps) - 1 else discount * value[i + 1]) - value[i] for i in range(len(steps))]
        for i, t in enumerate(steps):
            target = value[i] + sum(
                (discount * decay) ** (j - i) * np.prod(trust[i:j]) * trust[j] * delta[j] for j in range(i, len(steps))
            )
            np.testing.assert_allclose(found["return_BT"][b, t], target, rtol=1e-6)


def test_vtrace_on_policy_is_generalised_advantage_estimation():
    batch = rows(5, LENGTHS)
    batch.behaviour_logp_BT = np.full(batch.value_BT.shape, -1.0)
    value_BT = jnp.asarray(batch.value_BT)
    plain = with_values(Critic(), value_BT, batch)
    jax.tree.map(
        np.testing.assert_array_equal, plain, with_values(Critic(trace_clip=1.0), value_BT, batch, batch.behaviour_logp_BT)
    )


def test_with_right_values_and_lambda_1_the_advantage_is_reward_less_value():
    batch = rows(2, LENGTHS)
    found = with_values(Critic(1.0, 1.0, False), jnp.asarray(batch.value_BT), batch)
    trained = batch.weight_BT != 0
    np.testing.assert_allclose(
        np.asarray(found["advantage_BT"])[trained], (batch.advantage_BT - batch.value_BT)[trained], atol=1e-5
    )
    np.testing.assert_allclose(np.asarray(found["return_BT"])[trained], batch.advantage_BT[trained], atol=1e-5)


def test_the_loss_of_values_by_hand():
    batch = SimpleNamespace(value_BT=jnp.array([[1.0, 1.0, 1.0]]), return_BT=jnp.array([[2.0, 0.0, 1.1]]))
    outputs = Outputs(jnp.zeros((1, 3)), jnp.zeros((1, 3)), jnp.array([[1.5, 1.5, 1.1]]))

    def nothing(outputs, batch):
        return jnp.zeros((1, 3)), {}

    plain, found = add_value_loss(nothing, 2.0, None)(outputs, batch)
    np.testing.assert_allclose(plain, [[0.25, 2.25, 0.0]])
    np.testing.assert_allclose(found["value_loss"], [[0.125, 1.125, 0.0]])
    clipped, _ = add_value_loss(nothing, 2.0, 0.2)(outputs, batch)
    np.testing.assert_allclose(clipped, [[0.8**2, 1.5**2, 0.0]], rtol=1e-5)  # the first: 1.2 is farther from 2 than 1.5


def test_values_are_made_without_logits_and_in_any_number_of_micro_batches(tiny):
    from tiny_batch import random_batch

    model, params = tiny(layers=1, value_head=True)
    params["value"]["kernel"] = jax.random.normal(jax.random.key(1), params["value"]["kernel"].shape)
    batch = random_batch()
    found = [logp.compile_token_values(model, count)(params, batch) for count in (1, 2)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    outputs = logp.token_outputs(model, params, batch)
    np.testing.assert_allclose(found[0], outputs.value_BT, rtol=1e-5)
    assert np.abs(found[0]).max() > 0.1


def test_the_value_head_learns_at_its_own_rate(tiny):
    _, params = tiny(layers=1, value_head=True)
    grads = jax.tree.map(jnp.ones_like, params)
    steps = []
    for fields in ({}, {"value_lr": 1e-2}):
        made = optimizer.make(10, name="adamw", lr=1e-3, clip_norm=None, **fields)
        steps.append(made.update(grads, made.init(params), params)[0])
    slow, fast = steps
    np.testing.assert_allclose(fast["value"]["kernel"], 10 * slow["value"]["kernel"], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, {**fast, "value": 0}, {**slow, "value": 0})


def test_completion_adds_what_the_objective_needs(tiny):
    from tiny_batch import random_batch

    model, params = tiny(layers=1, value_head=True)
    batch = random_batch()
    plain = learner.compile_completion(model, objectives.make("grpo"))(batch, params)
    assert plain is batch
    objective = objectives.make("ppo", kl_coefficient=0.1)
    whole = learner.compile_completion(model, objective)(batch, params, params)
    assert whole.reference_logp_BT.shape == whole.value_BT.shape == whole.return_BT.shape == batch.tokens_BT.shape
    assert not np.array_equal(whole.advantage_BT, batch.advantage_BT)
    step = learner.compile_train_step(model, objective, optax.sgd(0.1))
    state = learner.new_state(jax.tree.map(jnp.copy, params), optax.sgd(0.1))
    state, metrics = step(state, whole)
    assert {"value_loss", "value", "return", "kl"} <= metrics.keys()
    assert np.abs(state.params["value"]["kernel"]).max() > 0


def test_completion_scores_the_batch_for_vtrace(tiny):
    from tiny_batch import random_batch

    model, params = tiny(layers=1, value_head=True)
    params = {**params, "value": {"kernel": jax.random.normal(jax.random.key(1), params["value"]["kernel"].shape)}}
    batch, found = random_batch(), []
    for trace_clip in (None, 1.0):
        objective = objectives.make("ppo", trace_clip=trace_clip, normalise=False)
        found.append(learner.compile_completion(model, objective, microbatches=2)(batch, params))
    assert found[0].reference_logp_BT is found[1].reference_logp_BT is None
    assert np.abs(found[0].return_BT - found[1].return_BT).max() > 1e-3
    logp_BT = logp.compile_token_logp(model)(params, batch)
    by_hand = with_values(Critic(normalise=False, trace_clip=1.0), found[1].value_BT, batch, logp_BT)
    np.testing.assert_allclose(found[1].return_BT, by_hand["return_BT"], rtol=1e-4, atol=1e-5)


PPO = {"model.value_head": True, "rl.objective": {"name": "ppo", "kl_coefficient": 0.1}, "rl.updates_per_batch": 2}


@pytest.mark.process
def test_a_run_with_a_critic_continues_bit_for_bit(tmp_path, monkeypatch):
    from runs import Killed, killed_after

    def config():
        made = load_config("tiny", "smoke", **{name: value for name, value in PPO.items() if name != "rl.objective"})
        made.rl.objective, made.rl.steps, made.checkpoint.every_steps = PPO["rl.objective"], 4, 1
        return made

    run_config(config(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed_after(patch, 6)
        with pytest.raises(Killed):
            run_config(config(), tmp_path / "cut")
    run_config(config(), tmp_path / "cut")
    assert maths(tmp_path / "cut") == maths(tmp_path / "whole")
    logged = [line for line in maths(tmp_path / "whole") if line["phase"] == "rl" and "train/value_loss" in line]
    assert len(logged) == 4
    assert all(np.isfinite(line["train/value_loss"]) for line in logged)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rl.objective": {"name": "ppo"}}, "needs values, and the model has no value head; set model.value_head=True"),
        ({"prior.objective": {"name": "ppo"}, "model.value_head": True}, "needs rewards; allowed with the source rollouts"),
        ({"rl.optimizer.value_lr": 1e-3}, "value_lr is for a value head; set model.value_head=True"),
        ({"rl.objective": {"name": "ppo", "decay": 2.0}, "model.value_head": True}, "decay=2.0; allowed: 0 to 1"),
        ({"rl.objective": {"name": "ppo", "value_clip": 0.0}, "model.value_head": True}, "value_clip=0.0; allowed: above 0"),
        ({"rl.objective": {"name": "ppo", "trace_clip": -1.0}, "model.value_head": True}, "trace_clip got -1.0; allowed"),
    ],
)
def test_what_a_critic_needs_is_said_before_the_run(fields, message):
    config = load_config("tiny", "smoke", **{name: value for name, value in fields.items() if not isinstance(value, dict)})
    for name, value in fields.items():
        if isinstance(value, dict):
            phase, _, field = name.partition(".")
            config[phase][field] = value
    with pytest.raises(ValueError, match=message):
        build(config)


def test_forward_passes_before_an_update_are_counted():
    made = [
        objectives.make(name, **fields)
        for name, fields in (("grpo", {}), ("grpo", {"kl_coefficient": 0.1}), ("ppo", {}), ("ppo", {"trace_clip": 1.0}))
    ]
    assert [objective.passes for objective in made] == [0, 1, 1, 2]


def test_a_reward_is_the_advantage_until_values_are_there():
    reward_PG = np.array([[1.0, 0.0], [0.5, -2.0]])
    np.testing.assert_array_equal(objectives.make("ppo").advantage(reward_PG), reward_PG)
