"""Each named algorithm against its paper's equation, written again as loops over
problems, rollouts and tokens in float64, on ragged groups with forced tokens.

A reference returns the loss of a batch as a function of the tokens' log-probs under the
policy that learns. Its gradient is taken by finite differences; what the equation holds
constant is computed from `fixed`, the same log-probs before they are moved.
"""

from __future__ import annotations

import itertools
import math
import statistics
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ragged import LIMIT, G, P, batch_of, kept, on_grid, problem, total

from jaxreason import learner, objectives
from jaxreason.types import Outputs

# --- the equations ---


def mean(values):
    return statistics.fmean(values)


def group_zscore(drawn, i, j):
    row = drawn.reward[i].tolist()
    return 0.0 if len(set(row)) == 1 else (row[j] - mean(row)) / (statistics.pstdev(row) + 1e-6)


def two_rewards(weights):
    """2601.05242: z-scores of each reward in its group, added, then normalised over the
    batch.
    """

    def sums(drawn):
        found = [[0.0] * G for _ in range(P)]
        for weight, rewards in zip(weights, (drawn.reward, drawn.style), strict=True):
            for i, j in itertools.product(range(P), range(G)):
                found[i][j] += weight * group_zscore(SimpleNamespace(reward=rewards), i, j)
        return found

    def advantage(drawn, i, j):
        found = sums(drawn)
        every = [x for row in found for x in row]
        return (found[i][j] - mean(every)) / (statistics.pstdev(every) + 1e-6)

    return advantage


def group_centred(drawn, i, j):
    return drawn.reward[i][j] - mean(drawn.reward[i].tolist())


def batch_zscore(drawn, i, j):
    every = drawn.reward.flatten().tolist()
    return (drawn.reward[i][j] - mean(every)) / (statistics.pstdev(every) + 1e-6)


def mean_divided(drawn, i, j):
    row = drawn.reward[i].tolist()
    return 0.0 if sum(row) == 0 else (row[j] - mean(row)) / mean(row)


def best_of_two(drawn, i, j):
    """Enumerate the pairs that contain the attempt: PKPO's reward, less the best of the
    others.
    """
    row = drawn.reward[i].tolist()
    gains = [max(row[j], row[other]) - row[other] for other in range(G) if other != j]
    return sum(gains) / math.comb(G, 2)


def surrogate(ratio, advantage, low, high):
    return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def summed(drawn, term, weigh):
    """Sum `-weigh(i, j) * term(i, j, t)` over the sampled tokens of all rollouts."""
    return -sum(weigh(i, j) * term(i, j, t) for i in range(P) for j in range(G) for t in kept(drawn, i, j))


def weight_of(drawn, name):
    tokens = [[len(kept(drawn, i, j)) for j in range(G)] for i in range(P)]
    return {
        "sequence": lambda i, j: 1 / (P * G * tokens[i][j]),
        "token": lambda i, j: 1 / sum(map(sum, tokens)),
        "prompt": lambda i, j: 1 / (P * sum(tokens[i])),
        "constant": lambda i, j: 1 / (P * G * LIMIT),
        "sum": lambda i, j: 1 / (P * G),
    }[name]


def ratio_loss(advantage, weight, low=0.2, high=0.2):
    """PPO's clip (1707.06347, eq. 7) with some advantage and aggregation."""

    def loss(drawn, p, fixed):
        def term(i, j, t):
            return surrogate(math.exp(p[i][j][t] - drawn.q[i][j][t]), advantage(drawn, i, j), low, high)

        return summed(drawn, term, weight_of(drawn, weight))

    return loss


def score_loss(advantage, weight, factor=lambda drawn, fixed, i, j, t: 1.0):
    """A constant factor, times the advantage, times log p."""

    def loss(drawn, p, fixed):
        def term(i, j, t):
            return factor(drawn, fixed, i, j, t) * advantage(drawn, i, j) * p[i][j][t]

        return summed(drawn, term, weight_of(drawn, weight))

    return loss


