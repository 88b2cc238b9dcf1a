"""Tasks of reasoning-gym and their verifier: disjoint splits, the same tasks in every
process, keys that are right, and no text that runs code, hangs or raises.
"""

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys

import pytest
from nasty import NASTY
from runs import ROOT

from jaxreason import build, sandbox, tasks
from jaxreason.build.suites import read_suites
from jaxreason.sandbox import bwrap
from jaxreason.types import Task
from jaxreason.verify import child, make, pool, reasoning_gym

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="no reasoning-gym: pip install 'jaxreason[gym]'"
)

# Many answers are right, and no example is given, or some that are not scored as right.
NO_KEY = {"boxnet", "propositional_logic", "rush_hour"}


def load(dataset="leg_counting", **kwargs):
    return tasks.load("reasoning_gym", dataset=dataset, **kwargs)


@pytest.fixture(scope="module")
def verify():
    return make("reasoning_gym")


def score(task, answer):
    """Score an answer in a child, even if it equals the key."""
    data = task.data
    return pool.shared("gym", 2, 5.0, 2048).ask("score", data["dataset"], json.dumps(data["options"]), data["entry"], answer)


# --- tasks ---


def test_train_and_test_share_no_question():
    train = load("count_primes", seed=0, size=300, options={"max_n": 12})
    test = load("count_primes", seed=1, size=60, options={"max_n": 12}, split="test")
    questions = [{task.question for task in some} for some in (train, test)]
    assert min(map(len, questions)) > 2
    assert not questions[0] & questions[1]
    assert tasks.overlap(train, test) == 0


def test_neighbouring_seeds_do_not_share_items():
    """reasoning-gym seeds item i by seed + i, so its own seeds 0 and 1 share all items
    but one.
    """
    first, second = ({task.question for task in load("chain_sum", size=30, seed=seed)} for seed in (0, 1))
    assert len(first) > 25
    assert len(first & second) < 3


def test_a_larger_size_begins_with_the_same_tasks():
    few, many = load(size=5, seed=3), load(size=12, seed=3)
    assert list(few) == list(many)[:5]
    assert many[7] == load(size=12, seed=3)[7]  # in any order
    assert len({task.id for task in many}) == 12


PRINT = """
from jaxreason import tasks
for name in ("isomorphic_strings", "word_ladder", "list_functions", "pool_matrix", "acre"):
    print([task.question for task in tasks.load("reasoning_gym", dataset=name, size=30)])
"""


def test_tasks_are_the_same_in_every_process():
    """These datasets depend on the order of sets, or on global generators."""
    said = {
        subprocess.run(
            [sys.executable, "-c", PRINT],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_options_reach_the_dataset():
    task = load("chain_sum", size=1, options={"min_terms": 9, "max_terms": 9})[0]
    assert task.question.count("+") + task.question.count("-") >= 8
    json.dumps(task.data)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        (
            {"dataset": "leg_countin"},
            "unknown dataset of reasoning-gym 'leg_countin' (did you mean 'leg_counting'?); one of: ab,",
        ),
        ({"options": {"min_animal": 1}}, "unknown option of dataset 'leg_counting' 'min_animal' (did you mean 'min_animals'?)"),
        ({"options": {"seed": 1}}, "unknown option of dataset 'leg_counting' 'seed'"),
        (
            {"options": {"min_animals": -1}},
            "dataset 'leg_counting' of reasoning-gym got options {'min_animals': -1}: min_animals",
        ),
        ({"options": {"min_animals": {1}}}, "options of dataset 'leg_counting': Object of type set is not JSON"),
        ({"split": "tests"}, "unknown split of task 'reasoning_gym' 'tests' (did you mean 'test'?)"),
        ({"size": 0}, "task 'reasoning_gym' got size=0"),
    ],
)
def test_impossible_fields_are_one_line(kwargs, said):
    with pytest.raises(ValueError) as caught:
        load(**kwargs)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_draws_are_bounded(monkeypatch):
    """A dataset with one question has it in one split only."""
    monkeypatch.setattr(tasks.reasoning_gym, "DRAWS", 50)
    one = {"dataset": "count_primes", "options": {"min_n": 1, "max_n": 1}}
    assert len({task.question for task in load(**one, size=9, split="test")}) == 1
    with pytest.raises(ValueError, match="no train question in 50 draws; too few distinct questions, make it wider"):
        load(**one)


