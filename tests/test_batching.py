"""Batches from hand-built rollouts, demonstrations and windows: trained tokens, their
weights, and the arrays beside them.
"""

import numpy as np
import pytest
from runs import grouped

from jaxreason import objectives
from jaxreason.batching import (
    advantages,
    computed_tokens,
    from_demonstrations,
    from_groups,
    from_windows,
    lay_out,
    length_buckets,
)
from jaxreason.types import Rollout, Task, Verdict

EOS = 0  # and padding


def rollout(prompt, tokens, reward=0.0, *, sampled=None, logp=None, temperature=1.0):
    n = len(tokens)
    return Rollout(
        task=Task("", ""),
        problem=0,
        attempt=0,
        prompt=np.array(prompt, np.int32),
        tokens=np.array(tokens, np.int32),
        logp=np.array(logp if logp is not None else -np.arange(1.0, n + 1), np.float32),
        sampled=np.ones(n, bool) if sampled is None else np.array(sampled, bool),
        stop="eos" if n and tokens[-1] == EOS else "limit",
        text="",
        verdict=Verdict(reward, reward > 0),
        temperature=temperature,
    )


def batch_of(rollouts, objective=None, group=2, buckets=(8, 16), limit=10):
    return from_groups(grouped(rollouts, group), objective or objectives.dr_grpo(), buckets=buckets, limit=limit)


# --- rollouts ---


def test_a_batch_by_hand():
    rollouts = [
        rollout([5, 6, 7], [1, 2, EOS], 1.0, logp=[-0.1, -0.2, -0.3], temperature=0.7),  # pad = EOS: the end is trained on
        rollout([5, 6, 7], [EOS], 0.0, logp=[-0.4], temperature=0.7),  # immediate end
        rollout([9], [1, 2, 3, 4], 1.0, logp=[-1, -2, -3, -4]),  # no end
        rollout([9], [3, 8, 8, 2, EOS], 0.0, logp=[-5, 0, 0, -6, -7], sampled=[1, 0, 0, 1, 1]),  # a tool spoke
    ]
    batch = batch_of(rollouts)
    assert advantages(batch) == [0.5, -0.5, 0.5, -0.5]
    assert batch.tokens_BT.tolist() == [
        [5, 6, 7, 1, 2, EOS, 0, 0],
        [5, 6, 7, EOS, 0, 0, 0, 0],
        [9, 1, 2, 3, 4, 0, 0, 0],
        [9, 3, 8, 8, 2, EOS, 0, 0],
    ]
    assert batch.segment_BT.tolist() == [[1] * n + [0] * (8 - n) for n in (6, 4, 5, 6)]
    assert batch.position_BT.tolist() == [list(range(8))] * 4
    w = 1 / (4 * 10)
    np.testing.assert_allclose(
        batch.weight_BT,
        [[0, 0, 0, w, w, w, 0, 0], [0, 0, 0, w, 0, 0, 0, 0], [0, w, w, w, w, 0, 0, 0], [0, w, 0, 0, w, w, 0, 0]],
    )
    np.testing.assert_allclose(
        batch.advantage_BT,
        [
            [0, 0, 0, 0.5, 0.5, 0.5, 0, 0],
            [0, 0, 0, -0.5, 0, 0, 0, 0],
            [0, 0.5, 0.5, 0.5, 0.5, 0, 0, 0],
            [0, -0.5, -0.5, -0.5, -0.5, -0.5, 0, 0],
        ],
    )
    np.testing.assert_allclose(
        batch.behaviour_logp_BT,
        [
            [0, 0, 0, -0.1, -0.2, -0.3, 0, 0],
            [0, 0, 0, -0.4, 0, 0, 0, 0],
            [0, -1, -2, -3, -4, 0, 0, 0],
            [0, -5, 0, 0, -6, -7, 0, 0],
        ],
    )
    np.testing.assert_allclose(batch.temperature_BT[:, :4], np.repeat([[0.7], [0.7], [1], [1]], 4, axis=1))
    assert (batch.temperature_BT > 0).all()  # the learner divides by it, in the padding too
    assert batch.reference_logp_BT is None
    assert {x.dtype for x in (batch.tokens_BT, batch.position_BT, batch.segment_BT)} == {np.dtype(np.int32)}
    floats = (batch.weight_BT, batch.advantage_BT, batch.behaviour_logp_BT, batch.temperature_BT)
    assert {x.dtype for x in floats} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "rloo"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_equal_rewards_teach_nothing(name, reward):
    rollouts = [rollout([1, 2], [3] * n, reward) for n in range(1, 8)]
    batch = batch_of(rollouts, objectives.make(name), group=7)
    assert (batch.advantage_BT == 0).all()
    # Beside a group with something to learn from, too.
    rollouts += [rollout([1, 2], [3] * n, float(n > 3)) for n in range(1, 8)]
    batch = batch_of(rollouts, objectives.make(name), group=7)
    assert (batch.advantage_BT[:7] == 0).all()
    assert (batch.advantage_BT[7:, 2] != 0).all()