def gspo(drawn, p, fixed):
    """2507.18071: a mean over rollouts, not over tokens."""
    found = []
    for i, j in itertools.product(range(P), range(G)):
        where = kept(drawn, i, j)
        ratio = math.exp(mean([p[i][j][t] - drawn.q[i][j][t] for t in where]))
        found.append(surrogate(ratio, group_zscore(drawn, i, j), 3e-4, 4e-4))
    return -mean(found)


def cispo_weight(drawn, fixed, i, j, t):
    return min(max(math.exp(fixed[i][j][t] - drawn.q[i][j][t]), 0.0), 5.0)


def dppo_weight(kind):
    def weight(drawn, fixed, i, j, t):
        p, q = math.exp(fixed[i][j][t]), math.exp(drawn.q[i][j][t])
        far = abs(p - q) if kind == "tv" else q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
        rises = group_centred(drawn, i, j) > 0
        return 0.0 if far > 0.2 and (p > q) == rises else min(p / q, 20.0)

    return weight


def sapo(drawn, p, fixed):
    """2511.20347."""

    def term(i, j, t):
        advantage = group_zscore(drawn, i, j)
        tau = 1.0 if advantage > 0 else 1.05
        return 4 / tau / (1 + math.exp(-tau * (math.exp(p[i][j][t] - drawn.q[i][j][t]) - 1))) * advantage

    return summed(drawn, term, weight_of(drawn, "sequence"))


def corrected(level, how):
    """A bounded ratio as the weight of RLOO's tokens."""

    def weight(drawn, fixed, i, j, t):
        steps = [t] if level == "token" else kept(drawn, i, j)
        ratio = math.exp(sum(fixed[i][j][s] - drawn.q[i][j][s] for s in steps))
        return min(max(ratio, 0.5), 1.5) if how == "truncate" else ratio * (0.5 <= ratio <= 1.5)

    return weight


def truncated(drawn, fixed, i, j, t):
    """The default of objectives without a ratio: that of the token, at most 2."""
    return min(math.exp(fixed[i][j][t] - drawn.q[i][j][t]), 2.0)


def loo(drawn, i, j):
    return group_centred(drawn, i, j) * G / (G - 1)


