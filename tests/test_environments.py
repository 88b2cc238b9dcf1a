"""Tools and further attempts: what the model reads, what counts, and the same rollouts
whatever the sampler.
"""

import dataclasses
import re
import threading

import jax
import numpy as np
import pytest
import tiny_completer as t

from jaxreason.environment import Environment, Step, Stop, Turn, VerifierFailed, retry, single_turn, with_tools
from jaxreason.environment.verdicts import checked, measured
from jaxreason.runtime.files import rollout_record, spans
from jaxreason.sharding import make_mesh, row_devices, shardings
from jaxreason.tools import Session, Tool, ToolError
from jaxreason.tools.calls import Call, Dialect, Malformed
from jaxreason.tools.interface import stateless
from jaxreason.types import Message, Task, Verdict

TASK = Task("question", "7")


def judge(text: str, task: Task) -> Verdict:
    return Verdict(float(text == task.answer), text == task.answer, text, "judged")


JUDGE = single_turn(judge)


def reading(pattern: str, role: str = "") -> Dialect:
    """A dialect of `NAME(ARGUMENT)`."""

    def read(text, tools):
        found = re.findall(pattern, text)
        return [Malformed("no argument") if argument == "bad" else Call(name, {"text": argument}) for name, argument in found]

    return Dialect(read, lambda text, is_error: f"<{'error: ' * is_error}{text}>", role=role)


CALLS = reading(r"(\w+)\((\w*)\)")


def tool(name="upper", function=str.upper, **more):
    return Tool(name, "Does it.", stateless(lambda text: function(text)), keeps_time=True, **more)


def play(environment, turns, task=TASK):
    """Give turns to an environment; return its steps."""
    state, steps = environment.reset(task), []
    for turn in turns:
        turn = turn if isinstance(turn, Turn) else Turn(turn, "eos", False)
        state, step = environment.step(state, turn)
        steps.append(step)
        if step.verdict is not None:
            environment.close(state)
            break
    return steps


# ------------------------------------------------------------------------------------------------------------- tools


def test_a_call_is_answered_and_the_rest_is_judged():
    first, second, last = play(with_tools(JUDGE, [tool()], CALLS), ["upper(abc)", "upper(x) upper(y)", "7"])
    assert first == Step(observation="<ABC>")
    assert second.observation == "<X><Y>"
    assert (last.verdict.correct, dict(last.verdict.measures)) == (True, {"tool_calls": 3.0, "tool_errors": 0.0})


def test_results_of_a_chat_are_messages():
    (step,) = play(with_tools(JUDGE, [tool()], reading(r"(\w+)\((\w*)\)", role="tool")), ["upper(a) upper(b)"])
    assert step.observation == [Message("tool", "<A>"), Message("tool", "<B>")]


def test_only_the_last_turn_is_judged():
    """A result is not the model's answer, even if it is the right one."""
    (_, step) = play(with_tools(JUDGE, [tool(function=lambda text: "7")], CALLS), ["upper(7)", ""])
    assert not step.verdict.correct


def test_errors_are_told_and_counted():
    def refuse(text):
        raise ToolError("no such word")

    environment = with_tools(JUDGE, [tool(), tool("look", refuse)], CALLS)
    steps = play(environment, ["dig(a)", "upper(bad)", "look(b)", "7"])
    assert [step.observation for step in steps[:3]] == [
        "<error: no tool 'dig'; there are: upper, look>",
        "<error: no argument>",
        "<error: no such word>",
    ]
    assert dict(steps[3].verdict.measures) == {"tool_calls": 3.0, "tool_errors": 3.0}
    assert not any(step.failure for step in steps)


def test_calls_are_limited():
    environment = with_tools(JUDGE, [tool()], CALLS, max_calls=2)
    steps = play(environment, ["upper(a)", "upper(b) upper(c)", "upper(d)"])
    assert steps[1].observation == "<B><error: no calls left after 2>"
    assert steps[2].verdict.reason == "judged"
    assert steps[2].verdict.measures["tool_calls"] == 3.0


def test_a_final_turn_is_judged_even_with_a_call():
    (step,) = play(with_tools(JUDGE, [tool()], CALLS), [Turn("upper(a)", "limit", True)])
    assert step.verdict is not None


