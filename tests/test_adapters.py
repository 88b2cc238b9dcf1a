"""Environments and tasksets of other packages, played by their methods alone.

The fakes have the shape of OpenEnv 0.10 (`reset`, `step`, `state`; results with
`observation`, `reward`, `done`) and of `verifiers` 0.4 (tasks with `data` and an
asynchronous `score(trace)`).
"""

from types import SimpleNamespace

import pytest

from jaxreason import tasks, verify
from jaxreason.build import environments
from jaxreason.build.model import make_text, reword
from jaxreason.environment import Turn, openenv
from jaxreason.tasks.openenv import text_of
from jaxreason.types import Task

FAKES = '''
import asyncio
from types import SimpleNamespace

LOG = []


class Guess:
    """Guess a number from 0 to 9: `higher`, `lower`, and a reward of 1 when it is found."""

    def reset(self, seed=None):
        self.number, self.tries = (seed * 7) % 10, 0
        LOG.append("reset")
        return SimpleNamespace(observation=SimpleNamespace(text=f"seed {seed}:"), reward=None, done=False)

    def step(self, action):
        if action == "crash":
            raise RuntimeError("boom")
        self.tries += 1
        found = int(action) == self.number
        said = "found" if found else "higher" if int(action) < self.number else "lower"
        return SimpleNamespace(observation=SimpleNamespace(text=said), reward=1.0 if found else -0.25, done=found)

    @property
    def state(self):
        return {"tries": self.tries}

    def close(self):
        LOG.append("close")


def make():
    return Guess()


class Asynchronous(Guess):
    async def reset(self, seed=None):
        return None


def to_action(text):
    return text.strip("= ")


def show(observation):
    return f"<{observation.text}>"


class Sum:
    def __init__(self, a, b):
        self.data = SimpleNamespace(prompt=f"{a}+{b}=", answer=str(a + b))

    async def score(self, trace, runtime=None):
        await asyncio.sleep(0)
        trace.rewards["right"] = None
        trace.record_metric("length", len(trace.last_reply))
        trace.record_metrics({"words": 1})
        trace.record_reward("right", trace.last_reply == self.data.answer, 1.0)
        trace.record_reward("short", trace.metrics["length"] < 4, 0.5)


class Plain(Sum):
    def score(self, trace):
        trace.rewards["right"] = SimpleNamespace(score=2.0, weight=0.5)


def sums(split="train"):
    first = 100 if split == "test" else 0
    return (Sum(first + i, i) for i in range(1000))


def plain():
    return [Plain(1, 2)]


def nothing():
    return [SimpleNamespace(data=SimpleNamespace(prompt=None))]
'''
TURN = Turn("", "eos", False)


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    (tmp_path / "fakes.py").write_text(FAKES)
    monkeypatch.syspath_prepend(tmp_path)
    import fakes as module

    module.LOG.clear()
    return module


# ------------------------------------------------------------------------------------------------------------- OpenEnv


def test_the_problems_are_what_reset_gives(fakes):
    train, test = (tasks.load("openenv", maker="fakes:make", size=3, split=split) for split in ("train", "test"))
    assert [t.question for t in train] == ["seed 0:", "seed 1:", "seed 2:"]
    assert not {t.question for t in train} & {t.question for t in test}
    assert tasks.load("openenv", maker="fakes:make", size=1, show="fakes:show")[0].question == "<seed 0:>"


def test_an_episode_is_played(fakes):
    environment = openenv("fakes:make", role="")
    state = environment.reset(Task("", "", data={"seed": 1}))
    state, step = environment.step(state, TURN._replace(text="9"))
    assert step.observation == "lower"
    state, step = environment.step(state, TURN._replace(text="7"))
    assert (step.verdict.reward, step.verdict.correct, dict(step.verdict.measures)) == (0.75, False, {"env_steps": 2.0})
    environment.close(state)
    assert fakes.LOG == ["reset", "close"]


@pytest.mark.parametrize(("fields", "turns"), [({"max_steps": 1}, ["9"]), ({}, [TURN._replace(text="9", final=True)])])
def test_an_episode_ends(fakes, fields, turns):
    environment = openenv("fakes:make", **fields)
    state = environment.reset(Task("", "", data={"seed": 1}))
    for turn in turns:
        state, step = environment.step(state, turn if isinstance(turn, Turn) else TURN._replace(text=turn))
    assert step.verdict.reward == -0.25