@pytest.mark.parametrize("make_it", [load, lambda: make("reasoning_gym")])
def test_a_missing_package_is_one_line(make_it, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^(task|verifier) 'reasoning_gym' needs reasoning-gym; pip install 'jaxreason\[gym\]'$"
    ):
        make_it()


# --- verifier ---


def check_own_answers(name, verify):
    made = load(name, size=2, seed=11)
    for task in made:
        json.dumps(task.data)
        for wrong in ("I do not know", "nan", "True False", "x"):
            assert verify(f"<answer>{wrong}</answer>", task).reason == "wrong", wrong
        if name in NO_KEY and not task.answer:
            continue
        assert verify(f"So it is <answer>\n{task.answer}\n</answer>.", task).correct
        assert score(task, task.answer) == 1.0


def test_the_own_answers_of_all_datasets_are_right(verify):
    names = pool.shared("gym", 2, 5.0, 2048).ask("names")
    assert len(names) > 100
    assert set(names) > NO_KEY
    failed = []
    for name in names:
        try:
            check_own_answers(name, verify)
        except (AssertionError, ValueError, pool.Failed) as error:
            failed.append(f"{name}: {error!r:.200}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    ("text", "marker", "found"),
    [
        ("<answer> 5 </answer> bye", "", "5"),
        ("<answer>4</answer> no, <answer>5</answer>", "", "5"),
        ("write <answer> <answer>5</answer> and </answer", "", "5"),
        ("<answer>\n1 2\n3 4\n</answer>", "####", "1 2\n3 4"),
        ("so\n#### 5", "####", "5"),
        ("so\n\n 5 \n\n", "####", "5"),
        ("so\n\n 5 \n\n", "", "5"),
        ("</answer>5", "", "</answer>5"),
        ("<answer></answer>", "", ""),
        (" \n ", "", ""),
    ],
)
def test_where_the_answer_is(text, marker, found):
    assert reasoning_gym.find_answer(text, marker) == found


def test_verdicts(verify):
    task = load("word_sorting", size=1)[0]
    words = task.answer.split(", ")
    some = f"<answer>{', '.join(reversed(words))}</answer>"
    assert verify(task.answer, task).reason == "right"
    assert (verify(some, task).reason, verify(some, task).reward) == ("wrong", 0.0)
    paid = make("reasoning_gym", partial=True)(some, task)
    assert 0 < paid.reward < 1
    assert not paid.correct
    assert verify("", task).reason == "no answer"
    assert verify("x" * 10_001, task).reason == "too long"
    assert verify("", Task("?", "", data={**task.data, "entry": {**task.data["entry"], "answer": " "}})).reason == "bad key"
    with pytest.raises(ValueError, match=r"verifier 'reasoning_gym' needs data .*; task 'mine/0' has \['x'\]"):
        verify("5", Task("?", "5", id="mine/0", data={"x": 1}))


@pytest.mark.parametrize(
    ("name", "options", "wrong"),
    [
        ("game_of_life_halting", {}, lambda task: str(task.answer != "True")),
        ("complex_arithmetic", {}, lambda task: "nan"),
        ("coin_flip", {"min_trials": 20, "max_trials": 25}, lambda task: "0"),
        ("puzzle24", {}, lambda task: "6*4*1*1"),
    ],
)
def test_what_a_lenient_score_accepts_is_wrong(name, options, wrong, verify):
    """A policy would find an answer that is right for every task of a dataset."""
    made = load(name, options=options, size=6)
    for task in made:
        assert score(task, task.answer) == 1.0
        assert not verify(f"<answer>{wrong(task)}</answer>", task).correct


@pytest.mark.parametrize(("got", "reward"), [(float("nan"), 0.0), (float("inf"), 0.0), (-1.0, 0.0), (7.0, 1.0), (0.25, 0.25)])
def test_a_score_out_of_range_pays_no_more_than_one(got, reward):
    verdict = reasoning_gym._verdict(got, "5", partial=True)
    assert (verdict.reward, verdict.correct) == (reward, False)


def test_entries_come_back_from_json():
    entry = {"a": (1, ("x", [2.5, None])), "b": {1: "x", (2, 3): {"y": True}}, "(tuple)": [1], "c": {"(tuple)": [1]}}
    assert child.from_json(json.loads(json.dumps(child.as_json(entry)))) == entry


