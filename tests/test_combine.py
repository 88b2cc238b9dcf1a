"""Verifiers made of others: rewards add up, form never makes an answer correct, and
length costs what equation 13 of DAPO says.
"""

import json
import math
import re
import sys
import types

import pytest
import tiny_completer as t
from runs import SMOKE, load_config, main

from jaxreason import build, verify
from jaxreason.build.tasks import check_keys, judge, make_judge
from jaxreason.environment import Turn, retry, single_turn
from jaxreason.main import describe
from jaxreason.options import command, fields
from jaxreason.types import Task, Verdict
from jaxreason.verify import combine, make

TASK = Task("?", "5", id="five")
NUMBER, FORM = {"name": "number"}, {"name": "format"}
FORMED, BARE = "<think>a</think>5", "5"


@pytest.fixture
def own(monkeypatch):
    """Add functions to a module `mine`, as a user's own verifiers."""
    module = types.ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)

    def add(name, verifier):
        setattr(module, name, lambda: verifier)
        return {"name": f"mine:{name}"}

    return add


@pytest.mark.parametrize(
    ("text", "reward", "correct", "reason"),
    [
        (FORMED, 1.0, True, "right"),
        (BARE, 0.0, False, "no form"),
        ("<think>a</think>6", 0.0, False, "wrong"),
        ("6", 0.0, False, "wrong"),
        ("", 0.0, False, "no answer"),
    ],
)
def test_all_of_needs_every_part(text, reward, correct, reason):
    found = make("all_of", of=(NUMBER, FORM))(text, TASK)
    assert (found.reward, found.correct, found.reason) == (reward, correct, reason)


@pytest.mark.parametrize(
    ("text", "reward", "correct"), [(FORMED, 1.2, True), (BARE, 1.0, True), ("<think>a</think>6", 0.2, False), ("6", 0.0, False)]
)
def test_weighted_adds_up_and_the_first_part_judges_the_answer(text, reward, correct):
    found = make("weighted", of=(NUMBER, FORM), weights=(1.0, 0.2))(text, TASK)
    assert (found.reward, found.correct, found.parsed) == (pytest.approx(reward), correct, text[-1])
    assert found.measures == {"reward_number": float(correct), "reward_format": float("think" in text)}


def test_a_reward_for_form_makes_no_attempt_correct():
    for name, more in (("all_of", {}), ("weighted", {"weights": (1.0, 1.0)})):
        found = make(name, of=(FORM, NUMBER), **more)(FORMED, TASK)
        assert (found.reward > 0, found.correct) == (True, False)


def test_measures_of_inner_parts_remain_and_equal_names_are_told_apart(own):
    twice = {"name": "weighted", "weights": (1, 1), "of": (NUMBER, {"name": "number", "strict": True})}
    brevity = own("brevity", lambda text, task: Verdict(0.5, False, None, "", {"characters": len(text)}))
    measured = make("all_of", of=(twice, brevity))("#### 5", TASK).measures
    rewards = {"reward_weighted": 2.0, "reward_brevity": 0.5, "reward_number": 1.0, "reward_number_2": 1.0}
    assert measured == rewards | {"characters": 6}
    assert combine.short_name("mine:rewards.brevity") == "rewards_brevity"


