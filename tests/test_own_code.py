"""A user's own task, verifier, objective and source, by `module:maker`, from a module
beside the config.
"""

import re
import sys

import pytest
from ml_collections import ConfigDict
from runs import ROOT, load_config

from jaxreason import build
from jaxreason.environment import Turn
from jaxreason.main import describe
from jaxreason.options import command
from jaxreason.types import Task

MODULE = """
from jaxreason import objectives, sources
from jaxreason.types import Task, Verdict

AGE = 3


def brevity(limit: int = 20, scale: float = 1.0):  # no comments, no docstring: both are the user's choice
    def verify(text, task):
        return Verdict(scale, len(text) <= limit)
    return verify


def gives_none():
    return lambda text, task: None


def raises():
    def verify(text, task):
        return {}["score"]
    return verify


def no_function():
    return 3


def maker_raises(limit=3):
    return 1 / 0


def sums(split: str = "train", size: int = 8, largest: int = 9):
    more = "?" * (split == "test")
    return [Task(f"{i % largest}+1={more}", str(i % largest + 1), f"A{i % largest + 1}") for i in range(size)]


def numbers():
    return [1, 2, 3]


def mine(clip: float = 0.1):
    return objectives.Objective(objectives.centre_group, objectives.per_token, objectives.clipped(clip, clip), needs_group=True)


def no_statistics():
    return mine()._replace(token_loss=lambda outputs, batch: -batch.advantage_BT * outputs.logp_BT)


def one_loss_per_row():
    return mine()._replace(token_loss=lambda outputs, batch: (outputs.logp_BT.sum(1), {}))


def needs_no_reference():
    return mine()._replace(token_loss=lambda outputs, batch: (outputs.logp_BT - batch.reference_logp_BT, {}))


def one_advantage_per_group():
    return mine()._replace(advantage=lambda reward_PG: reward_PG.mean(1))


def broken_advantage():
    return mine()._replace(advantage=lambda reward_PG: reward_PG.median(1))


def shorter(*, parts, objective, microbatches, steps, task: dict, rows: int = 8):
    from jaxreason import build
    return build.corpus(parts=parts, objective=objective, microbatches=microbatches, steps=steps, task=task, rows=rows, length=8)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Read and build a config with a module of the user's beside it."""
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("def f():\n    return 1\n\nimport no_such_module\n")
    (tmp_path / "my_syntax.py").write_text("def f(:\n")
    config = f"import runpy\nget_config = runpy.run_path({str(ROOT / 'configs/tiny.py')!r})['get_config']\n"
    (tmp_path / "mine.py").write_text(config)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda changes: command.read(f"{tmp_path / 'mine.py'}:smoke", changes)
    for name in ("my_rewards", "my_broken", "my_syntax"):
        sys.modules.pop(name, None)


VERIFIER = {"verifier": "{'name': 'my_rewards:brevity', 'limit': 30}"}


def test_a_verifier_of_the_users(own):
    config = own(VERIFIER | {"verifier.scale": "2", "verifier.must_finish": "true"})
    given = {"name": "my_rewards:brevity", "limit": 30, "scale": 2.0, "must_finish": True}
    assert config.verifier.to_dict() == given | {"deadline_s": None}
    assert any("limit" in line and "default 20" in line for line in describe(config.to_dict(), "verifier"))
    build.build(config, say=[].append)
    task = Task("?", "1")
    _, step = build.judge(config.verifier.to_dict(), [task]).step(task, Turn("short", "eos", True))
    assert (step.verdict.reward, step.verdict.correct) == (2.0, True)


