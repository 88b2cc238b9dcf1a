"""Our objectives beside those of TRL and Tunix on the same ragged groups.

`values_of_peers.py` wrote their values; neither library is needed here. Where the
definitions coincide, loss and gradient agree to 1e-6 (TRL, float64) and 1e-5 (Tunix,
float32). Where they differ, a test records by how much:

| what | ours | theirs | by the paper |
|---|---|---|---|
| std of `zscore_group` | population, + 1e-6 | sample; TRL + 1e-4, Tunix + 1e-6 | open: 2402.03300 writes std |
| `centre_group_scale_batch` | std of centred rewards | TRL `batch`: std of the rewards, sample | ours: 2510.13786, sec. 4 |
| divisor of `dr_grpo` | longest allowed completion | Tunix: width of the padded batch | a constant: ours and TRL's |
| rollouts left out (`cut="out"`) | count in the mean over rollouts | as ours in TRL; not in Tunix | open |
| gradient of KL k1 | that of KL(p, q) | Tunix `kl`: 1 per token, expectation 0 | ours: the mean of grad log p is 0 |
| upper bound of `cispo` | 1 + clip_high | TRL: epsilon_high itself | both: another name |
| `rloo` off-policy | refused, or weighed by `correct` | TRL: PPO's clip of the rollout's ratio | ours: 2402.14740 has no ratio |
| std of normalised GAE | population, + 1e-6 | Tunix: sample, variance + 1e-8 | open |

TRL's `luspo` is `gspo` with `weigh="token_sum"`, its `delta` is `clip_dual`, its
`bnpo` is `dapo` with both clips at 0.2. Its `vespo` has no counterpart here.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason import batching, objectives
from jaxreason.objectives.critic import Critic, add_value_loss, with_values
from jaxreason.types import Group, Outputs, Rollout, Task, Verdict

PEERS = json.loads((Path(__file__).parent / "golden" / "values_of_peers.json").read_text())
INPUTS, LIMIT = PEERS["inputs"], PEERS["limit"]
REWARD_PG = np.array(INPUTS["reward"])
P, G = REWARD_PG.shape
ENTROPY = 0.7


def case_of(library: str, name: str) -> dict:
    return PEERS[library]["cases"][name]


def on_grid(rows, fill=0.0) -> np.ndarray:
    width = max(map(len, INPUTS["learner"]))
    return np.array([[*row, *[fill] * (width - len(row))] for row in rows])


def batch_of(objective, *, all_sampled: bool = False):
    """Make our batch, a rollout per row behind a prompt of one token; forced tokens are
    those that the libraries mask.
    """
    sampled = [[1] * len(row) for row in INPUTS["sampled"]] if all_sampled else INPUTS["sampled"]
    rollouts = [
        Rollout(
            Task("", ""), i // G, i % G, np.array([1]), np.arange(len(q)), np.array(q, np.float32), np.array(mask, bool),
            "limit" if cut else "eos", "", Verdict(reward, True),
        )
        for i, (q, mask, cut, reward) in enumerate(
            zip(INPUTS["sampler"], sampled, INPUTS["cut"], REWARD_PG.reshape(-1), strict=True)
        )
    ]  # fmt: skip
    groups = [Group(tuple(rollouts[i : i + G])) for i in range(0, P * G, G)]
    batch = batching.from_groups(groups, objective, buckets=(1 + on_grid(INPUTS["learner"]).shape[1],), limit=LIMIT)
    return dataclasses.replace(batch, reference_logp_BT=np.pad(on_grid(INPUTS["reference"]), ((0, 0), (1, 0))))


def ours(objective, batch):
    """Return the loss as the learner sums it, and its gradient by the learner's
    log-probs.
    """

    def total(logp_BT):
        logp_BT = jnp.pad(logp_BT, ((0, 0), (1, 0)))
        loss_BT, _ = objective.token_loss(Outputs(logp_BT, jnp.full_like(logp_BT, ENTROPY)), batch)
        return jnp.sum(jnp.where(batch.weight_BT != 0, batch.weight_BT * loss_BT, 0.0))

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.value_and_grad(total)(jnp.asarray(on_grid(INPUTS["learner"]))))


def compare(objective, case: dict, *, loss: bool = True, rtol: float, **layout) -> None:
    """Check loss and gradient, with the library's advantages."""
    theirs_PG = np.array(case["advantage"]).reshape(P, G)
    objective = objective._replace(advantage=lambda reward_PG: theirs_PG)
    found, gradient = ours(objective, batch_of(objective, **layout))
    expected = on_grid(case["gradient"])
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradient, expected, rtol=rtol, atol=rtol * np.abs(expected).max())
    if loss:
        np.testing.assert_allclose(found, case["loss"], rtol=rtol, atol=rtol * 0.1)


