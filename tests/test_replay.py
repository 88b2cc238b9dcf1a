"""Replay of earlier groups, and the tasks that a curriculum passes over: what each
batch consists of, and that a saved state continues bit for bit.
"""

import json

import jax
import numpy as np
import pytest
import tiny_completer as t

from jaxreason import objectives, sources
from jaxreason.environment import single_turn
from jaxreason.sources import curriculum as curricula
from jaxreason.sources.replay import Kept, draw_kept, keep
from jaxreason.types import Group, Prompted, Rollout, Task, Verdict

PROBLEMS, GROUP, TASKS = 4, 3, 11


class Stream:
    """An endless stream of `TASKS` tasks in one order."""

    def __getitem__(self, i):
        number = i % TASKS
        return Prompted(Task(f"question {number}", "a", id=f"task {number}"), np.array([1 + number % 11, 2], np.int32))


@pytest.fixture(scope="module")
def completer():
    return t.make_completer(t.make_model()[0])


@pytest.fixture(scope="module")
def params():
    return t.biased(t.make_model()[1], _=0.8)


def judge(text, task):
    """Pay the answer alone, so that many groups have equal rewards."""
    verdict = t.verify(text, task)
    return Verdict(float(verdict.correct), verdict.correct, text[:1] or None, verdict.reason)


def make_source(completer, objective=None, **more):
    more = {"buckets": (20,), "problems": PROBLEMS, "group": GROUP} | more
    return sources.rollouts(Stream(), single_turn(judge), completer, objective or objectives.grpo(), temperature=0.9, **more)


def rows_of(drawn):
    """Return the tokens and the sampler's log-probs of each attempt in a batch."""
    batch = drawn.batch
    return [
        (tokens[:n].tolist(), logp[:n].tolist())
        for tokens, logp, n in zip(batch.tokens_BT, batch.behaviour_logp_BT, (batch.segment_BT > 0).sum(axis=1), strict=True)
    ]


def row_of(r):
    return [*r.prompt.tolist(), *r.tokens.tolist()], [0.0] * len(r.prompt) + r.logp.tolist()


def is_mixed(attempts):
    return len({r.verdict.reward for r in attempts}) > 1


# --- replay ---


def test_a_batch_has_fresh_groups_and_different_ones_of_the_last_batches(completer, params):
    source, key = make_source(completer, replay=2, replay_age=2), jax.random.key(1)
    state, known, position, ages = source.init(), [], 0, []
    for update in range(7):
        state, drawn = source.next(state, t.biased(params, a=0.1 * update), key)
        groups = [drawn.rollouts[i : i + GROUP] for i in range(0, len(drawn.rollouts), GROUP)]
        rows = rows_of(drawn)
        assert len(rows) == PROBLEMS * GROUP == source.rows
        assert rows[: len(drawn.rollouts)] == [row_of(r) for r in drawn.rollouts]
        assert [r.problem for r in drawn.rollouts] == [position + p for p in range(len(groups)) for _ in range(GROUP)]
        position += len(groups)
        assert state["position"] == position

        there = [[row_of(r) for r in group] for _, group in known]
        used = [rows[i : i + GROUP] for i in range(len(drawn.rollouts), len(rows), GROUP)]
        found = [there.index(group) for group in used]
        assert len(set(found)) == len(found)
        age = [update - known[i][0] for i in found]
        assert all(1 <= one <= 2 for one in age)
        assert len(found) == min(2, sum(update - batch <= 2 for batch, _ in known))
        assert drawn.metrics["rollout/replayed"] == (len(found), PROBLEMS)
        assert drawn.metrics.get("rollout/replay_age", (0, 0)) == (sum(age), len(age))
        assert drawn.metrics["rollout/reward"][1] == len(drawn.rollouts)  # of fresh attempts alone
        assert len(drawn.advantages) == len(drawn.rollouts)
        ages += age
        known += [(update, group) for group in groups if is_mixed(group)]
    assert {1, 2} <= set(ages)


def test_without_replay_the_state_and_metrics_are_as_before(completer, params):
    state, drawn = make_source(completer).next({"position": 3}, params, jax.random.key(1))
    assert state == {"position": 3 + PROBLEMS}
    assert not {"rollout/replayed", "rollout/passed_over"} & drawn.metrics.keys()


SOME = {"name": "success_rate", "least": 0.3, "most": 0.9, "revisit": 2}


