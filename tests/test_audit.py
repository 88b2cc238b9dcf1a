"""The audit of verifiers: its shipped cases hold the rates of errors, its report shows
what disagrees, and bad files get one line.

At their first reading, on 2026-11-28, the verifiers missed 19 of 256 right answers (7.4
% [4.8, 11.3]) and accepted 26 of 247 wrong ones (10.5 % [7.3, 15.0]); `number` 13 of
184 and 24 of 136, `math` 2 of 49 and 1 of 58. The clear kinds were mended. Of the 87
cases of the kind "held out", written after that, the mended ones at their first reading
missed 4 of 54 and accepted 3 of 33, the ones before 19 and 18; their author knew what
had been mended. Since `rather than` was mended later, `MOST` is a test and no estimate.
"""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest
from runs import ROOT

from jaxreason.types import Task, Verdict
from jaxreason.verify import audit

# Verifier -> most false negatives, most false positives.
MOST = {
    "number": (6, 15),
    "math": (1, 0),
    "exact(marker='Answer:')": (3, 0),
    "exact(marker='A')": (0, 0),
    "countdown": (1, 0),
    "reasoning_gym": (0, 0),
    "format": (0, 0),
    "all_of(number, format)": (0, 1),
    "weighted(number, format, weights=[1.0, 0.2])": (0, 0),
}


@pytest.fixture(scope="module")
def judged():
    return audit.judge_cases(audit.read_cases(audit.SHIPPED)[0])


def test_the_shipped_cases_cover_verifiers_forms_and_both_labels(judged):
    assert len(judged) >= 590
    labels = Counter(j.case.label for j in judged)
    assert min(labels.values()) >= 150
    kinds = Counter(j.case.kind for j in judged)
    assert {"partial", "enumerated", "hedge", "decimal comma", "cut off", "code"} <= kinds.keys()
    texts = [(j.case.verifier, j.case.text, j.case.task.answer, str(j.case.task.data)) for j in judged]
    assert len({*texts}) == len(texts)


def test_the_rates_of_errors_do_not_rise(judged):
    assert {audit.title(j.case.verifier) for j in judged} == MOST.keys()
    for verifier, (missed, paid) in MOST.items():
        found = audit.rates([j for j in judged if audit.title(j.case.verifier) == verifier])
        assert found.missed <= missed, verifier
        assert found.paid <= paid, verifier
    assert not [j.verdict.reason for j in judged if j.verdict.reason.startswith("raised")]


def test_the_report_has_rates_with_intervals_disagreements_and_speed(judged):
    lines = list(audit.report(judged, most=2))
    whole = audit.rates(judged)
    row = next(line for line in lines if line.startswith("all "))
    assert audit.share(whole.missed, whole.true) in row
    assert audit.share(whole.paid, whole.false) in row
    assert audit.share(1, 4) == "1/4 = 25.0% [4.6, 69.9]"
    assert audit.share(0, 0) == "-"
    differ = sum(not j.agrees for j in judged)
    assert f"{differ} of {len(judged)} cases in which verifier and label disagree:" in lines
    assert f"  ... and {differ - 2} more; --most={differ} shows all" in lines
    assert re.fullmatch(r"all: [\d,]+ cases/s, p50 [\d.]+ ms, p99 [\d.]+ ms", lines[-1])


def test_a_disagreeing_case_shows_what_can_not_be_seen():
    case = audit.Case(
        "cases.jsonl:7", '{"name": "number"}', "odd", "a\u200b\n\0\ud800" + "x" * 500 + "\\end", Task("", "5"), True
    )
    line = audit.disagreement(audit.Judged(case, Verdict(0.0, False, None, "no answer"), False, 0.0))
    assert "a\\u200b\\n\\x00\\ud800xxx" in line
    assert "…" in line
    assert line.endswith("\\end")
    assert max(map(len, line.splitlines())) < 260