def test_a_task_an_objective_and_a_source_of_the_users(own):
    config = own(
        {
            "rl.source.task": "{'name': 'my_rewards:sums', 'largest': 5}",
            "rl.objective": "{'name': 'my_rewards:mine', 'clip': 0.3}",
            "prior.source": "{'name': 'my_rewards:shorter', 'rows': 16}",
            "prior.source.task": "{'name': 'my_rewards:sums'}",
            "evaluate.suites.chain": "{'name': 'my_rewards:sums'}",
        }
    )
    assert config.rl.source.task.size == 8
    assert "split" not in config.rl.source.task  # that of the use
    run = build.build(config, say=[].append)
    assert run.phases[0].source.rows == 16
    assert run.phases[1].objective.needs_group


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verifier.name": "no_such_file:f"}, r"verifier 'no_such_file:f': no module 'no_such_file' beside the config"),
        ({"verifier.name": "my_rewards:brevty"}, r"unknown name in my_rewards 'brevty' \(did you mean 'brevity'\?\)"),
        ({"verifier.name": "my_rewards:AGE"}, r"verifier 'my_rewards:AGE' is a int; allowed: a function"),
        ({"verifier.name": "my_broken:f"}, r"my_broken\.py:4: ModuleNotFoundError: No module named 'no_such_module'"),
        ({"verifier.name": "my_syntax:f"}, r"my_syntax\.py:1: SyntaxError"),
        ({"verifier.name": ":f"}, r"'' names no module; write module:function"),
        (VERIFIER | {"verifier.limt": "3"}, r"unknown field of config\.verifier 'limt' \(did you mean 'limit'\?\)"),
        (VERIFIER | {"verifier.limit": "short"}, r"config\.verifier\.limit got 'short'; allowed: int"),
        (
            {"verifier": "{'name': 'my_rewards:brevity', 'marker': ';A'}"},
            r"unknown field of verifier 'my_rewards:brevity' 'marker'",
        ),
        ({"verifier": "{'name': 'my_rewards:gives_none'}"}, r"'my_rewards:gives_none' gave None of the first task; allowed: a"),
        ({"verifier": "{'name': 'my_rewards:raises'}"}, r"on the first task: .*my_rewards\.py:20: KeyError: 'score'"),
        ({"verifier": "{'name': 'my_rewards:no_function'}"}, r"made a int; allowed: a function verify\(text, task\)"),
        ({"verifier": "{'name': 'my_rewards:maker_raises'}"}, r"my_rewards\.py:29: ZeroDivisionError"),
        (
            {"rl.source.task": "{'name': 'my_rewards:numbers'}"},
            r"task 'my_rewards:numbers' made list; allowed: a sequence of Task",
        ),
        ({"rl.source.task": "{'name': 'my_rewards:brevity'}"}, r"task 'my_rewards:brevity' made function; allowed: a sequence"),
        ({"rl.objective": "{'name': 'my_rewards:brevity'}"}, r"made a function; allowed: an objectives\.Objective"),
        ({"rl.objective": "{'name': 'my_rewards:mine', 'clip': 9.0}"}, r"^[^/]*clip got 9\.0 below 1"),
        ({"rl.objective": "{'name': 'my_rewards:no_statistics'}"}, r"token_loss returned one array; allowed: a pair of loss_BT"),
        ({"rl.objective": "{'name': 'my_rewards:one_loss_per_row'}"}, r"a loss of shape \(2,\) for tokens of \(2, 8\)"),
        ({"rl.objective": "{'name': 'my_rewards:needs_no_reference'}"}, r"token_loss: .*my_rewards\.py:\d+: TypeError"),
        ({"rl.objective": "{'name': 'my_rewards:one_advantage_per_group'}"}, r"advantage returned the shape \(2,\)"),
        ({"rl.objective": "{'name': 'my_rewards:broken_advantage'}"}, r"weigh: .*my_rewards\.py:\d+: AttributeError"),
        ({"prior.source": "{'name': 'my_rewards:shorter'}"}, r"source needs task=|needs task="),
    ],
)
def test_mistakes_in_own_code_are_one_line(own, changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        build.build(own(changes), say=[].append)
    assert "\n" not in str(caught.value)


def test_a_config_that_a_run_recorded_is_built_again(own):
    """A resumed run, and a run that begins with its params, find the user's module as
    the first did.
    """
    config = own(VERIFIER)
    there, new = build.from_earlier(config.to_dict())
    assert new == []
    assert there == config.to_dict()
    build.build(ConfigDict(there), say=[].append)


def test_the_code_of_the_readme(tmp_path, monkeypatch):
    """Run its task, verifier and objective, in a module beside the config."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "mine.py").write_text(next(code for code in blocks if "def doubling" in code))
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config("tiny", "smoke", phases=("rl",))
    with config.unlocked():
        config.rl.source.task = {"name": "mine:doubling"}
        config.evaluate.suites = {"doubling": {"name": "mine:doubling"}}
        config.verifier = {"name": "mine:last_line"}
        config.rl.objective = {"name": "mine:mine", "lo": 0.1}
    said = []
    build.build(config, say=said.append)
    assert "source: 1,000 of task 'mine:doubling'" in said[0]
    assert not any("overlap" in line or "common" in line for line in said)
