"""Tasks: split by construction, reproducible from a seed, demonstrations as described,
and errors of one line.
"""

from __future__ import annotations

import inspect
import json
import re
import socket
import subprocess
import sys

import pytest
from gsm8k_folder import write_gsm8k

from jaxreason import tasks
from jaxreason.tasks import procedural
from jaxreason.verify import countdown as countdown_verifier
from jaxreason.verify import make

PROCEDURAL = ["chain", "inverse_chain", "calculator", "countdown", "reversal", "sorting"]
PRIOR_OPS = {"ops": (1, 8), "ops_weights": (0.12, 0.18, 0.20, 0.15, 0.12, 0.09, 0.08, 0.06)}


def verifier(name):
    return make("countdown") if name == "countdown" else make("exact", marker="A")


def share_right(name, demonstrations="human", size=4000, **kwargs):
    verify = verifier(name)
    made = tasks.load(name, size=size, demonstrations=demonstrations, **kwargs)
    return sum(verify(task.solution, task).correct for task in made) / size


def canonical(name, task):
    if name == "countdown":
        return tuple(sorted(task.data["numbers"])), task.data["target"]
    if name == "calculator":
        a, b, c = re.split(r"[*+:]", task.question)[:3]
        return *sorted((a, b)), c
    return task.question


@pytest.mark.parametrize("name", PROCEDURAL)
@pytest.mark.parametrize("train_seed", [0, 7])
def test_train_and_test_share_no_question(name, train_seed):
    small = {"chain": {"ops": (1, 2)}, "inverse_chain": {"ops": 1}, "calculator": {"factor_digits": 1, "addend_digits": 1}}
    small |= {"reversal": {"length": 3}, "sorting": {"length": 3}}
    train = {canonical(name, t) for t in tasks.load(name, seed=train_seed, size=3000, **small.get(name, {}))}
    test = {canonical(name, t) for t in tasks.load(name, seed=0, split="test", size=600, **small.get(name, {}))}
    assert len(test) > 20
    assert not train & test


def test_about_one_question_in_eight_is_held_out():
    """Both splits together have all 300 chains with one operation."""
    train = {t.question for t in tasks.load("chain", ops=1, size=6000)}
    test = {t.question for t in tasks.load("chain", ops=1, size=2000, split="test")}
    assert len(train | test) == 300
    assert 0.07 < len(test) / 300 < 0.19


@pytest.mark.parametrize("name", PROCEDURAL)
def test_item_is_a_function_of_seed_split_and_index(name):
    made = tasks.load(name, size=20, seed=3, demonstrations="human")
    again = tasks.load(name, size=40, seed=3, demonstrations="human")
    assert again[7] == made[7]  # read in another order, from a longer sequence
    assert list(made) == again[:20]
    assert made[-1] == made[19]
    with pytest.raises(IndexError):
        made[20]
    plain = tasks.load(name, size=20, seed=3)
    assert [t.question for t in plain] == [t.question for t in made]
    assert [t.question for t in tasks.load(name, size=20, seed=4)] != [t.question for t in made]
    assert len({t.id for t in made}) == 20


def test_neighbouring_seeds_do_not_share_items():
    """Item i + 1 of seed s is not item i of seed s + 1, as it would be if seed + index
    were the seed.
    """
    first, second = (tasks.load("chain", ops=8, size=50, seed=seed) for seed in (0, 1))
    assert not {t.question for t in first} & {t.question for t in second}


@pytest.mark.parametrize("name", PROCEDURAL)
@pytest.mark.parametrize("demonstrations", ["verified", "expert"])
def test_verified_and_expert_demonstrations_are_right(name, demonstrations):
    assert share_right(name, demonstrations, size=500) == 1.0


@pytest.mark.parametrize("name", PROCEDURAL)
def test_text_fits_the_alphabet(name):
    made = tasks.load(name, size=500, demonstrations="human")
    assert len(set(procedural.ALPHABET)) == len(procedural.ALPHABET) == 29
    assert set("".join(t.question + t.solution + t.answer for t in made)) <= set(procedural.ALPHABET)


