"""The command that evaluates a checkpoint: the numbers of a run, killed and continued,
budgets of thinking, and comparisons.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest
from runs import ROOT, load_config, read_lines, run_config

from jaxreason.look.comparison import compare_folders

pytestmark = pytest.mark.process


def evaluate(*arguments, cwd=ROOT):
    command = [sys.executable, "-m", "jaxreason.evaluate", *map(str, arguments)]
    got = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    return got.returncode, got.stdout, got.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose suite has three samples per task."""
    folder = tmp_path_factory.mktemp("trained")
    config = load_config("tiny", "smoke", **{"prior.steps": 2, "rl.steps": 1})
    with config.unlocked():
        config.evaluate.suites.chain.samples = 3
        config.evaluate.temperatures = (0.0, 1.0)
        config.sampler.thinking_tokens = 6
        config.sampler.end_of_thinking = ";A"
    summary = run_config(config, folder)
    (folder / "config.json").write_text(json.dumps(summary["config"] | {"revisions": {}}))
    return folder


@pytest.fixture(scope="module")
def evaluated(trained):
    folder = trained.parent / "evaluated"
    code, out, err = evaluate(f"--checkpoint={trained}", f"--workdir={folder}")
    assert code == 0, err
    assert "of 8 tasks" in out
    return folder


def test_a_run_has_the_numbers_of_its_own_evaluation(trained, evaluated):
    summary = json.loads((trained / "summary.json").read_text())
    last = [e for e in summary["evaluations"] if e["step"] == summary["steps"]]
    found = json.loads((evaluated / "evaluation.json").read_text())
    assert found["done"]
    assert len(last) == len(found["evaluations"]) == 4
    assert [e["samples"] for e in found["evaluations"]] == [1, 3, 1, 1]
    for inside, outside in zip(last, found["evaluations"], strict=True):
        for name in ("suite", "temperature", "accuracy", "low", "high", "n", "verdicts", "samples"):
            assert inside[name] == outside[name], name
        assert outside["measures"] == pytest.approx(inside["measures"])
    # The run's own record has the same texts.
    kept = [r for r in read_lines(trained / "rollouts.jsonl") if r["step"] == summary["steps"] and "suite" in r]
    texts = {
        (r["suite"], r["temperature"], r["problem"], r["attempt"]): r["text"] for r in read_lines(evaluated / "rollouts.jsonl")
    }
    assert kept
    assert all(texts[r["suite"], r["temperature"], r["problem"], r["attempt"]] == r["text"] for r in kept)


