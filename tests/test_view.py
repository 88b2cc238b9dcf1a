"""The page of rollouts: its data are those of the folder, its size has a limit, hostile
texts are texts; and, with a browser, what a reader does with it.
"""

import json
import re
import subprocess
import sys
import unicodedata

import pytest
from runs import ROOT, load_config, open_browser, read_lines, run_config

from jaxreason import text
from jaxreason.look.page import shown
from jaxreason.look.view import choose, group_sizes, make_view, read_rollouts

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
    return show(driver, write(tmp_path / "run", records), fragment)


def show(driver, folder, fragment=""):
    path = folder / "view.html"
    path.write_text(make_view(folder, LARGE)[0], encoding="utf-8")
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
EVALUATIONS = [
    {"step": step, "suite": "chain", "temperature": 0.0, "n": 8, "verdicts": verdicts}
    for step, verdicts in ((0, "11000001"), (2, "11111000"))
]
# The colours of texts whose contrast with their background is below 4.5 (WCAG AA).
CONTRAST = """
const light = c => { const [r, g, b] = c.map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const over = colours => { for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  return light([...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)]); };
return [...document.querySelectorAll("label, span, strong, p, button, h1, h2, pre")].filter(e => e.textContent && !e.disabled
  && e.checkVisibility()).flatMap(e => {
  const behind = [];
  for (let p = e; p; p = p.parentElement) behind.unshift(getComputedStyle(p).backgroundColor);
  const back = over(behind), front = over([...behind, getComputedStyle(e).color]);
  const contrast = (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
  return contrast < 4.5 ? [[e.textContent.slice(0, 20), e.className, contrast]] : [];
});
"""


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


@pytest.mark.slow
def test_learned_and_lost_count_every_verdict_and_say_what_is_missing(driver, tmp_path):
    folder = write(tmp_path / "run", [r for r in RECORDS if r["problem"] < 2 or "suite" not in r])
    (folder / "summary.json").write_text(json.dumps({"evaluations": [*EVALUATIONS, "x", {"suite": "chain", "verdicts": 5}]}))
    (folder / "config.json").write_text(json.dumps({"rl": {"source": {"group": 16}}, "seed": 0}))
    show(driver, folder, "#view=changes")
    assert count(driver) == (
        "8 problems in both evaluations shown: 3 learned, 1 lost; the attempts at 6 of them are not all in the file"
    )
    set_field(driver, "change", "lost")
    assert count(driver).startswith("1 problems in both evaluations shown: 0 learned, 1 lost")
    driver.find_element("tag name", "body").send_keys("j")
    shown = driver.find_element("id", "detail").text
    assert "Before, at step 0: 1 of 1 correct" in shown
    assert "Its attempts are not in the file" in shown
    link = driver.current_url
    show(driver, folder, "#" + link.partition("#")[2])
    assert driver.find_element("id", "detail").text == shown
    show(driver, folder, "#suite=training%2C+T%3D1")
    driver.find_element("tag name", "body").send_keys("j")
    assert "2 of 16 attempts are in the file" in driver.find_element("id", "detail").text


@pytest.mark.slow
def test_token_values_are_read_by_keyboard_and_long_texts_unfold(driver, tmp_path):
    tokens = {"pieces": ["a", "tool says", "end"], "logp": [-1.5, 0.0, 0.0], "author": "mtf", "advantage": 0.25}
    records = [rollout(1, 0, **tokens), rollout(1, 0, 1, text="x" * 10**6, advantage=-0.25)]
    show(driver, write(tmp_path / "run", records), "#colour=author")
    body = driver.find_element("tag name", "body")
    body.send_keys("j")
    colours = {e.value_of_css_property("background-color") for e in driver.find_elements("css selector", ".tokens span")}
    assert len(colours) == 3  # the model, a tool, forced
    body.send_keys("t")
    read = lambda: driver.find_element("id", "read-0").text  # noqa: E731
    for said in ('token 1 of 3: "a", model, log-prob -1.5 (p = 0.223), advantage +0.25', 'token 2 of 3: "tool says", tool'):
        driver.switch_to.active_element.send_keys("\ue014")  # the right arrow
        assert read() == said
    driver.switch_to.active_element.send_keys("\ue010")  # End
    assert read() == 'token 3 of 3: "end", forced'
    long = lambda: driver.execute_script("return document.querySelectorAll('.attempt pre')[1].textContent.length")  # noqa: E731
    assert long() == 4000
    driver.find_element("id", "unfold-text-1").send_keys("\n")
    assert long() == 10**6
    set_field(driver, "search", "question")
    assert driver.execute_script("return document.getElementById('shown').textContent.length") < 1000
    driver.execute_script("state.colour = 'advantage'; state.whole.clear(); detail()")
    backgrounds = driver.execute_script(
        "return [document.querySelector('.tokens span'), document.querySelectorAll('.attempt pre')[1]]"
        ".map(e => getComputedStyle(e).backgroundColor)"
    )
    assert len(set(backgrounds)) == 2
    assert "+0.25" in driver.find_element("css selector", ".legend").text