def test_groups_are_neighbours():
    rewards = [0, 0, 1, 3, 5, 5]
    batch = batch_of([rollout([1], [2, 3], r) for r in rewards], group=2)
    np.testing.assert_allclose(batch.advantage_BT[:, 1], [0, 0, -1, 1, 0, 0])
    batch = batch_of([rollout([1], [2, 3], r) for r in rewards], group=3)
    np.testing.assert_allclose(batch.advantage_BT[:, 1], np.array([-1, -1, 2, -4, 2, 2]) / 3, rtol=1e-6)


RAGGED = [
    rollout([1, 2], [3] * 4, 1.0),
    rollout([1, 2], [3, 3, 3, EOS], 0.0, sampled=[1, 0, 0, 1]),
    rollout([1], [EOS], 1.0),
    rollout([1], [2] * 9, 0.0),
]
TRAINED = np.array([4, 2, 1, 9])  # tokens of each that were sampled


def test_weights_of_each_weighting():
    def weights(name, advantage="centre_group"):
        weight_BT = batch_of(RAGGED, objectives.make("reinforce", advantage=advantage, weigh=name)).weight_BT
        assert (np.count_nonzero(weight_BT, axis=1) <= TRAINED).all()
        return weight_BT.sum(axis=1)

    np.testing.assert_allclose(weights("per_sequence"), [1 / 4] * 4, rtol=1e-6)
    np.testing.assert_allclose(weights("per_token"), TRAINED / 16, rtol=1e-6)
    np.testing.assert_allclose(weights("per_max_length"), TRAINED / (4 * 10), rtol=1e-6)
    np.testing.assert_allclose(weights("per_kept_token", "keep_positive"), np.array([4, 0, 1, 0]) / 5, rtol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "expert_iteration"])
def test_nothing_is_divided_by_zero(name):
    empty = [rollout([1, 2], []), rollout([1, 2], [])]  # prompts that leave no room
    wrong = [rollout([1], [2, 3]), rollout([1], [4])]  # nothing that expert iteration keeps
    with np.errstate(all="raise"):
        batch = batch_of(empty, objectives.make(name))
        advantage_weight_BT = np.multiply(
            *(getattr(batch_of(wrong, objectives.make(name)), x) for x in ("advantage_BT", "weight_BT"))
        )
    assert batch.segment_BT.sum() == 4
    assert (batch.weight_BT == 0).all()
    assert (advantage_weight_BT == 0).all()


@pytest.mark.parametrize(("longest", "T"), [(1, 4), (4, 4), (5, 8), (8, 8), (9, 16), (16, 16)])
def test_rows_have_the_length_of_the_smallest_bucket_that_holds_them(longest, T):
    batch = batch_of([rollout([1], [2] * (longest - 1)), rollout([1], [])], buckets=(4, 8, 16))
    for x in (batch.tokens_BT, batch.weight_BT, batch.position_BT, batch.temperature_BT):
        assert x.shape == (2, T)


# --- attempts behind one copy of their prompt ---