# --- TRL ---

RATIO = {"correct_low": 0.8, "correct_high": 1.2}
TRL = {  # case -> our objective
    "grpo": {"name": "grpo"},
    "grpo, scaled by the group": {"name": "grpo"},
    "grpo, scaled by the batch": {"name": "grpo"},
    "grpo, delta": {"name": "grpo", "clip_dual": 1.3},
    "grpo, without cut": {"name": "grpo", "cut": "out"},
    "bnpo": {"name": "dapo", "clip_high": 0.2},
    "dr_grpo": {"name": "dr_grpo"},
    "dapo": {"name": "dapo"},
    "dapo, without cut": {"name": "dapo", "cut": "out"},
    "gspo": {"name": "gspo", "clip_low": 0.1, "clip_high": 0.15},
    "luspo": {"name": "gspo", "clip_low": 0.1, "clip_high": 0.15, "weigh": "token_sum"},
    "cispo": {"name": "cispo", "clip_low": 1.0, "clip_high": 0.2},
    "sapo": {"name": "sapo"},
    "kl": {"name": "dapo", "clip_high": 0.2, "kl_coefficient": 0.1, "kl_estimator": "k3_reverse"},
    "kl, corrected": {"name": "dapo", "clip_high": 0.2, "kl_coefficient": 0.1, "kl_estimator": "k3_weighted"},
    "entropy": {"name": "dapo", "clip_high": 0.2, "entropy_coefficient": 0.1},
    "off_policy_mask": {"name": "grpo", "stale_limit": 0.05},
}
# The ratio of learner and sampler as a weight. TRL multiplies the clipped ratio of
# learner and old policy by it, which is 1 before the first update: the same gradient.
VLLM = {
    f"vllm {level}_{how}": {"name": "rloo", "weigh": "per_token", "correct": level, "correct_by": how, **RATIO}
    for level in ("token", "sequence")
    for how in ("truncate", "mask")
}


@pytest.mark.parametrize("name", TRL)
def test_loss_and_gradient_are_those_of_trl(name):
    compare(objectives.make(**TRL[name]), case_of("trl", name), rtol=1e-6)


@pytest.mark.parametrize("name", VLLM)
def test_the_correction_of_the_sampler_has_the_gradient_of_trl(name):
    compare(objectives.make(**VLLM[name]), case_of("trl", name), loss=False, rtol=1e-6)


def test_rloo_on_policy_has_the_gradient_of_trl():
    """TRL has no mask of forced tokens for RLOO."""
    case = case_of("trl", "rloo")
    np.testing.assert_allclose(objectives.leave_one_out(REWARD_PG).reshape(-1), case["advantage"], atol=1e-6)
    compare(objectives.make("rloo", correct="none"), case, loss=False, rtol=1e-6, all_sampled=True)


def test_every_case_of_trl_is_compared():
    assert set(PEERS["trl"]["cases"]) == {*TRL, *VLLM, "rloo", "vespo"}  # vespo: not ours


def test_centred_advantages_are_those_of_trl():
    np.testing.assert_allclose(objectives.centre_group(REWARD_PG).reshape(-1), case_of("trl", "grpo")["advantage"], atol=1e-6)