def test_a_verifier_that_raises_accepts_nothing(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps({"text": "A1", "answer": "1", "label": True, "verifier": "countdown"}) + "\n")
    (found,) = audit.judge_cases(audit.read_cases(path)[0])
    assert not found.accepted
    assert found.verdict.reason.startswith("raised ValueError: verifier 'countdown' needs data")


@pytest.mark.parametrize(
    ("verify", "said"),
    [
        (lambda text, task: sys.exit(0), "raised SystemExit: 0"),
        (lambda text, task: None, "raised TypeError: part 'verifier' returned a NoneType"),
        (lambda text, task: Verdict(float("nan"), True, None, ""), "raised ValueError: part 'verifier' returned the reward nan"),
        (lambda text, task, tokens: Verdict(1.0, tokens is None, None, "counts"), "counts"),
    ],
)
def test_a_verifier_of_a_user_never_ends_the_audit(verify, said):
    found = audit.total(verify, "5", Task("", "5"))
    assert found.reason.startswith(said)
    assert found.correct == (said == "counts")


def test_a_reward_for_a_wrong_answer_shows_even_if_it_is_not_accepted():
    case = audit.Case("f:1", '{"name": "number"}', "", "6", Task("", "5"), False)
    pays = audit.Judged(case, Verdict(0.5, False, "6", "form"), False, 0.1)
    said = list(audit.report([pays, pays._replace(verdict=Verdict(0.0, False, "6", "wrong"))]))
    assert "1 cases labelled false are not accepted and yet earn a reward, 0.5 on average; the first:" in said
    assert any(line.startswith("  f:1  reward 0.5  number") for line in said)
    assert not any("earn a reward" in line for line in audit.report([pays._replace(verdict=Verdict(0.0, False, "6", "wrong"))]))


# --- the command ---

GOOD = json.dumps({"text": "it is 5", "answer": "5", "label": True})


def run(*arguments):
    code = [sys.executable, "-m", "jaxreason.verify.audit", *arguments]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


def test_a_half_written_last_line_is_left_out_and_said(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_text(f'{GOOD}\n\n{GOOD}\n{{"text": "it is')
    code, said, errors = run(str(path), "--verifier={'name': 'number', 'strict': True}")
    assert (code, errors) == (0, "")
    assert "2/2 = 100.0%" in said
    assert f"warning: {path}:4: left out the last line, which is only half written" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no cases"),
        ("\n", "has no cases"),
        ("{}\n", ":1: no field 'text'; needed: text, answer, label"),
        ("[]\n", ":1: got a JSON list; allowed: an object"),
        ("{\n" + GOOD, ":1: not JSON"),
        (GOOD.replace("true", '"yes"'), ":1: field 'label' got 'yes'; allowed: true or false"),
        (GOOD.replace('"5"', "5"), ":1: field 'answer' got 5; allowed: a text"),
        (GOOD.replace("label", "lable"), ":1: unknown field 'lable' (did you mean 'label'?)"),
        (GOOD, ":1: names no verifier; add the field 'verifier', or the flag --verifier=number"),
        (GOOD[:-1] + ', "verifier": {"strict": true}}', "has no name"),
        (GOOD[:-1] + ', "verifier": "nubmer"}', "unknown verifier 'nubmer' (did you mean 'number'?)"),
    ],
)
def test_a_bad_file_gets_one_line(tmp_path, text, words):
    path = tmp_path / "cases.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        audit.judge_cases(audit.read_cases(path)[0])


def test_a_wrong_command_gets_one_line(tmp_path):
    for arguments, words in (
        (["nothing.jsonl"], "no file 'nothing.jsonl'"),
        (["--verifier={'name'"], "--verifier got"),
        (["--verifier=nubmer"], "unknown verifier 'nubmer'"),
    ):
        code, _, errors = run(*arguments)
        assert code == 1
        assert errors.startswith("error: ")
        assert words in errors
        assert errors.count("\n") == 1