BOUNDS = {"correct_low": 0.5, "correct_high": 1.5}
REFERENCES = {
    "reinforce": ("reinforce", {}, score_loss(lambda d, i, j: d.reward[i][j] - d.reward.mean(), "sum", truncated)),
    "reinforce, none": (
        "reinforce",
        {"correct": "none"},
        score_loss(lambda d, i, j: d.reward[i][j] - d.reward.mean(), "sum"),
    ),
    "reinforce_pp": ("reinforce_pp", {}, ratio_loss(batch_zscore, "token")),
    "rloo": ("rloo", {}, score_loss(loo, "sum", truncated)),
    "maxrl": ("maxrl", {}, score_loss(mean_divided, "sum", truncated)),
    "pass_at_k": ("pass_at_k", {"k": 2}, score_loss(best_of_two, "sum", truncated)),
    "grpo": ("grpo", {}, ratio_loss(group_zscore, "sequence")),
    "gdpo": ("gdpo", {}, ratio_loss(two_rewards((1, 1)), "sequence")),
    "gdpo, weighted": ("gdpo", {"reward_weights": (1.0, -0.3)}, ratio_loss(two_rewards((1, -0.3)), "sequence")),
    "dr_grpo": ("dr_grpo", {}, ratio_loss(group_centred, "constant")),
    "dapo": ("dapo", {}, ratio_loss(group_zscore, "token", high=0.28)),
    "dapo, eq. 8": ("dapo", {"weigh": "per_prompt"}, ratio_loss(group_zscore, "prompt", high=0.28)),
    "gspo": ("gspo", {}, gspo),
    "cispo": ("cispo", {}, score_loss(group_zscore, "token", cispo_weight)),
    "dppo, tv": ("dppo", {}, score_loss(group_centred, "constant", dppo_weight("tv"))),
    "dppo, kl": ("dppo", {"divergence": "kl"}, score_loss(group_centred, "constant", dppo_weight("kl"))),
    "sapo": ("sapo", {}, sapo),
    **{
        f"rloo, {level}, {how}": (
            "rloo",
            {"correct": level, "correct_by": how, **BOUNDS},
            score_loss(loo, "sum", corrected(level, how)),
        )
        for level in ("token", "sequence")
        for how in ("truncate", "mask")
    },
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", REFERENCES)
def test_loss_and_gradient_against_the_papers_equation(name, seed):
    algorithm, fields, reference = REFERENCES[name]
    objective, drawn = objectives.make(algorithm, **fields), problem(seed)
    batch = batch_of(drawn, objective)
    drawn.q = [[x.astype(np.float32).astype(float) for x in row] for row in drawn.q]  # as rollouts keep it
    with jax.enable_x64(True):
        logp_BT = jnp.asarray(on_grid(drawn.p, batch))
        value, gradient_BT = jax.value_and_grad(lambda logp_BT: total(objective, batch, logp_BT))(logp_BT)
        assert value.dtype == jnp.float64
    assert math.isclose(value, reference(drawn, drawn.p, drawn.p), rel_tol=1e-6, abs_tol=1e-6)
    assert np.abs(gradient_BT).max() > 0
    step, found = 1e-6, on_grid(drawn.p, batch) * 0
    for i, j in itertools.product(range(P), range(G)):
        for t in range(len(drawn.p[i][j])):
            both = []
            for sign in (1, -1):
                moved = [[x.copy() for x in row] for row in drawn.p]
                moved[i][j][t] += sign * step
                both.append(reference(drawn, moved, drawn.p))
            slope = (both[0] - both[1]) / (2 * step)
            where = tuple(np.argwhere(batch.rollout_BT == i * G + j + 1)[t])
            found[where] = slope
    np.testing.assert_allclose(gradient_BT, found, rtol=1e-4, atol=1e-6)


def test_every_algorithm_has_its_equation():
    assert {name for name, _, _ in REFERENCES.values()} == set(objectives.OBJECTIVES) - {
        "lm",
        "sft",
        "expert_iteration",
        "ppo",  # tests/test_critic.py
        "distil",  # tests/test_distil.py
        "self_distil",
    }


# --- the same numbers in any layout ---


@pytest.mark.parametrize("name", ["gspo", "rloo, sequence, mask", "dapo, eq. 8"])
@pytest.mark.parametrize("layout", [{"pack": True}, {"rollouts_per_prompt": 2}, {"pack": True, "rollouts_per_prompt": 2}])
def test_packed_rows_and_shared_prompts_change_nothing(name, layout):
    algorithm, fields, _ = REFERENCES[name]
    objective, drawn, found = objectives.make(algorithm, **fields), problem(3), []
    for options in ({}, layout):
        batch = batch_of(drawn, objective, **options)
        logp_BT = jnp.asarray(on_grid(drawn.p, batch), jnp.float32)
        value, gradient_BT = jax.value_and_grad(lambda logp_BT: total(objective, batch, logp_BT))(logp_BT)  # noqa: B023
        by_rollout = [np.asarray(gradient_BT)[batch.rollout_BT == i + 1] for i in range(P * G)]
        found.append((value, np.concatenate(by_rollout)))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-8)


# --- identities ---

WITH_RATIO = ("reinforce_pp", "grpo", "gdpo", "dr_grpo", "dapo", "gspo", "cispo", "dppo", "sapo")


@pytest.mark.parametrize("name", WITH_RATIO)
def test_on_policy_every_ratio_loss_has_the_gradient_of_reinforce(name):
    objective = objectives.make(name)
    plain = objective._replace(token_loss=objectives.reinforce)
    drawn = problem(0, on_policy=True)
    batch = batch_of(drawn, objective)
    logp_BT = jnp.asarray(on_grid(drawn.q, batch), jnp.float32)
    found, expected = (jax.grad(lambda x, o=o: total(o, batch, x))(logp_BT) for o in (objective, plain))
    assert np.abs(expected).max() > 1e-3
    if name == "gspo":  # each rollout's gradient is spread over its tokens, which all weigh the same
        assert np.allclose(np.sum(found), np.sum(expected), rtol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["reinforce", "rloo", "maxrl", "pass_at_k"])