EVALUATED = ("spiral_matrix", "n_queens", "string_insertion", "binary_matrix", "countdown", "puzzle24")
EVALUATED += ("simple_integration", "intermediate_integration", "polynomial_multiplication")
HOSTILE = [
    "__import__('os').system('touch {file}')",
    "open('{file}', 'w')",
    "[open('{file}', 'w')]",
    "eval(\"open('{file}', 'w')\")",
    "exec(\"open('{file}', 'w')\")",
    "(lambda: open('{file}', 'w'))()",
    "[c for c in ().__class__.__base__.__subclasses__()]",
    "sin.__init__.__globals__",
    "lambdify('x', \"open('{file}', 'w')\")(1)",
    "sympify(\"open('{file}', 'w')\")",
    "Symbol('x').func(open('{file}', 'w'))",
    "Lambda('x', \"open('{file}', 'w')\")",
    "import os\nos.system('touch {file}')",
    "exit()",
    "[" * 3000 + "]" * 3000,
    "(" * 3000 + "1" + ")" * 3000,
    "-" * 9000 + "1",
]


@pytest.mark.parametrize("name", EVALUATED)
def test_no_answer_runs_code(name, verify, tmp_path):
    task, file = load(name, size=1)[0], tmp_path / "written"
    for text in HOSTILE:
        verdict = verify(f"<answer>{text.replace('{file}', str(file))}</answer>", task)
        assert not verdict.correct, text
        assert not file.exists(), text
    assert score(task, task.answer) == 1.0  # the child still judges


def test_answers_that_would_never_end_are_cut_off(verify):
    quick = make("reasoning_gym", timeout_s=1.0, processes=1)
    for name, tower in (("countdown", "9**9**9**9"), ("countdown", "factorial(10**9)"), ("simple_integration", "x**9**9**9")):
        assert not quick(f"<answer>{tower}</answer>", load(name, size=1)[0]).correct
    task = load("spiral_matrix", size=1)[0]
    assert quick("<answer>[9**9**9]</answer>", task).reason in ("timeout", "out of memory")
    assert quick(f"<answer>{task.answer}</answer>", task).correct


@pytest.mark.parametrize("name", ["leg_counting", "countdown", "boxnet"])
def test_no_text_raises(name):
    judge, task = make("reasoning_gym", timeout_s=1.0), load(name, size=1)[0]
    for text in NASTY:
        assert not judge(f"<answer>{text}</answer>", task).correct, text[:50]
        assert name == "countdown" or not judge(text, task).correct, text[:50]