def test_attempts_share_a_prompt_by_hand():
    rollouts = [
        rollout([5, 6], [1, EOS], 1.0, logp=[-1, -2]),
        rollout([5, 6], [3, 4, 8], 0.0, sampled=[1, 0, 1], temperature=0.7),
        rollout([7], [], 1.0),
        rollout([7], [EOS], 0.0),
    ]
    how = {"buckets": (4, 8), "limit": 10, "rollouts_per_prompt": 2}
    batch = from_groups(grouped(rollouts, 2), objectives.dr_grpo(), **how)
    assert batch.tokens_BT.tolist() == [[5, 6, 1, EOS, 6, 3, 4, 8], [7, 7, EOS, 0, 0, 0, 0, 0]]
    assert batch.segment_BT.tolist() == [[1] * 8, [1] * 3 + [0] * 5]
    assert batch.position_BT.tolist() == [[0, 1, 2, 3, 1, 2, 3, 4], [0, 0, 1, 3, 4, 5, 6, 7]]
    assert batch.rollout_BT.tolist() == [[0, 0, 1, 1, 0, 2, 2, 2], [0, 0, 4, 0, 0, 0, 0, 0]]
    w = 1 / (4 * 10)
    np.testing.assert_allclose(batch.weight_BT, [[0, 0, w, w, 0, w, 0, w], [0, 0, w, 0, 0, 0, 0, 0]])
    np.testing.assert_allclose(batch.advantage_BT[0], np.array([0, 0, 1, 1, 0, -1, -1, -1]) / 2)
    np.testing.assert_allclose(batch.behaviour_logp_BT[0], [0, 0, -1, -2, 0, -1, -2, -3])
    np.testing.assert_allclose(batch.temperature_BT[0], [1] * 4 + [0.7] * 4, rtol=1e-6)
    packed = from_groups(grouped(rollouts, 2), objectives.dr_grpo(), **how | {"buckets": (11,)}, pack=True)
    assert packed.segment_BT.tolist() == [[1] * 8 + [2] * 3, [0] * 11]
    np.testing.assert_array_equal(packed.weight_BT[0], [*batch.weight_BT[0], *batch.weight_BT[1, :3]])
    assert packed.position_BT[0].tolist() == [*batch.position_BT[0], *batch.position_BT[1, :3]]


def test_only_attempts_at_one_problem_share_a_prompt():
    with pytest.raises(AssertionError, match="must have one prompt"):
        from_groups(
            grouped([rollout([5], [1]), rollout([6], [1])], 2),
            objectives.dr_grpo(),
            buckets=(8,),
            limit=10,
            rollouts_per_prompt=2,
        )


# --- packing ---


def test_short_rollouts_share_a_row_by_hand():
    rollouts = [
        rollout([5], [1, EOS], 1.0, logp=[-1, -2]),
        rollout([5, 6], [1, 2, 3, 4], 0.0, temperature=0.7),
        rollout([7], [8, 9, 2], 1.0, sampled=[1, 0, 1]),
        rollout([7], [EOS], 0.0),
    ]
    batch = from_groups(grouped(rollouts, 2), objectives.dr_grpo(), buckets=(4, 8), limit=10, pack=True)
    # Lengths 3, 6, 4 and 2, in rows of 8: 6 with 2, 4 with 3.
    assert batch.tokens_BT.tolist() == [[5, 6, 1, 2, 3, 4, 7, EOS], [7, 8, 9, 2, 5, 1, EOS, 0], [0] * 8, [0] * 8]
    assert batch.segment_BT.tolist() == [[1] * 6 + [2] * 2, [1] * 4 + [2] * 3 + [0], [0] * 8, [0] * 8]
    assert batch.position_BT[:2].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 3, 0, 1, 2, 7]]
    assert batch.rollout_BT[:2].tolist() == [[0, 0, 2, 2, 2, 2, 0, 4], [0, 3, 3, 3, 0, 1, 1, 0]]
    w = 1 / (4 * 10)
    np.testing.assert_allclose(batch.weight_BT[:2], [[0, 0, w, w, w, w, 0, w], [0, w, 0, w, 0, w, w, 0]])
    np.testing.assert_allclose(batch.advantage_BT[:2], np.array([[0, 0, -1, -1, -1, -1, 0, -1], [0, 1, 1, 1, 0, 1, 1, 0]]) / 2)
    np.testing.assert_allclose(batch.behaviour_logp_BT[1], [0, -1, -2, -3, 0, -1, -2, 0])
    np.testing.assert_allclose(batch.temperature_BT[0], [0.7] * 6 + [1, 1], rtol=1e-6)
    assert not batch.weight_BT[2:].any()


