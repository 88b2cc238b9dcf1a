"""Held-out questions are not trained on: splits by default, and common questions are
counted and refused.
"""

import json

import pytest
from runs import load_config

from jaxreason import build as build_module
from jaxreason import tasks
from jaxreason.build import build, settle, start
from jaxreason.build import run as run_module
from jaxreason.runtime import workdir


def write(path, questions):
    path.write_text("".join(json.dumps({"question": q, "answer": str(i)}) + "\n" for i, q in enumerate(questions)))
    return str(path)


QUESTIONS = [f"{a}+{b}:" for a in range(10) for b in range(20)]


def built(source, suite, init_from=None, **evaluate):
    """Build tiny with this task and this suite; return the printed lines about tasks
    and overlap.
    """
    config = load_config("tiny", "smoke")
    said = []
    with config.unlocked():
        config.phases, config.rl.source.task, config.rl.source.problems = ("rl",), source, 8
        config.evaluate = {"suites": {"held": suite}, "n": 1000, **evaluate}
        config.init_from = init_from
    build(config, say=said.append)
    return [line for line in said if "of task" in line or "common" in line or "warning" in line]


def count(lines, what):
    return int(next(line for line in lines if line.startswith(what)).split(": ")[1].split(" ")[0].replace(",", ""))


def test_a_source_and_a_suite_of_one_file_share_no_question(tmp_path):
    path = write(tmp_path / "all.jsonl", QUESTIONS)
    said = built({"name": "jsonl", "path": path}, {"name": "jsonl", "path": path})
    assert count(said, "source") + count(said, "suite") == len(QUESTIONS)
    assert count(said, "suite") == len(tasks.load("jsonl", path=path, split="test"))
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    assert count(built({"name": "jsonl", "path": path}, {"name": "jsonl", "path": str(link)}), "suite") == count(said, "suite")


def test_a_file_of_a_suite_alone_is_whole(tmp_path):
    train, test = write(tmp_path / "train.jsonl", QUESTIONS[:100]), write(tmp_path / "test.jsonl", QUESTIONS[100:])
    said = built({"name": "jsonl", "path": train}, {"name": "jsonl", "path": test})
    assert (count(said, "source"), count(said, "suite")) == (100, 100)
    assert count(built({"name": "jsonl", "path": train}, {"name": "jsonl", "path": test, "split": "test"}), "suite") < 50


def test_questions_in_common_are_counted_and_refused(tmp_path):
    train = write(tmp_path / "train.jsonl", [q.replace("+", " +  ") for q in QUESTIONS[:100]])
    test = write(tmp_path / "test.jsonl", [q.replace("+", " + ") for q in QUESTIONS[90:]])
    sections = {"name": "jsonl", "path": train}, {"name": "jsonl", "path": test}
    with pytest.raises(ValueError, match=r"suite 'held' holds 10 of its 110 .*source task 'jsonl'.*allow_overlap=True"):
        built(*sections)
    assert any("warning: suite 'held' holds 10" in line for line in built(*sections, allow_overlap=True))
    path = write(tmp_path / "all.jsonl", QUESTIONS)
    with pytest.raises(ValueError, match="of its 200 "):
        built({"name": "jsonl", "path": path}, {"name": "jsonl", "path": path, "split": None})


def test_spellings_of_one_question_are_in_one_split(tmp_path):
    """Otherwise they would be refused as common, though one file serves both; a
    question without another spelling keeps its split.
    """
    apart = [f"What is {i} + 1?" for i in range(100)]
    twins = [f"what  is {i} + 1?" for i in range(50)]
    path = write(tmp_path / "all.jsonl", apart + twins)
    train, test = (tasks.load("jsonl", path=path, split=split) for split in ("train", "test"))
    assert (len(train) + len(test), tasks.overlap(train, test)) == (150, 0)
    assert [t.question for t in test if t.question in apart] == [q for q in apart if tasks.splits.split_of(q, 0.1) == "test"]
    (tmp_path / "all.txt").write_text("\n\n".join(apart + twins))
    train, test = (tasks.load("corpus", path=str(tmp_path / "all.txt"), split=split) for split in ("train", "test"))
    assert (len(train) + len(test), tasks.overlap(train, test)) == (150, 0)


def test_a_suite_made_by_rule_that_is_trained_on_is_refused():
    chain = {"name": "chain", "ops": 1, "size": 64}
    with pytest.raises(ValueError, match=r"suite 'held' holds \d+ of its 8 questions"):
        built(chain, chain | {"split": "train", "size": 8}, final_n=8)
    assert built(chain, {"name": "chain", "ops": 1, "size": 8})[1].startswith("suite 'held': 8 ")