def test_a_killed_evaluation_continues_to_the_same_end(trained, evaluated, tmp_path):
    folder = tmp_path / "killed"
    shutil.copytree(evaluated, folder)
    lines = (evaluated / "rollouts.jsonl").read_text().splitlines(keepends=True)
    strange = '{"step": 0}\n'
    (folder / "rollouts.jsonl").write_text("".join([*lines[10:14], strange, *lines[:5]]) + lines[20][:40])
    found = json.loads((evaluated / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps({k: v for k, v in found.items() if k != "evaluations"} | {"done": False}))
    code, out, err = evaluate(f"--checkpoint={trained}", f"--workdir={folder}")
    assert code == 0, err
    assert re.search(r"\d+ attempts are recorded already; the other \d+ follow", out)
    again = json.loads((folder / "evaluation.json").read_text())
    assert [(e["verdicts"], e["accuracy"]) for e in again["evaluations"]] == [
        (e["verdicts"], e["accuracy"]) for e in found["evaluations"]
    ]
    for one, other in zip(read_lines(evaluated / "rollouts.jsonl"), read_lines(folder / "rollouts.jsonl"), strict=True):
        assert one.pop("logp_sum") == pytest.approx(other.pop("logp_sum"), abs=1e-4)
        assert one == other
    # Tasks that changed under the same settings do not mix with it, nor attempts of
    # unknown settings.
    (folder / "evaluation.json").write_text(json.dumps(again | {"tasks": again["tasks"] | {"chain": "other"}}))
    code, _, err = evaluate(f"--checkpoint={trained}", f"--workdir={folder}")
    assert code == 1
    assert "of other tasks: those of chain, or their prompts, have changed since" in err
    (folder / "evaluation.json").unlink()
    code, _, err = evaluate(f"--checkpoint={trained}", f"--workdir={folder}")
    assert code == 1
    assert "holds something else" in err
    (folder / "evaluation.json").write_text(json.dumps(again))
    # Another evaluation does not mix with it.
    code, _, err = evaluate(f"--checkpoint={trained}", f"--workdir={folder}", "--n=4")
    assert code == 1
    assert "holds another evaluation (settings.n: 8 there, 4 here)" in err
    assert len(err.splitlines()) == 1


def test_budgets_of_thinking_share_attempts(trained, tmp_path):
    arguments = [f"--checkpoint={trained}", "--suites=chain", "--temperature=1", "--samples=2", "--n=4"]
    code, _, err = evaluate(*arguments, "--thinking_tokens=3,9", "--recovery=2", f"--workdir={tmp_path / 'both'}")
    assert code == 0, err
    code, _, err = evaluate(*arguments, "--thinking_tokens=3", f"--workdir={tmp_path / 'alone'}")
    assert code == 0, err
    both, alone = (read_lines(tmp_path / name / "rollouts.jsonl") for name in ("both", "alone"))
    small = [r for r in both if r["thinking_tokens"] == 3]
    assert [r["text"] for r in small] == [r["text"] for r in alone]
    assert any(r["text"] != s["text"] for r, s in zip([r for r in both if r["thinking_tokens"] == 9], small, strict=True))
    evaluations = json.loads((tmp_path / "both" / "evaluation.json").read_text())["evaluations"]
    assert [e["thinking_tokens"] for e in evaluations] == [9, 3]
    assert all(e["recovery"]["recovery_tried"] <= 2 for e in evaluations)
    assert all(e["recovery"]["most"] == 2 for e in evaluations)
    # The same command keeps its result, with --recovery and without.
    for more in ("--recovery=2", "--recovery=0"):
        code, out, err = evaluate(*arguments, "--thinking_tokens=3,9", more, f"--workdir={tmp_path / 'both'}")
        assert code == 0, err
        assert "loading" not in out
        again = json.loads((tmp_path / "both" / "evaluation.json").read_text())
        assert again["evaluations"] == evaluations
        assert again["settings"]["recovery"] == 2


def test_lines_that_are_no_attempt_are_made_again(trained, evaluated, tmp_path):
    """Wrong types, twice the same attempt, attempts at other problems."""
    folder = tmp_path / "odd"
    shutil.copytree(evaluated, folder)
    lines = read_lines(evaluated / "rollouts.jsonl")
    wrong = [{"length": "3"}, {"problem": [1]}, {"logp_sum": "low"}, {"correct": None}, {"text": None}]
    odd = [line | change for line, change in zip(lines, wrong)]
    odd += [*lines[5:], lines[7], lines[8] | {"problem": 4000}]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in odd))
    code, _, err = evaluate(f"--checkpoint={trained}", f"--workdir={folder}")
    assert code == 0, err
    found, expected = (json.loads((path / "evaluation.json").read_text())["evaluations"] for path in (folder, evaluated))
    for one, other in zip(found, expected, strict=True):
        assert one["verdicts"] == other["verdicts"]
        assert one["measures"] == pytest.approx(other["measures"])
    assert [r["problem"] for r in read_lines(folder / "rollouts.jsonl")] == [r["problem"] for r in lines] + [4000]


def test_a_damaged_evaluation_is_named(evaluated, tmp_path):
    for text in ('{"done": true}', '{"done": true, "evaluations": [3]}', '{"done": true, "evaluations": [{"suite": "s"}]}'):
        (tmp_path / "evaluation.json").write_text(text)
        with pytest.raises(ValueError, match=r"evaluation.json is damaged: it lacks results"):
            compare_folders(tmp_path, evaluated)


JUDGE = """
from my_words import LETTER
from jaxreason.types import Verdict

def judge(letter=LETTER):
    def verify(text, task):
        return Verdict(1.0, letter in text, text[:4])
    return verify
"""