def without_times(saved):
    return saved | {"ahead": [{k: v for k, v in one.items() if k != "spent"} for one in saved.get("ahead", ())]}


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("most", [1, 3])
def test_a_saved_state_continues_bit_for_bit(completer, params, lag, most):
    more = {"replay": 2, "replay_age": 3, "curriculum": sources.make_curriculum(**SOME, epoch=TASKS)}
    more |= {"lag": lag, "steps": 6, "dynamic_sampling": most}
    source, key = make_source(completer, background=lag > 0, **more), jax.random.key(1)
    state, replayed, passed = source.init(), 0, 0
    for update in range(6):
        saved, now = json.loads(json.dumps(source.save(state))), t.biased(params, a=0.4 * update)
        state, drawn = source.next(state, now, key)
        again, same = make_source(completer, **more).next(saved, now, key)
        jax.tree.map(np.testing.assert_array_equal, drawn.batch, same.batch)
        assert [r.problem for r in drawn.rollouts] == [r.problem for r in same.rollouts]
        assert without_times(source.save(state)) == without_times(source.save(again))
        replayed, passed = replayed + drawn.metrics["rollout/replayed"][0], passed + drawn.metrics["rollout/passed_over"][0]
    assert replayed > 4
    assert passed > 0


def test_lag_and_replay_sample_what_replay_alone_does(completer, params):
    """With params that stay the same, a batch does not depend on when it is sampled."""
    key, states, drawn = jax.random.key(2), {}, {}
    for lag in (0, 1, 2):
        source = make_source(completer, replay=2, replay_age=3, lag=lag)
        states[lag] = source.init()
        for update in range(5):
            states[lag], made = source.next(states[lag], params, key)
            drawn.setdefault(update, []).append(made.batch)
    for batches in drawn.values():
        for other in batches[1:]:
            jax.tree.map(np.testing.assert_array_equal, batches[0], other)


def test_states_of_earlier_versions_load(completer, params):
    """They have neither the positions of problems nor where a batch ends."""
    source, key = make_source(completer, lag=1), jax.random.key(1)
    state, _ = source.next(source.init(), params, key)
    saved = json.loads(json.dumps(source.save(state)))
    old = [{k: v for k, v in one.items() if k not in ("problems", "end", "filled", "replayed")} for one in saved["ahead"]]
    assert old[0].keys() < saved["ahead"][0].keys()
    _, expected = source.next(saved, params, key)
    _, found = make_source(completer, lag=1, replay=1).next(saved | {"ahead": old}, params, key)
    jax.tree.map(np.testing.assert_array_equal, found.batch, expected.batch)


def group_of(problem, rewards=(1.0, 0.0), task=None, correct=None):
    none = np.zeros(1, np.int32)
    correct = rewards if correct is None else correct

    def attempt(g):
        verdict = Verdict(rewards[g], bool(correct[g]))
        return Rollout(task or Task("q", "a"), problem, g, none, none, none, none, "eos", "", verdict)

    return Group(tuple(attempt(g) for g in range(len(rewards))))


def test_groups_are_kept_for_so_many_batches():
    kept = ()
    for batch in range(5):
        kept = keep(kept, [group_of(batch)], batch, age=2)
        assert [one.batch for one in kept] == [b for b in range(batch + 1) if batch + 1 - b <= 2]


def test_replayed_groups_are_drawn_evenly_and_each_once():
    kept, counts = tuple(Kept(0, group_of(p)) for p in range(6)), np.zeros(6)
    for batch in range(300):
        drawn = draw_kept(kept, 2, batch, jax.random.key(0))
        assert drawn == draw_kept(kept, 2, batch, jax.random.key(0))
        assert len(drawn) == len({one.name for one in drawn}) == 2
        counts[[one.group.problem for one in drawn]] += 1
    assert counts.min() > 70  # 100 are expected
    assert draw_kept(kept[:1], 2, 0, jax.random.key(0)) == kept[:1]
    assert draw_kept((), 2, 0, jax.random.key(0)) == ()


# --- curricula ---


def test_tasks_outside_the_range_are_passed_over(completer, params):
    chosen = sources.make_curriculum(name="success_rate", least=0.2, most=0.9, epoch=TASKS)
    source, key, state, last = make_source(completer, curriculum=chosen), jax.random.key(1), None, {}
    state = source.init()
    for _ in range(8):
        start = state["position"]
        state, drawn = source.next(state, params, key)
        attempted = sorted({r.problem for r in drawn.rollouts})
        good = [p for p in range(start, start + TASKS) if last.get(p % TASKS, 0.5) >= 0.2 and last.get(p % TASKS, 0.5) < 0.9]
        passed = [p for p in range(start, start + TASKS) if p not in good]
        filled = max(0, PROBLEMS - len(good))
        expected = sorted([*good[:PROBLEMS], *passed[:filled]])
        assert attempted == expected
        end = start + TASKS if filled else expected[-1] + 1
        assert state["position"] == end
        assert drawn.metrics["rollout/passed_over"] == (end - start - PROBLEMS, end - start)
        assert drawn.metrics["rollout/filled"] == (filled, PROBLEMS)
        for p in attempted:
            last[p % TASKS] = np.mean([r.verdict.correct for r in drawn.rollouts if r.problem == p])
        outside = {f"task {number}" for number, rate in last.items() if not 0.2 <= rate < 0.9}
        assert state["measured"].keys() == outside
    assert outside


