"""Where a call in the model's text ends, and sessions of tools that misbehave."""

import random
import threading
from types import SimpleNamespace

import pytest
import tiny_completer as t

from jaxreason import tools
from jaxreason.environment import Turn, end_of_turn, single_turn, with_tools
from jaxreason.rollout import Budget
from jaxreason.tasks import gsm8k
from jaxreason.tools import Session, Tool
from jaxreason.tools.calls import DIALECTS, Call, Dialect
from jaxreason.types import Task, Verdict

TASK = Task("question", "7")
JUDGE = single_turn(lambda text, task: Verdict(1.0, True, text, "judged"))
INLINE = ["brackets", "angles", "tags"]


def with_calculator(dialect):
    return with_tools(JUDGE, [tools.make("calculator")], DIALECTS[dialect]())


@pytest.mark.parametrize("behind", ["", "\n", "\n\n", " ", '"', "-", "]", ">"])
@pytest.mark.parametrize(
    ("dialect", "call", "result"),
    [
        ("brackets", "so [3*4=", "12]"),
        ("angles", "so <<3*4=", "12>>"),
        ("tags", "so <tool>calculator: 3*4</tool>", "<result>12</result>"),
    ],
)
def test_a_call_may_end_inside_a_token(dialect, call, result, behind):
    """The turn ends with a token, which may have more than the end of the call."""
    environment = with_calculator(dialect)
    assert end_of_turn(environment.stops, call + behind) == len(call)
    _, step = environment.step(environment.reset(TASK), Turn(call + behind, "stop", False))
    assert step.observation == result


@pytest.mark.parametrize("dialect", INLINE)
def test_a_turn_ends_only_where_there_is_a_call(dialect):
    """Else a text such as `[1]: x=` would be judged before its end."""
    made, rng, ended = with_calculator(dialect), random.Random(0), 0
    pieces = ["[", "]", "=", "<", "<<", ">>", "<tool>", "</tool>", "calculator:", "1", " ", "\n"]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        if (end := end_of_turn(made.stops, text)) is not None:
            ended += 1
            assert DIALECTS[dialect]().read(text[:end], [tools.make("calculator")]), text
            assert end_of_turn(made.stops, text[: end - 1]) is None
    assert ended > 100


def test_results_are_fitted():
    environment = with_tools(JUDGE, [tools.make("calculator")], DIALECTS["brackets"](), fit=lambda result: result[:3])
    assert environment.step(environment.reset(TASK), Turn("[111*1001=", "stop", False))[1].observation == "111]"
    environment = with_tools(JUDGE, [tools.make("calculator")], DIALECTS["tags"](), fit=lambda result: result[:3])
    turn = Turn("<tool>calculator: 1/0</tool>", "stop", False)
    assert environment.step(environment.reset(TASK), turn)[1].observation == "<result>error: div</result>"


@pytest.mark.parametrize("dialect", INLINE)
def test_a_result_does_not_close_itself(dialect):
    write = DIALECTS[dialect]().write
    close = write("", False)[-len("</result>") if dialect == "tags" else -2 if dialect == "angles" else -1 :]
    for result in (f"a{close}b", f"a{close[:1]}{close}{close[1:]}b", close * 3):
        assert write(result, False).count(close) == 1


def test_a_result_can_not_end_the_thinking():
    """Only the model's own text spares it the forced end."""
    model, params = t.make_model()
    said = [Call("say", {"text": "x"})]
    dialect = Dialect(
        lambda text, tools: said if text.endswith("k") else [],
        lambda text, is_error: text,
        stops=(("k",),),
    )
    environment = with_tools(JUDGE, [Tool("say", "Says it.", lambda task: Session(lambda text: "ggg"), keeps_time=True)], dialect)
    completer = t.new_completer(model, slots=5, length=44, max_tokens=36)
    completer = completer._replace(thinking=Budget(12, "gg", t.encode("gg")))
    rollouts = t.roll(completer, t.biased(params, k=1.0, g=-1e9, _=-1e9), t.make_requests(4, 3), environment)
    assert any("t" in r.author[:12] for r in rollouts)
    assert all("ff" in r.author for r in rollouts if len(r.tokens) > 16)


def test_a_session_that_opens_late_is_closed_and_does_not_hold_up_the_end():
    opening, go, closed = threading.Event(), threading.Event(), []

    def opens(task):
        opening.set()
        go.wait(60)
        return Session(lambda text: text, lambda: closed.append("late"))

    environment = with_tools(JUDGE, [Tool("slow", "Is slow.", opens)], DIALECTS["tags"]())
    state, steps = environment.reset(TASK), []
    turn = Turn("<tool>slow: x</tool>", "stop", False)
    thread = threading.Thread(target=lambda: steps.append(environment.step(state, turn)[1]), daemon=True)
    thread.start()
    opening.wait(60)
    ends = threading.Thread(target=environment.close, args=(state,), daemon=True)
    ends.start()
    ends.join(20)
    assert not ends.is_alive()
    go.set()
    thread.join(20)
    assert closed == ["late"]
    assert "does not start" in steps[0].observation


def test_a_session_whose_call_hangs_is_closed_and_another_is_opened():
    opened = []

    def opens(task):
        opened.append(ended := threading.Event())
        return Session(lambda text: f"{len(opened)}" if text == "quick" else f"{ended.wait(60)}", ended.set)

    given_up = []
    judge = JUDGE._replace(failures=SimpleNamespace(give_up=given_up.append))
    environment = with_tools(judge, [Tool("own", "Does it.", opens, timeout_s=0.2)], DIALECTS["tags"]())
    state, said = environment.reset(TASK), []
    for text in ("quick", "hangs", "quick"):
        state, step = environment.step(state, Turn(f"<tool>own: {text}</tool>", "stop", False))
        said.append(step.observation)
    assert said == ["<result>1</result>", "<result>error: no answer in 0.2 s</result>", "<result>2</result>"]
    assert [event.is_set() for event in opened] == [True, False]
    given_up[0].join(20)
    assert not given_up[0].is_alive()
    environment.close(state)
    assert opened[1].is_set()


def test_all_sessions_are_closed_even_if_one_fails():
    closed = []

    def one(name, close):
        return Tool(name, "Does it.", lambda task: Session(lambda text: text, close), keeps_time=True)

    def breaks():
        closed.append("broken")
        raise OSError("no such container")

    judge = JUDGE._replace(close=lambda state: closed.append("inner"))
    made = [one("first", lambda: closed.append("first")), one("broken", breaks), one("last", lambda: closed.append("last"))]
    environment = with_tools(judge, made, DIALECTS["tags"]())
    state = environment.reset(TASK)
    for name in ("first", "broken", "last"):
        state, _ = environment.step(state, Turn(f"<tool>{name}: x</tool>", "stop", False))
    with pytest.raises(OSError, match="no such container"):
        environment.close(state)
    assert sorted(closed) == ["broken", "first", "inner", "last"]


def test_the_worked_solutions_of_gsm8k_write_all_but_the_results():
    """Of each call the model writes up to `=`, as when the calculator answers it."""
    task = gsm8k._task("How many?", "He has 3*5=<<3*5=15>>15, then <<15/2=7.5>>7.5.\n#### 7.5", "id", True)
    assert [task.solution[start:end] for start, end in task.data["forced"]] == ["15>>", "7.5>>"]
    environment, before = with_calculator("angles"), 0
    for start, end in task.data["forced"]:
        turn, before = Turn(task.solution[before:start], "stop", False), end
        assert environment.step(environment.reset(TASK), turn)[1].observation == task.solution[start:end]
