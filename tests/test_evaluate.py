"""The command that evaluates a checkpoint: the numbers of a run, killed and continued,
budgets of thinking, and comparisons.
"""

import inspect
import itertools
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from runs import ROOT, load_config, read_lines, run_config

from jaxreason import estimators
from jaxreason.build.checkpoint import fingerprint
from jaxreason.build.evaluation import attempted
from jaxreason.build.suites import SUITES, read_suites
from jaxreason.evaluate import identity, series
from jaxreason.evaluate.own_code import digest_sources, own_names
from jaxreason.evaluation import Outcome, Suite, curves, measure, outcome, outcome_of
from jaxreason.look import comparison
from jaxreason.look.comparison import compare, compare_folders, paired_interval, read_evaluations
from jaxreason.options import split_outside
from jaxreason.recovery import Recovery
from jaxreason.rollout import Completer
from jaxreason.types import Rollout, Task, Verdict

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
    code, _, err = evaluate(f"--checkpoint={trained}", f"--workdir={folder}")
    assert code == 0, err
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


def test_sources_of_a_users_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "their_rewards"
    (package / "parts").mkdir(parents=True)
    (tmp_path / "their_table.py").write_text("A = 1\n")
    (package / "__init__.py").write_text("from . import parts\n")
    (package / "judge.py").write_text(
        "import numpy as np, json, os.path, nowhere_at_all\nfrom .parts.words import A\nfrom jaxreason.types import Task\n"
        "def maker():\n    import their_table, their_rewards.judge\n"
    )
    (package / "parts" / "__init__.py").write_text("")
    (package / "parts" / "words.py").write_text("A = (\n")  # whoever imports it gets the error
    names = {"their_rewards", "their_rewards.judge", "their_rewards.parts", "their_rewards.parts.words", "their_table"}
    found = digest_sources(["their_rewards.judge:maker"])
    assert found.keys() == names
    (package / "parts" / "words.py").write_text("A = 2\n")
    again = digest_sources(["their_rewards.judge:maker"])
    assert {name for name in names if found[name] != again[name]} == {"their_rewards.parts.words"}
    assert digest_sources(["nowhere.at:all", ":f", "..x:f", "json:loads"]).keys() == {
        name for name in digest_sources(["json:loads"]) if name.partition(".")[0] == "json"
    }
    suites = [{"name": "their:tasks"}, {"name": "chain", "verifier": {"name": "exact"}}, {"name": "chain", "verifier": "wrong"}]
    assert own_names(suites, {"name": "my:default"}) == {"their:tasks", "my:default"}
    assert own_names(suites[1:], {"name": "my:default"}) == set()


def test_other_versions_are_said_and_recorded():
    first = {"versions": {"jax": "1", "numpy": "1"}, "revision": "a", "device": "cpu"}
    now = first | {"versions": {"jax": "2", "numpy": "1"}, "code": "c"}  # an earlier version did not record `code`
    said = []
    assert identity.also_made_with(first | {"done": False}, first | {"code": "c"}, said.append) == first
    assert not said
    made = identity.also_made_with(first | {"done": False}, now, said.append)
    assert made == first | {"continued_with": [now]}
    assert said == ["warning: earlier attempts were made with other versions (versions.jax: 1 there, 2 here); both are recorded"]
    # The third process is compared with the second.
    assert identity.also_made_with(made, now, said.append) == made
    assert len(said) == 1
    assert identity.also_made_with(made, first | {"code": "c"}, said.append)["continued_with"] == [now, first | {"code": "c"}]


def test_a_continuation_keeps_the_date_of_the_first_day():
    """The date in a chat template does not change the default folder."""
    settings = {"text": {"format": "chat", "date": "2026-01-01"}, "n": 3, "recovery": 5}
    about = {"settings": settings, "seed": 0}
    later = {"settings": settings | {"text": {"format": "chat", "date": "2026-01-02"}, "recovery": 0}, "seed": 0}
    opened = SimpleNamespace(folder=ROOT, step=None)
    assert identity.default_folder(opened, about) == identity.default_folder(opened, later)
    other = {"settings": settings | {"text": {"format": "plain"}}, "seed": 0}
    assert identity.default_folder(opened, about) != identity.default_folder(opened, other)


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


