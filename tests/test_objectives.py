"""Advantages, weightings and token losses: numbers worked out by hand, slow loops,
exact enumeration, and rlax.
"""

import inspect
import itertools
import statistics
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import grouped, load_config

from jaxreason import batching, objectives
from jaxreason.options import command
from jaxreason.types import Outputs, Rollout, Task, Verdict

REWARD_PG = np.array([[1.0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]])
ROOT3 = 3**0.5


def tokens(logp, advantage=0.0, behaviour=0.0, reference=None, entropy=0.0, divergence=0.0):
    """Make outputs and a batch of one row, with only the fields that a token loss
    reads.
    """
    logp_BT = jnp.atleast_2d(jnp.asarray(logp, jnp.float32))

    def like(x):
        return jnp.broadcast_to(jnp.asarray(x, jnp.float32), logp_BT.shape)

    batch = SimpleNamespace(
        advantage_BT=like(advantage),
        behaviour_logp_BT=like(behaviour),
        weight_BT=jnp.ones_like(logp_BT),
        rollout_BT=jnp.ones(logp_BT.shape, jnp.int32),
        value_BT=like(0.0),
        return_BT=like(0.0),
        reference_logp_BT=None if reference is None else like(reference),
    )
    return Outputs(logp_BT, like(entropy), like(0.0), like(divergence)), batch


# --- advantages ---


@pytest.mark.parametrize(
    ("name", "expected_PG"),
    [
        ("ones", np.ones((3, 4))),
        ("centre_batch", REWARD_PG - 7 / 12),
        ("centre_group", [[0.5, -0.5, -0.5, 0.5], [-0.25, -0.25, -0.25, 0.75], [0] * 4]),
        ("leave_one_out", [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [-1 / 3, -1 / 3, -1 / 3, 1], [0] * 4]),
        ("zscore_group", [[1, -1, -1, 1], [-1 / ROOT3, -1 / ROOT3, -1 / ROOT3, ROOT3], [0] * 4]),
        ("keep_positive", REWARD_PG),
    ],
)
def test_advantage_by_hand(name, expected_PG):
    np.testing.assert_allclose(objectives.ADVANTAGES[name](REWARD_PG), expected_PG, atol=1e-5)


def flat(reward_PG):
    return [*itertools.chain.from_iterable(reward_PG)]


SLOW = {
    "ones": lambda reward_PG, p, g: 1.0,
    "centre_batch": lambda reward_PG, p, g: reward_PG[p][g] - sum(map(sum, reward_PG)) / sum(map(len, reward_PG)),
    "centre_group": lambda reward_PG, p, g: reward_PG[p][g] - sum(reward_PG[p]) / len(reward_PG[p]),
    "leave_one_out": lambda reward_PG, p, g: (
        reward_PG[p][g] - sum(reward_PG[p][:g] + reward_PG[p][g + 1 :]) / (len(reward_PG[p]) - 1)
    ),
    "zscore_group": lambda reward_PG, p, g: (
        (reward_PG[p][g] - sum(reward_PG[p]) / len(reward_PG[p]))
        / (sum((r - sum(reward_PG[p]) / len(reward_PG[p])) ** 2 for r in reward_PG[p]) / len(reward_PG[p])) ** 0.5
    ),
    "keep_positive": lambda reward_PG, p, g: float(reward_PG[p][g] > 0),
    "zscore_batch": lambda reward_PG, p, g: (
        (reward_PG[p][g] - statistics.fmean(flat(reward_PG))) / statistics.pstdev(flat(reward_PG))
    ),
    "centre_group_scale_batch": lambda reward_PG, p, g: (
        (reward_PG[p][g] - statistics.fmean(reward_PG[p]))
        / statistics.pstdev([r - statistics.fmean(group) for group in reward_PG for r in group])
    ),
    "rewards": lambda reward_PG, p, g: reward_PG[p][g],
    "divide_by_mean": lambda reward_PG, p, g: reward_PG[p][g] / statistics.fmean(reward_PG[p]) - 1,
}


