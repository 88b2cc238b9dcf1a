"""Several rewards per rollout: measures of verdicts as what an objective learns from."""

from __future__ import annotations

import numpy as np
import pytest
from runs import load_config

from jaxreason import batching, objectives, verify
from jaxreason.build import build
from jaxreason.objectives import credit
from jaxreason.sources import sampling
from jaxreason.types import Group, Rollout, Task, Verdict

UNJUDGED = Verdict(0.0, False, None, "cut off")


def measured(**measures) -> Verdict:
    return Verdict(sum(measures.values()), False, "4", measures=measures)


def group(*verdicts) -> Group:
    n = len(verdicts)
    tokens, logp = np.arange(3, dtype=np.int32), np.zeros(3, np.float32)
    return Group(
        tuple(
            Rollout(Task("", ""), 0, i, np.array([1, 2]), tokens, logp, np.ones(3, bool), "eos", "", verdict)
            for i, verdict in zip(range(n), verdicts, strict=True)
        )
    )


def test_the_papers_example_of_two_rewards_keeps_three_advantages():
    """Of two binary rewards and two rollouts GRPO makes one advantage of the sums 0, 1
    and 0, 2 (its figure 2); GDPO does not.
    """
    rows = [[(0, 0), (0, 1)], [(0, 0), (1, 1)]]
    reward_PGN = np.array(rows, float)
    np.testing.assert_allclose(*objectives.ADVANTAGES["zscore_group"](reward_PGN.sum(axis=2)), rtol=1e-5)
    found_PG = objectives.make("gdpo").advantage(reward_PGN)
    np.testing.assert_allclose(found_PG / found_PG[0, 1], [[-1, 1], [-2, 2]], rtol=1e-5)
    np.testing.assert_allclose(found_PG.std(), 1, rtol=1e-5)


def test_a_group_of_equal_rewards_gets_exactly_nothing_beside_others():
    reward_PGN = np.random.default_rng(0).normal(size=(3, 7, 2))
    reward_PGN[1] = 0.1, 0.7
    found_PG = objectives.make("gdpo", reward_weights=(1.0, 0.3)).advantage(reward_PGN)
    assert not found_PG[1].any()
    assert found_PG[[0, 2]].all()


def test_a_batch_takes_the_measures_and_a_failed_verdict_counts_nothing():
    objective = objectives.make("gdpo", rewards=("reward_b", "reward_a"), reward_weights=(1.0, 2.0))
    failed = Verdict(0.0, False, None, "verifier error: ZeroDivisionError")
    made = group(measured(reward_a=1.0, reward_b=0.5), failed)
    np.testing.assert_array_equal(credit.of_groups([made], objective.measures), [[[0.5, 1.0], [0.0, 0.0]]])
    batch = batching.from_groups([made], objective, buckets=(8,), limit=4)
    np.testing.assert_allclose(batching.advantages(batch), [1.0, -1.0], rtol=1e-5)
    # With an advantage by name it is the reward, as for every other objective.
    by_name = objectives.make("gdpo", advantage="centre_group")
    assert by_name.measures == ()
    np.testing.assert_allclose(batching.advantages(batching.from_groups([made], by_name, buckets=(8,), limit=4)), [0.75, -0.75])


def test_a_measure_that_no_verdict_has_is_an_error_unless_none_was_judged():
    with pytest.raises(ValueError, match=r"^no verdict of the batch has the measure 'reward_x', .*: reward_a, reward_b\."):
        credit.of_groups([group(measured(reward_a=1.0), measured(reward_b=1.0))], ("reward_a", "reward_x"))
    assert not credit.of_groups([group(UNJUDGED, UNJUDGED)], ("reward_a",)).any()


def test_groups_whose_sums_are_equal_are_informative_by_their_measures():
    equal_sums = group(measured(reward_a=1.0, reward_b=0.0), measured(reward_a=0.0, reward_b=1.0))
    equal = group(measured(reward_a=1.0, reward_b=0.0), measured(reward_a=1.0, reward_b=0.0))
    names = ("reward_a", "reward_b")
    assert credit.are_mixed(equal_sums, names)
    assert not credit.are_mixed(equal_sums)
    assert not credit.are_mixed(equal, names)
    assert sampling.most_mixed([equal, equal_sums], 1, names) == [equal_sums]
    assert sampling.most_mixed([equal, equal_sums], 1) == [equal]
    assert (sampling.missing([equal, equal_sums], 2, 3, names), sampling.missing([equal, equal_sums], 1, 3, names)) == (2, 0)


WEIGHTED = {
    "name": "weighted",
    "of": ({"name": "exact", "marker": ";A"}, {"name": "format", "pattern": "x"}),
    "weights": (1.0, 0.1),
}


def test_the_rewards_of_a_verifier_are_known_from_its_section():
    twice = {"name": "all_of", "of": ({"name": "number"}, {"name": "number"}, WEIGHTED)}
    assert verify.reward_measures(WEIGHTED) == ["reward_exact", "reward_format"]
    assert verify.reward_measures(twice) == [
        "reward_number",
        "reward_number_2",
        "reward_weighted",
        "reward_exact",
        "reward_format",
    ]
    assert verify.reward_measures({"name": "length_shaped", "of": {"name": "number"}}) == ["reward_number"]
    assert verify.reward_measures({"name": "number"}) == []
    assert verify.reward_measures({"name": "weighted", "of": ({"name": "my:own"},)}) is None
    found = verify.make(**WEIGHTED)("x;A4", Task("", "4"))
    assert set(verify.reward_measures(WEIGHTED)) == set(found.measures)


@pytest.mark.parametrize(
    ("objective", "verifier", "source", "message"),
    [
        (
            {},
            WEIGHTED,
            {},
            r"^config\.rl\.objective\.rewards has 'reward_number', .* lacks; allowed: reward_exact, reward_format$",
        ),
        (
            {},
            None,
            {},
            r"has 'reward_number', a reward that verifier 'exact' lacks; it has no parts; choose verifier 'w",
        ),
        (
            {"rewards": ("reward_exact",)},
            WEIGHTED,
            {"reward": "random"},
            r"source\.reward got 'random', but objective 'gdpo' takes",
        ),
        ({"rewards": ()}, WEIGHTED, {}, r"rewards got \(\); allowed: one or more different names"),
        ({"rewards": ("a", "a")}, WEIGHTED, {}, r"rewards got \('a', 'a'\); allowed: one or more different names"),
        (
            {"rewards": ("a",), "reward_weights": (1.0, 2.0)},
            WEIGHTED,
            {},
            r"reward_weights got \(1\.0, 2\.0\) for 1 rewards; allowed",
        ),
    ],
)
def test_what_several_rewards_need_is_said_before_the_run(objective, verifier, source, message):
    config = load_config("tiny", "smoke", **{f"rl.source.{name}": value for name, value in source.items()})
    config.rl.objective = {"name": "gdpo", **objective}
    if verifier is not None:
        config.verifier = verifier
    with pytest.raises(ValueError, match=message):
        build(config, say=[].append)


def test_a_phase_with_several_rewards_is_built():
    config = load_config("tiny", "smoke", **{"rl.source.dynamic_sampling": 2})
    config.verifier = WEIGHTED
    config.rl.objective = {"name": "gdpo", "rewards": ("reward_exact", "reward_format", "tool_calls")}
    assert build(config, say=[].append).phases[1].objective.measures == ("reward_exact", "reward_format", "tool_calls")