def test_recovery_keeps_the_limit_of_a_suite(monkeypatch):
    limits = []

    def recovery(completer, *_, **options):
        limits.append((completer.max_tokens, options["most"]))
        return Recovery(0, 0, 0, 0, 0, 0)

    monkeypatch.setattr(series, "recovery", recovery)
    completer = Completer(None, None, None, eos_ids=(), prompt_buckets=(8,), rows=1, max_tokens=32)
    opened = SimpleNamespace(parts=SimpleNamespace(completer=completer, tokenizer=SimpleNamespace(encode=list)))
    of = series.Evaluated(opened, {"filter": {"top_k": 0, "top_p": 1.0, "min_p": 0.0}}, None, 0, print)
    for most, limit in ((5, 5), (None, 32)):
        suite = Suite("s", [], None, max_tokens=most)
        assert series.recover(of, series.Series(suite, 0.0, None), [], 3, None)["most"] == 3
        assert limits.pop() == (limit, 3)


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
        (["--checkpoint={plain}", "--end_of_thinking=;A"], "--end_of_thinking without a budget of thinking"),
        (["--checkpoint={run}", "--max_tokens=0"], "--max_tokens"),
        (
            ["--checkpoint={run}", "--suites=a={'name': 'chain', 'verifier': 'exact'}"],
            "a.verifier got 'exact'; allowed: a section",
        ),
        (["--checkpoint={run}", "--suites=a={'name': 'chain', 'temperatures': 1}"], "a.temperatures got 1; allowed: a list"),
        (["--checkpoint={run}", "--suites=a={'name': 'chain', 'temperatures': []}"], "a.temperatures is empty"),
        (["--checkpoint={run}", "--suites=a={'name': 'chain', 'samples': '4'}"], "a.samples got '4'; allowed: a whole number"),
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


def test_a_pretrained_model_with_another_shape_or_tokenizer_is_another(tmp_path):
    checkpoint = SimpleNamespace(folder=tmp_path, step=None)
    seen = set()
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        for text in ("{}", "[]"):
            (tmp_path / name).write_text(text)
            seen.add(fingerprint(checkpoint))
    assert len(seen) == 10
    (tmp_path / "README.md").write_text("words")
    assert fingerprint(checkpoint) in seen


# --- suites ---


def test_suites_are_read_from_a_line():
    own = {"chain": {"name": "chain", "ops": 3}}
    assert read_suites("chain, gsm8k", own) == {"chain": own["chain"], "gsm8k": SUITES["gsm8k"]}
    file = read_suites("svamp=my.jsonl", {})
    assert file["svamp"]["path"] == "my.jsonl"
    assert file["svamp"]["question"] == "Body+Question"
    assert file["svamp"]["split"] is None  # the whole file
    assert file["svamp"]["verifier"] == SUITES["svamp"]["verifier"]
    made = read_suites("a={'name': 'jsonl', 'path': 'x,y.jsonl'},chain", {})
    assert made["a"] == {"name": "jsonl", "path": "x,y.jsonl", "split": None}
    for wrong in ("", "chain,chain", "a={1: 2}", "a={'path': 'x'}"):
        with pytest.raises(ValueError):
            read_suites(wrong, {})
    # A quote without a partner would take what follows with it.
    for wrong in ("a={", "a=it's.jsonl,chain", "a={'name': 'chain',chain", "a=x.jsonl),chain", "a={'name': 'chain]'}}"):
        with pytest.raises(ValueError, match=r"--suites has .* with a quote or bracket that has no partner"):
            read_suites(wrong, {})
    assert read_suites(r"a={'name': 'chain', 'instruction': 'Don\'t, {question}'},chain", {}).keys() == {"a", "chain"}
    assert split_outside("a={'x': (1, 2)}, b,'c,d'", ",") == ["a={'x': (1, 2)}", "b", "'c,d'"]


def test_every_named_suite_is_a_section_of_a_config():
    from jaxreason.build import SECTIONS
    from jaxreason.build.layout import section_of_suite
    from jaxreason.options import fields

    assert SECTIONS
    for name, section in SUITES.items():
        assert not fields.unknown_fields(section_of_suite(section), section), name
        fields.check(section_of_suite(section), section, name)


