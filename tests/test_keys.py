"""Keys that no answer could equal are found before the run, and impossible numbers of a
config are refused in one line.
"""

import math

import pytest
from runs import load_config

from jaxreason import build
from jaxreason.types import Task
from jaxreason.verify import VERIFIERS, bad_keys, make
from jaxreason.verify.combine import COMBINATORS


def one(answer, **data):
    return Task("?", answer, data=data)


COUNTDOWN = {"numbers": (3, 7, 5), "target": 26}


@pytest.mark.parametrize(
    ("section", "good", "bad"),
    [
        ({"name": "number"}, [one("1,234"), one("-3/4")], [one(""), one("five")]),
        ({"name": "math"}, [one(r"\[18\]"), one("five"), one("", answers=("5",))], [one(""), one("$$"), one(r"\boxed{}")]),
        ({"name": "exact"}, [one("5"), one("a b"), one("", answers=("5",))], [one(""), one(" 5"), one("5\n")]),
        ({"name": "exact", "marker": ";A", "end": "."}, [one("5")], [one("5;A6"), one("5.0")]),
        (
            {"name": "countdown"},
            [one("", **COUNTDOWN), one("", numbers=[4], target=4.0)],
            [
                one("", numbers=("3", "7"), target=21),
                one("", numbers=(), target=21),
                one("", numbers=(3, -7), target=21),
                one("", numbers=(3, 7), target="21"),
                one("", numbers=(3, 7), target=math.nan),
            ],
        ),
        ({"name": "countdown", "use_all": False}, [one("", numbers=(3, -7), target=3)], [one("", numbers=(-3, -7), target=3)]),
        ({"name": "format"}, [one("")], []),
    ],
)
def test_keys_that_no_answer_can_equal_are_bad_keys(section, good, bad):
    verify = make(**section)
    assert bad_keys(verify, good + bad) == bad
    for task in bad:
        verdict = verify("A 3*7+5 is 5", task)
        assert (verdict.reward, verdict.reason) == (0.0, "bad key")


def test_every_verifier_looks_at_the_key_first():
    """The text does not matter, so keys can be checked with an empty one."""
    # Those of other files have tests of their own; combinators have other verifiers.
    for name in VERIFIERS.keys() - {"format", "reasoning_gym", "taskset", "code", *COMBINATORS}:
        assert make(name)("", one("", numbers=(), target=0)).reason == "bad key", name


def check(items, section):
    said = []
    build.check_keys(items, section, "task 'mine'", said.append)
    return said


def test_some_bad_keys_are_said_and_all_are_refused():
    tasks = [Task("?", answer, id=answer) for answer in ("1", "five", "2", "six")]
    assert check(tasks[::2], {"name": "number"}) == []
    assert check(tasks, {"name": "number", "must_finish": True}) == [
        "warning: task 'mine': verifier 'number' can't judge 2 of 4 keys; the first is 'five' of task 'five'; such attempts earn "
        "0 and are counted in rollout/bad_keys"
    ]
    with pytest.raises(ValueError, match=r"task 'mine': verifier 'number' can't judge 2 of 2 keys; .* Every reward would be 0"):
        check(tasks[1::2], {"name": "number"})
    with pytest.raises(ValueError, match="verifier 'countdown' needs data 'numbers' and 'target'"):
        check(tasks, {"name": "countdown"})
    assert check(tasks, {"name": "my_rewards:brevity"}) == []  # a user's own is not called


def test_of_many_keys_some_are_tried(monkeypatch):
    monkeypatch.setattr(build.tasks, "KEYS_TRIED", 10)
    (said,) = check([Task("?", "five" if i % 2 else "5") for i in range(45)], {"name": "number"})
    assert "can't judge 4 of 9 keys that were tried (of 45)" in said


def test_bad_keys_are_found_in_a_file_before_the_run(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "1+1:", "answer": "five"}\n' * 3)
    config = load_config("tiny", "smoke", phases=("rl",))
    config.verifier = {"name": "number"}
    config.rl.source.task = {"name": "jsonl", "path": str(file), "split": None}
    with pytest.raises(ValueError, match=r"^task 'jsonl': verifier 'number' can't judge 3 of 3 keys") as error:
        build.build(config)
    assert "\n" not in str(error.value)
    config.rl.source.task = {"name": "chain", "size": 8}
    config.verifier, chain = {"name": "exact"}, {"name": "chain", "size": 8}
    config.evaluate.suites = {"held": {**chain, "verifier": {"name": "countdown"}}}
    with pytest.raises(ValueError, match=r"^verifier 'countdown' needs data 'numbers' and 'target'; task 'chain"):
        build.build(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"evaluate.temperatures": (math.nan,)}, "config.evaluate.temperatures got"),
        ({"evaluate.temperatures": (0.0, -1.0)}, "config.evaluate.temperatures got -1.0"),
        ({"evaluate.temperatures": (math.inf,)}, "config.evaluate.temperatures got"),
        ({"evaluate.temperatures": (1.0, 0.0, 1.0)}, "config.evaluate.temperatures has 1 twice"),
        ({"evaluate.n": 0}, "config.evaluate.n got 0; allowed: 1 or more"),
        ({"evaluate.n": -5}, "config.evaluate.n got -5"),
        ({"evaluate.final_n": 0}, "config.evaluate.final_n got 0"),
        ({"log.rollouts_kept": -1}, "config.log.rollouts_kept got -1; allowed: 0 (none) or more"),
        ({"rl.source.problems": 0}, "source.problems got 0; allowed: 1 or more"),
        ({"rl.source.problems": -4}, "source.problems got -4"),
        ({"rl.source.temperature": math.nan}, "source.temperature got nan (float); allowed: float, finite"),
        ({"rl.source.temperature": math.inf}, "source.temperature got inf (float); allowed: float, finite"),
        ({"rl.evaluate_every": -1}, "config.rl.evaluate_every got -1; allowed: 0"),
        ({"prior.log_every": 0}, "config.prior.log_every got 0; allowed: 1 or more"),
        ({"prior.source.rows": 0}, "source.rows got 0; allowed: 1 or more"),
        ({"prior.source.length": 0}, "source.length got 0; allowed: 1 or more"),
    ],
)
def test_numbers_out_of_range_are_one_line(fields, message):
    config = load_config("tiny", "smoke")
    with config.unlocked():
        for name, value in fields.items():
            *path, last = name.split(".")
            at = config
            for part in path:
                at = at[part]
            at[last] = value
    with pytest.raises(ValueError) as error:
        build.build(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_verifier_with_a_limit_of_its_own_has_no_deadline():
    assert build.make_judge(name="math").deadline_s is None
    assert build.make_judge(name="number").deadline_s == 60.0
    assert build.make_judge(name="number", deadline_s=5.0).deadline_s == 5.0
    with pytest.raises(ValueError, match=r"verifier.deadline_s got 5.0, but 'math' has its own limit; set timeout_s instead"):
        build.make_judge(name="math", deadline_s=5.0)