def test_a_child_writes_no_file_and_starts_no_program(tmp_path):
    """The second guard: even code that passes the first is stopped."""
    code = """
import importlib.util, os, socket, sys
spec = importlib.util.spec_from_file_location("child", sys.argv[1])
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)
child.prepare("gym")
for bad in (lambda: open(sys.argv[2], "w"), lambda: os.system("true"), socket.socket, lambda: os.remove(sys.argv[1])):
    try:
        bad()
    except PermissionError as error:
        print(error)
"""
    script, file = ROOT / "jaxreason" / "verify" / "child.py", tmp_path / "x"
    done = subprocess.run([sys.executable, "-c", code, script, file], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == [
        f"{event} is not allowed here" for event in ("open", "os.system", "socket.__new__", "os.remove")
    ]
    assert not file.exists()
    assert script.exists()


HELD = pytest.mark.skipif(bool(bwrap.refusal()), reason=bwrap.refusal())


@HELD
@pytest.mark.skipif(not os.path.exists("/proc/self/ns/pid"), reason="reads /proc")
def test_scores_are_computed_in_the_sandbox():
    judge = make("reasoning_gym", processes=1, timeout_s=7.0)
    assert judge("<answer>x</answer>", load(size=1)[0]).reason == "wrong"
    (living,) = [one for one in pool.shared("gym", 1, 7.0, 2048, True)._children.queue if one is not None]
    first = f"/proc/{living.process.pid}/task/{living.process.pid}/children"
    for kind in ("pid", "net", "mnt", "ipc"):
        with open(first) as file:
            inside = os.readlink(f"/proc/{file.read().split()[0]}/ns/{kind}")
        assert inside != os.readlink(f"/proc/self/ns/{kind}")
    living.processes.end()
    assert judge("<answer>x</answer>", load(size=1)[0]).reason == "wrong"


@HELD
def test_a_third_guard_holds_when_the_others_fail(tmp_path):
    """The program of the child is one without guards here."""
    secret, script = tmp_path / "secret", tmp_path / "bare.py"
    secret.write_text("x")
    script.write_text("""
import json, os, sys
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
pipe.send_bytes(b"")
while True:
    try:
        answer = repr(eval(json.loads(pipe.recv_bytes())[0]))
    except EOFError:
        break
    except BaseException as error:
        answer = type(error).__name__
    pipe.send_bytes(json.dumps(["", answer]).encode())
""")
    ours, theirs = multiprocessing.Pipe()
    processes = sandbox.start_script(script, [str(theirs.fileno())], [theirs.fileno()], 1024, {})
    theirs.close()
    assert ours.poll(60)
    assert ours.recv_bytes() == b""

    def ask(text):
        ours.send_bytes(json.dumps([text]).encode())
        assert ours.poll(60)
        return json.loads(ours.recv_bytes())[1]

    assert ask("__import__('reasoning_gym').__name__") == "'reasoning_gym'"
    assert ask(f"open({str(secret)!r}).read()") == "FileNotFoundError"
    assert ask(f"open({str(tmp_path / 'new')!r}, 'w')") == "FileNotFoundError"
    assert ask("open(__import__('sympy').__file__, 'a')") in ("OSError", "PermissionError")
    assert ask("__import__('socket').create_connection(('127.0.0.1', 1))") == "PermissionError"
    assert ask(f"os.kill({os.getpid()}, 0)") == "ProcessLookupError"
    assert ask("[name for name in os.environ if 'SECRET' in name]") == "[]"
    processes.end()
    ours.close()


def test_without_the_sandbox_it_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(bwrap, "refusal", lambda: "sandbox 'bwrap' needs bubblewrap; apt-get install bubblewrap")
    reasoning_gym._say.cache_clear()
    for _ in range(2):
        assert not reasoning_gym.is_held("auto")
    assert capsys.readouterr().err == "reasoning-gym evaluates answers outside the sandbox: sandbox 'bwrap' needs bubblewrap\n"
    assert not reasoning_gym.is_held("none")
    with pytest.raises(ValueError, match="apt-get install bubblewrap"):
        reasoning_gym.is_held("bwrap")
    with pytest.raises(ValueError, match="got sandbox='docker'; allowed: auto, bwrap, none"):
        make("reasoning_gym", sandbox="docker")


def test_elementary_expressions_are_evaluated():
    assert child.guarded_eval("[[1, -2], (3.5, 'x')]") == [[1, -2], (3.5, "x")]
    assert child.guarded_eval(" 0x1f + 2 * 3 ") == 37
    for wrong in ("x", "abs", "a.b", "a[0]", "[x for x in 'a']", "f'{1}'", "(lambda: 1)()", "print(1)", "(x := 1)"):
        with pytest.raises(ValueError):
            child.guarded_eval(wrong)


# --- suites ---


def test_a_dataset_is_a_suite():
    from jaxreason.build.layout import section_of_suite
    from jaxreason.options import fields

    found = read_suites("gym:leg_counting, gym:basic_arithmetic,chain", {})
    assert list(found) == ["gym:leg_counting", "gym:basic_arithmetic", "chain"]
    section = found["gym:basic_arithmetic"]
    assert (section["name"], section["dataset"], section["split"]) == ("reasoning_gym", "basic_arithmetic", "test")
    assert "<answer>" in section["instruction"]
    assert not fields.unknown_fields(section_of_suite(section), section)
    fields.check(section_of_suite(section), section, "gym:basic_arithmetic")
    assert read_suites("gym:x", {"gym:x": {"name": "chain"}}) == {"gym:x": {"name": "chain"}}
    harder = read_suites("gym:x={'name': 'reasoning_gym', 'dataset': 'chain_sum', 'options': {'min_terms': 4}}", {})["gym:x"]
    assert harder["verifier"] == section["verifier"]
    with pytest.raises(ValueError, match="or gym:DATASET of reasoning-gym"):
        read_suites("gym:", {})
    assert build.make_judge(**section["verifier"]).deadline_s is None