def test_share_of_right_human_demonstrations():
    """The recipe says 44 %; its ambiguity (where part-way is) moves that by two or
    three points.
    """
    weights = PRIOR_OPS["ops_weights"][:5]
    assert share_right("chain", ops=(1, 5), ops_weights=weights) == pytest.approx(0.44, abs=0.03)
    assert share_right("chain", guess=1.0) == pytest.approx(0.25, abs=0.025)
    assert share_right("calculator") == pytest.approx(0.25 * (0.4 + 0.6 * 0.3) + 0.75 * 0.4, abs=0.025)


def test_chain_demonstration_has_the_shares_it_was_given():
    made = tasks.load("chain", size=4000, demonstrations="human", ops=5)
    texts = [t.solution for t in made]
    guesses = sum(text.startswith(";") for text in texts)
    full = sum(text.count("=") == 5 for text in texts)
    assert guesses / 4000 == pytest.approx(0.5, abs=0.025)
    assert full / 4000 == pytest.approx(0.3 + 0.2 / 5, abs=0.025)
    slips, steps = 0, 0
    for text in texts:
        for a, op, b, c in re.findall(r"(?<!\d)(\d)([-+*])(\d)=(\d)", re.sub(r"=(\d)", r"=\1 \1", text)):
            steps += 1
            slips += eval(f"{a}{op}{b}") % 10 != int(c)
    assert slips / steps == pytest.approx(0.12 * 0.9, abs=0.015)  # one slip in ten lands on the right digit


def test_chain_text():
    task = next(t for t in tasks.load("chain", ops=3, size=50, demonstrations="expert"))
    value, trace = int(task.question[0]), task.question[0]
    for op, digit in re.findall(r"([-+*])(\d)", task.question):
        value = eval(f"{value}{op}{digit}") % 10
        trace += f"{op}{digit}={value}"
    assert task.solution == f"{trace};A{value}"
    assert task.answer == str(value)


def test_difficulty_is_a_number_a_pair_or_weights():
    def ops(**kwargs):
        return [len(re.findall(r"[-+*]", t.question)) for t in tasks.load("chain", size=2000, **kwargs)]

    assert set(ops(ops=8)) == {8}
    assert set(ops(ops=[2, 5])) == {2, 3, 4, 5}
    counts = ops(**PRIOR_OPS)
    assert [counts.count(n) / 2000 for n in range(1, 9)] == pytest.approx(PRIOR_OPS["ops_weights"], abs=0.03)


def test_inverse_chain_answers_are_all_and_only_the_right_digits():
    for task in tasks.load("inverse_chain", size=200, ops=(1, 3)):
        steps, target = task.question[1:-1].split("=")
        right = []
        for digit in range(10):
            value = digit
            for op, operand in re.findall(r"([-+*])(\d)", steps):
                value = eval(f"{value}{op}{operand}") % 10
            right += [str(digit)] * (value == int(target))
        assert list(task.data["answers"]) == right
        assert 1 <= len(right) <= 2


def test_inverse_chain_human_gives_up_and_expert_does_not():
    human = [t.solution for t in tasks.load("inverse_chain", size=2000, demonstrations="human")]
    expert = [t.solution for t in tasks.load("inverse_chain", size=200, demonstrations="expert")]
    attempts = [len(re.findall("[ny]", text)) for text in human]
    assert max(attempts) == 4
    after_first = [text for text in human if re.match(r"[^ny]*n", text)]
    gave_up = sum(re.fullmatch(r"[^ny]*nA\d", text) is not None for text in after_first)
    assert gave_up / len(after_first) == pytest.approx(0.45, abs=0.04)
    assert all(re.search(r"yA\d$", text) for text in expert)
    lucky = [t.solution for t in tasks.load("inverse_chain", size=500, demonstrations="expert", lucky=1.0)]
    assert not any("n" in text for text in lucky)