@pytest.mark.parametrize(
    ("tokens", "penalty"), [(0, 0), (60, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (101, -1), (10**9, -1)]
)
def test_the_overlong_penalty_is_that_of_dapo(tokens, penalty):
    assert combine.overlong(tokens, max_tokens=100, buffer_tokens=20) == pytest.approx(penalty)
    verifier = make("length_shaped", of=NUMBER, max_tokens=100, buffer_tokens=20)
    for text, inner in (("5", 1.0), ("6", 0.0)):
        found = verifier(text, TASK, tokens)
        assert (found.reward, found.correct) == (pytest.approx(inner + penalty), bool(inner))
        assert found.measures == {"reward_number": inner, "length_penalty": pytest.approx(penalty)}
    assert verifier("5", TASK) == make("number")("5", TASK)  # a text without a known length


def test_an_attempt_cut_off_is_penalised_for_its_length():
    """Else an attempt that runs into the limit earns more than a long wrong one."""
    section = {"name": "length_shaped", "of": NUMBER, "max_tokens": 10, "buffer_tokens": 5}
    environment = make_judge(**section, must_finish=True)
    cut = environment.step(TASK, Turn("5", "limit", True, tokens=10))[1].verdict
    wrong = environment.step(TASK, Turn("6", "eos", True, tokens=10))[1].verdict
    assert (cut.reward, cut.correct, cut.reason) == (-1.0, False, "cut off")
    assert wrong.reward == -1.0
    plain = make_judge(**NUMBER, must_finish=True).step(TASK, Turn("5", "limit", True, tokens=10))[1].verdict
    assert plain == Verdict(0.0, False, None, "cut off")


def test_a_verifier_gets_the_tokens_that_the_model_sampled():
    """The end-of-sequence token counts, forced tokens do not."""
    model, params = t.make_model()
    seen = []

    def verifier(text, task, tokens):
        seen.append(tokens)
        return Verdict(float(tokens), False)

    rollouts = t.roll(t.make_completer(model), t.biased(params, _=0.8), t.make_requests(5, 2), single_turn(verifier))
    assert [r.verdict.reward for r in rollouts] == [float(r.sampled.sum()) for r in rollouts]
    assert len({*seen}) > 2
    assert any(r.stop == "eos" and len(r.tokens) == r.verdict.reward for r in rollouts)
    twice = retry(single_turn(verifier), tell="check", message="bcd", role="")
    rollouts = t.roll(t.make_completer(model), t.biased(params, _=0.8), t.make_requests(5, 2), twice)
    assert [r.verdict.reward for r in rollouts] == [float(r.sampled.sum()) for r in rollouts]
    assert any(len(r.tokens) > r.verdict.reward for r in rollouts)


def test_a_part_that_can_not_judge_gives_the_reason(own):
    late = own("late", lambda text, task: Verdict(0.0, False, None, "timeout"))
    for name, more in (("all_of", {}), ("weighted", {"weights": (1, 1)})):
        assert make(name, of=(NUMBER, late), **more)("5", TASK).reason == "timeout"
        assert make(name, of=(NUMBER, FORM), **more)("5", Task("?", "none")).reason == "bad key"


@pytest.mark.parametrize("value", [None, Verdict(math.nan, True), Verdict(-math.inf, True)])
def test_a_part_that_misbehaves_is_an_error_of_the_verifier(own, value):
    bad = own("bad", lambda text, task: value)
    made = single_turn(make("all_of", of=(NUMBER, bad)), name="all_of")
    assert made.step(TASK, Turn("5", "eos", True))[1].verdict.reason.startswith("verifier error of 'all_of'")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "all_of"}, "verifier 'all_of' needs of=..."),
        ({"name": "all_of", "of": ()}, "verifier 'all_of' got of=()"),
        ({"name": "all_of", "of": NUMBER}, "verifier 'all_of' got of={'name': 'number'}"),
        ({"name": "all_of", "of": ("number",)}, "allowed: a section with a name"),
        ({"name": "all_of", "of": ({"strict": True},)}, "allowed: a section with a name"),
        ({"name": "all_of", "of": ({"name": "nubmer"},)}, "unknown verifier 'nubmer' (did you mean 'number'?)"),
        ({"name": "all_of", "of": ({"name": "number", "stric": True},)}, "unknown field of verifier 'number' 'stric'"),
        ({"name": "weighted", "of": (NUMBER,), "weights": (1, 2)}, "got weights=(1, 2) for 1 parts"),
        ({"name": "weighted", "of": (NUMBER,), "weights": (0,)}, "the first above 0"),
        ({"name": "weighted", "of": (NUMBER,), "weights": (math.inf,)}, "a finite number for each"),
        ({"name": "length_shaped", "of": NUMBER, "max_tokens": 5, "buffer_tokens": 6}, "a buffer of 1 to max_tokens"),
        ({"name": "length_shaped", "of": NUMBER, "max_tokens": 0, "buffer_tokens": 0}, "a buffer of 1 to max_tokens"),
    ],
)
def test_errors_are_one_line(section, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make(**section)
    assert "\n" not in str(error.value)


# --- in a config ---

WEIGHTED = {"name": "weighted", "weights": (1.0, 0.2), "of": (NUMBER, {"name": "all_of", "of": [FORM]})}


def read(**changes):
    return command.read(f"{SMOKE}", {k.replace("__", "."): v for k, v in changes.items()}).to_dict()["verifier"]


def test_fields_of_parts_are_completed_checked_and_set():
    found = read(verifier=str(WEIGHTED), verifier__of__1__of__0__close="x", verifier__of__0__strict="true")
    assert found["of"][0] == {"name": "number", "strict": True, "fractions": True}
    assert found["of"][1]["of"][0]["close"] == "x"
    shaped = {"verifier__name": "length_shaped", "verifier__max_tokens": "9", "verifier__buffer_tokens": "3"}
    assert read(**shaped, verifier__of__name="number")["of"] == {"name": "number", "strict": False, "fractions": True}
    for changes, message in (
        ({"verifier__of__2__strict": "true"}, "unknown item of config.verifier.of '2'; one of: 0, 1"),
        ({"verifier__of__0": "true"}, "config.verifier.of.0 is a section"),
        ({"verifier__of__0__stric": "true"}, "unknown field of config.verifier.of.0 'stric' (did you mean 'strict'?)"),
        ({"verifier__of__0__strict": "5"}, "config.verifier.of.0.strict got '5'; allowed: bool"),
        ({"verifier__of__0__must_finish": "true"}, "unknown field of config.verifier.of.0 'must_finish'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            read(verifier=str(WEIGHTED), **changes)


def test_describe_shows_the_parts():
    tree = build.complete(load_config("tiny", "smoke").to_dict() | {"verifier": WEIGHTED})
    lines = describe(tree, "verifier")
    headings = [line for line in lines if line.startswith("config.")]
    assert headings == ["config.verifier", "config.verifier.of.0", "config.verifier.of.1", "config.verifier.of.1.of.0"]
    assert fields.complete(build.layout(tree), tree) == tree


def test_the_settings_of_a_verdict_follow_from_the_parts(own):
    math_part = {"name": "all_of", "of": ({"name": "math"}, FORM)}
    assert make_judge(**math_part).deadline_s is None
    with pytest.raises(ValueError, match="has its own limit"):
        make_judge(**math_part, deadline_s=1.0)
    slow = own("slow", lambda text, task: Verdict(1.0, True))
    assert make_judge(name="all_of", of=({"name": "math"}, slow)).deadline_s == 60.0
    assert make_judge(name="all_of", of=(NUMBER,), deadline_s=2.0).deadline_s == 2.0
    assert verify.equivalence("length_shaped", of={"name": "countdown"}, max_tokens=9, buffer_tokens=1)("1+2", "3")
    assert verify.equivalence("weighted", of=(NUMBER, {"name": "countdown"}), weights=(1, 1)) is None


def test_keys_and_own_verifiers_inside_are_tried(own):
    section = {"name": "weighted", "of": (FORM, NUMBER), "weights": (1, 1), "must_finish": True}
    with pytest.raises(ValueError, match="verifier 'number' can't judge 1 of 1 keys"):
        check_keys([Task("?", "no number")], section, "suite 'x'", print)
    broken = own("broken", lambda text, task: 1)
    with pytest.raises(ValueError, match="verifier 'mine:broken' gave 1 of the first task"):
        judge({"name": "all_of", "of": (NUMBER, broken)}, [TASK])


def test_a_length_that_no_attempt_reaches_is_told():
    def idle(max_tokens, most):
        shaped = {"name": "length_shaped", "of": NUMBER, "max_tokens": max_tokens, "buffer_tokens": 10}
        return verify.never_penalised({"name": "all_of", "of": (FORM, shaped)}, most) is not None

    assert [idle(max_tokens, 32) for max_tokens in (32, 41, 42, 90)] == [False, False, True, True]
    said = []
    config = load_config("tiny", "smoke")
    with config.unlocked():
        config.verifier = {
            "name": "length_shaped",
            "of": {"name": "exact", "marker": ";A"},
            "max_tokens": 4000,
            "buffer_tokens": 10,
        }
    build.build(config, say=said.append)
    assert any("penalises no attempt, as sampler.max_tokens is" in line for line in said)


@pytest.mark.process
def test_a_run_logs_the_reward_of_each_part(tmp_path):
    inner = {"name": "weighted", "weights": (1.0, 0.1), "of": ({"name": "exact", "marker": ";A"}, FORM)}
    section = {"name": "length_shaped", "max_tokens": 20, "buffer_tokens": 10, "of": inner}
    code, _, said = main(f"--config={SMOKE}", f"--workdir={tmp_path}", f"--config.verifier={section}")
    assert code == 0, said
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = next(line for line in lines if "rollout/reward_exact" in line)
    assert trained["rollout/reward_format"] == 0.0
    shaped = trained["rollout/reward_weighted"] + trained["rollout/length_penalty"]
    assert trained["rollout/reward"] == pytest.approx(shaped)
    shares = [line["time/verify_share"] for line in lines if "time/verify_share" in line]
    assert min(shares) < 0.05  # of a step of a tiny model; one step may be disturbed
    assert all(line["time/verify_p50_ms"] <= line["time/verify_p99_ms"] for line in lines if "time/verify_share" in line)
    assert json.loads((tmp_path / "config.json").read_text())["verifier"]["of"]["of"][1]["name"] == "format"