@pytest.mark.parametrize("name", objectives.ADVANTAGES)
def test_advantage_against_a_slow_loop(name):
    reward_PG = np.random.default_rng(0).normal(size=(5, 3)).round(2)
    reward_PG += 4.0 * (name == "divide_by_mean")  # which takes no negative rewards
    slow = [[SLOW[name](reward_PG.tolist(), p, g) for g in range(3)] for p in range(5)]
    np.testing.assert_allclose(objectives.ADVANTAGES[name](reward_PG), slow, rtol=1e-4)


@pytest.mark.parametrize("baseline", objectives.GROUP_BASELINES)
def test_equal_rewards_give_an_advantage_of_exactly_zero(baseline):
    residue = 0.0
    for G in (2, 3, 7, 8):
        reward_PG = np.full((2, G), 0.1)
        residue += abs(reward_PG - reward_PG.mean(axis=1, keepdims=True)).sum()
        assert np.array_equal(baseline(reward_PG), np.zeros((2, G))), f"{G} equal rewards"
    assert residue > 0, "the mean of equal numbers has no float residue here: this test needs other numbers"


@pytest.mark.parametrize("baseline", [b for b in objectives.GROUP_BASELINES if "batch" not in b.__name__])
def test_groups_do_not_see_each_other(baseline):
    alone = baseline(REWARD_PG[:1])
    np.testing.assert_array_equal(baseline(REWARD_PG)[:1], alone)


def test_keep_correct_drops_zero_and_negative_rewards():
    assert objectives.keep_positive(np.array([[-1.0, 0.0, 0.1, 2.0]])).tolist() == [[0, 0, 1, 1]]


# --- weightings ---


@pytest.mark.parametrize(
    ("name", "expected_R"),
    [
        ("token_sum", [1 / 3] * 3),
        ("per_sequence", [1 / 6, 1 / 3, 1 / 15]),
        ("per_token", [1 / 8] * 3),
        ("per_kept_token", [1 / 7, 0, 1 / 7]),
        ("per_max_length", [1 / 30] * 3),
        ("per_prompt", [1 / 8] * 3),
        ("per_mixed_prompt", [1 / 8] * 3),
    ],
)
def test_weighting_by_hand(name, expected_R):
    weight_PG = objectives.WEIGHTINGS[name](np.array([[2, 1, 5]]), np.array([[1.0, 0, -1]]), 10)
    np.testing.assert_allclose(weight_PG, [expected_R])


def test_a_mean_inside_each_group_gives_groups_the_same_weight():
    length_PG = np.array([[1, 1], [9, 1]])
    weight_PG = objectives.WEIGHTINGS["per_prompt"](length_PG, np.ones((2, 2)), 10)
    np.testing.assert_allclose(weight_PG, [[1 / 4] * 2, [1 / 20] * 2])
    np.testing.assert_allclose((weight_PG * length_PG).sum(axis=1), 1 / 2)


def test_groups_of_equal_rewards_do_not_count_in_the_mean_over_mixed_prompts():
    length_PG = np.array([[1, 1], [9, 1], [2, 3]])
    advantage_PG = objectives.centre_group(np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]))
    weight_PG = objectives.WEIGHTINGS["per_mixed_prompt"](length_PG, advantage_PG, 10)
    np.testing.assert_allclose(weight_PG, [[1 / 4] * 2, [0, 0], [1 / 10] * 2])
    mixed = objectives.WEIGHTINGS["per_prompt"](length_PG[[0, 2]], advantage_PG[[0, 2]], 10)
    np.testing.assert_allclose(weight_PG[[0, 2]], mixed)  # as if the others had not been sampled


@pytest.mark.parametrize("name", objectives.WEIGHTINGS)
def test_weights_add_up_to_one(name):
    rng = np.random.default_rng(0)
    length_PG, advantage_PG = rng.integers(1, 9, (2, 3)), np.array([[0.0, 1, 1], [0, -1, 1]])
    if name == "per_max_length":
        length_PG[:] = 9  # a constant denominator: one only for rollouts of full length
    if name == "token_sum":
        length_PG[:] = 1  # a sum, not a mean: one only for rollouts of one token
    weight_PG = objectives.WEIGHTINGS[name](length_PG, advantage_PG, 9)
    assert weight_PG.shape == (2, 3)
    np.testing.assert_allclose((weight_PG * length_PG).sum(), 1)


