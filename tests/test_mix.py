"""A mix of sources: its loss is the weighted sum of the losses of its parts, whatever
they are trained by.
"""

import json

import jax
import numpy as np
import pytest
import tiny_completer as t
from runs import load_config, read_lines, run_config

from jaxreason import batching, learner, objectives, sources
from jaxreason import metrics as m
from jaxreason.build import build
from jaxreason.build.mix import imitating
from jaxreason.environment import single_turn
from jaxreason.sources.mixing import key_of_part
from jaxreason.types import Prompted, Task

ROWS = 8


class Stream:
    def __getitem__(self, i):
        return Prompted(Task(f"question {i}", "a", id=str(i)), np.array([1 + i % 11, 2], np.int32))


class Solutions:
    def __getitem__(self, i):
        return Task(f"question {i}", "a", "a" * (1 + i % 3), id=str(i))


@pytest.fixture(scope="module")
def completer():
    return t.make_completer(t.make_model()[0])


@pytest.fixture(scope="module")
def params():
    return t.biased(t.make_model()[1], _=0.8)


def attempts(completer, objective, **more):
    more = {"buckets": (16, 24), "problems": 4, "group": 2, "temperature": 0.9} | more
    return sources.rollouts(Stream(), single_turn(t.verify), completer, objective, **more)


def solutions(objective=None, **more):
    def encode(task):
        return [3, 4, *range(1, 2 + int(task.id) % 7), 0], [False, False] + [True] * (2 + int(task.id) % 7)

    return sources.demonstrations(Solutions(), encode, objective or objectives.sft(), rows=ROWS, buckets=(8, 12), **more)


def windows():
    return sources.corpus([np.arange(i, i + 160).reshape(ROWS, 20) % 11 for i in range(9)], objectives.lm(), rows=ROWS)


def value_and_gradient(params, batch, objective, microbatches=1):
    """Return the loss, its gradient and the metrics of a batch, summed over equal parts
    of its rows.
    """

    def loss(params, rows):
        return learner.loss(params, rows, model=t.make_model()[0], objective=objective)

    parts = jax.tree.map(lambda x: batching.split_rows(x, microbatches), batch)
    found = [
        jax.value_and_grad(loss, has_aux=True)(params, jax.tree.map(lambda x, i=i: x[i], parts)) for i in range(microbatches)
    ]
    (value, metrics), gradient = jax.tree.map(lambda *xs: sum(xs), *found)
    return value, gradient, metrics


def assert_sum(mixed, parts, weights):
    """Assert that loss and gradient are the weighted sum of those of the parts."""
    expected = jax.tree.map(
        lambda *xs: sum(w * x for w, x in zip(weights, xs, strict=True)), *((one[0], one[1]) for one in parts)
    )
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), (mixed[0], mixed[1]), expected)