def test_calculator_marks_what_the_tool_wrote():
    made = tasks.load("calculator", size=400, demonstrations="human")
    called = [t for t in made if "[" in t.solution]
    assert 0.15 < len(called) / 400 < 0.35
    for task in called:
        spans = [task.solution[start:stop] for start, stop in task.data["forced"]]
        assert spans == re.findall(r"(?<==)\d+\]", task.solution)
        for expression, value in re.findall(r"\[([\d*+]+)=(\d+)\]", task.solution):
            assert eval(expression) == int(value)
    assert all("forced" not in t.data for t in made if "[" not in t.solution)


def test_countdown_answer_and_attempts_are_sound():
    verify = make("countdown")
    for task in tasks.load("countdown", size=300, numbers=(2, 4), demonstrations="expert"):
        assert verify(f"A{task.answer}", task).correct
        attempts = re.findall(r"([^ny]+)([ny])", task.solution.partition("A")[0])
        assert attempts
        for steps, says in attempts:
            for step in steps.split(","):
                left, right = step.split("=")
                assert countdown_verifier.evaluate(left)[0] == int(right)
            assert (int(right) == task.data["target"]) == (says == "y")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("chian", {}, "unknown task 'chian' (did you mean 'chain'?)"),
        ("chain", {"op": 3}, "unknown field of task 'chain' 'op' (did you mean 'ops'?)"),
        ("chain", {"split": "tset"}, "did you mean 'test'?"),
        ("chain", {"demonstrations": "humans"}, "did you mean 'human'?"),
        ("chain", {"ops": (5, 2)}, "ops got (5, 2)"),
        ("chain", {"ops": 2.5}, "ops got 2.5"),
        ("chain", {"ops": (1, 3), "ops_weights": (1, 2)}, "3 weights"),
        ("chain", {"size": 0}, "size from 1 to"),
        ("reversal", {"length": 1, "split": "test"}, "too few distinct questions"),  # none of its ten falls in test
        ("countdown", {"numbers": 1, "max_number": 1, "split": "test"}, "too few distinct questions"),
        ("inverse_chain", {"demonstrations": "verified", "lucky": 0, "attempts": 0}, "attempts got 0"),
        ("jsonl", {}, "task 'jsonl' needs path=..."),
        ("programs", {}, "task 'programs' needs path=..."),
    ],
)
def test_errors_are_one_line(name, kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        tasks.load(name, **kwargs)
    assert "\n" not in str(error.value)


GSM8K_ROWS = {
    "train": [("How many?", "He has 3*5=<<3*5=15>>15.\nIt is $<<15+2=17>>17.\n#### 17"), ("And?", "Many.\n#### 1,234")],
    "test": [("Left?", "2-1=<<2-1=1>>1\n#### -1")],
}


def test_gsm8k(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(write_gsm8k(tmp_path, GSM8K_ROWS)))
    train = tasks.load("gsm8k")
    assert [t.answer for t in train] == ["17", "1234"]
    assert train[0].solution == "He has 3*5=15.\nIt is $17.\n#### 17"
    assert train[1].solution.endswith("#### 1234")
    annotated = tasks.load("gsm8k", split="test", annotations=True)[0]
    assert annotated.solution == "2-1=<<2-1=1>>1\n#### -1"
    assert [annotated.solution[start:end] for start, end in annotated.data["forced"]] == ["1>>"]
    assert len(tasks.load("gsm8k", limit=1)) == 1
    with pytest.raises(ValueError, match="split of task 'gsm8k' 'validation'; one of: test, train"):
        tasks.load("gsm8k", split="validation")


def test_gsm8k_that_is_missing_says_what_to_do_and_asks_no_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(FileNotFoundError, match=r"TFDS_DATA_DIR.*tfds build gsm8k.*jsonl") as error:
        tasks.load("gsm8k", data_dir=str(tmp_path))
    assert "\n" not in str(error.value)


def test_gsm8k_needs_no_tensorflow_and_prints_nothing(tmp_path):
    write_gsm8k(tmp_path, GSM8K_ROWS)
    code = f"import sys; from jaxreason import tasks; tasks.load('gsm8k', data_dir={str(tmp_path)!r}); "
    code += "assert 'tensorflow' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def write_jsonl(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_jsonl(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", {"B": "Two. ", "Q": "Sum?", "A": 145.0, "S": "w"}, "", {"B": "x", "Q": "y", "A": 0.5}
    )
    made = tasks.load("jsonl", path=path, question="B+Q", answer="A")
    assert [(t.question, t.answer, t.id) for t in made] == [("Two. Sum?", "145", "a/1"), ("x y", "0.5", "a/3")]
    assert tasks.load("jsonl", path=path, question="Q", answer="A", solution="S", limit=1)[0].solution == "w"
    marked = write_jsonl(tmp_path / "b.jsonl", {"question": "q", "answer": "One.\n#### 7"})
    assert tasks.load("jsonl", path=marked, marker="####")[0].answer == "7"
    assert tasks.load("jsonl", path=marked, marker="####")[0].solution == "One.\n#### 7"