# --- statistics ---


def test_forced_tokens_do_not_count_in_the_likelihood():
    """A budget's forced end has log-probs of 0: counted, it would win every vote."""
    record = {"correct": True, "parsed": None, "reason": "", "stop": "eos", "length": 8, "logp_sum": -4.0}
    assert outcome_of(record | {"sampled": 4}).logp == -1.0
    assert outcome_of(record).logp == -0.5  # of an earlier version
    assert outcome_of(record | {"sampled": 0, "logp_sum": 0.0}).logp == 0.0
    made = Rollout(
        Task("q", "a"),
        0,
        0,
        np.ones(1),
        np.ones(3),
        np.array([-2, 0, 0]),
        np.array([True, False, False]),
        "",
        "eos",
        Verdict(1, True),
    )
    assert outcome(made).logp == -2.0


def test_curves_are_means_over_all_subsets():
    rng = np.random.default_rng(0)

    def draw():
        return Outcome(bool(rng.random() < 0.5), str(rng.integers(3)), "", "eos", 5, float(rng.normal()))

    outcomes = [[draw() for _ in range(4)] for _ in range(3)]
    found = curves(outcomes)
    for k in range(1, 5):
        any_right = [[any(o[i].correct for i in s) for s in itertools.combinations(range(4), k)] for o in outcomes]
        assert found["pass"][k] == pytest.approx(np.mean(any_right))
        votes = [estimators.majority_at_k([x.parsed for x in o], [x.correct for x in o], k) for o in outcomes]
        assert found["majority"][k] == pytest.approx(np.mean(votes))
    found = measure(outcomes)
    assert found["pass@4"] == pytest.approx(np.mean([any(x.correct for x in o) for o in outcomes]))
    assert found["pass^4"] == pytest.approx(np.mean([all(x.correct for x in o) for o in outcomes]))


# --- comparisons ---


def made(folder, verdicts, questions, **more):
    folder.mkdir()
    n = len(questions)
    entry = {
        "suite": "s",
        "temperature": 0.0,
        "thinking_tokens": None,
        "n": n,
        "samples": len(verdicts) // n,
        "verdicts": verdicts,
    }
    entry |= {"questions": questions, "prompts": "p"} | more
    (folder / "evaluation.json").write_text(json.dumps({"done": True, "evaluations": [entry]}))
    lines = [{"suite": "s", "temperature": 0.0, "thinking_tokens": None, "problem": i, "attempt": 0} for i in range(n)]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"suite": "s", "tem')
    return folder


def test_a_comparison_pairs_tasks(tmp_path):
    a = made(tmp_path / "a", "0011" * 30, [f"q{i}" for i in range(120)], prompts=["p"] * 120)
    b = made(tmp_path / "b", "0111" * 30, [f"q{i}" for i in range(120)])
    lines = "\n".join(compare_folders(a, b))
    assert "A 0.500, B 0.750, B - A +0.250" in lines
    assert "p 1.9e-09" in lines  # McNemar's: 2 * 0.5 ** 30
    assert "learned (solved more often in B): 30:" in lines
    assert f"problem 5 of B: {a}/rollouts.jsonl:6, {b}/rollouts.jsonl:6" in lines
    assert "and 22 more" in lines
    assert "lost (solved less often in B): 0" in lines
    # Other order, other number, other prompts: paired by question, and said.
    c = made(tmp_path / "c", "0101", ["q3", "q2", "q1", "new"], prompts=["other"] * 4)
    lines = "\n".join(compare_folders(a, c))
    assert "3 tasks are in both, of 120 in A and 4 in B" in lines
    assert "the prompts differ" in lines
    assert "A 0.667, B 0.333" in lines  # q3, q2, q1: 1 1 0 against 0 1 0


def test_a_question_that_comes_twice_is_paired_in_order(tmp_path):
    a = made(tmp_path / "a", "0110", ["q0", "q1", "q1", "q2"])
    b = made(tmp_path / "b", "0101", ["q0", "q1", "q1", "q2"])
    lines = "\n".join(compare_folders(a, b))
    assert "4 tasks: A 0.500, B 0.500" in lines
    assert "learned (solved more often in B): 1:" in lines
    assert "lost (solved less often in B): 1:" in lines