@pytest.mark.parametrize("name", objectives.WEIGHTINGS)
def test_nothing_to_train_on_gives_finite_weights(name):
    weight_PG = objectives.WEIGHTINGS[name](np.zeros((1, 3), int), np.zeros((1, 3)), 10)
    assert np.isfinite(weight_PG).all()


def test_expert_iteration_trains_on_what_was_kept_and_on_nothing_else():
    def rollout(reward, length):
        return Rollout(
            Task("", ""), 0, 0, np.array([1, 2]), np.arange(length), np.zeros(length), np.ones(length, bool), "eos", "",
            Verdict(reward, reward > 0),
        )  # fmt: skip

    objective = objectives.make("expert_iteration")
    rollouts = [rollout(1.0, 3), rollout(0.0, 4), rollout(-1.0, 2), rollout(1.0, 1)]
    batch = batching.from_groups(grouped(rollouts, 2), objective, buckets=(8,), limit=6)
    expected = np.zeros((4, 8))
    expected[0, 2:5] = expected[3, 2:3] = 1 / 4
    np.testing.assert_allclose(batch.weight_BT, expected, rtol=1e-6)

    def loss(logp_BT):
        return (batch.weight_BT * objective.token_loss(Outputs(logp_BT, logp_BT), batch)[0]).sum()

    np.testing.assert_allclose(jax.grad(loss)(jnp.full((4, 8), -1.0)), -expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "dapo", "rloo"])
def test_rollouts_that_were_cut_off_are_in_or_out(name):
    def rollout(reward, length, stop):
        return Rollout(
            Task("", ""), 0, 0, np.array([1, 2]), np.arange(length), np.zeros(length), np.ones(length, bool), stop, "",
            Verdict(reward, reward > 0),
        )  # fmt: skip

    group = grouped([rollout(1.0, 2, "eos"), rollout(0.0, 6, "limit"), rollout(0.0, 4, "eos"), rollout(1.0, 3, "eos")], 4)
    whole, without = (batching.from_groups(group, objectives.make(name, cut=cut), buckets=(8,), limit=6) for cut in ("in", "out"))
    np.testing.assert_array_equal(whole.advantage_BT, without.advantage_BT)  # it stays in the baseline
    assert (whole.weight_BT[1, 2:] > 0).all()
    assert not without.weight_BT[1].any()
    if name == "dapo":  # a mean over the tokens that are trained on
        np.testing.assert_allclose([whole.weight_BT.max(), without.weight_BT.max()], [1 / 15, 1 / 9], rtol=1e-6)
    if name != "dapo":
        np.testing.assert_array_equal(whole.weight_BT[[0, 2, 3]], without.weight_BT[[0, 2, 3]])
    with pytest.raises(ValueError, match="cut got 'drop'; allowed: in, out"):
        objectives.make(name, cut="drop")


# --- token losses ---


@pytest.mark.parametrize(
    ("ratio", "advantage", "lo", "hi", "loss", "gradient", "clipped"),
    [
        (1.1, 2.0, 0.2, 0.2, -2.2, -2.2, False),
        (1.5, 1.0, 0.2, 0.2, -1.2, 0.0, True),  # a gain that is already taken pulls no further
        (1.5, -1.0, 0.2, 0.2, 1.5, 1.5, False),  # the wrong way: the whole gradient pulls back
        (0.5, 1.0, 0.2, 0.2, -0.5, -0.5, False),
        (0.5, -1.0, 0.2, 0.2, 0.8, 0.0, True),
        (1.25, 1.0, 0.2, 0.28, -1.25, -1.25, False),  # the two sides apart, as in DAPO
        (1.3, 1.0, 0.2, 0.28, -1.28, 0.0, True),
        (0.75, -1.0, 0.2, 0.28, 0.8, 0.0, True),
        (0.75, -1.0, 0.28, 0.2, 0.75, 0.75, False),
    ],
)
def test_clipped_by_hand(ratio, advantage, lo, hi, loss, gradient, clipped):
    def total(logp):
        loss_BT, stats = objectives.clipped(lo, hi)(*tokens(logp, advantage, behaviour=-1.0))
        return loss_BT.sum(), stats

    (value, stats), slope = jax.value_and_grad(total, has_aux=True)(np.log(ratio) - 1.0)
    np.testing.assert_allclose((value, slope), (loss, gradient), rtol=1e-5)
    np.testing.assert_allclose(stats["ratio"], ratio, rtol=1e-5)
    assert bool(stats["clip_fraction"][0, 0]) == clipped


