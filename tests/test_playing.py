"""Environments that break: a rollout pays for it, never the run, and each is closed."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_completer as t

from jaxreason import text
from jaxreason.build import sampler
from jaxreason.environment import Environment, Failures, Playing, Step, Stop, Turn, VerifierFailed
from jaxreason.play import policy
from jaxreason.play.talk import Talk
from jaxreason.types import Message, Task, Verdict

TURN = Turn("text", "eos", False)
RIGHT = Step(verdict=Verdict(1.0, True, measures={"calls": np.int64(2)}))


def nothing_observed(observation, ended):
    return [1]


def answered(step, observe=nothing_observed, **more):
    """Return what a turn is answered by an environment of this step."""
    return Playing(Environment(lambda task: "state", step, **more), Task("", ""), observe).answer(TURN)


def raises(*_):
    raise SystemExit(3)


def test_plain_values_reach_the_rollout():
    step, _ = answered(lambda state, turn: (state, RIGHT))
    assert step.verdict == Verdict(1.0, True, measures={"calls": 2.0})
    assert type(step.verdict.measures["calls"]) is float


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        Step(),
        RIGHT._replace(observation="x"),
        Step(verdict=Verdict(float("nan"), False)),
        Step(verdict=Verdict(True, True)),
        Step(verdict="right"),
        Step(observation=3),
        Step(observation=[]),
        Step(observation=["words"]),
        Step(observation=[Message("user", None)]),
    ],
    ids=range(10),
)
def test_an_answer_that_breaks_the_contract_costs_its_rollout(wrong):
    step, ids = answered(lambda state, turn: (state, wrong))
    assert step.verdict.reason.startswith("verifier error: ")
    assert (step.verdict.reward, bool(step.failure), ids) == (0.0, True, [])


def test_what_raises_costs_its_rollout():
    closed = []
    step, _ = answered(raises, close=closed.append)
    assert step.verdict.reason == "verifier error: SystemExit: 3"
    assert closed == ["state"]
    step, _ = Playing(Environment(raises, raises, close=closed.append), Task("", ""), nothing_observed).answer(TURN)
    assert step.verdict.reason == "verifier error: SystemExit: 3"
    assert closed == ["state"]  # there was no state to close
    step, _ = answered(lambda state, turn: (state, Step(observation="é")), observe=raises)
    assert step.verdict.reason == "verifier error: SystemExit: 3"


@pytest.mark.parametrize("error", [KeyboardInterrupt, VerifierFailed("", "")])
def test_what_ends_the_run_passes(error):
    def ends(state, turn):
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        answered(ends)


def test_a_close_that_fails_is_told_but_leaves_the_verdict():
    step, _ = answered(lambda state, turn: (state, RIGHT), close=raises)
    assert step.verdict.correct
    assert "SystemExit" in step.failure
    failures = Failures("own")
    for _ in range(9):
        failures.hear(step)
    with pytest.raises(VerifierFailed, match="10 times in a row, last with 'SystemExit: 3'"):
        failures.hear(step)


def test_a_state_that_is_made_after_the_end_is_closed():
    closed, going, ended = [], threading.Event(), threading.Event()

    def slow(state, turn):
        going.set()
        ended.wait(60)
        return "late", RIGHT

    playing = Playing(Environment(lambda task: "first", slow, close=closed.append), Task("", ""), nothing_observed)
    thread = threading.Thread(target=playing.answer, args=(TURN,))
    thread.start()
    going.wait(60)
    playing.close()
    assert closed == ["first"]
    ended.set()
    thread.join(60)
    assert closed == ["first", "late"]
    assert playing.close() == ""
    assert closed == ["first", "late"]


# ------------------------------------------------------------------------------------------------------------- rollouts


@pytest.fixture(scope="module")
def made():
    return t.make_model()


class Counted:
    """An environment that counts what is opened and closed."""

    def __init__(self, step, reset=object, **more):
        self.opened, self.closed = [], []

        def opens(task):
            self.opened.append(reset())
            return self.opened[-1]

        self.environment = Environment(opens, step, close=self.closed.append, **more)

    def check(self):
        assert len(self.opened) == len(self.closed) > 0
        assert {*map(id, self.opened)} == {*map(id, self.closed)}


def test_an_environment_that_always_fails_stops_the_run_and_is_closed(made):
    counted = Counted(raises)
    with pytest.raises(VerifierFailed, match=r"the verifier failed 10 times in a row, last with .*SystemExit: 3"):
        t.roll(t.make_completer(made[0]), made[1], t.make_requests(8, 3), counted.environment)
    counted.check()


def test_an_environment_that_sometimes_fails_does_not(made):
    numbers = iter(range(100))

    def sometimes(state, turn):
        if next(numbers) % 2:
            raise KeyError("x")
        return state, RIGHT

    counted = Counted(sometimes)
    rollouts = t.roll(t.make_completer(made[0]), made[1], t.make_requests(4, 3), counted.environment)
    assert sum(r.verdict.correct for r in rollouts) == sum(r.verdict.reason.startswith("verifier error") for r in rollouts) == 6
    counted.check()


def test_an_observation_that_can_not_be_encoded_costs_its_rollout(made):
    asked = iter(range(100))
    counted = Counted(lambda state, turn: (state, RIGHT if next(asked) % 2 or turn.final else Step(observation="not ours")))
    rollouts = t.roll(t.make_completer(made[0]), made[1], t.make_requests(4, 3), counted.environment)
    assert {r.verdict.reason[:22] for r in rollouts} == {"", "verifier error: ValueE"}
    counted.check()


def test_a_slow_reset_is_given_up(made):
    end = threading.Event()
    slow = iter([True] + [False] * 100)
    counted = Counted(lambda state, turn: (state, RIGHT), lambda: end.wait(60) if next(slow) else object(), deadline_s=0.2)
    rollouts = t.roll(t.make_completer(made[0]), made[1], t.make_requests(4, 3), counted.environment)
    assert sum(r.verdict.reason.startswith("verifier timeout") for r in rollouts) == 1
    end.set()


def test_a_callback_that_raises_leaves_nothing_open(made):
    def judged(rollout):
        raise OSError("disk full")

    counted = Counted(lambda state, turn: (state, RIGHT))
    with pytest.raises(OSError, match="disk full"):
        t.roll(t.make_completer(made[0]), made[1], t.make_requests(4, 3), counted.environment, judged=judged)
    assert len({*map(id, counted.closed)}) == len(counted.closed)
    # A step that still runs in its thread closes what it has opened soon after.


@pytest.mark.parametrize("said", ["abcabcabc", "a"])
def test_observations_fill_the_limit_and_the_last_turn_says_so(made, said):
    turns = []

    def step(state, turn):
        turns.append(turn)
        return state, RIGHT if turn.final or len(turns) > 500 else Step(observation=said)

    counted = Counted(step)
    completer = t.make_completer(made[0])
    rollouts = t.roll(completer, t.biased(made[1], _=2.0), t.make_requests(4, 3), counted.environment)
    assert {(len(r.tokens), len(r.author)) for r in rollouts} == {(completer.max_tokens, completer.max_tokens)}
    assert sum(turn.final for turn in turns) == len(rollouts)
    assert all(turn.final == (turn.stop == "limit") or len(turn.text) > 0 for turn in turns)
    if len(said) > 1:
        assert any(r.author.endswith("t") and not t.decode(r.tokens).endswith(said) for r in rollouts)
        assert any(turn.final and not turn.text for turn in turns)
    counted.check()


def test_an_interrupted_answer_is_closed(made):
    completer = t.make_completer(made[0])
    counted = Counted(lambda state, turn: (state, RIGHT if turn.final else Step(observation="a")))
    parts = SimpleNamespace(completer=completer)
    talk = Talk(parts, completer.sampler.prepare(made[1]), None, None, temperature=1.0, samples=4, system="", seed=0)

    def show(texts):
        if counted.opened:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.sample(Task("q", "a"), [1, 2], counted.environment, show)
    assert len(counted.closed) == len(counted.opened) > 0


def test_what_environments_need_is_compiled_before_the_run(monkeypatch):
    asked = []
    monkeypatch.setattr(
        sampler.rollout, "warm_up", lambda *_, **more: asked.append((more["appends_tokens"], more["stops_slots"]))
    )
    completer = SimpleNamespace(thinking=None, sampler=SimpleNamespace(prepare=lambda params: params))
    one_turn = Environment(object, raises, one_turn=True)
    turns, stops = one_turn._replace(one_turn=False), one_turn._replace(one_turn=False, stops=(Stop("="),))
    for environments in ([one_turn], [one_turn, turns], [stops, one_turn]):
        sampler.warm_up(completer, [], environments, {})
    assert asked == [(False, False), (True, False), (True, True)]


def test_a_person_has_the_tokens_of_a_model():
    """What the person writes, its ends and what they read count."""
    finals = []

    def step(state, turn):
        finals.append(turn.final)
        return state, RIGHT if turn.final else Step(observation="12345")

    tokenizer = text.make("byte_level")
    game = policy.Game([Task("q", "a")], Environment(lambda task: None, step), text.plain(tokenizer), tokenizer, 14)
    policy.play(game, iter(["abc", "abc", "abc"]), [].append)
    assert finals == [False, False, True]
    game = game._replace(max_tokens=13)
    policy.play(game, iter(["abc", "abc"]), [].append)
    assert finals[3:] == [False, True]


def test_a_person_who_stops_closes_the_environment():
    counted = Counted(lambda state, turn: (state, Step(observation="x")) if turn.text == "go on" else raises())
    tokenizer = text.make("byte_level")
    tasks = [Task("q0", "a"), Task("q1", "a")]
    game = policy.Game(tasks, counted.environment, text.plain(tokenizer), tokenizer, 1000)
    said = []
    policy.play(game, iter(["go on", "break", "go on", "/problem 0", "go on\\"]), said.append)
    assert [line[:13] for line in said] == [
        "--- problem 0",
        "it reads: x",
        "wrong: no ans",
        "--- problem 1",
        "it reads: x",
        "--- problem 0",
    ]
    counted.check()
