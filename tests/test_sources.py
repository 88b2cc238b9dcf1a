"""Sources: the same state, params and key draw the same batch; what each draws, and
what it reports.
"""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_completer as t
from runs import grouped

from jaxreason import objectives, sources, verify
from jaxreason.environment import single_turn
from jaxreason.types import Group, Prompted, Rollout, Task, Verdict

PROBLEMS, GROUP = 4, 3


class Stream:
    """An endless sequence of tasks that records which positions were read."""

    def __init__(self):
        self.read = []

    def __getitem__(self, i):
        self.read.append(i)
        return Task(f"question {i}", "a", id=str(i))


def prompt(task):
    return [1 + (int(task.id) + k) % 11 for k in range(1 + int(task.id) % 5)]


class WithPrompts:
    """The tasks of a stream, each with its prompt."""

    def __init__(self, stream):
        self.stream = stream

    def __getitem__(self, i):
        task = self.stream[i]
        return Prompted(task, np.array(prompt(task), np.int32))


def judge(text, task):
    if task.id == "2":
        raise RuntimeError("a bug in a verifier")
    return dataclasses.replace(t.verify(text, task), measures={"letters": float(len(text))})


@pytest.fixture(scope="module")
def completer():
    return t.make_completer(t.make_model()[0])


@pytest.fixture(scope="module")
def params():
    return t.biased(t.make_model()[1], _=0.8)


def make_rollouts(completer, tasks=None, objective=None, **more):
    return sources.rollouts(
        WithPrompts(Stream() if tasks is None else tasks),
        single_turn(judge),
        completer,
        objective or objectives.grpo(),
        problems=PROBLEMS,
        group=GROUP,
        temperature=0.9,
        **{"buckets": (8, 20), **more},
    )


def sampled(completer):
    return make_rollouts(completer)


def windows(completer):
    return sources.corpus([np.arange(i, i + 12).reshape(2, 6) for i in range(9)], objectives.lm(), rows=2)


def solutions(completer):
    def encode(task):
        return [1, 2, int(task.id)] * (1 + int(task.id)), [False, True, True] * (1 + int(task.id))

    return sources.demonstrations(Stream(), encode, objectives.sft(), rows=3, buckets=(6, 12))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("make", [windows, solutions, sampled])
def test_same_state_params_and_key_same_batch(make, completer, params):
    source, key = make(completer), jax.random.key(3)
    state = source.init()
    assert state == make(completer).init()
    after, first = source.next(state, params, key)
    assert state == source.init() != after  # passed in, not changed
    assert first.batch.tokens_BT.shape[0] == source.rows
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(first.batch))
    for again in (source, make(completer)):
        after_again, second = again.next(state, params, key)
        assert after_again == after
        assert_equal(second.batch, first.batch)
    # A source has no memory: a saved state continues where it was.
    expected = source.next(after, params, key)
    got = make(completer).next(dict(after), params, key)
    assert got[0] == expected[0] != after
    assert_equal(got[1].batch, expected[1].batch)
    assert expected[1].batch.tokens_BT.tolist() != first.batch.tokens_BT.tolist()
    for name, (total, count) in first.metrics.items():
        assert isinstance(total, float), name
        assert count > 0, name


def test_the_corpus_in_its_order(completer):
    source = windows(completer)
    state, seen = source.init(), []
    for _ in range(3):
        state, drawn = source.next(state, None, None)
        seen.append(drawn.batch.tokens_BT[0, 0])
    assert seen == [0, 1, 2]
    assert state == {"position": 3}
    assert drawn.metrics == {"train/tokens": (12.0, 1.0)}
    assert not source.samples