def test_clipped_against_rlax():
    rlax = pytest.importorskip("rlax")
    rng = np.random.default_rng(0)
    logp, behaviour = rng.normal(-2, 0.5, (2, 64)).astype(np.float32)
    advantage = rng.normal(size=64).astype(np.float32)

    def ours(logp):
        return objectives.clipped(0.2, 0.2)(*tokens(logp, advantage, behaviour))[0].mean()

    def theirs(logp):
        return rlax.clipped_surrogate_pg_loss(jnp.exp(logp - behaviour), advantage, 0.2)

    np.testing.assert_allclose(ours(logp), theirs(logp), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(logp), jax.grad(theirs)(logp), rtol=1e-5)


def test_reinforce_against_rlax():
    rlax = pytest.importorskip("rlax")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(32, 5)).astype(np.float32)
    action, advantage = rng.integers(0, 5, 32), rng.normal(size=32).astype(np.float32)

    def ours(logits):
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], axis=1)[:, 0]
        return objectives.reinforce(*tokens(logp, advantage))[0].mean()

    def theirs(logits):
        return rlax.policy_gradient_loss(logits, action, advantage, np.ones(32, np.float32))

    np.testing.assert_allclose(ours(logits), theirs(logits), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(logits), jax.grad(theirs)(logits), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("token_loss", [objectives.nll, objectives.reinforce])
def test_score_losses_by_hand(token_loss):
    loss_BT, _ = token_loss(*tokens([-1.0, -2.0, -3.0], [1.0, -0.5, 0.0]))
    np.testing.assert_allclose(loss_BT, [[1.0, -1.0, 0.0]])


# --- KL and entropy, by enumeration of a policy over three symbols ---

THETA = jnp.array([0.3, -0.7, 0.9])
REFERENCE = jax.nn.log_softmax(jnp.array([-0.2, 0.5, 0.1]))


def divergence(logp, logq):
    return jnp.sum(jnp.exp(logp) * (logp - logq))


def forward(theta):
    return divergence(jax.nn.log_softmax(theta), REFERENCE)


def reverse(theta):
    return divergence(REFERENCE, jax.nn.log_softmax(theta))


def half_square(theta):
    logp = jax.nn.log_softmax(theta)
    return jnp.sum(jnp.exp(logp) * (logp - REFERENCE) ** 2) / 2


def expectation(estimator, sampler=None):
    """Compute the result of an infinite batch of a sampling policy, by default the one
    that learns: the tokens' probabilities are constants, not differentiated.
    """
    sampler = jax.nn.log_softmax(THETA) if sampler is None else sampler

    def value(theta):
        logp = jax.nn.log_softmax(theta)
        return jnp.sum(jnp.exp(sampler) * estimator(logp, REFERENCE, logp - sampler))

    return value


@pytest.mark.parametrize(
    ("name", "value", "gradient_of"),
    [("k1", forward, forward), ("k2", half_square, forward), ("k3_reverse", forward, reverse), ("k3_weighted", forward, forward)],
)
def test_kl_estimator_against_the_closed_form(name, value, gradient_of):
    estimate, slope = jax.value_and_grad(expectation(objectives.KL_ESTIMATORS[name]))(THETA)
    np.testing.assert_allclose(estimate, value(THETA), rtol=1e-5)
    np.testing.assert_allclose(slope, jax.grad(gradient_of)(THETA), rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(slope).max()) > 0.05


def test_the_weighted_estimator_is_right_for_any_sampling_policy():
    sampler = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    estimate, slope = jax.value_and_grad(expectation(objectives.KL_ESTIMATORS["k3_weighted"], sampler))(THETA)
    np.testing.assert_allclose(estimate, forward(THETA), rtol=1e-5)
    np.testing.assert_allclose(slope, jax.grad(forward)(THETA), rtol=1e-4, atol=1e-6)
    for name in ("k1", "k2", "k3_reverse"):
        other = jax.grad(expectation(objectives.KL_ESTIMATORS[name], sampler))(THETA)
        assert float(jnp.abs(other - slope).max()) > 0.05, name


def test_naive_k1_would_have_no_gradient():
    slope = jax.grad(expectation(lambda logp, reference_logp, log_ratio: logp - reference_logp))(THETA)
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_every_kl_estimator_is_tested():
    assert set(objectives.KL_ESTIMATORS) == {"k1", "k2", "k3_reverse", "k3_weighted", "exact"}  # the last one in test_distil


@pytest.mark.parametrize("estimator", [name for name in objectives.KL_ESTIMATORS if name != "exact"])
def test_with_kl_adds_coefficient_times_estimate(estimator):
    plain = objectives.make("grpo")
    wrapped = objectives.make("grpo", kl_coefficient=0.25, kl_estimator=estimator)
    assert wrapped.needs_reference
    assert not plain.needs_reference
    assert wrapped.needs_group
    assert wrapped[:2] == plain[:2]
    seen = tokens([-1.0, -2.0], advantage=[1.0, -1.0], behaviour=[-1.1, -1.9], reference=[-1.5, -1.0])
    (loss_BT, stats), (plain_BT, plain_stats) = wrapped.token_loss(*seen), plain.token_loss(*seen)
    kl_BT = objectives.KL_ESTIMATORS[estimator](
        seen[0].logp_BT, seen[1].reference_logp_BT, seen[0].logp_BT - seen[1].behaviour_logp_BT
    )
    np.testing.assert_allclose(loss_BT, plain_BT + 0.25 * kl_BT, rtol=1e-6)
    np.testing.assert_allclose(stats["kl"], kl_BT)
    assert stats.keys() == {*plain_stats, "kl"}
    k3 = np.array([np.exp(-0.5) - 0.5, np.e - 2])
    weighted = k3 * np.exp([0.1, -0.1])
    by_hand = {"k1": [0.5, -1.0], "k2": [0.125, 0.5], "k3_reverse": k3, "k3_weighted": weighted}[estimator]
    np.testing.assert_allclose(kl_BT[0], by_hand, rtol=1e-5)


def test_runs_of_earlier_versions_keep_their_kl_estimator():
    from jaxreason.build import from_earlier

    config = load_config("tiny", "smoke").to_dict()
    config["rl"]["objective"]["kl_estimator"] = "k3"  # today's k3_reverse
    assert from_earlier(config)[0]["rl"]["objective"]["kl_estimator"] == "k3_reverse"
    del config["rl"]["objective"]["kl_estimator"]
    assert from_earlier(config)[0]["rl"]["objective"]["kl_estimator"] == "k3_weighted"


@pytest.mark.parametrize(
    ("field", "value"), [("kl_estimator", "k1"), ("correct_by", "mask"), ("correct_low", "0.5"), ("correct_high", "1.5")]
)
def test_a_field_that_nothing_reads_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"^config\.rl\.objective\.{field} got .*, so nothing reads it; set both$"):
        command.read("configs/tiny.py:smoke", {f"rl.objective.{field}": value, "rl.objective.correct": "none"})
    if field != "kl_estimator":  # None corrects an objective without a ratio, and no other one
        command.read("configs/tiny.py:smoke", {f"rl.objective.{field}": value})
        with pytest.raises(ValueError, match=r"but correct is none, so nothing reads it"):
            command.read("configs/tiny.py:smoke", {f"rl.objective.{field}": value, "rl.objective.name": "grpo"})