def test_a_model_that_has_solved_everything_still_gets_batches():
    chosen = sources.make_curriculum(name="success_rate", epoch=TASKS)
    measured = {f"task {i}": 0 for i in range(TASKS)}
    assert curricula.pick(chosen, measured, Stream(), 5, 3) == curricula.Picked([5, 6, 7], 5 + TASKS, 3)
    del measured["task 9"]
    assert curricula.pick(chosen, measured, Stream(), 5, 3) == curricula.Picked([5, 6, 9], 5 + TASKS, 2)
    assert curricula.pick(chosen, measured, Stream(), 5, 20) == curricula.Picked(list(range(5, 25)), 25, 18)


@pytest.mark.parametrize(("revisit", "epochs"), [(0, []), (1, [1, 2, 3]), (2, [2, 3])])
def test_a_task_is_attempted_again_some_epochs_later(revisit, epochs):
    chosen = sources.make_curriculum(name="success_rate", revisit=revisit, epoch=TASKS)
    measured = curricula.measure(chosen, {}, [group_of(3, (1.0, 1.0), Stream()[3].task)], "verdict")
    assert measured == {"task 3": 0}
    again = [e for e in range(4) if not curricula.is_passed_over(chosen, measured, Stream()[3].task, 3 + e * TASKS)]
    assert again == epochs
    back = curricula.measure(chosen, measured, [group_of(3 + TASKS, (1.0, 0.0), Stream()[3].task)], "verdict")
    assert back == {}


@pytest.mark.parametrize(
    ("reward", "rewards", "correct", "rate"),
    [
        ("verdict", (2.0, 0.1), (True, False), 0.5),  # a reward may be on any scale
        ("majority", (1.0, 1.0), (False, False), 1.0),  # nobody reads the key
        ("format", (1.0, 0.0), (True, True), 0.5),
        ("random", (0.0, 0.0), (True, True), 0.0),
    ],
)
def test_a_success_rate_is_of_what_the_source_pays_for(reward, rewards, correct, rate):
    assert curricula.rate_of(group_of(0, rewards, correct=correct), reward) == rate


def test_tasks_without_an_id_are_told_apart_by_their_question():
    one, two = Task("1+1", "2"), Task("1+2", "3")
    assert curricula.key_of_task(one) != curricula.key_of_task(two)
    assert curricula.key_of_task(one) == curricula.key_of_task(Task("1+1", "2", "1+1=2"))


@pytest.mark.parametrize("reward", ["majority", "format"])
def test_rewards_without_a_key_work_with_replay_and_curriculum(completer, params, reward):
    more = {"replay": 1, "replay_age": 2, "reward": reward}
    source = make_source(completer, curriculum=sources.make_curriculum(name="success_rate", epoch=TASKS), **more)
    state, key, replayed = source.init(), jax.random.key(4), 0
    for _ in range(4):
        state, drawn = source.next(state, params, key)
        replayed += drawn.metrics["rollout/replayed"][0]
        for p in {r.problem for r in drawn.rollouts}:
            paid = np.mean([r.verdict.reward for r in drawn.rollouts if r.problem == p])
            assert (f"task {p % TASKS}" in state["measured"]) == (not paid < 0.9)
    assert replayed or reward == "format"


# --- wrong inputs ---


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"replay": -1}, "source.replay got -1; allowed: 0 (off) to 3, fewer than source.problems=4"),
        ({"replay": 4}, "source.replay got 4; allowed: 0 (off) to 3, fewer than source.problems=4"),
        ({"replay": 1, "replay_age": 0}, "source.replay_age got 0; allowed: 1 or more batches"),
        (
            {"replay": 1, "group": 1, "objective": objectives.reinforce_pp()},
            "source.replay got 1 with source.group=1, but only groups with different rewards are replayed; allowed: 0, or "
            "source.group of 2 or more",
        ),
        (
            {"replay": 1, "objective": objectives.rloo()},
            "source.replay got 1, but the objective has no importance ratio, so its gradient would be biased; allowed: 0, or an "
            "objective with a ratio: grpo, dr_grpo, dapo",
        ),
    ],
)
def test_an_impossible_replay_is_refused(completer, more, message):
    with pytest.raises(ValueError) as caught:
        make_source(completer, **more)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "succes_rate"}, "unknown curriculum 'succes_rate' (did you mean 'success_rate'?); one of: success_rate"),
        ({"least": 0.9}, "curriculum.least got 0.9 with most=0.9; allowed: 0 or more, below most"),
        ({"least": -0.1}, "curriculum.least got -0.1 with most=0.9; allowed: 0 or more, below most"),
        ({"most": 1.5}, "curriculum.most got 1.5; allowed: above least, to 1 (1: only tasks solved every time are passed over)"),
        ({"revisit": -1}, "curriculum.revisit got -1; allowed: 0 (never), or epochs"),
        ({"most": float("nan")}, "curriculum.least got 0.0 with most=nan; allowed: 0 or more, below most"),
    ],
)
def test_an_impossible_curriculum_is_refused(section, message):
    with pytest.raises(ValueError) as caught:
        sources.make_curriculum(**{"name": "success_rate"} | section, epoch=TASKS)
    assert str(caught.value) == message