def test_the_scale_of_the_group_differs_from_trl_by_the_kind_of_std():
    theirs_PG = np.array(case_of("trl", "grpo, scaled by the group")["advantage"]).reshape(P, G)
    ours_PG, sample = objectives.zscore_group(REWARD_PG), REWARD_PG.std(axis=1, ddof=1, keepdims=True)
    population = REWARD_PG.std(axis=1, keepdims=True)
    np.testing.assert_allclose(theirs_PG * (sample + 1e-4), ours_PG * (population + 1e-6), atol=1e-6)
    factor_P = np.linalg.norm(ours_PG, axis=1)[[0, 2, 3]] / np.linalg.norm(theirs_PG, axis=1)[[0, 2, 3]]
    np.testing.assert_allclose(factor_P, np.sqrt(G / (G - 1)), rtol=1e-3)  # 1.155 for groups of four


def test_the_scale_of_the_batch_differs_from_trl():
    """TRL divides by the std of the rewards, which differences between problems enter;
    we by that of the centred rewards.
    """
    theirs_PG = np.array(case_of("trl", "grpo, scaled by the batch")["advantage"]).reshape(P, G)
    centred_PG = objectives.centre_group(REWARD_PG)
    np.testing.assert_allclose(theirs_PG, centred_PG / (REWARD_PG.std(ddof=1) + 1e-4), atol=1e-6)
    ours_PG = objectives.ADVANTAGES["centre_group_scale_batch"](REWARD_PG)
    np.testing.assert_allclose(ours_PG, centred_PG / (centred_PG.std() + 1e-6), atol=1e-9)
    factor = np.linalg.norm(ours_PG) / np.linalg.norm(theirs_PG)
    np.testing.assert_allclose(factor, 1.095, atol=1e-3)


# --- Tunix ---

TUNIX = {
    "grpo": {"name": "grpo"},
    "token-mean": {"name": "dapo", "clip_high": 0.2},
    "token sum": {"name": "grpo", "weigh": "token_sum"},
    "gspo": {"name": "gspo", "clip_low": 0.1, "clip_high": 0.1},
    "rloo": {"name": "grpo"},  # its RLOO is PPO's clip with the advantage of RLOO
    "mse_kl": {"name": "dapo", "clip_high": 0.2, "kl_coefficient": 0.1, "kl_estimator": "k2"},
    "low_var_kl": {"name": "dapo", "clip_high": 0.2, "kl_coefficient": 0.1, "kl_estimator": "k3_reverse"},
}
DIFFERENT = ("dr_grpo", "grpo, without cut", "kl")
CRITIC = ("gae", "ppo", "ppo, dual clip", "value loss")


@pytest.mark.parametrize("name", TUNIX)
def test_loss_and_gradient_are_those_of_tunix(name):
    compare(objectives.make(**TUNIX[name]), case_of("tunix", name), rtol=1e-5)


def test_every_case_of_tunix_is_compared():
    assert set(PEERS["tunix"]["cases"]) == {*TUNIX, *DIFFERENT, *CRITIC}


def test_advantages_are_those_of_tunix():
    for name, advantage in (("dr_grpo", "centre_group"), ("rloo", "leave_one_out")):
        theirs = case_of("tunix", name)["advantage"]
        np.testing.assert_allclose(objectives.ADVANTAGES[advantage](REWARD_PG).reshape(-1), theirs, atol=1e-6)
    theirs_PG = np.array(case_of("tunix", "grpo")["advantage"]).reshape(P, G)
    np.testing.assert_allclose(objectives.zscore_group(REWARD_PG), theirs_PG * np.sqrt(G / (G - 1)), atol=1e-5)


def scaled_case(library: str, name: str, factor: float) -> dict:
    case = case_of(library, name)
    return {**case, "loss": case["loss"] * factor, "gradient": [[factor * x for x in row] for row in case["gradient"]]}


def test_dr_grpo_of_tunix_divides_by_the_width_of_the_batch():
    """9 here, where 12 tokens are allowed: its step size follows the longest rollout of
    each batch.
    """
    width = max(map(len, INPUTS["learner"]))
    assert (width, LIMIT) == (9, 12)
    compare(objectives.make("dr_grpo"), scaled_case("tunix", "dr_grpo", width / LIMIT), rtol=1e-5)


def test_tunix_counts_no_rollouts_without_tokens():
    kept = P * G - sum(INPUTS["cut"])
    compare(objectives.make("grpo", cut="out"), scaled_case("tunix", "grpo, without cut", kept / (P * G)), rtol=1e-5)


