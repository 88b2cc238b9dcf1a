"""A data set of a model's right attempts: what is kept, killed and continued, and that
a new model is trained on the texts that were written.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from runs import load_config, read_lines, run_config

from jaxreason import tasks, text
from jaxreason.build import build
from jaxreason.generate import Asked, generate, keep, task_section, written_as
from jaxreason.rollout import Completer
from jaxreason.types import Rollout, Task

VERIFIER = """
from jaxreason.types import Verdict

def make():
    return lambda text, task: Verdict(float(len(text) % 2), len(text) % 2 == 1, text)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Make a run whose verifier accepts texts of an odd length."""
    folder, patch = tmp_path_factory.mktemp("trained"), pytest.MonkeyPatch()
    (folder / "odd_texts_here.py").write_text(VERIFIER)
    patch.syspath_prepend(folder)
    config = load_config("tiny", "smoke", **{"prior.steps": 2, "rl.steps": 1})
    config.verifier = {"name": "odd_texts_here:make"}
    config.evaluate.suites = {}
    config.sharding.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    summary = run_config(config, folder / "run")
    (folder / "run" / "config.json").write_text(json.dumps(summary["config"] | {"revisions": {}}))
    yield folder / "run"
    patch.undo()


@pytest.fixture(scope="module")
def made(trained):
    folder, said = trained.parent / "made", []
    about = generate(Asked(str(trained), str(folder), n=12, attempts=4, per_problem=2), said.append)
    assert any("kept" in line for line in said), said
    return folder, about


def test_the_data_set_has_right_attempts_and_where_they_are_from(trained, made):
    folder, about = made
    attempts, rows = read_lines(folder / "attempts.jsonl"), read_lines(folder / "tasks.jsonl")
    assert len(attempts) == about["counts"]["attempts"] == 48
    right = [r for r in attempts if r["correct"] and r["stop"] != "limit" and r["written"] != "lost"]
    expected = {}
    for r in sorted(right, key=lambda r: (r["problem"], r["attempt"])):
        texts = expected.setdefault(r["question"], [])
        if r["text"] not in texts and len(texts) < 2:
            texts.append(r["text"])
    assert rows
    assert [(row["question"], row["solution"]) for row in rows] == [(q, text) for q in expected for text in expected[q]]
    assert about["counts"]["kept"] == len(rows)
    for row in rows:
        assert row["verdict"]["correct"]
        assert row["made"]["path"] == str(trained)
        assert row["made"]["step"] == 3
        assert row["made"]["written"] == "exact"
        assert row["made"]["prompt"].endswith(row["question"])
        assert {"fingerprint", "config", "date", "seed", "temperature"} <= row["made"].keys()
    there = json.loads((folder / "about.json").read_text())
    assert there["done"]
    assert there["counts"] == about["counts"]


def test_killed_and_continued_it_is_the_same(trained, made, tmp_path):
    whole, _ = made
    (tmp_path / "out").mkdir()
    lines = (whole / "attempts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "attempts.jsonl").write_text("".join(lines[7:20]) + lines[30][:50])
    about = json.loads((whole / "about.json").read_text())
    (tmp_path / "out" / "about.json").write_text(json.dumps(about | {"done": False, "date": "2001-02-03"}))
    said = []
    generate(Asked(str(trained), str(tmp_path / "out"), n=12, attempts=4, per_problem=2), said.append)
    assert "35 attempts at 12 tasks, 13 are recorded" in said
    rows, expected = (read_lines(folder / "tasks.jsonl") for folder in (tmp_path / "out", whole))
    assert {row["made"].pop("date") for row in rows} == {"2001-02-03"}
    assert all(row["made"].pop("date") for row in expected)
    assert rows == expected
    with pytest.raises(ValueError, match=r"holds another data set \(settings.seed.*\); choose another --out"):
        generate(Asked(str(trained), str(tmp_path / "out"), n=12, attempts=4, seed=1), said.append)


def test_a_new_model_is_trained_on_what_was_written(made):
    folder, _ = made
    items, rows = tasks.load("generated", path=str(folder)), read_lines(folder / "tasks.jsonl")
    assert [(task.question, task.answer, task.solution) for task in items] == [
        (row["question"], row["answer"], row["solution"]) for row in rows
    ]
    assert len({task.id for task in items}) == len(items)
    assert len(tasks.load("generated", path=str(folder), limit=2)) == 2
    config = load_config("tiny", "smoke,prior=none")
    config.sharding.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    task = {"name": "generated", "path": str(folder)}
    config.rl.objective, config.rl.microbatches = {"name": "sft"}, 1
    for source in ({"name": "demonstrations", "rows": 4, "max_tokens": 40}, {"name": "corpus", "rows": 2, "length": 16}):
        config.rl.source = {**source, "task": task}
        run = build(config, say=lambda line: None)
        _, drawn = run.phases[0].source.next({"position": 0}, None, None)
        shown = [run.decode(row[segment > 0]) for row, segment in zip(*batch_rows(drawn.batch), strict=True)]
        assert any(items[i].solution in text for i in range(len(items)) for text in shown)
    # Its questions may not be those of a suite.
    chain = config.evaluate.suites.chain.to_dict()
    config.evaluate.suites = {"same": chain | {"ops": (2, 5), "split": "train"}}
    with pytest.raises(ValueError, match=r"suite 'same' holds .* in common with the source task 'generated'"):
        build(config, say=lambda line: None)


def batch_rows(batch):
    return batch.tokens_BT, batch.segment_BT


# --- the parts ---


def completer_of(tokenizer):
    return Completer(None, None, lambda ids: tokenizer.decode([int(i) for i in ids]), tokenizer.eos_ids, (), 1, 9)


def rollout_of(format, tokenizer, tokens, sampled=None):
    task, tokens = Task("1+1:", "2"), np.array(tokens, np.int32)
    ended = len(tokens) and tokens[-1] in tokenizer.eos_ids
    decoded = tokenizer.decode(tokens[: len(tokens) - int(ended)].tolist())
    sampled = np.ones(len(tokens), bool) if sampled is None else np.array(sampled, bool)
    prompt = np.array(format.prompt(task), np.int32)
    return Rollout(task, 0, 0, prompt, tokens, np.zeros(len(tokens)), sampled, "eos", decoded, None)


def tokens_of(tokenizer, said):
    return tokenizer.encode(said, special=False, continues=True)


CHAT = Path(__file__).parent / "golden" / "chat"
STRIPS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|start|>user\n{{ m.content }}<|end|>\n{% else %}<|start|>assistant\n"
    "{{ m.content.strip() }}<|end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def plain_format():
    tokenizer = text.characters("0123456789+:=; A\n")
    return text.plain(tokenizer), tokenizer


@pytest.mark.parametrize("said", ["1+1=2;A2", " 1+1=2; A2 ", "\n2\n", "2", ""])
def test_a_demonstration_has_the_tokens_that_were_written(said):
    format, tokenizer = plain_format()
    rollout = rollout_of(format, tokenizer, [*tokens_of(tokenizer, said), tokenizer.eos_ids[0]])
    assert written_as(rollout, format, completer_of(tokenizer)) == {"written": "exact", "forced": []}


@pytest.mark.parametrize(
    ("template", "said", "written"),
    [
        (None, "1 + 1 = 2.\n#### 2", "exact"),
        (None, " the answer is 2 \n", "exact"),
        (STRIPS, "1 + 1 = 2.", "exact"),
        (STRIPS, "1 + 1 = 2. \n", "lost"),  # the template would show another text
    ],
)
def test_a_chat_template_shows_what_was_written_or_it_is_lost(template, said, written):
    tokenizer = text.load(CHAT)
    format = text.chat(tokenizer, text.load_template(CHAT) if template is None else template)
    rollout = rollout_of(format, tokenizer, [*tokens_of(tokenizer, said), tokenizer.eos_ids[0]])
    assert written_as(rollout, format, completer_of(tokenizer))["written"] == written


def test_other_tokens_of_the_same_text_are_told():
    """A model may write a word in other tokens than a tokenizer does."""
    tokenizer = text.load(CHAT)
    format = text.chat(tokenizer, text.load_template(CHAT))
    tokens = [i for char in "3 plus 4" for i in tokens_of(tokenizer, char)]
    assert tokens != tokens_of(tokenizer, "3 plus 4")
    rollout = rollout_of(format, tokenizer, [*tokens, tokenizer.eos_ids[0]])
    assert written_as(rollout, format, completer_of(tokenizer))["written"] == "text"


@pytest.mark.parametrize("special", [0, 1])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_special_tokens_in_a_text_crash_nothing(special, at):
    """A model of characters samples padding and the beginning of a sequence at times."""
    format, tokenizer = plain_format()
    tokens = tokens_of(tokenizer, "A2")
    rollout = rollout_of(format, tokenizer, [*tokens[:at], special, *tokens[at:], tokenizer.eos_ids[0]])
    assert written_as(rollout, format, completer_of(tokenizer))["written"] in ("lost", "text")


def test_texts_that_were_forced_are_marked():
    format, tokenizer = plain_format()
    tokens = [*tokens_of(tokenizer, "1+1=2;A2"), tokenizer.eos_ids[0]]
    rollout = rollout_of(format, tokenizer, tokens, [1, 1, 1, 1, 0, 0, 1, 1, 1])
    assert written_as(rollout, format, completer_of(tokenizer)) == {"written": "exact", "forced": [[4, 6]]}
    shown = Task("1+1:", "2", rollout.text, data={"forced": ((4, 6),)})
    assert format.demonstration(shown)[1][len(rollout.prompt) :] == rollout.sampled.tolist()


def record(problem, attempt, said, correct=True, stop="eos", written="exact"):
    return {"problem": problem, "attempt": attempt, "text": said, "correct": correct, "stop": stop, "written": written}


def test_what_is_kept():
    records = [
        record(0, 0, "x", correct=False),
        record(0, 1, "y"),
        record(0, 2, "y"),
        record(0, 3, "z"),
        record(1, 0, "x", stop="limit"),
        record(1, 1, "y", written="lost"),
        record(1, 2, ""),
        record(1, 3, "w", written="text", stop="stop"),
        record(2, 0, "x", correct=False),
    ]
    assert [(r["problem"], r["text"]) for r in keep(records, 1)] == [(0, "y"), (1, "w")]
    assert [(r["problem"], r["text"]) for r in keep(records, 9)] == [(0, "y"), (0, "z"), (1, "w")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, r"--temperature got -1.0; allowed: "),
        ({"task": "{'name': 3}"}, r"--task got .* allowed: \{'name': ...\} or a name: chain"),
        ({"task": "{"}, r"--task got '\{'; allowed: "),
        ({"task": "chian"}, r"unknown task 'chian' \(did you mean 'chain'\?\)"),
        ({"task": "{'name': 'chain', 'split': 'test'}"}, r"--task got the split 'test', which suites are made of"),
        ({"task": "{'name': 'chain', 'opps': 3}"}, r"unknown field of task 'chain' 'opps'"),
        ({"checkpoint": "/nowhere/at/all"}, r"nowhere"),
        ({"verifier": "exactt"}, r"unknown verifier 'exactt' \(did you mean 'exact'\?\)"),
    ],
)
def test_an_impossible_command_is_refused_in_one_line(trained, tmp_path, changes, message):
    asked = Asked(str(trained), str(tmp_path / "out"), n=4)._replace(**changes)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        generate(asked, lambda line: None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "tasks.jsonl").exists()


def test_a_folder_of_something_else_is_refused(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds something else; choose another --out"):
        generate(Asked(str(trained), str(tmp_path), n=4), lambda line: None)
    with pytest.raises(ValueError, match=r"which is a file; allowed: a folder"):
        generate(Asked(str(trained), str(tmp_path / "notes.txt"), n=4), lambda line: None)


def test_a_pretrained_model_needs_a_task():
    with pytest.raises(ValueError, match=r"no --task given"):
        task_section(None, {})


def test_a_folder_without_a_data_set_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make it with python -m jaxreason.generate"):
        tasks.load("generated", path=str(tmp_path))
    (tmp_path / "tasks.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"has no tasks: no attempt was kept"):
        tasks.load("generated", path=str(tmp_path))
    (tmp_path / "tasks.jsonl").write_text('{"question": "1+1"}\n')
    with pytest.raises(ValueError, match=r"tasks.jsonl:1: field 'answer' got None; allowed: text; make the data set anew"):
        tasks.load("generated", path=str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("data", value) for value in (None, [1], "x")),
        *(("forced", value) for value in ([1, 2], "ab", {"a": 1}, [[0, 99]], [[-1, 1]], [[0, 1, 1]], [["a", "b"]], [[1, 0]])),
    ],
)
def test_a_field_of_another_form_is_named(tmp_path, field, value):
    row = {"question": "1+1", "answer": "2", "solution": "2", "data": {}, "forced": [[0, 1]]}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {field: value}) + "\n")
    with pytest.raises(ValueError, match=rf"tasks.jsonl:2: field '{field}' got .*; allowed: .*; make the data set anew"):
        tasks.load("generated", path=str(tmp_path))