def test_demonstrations_in_their_order_cut_and_counted(completer):
    source = solutions(completer)
    state, drawn = source.next(source.init(), None, None)
    assert state == {"position": 3}
    assert drawn.batch.tokens_BT[:, 2].tolist() == [0, 1, 2]
    assert drawn.metrics == {"train/tokens": (18.0, 1.0), "train/cut": (0.0, 3.0), "train/packing_efficiency": (18.0, 36.0)}
    state, drawn = source.next(state, None, None)
    assert drawn.batch.tokens_BT[:, 2].tolist() == [3, 4, 5]
    assert drawn.metrics == {"train/tokens": (36.0, 1.0), "train/cut": (2.0, 3.0), "train/packing_efficiency": (36.0, 36.0)}


# --- rollouts ---


def test_groups_of_attempts_at_the_problems_of_the_stream(completer, params):
    tasks = Stream()
    source = make_rollouts(completer, tasks)
    assert source.rows == PROBLEMS * GROUP
    assert source.samples
    state, drawn = source.next({"position": 40}, params, jax.random.key(0))
    assert state == {"position": 44}
    assert tasks.read == [40, 41, 42, 43]
    names = [(r.problem, r.attempt, r.task.id) for r in drawn.rollouts]
    assert names == [(p, g, str(p)) for p in range(40, 44) for g in range(GROUP)]
    for r, row in zip(drawn.rollouts, drawn.batch.tokens_BT, strict=True):
        assert r.prompt.tolist() == prompt(r.task)
        assert row[: len(r.prompt) + len(r.tokens)].tolist() == [*r.prompt, *r.tokens]
    assert (drawn.batch.temperature_BT[drawn.batch.segment_BT > 0] == np.float32(0.9)).all()
    # Sampler and learner agree on the batch just drawn.
    logp_BT = t.token_logp(t.make_model()[0])(params, drawn.batch)
    gap_BT = np.abs(logp_BT - drawn.batch.behaviour_logp_BT)
    assert gap_BT[drawn.batch.weight_BT > 0].max() < 1e-5


def test_another_step_and_other_params_draw_other_rollouts(completer, params):
    source = make_rollouts(completer)

    def texts(params, step):
        drawn = source.next(source.init(), params, jax.random.fold_in(jax.random.key(0), step))[1]
        return collections.Counter(r.text for r in drawn.rollouts)

    first = texts(params, 0)
    assert texts(params, 0) == first
    assert (texts(params, 1) & first).total() < 6
    assert (texts(t.biased(params, a=3.0), 0) & first).total() < 6


def test_metrics_of_rollouts(completer, params):
    source = make_rollouts(completer)
    _, drawn = source.next(source.init(), params, jax.random.key(0))
    r_R, R = drawn.rollouts, float(PROBLEMS * GROUP)
    groups = [r_R[i : i + GROUP] for i in range(0, len(r_R), GROUP)]
    expected = {
        "rollout/reward": (sum(r.verdict.reward for r in r_R), R),
        "rollout/correct": (sum(r.verdict.correct for r in r_R), R),
        "rollout/solved": (sum(any(r.verdict.correct for r in g) for g in groups), PROBLEMS),
        "rollout/informative_groups": (sum(len({r.verdict.reward for r in g}) > 1 for g in groups), PROBLEMS),
        "rollout/length": (sum(len(r.tokens) for r in r_R), R),
        "rollout/cut": (sum(r.stop == "limit" for r in r_R), R),
        "rollout/verifier_errors": (GROUP, R),  # of problem 2
        "train/tokens": (sum(len(r.prompt) + len(r.tokens) for r in r_R), 1),
    }
    for name, value in expected.items():
        assert drawn.metrics[name] == pytest.approx(value), name
    assert 0 < expected["rollout/cut"][0] < R
    assert 0 < expected["rollout/correct"][0] < R
    assert expected["rollout/informative_groups"][0] < PROBLEMS
    assert drawn.metrics["perf/sample_tokens_per_s"][0] == sum(r.sampled.sum() for r in r_R)
    used, steps = drawn.metrics["perf/slot_occupancy"]
    assert used == drawn.metrics["perf/sample_tokens_per_s"][0]
    assert used <= steps
    for name in ("time/sample_s", "time/verify_s"):
        assert drawn.metrics[name][0] > 0