def test_what_fails_costs_its_rollout(fakes):
    environment = openenv("fakes:make", action="fakes:to_action")
    for text, reason in (("crash", "RuntimeError: boom"), ("no number", "ValueError: invalid literal")):
        _, step = environment.step(environment.reset(Task("", "", data={"seed": 1})), TURN._replace(text=text))
        assert step.verdict.reason.startswith(f"verifier error of 'fakes:make': {reason}")
        assert step.failure
    _, step = environment.step(environment.reset(Task("", "", data={"seed": 1})), TURN._replace(text=" 7="))
    assert step.verdict.correct


def test_observations_as_text():
    assert text_of("a") == "a"
    assert text_of({"message": "b", "done": False, "reward": None, "metadata": {}}) == "b"
    assert text_of(SimpleNamespace(board=[1, 2], turn="x")) == '{"board": [1, 2], "turn": "x"}'
    assert text_of(SimpleNamespace(model_dump=lambda mode: {"text": "c", "done": True})) == "c"


def test_wrong_fields_of_an_environment(fakes):
    with pytest.raises(ValueError, match="asynchronous; return its synchronous form"):
        tasks.load("openenv", maker="fakes:Asynchronous", size=1)
    with pytest.raises(ValueError, match="split of task 'openenv' got 'dev'"):
        tasks.load("openenv", maker="fakes:make", split="dev")
    with pytest.raises(ValueError, match="size of task 'openenv' got 0"):
        tasks.load("openenv", maker="fakes:make", size=0)
    with pytest.raises(ValueError, match="max_steps got 0"):
        openenv("fakes:make", max_steps=0)
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        openenv("nowhere:make")


def test_an_environment_of_a_config(fakes):
    tokenizer, form = make_text(folder=None, tokenizer="byte_level")
    words = {"tokenizer": "byte_level"}
    parts = SimpleNamespace(
        tokenizer=tokenizer,
        format=form,
        environments=[],
        completer=None,
        reword=lambda **more: reword(words, None, **more),
        environment=None,
    )
    section = {"name": "openenv", "maker": "fakes:make", "max_steps": 3}
    made = environments.make_environment(section, {"name": "exact"}, tasks.load("openenv", maker="fakes:make", size=1), parts)
    state = made.environment.reset(Task("", "", data={"seed": 0}))
    assert made.environment.step(state, TURN._replace(text="5"))[1].observation == "lower"
    with pytest.raises(ValueError, match=r"config.environment needs maker="):
        environments.make_environment({"name": "openenv"}, {"name": "exact"}, [Task("", "")], parts)


# ------------------------------------------------------------------------------------------------------------- verifiers


def test_a_taskset_is_loaded_and_scored(fakes):
    loaded = tasks.load("taskset", maker="fakes:sums", size=5)
    assert [t.question for t in loaded] == ["0+0=", "1+1=", "2+2=", "3+3=", "4+4="]
    judge = verify.make("taskset", right=1.5)
    found = judge("4", loaded[2])
    assert (found.reward, found.correct, dict(found.measures)) == (1.5, True, {"reward_right": 1.0, "reward_short": 0.5})
    assert (judge("5", loaded[2]).reward, judge("5", loaded[2]).correct) == (0.5, False)
    assert tasks.load("taskset", maker="fakes:sums", size=1, split="test")[0].question == "100+0="
    assert verify.make("taskset")("", tasks.load("taskset", maker="fakes:plain")[0]).correct


def test_wrong_fields_of_a_taskset(fakes):
    with pytest.raises(ValueError, match=r"has no text in data\.prompt"):
        tasks.load("taskset", maker="fakes:nothing")
    with pytest.raises(ValueError, match="size of task 'taskset' got 0"):
        tasks.load("taskset", maker="fakes:sums", size=0)
    with pytest.raises(ValueError, match="needs tasks of the family 'taskset'"):
        verify.make("taskset")("", Task("q", "a"))
