"""Evaluation: suites in order, the same tasks and noise at every call, an interval
around each accuracy.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_completer as t

from jaxreason import objectives
from jaxreason.batching import from_demonstrations, from_windows
from jaxreason.environment import single_turn
from jaxreason.estimators import wilson
from jaxreason.evaluation import Suite, Text, evaluate, score
from jaxreason.types import Prompted, Task, Verdict


def suite(name, letter, size):
    def verify(text, task):
        return Verdict(0.5, task.answer in text, text)

    tasks = [Prompted(Task(str(i), letter, id=f"{name} {i}"), [1 + i % 11]) for i in range(size)]
    return Suite(name, tasks, single_turn(verify))


SUITES = [suite("easy", "", 5), suite("hard", "no such letter", 7), suite("fair", "h", 40)]


@pytest.fixture(scope="module")
def completer():
    return t.make_completer(t.make_model()[0])


@pytest.fixture(scope="module")
def params():
    return t.biased(t.make_model()[1], _=0.8)


def run(completer, params, suites=SUITES, **more):
    options = {"temperatures": (0.0, 1.0), "n": 30, "seed": 0, "phase": "prior", "step": 8}
    return evaluate(completer, params, suites, **options | more)


def test_suites_in_order_with_intervals(completer, params):
    evaluations, rollouts = run(completer, params)
    assert [(e.suite, e.temperature, e.n) for e in evaluations] == [
        (name, temperature, n) for name, n in (("easy", 5), ("hard", 7), ("fair", 30)) for temperature in (0.0, 1.0)
    ]
    for e in evaluations:
        assert (e.phase, e.step) == ("prior", 8)
        assert 0 <= e.low <= e.accuracy <= e.high <= 1
        assert e.low < e.high
        assert (e.low, e.high) == wilson(round(e.accuracy * e.n), e.n)
    assert [e.accuracy for e in evaluations[:4]] == [1, 1, 0, 0]
    assert all(0.1 < e.accuracy < 0.9 for e in evaluations[4:])
    # The rollouts stand in the same order, and accuracy is of what is correct, not of
    # what was earned.
    expected = [(task.id, temperature) for s in SUITES for temperature in (0.0, 1.0) for task, _ in s.tasks[:30]]
    assert [(r.task.id, r.temperature) for r in rollouts] == expected
    assert evaluations[5].accuracy == np.mean([r.verdict.correct for r in rollouts[-30:]])


def test_every_call_has_the_same_noise(completer, params):
    noisy = {"temperatures": (1.0,)}
    evaluations, rollouts = run(completer, params, **noisy)
    again, same = run(completer, params, **noisy, phase="later", step=9)
    assert [e._replace(phase="prior", step=8) for e in again] == evaluations
    t.assert_same(same[12:], rollouts[12:], atol=0)
    _, other = run(completer, params, **noisy, seed=1)
    _, changed = run(completer, t.biased(params, h=3.0), **noisy)
    for drawn in (other, changed):
        assert sum(a.text == b.text for a, b in zip(drawn, rollouts, strict=True)) < len(rollouts) // 2


def test_suites_and_temperatures_do_not_change_each_other(completer, params):
    _, alone = run(completer, params, temperatures=(1.0,))
    _, mixed = run(completer, params, temperatures=(0.7, 0.0, 1.0))
    assert [r.text for r in alone] == [r.text for r in mixed if r.temperature == 1.0]
    # Fewer tasks are the first of them, attempted alike.
    _, few = run(completer, params, temperatures=(1.0,), n=6)
    assert [r.text for r in few[11:]] == [r.text for r in alone[12:18]]


def test_suites_do_not_share_noise(completer, params):
    twins = [suite("one", "h", 20), suite("two", "h", 20)]
    _, rollouts = run(completer, params, suites=twins, temperatures=(1.0,))
    assert sum(a.text == b.text for a, b in zip(rollouts[:20], rollouts[20:], strict=True)) < 10


def test_text_is_scored_by_the_token():
    model, params = t.make_model()
    rng = np.random.default_rng(0)
    windows = Text("windows", [from_windows(rng.integers(0, 12, (2, 9)), objectives.lm()) for _ in range(3)])
    pairs = [([1, 2, 3, 4, 5], [0, 0, 1, 1, 1]), ([1, 2], [0, 1])]
    answers = Text("answers", [from_demonstrations(pairs, objectives.sft(), buckets=(9,))])
    got = score(t.token_logp(model), params, [windows, answers])
    assert list(got) == ["windows", "answers"]
    for text in (windows, answers):
        logp = np.concatenate([np.asarray(t.token_logp(model)(params, b))[b.weight_BT > 0] for b in text.batches])
        assert len(logp) == {"windows": 3 * 2 * 8, "answers": 4}[text.name]
        assert got[text.name] == pytest.approx(-logp.mean(), rel=1e-5)
    flat = {**params, "unembed": {"kernel": jnp.zeros_like(params["unembed"]["kernel"])}}
    assert score(t.token_logp(model), flat, [windows])["windows"] == pytest.approx(np.log(12), rel=1e-5)
