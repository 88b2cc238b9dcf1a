"""The intervention: a model continues from a wrong step, and from the same cut as it
was; the whole text is judged.
"""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_completer as t

from jaxreason import tasks, verify
from jaxreason.environment import Environment, Step, single_turn
from jaxreason.estimators import wilson
from jaxreason.recovery import Recovery, judge_with, recovery
from jaxreason.rollout import Budget
from jaxreason.tasks import behaviour
from jaxreason.types import Task, Verdict


def has_an_a(text, task):
    """Accept a text with an "a"."""
    return Verdict(1.0, "a" in text, text)


def parser():
    """Every "a" is a right step; a wrong one is a "b"."""

    def parse(text, task):
        at = [i for i, c in enumerate(text) if c in "ab"]
        return behaviour.Behaviour(tuple(behaviour.Step("", text[i], text[i] == "a", i, i + 1, 0) for i in at))

    def usable(text, task, found):
        return [(i, ["b"]) for i, step in enumerate(found.steps) if step.right]

    return behaviour.Parser(parse, usable, behaviour.noticed_by(parse))


@pytest.fixture(scope="module")
def completer():
    return t.make_completer(t.make_model()[0])


@pytest.fixture(scope="module")
def params():
    return t.biased(t.make_model()[1], a=2.0, _=-1.0)


@pytest.fixture(scope="module")
def rollouts(completer, params):
    return t.roll(completer, params, t.make_requests(12, 3, longest=5), single_turn(has_an_a))


def recover(completer, params, rollouts, environment=None, **more):
    options = {"key": jax.random.key(1), "temperature": 1.0} | more
    environment = single_turn(has_an_a) if environment is None else environment
    return recovery(completer, completer.sampler.prepare(params), rollouts, environment, t.encode, parser(), **options)


def first_correct(rollouts):
    """Return the first correct rollout of each problem."""
    found = {}
    for r in rollouts:
        if r.verdict.correct:
            found.setdefault(r.problem, r)
    return list(found.values())


def first_fits(r):
    return len(r.prompt) + r.text.index("a") + 1 <= 8


def test_continuations_are_judged_with_their_prefixes(completer, params, rollouts):
    correct = first_correct(rollouts)
    assert len(correct) < sum(r.verdict.correct for r in rollouts)
    never = recover(completer, t.biased(params, a=-1e9), rollouts)
    assert 0 < never.tried < len(correct)
    assert never.tried == never.control == sum(map(first_fits, correct))
    assert (never.too_long, never.without_step) == (len(correct) - never.tried, 0)
    # Without another "a", a text is right only by one before the cut.
    corrupted, control = never.rollouts[: never.tried], never.rollouts[never.tried :]
    assert never.recovered == sum("a" in r.text for r in corrupted) < never.tried
    assert never.noticed == 0
    for one, other, original in zip(corrupted, control, filter(first_fits, correct), strict=True):
        assert (one.task, one.problem, one.attempt) == (original.task, original.problem, original.attempt)
        np.testing.assert_array_equal(one.prompt, original.prompt)
        for r in (one, other):
            forced = int((~r.sampled).sum())
            assert 0 < forced <= 8 - len(r.prompt)
            assert not r.sampled[:forced].any()
            assert not r.logp[:forced].any()
            assert len(r.tokens) == len(r.logp) == len(r.sampled) <= forced + completer.max_tokens
            assert r.text == r.verdict.parsed == t.decode([i for i in r.tokens if i != t.EOS])
        cut = int((~other.sampled).sum())
        assert other.text[:cut] == original.text[:cut]
        assert one.text[: cut - 1] == original.text[: cut - 1]
        assert (other.text[cut - 1], one.text[cut - 1]) == ("a", "b")
    always = recover(completer, t.biased(params, a=1e9), rollouts)
    assert always.recovered == always.control == always.noticed == always.tried == never.tried


def test_the_same_key_gives_the_same_result(completer, params, rollouts):
    first, again = (recover(completer, params, rollouts) for _ in range(2))
    t.assert_same(first.rollouts[: first.tried], again.rollouts[: first.tried], atol=0)
    other = recover(completer, params, rollouts, key=jax.random.key(2))
    assert [r.text for r in first.rollouts] != [r.text for r in other.rollouts]
    some = recover(completer, params, rollouts, most=3)
    assert (some.tried, len(some.rollouts)) == (3, 6)


def test_measures_have_intervals_and_no_rates_without_cases(completer, params, rollouts):
    found = recover(completer, params, rollouts)
    measures = found.measures()
    assert measures["recovery_recovered"] == found.recovered / found.tried
    assert (measures["recovery_control_low"], measures["recovery_control_high"]) == wilson(found.control, found.tried)
    wrong = [r for r in rollouts if not r.verdict.correct]
    assert recover(completer, params, wrong) == Recovery(0, 0, 0, 0, 0, 0)
    assert recover(completer, params, [dataclasses.replace(r, verdict=None) for r in rollouts]).tried == 0
    assert set(Recovery(0, 0, 0, 0, 2, 1).measures()) == {"recovery_tried", "recovery_too_long", "recovery_without_step"}


def test_a_text_that_cannot_be_encoded_is_skipped(completer, params, rollouts):
    correct = next(r for r in rollouts if r.verdict.correct)
    odd = dataclasses.replace(correct, text="<pad>a")
    found = recover(completer, params, [odd, dataclasses.replace(correct, text="cd", problem=99)])
    assert (found.tried, found.too_long, found.without_step) == (0, 1, 1)


def test_an_environment_of_turns_is_refused(completer, params, rollouts):
    turns = Environment(lambda task: task, lambda task, turn: (task, Step(observation="a")))
    with pytest.raises(ValueError, match="writes once"):
        recover(completer, params, rollouts, turns)


def test_steps_after_the_end_of_thinking_are_not_corrupted(completer, params, rollouts):
    thinking = completer._replace(thinking=Budget(6, "c", t.encode("c")))
    found = recover(thinking, params, rollouts)
    assert found.tried > 0
    forced = [r.text[: int((~r.sampled).sum())] for r in found.rollouts]
    original = recover(completer, params, rollouts)
    assert not any("c" in text for text in forced)
    assert any("c" in r.text[: int((~r.sampled).sum())] for r in original.rollouts)


def test_answers_are_judged_by_the_environment():
    environment = single_turn(verify.make("number"))
    correct = judge_with(environment)
    parse = behaviour.of_task("gsm8k", correct).parse
    task = Task("How many?", "18")
    text = "It is 17.\n#### 17\nWait, that's wrong. Let me check: 9 + 9 = 18.\n#### 18"
    found = parse(text, task)
    assert found.answers == (False, True)
    assert (found.self_checks, found.backtracks, found.retries) == (1, 1, 0)


def test_a_family_with_its_own_parser_has_it():
    assert behaviour.of_task("chain").label == ""
    assert {name for name in behaviour.PARSERS if name != "lexical"} <= tasks.TASKS.keys()
    assert behaviour.of_task("svamp").label == "lexical_"