def test_on_policy_the_default_correction_changes_nothing_but_rounding(name):
    plain, corrected = objectives.make(name, correct="none"), objectives.make(name)
    assert plain.on_policy
    assert not corrected.on_policy
    drawn = problem(0, on_policy=True)
    batch = batch_of(drawn, plain)
    logp_BT = jnp.asarray(on_grid(drawn.q, batch), jnp.float32)
    found, expected = (jax.value_and_grad(lambda x, o=o: total(o, batch, x))(logp_BT) for o in (corrected, plain))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6, atol=1e-9)
    _, statistics_ = corrected.token_loss(Outputs(logp_BT, logp_BT), batch)
    assert {"ratio", "ratio_squared", "log_ratio_worst", "corrected"} <= statistics_.keys()
    assert not np.any(statistics_["corrected"])


def test_imitation_and_losses_with_a_ratio_are_not_corrected_by_default():
    for name in ("lm", "sft", "expert_iteration"):
        assert objectives.make(name).token_loss is objectives.nll
        assert objectives.make(name, correct="none").token_loss is objectives.nll
    made = objectives.make("grpo")
    batch = batch_of(problem(0), made)
    logp_BT = jnp.asarray(on_grid(problem(0).p, batch), jnp.float32)
    found, expected = (o.token_loss(Outputs(logp_BT, logp_BT), batch) for o in (made, objectives.grpo()))
    assert found[1].keys() == expected[1].keys()
    np.testing.assert_array_equal(found[0], expected[0])


def test_gspo_is_grpo_for_rollouts_of_one_token():
    drawn = problem(0)
    drawn.q, drawn.p = ([[x[:1] for x in row] for row in values] for values in (drawn.q, drawn.p))
    drawn.forced = [[x[:1] for x in row] for row in drawn.forced]
    one, other = objectives.make("gspo", clip_low=0.2, clip_high=0.2), objectives.make("grpo")
    batch = batch_of(drawn, one)
    logp_BT = jnp.asarray(on_grid(drawn.p, batch), jnp.float32)
    found, expected = (jax.value_and_grad(lambda x, o=o: total(o, batch, x))(logp_BT) for o in (one, other))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in objectives.OBJECTIVES if objectives.make(name).needs_group])
def test_equal_rewards_give_exactly_no_gradient(name):
    drawn = problem(1)
    drawn.reward[:], drawn.style[:] = 0.1, 0.7
    objective = objectives.make(name)
    batch = batch_of(drawn, objective)
    logp_BT = jnp.asarray(on_grid(drawn.p, batch), jnp.float32)
    assert not np.any(jax.grad(lambda x: total(objective, batch, x))(logp_BT))


def test_per_token_is_per_sequence_at_equal_lengths():
    length_PG, advantage_PG = np.full((2, 3), 7), np.ones((2, 3))
    found = [objectives.WEIGHTINGS[name](length_PG, advantage_PG, 9) for name in ("per_token", "per_sequence", "per_prompt")]
    np.testing.assert_allclose(found[0], found[1])
    np.testing.assert_allclose(found[0], found[2])


@pytest.mark.parametrize("k", [2, 3, 5])
def test_best_of_k_against_all_sets(k):
    """Any rewards, also equal ones: the mean over the sets that contain an attempt."""
    rng = np.random.default_rng(k)
    reward_PG = rng.integers(0, 4, (4, 6)).astype(float)
    slow_PG = np.zeros_like(reward_PG)
    for row, out in zip(reward_PG, slow_PG, strict=True):
        for chosen in itertools.combinations(range(6), k):
            for i in chosen:
                out[i] += (max(row[list(chosen)]) - max(row[other] for other in chosen if other != i)) / math.comb(6, k)
    np.testing.assert_allclose(objectives.best_of(k)(reward_PG), slow_PG, atol=1e-12)
    with pytest.raises(ValueError, match="allowed: 2 to 1"):
        objectives.best_of(2)(reward_PG[:, :1])


