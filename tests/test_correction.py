"""The correction that objectives without an importance ratio have by default: its
metrics, its cost, and what is refused without it.
"""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from runs import load_config
from tiny_batch import random_batch

from jaxreason import learner, objectives
from jaxreason.build import build


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rl.source.lag": 1}, r"^config\.rl\.source\.lag got 1, but the objective has no importance ratio.*allowed: 0, "),
        ({"rl.updates_per_batch": 2}, r"^config\.rl\.updates_per_batch got 2, but the objective has no .*allowed: 1, "),
    ],
)
@pytest.mark.parametrize("name", ["reinforce", "rloo", "maxrl", "pass_at_k"])
def test_rollouts_of_another_policy_need_a_correction(name, fields, message):
    def made(**objective):
        config = load_config("tiny", "smoke", **fields)
        config.rl.objective = {"name": name, **objective}
        return build(config, say=[].append)

    with pytest.raises(ValueError, match=message):
        made(correct="none")
    assert not made().phases[1].objective.on_policy
    made(correct="sequence", correct_by="mask")


def test_a_users_own_objective_without_a_ratio_is_corrected_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_objective", SimpleNamespace(mine=objectives.rloo, clipped=objectives.grpo))
    assert objectives.make("my_objective:mine", correct="none").on_policy
    assert not objectives.make("my_objective:mine").on_policy
    own, named = objectives.make("my_objective:clipped"), objectives.make("grpo")
    assert own.token_loss.__qualname__ == named.token_loss.__qualname__  # not wrapped


def test_a_step_without_lag_is_as_before_and_tells_the_effective_sample_size(tiny):
    """The log-probs of the batch are those of the learner: the ratio is 1."""
    model, params = tiny(layers=1)
    batch = random_batch()
    from jaxreason.logp import compile_token_logp

    batch = dataclasses.replace(batch, behaviour_logp_BT=compile_token_logp(model)(params, batch))
    batch.rollout_BT[:] = np.where(batch.weight_BT != 0, np.arange(1, len(batch.tokens_BT) + 1)[:, None], 0)
    found = []
    for correct in (None, "none"):
        step = learner.compile_train_step(model, objectives.make("rloo", correct=correct), optax.sgd(0.1))
        state, metrics = step(learner.new_state(jax.tree.map(np.copy, params), optax.sgd(0.1)), batch)
        found.append((state.params, metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found[0][0], found[1][0])
    named = learner.name_metrics(found[0][1], sampled=True)
    value, count = named["train/effective_sample_size"]
    np.testing.assert_allclose(value / count, 1.0, rtol=1e-5)
    assert named["train/corrected"][0] == 0
    assert "train/effective_sample_size" not in learner.name_metrics(found[1][1], sampled=True)


def test_the_correction_makes_no_second_pass(tiny):
    """The FLOPs of the compiled step stay, up to those of the ratio of each token."""
    model, params = tiny(layers=1)
    batch, flops = random_batch(), []
    for correct in (None, "none"):
        step = learner.compile_train_step(model, objectives.make("rloo", correct=correct), optax.sgd(0.1))
        lowered = step.lower(learner.new_state(params, optax.sgd(0.1)), batch)
        flops.append(lowered.compile().cost_analysis()["flops"])
    tokens = batch.tokens_BT.size
    assert 0 <= flops[0] - flops[1] < 100 * tokens
    assert flops[1] > 1000 * tokens