def test_texts_of_a_file_that_nothing_reads_are_whole(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"first {i:04}" for i in range(200)))
    (tmp_path / "b.txt").write_text("\n\n".join(f"other {i:04}" for i in range(200)))

    def texts(path):
        config = load_config("pretrain", f"path={tmp_path / 'a.txt'},smoke")
        said = []
        config.evaluate.texts.held_out.task.path, config.evaluate.texts.held_out.length = str(path), 16
        build(config, say=said.append)
        return said

    assert count(texts(tmp_path / "b.txt"), "text") == 200
    assert count(texts(tmp_path / "a.txt"), "text") < 50
    (tmp_path / "b.txt").write_text("\n\n".join(f"first {i:04}" for i in range(150, 350)))
    with pytest.raises(ValueError, match="questions or texts in common"):
        texts(tmp_path / "b.txt")


def test_corpora_cut_differently_are_compared_by_paragraph(tmp_path):
    texts = [f"{word} and what comes after it, at some length" for word in ("one", "two", "three", "four")]
    (tmp_path / "all.txt").write_text("\n\n".join(texts))
    (tmp_path / "most.txt").write_text("\n\n".join([*texts[:3], "a line of its own that is not too long"]))
    (tmp_path / "some.txt").write_text("\n\n".join([texts[0], *(f"other {i} at this length as well" for i in range(4))]))
    whole, paragraphs, most, some = (
        tasks.load("corpus", path=str(tmp_path / name), by=by, split=None)
        for name, by in (("all.txt", "file"), ("all.txt", "paragraph"), ("most.txt", "file"), ("some.txt", "file"))
    )
    assert tasks.overlap(whole, paragraphs) == 4
    assert tasks.overlap(paragraphs, whole) == 1
    assert tasks.overlap(paragraphs, most) == 1
    assert tasks.overlap(paragraphs, some) == 0


def settled(source, suites):
    config = load_config("tiny", "smoke")
    with config.unlocked():
        config.phases, config.rl.source.task, config.evaluate = ("rl",), source, {"suites": suites, "n": 4}
    return settle(build_module.complete(config.to_dict()))


def test_splits_are_written_into_the_config(tmp_path):
    path, other = write(tmp_path / "all.jsonl", QUESTIONS[:100]), write(tmp_path / "other.jsonl", QUESTIONS[100:])
    both = settled({"name": "jsonl", "path": path}, {"a": {"name": "jsonl", "path": path}, "b": {"name": "jsonl", "path": other}})
    assert both["rl"]["source"]["task"]["split"] == "train"
    assert [suite["split"] for suite in both["evaluate"]["suites"].values()] == ["test", None]
    assert settle(both) == both
    alone = settled({"name": "jsonl", "path": path}, {"b": {"name": "jsonl", "path": other}})
    assert alone["rl"]["source"]["task"]["split"] is None


def test_another_suite_on_resume_does_not_change_what_is_trained_on(tmp_path):
    """Adding or removing the suite that shares the source's file would change the
    source, and is refused as such.
    """
    path = write(tmp_path / "all.jsonl", QUESTIONS)
    source, suite = {"name": "jsonl", "path": path}, {"name": "jsonl", "path": path}
    run = tmp_path / "run"
    (run / "checkpoints" / "4").mkdir(parents=True)
    for before, after in (({"a": suite}, {}), ({}, {"a": suite})):
        (run / "config.json").write_text(json.dumps(settled(source, before), default=list))
        with pytest.raises(
            ValueError,
            match=r"config \(rl\.source\.task\.split: .*or set --config\.rl\.source\.task\.split",
        ):
            check(run, settled(source, after))
        check(run, settled(source, before))


def check(run, config):
    how = {"resume": "auto", "accept_config_change": False, "say": [].append, "read": build_module.from_earlier}
    workdir.check(run, json.dumps(config, default=list), **how)


def test_a_run_of_an_earlier_version_keeps_its_splits(tmp_path):
    """In that version a source trained on the whole of a file, and a suite held its
    test part.
    """
    path = write(tmp_path / "all.jsonl", QUESTIONS)
    source, suite = {"name": "jsonl", "path": path}, {"name": "jsonl", "path": path}
    now = settled(source, {"a": suite})
    before = json.loads(json.dumps(now | {"version": 0}))
    del before["rl"]["source"]["task"]["split"], before["evaluate"]["suites"]["a"]["split"]
    there, _ = build_module.from_earlier(before)
    assert there["rl"]["source"]["task"]["split"] is None
    assert there["evaluate"]["suites"]["a"]["split"] == "test"
    run = tmp_path / "run"
    (run / "checkpoints" / "4").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"rl\.source\.task\.split: None there, train here"):
        check(run, now)