def test_with_entropy_rewards_entropy():
    plain, wrapped = objectives.make("rloo"), objectives.make("rloo", entropy_coefficient=0.5)
    seen = tokens([-1.0, -2.0], advantage=1.0, entropy=[0.3, 0.7])
    np.testing.assert_allclose(wrapped.token_loss(*seen)[0], plain.token_loss(*seen)[0] - jnp.array([[0.15, 0.35]]))
    assert not wrapped.needs_reference

    def total(theta):
        logp = jax.nn.log_softmax(theta)
        entropy = -jnp.sum(jnp.exp(logp) * logp)
        return wrapped.token_loss(*tokens(0.0, entropy=entropy))[0].sum(), entropy

    slope, before = jax.grad(total, has_aux=True)(THETA)
    assert total(THETA - 0.1 * slope)[1] > before


# --- make ---


@pytest.mark.parametrize(
    ("name", "advantage", "weigh"),
    [
        ("lm", "ones", "per_token"),
        ("sft", "ones", "per_token"),
        ("reinforce", "centre_batch", "token_sum"),
        ("rloo", "leave_one_out", "token_sum"),
        ("grpo", "zscore_group", "per_sequence"),
        ("dr_grpo", "centre_group", "per_max_length"),
        ("dapo", "zscore_group", "per_token"),
        ("expert_iteration", "keep_positive", "per_kept_token"),
        ("reinforce_pp", "zscore_batch", "per_token"),
        ("maxrl", "divide_by_mean", "token_sum"),
        ("gspo", "zscore_group", "per_sequence"),
        ("cispo", "zscore_group", "per_token"),
        ("dppo", "centre_group", "per_max_length"),
        ("sapo", "zscore_group", "per_sequence"),
    ],
)
def test_named_algorithm(name, advantage, weigh):
    made = objectives.make(name)
    assert made.advantage is objectives.ADVANTAGES[advantage]
    assert made.weigh is objectives.WEIGHTINGS[weigh]
    assert made.needs_group == (made.advantage in objectives.GROUP_BASELINES)