def test_verdicts_of_two_versions_of_a_users_code_do_not_mix(trained, tmp_path):
    (tmp_path / "my_judge.py").write_text(JUDGE)
    (tmp_path / "my_words.py").write_text("LETTER = 'A'\n")
    arguments = [f"--checkpoint={trained}", "--suites=chain", "--temperature=0", "--verifier=my_judge:judge", "--n=4"]
    code, out, err = evaluate(*arguments, cwd=tmp_path)
    assert code == 0, err
    folder = tmp_path / out.split("written: ")[1].partition("/evaluation.json")[0]
    assert json.loads((folder / "evaluation.json").read_text())["own_code"].keys() == {"my_judge", "my_words"}
    code, out, err = evaluate(*arguments, f"--workdir={folder}", cwd=tmp_path)
    assert code == 0, err
    assert "loading" not in out
    # A file that the verifier imports changes: another folder, or refused.
    (tmp_path / "my_words.py").write_text("LETTER = 'B'\n")
    code, out, err = evaluate(*arguments, cwd=tmp_path)
    assert code == 0, err
    assert str(folder.name) not in out
    code, out, err = evaluate(*arguments, f"--workdir={folder}", cwd=tmp_path)
    assert code == 1
    assert "holds an evaluation by another version of your code: my_words changed since" in err


LATER = """
import datetime, runpy, sys

class Date(datetime.date):
    @classmethod
    def today(cls):
        return cls(2020, 2, 13)

datetime.date = Date
runpy.run_module("jaxreason.evaluate", run_name="__main__", alter_sys=True)
"""
TEMPLATE = (
    "{{ strftime_now('%m') }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
)