def test_a_tool_that_always_crashes_stops_the_run(made):
    def crash(text):
        raise KeyError("broken")

    environment = with_tools(t_judge(), [tool(function=crash)], LETTERS)
    with pytest.raises(VerifierFailed, match=r"a tool failed 10 times in a row, last with .*broken") as error:
        t.roll(t.make_completer(made[0]), t.biased(made[1], j=3.0, k=3.0), t.make_requests(8, 3), environment)
    assert "KeyError" in error.value.traceback


def test_a_session_is_opened_once_per_rollout_and_closed():
    log = []

    def opened(task):
        log.append("open")
        return Session(lambda text: f"{len(log)}", lambda: log.append("close"))

    stateful = Tool("count", "Counts.", opened, keeps_time=True)
    steps = play(with_tools(JUDGE, [stateful, tool()], CALLS), ["upper(a)", "count(a)", "count(b)", "7"])
    assert steps[3].verdict.correct
    assert log == ["open", "close"]


def test_a_tool_that_does_not_open_is_an_error():
    def broken(task):
        raise OSError("no room")

    step, _ = play(with_tools(JUDGE, [Tool("count", "Counts.", broken)], CALLS), ["count(a)", "7"])
    assert step.observation == "<error: count does not start>"
    assert "no room" in step.failure


def test_tools_that_can_not_be_told_apart_are_refused():
    with pytest.raises(ValueError, match=r"tools got \['upper', 'upper'\]"):
        with_tools(JUDGE, [tool(), tool()], CALLS)
    with pytest.raises(ValueError, match="can't tell upper and lower apart"):
        with_tools(JUDGE, [tool(), tool("lower")], CALLS._replace(one_tool=True))
    with pytest.raises(ValueError, match="max_calls got 0"):
        with_tools(JUDGE, [tool()], CALLS, max_calls=0)


def test_the_deadline_of_a_step_has_room_for_its_calls():
    quick = single_turn(judge, deadline_s=2.0)
    assert with_tools(quick, [tool(timeout_s=3.0)], CALLS, max_calls=4).deadline_s == 14.0
    assert with_tools(single_turn(judge, deadline_s=None), [tool()], CALLS).deadline_s is None


# ------------------------------------------------------------------------------------------------------------- retry


def test_a_wrong_attempt_may_be_repeated():
    steps = play(retry(JUDGE, attempts=3, role=""), ["5", "6", "7"])
    assert [step.observation for step in steps[:2]] == ["That is not right. Try again."] * 2
    measures = {
        "tries": 3.0,
        "first_try_correct": 0.0,
        "last_try_correct": 1.0,
        "tries_wrong_then_right": 1.0,
        "tries_right_then_wrong": 0.0,
    }
    assert (steps[2].verdict.reward, dict(steps[2].verdict.measures)) == (1.0, measures)


def test_a_right_attempt_ends_the_rollout():
    (step,) = play(retry(JUDGE, attempts=3, discount=0.5), ["7"])
    assert (step.verdict.reward, step.verdict.measures["tries"]) == (1.0, 1.0)


@pytest.mark.parametrize(("second", "correct", "name"), [("6", False, "tries_right_then_wrong"), ("7", True, "last_try_correct")])
def test_checking_does_not_say_whether_it_was_right(second, correct, name):
    ask, step = play(retry(JUDGE, attempts=2, tell="check"), ["7", second])
    assert ask.observation == [Message("user", "Check your work, then give your final answer.")]
    assert step.verdict.correct == correct
    assert step.verdict.measures[name] == 1.0


def test_later_attempts_earn_less():
    *_, step = play(retry(JUDGE, attempts=3, discount=0.5), ["5", "6", "7"])
    assert step.verdict.reward == 0.25
    punished = single_turn(lambda text, task: Verdict(-1.0, False))
    assert play(retry(punished, attempts=2, discount=0.5), ["5", "6"])[1].verdict.reward == -1.0