@pytest.mark.parametrize(
    ("name", "fields", "up", "down"),
    [
        ("grpo", {}, 1.2, 0.8),
        ("grpo", {"clip_low": 0.1, "clip_high": 0.1}, 1.1, 0.9),
        ("dr_grpo", {"clip_low": 0.3, "clip_high": 0.3}, 1.3, 0.7),
        ("dapo", {}, 1.28, 0.8),
        ("dapo", {"clip_low": 0.1, "clip_high": 0.5}, 1.5, 0.9),
    ],
)
def test_numbers_of_an_algorithm_reach_its_loss(name, fields, up, down):
    loss_BT, _ = objectives.make(name, **fields).token_loss(*tokens(np.log([9.0, 0.01]), advantage=[1.0, -1.0]))
    np.testing.assert_allclose(loss_BT, [[-up, down]], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("grop", {}, r"unknown objective 'grop' \(did you mean 'grpo'\?\); one of: cispo, dapo, "),
        ("grpo", {"advantage": "z_score"}, r"unknown advantage 'z_score'.*zscore_group"),
        ("grpo", {"weigh": "per_word"}, r"unknown weighting 'per_word'.*per_token"),
        ("grpo", {"kl_coefficient": 0.1, "kl_estimator": "k4"}, r"unknown KL estimator 'k4'.*k1, k2, k3_reverse"),
        ("grpo", {"kl_coefficient": 0.1, "kl_estimator": "k3"}, r"unknown KL estimator 'k3'.*GRPO, TRL and verl is k3_reverse"),
        ("dapo", {"clip": 0.2}, r"unknown field of objective 'dapo' 'clip'.*clip_high, clip_low"),
        ("sft", {"lr": 0.2}, r"unknown field of objective 'sft' 'lr'.*none"),
        ("sft", {"negative_scale": 0.5}, r"negative_scale got 0.5 with objective 'sft', which has no negative advantages"),
        ("distil", {"negative_scale": 0.5}, r"which has no negative advantages; allowed: 1"),
        ("ppo", {"negative_scale": 0.5}, r"with objective 'ppo', whose advantages a critic makes; allowed: 1"),
        ("ppo", {"weigh": "per_mixed_prompt"}, r"weigh got 'per_mixed_prompt', which leaves out .* whose advantages a critic"),
        ("ppo", {"weigh": "per_kept_token"}, r"weigh got 'per_kept_token', which leaves out"),
    ],
)
def test_unknown_names_are_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        objectives.make(name, **fields)