def test_the_same_command_on_the_next_day_continues(trained, tmp_path):
    """A chat template that names the day does not begin another evaluation."""
    command = [sys.executable, "-m", "jaxreason.export", str(trained), str(tmp_path / "chat")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (tmp_path / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    arguments = [f"--checkpoint={tmp_path / 'chat'}", "--suites=chain", "--n=3", "--max_tokens=8", "--max_prompt_tokens=64"]
    got = subprocess.run([sys.executable, "-c", LATER, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    (folder,) = (tmp_path / "evaluations").iterdir()
    lines = (folder / "rollouts.jsonl").read_text().splitlines(keepends=True)
    assert all(json.loads(line)["prompt"].startswith("02") for line in lines)
    (folder / "rollouts.jsonl").write_text(lines[0] + lines[1][:30])
    code, out, err = evaluate(*arguments, cwd=tmp_path)
    assert code == 0, err
    assert "the date in prompts is 2020-02-13, the day on which this evaluation began" in out
    assert [path.name for path in (tmp_path / "evaluations").iterdir()] == [folder.name]
    found = json.loads((folder / "evaluation.json").read_text())
    assert (found["date"], found["settings"]["text"]["date"]) == ("2020-02-13", "2020-02-13")
    assert (folder / "rollouts.jsonl").read_text().splitlines(keepends=True)[0] == lines[0]
    assert all(r["prompt"].startswith("02") for r in read_lines(folder / "rollouts.jsonl"))


def test_slots_of_a_run_fit_other_devices(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    arguments = [f"--checkpoint={trained}", "--suites=chain", "--temperature=0", "--n=4", "--samples=2"]
    code, out, err = evaluate(*arguments, f"--workdir={tmp_path / 'three'}")
    assert code == 0, err
    assert "note: --samples=2 makes one attempt per task at temperature 0" in out
    code, _, err = evaluate(*arguments, "--slots=4", f"--workdir={tmp_path / 'asked'}")
    assert code == 1
    assert "4 slots, which do not divide over 3 devices" in err


def unbounded(run, folder):
    """Copy a run as one without a budget of thinking."""
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    config["sampler"]["thinking_tokens"] = None
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no --checkpoint given"),
        (["--checkpoint=/nowhere/at/all"], "no folder '/nowhere/at/all'"),
        (["--checkpoint={run}", "--step=77"], "has no checkpoint of step 77"),
        (["--checkpoint={run}", "--suites=chian"], "unknown suite 'chian' (did you mean 'chain'?)"),
        (["--checkpoint={run}", "--suites=mine=/nowhere.jsonl"], "no file '/nowhere.jsonl'"),
        (["--checkpoint={run}", "--temperature=hot"], "--temperature got 'hot'"),
        (["--checkpoint={run}", "--temperature=1e-9"], "--temperature got '1e-9'; allowed: 0 (greedy), or 0.0001 and more"),
        (["--checkpoint={run}", "--thinking_tokens=4", "--end_of_thinking=</think>"], "allowed: a text that the model can write"),
        (["--checkpoint={plain}", "--end_of_thinking=;A"], "--end_of_thinking without a budget of thinking"),
        (["--checkpoint={run}", "--max_tokens=0"], "--max_tokens"),
        (
            ["--checkpoint={run}", "--suites=a={'name': 'chain', 'verifier': 'exact'}"],
            "a.verifier got 'exact'; allowed: a section",
        ),
        (["--checkpoint={run}", "--suites=a={'name': 'chain', 'temperatures': 1}"], "a.temperatures got 1; allowed: a list"),
        (["--checkpoint={run}", "--suites=a={'name': 'chain', 'temperatures': []}"], "a.temperatures is empty"),
        (["--checkpoint={run}", "--suites=a={'name': 'chain', 'samples': '4'}"], "a.samples got '4'; allowed: a whole number"),
        (
            ["--checkpoint={run}", "--suites=a={'name': 'chain', 'environment': {'name': 'retry', 'attempts': '4'}}"],
            "suite 'a': config.environment.attempts got '4' (str); allowed: int",
        ),
        (["--checkpoint={run}", "--top_p=2"], "evaluate got top_k=0, top_p=2.0"),
        (["--checkpoint={run}", "--verifier=exactly"], "unknown verifier 'exactly' (did you mean 'exact'?)"),
        (["--compare", "{run}"], "--compare got 1 folders"),
        (["--compare", "{run}", "/nowhere"], "/nowhere is no evaluation"),
        (["--compare", "{run}", "{run}", "--n=3", "--suites=chain"], "--compare got --suites, --n too"),
        (["--checkpoint={run}", "--workdir={run}/config.json"], "config.json', which is a file; allowed: a folder"),
        (["--checkpoint={run}", "--thinking_tokens=3,31"], "leave none of 32 tokens for an answer; give fewer --thinking_tokens"),
        (
            ["--checkpoint={run}", "--suites=a={'name': 'chain', 'max_tokens': 5}", "--thinking_tokens=4"],
            "leave none of 5 tokens for an answer",
        ),
    ],
)
def test_bad_input_is_one_line(trained, tmp_path, arguments, said):
    if any("{plain}" in a for a in arguments):
        unbounded(trained, tmp_path / "plain")
    named = [a.replace("{run}", str(trained)).replace("{plain}", str(tmp_path / "plain")) for a in arguments]
    code, _, err = evaluate(*named, cwd=tmp_path)
    assert code == 1
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err


# --- comparisons ---


def test_runs_with_other_settings_are_compared_with_notes(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    summary = json.loads((trained / "summary.json").read_text())
    config = summary["config"]
    config["evaluate"]["top_p"] = 0.9
    config["evaluate"]["suites"]["chain"]["instruction"] = "Now: {question}"
    config["sampler"] |= {"slots": 3, "max_tokens": 77}
    config["text"]["instruction"] = "x{question}"
    (tmp_path / "other" / "summary.json").write_text(json.dumps(summary))
    notes = [line.partition(" is ")[0] for line in compare_folders(trained, tmp_path / "other") if line.startswith("note: ")]
    names = ["filter.top_p", "sampler.max_tokens", "suites.chain.instruction", "text.instruction"]
    assert notes == [f"note: {name}" for name in names]
    config["evaluate"]["suites"]["chain"]["ops"] = 2
    (tmp_path / "other" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match="suite 'chain' has other tasks in A and B"):
        compare_folders(trained, tmp_path / "other")


def test_a_run_compares_with_itself(trained):
    lines = compare_folders(trained, trained)
    assert sum("B - A +0.000" in line for line in lines) == 4