def test_other_tasks_are_refused(tmp_path):
    a, b = made(tmp_path / "a", "01", ["q0", "q1"]), made(tmp_path / "b", "01", ["r0", "r1"])
    with pytest.raises(ValueError, match="no task that is in both"):
        compare_folders(a, b)
    c = made(tmp_path / "c", "01", ["q0", "q1"], temperature=1.0)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_folders(a, c)


def test_a_smaller_evaluation_has_no_other_prompts(tmp_path):
    a = made(tmp_path / "a", "0110", [f"q{i}" for i in range(4)], prompts=["p0", "p1", "p2", "p3"])
    b = made(tmp_path / "b", "01", ["q0", "q2"], prompts=["p0", "p2"])
    assert "prompts differ" not in "\n".join(compare_folders(a, b))
    c = made(tmp_path / "c", "01", ["q0", "q2"], prompts=["p0", "other"])
    assert "prompts differ" in "\n".join(compare_folders(a, c))
    # Earlier versions wrote one digest, which also differs if the number does.
    d = made(tmp_path / "d", "01", ["q0", "q1"], prompts="digest of two")
    e = made(tmp_path / "e", "0111", [f"q{i}" for i in range(4)], prompts="digest of four")
    assert "prompts differ" not in "\n".join([*compare_folders(d, e), *compare_folders(a, e)])


def test_equal_differences_have_an_interval_with_a_width(tmp_path):
    """Five tasks that both solve are no proof that the two are equal."""
    questions = [f"q{i}" for i in range(5)]
    a, b = made(tmp_path / "a", "11" * 5, questions), made(tmp_path / "b", "11" * 5, questions)
    one = compare(*(read_evaluations(folder)["s", 0.0, None] for folder in (a, b)))
    assert one.low == pytest.approx(-estimators.wilson(0, 5)[1]) == -one.high
    low, high, _ = paired_interval(np.zeros(2), np.ones(2), single=True)
    assert low < high == 1.0  # the posterior of two tasks alone ends below
    for n, difference in ((1, 0.5), (5, 1.0), (5, -1.0), (1000, 0.5)):
        low, high, _ = paired_interval(np.zeros(n), np.full(n, difference), single=False)
        assert -1 <= low <= difference <= high <= 1
        assert low < high
    assert (low, high) == pytest.approx((0.5, 0.5), abs=0.01)


def test_fewer_tasks_are_never_said_to_be_enough(tmp_path):
    """Two tasks, both learned, have no spread: two tasks seem to show it, and don't."""
    a, b = made(tmp_path / "a", "00", ["q0", "q1"]), made(tmp_path / "b", "11", ["q0", "q1"])
    lines = "\n".join(compare_folders(a, b))
    assert "B - A +1.000 [-" in lines
    assert "would show" not in lines


def test_settings_that_differ_are_named(tmp_path):
    a, b = made(tmp_path / "a", "01", ["q0", "q1"]), made(tmp_path / "b", "01", ["q0", "q1"])
    for folder, most, judge in ((a, 64, "exact"), (b, 512, "one\ntwo")):
        settings = {
            "n": most,
            "model": {"name": str(folder)},
            "sampler": {"max_tokens": most},
            "suites": {"s": {"verifier": judge}, str(most): {"name": "chain"}},
        }
        there = json.loads((folder / "evaluation.json").read_text())
        (folder / "evaluation.json").write_text(json.dumps(there | {"settings": settings}))
    notes = [line for line in compare_folders(a, b) if line.startswith("note: ")]
    assert notes == [
        "note: sampler.max_tokens is 64 in A, 512 in B",
        r"note: suites.s.verifier is 'exact' in A, 'one\ntwo' in B",
    ]


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


def test_a_comparison_knows_which_fields_of_a_suite_decide_its_tasks():
    assert set(comparison.ATTEMPTED) == set(inspect.signature(attempted).parameters)


def test_a_run_compares_with_itself(trained):
    lines = compare_folders(trained, trained)
    assert sum("B - A +0.000" in line for line in lines) == 4