OBJECTIVES = {
    "dapo": objectives.dapo(),
    "gspo": objectives.gspo(),
    "rloo, corrected": objectives.make("rloo", correct="token"),
    "grpo, entropy": objectives.make("grpo", entropy_coefficient=0.1),
}


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_the_weighted_sum_of_the_losses_of_the_parts(completer, params, name, microbatches):
    objective, weights = OBJECTIVES[name], {"rl": 0.7, "demos": 0.25, "text": 2.0}
    made = {"rl": attempts(completer, objective, microbatches=microbatches), "demos": solutions(), "text": windows()}
    parts = {part: sources.Part(made[part], weights[part], part != "rl") for part in made}
    source, key = sources.mix(parts, microbatches=microbatches), jax.random.key(3)
    _, drawn = source.next(source.init(), params, key)
    learning = t.biased(params, a=0.3)  # the learner is not the policy that sampled
    mixed = value_and_gradient(learning, drawn.batch, objective, microbatches)
    alone = {part: made[part].next(made[part].init(), params, key_of_part(key, part))[1] for part in made}
    losses = {"rl": objective, "demos": objectives.sft(), "text": objectives.lm()}
    found = {part: value_and_gradient(learning, alone[part].batch, losses[part]) for part in made}
    assert_sum(mixed, [found[part] for part in made], [weights[part] for part in made])
    # Imitated tokens are in no metric of the objective, or of sampler and learner.
    (metrics, own), imitated = (mixed[2], found["rl"][2]), [found["demos"][2]["nll"], found["text"][2]["nll"]]
    for name in own.keys() - {"entropy", "nll", *(name for name in own if name.endswith("_worst"))}:
        np.testing.assert_allclose(metrics[name], own[name], rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(metrics["imitation_nll"], np.sum(imitated, axis=0), rtol=1e-5)


def test_a_part_of_weight_zero_changes_nothing(completer, params):
    objective, key = objectives.dapo(), jax.random.key(3)
    rl = attempts(completer, objective)
    mixed = sources.mix({"rl": sources.Part(rl, 1.0, False), "demos": sources.Part(solutions(), 0.0, True)})
    drawn, alone = mixed.next(mixed.init(), params, key)[1], rl.next(rl.init(), params, key_of_part(key, "rl"))[1]
    learning = t.biased(params, a=0.3)
    assert_sum(value_and_gradient(learning, drawn.batch, objective), [value_and_gradient(learning, alone.batch, objective)], [1])


def test_the_rows_of_a_mix(completer, params):
    source = sources.mix(
        {
            "b": sources.Part(attempts(completer, objectives.dapo()), 1.0, False),
            "a": sources.Part(solutions(), 0.5, True),
            "c": sources.Part(attempts(completer, objectives.dapo()), 1.0, False),
        }
    )
    assert (source.rows, source.samples, source.lengths) == (3 * ROWS, True, (8, 16, 24))
    _, drawn = source.next(source.init(), params, jax.random.key(3))
    batch = drawn.batch
    assert batch.tokens_BT.shape[0] == 3 * ROWS
    assert batch.tokens_BT.shape[1] in source.lengths
    assert sorted(set(batch.rollout_BT[batch.rollout_BT > 0].tolist())) == list(range(1, 3 * ROWS + 1))
    assert batch.imitated_BT[:ROWS].all()
    assert not batch.imitated_BT[ROWS:].any()
    # Two parts with the same tasks sample different attempts.
    assert len(drawn.rollouts) == len(drawn.advantages) == 2 * ROWS
    b, c = drawn.rollouts[:ROWS], drawn.rollouts[ROWS:]
    assert [r.problem for r in b] == [r.problem for r in c]
    assert sum(x.text == y.text for x, y in zip(b, c, strict=True)) < ROWS // 2
    told = drawn.metrics
    assert told["train/tokens"] == (float((batch.segment_BT > 0).sum()), 1.0)
    assert told["train/packing_efficiency"] == (told["train/tokens"][0], batch.tokens_BT.size)
    assert told["time/sample_s"] == (pytest.approx(told["b/time/sample_s"][0] + told["c/time/sample_s"][0]), 1.0)
    assert told["rollout/reward"][0] == pytest.approx(sum(r.verdict.reward for r in drawn.rollouts))
    assert told["a/train/cut"] == (0.0, ROWS)
    assert m.divide(told)["rollout/correct"] == np.mean([r.verdict.correct for r in drawn.rollouts])


def test_a_batch_without_imitated_parts_has_no_such_field(completer, params):
    source = sources.mix({"a": sources.Part(solutions(), 1.0, False), "b": sources.Part(windows(), 1.0, False)})
    _, drawn = source.next(source.init(), params, jax.random.key(3))
    assert drawn.batch.imitated_BT is None
    assert not source.samples


def test_the_state_of_a_mix_is_saved_with_batches_ahead_and_replay(completer, params):
    def make():
        rl = attempts(completer, objectives.dapo(), lag=1, replay=1, replay_age=2, steps=4)
        return sources.mix({"rl": sources.Part(rl, 1.0, False), "demos": sources.Part(solutions(), 0.1, True)})

    source, key = make(), jax.random.key(5)
    assert (source.lag, source.replay) == (1, 1)
    state = source.init()
    for update in range(4):
        saved, now = json.loads(json.dumps(source.save(state))), t.biased(params, a=0.3 * update)
        (state, drawn), (_, same) = source.next(state, now, key), make().next(saved, now, key)
        jax.tree.map(np.testing.assert_array_equal, drawn.batch, same.batch)
    assert state["demos"] == {"position": 4 * ROWS}


# --- from a config ---


def mixed_config(**fields):
    config = load_config("tiny", "smoke,prior=none")
    source = config.rl.source.to_dict()
    task = {"name": "chain", "ops": (1, 3), "size": 64, "demonstrations": "human"}
    demos = {"name": "demonstrations", "task": task, "rows": 16, "max_tokens": 40, "objective": {"name": "sft"}}
    config.rl.source = {"name": "mix", "of": {"rl": source, "demos": demos}, "weights": {"demos": 0.1}}
    config.rl.objective = {"name": "dapo"}
    config.sharding.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    config.evaluate.n = config.evaluate.final_n = 4
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.slow
def test_a_mix_trains_from_a_config(tmp_path):
    run_config(mixed_config(**{"rl.steps": 3}), tmp_path)
    last = read_lines(tmp_path / "metrics.jsonl")[-2]
    assert last["rl/rollout/correct"] == last["rollout/correct"]
    assert last["train/imitation_nll"] > 0
    assert last["train/ratio"] == pytest.approx(1, abs=1e-3)
    assert last["train/tokens"] == last["rl/train/tokens"] + last["demos/train/tokens"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rl.source.weights": {"demo": 1.0}},
            r"unknown part in source.weights 'demo' \(did you mean 'demos'\?\); one of: demos, rl",
        ),
        ({"rl.source.weights": {"demos": -1.0}}, r"source.weights.demos got -1.0; allowed: a finite number, 0 or more"),
        ({"rl.source.weights": {"demos": float("nan")}}, r"source.weights.demos got nan; allowed: a finite number, 0 or more"),
        ({"rl.source.weights": {"demos": "x"}}, r"source.weights.demos got 'x'; allowed: a finite number, 0 or more"),
        ({"rl.source.weights": {"demos": 10**400}}, r"source.weights.demos got 10*; allowed: a finite number, 0 or more"),
        ({"rl.source.weights": {"demos": 1e39}}, r"source.weights.demos got 1e\+39; allowed: a finite number, 0 or more"),
        ({"rl.source.weights": {"demos": 0.0, "rl": 0.0}}, r"so nothing is learned; allowed: a weight above 0 for some part"),
        ({"rl.source.of": {}}, r"source.of of a mix is empty; allowed: one or more parts by name, each a source"),
        (
            {"rl.source.of": {"train": {"name": "corpus"}}},
            r"source.of has a part 'train'; allowed: letters, digits and _, and not",
        ),
        (
            {"rl.source.of": {"x": {"name": "mix", "of": {}}}, "rl.source.weights": {}},
            r"source.of.x is a mix inside a mix; allowed: its parts here",
        ),
        (
            {"rl.source.of": {"x": {"name": "rolouts"}}, "rl.source.weights": {}},
            r"source.of.x: unknown source 'rolouts' \(did you mean 'rollouts'\?\)",
        ),
        ({"rl.source.of.demos.rows": 15}, r"source.of.demos has 15 rows a batch, which do not divide over 2 micro-batches"),
        ({"rl.source.of.demos.rows": 0}, r"source.of.demos: source.rows got 0; allowed: 1 or more"),
        (
            {"rl.source.of.rl.rollouts_per_prompt": 3, "rl.microbatches": None},
            r"source.of.rl: source.rollouts_per_prompt got 3; allowed: a divisor",
        ),
        (
            {"rl.source.of.demos.objective.name": "grpo"},
            r"source.of.demos.objective got 'grpo'; allowed: None \(the objective of the",
        ),
        ({"rl.source.of.demos.objective.name": "sfft"}, r"unknown objective 'sfft' \(did you mean 'sft'\?\)"),
        ({"rl.source.of.demos.objective.nam": "sft"}, r"unknown field of objective 'sft' 'nam'"),
        ({"rl.source.of.rl.lagg": 1}, r"'lagg'"),
        ({"rl.source.of.rl.steps": 3}, r"source.of.rl: unknown field of source.of.rl 'steps'"),
        (
            {"rl.source.of.demos.objective": {"name": "sft", "entropy_top": 0.2}},
            r"source.of.demos.objective got 'sft'; allowed: .* without a penalty or a choice of tokens",
        ),
        (
            {"rl.source.of.demos.objective": {"name": "sft", "advantage": "leave_one_out"}},
            r"'sft' has an advantage that compares the attempts at a problem, but each demonstration of",
        ),
        (
            {"rl.source.of.demos.objective": {"name": "sft", "advantage": "centre_batch"}},
            r"'sft' learns from differences between rewards, but source 'demonstrations' has none",
        ),
        ({"rl.source.of.demos.objective": {"name": "sft", "cut": "out"}}, r"cut got 'out', but source 'demonstrations' has no"),
        (
            {"rl.source.of.rl.group": 1},
            r"objective 'dapo' compares the attempts at a problem, but there is 1 of each; set "
            r"rl.source.of.rl.group to 2 or more",
        ),
        (
            {"rl.objective.name": "ppo", "model.value_head": True},
            r"'ppo' makes advantages of values, or chooses tokens, over a whole batch",
        ),
        (
            {"sharding.mesh.data": 8, "rl.microbatches": 4},
            r"config.rl has 48 rows a batch, which do not divide over 8 devices x 4",
        ),
    ],
)
def test_an_impossible_mix_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        build(mixed_config(**fields), say=lambda line: None)


@pytest.mark.parametrize("asked", ["sft", 3, ["sft"]])
def test_an_objective_of_a_part_that_is_no_section_is_refused(asked):
    section = {"name": "demonstrations", "objective": asked}
    with pytest.raises(ValueError, match=r"source.of.x.objective got .*; allowed: None, or a section, such as"):
        imitating(section, objectives.make("grpo"), "source.of.x")


def test_tokens_that_nobody_sampled_are_not_compared_with_the_sampler():
    """Not with an objective that imitates everything, either."""
    sft = objectives.make("sft")
    assert imitating({"name": "corpus"}, sft, "") is sft
    assert imitating({"name": "kept_rollouts"}, sft, "") is None


def test_the_tasks_of_a_mix_are_training_data():
    """A suite may not have questions of any part."""
    config = mixed_config()
    config.evaluate.suites = {"same": dict(config.rl.source.of.demos.task.to_dict(), split="train")}
    with pytest.raises(ValueError, match=r"suite 'same' holds .* in common with the source task 'chain'"):
        build(config, say=lambda line: None)
