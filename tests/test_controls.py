"""Coefficients that the train step adapts: their rules by hand, their place in the
state, its checkpoints and a run that was killed.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import load_config, maths, run_config
from tiny_batch import random_batch

from jaxreason import learner, objectives
from jaxreason.build import build
from jaxreason.objectives import controls
from jaxreason.runtime import checkpoint
from jaxreason.types import Batch, TrainState

DESCENT = optax.sgd(0.5)


def pair(value):
    return jnp.float32(4 * value), jnp.float32(4)


def test_the_entropy_coefficient_follows_the_papers_rule():
    """2505.22312, sec. 3.2.5: c + delta below the target, c - delta above it; in force
    only at or below the target.
    """
    target, delta, highest = 0.25, 0.1, 0.25
    control = controls.entropy_control(0.0, target, delta, highest)
    in_force = controls.entropy_coefficient(target)
    state, c, last = control.init(), 0.0, 0.0
    for entropy in (0.1, 0.2, 0.24, 0.1, 0.5, 0.6, 0.26, 0.1, 0.25, 0.2):
        batch = dataclasses.replace(Batch(*[None] * 8), control={"entropy": state})
        np.testing.assert_allclose(in_force(batch), c if last <= target else 0.0, atol=1e-6)
        state = control.update(state, {"scored_entropy": pair(entropy)})
        c = min(max(c + (delta if entropy < target else -delta if entropy > target else 0.0), 0.0), highest)
        last = entropy
        np.testing.assert_allclose(state["coefficient"], c, atol=1e-6)
    assert c > 0


def test_the_kl_coefficient_follows_the_papers_rule():
    """1909.08593, sec. 2.2."""
    control = controls.kl_control(0.1, 0.02, 0.1)
    state, beta = control.init(), 0.1
    for kl in (0.0, 0.01, 0.02, 0.021, 0.05, 3.0, -0.001):
        state = control.update(state, {"kl": pair(kl)})
        beta *= 1 + 0.1 * min(max(kl / 0.02 - 1, -0.2), 0.2)
        np.testing.assert_allclose(state["coefficient"], beta, rtol=1e-5)


ADAPTED = {"entropy_coefficient": 0.02, "entropy_target": 2.9, "entropy_delta": 0.01, "kl_coefficient": 0.1, "kl_target": 0.05}


def trained(model, params, objective, batch, *, microbatches=1, updates=3):
    step = learner.compile_train_step(model, objective, DESCENT, microbatches=microbatches)
    state, logged = learner.new_state(jax.tree.map(jnp.copy, params), DESCENT, objective.controls), []
    for _ in range(updates):
        state, metrics = step(state, batch)
        logged.append({name: float(total / count) for name, (total, count) in metrics.items() if count})
    return state, logged


@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_loss_sees_the_value_of_its_step(tiny, microbatches):
    """Each step is that of an objective with constant coefficients, at the values that
    the rules give.
    """
    model, params = tiny(layers=1)
    batch = dataclasses.replace(random_batch(), reference_logp_BT=np.full((8, 12), -2.5, np.float32))
    _, logged = trained(model, params, objectives.make("grpo", **ADAPTED), batch, microbatches=microbatches)
    state, c, beta, last = params, 0.02, 0.1, 0.0
    for line in logged:
        alpha = c if last <= 2.9 else 0.0
        fixed = objectives.make("grpo", entropy_coefficient=alpha, kl_coefficient=beta)
        end, (expected,) = trained(model, state, fixed, batch, updates=1)
        np.testing.assert_allclose([line["entropy_coefficient"], line["kl_coefficient"]], [alpha, beta], rtol=1e-5)
        np.testing.assert_allclose([line["loss"], line["grad_norm"]], [expected["loss"], expected["grad_norm"]], rtol=1e-4)
        state, last = end.params, expected["entropy"]
        c = c + (0.01 if last < 2.9 else -0.01)
        beta *= 1 + 0.1 * min(max(expected["kl"] / 0.05 - 1, -0.2), 0.2)
    assert len({line["entropy_coefficient"] for line in logged}) > 1


def test_a_skipped_update_leaves_the_state_of_the_objective(tiny):
    model, params = tiny(layers=1)
    batch = dataclasses.replace(random_batch(), reference_logp_BT=np.full((8, 12), -2.5, np.float32))
    batch.advantage_BT[0, 4] = np.nan
    state, logged = trained(model, params, objectives.make("grpo", **ADAPTED), batch, updates=1)
    assert logged[0]["skipped"] == 1
    found = jax.device_get(state.control)
    assert found == {"entropy": {"coefficient": np.float32(0.02), "entropy": 0}, "kl": {"coefficient": np.float32(0.1)}}


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_batch_that_nothing_is_learned_from_leaves_the_state_of_the_objective(tiny, microbatches):
    """Such as groups of equal rewards with per_mixed_prompt: no token has a weight."""
    model, params = tiny(layers=1)
    batch = dataclasses.replace(random_batch(), reference_logp_BT=np.full((8, 12), -2.5, np.float32))
    empty = dataclasses.replace(batch, weight_BT=np.zeros_like(batch.weight_BT))
    objective = objectives.make("grpo", **ADAPTED)
    state, logged = trained(model, params, objective, empty, updates=2, microbatches=microbatches)
    assert "entropy" not in logged[0]
    found = jax.device_get(state.control)
    assert found == {"entropy": {"coefficient": np.float32(0.02), "entropy": 0}, "kl": {"coefficient": np.float32(0.1)}}


def test_tokens_that_are_imitated_do_not_count_in_the_entropy_that_is_aimed_at(tiny):
    """They get no reward for entropy, so theirs must not decide its coefficient."""
    model, params = tiny(layers=1)
    batch = dataclasses.replace(random_batch(), reference_logp_BT=np.full((8, 12), -2.5, np.float32))
    objective, imitated_BT = objectives.make("grpo", **ADAPTED), np.zeros(batch.weight_BT.shape, bool)
    imitated_BT[:4] = True
    alone = dataclasses.replace(batch, weight_BT=np.where(imitated_BT, 0, batch.weight_BT))
    mixed = dataclasses.replace(batch, imitated_BT=imitated_BT)
    expected, found = (trained(model, params, objective, each, updates=1)[0].control for each in (alone, mixed))
    assert found["entropy"]["entropy"] == pytest.approx(float(expected["entropy"]["entropy"]), rel=1e-5)


def test_a_state_without_a_control_has_the_tree_of_earlier_versions():
    params = {"w": jnp.ones(2)}
    state = learner.new_state(params, optax.adam(1e-3))
    assert state.control is None
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert {path.split(".")[1].split("[")[0] for path in paths} == {"params", "opt_state", "step"}
    assert jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state)).control is None
    controlled = learner.new_state(params, optax.adam(1e-3), objectives.make("grpo", entropy_target=0.2).controls)
    assert len(jax.tree.leaves(controlled)) == len(paths) + 2
    assert not objectives.make("grpo").controls


def test_checkpoints_hold_the_control_and_those_without_one_still_load(tmp_path):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Earlier:
        params: object
        opt_state: object
        step: object

    params, objective = {"w": jnp.ones((2, 2))}, objectives.make("grpo", entropy_target=0.2, entropy_coefficient=0.3)
    now, with_control = learner.new_state(params, DESCENT), learner.new_state(params, DESCENT, objective.controls)
    made = checkpoint.open_checkpoints(tmp_path / "checkpoints", keep=5)
    for step, state in enumerate((Earlier(now.params, now.opt_state, now.step), now, with_control), start=1):
        made.save(step, state, {})
    made.wait()
    for step in (1, 2):
        found, _ = made.restore(step, jax.eval_shape(lambda: now))
        assert isinstance(found, TrainState)
        assert found.control is None
    found, _ = made.restore(3, jax.eval_shape(lambda: with_control))
    assert found.control["entropy"]["coefficient"] == np.float32(0.3)
    with pytest.raises(ValueError, match=r"control\.entropy\.coefficient is missing there"):
        made.restore(2, jax.eval_shape(lambda: with_control))
    made.close()


@pytest.mark.process
def test_a_run_with_adapted_coefficients_continues_bit_for_bit(tmp_path, monkeypatch):
    from runs import Killed, killed_after

    def config():
        made = load_config("tiny", "smoke", **{"rl.steps": 4, "checkpoint.every_steps": 1, "rl.updates_per_batch": 2})
        target = {"entropy_target": 1.0, "entropy_coefficient": 0.01, "kl_coefficient": 0.1, "kl_target": 1e-3}
        made.rl.objective = {"name": "grpo", "kl_in": "reward", "entropy_top": 0.5, "covariance": "kl", **target}
        made.rl.objective.covariance_fraction = 0.1
        return made

    run_config(config(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed_after(patch, 6)
        with pytest.raises(Killed):
            run_config(config(), tmp_path / "cut")
    run_config(config(), tmp_path / "cut")
    assert maths(tmp_path / "cut") == maths(tmp_path / "whole")
    logged = [line for line in maths(tmp_path / "whole") if line["phase"] == "rl" and "train/kl_coefficient" in line]
    assert len(logged) == 4
    assert len({line["train/kl_coefficient"] for line in logged}) > 1
    assert len({line["train/entropy_coefficient"] for line in logged}) > 1
    assert all(0.05 < line["train/covariance_chosen"] < 0.2 for line in logged)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"entropy_target": 0.0}, "entropy_target=0.0, .*allowed: a target and a delta above 0"),
        ({"entropy_target": 0.2, "entropy_delta": -1.0}, "entropy_delta=-1.0, .*allowed: a target and a delta above 0"),
        ({"entropy_target": 0.2, "entropy_coefficient": 2.0}, "entropy_coefficient=2.0, entropy_highest=1.0; allowed"),
        ({"kl_target": 0.1}, "got kl_target=0.1, kl_gain=0.1, kl_coefficient=0.0; allowed: above 0"),
        ({"kl_target": -1.0, "kl_coefficient": 0.1}, "got kl_target=-1.0, .*allowed: above 0"),
        ({"kl_target": 1.0, "kl_coefficient": 0.1, "kl_gain": 5.0}, "kl_gain=5.0, .*allowed: .* a gain below 5"),
    ],
)
def test_wrong_targets_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        objectives.make("grpo", **fields)


def test_the_state_of_a_phase_is_that_of_its_objective():
    config = load_config("tiny", "smoke")
    config.rl.objective = {"name": "grpo", "entropy_target": 0.3}
    run = build(config, say=[].append)
    shapes = [learner.state_shapes(run.model, p.optimizer, run.mesh, p.objective.controls) for p in run.phases]
    assert [abstract.control is None for abstract, _ in shapes] == [True, False]
    assert all(placed.is_fully_replicated for placed in jax.tree.leaves(shapes[1][1].control))
