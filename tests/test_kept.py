"""Rejection sampling: which attempts are kept, and that imitating them is expert
iteration on the same attempts.
"""

import jax
import numpy as np
import pytest
import tiny_completer as t
from runs import load_config, read_lines, run_config

from jaxreason import batching, learner, objectives, sources
from jaxreason.build import build
from jaxreason.environment import single_turn
from jaxreason.types import Group, Prompted, Rollout, Task, Verdict

PROBLEMS, GROUP = 8, 3


class Stream:
    def __getitem__(self, i):
        return Prompted(Task(f"question {i}", "a", id=str(i)), np.array([1 + i % 11, 2], np.int32))


@pytest.fixture(scope="module")
def completer():
    return t.make_completer(t.make_model()[0])


@pytest.fixture(scope="module")
def params():
    return t.biased(t.make_model()[1], _=0.8)


def judge(text, task):
    right = task.answer in text
    return Verdict(float(right), right, text)


def make_source(completer, objective, verifier=judge, **more):
    more = {"buckets": (16, 24), "problems": PROBLEMS, "group": GROUP, "temperature": 0.9} | more
    return sources.rollouts(Stream(), single_turn(verifier), completer, objective, **more)


def gradient(params, batch, objective, microbatches):
    def loss(params, rows):
        return learner.loss(params, rows, model=t.make_model()[0], objective=objective)[0]

    parts = jax.tree.map(lambda x: batching.split_rows(x, microbatches), batch)
    found = [jax.value_and_grad(loss)(params, jax.tree.map(lambda x, i=i: x[i], parts)) for i in range(microbatches)]
    return jax.tree.map(lambda *xs: sum(xs), *found)


ALL = sources.Keep(distinct=False)


@pytest.mark.parametrize(("pack", "microbatches"), [(False, 1), (True, 1), (True, 4), (False, 4)])
def test_imitating_kept_attempts_is_expert_iteration(completer, params, pack, microbatches):
    key, found = jax.random.key(3), []
    for objective, keep in ((objectives.expert_iteration(), None), (objectives.sft(), ALL)):
        source = make_source(completer, objective, pack=pack, microbatches=microbatches, keep=keep)
        _, drawn = source.next(source.init(), params, key)
        assert drawn.batch.tokens_BT.shape[0] == source.rows == PROBLEMS * GROUP
        found.append((drawn, gradient(t.biased(params, a=0.2), drawn.batch, objective, microbatches)))
    (expert, one), (kept, other) = found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), one, other)
    right = [r.verdict.correct for r in kept.rollouts]
    assert 0 < sum(right) < len(right)
    assert [r.text for r in kept.rollouts] == [r.text for r in expert.rollouts]
    assert [advantage is not None for advantage in kept.advantages] == right
    assert kept.metrics["rollout/kept"] == (sum(right), len(right))
    assert "rollout/kept" not in expert.metrics
    # Wrong attempts take no room, so micro-batches without an attempt are skipped.
    assert batching.computed_tokens(kept.batch, microbatches) <= batching.computed_tokens(expert.batch, microbatches)


def group_of(*attempts):
    none = np.zeros(1, np.int32)

    def rollout(g, text, correct, reward):
        return Rollout(Task("q", "a"), 0, g, none, none, none, none, "eos", text, Verdict(reward, correct))

    return Group(tuple(rollout(g, *attempt) for g, attempt in enumerate(attempts)))


GROUP_OF_FIVE = group_of(("x", True, 1.0), ("y", False, 0.0), ("x", True, 1.0), ("z", True, 0.0), ("y", False, 1.0))


@pytest.mark.parametrize(
    ("keep", "reward", "kept"),
    [
        (sources.Keep(), "verdict", [0, 3]),
        (sources.Keep(distinct=False), "verdict", [0, 2, 3]),
        (sources.Keep(per_problem=1), "verdict", [0]),
        (sources.Keep(distinct=False, per_problem=2), "verdict", [0, 2]),
        (sources.Keep(correct=False), "verdict", [0, 1, 3]),
        (sources.Keep(correct=False, distinct=False), "verdict", [0, 1, 2, 3, 4]),
        (sources.Keep(), "majority", [0, 4]),  # what was paid: nobody reads the key
    ],
)
def test_which_attempts_are_kept(keep, reward, kept):
    assert [r.attempt for r in sources.kept_attempts(GROUP_OF_FIVE, keep, reward)] == kept


@pytest.mark.parametrize("pack", [False, True])
def test_nothing_is_learned_from_a_batch_without_a_right_attempt(completer, params, pack):
    wrong = make_source(completer, objectives.sft(), lambda text, task: Verdict(0.0, False), keep=sources.Keep(), pack=pack)
    _, drawn = wrong.next(wrong.init(), params, jax.random.key(3))
    assert drawn.batch.tokens_BT.shape[0] == wrong.rows
    assert not drawn.batch.weight_BT.any()
    assert drawn.advantages == [None] * len(drawn.rollouts)
    _, slope = gradient(params, drawn.batch, objectives.sft(), 1)
    assert all((x == 0).all() for x in jax.tree.leaves(slope))


# --- from a config ---


def kept_config(**fields):
    config = load_config("tiny", "smoke,prior=none")
    source = {k: v for k, v in config.rl.source.to_dict().items() if k not in ("lag",)}
    config.rl.source = source | {"name": "kept_rollouts", "per_problem": 2, "correct": False}
    config.rl.objective = {"name": "sft"}
    config.sharding.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    config.evaluate.n = config.evaluate.final_n = 4
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.slow
def test_kept_rollouts_train_from_a_config(tmp_path):
    run_config(kept_config(), tmp_path)
    last = read_lines(tmp_path / "metrics.jsonl")[-2]
    assert 0 < last["rollout/kept"] <= 2 / 8
    assert last["train/nll"] > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rl.source.per_problem": 0}, "source.per_problem got 0; allowed: 1 or more, or None \\(all\\)"),
        (
            {"rl.objective.name": "grpo"},
            "gives demonstrations, which an objective must imitate; allowed: sft, lm, expert_iteration",
        ),
        ({"rl.source.replay": 1}, "has no field 'replay'; allowed: with the source rollouts"),
        ({"rl.source.keep": True}, "'keep'"),
        ({"rl.source.steps": 3}, "unknown field of .* 'steps'"),
        (
            {"rl.objective": {"name": "sft", "advantage": "leave_one_out"}},
            "each demonstration of .* 'kept_rollouts' is alone",
        ),
        ({"rl.source.name": "rollouts"}, "unknown field of source 'rollouts' '(per_problem|correct)'"),
        ({"rl.source.distnct": True}, "'distnct' \\(did you mean 'distinct'\\?\\)|'distnct'"),
    ],
)
def test_impossible_kept_rollouts_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        build(kept_config(**fields), say=lambda line: None)


def test_more_attempts_than_there_are_is_said_before_the_run():
    with pytest.raises(ValueError, match=r"k got 9 with 8 attempts at a problem; allowed: 2 to 8"):
        build(load_config("tiny", "smoke", **{"rl.objective": {"name": "pass_at_k", "k": 9}}), say=lambda line: None)
    with pytest.raises(ValueError, match=r"reward_weights got .* not all 0"):
        objectives.gdpo(rewards=("reward_number",), reward_weights=(0.0,))