def test_ablation_is_a_cross_product():
    seen = tokens([-1.0, -2.0], advantage=[1.0, -1.0], behaviour=[-1.5, -1.5], reference=[-1.0, -1.2], entropy=0.5)
    lists = objectives.OBJECTIVES, objectives.ADVANTAGES, objectives.WEIGHTINGS
    # A critic makes advantages after the weights, so these can't depend on them.
    late = {"per_mixed_prompt", "per_kept_token"}
    chosen = [(name, a, w) for name, a, w in itertools.product(*lists) if name != "ppo" or w not in late]
    made = [objectives.make(name, advantage=a, weigh=w) for name, a, w in chosen]
    assert len(made) == len(objectives.OBJECTIVES) * 10 * 7 - 20
    for objective, (name, a, w) in zip(made, chosen, strict=True):
        assert objective.advantage is objectives.ADVANTAGES[a]
        assert objective.weigh is objectives.WEIGHTINGS[w]
        grouped = ("centre_group", "leave_one_out", "zscore_group", "centre_group_scale_batch", "divide_by_mean")
        assert objective.needs_group == (a in grouped)
        assert inspect.unwrap(objective.token_loss).__qualname__ == objectives.make(name).token_loss.__qualname__
        assert objective.weigh(np.array([[2, 1, 5]]), objective.advantage(REWARD_PG[:1, :3]), 10).shape == (1, 3)
    for name, kl in itertools.product(objectives.OBJECTIVES, objectives.KL_ESTIMATORS):
        if kl == "exact" and objectives.make(name).divergence is not None:
            continue
        whole = objectives.make(name, kl_coefficient=0.1, kl_estimator=kl, entropy_coefficient=0.1)
        assert jnp.isfinite(whole.token_loss(*seen)[0]).all()


# --- the gradient of the expected reward, by enumeration ---

WORDS, LONGEST = 3, 3  # word 0 ends a rollout; one of LONGEST words is cut


def all_rollouts(prefix=()):
    """List every rollout of a policy over WORDS tokens."""
    if prefix and (prefix[-1] == 0 or len(prefix) == LONGEST):
        return [prefix]
    return [rollout for word in range(WORDS) for rollout in all_rollouts((*prefix, word))]


def expected_gradients(seed, name, **fields):
    """Return the gradient of the expected reward, and the expected gradient of an
    objective with groups of two.
    """
    rng = np.random.default_rng(seed)
    every = all_rollouts()
    states = sorted({rollout[:t] for rollout in every for t in range(len(rollout))})
    prob_SV = rng.dirichlet(np.ones(WORDS), len(states))
    length_R, reward_R = np.array([len(r) for r in every]), rng.integers(0, 2, len(every)).astype(float)
    prob_R, score_RSV = np.ones(len(every)), np.zeros((len(every), *prob_SV.shape))
    for i, rollout in enumerate(every):
        for t, word in enumerate(rollout):
            state = states.index(rollout[:t])
            prob_R[i] *= prob_SV[state, word]
            score_RSV[i, state] += np.eye(WORDS)[word] - prob_SV[state]  # of the log-softmax, by its logits
    objective = objectives.make(name, **fields)
    found = 0.0
    for i, j in itertools.product(range(len(every)), repeat=2):
        pair = [i, j]
        advantage_PG = objective.advantage(reward_R[pair][None])
        weight_PG = objective.weigh(length_R[pair][None], advantage_PG, LONGEST)
        found = found + prob_R[i] * prob_R[j] * np.tensordot((weight_PG * advantage_PG)[0], score_RSV[pair], 1)
    return np.tensordot(prob_R * reward_R, score_RSV, 1), found


def cosine(a, b):
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())


@pytest.mark.parametrize("name", ["reinforce", "rloo"])
def test_the_expected_gradient_is_that_of_the_expected_reward(name):
    """Williams 1992 and Ahmadian et al. 2024 sum over tokens; a mean over a rollout's
    tokens gives another direction.
    """
    ours, means = [], []
    for seed in range(40):
        exact, found = expected_gradients(seed, name)
        ours.append(cosine(exact, found))
        means.append(cosine(*expected_gradients(seed, name, weigh="per_sequence")))
        if name == "rloo":
            np.testing.assert_allclose(found, exact, atol=1e-12)
    assert min(ours) > 1 - 1e-9
    assert max(means) < 1 - 1e-6
    assert np.mean(means) < 0.99