def test_the_last_attempt_counts_where_the_message_leaves_no_room():
    _, step = play(retry(JUDGE, attempts=2, tell="check"), ["7", Turn("", "limit", True)])
    assert step.verdict.correct
    assert step.verdict.measures["tries"] == 1.0


def test_a_failed_verifier_is_not_asked_again():
    def broken(text, task):
        raise KeyError("x")

    (step,) = play(retry(single_turn(broken), attempts=3), ["5"])
    assert step.verdict.reason.startswith("verifier error")
    assert step.failure


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("attempts", 0, "attempts got 0"),
        ("tell", "all", "tell got 'all'; allowed: wrong, check"),
        ("discount", 0.0, "discount got 0"),
        ("discount", 1.5, "discount got 1.5"),
        ("discount", float("nan"), "discount got nan"),
        ("message", "", "message is empty"),
    ],
)
def test_fields_of_retry(field, value, message):
    with pytest.raises(ValueError, match=message):
        retry(JUDGE, **{field: value})


def test_tools_and_retries_combine():
    """Outside: a call does not use up an attempt. Inside: each attempt has its own
    calls.
    """
    log = []

    def opened(task):
        log.append("open")
        return Session(str.upper, lambda: log.append("close"))

    stateful = Tool("upper", "Does it.", opened, keeps_time=True)
    outside = play(with_tools(retry(JUDGE, attempts=2), [stateful], CALLS), ["upper(a)", "5", "upper(b)", "7"])
    assert outside[3].verdict.measures["tool_calls"] == 2.0
    assert outside[3].verdict.measures["tries_wrong_then_right"] == 1.0
    assert log == ["open", "close"]
    log.clear()
    inside = play(retry(with_tools(JUDGE, [stateful], CALLS), attempts=2), ["upper(a)", "5", "upper(b)", "7"])
    assert inside[3].verdict.measures["tool_calls"] == 1.0
    assert log == ["open", "close"] * 2


# ------------------------------------------------------------------------------------------------------------- stops


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (Stop("="), "1+1=", True),
        (Stop("="), "1+1", False),
        (Stop("=", "["), "1+1=", False),
        (Stop("=", "["), "1=[1+1=", True),
        (Stop("=", "["), "=[", False),
        (Stop("</tool>", "<tool>"), "</tool><tool>x</tool>", True),
    ],
)
def test_a_stop_may_need_an_opening(stop, text, expected):
    assert stop.ends(text) == expected


# ------------------------------------------------------------------------------------------------------------- rollouts

# `j...k` is a call; the result follows.
LETTERS = Dialect(
    lambda text, tools: [Call("upper", {"text": found[1]})] if (found := re.search("j([^jk]*)k$", text)) else [],
    lambda text, is_error: "ii" if is_error else f"i{text}i",
    stops=(("k", "j"),),
)


def t_judge():
    return single_turn(t.verify)


@pytest.fixture(scope="module")
def made():
    return t.make_model()


def mirrored(text):
    return text[::-1]


def lettered():
    return retry(with_tools(t_judge(), [tool(function=mirrored)], LETTERS, max_calls=3), attempts=3, message="hh", role="")


@pytest.fixture(scope="module")
def rollouts(made):
    params = t.biased(made[1], j=1.0, k=1.0, _=1.5)
    completer = t.make_completer(made[0], slots=5, length=44, max_tokens=36)
    return params, t.roll(completer, params, t.make_requests(8, 3), lettered())


def test_the_calls_of_rollouts_are_answered_in_place(rollouts):
    _, made_ = rollouts
    calls = 0
    for r in made_:
        assert len(r.author) == len(r.tokens)
        assert [letter == "m" for letter in r.author] == r.sampled.tolist()
        assert set(r.author) <= {"m", "t"}
        text = t.decode(r.tokens)
        for found in re.finditer("[^t]t+", r.author):
            before, said = text[: found.start() + 1], text[found.start() + 1 : found.end()]
            turn = re.split("hh|i[a-h_]*i", before)[-1]
            if before.endswith("k") and "j" in turn:
                calls += 1
                assert f"i{turn[turn.rindex('j') + 1 : -1][::-1]}i".startswith(said) or said.startswith("i")
    assert calls > 5
    assert {r.verdict.measures["tries"] for r in made_ if "tries" in r.verdict.measures} >= {1.0, 2.0, 3.0}