def test_random_rewards_are_as_many_and_for_nothing(completer, params):
    key = jax.random.key(0)
    _, honest = make_rollouts(completer).next({"position": 0}, params, key)
    source = make_rollouts(completer, reward="random")
    _, drawn = source.next({"position": 0}, params, key)
    for a, b in zip(drawn.rollouts, honest.rollouts, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert (a.verdict.correct, a.verdict.parsed, a.text) == (b.verdict.correct, b.verdict.parsed, b.text)

    def rewards(drawn):
        return [r.verdict.reward for r in drawn.rollouts]

    assert sorted(rewards(drawn)) == sorted(rewards(honest))
    assert rewards(drawn) != rewards(honest)
    assert drawn.metrics["rollout/reward"] == pytest.approx(honest.metrics["rollout/reward"])
    assert drawn.metrics["rollout/correct"] == honest.metrics["rollout/correct"]
    # The batch is made from what was dealt, and the deal depends on the key.
    reward_PG = np.array(rewards(drawn)).reshape(PROBLEMS, GROUP)
    advantage_R = objectives.grpo().advantage(reward_PG).ravel()
    first_R = [len(r.prompt) for r in drawn.rollouts]
    np.testing.assert_allclose(drawn.batch.advantage_BT[np.arange(len(first_R)), first_R], advantage_R, rtol=1e-5)

    def dealt(seed):
        groups = sources.shuffle_rewards(grouped(honest.rollouts, GROUP), jax.random.key(seed))
        return tuple(r.verdict.reward for group in groups for r in group.attempts)

    deals = {dealt(seed) for seed in range(8)}
    assert len(deals) == 8


def test_a_format_reward_pays_any_answer(completer, params):
    key = jax.random.key(0)
    _, honest = make_rollouts(completer).next({"position": 0}, params, key)
    _, drawn = make_rollouts(completer, reward="format").next({"position": 0}, params, key)
    assert [r.verdict.reward for r in drawn.rollouts] == [float(r.verdict.parsed is not None) for r in honest.rollouts]
    assert sum(r.verdict.reward for r in drawn.rollouts) > 0
    assert drawn.metrics["rollout/correct"] == honest.metrics["rollout/correct"]


def vote(answer):
    verdict = Verdict(0.25, answer == "5", answer)
    return Rollout(Task("", "5"), 0, 0, np.array([1]), np.array([2]), np.zeros(1), np.ones(1, bool), "eos", "", verdict)


@pytest.mark.parametrize(
    ("answers", "paid"),
    [
        (["4", "5", "4", None], [1, 0, 1, 0]),
        (["5", "4", "4", "5"], [1, 0, 0, 1]),  # of equally frequent ones the first
        ([None, None, None, "7"], [0, 0, 0, 1]),
        ([None] * 4, [0, 0, 0, 0]),
    ],
)
def test_a_majority_is_paid_and_no_key_is_read(answers, paid):
    group = Group(tuple(map(vote, answers)))
    (found,) = sources.paid([group], "majority", jax.random.key(0))
    assert [r.verdict.reward for r in found.attempts] == paid
    assert [r.verdict.correct for r in found.attempts] == [answer == "5" for answer in answers]


def test_votes_for_equivalent_answers_are_counted_together():
    same = verify.equivalence(name="countdown")
    groups = [Group(tuple(vote(answer) for answer in ("1+3", "5", "3+1", "5", "4")))]
    assert [r.verdict.reward for r in sources.paid(groups, "majority", jax.random.key(0))[0].attempts] == [0, 1, 0, 1, 0]
    assert [r.verdict.reward for r in sources.paid(groups, "majority", jax.random.key(0), same)[0].attempts] == [1, 0, 1, 0, 1]


def test_an_unknown_reward_is_refused(completer):
    with pytest.raises(
        ValueError, match=r"unknown reward 'randm' \(did you mean 'random'\?\); one of: format, majority, random, verdict"
    ):
        make_rollouts(completer, reward="randm")


# --- sampling ahead ---


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_a_batch_is_of_the_params_of_lag_updates_ago(completer, params, lag, background):
    versions, prepared = [t.biased(params, a=0.4 * update) for update in range(6)], []

    def prepare(params):
        prepared.append(next(i for i, version in enumerate(versions) if version is params))
        return completer.sampler.prepare(params)

    watched = completer._replace(sampler=completer.sampler._replace(prepare=prepare))
    source, key = make_rollouts(watched, lag=lag, background=background, steps=6), jax.random.key(1)
    state = source.init()
    for update in range(6):
        state, drawn = source.next(state, versions[update], key)
        older = versions[max(0, update - lag)]
        _, expected = make_rollouts(completer).next({"position": update * PROBLEMS}, older, key)
        assert [r.problem for r in drawn.rollouts] == [r.problem for r in expected.rollouts]
        assert_equal(drawn.batch, expected.batch)
    assert prepared == list(range(6 - lag))  # nothing is sampled for a step after the last
    assert state == {"position": 6 * PROBLEMS} | ({"begun": 6, "ahead": []} if lag else {})


@pytest.mark.parametrize("untempered", [False, True])
def test_batches_sampled_ahead_are_saved_bit_for_bit(params, untempered):
    completer = t.make_completer(t.make_model()[0], logp_temperature_1=untempered)
    source, key = make_rollouts(completer, lag=2, background=True), jax.random.key(1)
    state, _ = source.next(source.init(), params, key)
    saved = json.loads(json.dumps(source.save(state)))
    assert saved["position"] == PROBLEMS
    assert len(saved["ahead"]) == 2
    other = t.biased(params, a=3.0)
    for now, again in zip(range(3), (source, make_rollouts(completer, lag=2)), strict=False):
        (state, first), (saved, second) = source.next(state, other, key), again.next(saved, other, key)
        for a, b in zip(first.rollouts, second.rollouts, strict=True):
            for field in dataclasses.fields(a):
                left, right = getattr(a, field.name), getattr(b, field.name)
                np.testing.assert_array_equal(left, right, err_msg=f"{field.name}, {now}")
                assert getattr(left, "dtype", None) == getattr(right, "dtype", None)
        assert_equal(first.batch, second.batch)


# --- dynamic sampling ---


def rewards_of(rollouts):
    return np.array([r.verdict.reward for r in rollouts]).reshape(-1, GROUP)


@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_problems_are_drawn_until_enough_teach_something(completer, params, most):
    """Problems are drawn in the order of the stream, each once; the batch has the first
    ones with a learning signal.
    """
    key, state, plain = jax.random.key(5), {"position": 8}, make_rollouts(completer)
    source = make_rollouts(completer, dynamic_sampling=most)
    for _ in range(3):
        start = state["position"]
        state, drawn = source.next(state, params, key)
        count, differ = len(drawn.rollouts) // GROUP, np.ptp(rewards_of(drawn.rollouts), axis=1) > 0
        assert [(r.problem, r.attempt) for r in drawn.rollouts] == [(start + p, g) for p in range(count) for g in range(GROUP)]
        assert state == {"position": start + count}
        assert PROBLEMS <= count <= most * PROBLEMS
        assert differ.sum() >= PROBLEMS or count == most * PROBLEMS
        assert differ.sum() < PROBLEMS or differ[:-PROBLEMS].sum() < PROBLEMS  # no round that was not needed
        chosen = sorted([*np.flatnonzero(differ), *np.flatnonzero(~differ)][:PROBLEMS])
        rows = [(*r.prompt, *r.tokens) for p in chosen for r in drawn.rollouts[p * GROUP : (p + 1) * GROUP]]
        lengths = (drawn.batch.segment_BT > 0).sum(axis=1)
        assert [tuple(row[:n]) for row, n in zip(drawn.batch.tokens_BT, lengths, strict=True)] == rows
        told = np.array([np.nan if a is None else a for a in drawn.advantages]).reshape(count, GROUP)
        assert np.flatnonzero(~np.isnan(told[:, 0])).tolist() == chosen
        first_column = [drawn.batch.advantage_BT[i][drawn.batch.rollout_BT[i] > 0][0] for i in range(PROBLEMS * GROUP)]
        assert told[chosen].ravel().tolist() == first_column
        assert drawn.metrics["rollout/oversampling"] == (count * GROUP, PROBLEMS * GROUP)
        assert drawn.metrics["rollout/informative_groups"] == (differ.sum(), count)
        # The first round equals the draw without dynamic sampling.
        _, first = plain.next({"position": start}, params, key)
        for a, b in zip(first.rollouts, drawn.rollouts, strict=False):
            np.testing.assert_array_equal(a.tokens, b.tokens)


def test_attempts_share_their_prompt_in_the_batch(completer, params):
    key = jax.random.key(5)
    source, alone = make_rollouts(completer, rollouts_per_prompt=GROUP, buckets=(64,)), make_rollouts(completer)
    (_, drawn), (_, expected) = (s.next({"position": 8}, params, key) for s in (source, alone))
    assert (source.rows, alone.rows) == (PROBLEMS, PROBLEMS * GROUP)
    assert len(drawn.batch.tokens_BT) == PROBLEMS
    assert (drawn.batch.weight_BT != 0).sum() == (expected.batch.weight_BT != 0).sum()
    # All but the last token of a prompt are there once.
    spared = sum(len(drawn.rollouts[p * GROUP].prompt) - 1 for p in range(PROBLEMS)) * (GROUP - 1)
    assert drawn.metrics["train/tokens"][0] == expected.metrics["train/tokens"][0] - spared
    assert drawn.metrics["train/packing_efficiency"][0] <= drawn.metrics["train/packing_efficiency"][1]


def test_dynamic_sampling_draws_more_than_a_round_here(completer, params):
    _, drawn = make_rollouts(completer, dynamic_sampling=9).next({"position": 8}, params, jax.random.key(5))
    assert len(drawn.rollouts) > PROBLEMS * GROUP


@pytest.mark.parametrize("background", [False, True])
def test_dynamic_sampling_ahead_is_saved_and_drawn_on_bit_for_bit(completer, params, background):
    source, key = make_rollouts(completer, lag=1, background=background, dynamic_sampling=3, steps=4), jax.random.key(1)
    again, at = make_rollouts(completer, lag=1, dynamic_sampling=3, steps=4), {"position": 0}
    state = source.init()
    for update in range(4):
        older = t.biased(params, a=0.4 * max(0, update - 1))
        saved = json.loads(json.dumps(source.save(state)))
        state, drawn = source.next(state, t.biased(params, a=0.4 * update), key)
        _, same = again.next(saved, t.biased(params, a=0.4 * update), key)
        at, expected = make_rollouts(completer, dynamic_sampling=3).next(at, older, key)
        for other in (same, expected):
            assert_equal(drawn.batch, other.batch)
            assert [r.problem for r in drawn.rollouts] == [r.problem for r in other.rollouts]
        assert state["position"] == at["position"]
    assert state == at | {"begun": 4, "ahead": []}


@pytest.mark.parametrize(("times", "objective"), [(0, objectives.grpo()), (2, objectives.expert_iteration())])
def test_dynamic_sampling_that_makes_no_sense_is_refused(completer, times, objective):
    with pytest.raises(ValueError, match=rf"source.dynamic_sampling got {times}; allowed: 1 \(off\), or more for an objective"):
        make_rollouts(completer, objective=objective, dynamic_sampling=times)


def test_a_negative_lag_is_refused(completer):
    with pytest.raises(ValueError, match=r"source.lag got -1; allowed: 0 or more updates"):
        make_rollouts(completer, lag=-1)