def test_the_gradient_of_pass_at_k_is_unbiased():
    """Over all pairs of attempts of a policy over three symbols."""
    theta, reward = np.array([0.4, -0.3, 0.8]), np.array([0.0, 1.0, 0.25])
    p = np.exp(theta) / np.exp(theta).sum()
    found = np.zeros(3)
    for pair in itertools.product(range(3), repeat=2):
        advantage = objectives.best_of(2)(reward[list(pair)][None])[0]
        found += np.prod(p[list(pair)]) * sum(a * (np.eye(3)[i] - p) for a, i in zip(advantage, pair, strict=True))

    def best(theta):
        p = np.exp(theta) / np.exp(theta).sum()
        return sum(p[i] * p[j] * max(reward[i], reward[j]) for i, j in itertools.product(range(3), repeat=2))

    expected = [(best(theta + 1e-6 * e) - best(theta - 1e-6 * e)) / 2e-6 for e in np.eye(3)]
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_a_weighted_gradient_of_another_policys_rollouts_is_unbiased():
    """One token of three symbols, sampled from q, learned by p: 40,000 samples, within
    three standard errors of the exact gradient of the expected reward.
    """
    theta, reward = np.array([0.4, -0.3, 0.8]), np.array([1.0, 0.0, 0.5])
    p, q = np.exp(theta) / np.exp(theta).sum(), np.array([0.5, 0.3, 0.2])
    drawn = np.random.default_rng(0).choice(3, 40_000, p=q)
    objective = objectives.make("rloo", correct="token", correct_high=100.0)
    shape = (1, len(drawn))
    batch = SimpleNamespace(
        advantage_BT=reward[drawn][None],
        behaviour_logp_BT=np.log(q)[drawn][None],
        weight_BT=np.ones(shape),
        rollout_BT=np.arange(1, 1 + len(drawn))[None],
    )

    def slope(logp_BT):
        return objective.token_loss(Outputs(logp_BT, logp_BT), batch)[0].sum()

    weight_N = -np.asarray(jax.grad(slope)(jnp.asarray(np.log(p)[drawn][None])))[0]
    samples_N3 = weight_N[:, None] * (np.eye(3)[drawn] - p)
    exact = p * (reward - p @ reward)
    error = samples_N3.std(axis=0) / math.sqrt(len(drawn))
    assert np.all(np.abs(samples_N3.mean(axis=0) - exact) < 3 * error)
    naive = (reward[drawn][:, None] * (np.eye(3)[drawn] - p)).mean(axis=0)
    assert np.any(np.abs(naive - exact) > 10 * error)


# --- masks, bounds and statistics ---


def test_a_dual_clip_bounds_the_loss_of_wrong_tokens():
    drawn = problem(0)
    drawn.p[0][1][:] = -0.01
    drawn.q[0][1][:] = -8.0  # a wrong attempt, which has become 3,000 times as likely
    free, bounded = objectives.make("grpo"), objectives.make("grpo", clip_dual=3.0)
    batch = batch_of(drawn, free)
    logp_BT = jnp.asarray(on_grid(drawn.p, batch), jnp.float32)
    here_BT = (batch.rollout_BT == 2) & (batch.weight_BT != 0)
    losses = [np.asarray(o.token_loss(Outputs(logp_BT, logp_BT), batch)[0]) for o in (free, bounded)]
    assert losses[0][here_BT].min() > 1000
    np.testing.assert_allclose(losses[1][here_BT], -3.0 * batch.advantage_BT[here_BT], rtol=1e-5)
    np.testing.assert_array_equal(losses[0][batch.rollout_BT != 2], losses[1][batch.rollout_BT != 2])


def test_stale_wrong_rollouts_are_left_out():
    drawn = problem(0)
    drawn.p[0] = [np.full(len(x), -3.0) for x in drawn.p[0]]
    drawn.q[0] = [np.full(len(x), -1.0) for x in drawn.q[0]]
    objective = objectives.make("dr_grpo", stale_limit=1.5)
    batch = batch_of(drawn, objective)
    logp_BT = jnp.asarray(on_grid(drawn.p, batch), jnp.float32)
    loss_BT, statistics_ = objective.token_loss(Outputs(logp_BT, logp_BT), batch)
    for number, reward in enumerate(drawn.reward[0], start=1):
        here = (batch.rollout_BT == number) & (batch.weight_BT != 0)
        assert (np.asarray(loss_BT)[here] != 0).all() == (reward == 1)
        assert np.asarray(statistics_["stale"])[here].all() == (reward == 0)