@pytest.mark.parametrize("microbatches", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("seed", range(3))
def test_packing_loses_nothing_and_empties_the_last_microbatches(microbatches, seed):
    lengths = np.random.default_rng(seed).integers(1, 17, 12)
    batch, spans = lay_out(lengths, (8, 16), True, microbatches)
    owner_BT = np.full(batch.tokens_BT.shape, -1)
    for i, (row, begin, stop) in enumerate(spans):
        assert stop - begin == lengths[i]
        assert (owner_BT[row, begin:stop] == -1).all()
        owner_BT[row, begin:stop] = i
        assert len(set(batch.segment_BT[row, begin:stop])) == 1
        assert (batch.position_BT[row, begin:stop] == range(lengths[i])).all()
    assert ((owner_BT == -1) == (batch.segment_BT == 0)).all()
    for row in range(12):
        filled = batch.segment_BT[row][batch.segment_BT[row] > 0]
        assert len(set(filled)) == len(set(owner_BT[row])) - (-1 in owner_BT[row])  # one segment a sequence
    used_M = (batch.segment_BT > 0).any(axis=1).reshape(-1, microbatches).sum(axis=0)
    assert (np.diff(used_M) <= 0).all()
    assert (used_M[:-1][used_M[1:] > 0] == 12 // microbatches).all()  # each is full before the next begins
    batch.weight_BT[:] = batch.segment_BT
    assert computed_tokens(batch, microbatches) == (used_M > 0).sum() * 12 // microbatches * batch.tokens_BT.shape[1]


def test_packed_rows_are_few():
    lengths = [5, 3, 6, 2, 7, 1, 4, 4] * 4  # pairs that fill rows of 8
    batch, _ = lay_out(lengths, (8,), True, 4)
    assert (batch.segment_BT.any(axis=1)).sum() == 16
    assert computed_tokens(batch, 4) == 0  # nothing is trained


def test_length_buckets():
    assert length_buckets(64) == (16, 32, 48, 64)
    assert length_buckets(64, count=2) == (32, 64)
    assert length_buckets(30, count=3, multiple=4) == (12, 20, 30)
    for longest in range(1, 200):
        for count in (1, 2, 4):
            buckets = length_buckets(longest, count)
            assert sorted(set(buckets)) == list(buckets)
            assert 1 <= len(buckets) <= count
            assert buckets[0] > 0
            assert buckets[-1] == longest
            assert all(b % 8 == 0 for b in buckets[:-1])


# --- demonstrations ---


def test_demonstrations_train_on_what_is_trainable():
    prompt, solution = [5, 6, 7], [1, 2, EOS]
    pairs = [(prompt + solution, [0, 0, 0, 1, 1, 1]), ([9, 1, EOS], [0, 1, 1]), ([4, 3, 2], [1, 1, 1])]
    batch = from_demonstrations(pairs, objectives.sft(), buckets=(4, 8))
    w = 1 / 7  # over all trained tokens; the first of a row is never trained
    np.testing.assert_allclose(
        batch.weight_BT,
        [[0, 0, 0, w, w, w, 0, 0], [0, w, w, 0, 0, 0, 0, 0], [0, w, w, 0, 0, 0, 0, 0]],
        rtol=1e-6,
    )
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 1, 2, EOS, 0, 0], [9, 1, EOS, 0, 0, 0, 0, 0], [4, 3, 2, 0, 0, 0, 0, 0]]
    assert batch.segment_BT.tolist() == [[1] * 6 + [0] * 2, [1] * 3 + [0] * 5, [1] * 3 + [0] * 5]
    assert batch.position_BT.tolist() == [list(range(8))] * 3
    np.testing.assert_array_equal(batch.advantage_BT, batch.segment_BT)
    assert (batch.temperature_BT == 1).all()


def test_long_demonstrations_are_cut_on_the_right():
    pairs = [(list(range(1, 10)), [0] * 4 + [1] * 5), ([1, 2], [0, 1]), (list(range(1, 10)), [0] * 8 + [1])]
    batch = from_demonstrations(pairs, objectives.sft(), buckets=(4, 6))
    assert batch.tokens_BT.tolist() == [[1, 2, 3, 4, 5, 6], [1, 2, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]]
    assert (batch.weight_BT > 0).tolist() == [[0, 0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0], [0] * 6]
    np.testing.assert_allclose(batch.weight_BT.sum(), 1, rtol=1e-6)  # tokens that were cut are not counted


def test_short_demonstrations_get_a_short_row():
    assert from_demonstrations([([1, 2, 3], [0, 1, 1])], objectives.sft(), buckets=(4, 8)).tokens_BT.shape == (1, 4)


# --- windows ---


def test_windows_train_on_all_but_the_first_token():
    tokens_BT = np.arange(12).reshape(3, 4)
    batch = from_windows(tokens_BT, objectives.lm())
    np.testing.assert_array_equal(batch.tokens_BT, tokens_BT)
    np.testing.assert_allclose(batch.weight_BT, [[0, 1 / 9, 1 / 9, 1 / 9]] * 3, rtol=1e-6)
    assert (batch.segment_BT == 1).all()
    assert (batch.advantage_BT == 1).all()
    assert batch.position_BT.tolist() == [[0, 1, 2, 3]] * 3