@pytest.mark.parametrize("slots", [5, 12])
@pytest.mark.parametrize("chunk", [3, 4, 7])
def test_rollouts_with_tools_do_not_depend_on_the_sampler(made, rollouts, slots, chunk):
    params, expected = rollouts
    completer = t.new_completer(made[0], slots=slots, length=48, max_tokens=36, chunk_tokens=chunk)
    got = t.roll(completer, params, t.make_requests(8, 3)[::-1], lettered())
    t.assert_same(got, expected)
    by_name = {(r.problem, r.attempt): r.author for r in got}
    assert all(by_name[r.problem, r.attempt] == r.author for r in expected)


@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["data", "all"])
def test_rollouts_with_tools_do_not_depend_on_the_mesh(rollouts, axes):
    params, expected = rollouts
    mesh = make_mesh(**{"data": 1, **axes})
    model = t.make_model()[0]
    completer = t.new_completer(model, slots=8, length=44, max_tokens=36, mesh=mesh, prompt_rows=row_devices(mesh))
    placed = jax.device_put(params, shardings(params, mesh))
    t.assert_same(t.roll(completer, placed, t.make_requests(8, 3), lettered()), expected)


def test_sampler_and_learner_agree_behind_results(made, rollouts):
    params, made_ = rollouts
    assert t.largest_gap(made[0], params, [r for r in made_ if not r.sampled.all()]) < 1e-5
    batch, _ = t.rescore(made[0], params, made_)
    for i, r in enumerate(made_):
        own = slice(len(r.prompt), len(r.prompt) + len(r.tokens))
        np.testing.assert_array_equal(batch.weight_BT[i, own] > 0, r.sampled)


def test_every_environment_is_closed_once_even_after_an_error(made):
    closed, opened = [], []

    def counted(step):
        lock = threading.Lock()

        def reset(task):
            with lock:
                opened.append(object())
                return opened[-1]

        return Environment(reset, step, close=closed.append)

    def judged(state, turn):
        return state, Step(verdict=Verdict(0.0, False))

    t.roll(t.make_completer(made[0]), made[1], t.make_requests(4, 3), counted(judged))
    assert sorted(map(id, closed)) == sorted(map(id, opened))
    closed.clear()
    opened.clear()

    def breaks(state, turn):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        t.roll(t.make_completer(made[0]), made[1], t.make_requests(4, 3), counted(breaks))
    assert len({*map(id, closed)}) == len(closed)
    assert len(closed) >= len(opened) - 1  # the one whose step failed has left


def test_the_record_of_a_rollout_says_who_wrote_it(rollouts):
    r = next(r for r in rollouts[1] if "t" in r.author)
    record = rollout_record(r)
    assert record["measures"] == dict(r.verdict.measures)
    assert sum(count for _, count in record["spans"]) == len(r.tokens)
    assert spans("mmttm") == [["m", 2], ["t", 2], ["m", 1]]
    plain = rollout_record(dataclasses.replace(r, author="mm", verdict=Verdict(0.0, False)))
    assert not {"spans", "measures"} & plain.keys()


# ------------------------------------------------------------------------------------------------------------- measures


def test_measures_are_checked():
    assert checked(Verdict(1, True, measures={"calls": np.int64(2)})).measures == {"calls": 2.0}
    for wrong in ({"a b": 1}, {"a": float("nan")}, {"a": "1"}, {3: 1.0}, {"": 1}, {"a/b": 1}):
        with pytest.raises(ValueError, match="measure"):
            checked(Verdict(1.0, True, measures=wrong))
    with pytest.raises(TypeError, match="measures are a list"):
        checked(Verdict(1.0, True, measures=[1]))


def test_measures_are_averaged_over_the_verdicts_that_have_them():
    verdicts = [Verdict(0.0, False, measures={"a": 1.0}), Verdict(0.0, False, measures={"a": 2.0, "b": 5.0}), Verdict(0.0, False)]
    assert measured(verdicts) == {"a": (3.0, 2.0), "b": (5.0, 1.0)}
