"""Passages that a suite shares with training data: as by brute force, reported where
tasks are loaded, without false alarms on problems made by rule or by a template.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from gsm8k_folder import write_gsm8k

from jaxreason import tasks
from jaxreason.build.tasks import load_held_out
from jaxreason.tasks import contamination
from jaxreason.types import Task

STORY = "On Monday Ann picked {} red apples and sold {} of them at the market to an old friend, how many did she keep?"


def by_hand(trained, held_out, n):
    """Return the indices of questions with n words in a row that training data has."""
    texts = [t for item in trained for t in ((item,) if isinstance(item, str) else (item.question, item.solution))]
    known = {tuple(w[i : i + n]) for w in map(contamination.words_of, texts) for i in range(len(w) - n + 1)}
    asked = [contamination.words_of(task.question) for task in held_out]
    return [j for j, w in enumerate(asked) if any(tuple(w[i : i + n]) in known for i in range(len(w) - n + 1))]


def soup(rng, length):
    return " ".join(rng.choice(["ab", "c", "def", "g1"], length))


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_those_of_brute_force(seed):
    """Of few words, so that passages are shared by chance; pieces of texts too."""
    rng = np.random.default_rng(seed)
    trained = [Task(soup(rng, 12), "", soup(rng, 300)) for _ in range(400)] + [soup(rng, 20_000) for _ in range(3)]
    held_out = [Task(soup(rng, 9 + i % 2), "1") for i in range(200)]
    found, expected = contamination.shared(trained, held_out), by_hand(trained, held_out, 9)
    assert found.words == 9
    assert 10 < len(expected) < 190
    assert (found.count, found.question, found.compared) == (len(expected), expected[0], 200)
    assert found.example in " ".join(contamination.words_of(held_out[expected[0]].question))


def test_an_edited_question_is_found_where_no_question_is_equal():
    trained = ["A page of a book. " + STORY.format(7, 2), Task("Where is the cat of my aunt?", "here")]
    asked = [Task(STORY.format(7, 2).replace("how many did she keep", "what was left").upper(), "5"), Task("1 + 1?", "2")]
    asked += [Task(soup(np.random.default_rng(i), 30), "1") for i in range(3)]
    assert tasks.overlap(trained, asked) == 0
    found = contamination.shared(trained, asked)
    assert (found.count, found.compared, found.questions) == (1, 4, 5)
    assert "picked 7 red apples" in found.example or "on monday ann" in found.example
    line = contamination.told(found, "suite 'held'", "the source task 'x'")
    assert line.startswith(
        "warning: suite 'held': 1 of its 5 questions (4 could be compared) share 8 words in a row with the source"
    )
    assert "(20.0%), for example 'on monday ann picked 7 red apples and'" in line


def test_a_solution_that_is_trained_on_counts():
    trained = [Task("What is it?", "5", "Think. " + STORY.format(7, 2) + " 5")]
    assert contamination.shared(trained, [Task(STORY.format(7, 2), "5")]).count == 1


def test_the_words_in_a_passage_follow_the_lengths_of_the_questions():
    for length, n in ((4, 8), (10, 10), (40, 13)):
        asked = [Task(" ".join(f"w{i}x{j}" for j in range(length)), "1") for i in range(5)]
        found = contamination.shared(["nothing"], asked)
        assert (found.words, found.compared, found.count) == (n, 5 * (length >= 8), 0)


def test_a_template_and_lists_of_numbers_are_no_passages():
    rng = np.random.default_rng(0)
    words = "Solve the problem below and give the result as one whole number in the last line of your reply"
    trained, held_out = ([Task(f"{words}: {soup(rng, 12)} {side} {i}", "1") for i in range(50)] for side in ("train", "test"))
    assert len(by_hand(trained, held_out, 13)) == 50
    assert contamination.shared(trained, held_out).count == 0
    held_out[3] = trained[7]  # the same template around the same problem
    assert contamination.shared(trained, held_out).count == 1
    sums = [Task("+".join(map(str, rng.integers(0, 2, 30))), "1") for _ in range(100)]
    assert len(by_hand(sums[:50], sums[50:], 13)) > 5
    assert contamination.shared(sums[:50], sums[50:]).compared == 0


def test_a_long_text_is_read_in_pieces(monkeypatch):
    monkeypatch.setattr(contamination, "AT_ONCE", 500)
    rng = np.random.default_rng(0)
    question = Task(STORY.format(7, 2), "5")
    for before in range(380, 520, 7):
        text = soup(rng, 1000)
        text = f"{text[:before]} {question.question} {text[before:]}"
        assert contamination.shared(["short", text], [question]).count == 1
    batches = [batch for _, batch in contamination.pieces([soup(rng, 5000)])]
    assert max(sum(map(len, batch)) for batch in batches) <= 500 + contamination.OVERLAP
    monkeypatch.setattr(contamination, "MOST_READ", 3000)
    found = contamination.shared([text] * 9, [question])
    assert found.read < found.items == 9
    assert f"of which {found.read} of 9 items were read" in contamination.told(found, "suite", "source")


def test_what_is_made_by_rule_is_not_compared():
    chain, words = tasks.load("chain", size=9, ops=20), [Task(STORY.format(7, 2), "5")]
    assert not contamination.compares(chain, words)
    assert not contamination.compares(words, tasks.load("chain", size=9, split="test"))
    assert not contamination.compares(words, ["a text"])
    assert not contamination.compares([], words)
    assert contamination.compares(["a text"], words)


def load(trained, section):
    said = []
    parts = SimpleNamespace(seed=0, say=said.append, loaded=[("the source task 'gsm8k'", trained)])
    load_held_out(section, parts, "suite 'held'", False)
    return said[1:]


def test_it_is_said_when_tasks_are_loaded(tmp_path, monkeypatch):
    rows = {
        "train": [(STORY.format(i + 5, 2), f"It is {i + 3}.\n#### {i + 3}") for i in range(20)],
        "test": [(STORY.format(7, 2).replace("keep", "have"), "#### 5"), ("A train of nine cars left Rome at dawn?", "#### 9")],
    }
    monkeypatch.setenv("TFDS_DATA_DIR", str(write_gsm8k(tmp_path, rows)))
    trained = tasks.load("gsm8k")
    (line,) = load(trained, {"name": "gsm8k"})
    assert line.startswith(
        "warning: suite 'held': 1 of its 2 questions share 9 words in a row with the source task 'gsm8k' (50.0%)"
    )
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"question": "Nothing of this was ever seen in any of those other stories.", "answer": 1}))
    (line,) = load(trained, {"name": "jsonl", "path": str(path), "split": None})
    assert line == "suite 'held': 0 of its 1 questions share 12 words in a row with the source task 'gsm8k'"
    path.write_text(json.dumps({"question": "7 * 6 = ?", "answer": 42}))
    assert load(trained, {"name": "jsonl", "path": str(path), "split": None}) == []
