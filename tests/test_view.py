"""The page of rollouts: its data are those of the folder, its size has a limit, hostile
texts are texts; and, with a browser, what a reader does with it.
"""

import json
import re
import subprocess
import sys

import pytest
from runs import ROOT, load_config, open_browser, read_lines, run_config

from jaxreason import text
from jaxreason.look.view import choose, make_view, read_rollouts

HOSTILE = '<script>window.bad = 1</script><img src=x onerror="window.bad = 1"> \x1b[31mred \u202egnp.exe \u2066 </script>'
LARGE = 10**9


def rollout(step, problem, attempt=0, correct=False, suite=None, **more):
    record = {
        "step": step,
        "phase": "rl",
        "problem": problem,
        "attempt": attempt,
        "question": f"question {problem}",
        "prompt": f"<bos>question {problem}",
        "text": f"text of {problem}.{attempt} at {step}",
        "answer": "7",
        "reward": float(correct),
        "correct": correct,
        "parsed": "7" if correct else None,
        "reason": "right" if correct else "no answer",
        "stop": "eos",
        "logp_sum": -1.5,
        "length": 10 + problem,
        "temperature": 1.0,
    }
    return record | ({} if suite is None else {"suite": suite}) | more


def write(folder, records, end=""):
    folder.mkdir(exist_ok=True)
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + end)
    return folder


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def test_the_page_has_the_rollouts_of_the_folder(tmp_path):
    records = [rollout(step, problem, attempt, attempt == 1) for step in (1, 2) for problem in range(3) for attempt in range(2)]
    html, notes = make_view(write(tmp_path / "run", records), LARGE)
    data = data_of(html)
    assert notes == []
    assert len(data["rows"]) == len(records)
    for row, record in zip(data["rows"], records, strict=True):
        found = dict(zip(data["numbers"], row))
        texts = dict(zip(data["texts"], row[len(data["numbers"]) :]))
        assert all(found[name] == record.get(name) for name in data["numbers"])
        assert all((None if i is None else data["strings"][i]) == record.get(name) for name, i in texts.items())
        assert row[-2] == record["correct"]
        assert row[-1] is None


def test_bad_lines_are_left_out_and_said(tmp_path):
    folder = write(tmp_path / "run", [rollout(1, 0)], end='not json\n[1]\n{"step": 1}\n{"step": 2, "prob')
    read = read_rollouts(folder)
    assert len(read.records) == 1
    assert read.notes[0] == "3 lines of rollouts.jsonl are no rollouts and are left out"
    assert "half-written" in read.notes[1]


def test_a_folder_without_rollouts_is_one_line(tmp_path):
    for folder, said in ((tmp_path / "none", "is no folder"), (tmp_path, "has no rollouts.jsonl")):
        got = subprocess.run([sys.executable, "-m", "jaxreason.view", str(folder)], cwd=ROOT, capture_output=True, text=True)
        assert got.returncode == 1
        assert said in got.stderr
        assert len(got.stderr.splitlines()) == 1
    (tmp_path / "rollouts.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no rollouts"):
        make_view(tmp_path, LARGE)


@pytest.mark.parametrize("most", [300_000, 60_000, 20_000, 3_000])
def test_a_large_file_is_cut_in_whole_groups_and_says_so(most):
    records = [rollout(step, problem, attempt) for step in range(1, 41) for problem in range(10) for attempt in range(4)]
    records += [rollout(step, problem, suite="chain") for step in (0, 20, 40) for problem in range(10)]
    kept, said = choose(records, most)
    assert sum(len(json.dumps(r)) for r in kept) <= max(most, 1600)
    counts: dict = {}
    for r in kept:
        key = (r["step"], r["problem"], r.get("suite"))
        counts[key] = counts.get(key, 0) + 1
    assert all(count == (1 if suite else 4) for (_, _, suite), count in counts.items())
    assert f"{len(records) - len(kept):,} of {len(records):,} rollouts are left out" in said
    assert max(r["step"] for r in kept) == 40
    if most >= 20_000:
        assert {r["step"] for r in kept if r.get("suite")} >= {0, 40}
    assert choose(records, LARGE) == (records, "")


def test_a_small_page_has_problems_of_the_last_step_and_of_both_evaluations():
    records = [rollout(0, problem, suite="chain") for problem in range(100)]
    records += [rollout(step, problem, attempt) for step in range(1, 11) for problem in range(100) for attempt in range(4)]
    records += [rollout(10, problem, suite="chain") for problem in range(100)]
    kept, _ = choose(records, 12_000)
    assert {(r["step"], r.get("suite")) for r in kept} == {(0, "chain"), (10, None), (10, "chain")}
    assert [records.index(r) for r in kept] == sorted(records.index(r) for r in kept)