@pytest.mark.slow
def test_equal_questions_stay_apart_and_every_field_is_searched(driver, tmp_path):
    same = {"question": "how many?", "text": "t"}
    records = [rollout(step, p, task=f"set/{p}", **same) for step in (1, 2) for p in (0, 1)]
    records += [
        rollout(step, p, suite="svamp", reason=f"reason{p}", parsed=f"answer{p}", **same) for step in (0, 2) for p in (0, 1)
    ]
    records += [rollout(1, 9, reward=-0.5), rollout(1, 10, reward=None)]
    folder = write(tmp_path / "run", records)
    show(driver, folder, "#view=changes")
    assert count(driver).startswith("2 problems in both")
    show(driver, folder)
    for word, number in (("reason1", 2), ("ANSWER0", 2), ("svamp", 4), ("set/1", 2), ("wrong", 10), ("correct", 0)):
        set_field(driver, "search", word)
        assert count(driver) == f"{number} of 10 rollouts", word
    set_field(driver, "search", "")
    set_field(driver, "most", "-0.1")
    assert count(driver) == "1 of 10 rollouts"
    set_field(driver, "least", "-0.4")
    assert count(driver) == "0 of 10 rollouts"
    show(driver, folder, "#problem=1&suite=training%2C+T%3D1")
    body = driver.find_element("tag name", "body")
    body.send_keys("j")
    driver.find_element("id", "clear").click()
    body.send_keys("f")
    assert count(driver).startswith("2 of 10")


@pytest.mark.slow
@pytest.mark.parametrize("width", [800, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_width_in_both_schemes(driver, tmp_path, width, scheme):
    """Look at the folder of an evaluation, with a long word in every text."""
    word = "w" * 3000
    tokens = {"pieces": [word, "b"], "logp": [-0.1, -3.0], "author": "mm"}
    long = {"text": word, "question": word, "parsed": word, "reason": word, "stop": word, "answer": word, "thinking_tokens": 8}
    records = [rollout(3, p, a, suite="s" * 80, **long, **tokens) for p in range(3) for a in range(5)]
    folder = write(tmp_path / "evaluation", records)
    entry = {"suite": "s" * 80, "step": 3, "temperature": 1.0, "thinking_tokens": 8, "n": 3, "samples": 5, "verdicts": "0" * 15}
    (folder / "evaluation.json").write_text(json.dumps({"evaluations": [entry]}))
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for fragment in ("#colour=log-prob", "#view=changes"):
            show(driver, folder, fragment)
            driver.find_element("tag name", "body").send_keys("j")
            assert driver.execute_script("return document.documentElement.scrollWidth") == width
            assert driver.execute_script("const d = $('detail'); return d.scrollWidth <= d.clientWidth")
            low = driver.execute_script(CONTRAST)
            assert low == [], low
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.slow
def test_page_and_script_hide_the_same_characters(driver, tmp_path):
    show(driver, write(tmp_path / "run", [rollout(1, 0)]))
    script = "return [...Array(0x110000).keys()].filter(c => visible(String.fromCodePoint(c)).length > 2)"
    hidden = set(driver.execute_script(script))
    assert hidden >= {0xAD, 0x2061, 0x2064, 0x200B, 0xFE0F, 0xE0001, 0xE0041, 0x202E, 0x1B, 0x3164, 0x034F, 0xD800}
    # The browser and Python may know other versions of Unicode, so unassigned ones may differ.
    differ = {c for c in range(0x110000) if (c in hidden) == shown(chr(c))}
    assert {c for c in differ if unicodedata.category(chr(c)) != "Cn"} == set()


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ({"name": "rollouts", "group": 8}, 8),
        ({"name": "corpus", "rows": 8}, None),
        ({"name": "mix", "of": {"rl": {"name": "rollouts", "group": 4}, "demos": {"name": "demonstrations"}}}, 4),
        ({"name": "mix", "of": {"a": {"name": "rollouts", "group": 4}, "b": {"name": "rollouts", "group": 8}}}, None),
        ({"name": "mix", "of": None}, None),
        (None, None),
    ],
)
def test_the_size_of_groups_is_that_of_the_source(tmp_path, source, size):
    (tmp_path / "config.json").write_text(json.dumps({"seed": 0, "rl": {"source": source}}))
    assert group_sizes(tmp_path) == ({} if size is None else {"rl": size})
