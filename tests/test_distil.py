"""Divergences over the vocabulary against slow loops, and everything that distils: a
teacher, on-policy distillation, self-distillation with a hint.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import assert_trees_close
from runs import Killed, killed_after, load_config, maths, run_config
from tiny_batch import B, T, random_batch, whole_logits

from jaxreason import batching, learner, objectives, platforms, sharding, text, train
from jaxreason.build import build
from jaxreason.model import transformer
from jaxreason.objectives import divergence
from jaxreason.objectives.divergence import Divergence
from jaxreason.runtime import ledger
from jaxreason.runtime.resume import NotResumable
from jaxreason.sources import hints
from jaxreason.tasks.procedural import ALPHABET
from jaxreason.types import Group, Outputs, Rollout, Task, Verdict

V = 24
KINDS = {
    "reverse_kl": Divergence("reverse_kl"),
    "forward_kl": Divergence("forward_kl"),
    "jensen_shannon": Divergence("jensen_shannon", beta=0.3),
}


# --- the divergences ---


def kl(p, q) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def slow(how: Divergence, logits, logq) -> float:
    """Compute a divergence as its definition says, in float64."""
    odds, q = [math.exp(x) for x in logits], [math.exp(x) for x in logq]
    p = [x / sum(odds) for x in odds]
    if how.top_k:
        best = sorted(range(len(q)), key=lambda i: -q[i])[: how.top_k]
        p, q = ([x[i] for i in best] + [sum(x[i] for i in range(len(x)) if i not in best)] for x in (p, q))
    if how.kind == "reverse_kl":
        return kl(p, q)
    if how.kind == "forward_kl":
        return kl(q, p)
    m = [how.beta * b + (1 - how.beta) * a for a, b in zip(p, q, strict=True)]
    return how.beta * kl(q, m) + (1 - how.beta) * kl(p, m)


def slow_gradient(how: Divergence, logits, logq, step=1e-5) -> list[float]:
    moved = [[x + d * (i == j) for j, x in enumerate(logits)] for d in (step, -step) for i in range(len(logits))]
    up, down = np.split(np.array([slow(how, x, logq) for x in moved]), 2)
    return (up - down) / (2 * step)


@pytest.mark.parametrize("top_k", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_and_its_gradient_against_slow_loops(kind, top_k):
    rng = np.random.default_rng(0)
    logits_RV, other_RV = rng.normal(0, 2, (2, 4, 7))
    logq_RV = other_RV - np.log(np.exp(other_RV).sum(axis=1, keepdims=True))
    how = KINDS[kind]._replace(top_k=top_k)
    with jax.enable_x64(True):
        value_R, by_logits_RV = divergence.measure(how, jax.nn.log_softmax(jnp.asarray(logits_RV)), jnp.asarray(logq_RV))
    np.testing.assert_allclose(value_R, [slow(how, *rows) for rows in zip(logits_RV, logq_RV, strict=True)], rtol=1e-9)
    expected = [slow_gradient(how, *rows) for rows in zip(logits_RV, logq_RV, strict=True)]
    np.testing.assert_allclose(by_logits_RV, expected, atol=1e-8)
    assert np.abs(expected).max() > 0.01


def test_the_highest_values_of_a_row():
    rng = np.random.default_rng(0)
    x_RV = np.concatenate([rng.normal(size=(3, 9)), -np.exp(rng.normal(size=(3, 9)) * 9)]).astype(np.float32)
    x_RV[1, 2] = x_RV[1, 5] = x_RV[1].max()
    x_RV[2, :2] = 0.0, 1e-38
    for k in range(1, 10):
        expected = x_RV >= np.sort(x_RV, axis=1)[:, -k][:, None]
        np.testing.assert_array_equal(divergence.among_highest(jnp.asarray(x_RV), k), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_makes_a_divergence_no_larger_and_one_of_all_tokens_is_exact(kind):
    logp_RV, logq_RV = (jax.nn.log_softmax(x) for x in jax.random.normal(jax.random.key(0), (2, 5, V)))
    measures = [divergence.measure(KINDS[kind]._replace(top_k=k), logp_RV, logq_RV) for k in (*range(1, V + 1), 0)]
    *_, nearly, whole, exact = measures
    for found in (nearly, whole):  # a bucket of one token is that token
        assert_trees_close(found, exact, rtol=1e-5)
    values = np.array([value_R for value_R, _ in measures])
    assert (np.diff(values, axis=0) > -1e-6).all()
    assert (values[0] < values[-1] - 0.01).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_bucket_and_far_distributions_give_finite_numbers(kind):
    logp_RV = jax.nn.log_softmax(jnp.array([[0.0, -200.0, -300.0], [0.0, 90.0, 0.0], [0.0, 0.0, 0.0]]))
    logq_RV = jax.nn.log_softmax(jnp.array([[90.0, 0.0, -200.0], [0.0, -300.0, 0.0], [0.0, 0.0, 0.0]]))
    for top_k in (0, 1, 2):
        value_R, by_logits_RV = divergence.measure(KINDS[kind]._replace(top_k=top_k), logp_RV, logq_RV)
        assert np.isfinite(value_R).all()
        assert np.isfinite(by_logits_RV).all()
        np.testing.assert_allclose([value_R[2], *by_logits_RV[2]], 0, atol=1e-7)


# --- in the chunks of a batch ---


def distilling(how: Divergence) -> objectives.Objective:
    """Make an objective whose loss is the divergence alone."""
    return objectives.make("sft")._replace(divergence=how, token_loss=lambda outputs, batch: (outputs.divergence_BT, {}))


@functools.cache
def completed(model, objective, teacher, microbatches=1):
    return learner.compile_completion(model, objective, teacher=teacher, microbatches=microbatches)


def with_reference(batch, model, objective, teacher, reference, microbatches=1):
    return completed(model, objective, teacher, microbatches)(batch, None, reference)


@functools.cache
def gradient_of(model, objective, teacher):
    loss = functools.partial(learner.loss, model=model, objective=objective, teacher=teacher)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def set_limit(monkeypatch, **fields):
    monkeypatch.setitem(platforms.PLATFORMS, "cpu", platforms.PLATFORMS["cpu"]._replace(**fields))


def by_whole_logits(how, model, params, batch, teacher, reference):
    """Compute the loss from all logits at once; JAX makes the gradient."""
    logq_BTV = np.asarray(whole_logits(teacher)(reference, batch), np.float64)[:, :-1] / batch.temperature_BT[:, 1:, None]
    logq_BTV = jax.nn.log_softmax(jnp.asarray(logq_BTV, jnp.float32))

    def total(params):
        logits_BTV = whole_logits(model)(params, batch)[:, :-1] / batch.temperature_BT[:, 1:, None]
        logp_BTV = jax.nn.log_softmax(logits_BTV)
        p, q = jnp.exp(logp_BTV), jnp.exp(logq_BTV)
        if how.kind == "reverse_kl":
            each = p * (logp_BTV - logq_BTV)
        elif how.kind == "forward_kl":
            each = q * (logq_BTV - logp_BTV)
        else:
            m = how.beta * q + (1 - how.beta) * p
            each = how.beta * q * (logq_BTV - jnp.log(m)) + (1 - how.beta) * p * (logp_BTV - jnp.log(m))
        return jnp.sum(batch.weight_BT[:, 1:] * each.sum(axis=-1))

    return jax.value_and_grad(total)(params)


@pytest.mark.parametrize("kept", [0, 2**20])
@pytest.mark.parametrize("chunks", [2, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_another_width_in_chunks(tiny, monkeypatch, kind, chunks, kept):
    model, params = tiny(layers=1)
    teacher, reference = tiny(layers=2, width=24, tied_embeddings=kind == "forward_kl")
    batch = random_batch(temperature=np.random.default_rng(1).uniform(0.5, 2.0, (B, T)))
    objective = distilling(KINDS[kind])
    batch = with_reference(batch, model, objective, teacher, reference)
    assert batch.reference_hidden_BTD.shape == (B, T, 24)
    set_limit(monkeypatch, logits_at_once=2 * B * T * V // chunks, logits_kept=kept)
    gradient_of.cache_clear()
    (value, _), gradient = gradient_of(model, objective, teacher)(params, batch, teacher.head(reference))
    expected_value, expected = by_whole_logits(KINDS[kind], model, params, batch, teacher, reference)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert_trees_close(gradient, expected)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) > 1e-3


def test_no_gradient_reaches_the_reference(tiny):
    model, params = tiny(layers=1)
    objective = distilling(KINDS["reverse_kl"])
    _, other = tiny(layers=2)
    batch = with_reference(random_batch(), model, objective, None, params)

    def total(head, hidden_BTD):
        return learner.loss(
            other, dataclasses.replace(batch, reference_hidden_BTD=hidden_BTD), head, model=tiny(layers=2)[0], objective=objective
        )[0]

    gradient = jax.grad(total, argnums=(0, 1))(model.head(params), batch.reference_hidden_BTD)
    assert not any(jnp.any(x) for x in jax.tree.leaves(gradient))


def test_a_policy_does_not_diverge_from_itself(tiny):
    model, params = tiny(layers=1)
    for kind in KINDS:
        objective = distilling(KINDS[kind])
        batch = with_reference(random_batch(temperature=0.7), model, objective, None, params)
        for head in (None, model.head(params)):  # without one, that of the params is used
            (value, _), gradient = gradient_of(model, objective, None)(params, batch, head)
            np.testing.assert_allclose(value, 0, atol=1e-6)
            assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) < 1e-6


@pytest.mark.parametrize("top_k", [0, 4])
def test_micro_batches_and_devices_change_nothing(tiny, top_k):
    model, params = tiny()
    teacher, reference = tiny(layers=1, width=24)
    objective, optimizer = distilling(Divergence("jensen_shannon", 0.3, top_k)), optax.sgd(0.1)
    found = []
    meshes = sharding.make_mesh(fsdp=4, tensor=2), sharding.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    for microbatches, mesh in ((1, None), (4, None), (1, meshes[0]), (2, meshes[1])):
        state, head, placed, batch = learner.new_state(jax.tree.map(jnp.copy, params), optimizer), reference, None, random_batch()
        there, here = teacher, model
        if mesh is not None:
            there, here = transformer(teacher.config, mesh), transformer(model.config, mesh)
            placed = sharding.shardings(state, mesh)
            state, batch = jax.device_put(state, placed), sharding.put_rows(batch, mesh)
            head = jax.device_put(reference, sharding.shardings(reference, mesh))
        complete = learner.compile_completion(here, objective, teacher=there, microbatches=microbatches, mesh=mesh)
        step = learner.compile_train_step(
            here, objective, optimizer, microbatches=microbatches, state_shardings=placed, teacher=there
        )
        state, metrics = step(state, complete(batch, state.params, head), teacher.head(head))
        found.append(jax.device_get((state.params, metrics["loss"])))
    for other in found[1:]:
        assert_trees_close(other, found[0])


def test_a_step_with_a_divergence_compiles_once(tiny):
    model, params = tiny(layers=1)
    objective, optimizer = distilling(KINDS["reverse_kl"]), optax.sgd(0.1)
    complete = learner.compile_completion(model, objective)
    step = learner.compile_train_step(model, objective, optimizer)
    state = learner.new_state(jax.tree.map(jnp.copy, params), optimizer)
    for seed in range(3):
        state, _ = step(state, complete(random_batch(seed), state.params, params), model.head(params))
    assert step._cache_size() == 1


# --- the objectives ---


def test_the_exact_kl_adds_coefficient_times_divergence(tiny):
    model, params = tiny(layers=1)
    reference = jax.tree.map(lambda x: 1.5 * x, params)
    exact = objectives.make("grpo", kl_coefficient=0.25, kl_estimator="exact")
    assert exact.refers
    assert not exact.needs_reference
    batch = with_reference(random_batch(), model, exact, None, reference)
    head = model.head(reference)
    (value, metrics), gradient = gradient_of(model, exact, None)(params, batch, head)
    pieces = objectives.make("grpo"), distilling(KINDS["reverse_kl"])
    parts = [gradient_of(model, objective, None)(params, batch, head) for objective in pieces]
    np.testing.assert_allclose(value, parts[0][0][0] + 0.25 * parts[1][0][0], rtol=1e-5)
    assert_trees_close(gradient, jax.tree.map(lambda a, b: a + 0.25 * b, parts[0][1], parts[1][1]))
    assert float(metrics["kl"][0]) > 0.1


def test_the_estimate_of_a_sampled_token_has_the_gradient_of_the_divergence():
    """By enumeration: the expectation over tokens that p samples."""
    theta, logq = jnp.array([0.3, -0.7, 0.9]), jax.nn.log_softmax(jnp.array([-0.2, 0.5, 0.1]))
    objective, p = objectives.make("distil", over="token", correct="none"), jax.nn.softmax(theta)

    def expected(theta):
        outputs = Outputs(jax.nn.log_softmax(theta)[None], jnp.zeros((1, 3)))
        batch = SimpleNamespace(advantage_BT=jnp.ones((1, 3)), reference_logp_BT=logq[None])
        return jnp.sum(p * objective.token_loss(outputs, batch)[0][0])

    _, slope = divergence.measure(Divergence(), jax.nn.log_softmax(theta)[None], logq[None])
    np.testing.assert_allclose(jax.grad(expected)(theta), slope[0], rtol=1e-5)
    assert objective.needs_reference
    assert objective.on_policy
    assert objective.divergence is None


@pytest.mark.parametrize("name", ["distil", "self_distil"])
def test_distillation_is_a_mean_over_tokens_and_rewards_count_only_if_asked(name):
    reward_PG = np.array([[1.0, 0.0], [0.5, -2.0]])
    objective = objectives.make(name, divergence="jensen_shannon", beta=0.1, top_k=5)
    assert objective.divergence == Divergence("jensen_shannon", 0.1, 5)
    np.testing.assert_array_equal(objective.advantage(reward_PG), 1.0)
    np.testing.assert_allclose(objective.weigh(np.array([[1, 3], [4, 2]]), None, 9), 0.1)
    outputs = Outputs(jnp.zeros((1, 2)), jnp.zeros((1, 2)), None, jnp.array([[0.5, 2.0]]))
    loss_BT, found = objective.token_loss(outputs, SimpleNamespace(advantage_BT=jnp.array([[1.0, 0.0]])))
    np.testing.assert_array_equal(loss_BT, [[0.5, 0.0]])
    np.testing.assert_array_equal(found["divergence"], [[0.5, 2.0]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"divergence": "kl"}, "divergence got 'kl'; allowed: reverse_kl, forward_kl, jensen_shannon"),
        ({"beta": 1.0}, r"beta got 1\.0; allowed: above 0 and below 1"),
        ({"top_k": -1}, "top_k got -1; allowed: 1 or more tokens, or 0"),
        ({"over": "words"}, "over got 'words'; allowed: vocabulary, token"),
        ({"over": "token", "divergence": "forward_kl"}, "over='token' got divergence='forward_kl'.*allowed: reverse_kl"),
        ({"over": "token", "top_k": 3}, "over='token' got .*top_k=3"),
        ({"kl_coefficient": 0.1, "kl_estimator": "exact"}, "kl_estimator got 'exact', but the objective is itself a divergence"),
    ],
)
def test_wrong_numbers_of_distillation_are_refused(fields, message):
    for name in ("distil", "self_distil"):
        with pytest.raises(ValueError, match=message):
            objectives.make(name, **fields)


# --- teachers, in runs ---


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Train a teacher of another width for some steps; return the folder of its run."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    fields = {"model.width": 24, "model.layers": 2, "rl.steps": 0, "prior.steps": 3, "checkpoint.every_steps": 2}
    summary = run_config(load_config("tiny", "smoke", **fields), folder)
    (folder / "config.json").write_text(json.dumps(summary["config"]))
    return folder


def distil_config(reference, objective=None, **fields):
    config = load_config("tiny", "smoke", **{"rl.steps": 4, "checkpoint.every_steps": 1, **fields})
    config.rl.objective = objective or {"name": "distil"}
    if reference is not None:
        config.rl.reference = reference
    return config


def with_distillation(folder) -> list[dict]:
    return [line for line in maths(folder) if line["phase"] == "rl" and "train/loss" in line]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("objective", [{"divergence": "jensen_shannon", "top_k": 5}, {"over": "token"}])
def test_a_run_with_a_teacher_continues_bit_for_bit(teachers, tmp_path, monkeypatch, objective):
    def config():
        return distil_config(
            str(teachers), {"name": "distil", **objective}, **{"rl.updates_per_batch": 2, "rl.offload_reference": True}
        )

    run_config(config(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed_after(patch, 6)
        with pytest.raises(Killed):
            run_config(config(), tmp_path / "cut")
    assert not list((tmp_path / "cut" / "checkpoints").glob("*/reference"))  # it is read again
    run_config(config(), tmp_path / "cut")
    assert maths(tmp_path / "cut") == maths(tmp_path / "whole")
    logged = with_distillation(tmp_path / "whole")
    assert len(logged) == 4
    assert all(np.isfinite(line["train/divergence"]) for line in logged)


def hinted_config(hint="answer", objective=None, **fields):
    config = distil_config(None, objective or {"name": "self_distil"}, **fields)
    config.rl.source.hint, config.rl.source.hint_text = hint, "{question}{hint};"
    return config


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(
    ("hint", "fields"), [("answer", {"rl.updates_per_batch": 2}), ("answer", {"rl.source.lag": 1}), ("verdict", {})]
)
def test_a_run_that_distils_itself_continues_bit_for_bit(tmp_path, monkeypatch, hint, fields):
    steps, compile_train_step = [], learner.compile_train_step

    def compiled(*args, **kwargs):
        steps.append(compile_train_step(*args, **kwargs))
        return steps[-1]

    monkeypatch.setattr(train, "compile_train_step", compiled)
    run_config(hinted_config(hint, **fields), tmp_path / "whole")
    assert steps[-1]._cache_size() <= 2  # one for each length of rows
    with monkeypatch.context() as patch:
        killed_after(patch, 6)
        with pytest.raises(Killed):
            run_config(hinted_config(hint, **fields), tmp_path / "cut")
    run_config(hinted_config(hint, **fields), tmp_path / "cut")
    assert maths(tmp_path / "cut") == maths(tmp_path / "whole")
    logged = with_distillation(tmp_path / "whole")
    assert len(logged) == 4
    if hint == "answer":
        assert all(line["train/divergence"] > 0 for line in logged)
        assert all(line["rollout/hinted"] == 1 for line in logged)
    else:  # this tokenizer has no letters for the reasons, so nobody has a hint
        assert all(line["train/divergence"] is None for line in logged)
        assert all(line["rollout/hinted"] == 0 for line in logged)


@pytest.mark.slow
@pytest.mark.process
def test_a_teacher_can_be_learned_from_on_given_texts(teachers, tmp_path):
    config = load_config("tiny", "smoke", **{"rl.steps": 0, "prior.log_every": 1})
    config.prior.objective, config.prior.reference = {"name": "distil", "divergence": "forward_kl"}, str(teachers)
    run_config(config, tmp_path)
    losses = [line["train/divergence"] for line in maths(tmp_path) if "train/divergence" in line]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.process
def test_a_teacher_that_has_changed_is_noticed(teachers, tmp_path):
    mine = tmp_path / "teacher"
    shutil.copytree(teachers, mine)
    run_config(distil_config(str(mine), **{"rl.steps": 1}), tmp_path / "run")
    shutil.rmtree(mine / "checkpoints" / "3")
    with pytest.raises(NotResumable, match="it was step 3 and is step 2; name the checkpoint"):
        run_config(distil_config(str(mine), **{"rl.steps": 2}), tmp_path / "run")


@pytest.mark.parametrize(
    ("reference", "objective", "fields", "message"),
    [
        ("TEACHER", {"name": "rloo"}, {}, "reference got .* but the objective has no reference policy; allowed: None"),
        ("start", {"name": "rloo"}, {}, "reference got 'start', but the objective has no reference policy"),
        ("TEACHER", {"name": "rloo", "kl_coefficient": 0.0}, {}, "or rl.objective.kl_coefficient above 0"),
        (
            "current",
            {"name": "rloo", "kl_coefficient": 0.1},
            {},
            "'current' without a hint.*allowed: a checkpoint, start",
        ),
        ("current", {"name": "distil"}, {}, "'current' without a hint.*gradient of their distance is zero"),
        (None, {"name": "distil"}, {}, "'start' without a hint.*at the first update.*allowed: a checkpoint, or a hint"),
        ("nowhere", {"name": "distil"}, {}, "config.rl.reference got 'nowhere': no folder"),
        ("TEACHER/checkpoints/7", {"name": "distil"}, {}, "has no checkpoint of step 7"),
        ("TEACHER", {"name": "distil"}, {"text.alphabet": ALPHABET[::-1]}, "its tokenizer is another one"),
        ("TEACHER", {"name": "distil"}, {"model.vocab_size": 64}, "it has vocab_size=.* and the model here 64; allowed"),
        (
            None,
            {"name": "rloo"},
            {"rl.offload_reference": True},
            "offload_reference got True, but the objective has no",
        ),
        (
            "TEACHER",
            {"name": "distil", "over": "token", "correct": "none"},
            {"rl.source.lag": 1},
            "source.lag got 1, but the objective has",
        ),
        (None, {"name": "self_distil"}, {}, "objective 'self_distil' needs a hint for its teacher; set rl.source.hint"),
    ],
)
def test_what_a_reference_needs_is_said_before_the_run(teachers, reference, objective, fields, message):
    reference = reference and reference.replace("TEACHER", str(teachers))
    with pytest.raises(ValueError, match=message):
        build(distil_config(reference, objective, **fields))


@pytest.mark.parametrize(
    ("hint", "objective", "fields", "message"),
    [
        ("answer", {"name": "rloo"}, {}, "source.hint got 'answer', but objective 'rloo' does not learn from a teacher"),
        ("truth", {"name": "self_distil"}, {}, "unknown hint 'truth'.*answer, attempt, none, solution, verdict"),
        (
            "solution",
            {"name": "self_distil"},
            {},
            "'solution', but no task has one; allowed: answer, verdict, attempt",
        ),
        ("answer", {"name": "self_distil"}, {"hint_text": "{hint}"}, "it must contain {question} and {hint}"),
        ("answer", {"name": "self_distil"}, {"hint_text": "{question}! {hint}"}, "which the tokenizer can't encode"),
        ("answer", {"name": "self_distil"}, {"hint_tokens": 0}, "hint_tokens got 0; allowed: 1 or more, or None"),
        ("none", {"name": "self_distil"}, {}, "objective 'self_distil' needs a hint for its teacher"),
        ("answer", {"name": "self_distil"}, {"offload_reference": True}, "the reference is the current params; allowed: False"),
        ("answer", {"name": "self_distil", "over": "token", "correct": "none"}, {"lag": 1}, "source.lag got 1"),
    ],
)
def test_what_a_hint_needs_is_said_before_the_run(hint, objective, fields, message):
    config = hinted_config(hint, objective)
    for name, value in fields.items():
        (config.rl if name == "offload_reference" else config.rl.source)[name] = value
    with pytest.raises(ValueError, match=message):
        build(config)


def test_fields_of_a_hint_need_one(teachers):
    config = distil_config(str(teachers), **{"rl.source.hint_tokens": 5})
    with pytest.raises(ValueError, match="hint_tokens=5 without a hint; allowed: None"):
        build(config)


def test_a_token_of_the_teacher_needs_tokens_of_the_policy(teachers):
    config = load_config("tiny", "smoke")
    config.prior.objective, config.prior.reference = {"name": "distil", "over": "token"}, str(teachers)
    with pytest.raises(ValueError, match="over='token' estimates the divergence from tokens that the policy sampled"):
        build(config)


# --- hints ---

P, G = 4, 4


def attempts(seed=0):
    """Draw groups of rollouts of a model with V tokens."""
    rng = np.random.default_rng(seed)

    def attempt(p, g, prompt):
        n = int(rng.integers(1, 7))
        forced = rng.random(n) < 0.2
        forced[0] = False
        tokens, task = rng.integers(1, V, n).astype(np.int32), Task(f"q{p}", str(p), f"s{p}")
        verdict = Verdict(float(g % 2), g % 2 == 1, reason=f"r{g}" if g else "")
        return Rollout(task, p, g, prompt, tokens, np.zeros(n, np.float32), ~forced, "eos", f" t{p}{g} ", verdict, 0.8)

    prompts = [rng.integers(1, V, int(rng.integers(2, 5))).astype(np.int32) for _ in range(P)]
    return [Group(tuple(attempt(p, g, prompts[p]) for g in range(G))) for p in range(P)]


def longer(groups, seed=1, without=()) -> list:
    """Draw a prompt with a hint for each rollout, of 0 to 4 tokens."""
    rng = np.random.default_rng(seed)
    rollouts = [r for group in groups for r in group.attempts]
    made = [np.append(r.prompt, rng.integers(1, V, int(rng.integers(0, 5)))).astype(np.int32) for r in rollouts]
    return [None if i in without else prompt for i, prompt in enumerate(made)]


def laid_out(groups, objective, hinted, **layout):
    share = layout.get("rollouts_per_prompt", 1)
    columns = (share - 1) * 8 + share * 4
    return batching.from_groups(groups, objective, buckets=(16, 32), limit=8, hinted=hinted, hint_columns=columns, **layout)


LAYOUTS = (
    {},
    {"pack": True},
    {"rollouts_per_prompt": 2},
    {"rollouts_per_prompt": 4, "pack": True},
    {"pack": True, "microbatches": 4},
)


@pytest.mark.parametrize("over", ["vocabulary", "token"])
def test_a_hint_means_the_same_in_any_layout(tiny, over):
    """Also to a teacher that reads each rollout with its hint alone."""
    model, params = tiny(layers=1)
    teacher, reference = tiny(layers=2, width=24)
    objective, groups = objectives.make("self_distil", over=over), attempts()
    hinted, head = longer(groups, without=(3, 8)), teacher.head(reference)
    rollouts, found = [r for group in groups for r in group.attempts], []
    for layout in LAYOUTS:
        batch, count = laid_out(groups, objective, hinted, **layout), layout.get("microbatches", 1)
        batch = with_reference(batch, model, objective, teacher, reference, count)
        step = learner.compile_train_step(model, objective, optax.sgd(0.1), microbatches=count, teacher=teacher)
        state = learner.new_state(jax.tree.map(jnp.copy, params), optax.sgd(0.1))
        state, metrics = step(state, batch, *([head] if objective.divergence else []))
        found.append(jax.device_get((state.params, metrics["loss"], metrics["divergence"])))
    for other in found[1:]:
        assert_trees_close(other, found[0])
    total = 0.0
    for r, prompt in zip(rollouts, hinted, strict=True):
        if prompt is None:
            continue
        shown, places = dataclasses.replace(r, prompt=prompt), np.arange(len(r.tokens))
        alone = [batching.from_groups([Group((x,))], objective, buckets=(16,), limit=8) for x in (r, shown)]
        logits = whole_logits(model)(params, alone[0])[0], whole_logits(teacher)(reference, alone[1])[0]
        starts = len(r.prompt) - 1, len(prompt) - 1
        rows = [jax.nn.log_softmax(x[start + places] / 0.8) for x, start in zip(logits, starts, strict=True)]
        of_token = (rows[0] - rows[1])[places, r.tokens]
        value = divergence.measure(Divergence(), *rows)[0] if over == "vocabulary" else of_token
        total += float(np.sum(np.where(r.sampled, value, 0.0)))
    np.testing.assert_allclose(found[0][2][0], total, rtol=1e-4)
    assert found[0][2][1] == sum(r.sampled.sum() for r, prompt in zip(rollouts, hinted, strict=True) if prompt is not None)


@pytest.mark.parametrize("over", ["vocabulary", "token"])
def test_an_empty_hint_teaches_nothing(tiny, over):
    model, params = tiny(layers=1)
    objective, groups = objectives.make("self_distil", over=over), attempts()
    same = [r.prompt for group in groups for r in group.attempts]
    for layout in LAYOUTS[:4]:
        batch = with_reference(laid_out(groups, objective, same, **layout), model, objective, None, params)
        (value, metrics), gradient = gradient_of(model, objective, None)(params, batch, None)
        np.testing.assert_allclose([value, np.divide(*metrics["divergence"])], 0, atol=1e-6)
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) < 1e-6
    batch = with_reference(laid_out(groups, objective, longer(groups)), model, objective, None, params)
    gradient = gradient_of(model, objective, None)(params, batch, None)[1]
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)) > 1e-4


def test_a_rollout_without_a_hint_weighs_nothing_but_is_counted():
    objective, groups = objectives.make("self_distil"), attempts()
    batch = laid_out(groups, objective, longer(groups, without=(2, 5)))
    trained = np.concatenate([r.sampled for group in groups for r in group.attempts]).sum()
    for number in range(1, P * G + 1):
        weights = batch.weight_BT[batch.rollout_BT == number]
        assert set(weights.tolist()) <= ({0.0} if number in (3, 6) else {0.0, float(np.float32(1 / trained))})
    assert not batch.hinted.column_BT[np.isin(batch.rollout_BT, (0, 3, 6))].any()


def test_a_teacher_reads_the_same_tokens():
    objective, groups = objectives.make("self_distil"), attempts()
    hinted = longer(groups)
    for layout in LAYOUTS:
        batch = laid_out(groups, objective, hinted, **layout)
        rows = batch.hinted
        assert rows.tokens_BU.shape[1] - batch.tokens_BT.shape[1] in (4, 16, 40)
        b, t = np.nonzero(batch.rollout_BT)
        np.testing.assert_array_equal(rows.tokens_BU[b, rows.column_BT[b, t]], batch.tokens_BT[b, t])
        for number, prompt in enumerate(hinted, start=1):
            b, t = np.argwhere(batch.rollout_BT == number)[0]
            begin = rows.column_BT[b, t] - len(prompt)
            np.testing.assert_array_equal(rows.tokens_BU[b, begin : begin + len(prompt)], prompt)
            np.testing.assert_array_equal(rows.position_BU[b, begin : begin + len(prompt)], np.arange(len(prompt)))


def test_hints_of_each_kind():
    group = attempts()[2]
    assert [hints.hint_for("answer", group, i) for i in range(G)] == ["2"] * G
    assert [hints.hint_for("solution", group, i) for i in range(G)] == ["s2"] * G
    assert [hints.hint_for("verdict", group, i) for i in range(G)] == ["", "r1", "r2", "r3"]
    assert [hints.hint_for("attempt", group, i) for i in range(G)] == ["t21", "t23", "t23", "t21"]  # of another one
    wrong = [dataclasses.replace(r, verdict=Verdict(0.0, False)) for r in group.attempts]
    assert hints.hint_for("attempt", Group(tuple(wrong)), 0) == ""
    alone = Group((*wrong[:3], group.attempts[3]))
    assert [hints.hint_for("attempt", alone, i) for i in range(G)] == ["t23"] * G  # its own, if no other is right


def test_prompts_with_hints():
    tokenizer = text.make("characters", alphabet="qrs0123{hint}: ")
    format, groups = text.plain(tokenizer, "{question}:"), attempts()
    made = hints.Hints("verdict", format.prompt, "{question} {hint}", 5, 0)
    found = hints.hinted_prompts(made, groups)
    assert [None if x is None else tokenizer.decode(x[1:].tolist()) for x in found[:G]] == [None, "q0 r1:", "q0 r2:", "q0 r3:"]
    odd = dataclasses.replace(groups[0].attempts[1], verdict=Verdict(0.0, False, reason="{question}"))
    same = dataclasses.replace(odd, task=Task("{hint}", "1"), verdict=Verdict(0.0, False, reason="t"))
    unknown = dataclasses.replace(odd, verdict=Verdict(0.0, False, reason="éé"))
    long = dataclasses.replace(odd, verdict=Verdict(0.0, False, reason="tttttttt"))
    for r, expected in ((same, "{hint} t:"), (unknown, None), (long, None)):
        (got,) = hints.hinted_prompts(made._replace(tokens=8), [Group((r,))])
        assert (None if got is None else tokenizer.decode(got[1:].tolist())) == expected


def test_the_pass_of_a_teacher_is_counted_over_its_own_rows(tiny):
    teacher, groups, objective = tiny(width=24)[0].config, attempts(), objectives.make("self_distil")
    hinted = longer(groups)
    rollouts = [r for group in groups for r in group.attempts]
    shown = [dataclasses.replace(r, prompt=prompt) for r, prompt in zip(rollouts, hinted, strict=True)]
    alone = [batching.from_groups([Group((r,))], objective, buckets=(32,), limit=8) for r in shown]
    expected = ledger.reading(teacher, alone)
    for layout in LAYOUTS:
        np.testing.assert_allclose(ledger.referring(teacher, laid_out(groups, objective, hinted, **layout)), expected)
    plain = batching.from_groups(groups, objective, buckets=(32,), limit=8)
    assert ledger.referring(teacher, plain) == ledger.reading(teacher, [plain]) < expected


def test_hints_on_several_devices_change_nothing(tiny):
    model, params = tiny(layers=1)
    objective, groups, optimizer = objectives.make("self_distil", top_k=5), attempts(), optax.sgd(0.1)
    whole = laid_out(groups, objective, longer(groups, without=(3, 8)), pack=True)
    found = []
    for mesh in (None, sharding.make_mesh(fsdp=4, tensor=2)):
        here, state, placed, batch = model, learner.new_state(jax.tree.map(jnp.copy, params), optimizer), None, whole
        if mesh is not None:
            here, placed = transformer(model.config, mesh), sharding.shardings(state, mesh)
            state, batch = jax.device_put(state, placed), sharding.put_rows(whole, mesh)
        other = jax.tree.map(lambda x: 1.5 * x, state.params)
        batch = learner.compile_completion(here, objective, mesh=mesh)(batch, state.params, other)
        step = learner.compile_train_step(here, objective, optimizer, state_shardings=placed)
        state, metrics = step(state, batch, here.head(other))
        found.append(jax.device_get((state.params, metrics["loss"], metrics["divergence"])))
    assert_trees_close(found[1], found[0])
    assert found[0][1][0] > 0.01