def test_a_ratio_that_a_loss_has_itself_is_only_masked():
    with pytest.raises(ValueError, match="has an importance ratio already; allowed: correct_by='mask'"):
        objectives.make("grpo", correct="token")
    masked = objectives.make("grpo", correct="token", correct_by="mask", correct_low=0.9, correct_high=1.1)
    drawn = problem(0)
    batch = batch_of(drawn, masked)
    logp_BT = jnp.asarray(on_grid(drawn.p, batch), jnp.float32)
    loss_BT, _ = masked.token_loss(Outputs(logp_BT, logp_BT), batch)
    plain_BT, _ = objectives.make("grpo").token_loss(Outputs(logp_BT, logp_BT), batch)
    ratio = np.exp(on_grid(drawn.p, batch) - batch.behaviour_logp_BT)
    inside = (ratio > 0.9) & (ratio < 1.1)
    np.testing.assert_array_equal(np.asarray(loss_BT), np.where(inside, plain_BT, 0.0))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("rloo", {"correct": "word"}, "correct got 'word'; allowed: none, token, sequence"),
        ("sft", {"correct": "token"}, "correct='token', but the objective imitates the tokens of its batch; allowed: None"),
        ("expert_iteration", {"correct": "sequence", "correct_by": "mask"}, "the objective imitates"),
        ("rloo", {"correct": "token", "correct_by": "drop"}, "correct_by got 'drop'; allowed: truncate, mask"),
        ("rloo", {"correct": "token", "correct_high": 0.5}, "correct_high 0.5; allowed: 0 to 1, and 1 or more"),
        ("grpo", {"negative_scale": -1.0}, "negative_scale got -1.0; allowed: 0 or more"),
        ("grpo", {"clip_low": -0.1}, "clip got -0.1 below 1"),
        ("grpo", {"clip_dual": 1.1}, "clip_dual got 1.1; allowed: above 1"),
        ("grpo", {"stale_limit": -1.0}, "stale_limit got -1.0; allowed: 0 or more, or None"),
        ("dppo", {"divergence": "js"}, "divergence got 'js'; allowed: tv, kl"),
        ("sapo", {"tau_negative": 0.0}, "tau_negative=0.0; allowed: above 0"),
        ("pass_at_k", {"k": 1}, "k got 1; allowed: 2 to the number of attempts"),
    ],
)
def test_wrong_numbers_are_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        objectives.make(name, **fields)


def test_maxrl_takes_no_negative_rewards():
    with pytest.raises(ValueError, match=r"got a reward of -1\.0; allowed: 0 or more"):
        objectives.make("maxrl").advantage(np.array([[1.0, -1.0]]))


def test_negative_advantages_are_scaled():
    objective = objectives.make("dr_grpo", negative_scale=0.5)
    np.testing.assert_allclose(objective.advantage(np.array([[1.0, 0, 0, 1]])), [[0.5, -0.25, -0.25, 0.5]])


def test_statistics_of_the_ratio():
    drawn = problem(0)
    objective = objectives.make("grpo")
    batch = batch_of(drawn, objective)
    logp_BT = jnp.asarray(on_grid(drawn.p, batch), jnp.float32)
    _, found = objective.token_loss(Outputs(logp_BT, logp_BT), batch)
    trained = batch.weight_BT != 0
    gaps = [[drawn.p[i][j][t] - drawn.q[i][j][t] for t in kept(drawn, i, j)] for i in range(P) for j in range(G)]
    ratios = np.exp(np.concatenate(gaps))
    np.testing.assert_allclose(np.asarray(found["log_ratio_worst"])[trained].max(), np.abs(np.concatenate(gaps)).max(), rtol=1e-5)
    worst = max(abs(sum(gap)) for gap in gaps)
    np.testing.assert_allclose(np.asarray(found["log_ratio_of_rollout_worst"])[trained].max(), worst, rtol=1e-5)
    pairs = {name: (np.asarray(found[name])[trained].sum(), trained.sum()) for name in ("ratio", "ratio_squared")}
    named = learner.name_metrics(pairs, sampled=True)
    value, count = named["train/effective_sample_size"]
    np.testing.assert_allclose(value / count, ratios.sum() ** 2 / (len(ratios) * (ratios**2).sum()), rtol=1e-5)
    assert "train/ratio_squared" not in named