def test_jsonl_split_parts_the_rows(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", *({"question": f"q{i % 300}", "answer": i} for i in range(600)))
    train, test = (tasks.load("jsonl", path=path, split=split, held_out=0.2) for split in ("train", "test"))
    assert len(train) + len(test) == 600
    assert 0.1 < len(test) / 600 < 0.3
    assert not {t.question for t in train} & {t.question for t in test}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"question": "q", "answer": 1}', "{oops"], "a.jsonl:2: not JSON"),
        (["[1]"], "a.jsonl:1: got a JSON list"),
        (
            ['{"question": "q", "anwser": 1}'],
            "a.jsonl:1: unknown field 'answer' (did you mean 'anwser'?); one of: anwser, question",
        ),
        (['{"question": "q", "answer": NaN}'], "a.jsonl:1: field 'answer' got nan"),
        (['{"question": "q", "answer": null}'], "a.jsonl:1: field 'answer' got None"),
        ([""], "a.jsonl has no tasks"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tasks.load("jsonl", path=write_jsonl(tmp_path / "a.jsonl", *rows))


def test_corpus(tmp_path):
    paragraphs = [f"Paragraph {i}\nof two lines." for i in range(200)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs[:120]) + "\n \n\n")
    (tmp_path / "b.txt").write_text("\n\n".join(paragraphs[100:]))
    train, test = (tasks.load("corpus", path=str(tmp_path / "*.txt"), split=split) for split in ("train", "test"))
    assert set(train) | set(test) == set(paragraphs)
    assert len(train) + len(test) == 220
    assert not set(train) & set(test)
    assert 0.03 < len(test) / 220 < 0.2
    whole = tasks.load("corpus", path=[str(tmp_path / "a.txt")], by="file", held_out=0.0)
    assert len(whole) == 1
    with pytest.raises(ValueError, match="no document in split 'test'"):
        tasks.load("corpus", path=str(tmp_path / "a.txt"), split="test", held_out=0.0)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        tasks.load("corpus", path=str(tmp_path / "c*.txt"))


@pytest.mark.parametrize("held_out", [-1, -1e-9, 1.5, float("nan")])
@pytest.mark.parametrize("name", ["corpus", "jsonl"])
def test_a_fraction_that_is_none_is_refused(name, held_out, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "one", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"held_out got .*; allowed: 0 to 1, the fraction that is test"):
        tasks.load(name, path=str(tmp_path / "a.jsonl"), held_out=held_out)


@pytest.mark.parametrize("name", [name for name, maker in tasks.TASKS.items() if "limit" in inspect.signature(maker).parameters])
def test_a_limit_below_one_is_refused(name):
    for limit in (-1, 0):
        with pytest.raises(ValueError, match=f"limit of task '{name}' got {limit}; allowed: None"):
            tasks.load(name, limit=limit)