def test_families_with_splits_of_their_own_keep_them(monkeypatch):
    """This includes data sets of the hub, of which a part may be held out."""
    assert {name for name in tasks.TASKS if tasks.splits_files({"name": name})} == {"jsonl", "corpus", "programs"}
    asked = []

    def ours(split: str = "train", held_out: float = 0.1):
        asked.append(split)
        return [tasks.Task("1+1:" if split == "train" else "2+2:", "1")] * 8

    monkeypatch.setitem(tasks.TASKS, "chain", ours)
    built({"name": "chain"}, {"name": "chain"})
    assert asked == ["train", "test"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": "", "answer": "1"}', "field 'question' is empty"),
        ('{"question": "  ", "answer": "1"}', "field 'question' is empty"),
        ('{"question": "q", "answer": ""}', "field 'answer' is empty"),
        ('{"question": "q", "answer": true}', "field 'answer' got True; allowed: text or a finite number"),
        ('{"question": "q", "answer": null}', "got None"),
        ('{"question": ["q"], "answer": "1"}', "allowed: text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "q", "answer": "1"}\n' + row + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: ") as error:
        tasks.load("jsonl", path=str(path))
    assert message in str(error.value)


def test_a_file_of_several_names_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    paths = [str(tmp_path / "a.txt"), f"{tmp_path}/./a.txt", str(tmp_path / "link.txt")]
    assert len(tasks.load("corpus", path=paths)) == 3


def test_a_question_inside_a_text_that_is_trained_on_counts():
    texts = ["A book. What is 17 apples and 25 apples?  42. The end.", "Another text."]
    asked = [
        tasks.Task("what is 17 apples and  25 apples?", "42"),
        tasks.Task("What is 9 pears less 4?", "5"),
        tasks.Task("A", "a"),
    ]
    assert tasks.overlap(texts, asked) == 1


def test_two_question_fields_of_one_file_are_refused(tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps({"question": q, "again": f"?{q}", "answer": "1"}) + "\n" for q in QUESTIONS))
    source, suite = ({"name": "jsonl", "path": str(path), "question": field} for field in ("question", "again"))
    with pytest.raises(ValueError, match=r"reads the field 'question' of .* as its question and a suite 'again'"):
        built(source, suite)
    built(source, suite, allow_overlap=True)
    built(source, suite | {"question": "question"})


def test_suites_are_compared_with_the_tasks_of_earlier_runs(tmp_path, monkeypatch):
    """Across two earlier runs, and one whose file is gone."""
    first, second = write(tmp_path / "first.jsonl", QUESTIONS[:100]), write(tmp_path / "second.jsonl", QUESTIONS[100:150])
    suite = {"name": "jsonl", "path": write(tmp_path / "held.jsonl", QUESTIONS[95:120])}
    rest = {"name": "jsonl", "path": write(tmp_path / "rest.jsonl", QUESTIONS[150:])}
    monkeypatch.chdir(tmp_path)

    def run(name, path, init_from=None):
        config = load_config("tiny", "smoke")
        config.phases, config.evaluate = ("rl",), {"suites": {}}
        with config.unlocked():
            config.rl.source.task, config.init_from = {"name": "jsonl", "path": path}, init_from
        (tmp_path / name / "checkpoints" / "2").mkdir(parents=True)
        start.write_config(tmp_path / name / "config.json", config, revisions={})

    run("a", first)
    run("b", second, init_from="a")
    monkeypatch.setattr(run_module, "start_from", lambda *_: None)
    monkeypatch.setattr(run_module.warm_start, "saved_steps", lambda _: [2])
    with pytest.raises(ValueError, match=r"holds 20 of its 25 .* in common with the task 'jsonl' of .*/b"):
        built(rest, suite, init_from="b")
    said = built(rest, suite, init_from="b", allow_overlap=True)
    assert [int(line.split(" holds ")[1].split()[0]) for line in said if " holds " in line] == [20, 5]
    (tmp_path / "first.jsonl").unlink()
    said = built(rest, suite, init_from="b", allow_overlap=True)
    assert any("warning: the training data of a can't be read" in line for line in said)