def test_the_size_counts_what_the_page_escapes(tmp_path):
    records = [rollout(step, 0, text="<" * 5000) for step in range(20)]
    html, notes = make_view(write(tmp_path / "run", records), 200_000)
    assert len(re.search(r'id="data">(.*?)</script>', html, re.S)[1]) < 200_000
    assert "left out" in notes[0]


def test_lists_and_whole_last_lines_are_read(tmp_path):
    deep = json.dumps(rollout(1, 0))[:-1] + ', "more": ' + "[" * 900 + "]" * 900 + "}\n"
    odd = rollout(1, 1, answer={"a": [1]}, pieces=[["a"]], logp=[0.0], author="m")
    folder = write(tmp_path / "run", [odd], end=deep + json.dumps(rollout(2, 0)))
    html, notes = make_view(folder, LARGE)
    assert notes == []
    assert [row[0] for row in data_of(html)["rows"]] == [1, 1, 2]
    assert data_of(html)["rows"][0][-1] is None


def test_a_size_that_is_no_number_is_one_line(tmp_path):
    write(tmp_path, [rollout(1, 0)])
    command = [sys.executable, "-m", "jaxreason.view", str(tmp_path), "--max_mb=inf"]
    got = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert got.stderr == "error: --max_mb got inf; allowed: a finite number of at least 0.001\n"


def test_hostile_texts_are_data(tmp_path):
    html, _ = make_view(write(tmp_path / "<b>run", [rollout(1, 0, question=HOSTILE, text=HOSTILE, reason=HOSTILE)]), LARGE)
    assert html.count("<script") == 2
    assert "<b>" not in html
    assert HOSTILE in data_of(html)["strings"]
    assert not re.search(r"(src|href)\s*=\s*[\"']?http|url\(|@import|innerHTML|insertAdjacentHTML|eval\(", html)


def test_a_run_can_write_its_tokens(tmp_path):
    config = load_config("tiny", "smoke", **{"phases": ("rl",), "rl.steps": 1})
    with config.unlocked():
        config.log.rollout_tokens = True
    run_config(config, tmp_path)
    records = read_lines(tmp_path / "rollouts.jsonl")
    assert any("suite" in r for r in records)
    assert any("suite" not in r for r in records)
    for r in records:
        assert len(r["pieces"]) == len(r["logp"]) == len(r["author"]) == r["length"]
        assert "".join(r["pieces"]).removesuffix("<eos>") == r["text"]
        assert sum(r["logp"]) == pytest.approx(r["logp_sum"], abs=0.001 * r["length"])
    assert all(row[-1] is not None for row in data_of(make_view(tmp_path, LARGE)[0])["rows"])


def test_pieces_join_to_the_text_where_tokens_are_bytes():
    tokenizer = text.make("byte_level")
    ids = tokenizer.encode("aé€😀b")
    pieces = text.pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == "aé€😀b"
    assert pieces[:3] == ["a", "é", ""]
    assert text.pieces(tokenizer, [*ids[3:5], *ids[:1]])[-1] == "a"  # a character that is cut off


# --- in a browser ---


@pytest.fixture(scope="module")
def driver():
    made = open_browser()
    yield made
    made.quit()


def opened(driver, tmp_path, records, fragment=""):
    path = tmp_path / "view.html"
    path.write_text(make_view(write(tmp_path / "run", records), LARGE)[0], encoding="utf-8")
    driver.get("about:blank")
    driver.get(f"file://{path}{fragment}")
    return driver


def count(driver):
    return driver.find_element("id", "count").text


def set_field(driver, name, value):
    driver.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input', {bubbles: true})); clearTimeout(waiting); $('list').scrollTop = 0; redraw();",
        name,
        value,
    )  # without the time that the page waits for further keys


RECORDS = [
    rollout(step, problem, attempt, (problem + attempt) % 3 == 0)
    for step in (1, 2)
    for problem in range(8)
    for attempt in range(2)
]
RECORDS += [
    rollout(step, problem, correct=problem < 2 + step, suite="chain", temperature=0.0) for step in (0, 2) for problem in range(8)
]