def test_kl_of_tunix_has_the_value_of_k1_but_a_gradient_of_expectation_0():
    """Its gradient per token is the coefficient times that of log p, whatever the
    reference: it does not pull towards it.
    """
    plain, with_k1 = (objectives.make("dapo", clip_high=0.2, **kl) for kl in ({}, {"kl_coefficient": 0.1, "kl_estimator": "k1"}))
    case = case_of("tunix", "kl")
    theirs_PG = np.array(case["advantage"]).reshape(P, G)
    (_, plain_gradient), (loss, gradient) = (
        ours(made, batch_of(made)) for made in (x._replace(advantage=lambda reward_PG: theirs_PG) for x in (plain, with_k1))
    )
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-5)
    mask = on_grid(INPUTS["sampled"])
    constant = 0.1 * mask / mask.sum()
    np.testing.assert_allclose(on_grid(case["gradient"]) - plain_gradient, constant, atol=1e-7)
    difference = mask * (on_grid(INPUTS["learner"]) - on_grid(INPUTS["reference"]))
    np.testing.assert_allclose(gradient - plain_gradient, constant * difference, atol=1e-7)
    assert np.abs(constant * difference - constant).max() > 1e-3


# --- Tunix's critic ---


def critic_batch():
    """Make the fields that `with_values` reads, without a prompt."""
    mask = on_grid(INPUTS["sampled"])
    number = np.arange(1, P * G + 1)[:, None] * (on_grid([[1] * len(row) for row in INPUTS["learner"]]) > 0)
    return SimpleNamespace(
        weight_BT=(mask / mask.sum()).astype(np.float32),
        rollout_BT=number,
        advantage_BT=np.broadcast_to(REWARD_PG.reshape(-1, 1), mask.shape),
    )


def test_gae_is_that_of_tunix_up_to_the_kind_of_std():
    batch, case = critic_batch(), case_of("tunix", "gae")
    trained = batch.weight_BT != 0
    found = with_values(Critic(0.97, 0.9), jnp.asarray(on_grid(INPUTS["value"]), jnp.float32), batch)
    np.testing.assert_allclose(np.asarray(found["return_BT"])[trained], on_grid(case["returns"])[trained], rtol=1e-4, atol=1e-5)
    count = trained.sum()
    theirs = on_grid(case["advantages"])[trained] * np.sqrt(count / (count - 1))
    np.testing.assert_allclose(np.asarray(found["advantage_BT"])[trained], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "fields"), [("ppo", {}), ("ppo, dual clip", {"clip_dual": 1.3})])
def test_the_policy_loss_of_ppo_is_that_of_tunix(name, fields):
    """With its advantages, over the sampled tokens of all rollouts."""
    case, objective = case_of("tunix", name), objectives.make("ppo", clip_high=0.28, **fields)
    advantage_BT = np.pad(on_grid(case_of("tunix", "gae")["advantages"]), ((0, 0), (1, 0)))
    batch = dataclasses.replace(batch_of(objective), advantage_BT=advantage_BT)
    token_loss = objectives.clipped(0.2, 0.28, **fields)  # without the loss of values
    found, gradient = ours(objective._replace(token_loss=token_loss), batch)
    np.testing.assert_allclose(found, case["loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, on_grid(case["gradient"]), rtol=1e-5, atol=1e-7)


def test_the_loss_of_values_is_that_of_tunix():
    """Ours at `value_coefficient` 1: both halve the squared error."""
    case, batch = case_of("tunix", "value loss"), critic_batch()
    batch.value_BT, batch.return_BT = on_grid(INPUTS["value"]), on_grid(case_of("tunix", "gae")["returns"])

    def total(value_BT):
        token_loss = add_value_loss(lambda outputs, batch: (jnp.zeros_like(value_BT), {}), 1.0, 0.2)
        return jnp.sum(batch.weight_BT * token_loss(Outputs(None, None, value_BT), batch)[0])

    with jax.enable_x64(True):
        found, gradient = jax.value_and_grad(total)(jnp.asarray(on_grid(INPUTS["new_value"])))
    np.testing.assert_allclose(found, case["loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, on_grid(case["gradient"]), rtol=1e-5, atol=1e-6)