@pytest.mark.slow
def test_filters_keys_and_deep_links(driver, tmp_path):
    opened(driver, tmp_path, RECORDS)
    assert count(driver) == "48 of 48 rollouts"
    set_field(driver, "suite", "chain, greedy")
    assert count(driver) == "16 of 48 rollouts"
    set_field(driver, "verdict", "right")
    assert count(driver) == "6 of 48 rollouts"
    set_field(driver, "search", "TEXT OF 3.0")
    assert count(driver) == "1 of 48 rollouts"
    driver.find_element("tag name", "body").send_keys("j")
    assert "problem 3" in driver.find_element("id", "detail").text
    assert len(driver.find_elements("css selector", '.row[aria-selected="true"]')) == 1
    link = driver.current_url
    opened(driver, tmp_path, RECORDS, "#" + link.partition("#")[2])
    assert count(driver) == "1 of 48 rollouts"
    assert "problem 3" in driver.find_element("id", "detail").text
    shown = driver.find_element("css selector", ".attempt.selected").text
    opened(driver, tmp_path, RECORDS[4:], "#" + link.partition("#")[2])  # a page with fewer rollouts of the run
    assert driver.find_element("css selector", ".attempt.selected").text == shown
    opened(driver, tmp_path, RECORDS, "#" + link.partition("#")[2])
    driver.find_element("id", "clear").click()
    assert count(driver) == "48 of 48 rollouts"
    body = driver.find_element("tag name", "body")
    body.send_keys("f")
    assert "following one problem" in count(driver)
    assert count(driver).startswith("2 of 48")  # in two evaluations; a training problem with this question is another
    body.send_keys("?")
    assert driver.find_element("id", "help").is_displayed()
    body.send_keys("/")
    assert driver.switch_to.active_element.get_attribute("id") == "search"
    opened(driver, tmp_path, RECORDS, "#selected=999999&follow=x&colour=evil&view=%3Cscript%3E")
    assert count(driver) == "48 of 48 rollouts"
    opened(driver, tmp_path, RECORDS, "#view=changes&changed=evil&series=evil&before=77&after=x&change=evil&suite=evil&sort=evil")
    assert "2 learned, 0 lost" in count(driver)
    assert all(driver.execute_script("return [...document.querySelectorAll('select')].map(s => s.selectedIndex >= 0)"))
    assert [line for line in driver.get_log("browser") if line["level"] == "SEVERE"] == []


@pytest.mark.slow
def test_the_keyboard_alone_is_enough(driver, tmp_path):
    opened(driver, tmp_path, RECORDS)
    driver.find_element("tag name", "body").send_keys("j")
    row = driver.find_element("id", driver.find_element("id", "list").get_attribute("aria-activedescendant"))
    assert row.get_attribute("aria-selected") == "true"
    assert row.get_attribute("aria-setsize") == "48"
    driver.find_element("id", "colour").send_keys("l")
    assert driver.switch_to.active_element.get_attribute("id") == "colour"  # though the panel was drawn again
    driver.find_element("id", "follow").send_keys("\n")
    assert driver.switch_to.active_element.get_attribute("id") == "follow"


@pytest.mark.slow
def test_learned_and_lost(driver, tmp_path):
    opened(driver, tmp_path, RECORDS)
    driver.find_element("id", "tab-changes").click()
    assert "8 problems in both" in count(driver)
    assert "2 learned, 0 lost" in count(driver)
    set_field(driver, "change", "learned")
    driver.find_element("tag name", "body").send_keys("j")
    shown = driver.find_element("id", "detail").text
    assert "Before, at step 0" in shown
    assert "problem 2" in shown


@pytest.mark.slow
def test_tokens_are_coloured_and_hostile_texts_are_texts(driver, tmp_path):
    tokens = {"pieces": [HOSTILE, "b", "c"], "logp": [-0.1, -3.0, 0.0], "author": "mmf"}
    opened(
        driver, tmp_path, [rollout(1, 0, question=HOSTILE, text=HOSTILE, parsed=HOSTILE, stop=HOSTILE, phase=HOSTILE, **tokens)]
    )
    body = driver.find_element("tag name", "body")
    body.send_keys("j")
    body.send_keys("c")
    colours = [e.value_of_css_property("background-color") for e in driver.find_elements("css selector", ".attempt pre span")]
    assert len(set(colours)) == 3
    for _ in range(3):
        body.send_keys("c")
    by_author = [e.value_of_css_property("background-color") for e in driver.find_elements("css selector", ".attempt pre span")]
    assert by_author[0] == by_author[1] != by_author[2]
    shown = driver.find_element("tag name", "body").text
    assert "<script>window.bad = 1</script>" in shown
    assert "<U+001B>[31m" in shown
    assert "<U+202E>gnp.exe" in shown
    assert driver.execute_script("return window.bad === undefined")
    requests = driver.execute_script("return performance.getEntriesByType('resource').length")
    assert requests == 0


@pytest.mark.slow
def test_twenty_thousand_rollouts_stay_usable(driver, tmp_path):
    opened(
        driver, tmp_path, [rollout(step, problem, a, a == 0) for step in range(1, 101) for problem in range(50) for a in range(4)]
    )
    assert count(driver) == "20,000 of 20,000 rollouts"
    assert len(driver.find_elements("css selector", "#shown .row")) < 100  # only what is in sight is drawn
    # In one script: the page draws rows anew at every event, so an element would be stale.
    last = "document.querySelector('#shown .row:last-child .where').textContent"
    where = driver.execute_script(f"document.getElementById('list').scrollTop = 19990 * 28; draw(); return {last}")
    assert where.startswith("100 ")
    set_field(driver, "search", "text of 17.2 at 50")
    assert count(driver) == "1 of 20,000 rollouts"
