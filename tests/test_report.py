"""Reports: numbers are those of the folder, whatever is missing is said, hostile text is
only ever text, and pages stay small.
"""

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import ROOT, open_browser

from jaxreason import estimators
from jaxreason.look import chart, paired, report, runs

HOSTILE = "<script>alert(1)</script> \"'& \x1b[31m \u202egnp.exe \ud800 </script><!-- $x$ \x00"
SUITE = "eval/chain/t1/accuracy"


def evaluation(step, phase, right, n=120, suite="chain", temperature=1.0, seed=0):
    """Make the record of an evaluation in which `right` of n problems are solved."""
    solved = np.zeros(n, bool)
    solved[np.random.default_rng((seed, step)).permutation(n)[:right]] = True
    low, high = estimators.wilson(right, n)
    return {
        "phase": phase,
        "step": step,
        "suite": suite,
        "accuracy": right / n,
        "low": low,
        "high": high,
        "n": n,
        "temperature": temperature,
        "verdicts": "".join("01"[int(s)] for s in solved),
        "samples": 1,
        "measures": {"length": 10.0 + step},
    }


def config(seed=0, lr=0.001, **more):
    source = {"name": "rollouts", "task": {"name": "chain"}}
    return {
        "seed": seed,
        "phases": ["prior", "rl"],
        "prior": {"steps": 4, "source": {"name": "corpus"}, "objective": {"name": "lm"}},
        "rl": {"steps": 4, "source": source, "objective": {"name": "rloo"}, "optimizer": {"lr": lr}},
        "evaluate": {"suites": {"chain": {"name": "chain"}}},
        "model": {"name": "tiny", "weights": "random"},
        "log": {"report": True},
    } | more


def write_run(folder, seed=0, lr=0.001, rights=(0, 30, 60, 90), done=True, **more):
    """Write a run of 4 + 4 steps on two devices, evaluated at steps 0, 4, 6 and 8."""
    folder.mkdir(parents=True)
    stages = ((0, "start"), (4, "prior"), (6, "rl"), (8, "rl"))[: len(rights)]
    evaluations = [evaluation(step, phase, right, seed=seed) for (step, phase), right in zip(stages, rights)]
    lines, ledger = [], {}
    for step in range(9):
        if step:
            line = {
                "step": step,
                "phase": "prior" if step <= 4 else "rl",
                "phase_step": (step - 1) % 4 + 1,
                "time_s": 10.0 * step,
            }
            line |= {
                "train/loss": 1.0 / step,
                "train/skipped": 0.0,
                "time/step_s": 6.0,
                "time/learn_s": 4.0,
                "time/compile_s": 0.5,
            }
            if step > 4:
                line |= {"rollout/reward": 0.1 * step + 0.01 * seed, "time/sample_s": 1.0, "time/verify_s": 0.5}
            lines.append(line)
        for e in (e for e in evaluations if e["step"] == step):
            learn, sample = 6.0 * min(step, 4) + 4.0 * max(0, step - 4), 1.5 * max(0, step - 4)
            ledger = {
                "sample": {"tokens": 10.0 * step, "flops": 1e9 * step, "device_s": 2 * sample, "joules": 0.0},
                "learn": {"tokens": 100.0 * step, "flops": 3e9 * step, "device_s": 2 * learn, "joules": 0.0},
                "evaluate": {"tokens": 5.0, "flops": 5e9, "device_s": 2 * 2.0, "joules": 0.0},
                "compile": {"tokens": 0.0, "flops": 0.0, "device_s": 2 * (0.5 * step + 3.0), "joules": 0.0},
            }
            named = {f"ledger/{kind}_{unit}": of[unit] for kind, of in ledger.items() for unit in ("tokens", "flops")}
            lines.append(
                {"step": step, "phase": e["phase"], "phase_step": None, "time_s": 10.0 * step + 1, SUITE: e["accuracy"]} | named
            )
    made = config(seed, lr, **more)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps(made))
    summary = {"done": done, "steps": 8, "evaluations": evaluations, "wall_s": 90.0, "ledger": ledger, "config": made}
    summary |= {"parameters": 152000, "environment": {"versions": {"jax": "9.9.9"}, "revision": "abc", "devices": "2 x cpu"}}
    summary |= {"joules_from": None, "utilisation": {"learn": {"mfu": 0.125, "bandwidth": None}}}
    summary |= {"per_correct_answer_gained": {"suite": "chain", "gained": 90, "tokens": 885 / 90, "joules": None}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def written(out, *folders):
    report.write_report(folders, out)
    return out.read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def words(page):
    """Return the text of a page."""
    body = re.sub(r"<(style|script|svg)\b.*?</\1>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body))


def chart_at(page, unit, range_, position=0):
    """Return the data of a chart that the switch of the page shows."""
    block = re.split("data-unit=|</section>", page.split(f'data-unit="{unit}" data-range="{range_}"')[1])[0]
    return data_of(page)["charts"][re.findall(r'data-chart="(\w+)"', block)[position]]


# --- the numbers ---


def test_the_curve_of_a_run_has_the_accuracies_and_intervals_of_its_folder(tmp_path):
    page = written(tmp_path / "out.html", write_run(tmp_path / "run"))
    (line,) = chart_at(page, "steps", 0)["series"]
    expected = [evaluation(0, "start", right) for right in (0, 30, 60, 90)]
    assert line["x"] == [0, 4, 6, 8]
    for name, field in (("y", "accuracy"), ("low", "low"), ("high", "high")):
        assert line[name] == [e[field] for e in expected]
    (rl,) = chart_at(page, "steps", 2)["series"]  # from the last evaluation before the phase
    assert rl["x"] == [0, 2, 4]
    assert rl["y"] == [0.25, 0.5, 0.75]
    (prior,) = chart_at(page, "steps", 1)["series"]
    assert prior["x"] == [0, 4]


@pytest.mark.parametrize(
    ("unit", "whole", "rl"),
    [
        ("flops", [0, 16e9, 24e9, 32e9], [0, 8e9, 16e9]),  # of sampling and learning
        ("tokens", [0, 440, 660, 880], [0, 220, 440]),
        ("seconds", [1, 41, 61, 81], [0, 20, 40]),
    ],
)
def test_accuracy_is_drawn_against_what_it_cost(tmp_path, unit, whole, rl):
    page = written(tmp_path / "out.html", write_run(tmp_path / "run"))
    np.testing.assert_allclose(chart_at(page, unit, 0)["series"][0]["x"], whole)
    np.testing.assert_allclose(chart_at(page, unit, 2)["series"][0]["x"], rl)
    assert 'data-unit="joules"' not in page  # the run has none


def test_the_headline_and_the_tables_have_the_numbers_of_the_folder(tmp_path):
    text = words(written(tmp_path / "out.html", write_run(tmp_path / "run")))
    low, high = estimators.wilson(90, 120)
    assert (
        "Model tiny with 152,000 parameters. Phase prior: corpus × lm, 4 steps. Phase rl: rollouts of chain × rloo, 4 steps."
        in text
    )
    assert f"0.250 → 0.750 0.750 [{low:.3f}, {high:.3f}] over 120 problems" in text
    assert "Wall time 1m30s" in text
    assert "Tokens 885" in text
    assert "FLOPs 3.70×10¹⁰" in text
    assert "Joules not known no counter was read, and config.log.watts is not set" in text
    assert "versions.jax 9.9.9" in text
    assert "devices 2 x cpu" in text
    assert "rl.optimizer.lr 0.001" in text
    assert "all 885 3.70×10¹⁰" in text  # the ledger
    assert "of peak FLOP/s" in text
    assert "12.50%" in text
    assert "run chain 90 9.83" in text  # tokens per correct answer gained
    assert "length 18" in text  # measure of the last evaluation


def test_the_change_of_a_run_is_paired_by_problem(tmp_path):
    folder = write_run(tmp_path / "run")
    (group,) = runs.group_runs([runs.read_run(folder)])
    whole, rl = paired.changes(group)
    before, after = ([letter == "1" for letter in e["verdicts"]] for e in (evaluation(4, "prior", 30), evaluation(8, "rl", 90)))
    assert (rl.a, rl.b, whole.a) == ("before rl", "end of rl", "start of the run")
    assert rl.p == estimators.mcnemar(before, after)
    assert rl.how == "McNemar, posterior over 120 problems"
    assert (rl.difference, whole.difference) == (0.5, 0.75)
    assert rl.low < 0.5 < rl.high
    few = evaluation(0, "start", 10, n=40), evaluation(8, "rl", 30, n=40)
    made = paired.by_problem(*map(runs.to_evaluation, few), ("a", "b"))
    assert made.how == "McNemar, posterior over 40 problems"
    several = [e | {"samples": 2, "n": 20} for e in few]
    made = paired.by_problem(*map(runs.to_evaluation, several), ("a", "b"))
    assert made.how == "paired interval over 20 problems"
    assert made.difference == 0.5


def test_runs_that_differ_in_their_seed_are_one_line(tmp_path):
    rights = [(0, 30, 60, 80 + 5 * seed) for seed in range(3)]
    folders = [write_run(tmp_path / f"seed{seed}", seed, rights=rights[seed]) for seed in range(3)]
    page = written(tmp_path / "out.html", *folders)
    (line,) = chart_at(page, "steps", 0)["series"]
    mean, low, high = estimators.mean_interval([right / 120 for *_, right in rights])
    assert line["y"][-1] == pytest.approx(mean)
    assert (line["low"][-1], line["high"][-1]) == (80 / 120, 90 / 120)  # the range
    assert line["more"]["t-interval, low"][-1] == pytest.approx(low)
    assert line["more"]["t-interval, high"][-1] == pytest.approx(high)
    reward = next(c for c in data_of(page)["charts"].values() if c["x"] == "steps of the phase" and 0.51 in c["series"][0]["y"])
    assert reward["series"][0]["low"][0] == pytest.approx(0.5)
    assert f"{mean:.3f} [{low:.3f}, {high:.3f}] over 3 seeds" in words(page)
    (group,) = runs.group_runs([runs.read_run(folder) for folder in folders])
    differences = [right[3] / 120 - right[1] / 120 for right in rights]
    assert paired.changes(group)[-1].p == estimators.paired_t(differences)


def test_runs_of_other_configs_are_lines_of_their_own_and_compared(tmp_path):
    base = [write_run(tmp_path / f"a{seed}", seed, rights=(0, 30, 50, 60 + seed)) for seed in range(3)]
    other = [write_run(tmp_path / f"b{seed}", seed, lr=0.01, rights=(0, 30, 50, 72 + 3 * seed)) for seed in range(3)]
    page = written(tmp_path / "out.html", *base, *other)
    assert [line["name"] for line in chart_at(page, "steps", 0)["series"]] == ["lr=0.001", "lr=0.01"]
    text = words(page)
    assert "6 runs in 2 groups" in text
    assert "runs rl.optimizer.lr lr=0.001 0.001 lr=0.01 0.01" in text  # differences of config
    groups = runs.group_runs([runs.read_run(folder) for folder in (*base, *other)])
    (made,) = paired.between(groups)
    mean, low, high = estimators.mean_interval([(12 + 2 * seed) / 120 for seed in range(3)])
    np.testing.assert_allclose([made.difference, made.low, made.high], [mean, low, high])
    assert made.how == "paired t over 3 seeds"
    assert made.corrected == made.p
    assert f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" in text


def test_no_interval_leaves_the_values_that_an_accuracy_can_have(tmp_path):
    rights = [(0, 3, 60, 120), (0, 0, 60, 120), (0, 0, 60, 104)]
    folders = [write_run(tmp_path / f"seed{seed}", seed, rights=rights[seed]) for seed in range(3)]
    page = written(tmp_path / "out.html", *folders)
    assert "0.956 [0.764, 1.000]" in words(page)
    assert "+0.956 [+0.764, +1.000]" in words(page)
    (line,) = chart_at(page, "steps", 0)["series"]
    assert (min(line["more"]["t-interval, low"]), max(line["more"]["t-interval, high"])) == (0, 1)


def test_long_names_of_groups_are_the_folders_of_their_seeds(tmp_path):
    differ = {"an_option_with_a_long_name": 1, "another_option_with_a_long_name": 2, "a_third_one": 3}
    for arm, more in (("rloo", {}), ("grpo", differ)):
        for seed in range(2):
            write_run(tmp_path / arm / f"seed{seed}", seed, **more)
    write_run(tmp_path / "alone" / "seed0", lr=0.1, **differ)
    found = [runs.read_run(folder) for folder in sorted(tmp_path.glob("*/seed*"))]
    assert [group.label for group in runs.group_runs(found)] == ["alone/seed0", "grpo", "rloo"]
    again = [runs.read_run(write_run(tmp_path / "rloo" / f"again{seed}", seed)) for seed in range(2)]
    found = [run for run in found if run.folder.parent.name == "rloo"] + again
    assert [group.label for group in runs.group_runs(found)] == ["seed0", "again0"]


def test_single_runs_are_paired_by_problem_unless_their_suites_differ(tmp_path):
    a, b = (runs.read_run(write_run(tmp_path / f"lr{lr}", lr=lr, rights=(0, 30, 60, right))) for lr, right in ((1, 70), (2, 90)))
    (made,) = paired.between(runs.group_runs([a, b]))
    assert made.how == "McNemar, posterior over 120 problems"
    harder = runs.read_run(write_run(tmp_path / "harder", evaluate={"suites": {"chain": {"name": "chain", "ops": 9}}}))
    (made,) = paired.between(runs.group_runs([a, harder]))
    assert made.how == "not tested: the suite differs"
    assert made.p is None
    seeds = [runs.read_run(write_run(tmp_path / f"seed{seed}", seed, lr=1 + (seed > 1))) for seed in range(4)]
    (made,) = paired.between(runs.group_runs(seeds))
    assert made.how == "not tested: no seed in common"


def test_a_second_run_of_one_config_and_seed_is_no_new_sample(tmp_path):
    found = [runs.read_run(write_run(tmp_path / name, seed)) for name, seed in (("a", 0), ("b", 1), ("c", 0))]
    assert [[run.seed for run in group.runs] for group in runs.group_runs(found)] == [[0, 1], [0]]


def test_the_parts_of_the_wall_time_sum_to_it(tmp_path):
    split = runs.time_split(runs.read_run(write_run(tmp_path / "run")))
    assert split == pytest.approx(
        {"sample": 4.0, "verify": 2.0, "learn": 24.0 + 16.0, "evaluate": 2.0, "compile": 7.0, "other": 35.0}
    )
    assert sum(split.values()) == pytest.approx(90.0)


# --- what is missing or broken ---


def test_a_half_written_last_line_is_left_out_and_said(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "metrics.jsonl"
    path.write_text("not json\n" + path.read_text() + '{"step": 9, "phase": "rl", "train/lo')
    page = written(tmp_path / "out.html", folder)
    assert f"the last line of metrics.jsonl (line {len(path.read_text().splitlines())}) is incomplete and left out" in page
    assert "metrics.jsonl has lines that can&#x27;t be read, which are left out: 1" in page
    assert chart_at(page, "steps", 0)["series"][0]["x"] == [0, 4, 6, 8]


def test_an_unfinished_run_says_so(tmp_path):
    page = written(tmp_path / "out.html", write_run(tmp_path / "run", done=False, rights=(0, 30, 60)))
    assert "not finished: 8 of 8 steps are logged" in page
    assert "last evaluation" in page


def test_without_a_summary_the_accuracies_are_those_of_the_log(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").unlink()
    (folder / "config.json").write_text("[")
    page = written(tmp_path / "out.html", folder)
    (line,) = chart_at(page, "steps", 0)["series"]
    assert line["y"] == [0, 0.25, 0.5, 0.75]
    assert "low" not in line
    assert "summary.json is missing or unreadable" in page
    assert "config.json is missing or unreadable" in page
    assert "not tested: no verdicts per problem" in page


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 1, "phase": "rl", "phase_step": 1, "train/loss": 2.0}],  # no evaluation
        [{"step": 0, "phase": "start", "phase_step": None, SUITE: 0.5}],  # one point, nothing else
        [{"step": 1, "phase": "prior", "phase_step": 1, "train/loss": None, "train/grad_norm": float("nan"), "time_s": "soon"}],
        [
            {"step": n, "phase": "p", "phase_step": n, "train/loss": v}
            for n, v in ((1, 1e308), (2, -1e308), (3, 10**400), (4, True))
        ],
        [{"step": 1, "phase": "p", "phase_step": 1, "train/grad_norm": 1e-300}, {"step": 2, "phase": "p", "phase_step": 2}],
        [{"step": 3, "phase": "p", "phase_step": n, "train/loss": float(n)} for n in (3, 9, -2)],  # repeated steps
    ],
)
def test_any_log_has_a_report(tmp_path, lines):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = written(tmp_path / "out.html", folder)
    assert "nan" not in json.dumps(data_of(page)).lower()
    assert not re.search(r'd="[^"]*(nan|inf)', page)


@pytest.mark.parametrize("broken", [[], "x", {"evaluations": 3, "ledger": [1], "wall_s": "x", "config": [], "environment": "x"}])
def test_any_summary_has_a_report(tmp_path, broken):
    folder = write_run(tmp_path / "run")
    kept = [evaluation(8, "rl", 3) | {"verdicts": verdicts} for verdicts in ("012", 5, ["1"])]
    strange = [None, {}, {"suite": 1}, evaluation(8, "rl", 3) | {"n": None}, evaluation(8, "rl", 3) | {"step": 2**70}, *kept]
    (folder / "summary.json").write_text(json.dumps(broken))
    written(tmp_path / "out.html", folder)
    (folder / "summary.json").write_text(json.dumps({"evaluations": strange}))
    assert "5 of 8 evaluations in summary.json can&#x27;t be read" in written(tmp_path / "out.html", folder)


JUNK = (None, True, -1, 0, 7, 2**70, 1e308, float("nan"), float("inf"), "", "x", [], [1, "a"], {}, {"a": {"b": [None]}})


def spoiled(value, rng):
    """Return a value of JSON with a few of its parts replaced by junk."""
    if rng.random() < 0.03:
        return JUNK[rng.integers(len(JUNK))]
    if isinstance(value, dict):
        return {name: spoiled(item, rng) for name, item in value.items() if rng.random() > 0.01}
    return [spoiled(item, rng) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("seed", range(30))
def test_any_spoiled_folder_has_a_report(tmp_path, seed):
    rng = np.random.default_rng(seed)
    folders = [write_run(tmp_path / f"run{i}", i, lr=1 + i // 2) for i in range(3)]
    for folder in folders:
        path = folder / "metrics.jsonl"
        path.write_text("".join(json.dumps(spoiled(json.loads(line), rng)) + "\n" for line in path.read_text().splitlines()))
        for name in ("summary.json", "config.json"):
            (folder / name).write_text(json.dumps(spoiled(json.loads((folder / name).read_text()), rng)))
    page = written(tmp_path / "out.html", *folders)
    assert not re.search(r'd="[^"]*(nan|inf)', page)


def test_hostile_text_is_only_text(tmp_path):
    folder = write_run(tmp_path / "run<b>&")
    texts = json.dumps({"x": HOSTILE})[6:-1]
    metrics = (folder / "metrics.jsonl").read_text().replace("eval/chain/", "eval/" + texts[1:-1] + "/")
    metrics = metrics.replace('"rl"', texts).replace("train/loss", "train/" + texts[1:-1])
    (folder / "metrics.jsonl").write_text(metrics)
    for name in ("summary.json", "config.json"):
        text = (folder / name).read_text()
        for word in ('"chain"', '"rl"', '"tiny"', '"rollouts"', '"9.9.9"', '"devices"', '"length"'):
            text = text.replace(word, texts)
        (folder / name).write_text(text.replace('"random"', json.dumps("x" * 1_000_000)))
    other = write_run(tmp_path / "other", lr=HOSTILE)
    page = written(tmp_path / "out.html", folder, other)
    assert page.count("<script") == 2
    assert "<b>&" not in page
    assert not set(page) & {"\x1b", "\u202e", "\x00", "\ud800"}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert len(page) < 1_000_000


def test_texts_of_a_run_without_suites_are_drawn(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [
        {"step": step, "phase": "start" if not step else "p", "phase_step": None, "eval/book/nll": 3.0 - step} for step in (0, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert chart_at(written(tmp_path / "out.html", folder), "steps", 0)["series"][0]["y"] == [3.0, 2.0]


# --- charts ---


@pytest.mark.parametrize(
    ("values", "labels", "factor"),
    [
        ([0, 1], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"], ""),
        ([3, 3], ["1", "2", "3", "4", "5"], ""),
        ([0, 2000], ["0", "500", "1,000", "1,500", "2,000"], ""),
        ([0, 4.6e12], ["0", "1", "2", "3", "4", "5"], "×10¹²"),
        ([-2e-9, 3e-9], ["−2", "−1", "0", "1", "2", "3"], "×10⁻⁹"),
    ],
)
def test_ticks_are_round_numbers(values, labels, factor):
    made = chart.axis(values, 5)
    assert [label for _, label in made.ticks] == labels
    assert made.factor == factor


def test_ticks_of_counts_are_whole_and_those_of_a_log_axis_powers():
    assert [label for _, label in chart.axis([0, 2], 5, whole=True).ticks] == ["0", "1", "2"]
    assert [value for value, _ in chart.axis([0.02, 300], 5, log=True).ticks] == pytest.approx([0.01, 0.1, 1, 10, 100, 1000])


def test_a_gap_breaks_a_line_and_a_lone_point_stays_visible():
    nan = float("nan")
    assert chart.stretches([0, 1, 2, 3, 4], [1.0, None, 2.0, nan, 3.0]) == [[0], [2], [4]]
    series = chart.Series("a", [0, 1, 2], [1.0, nan, 2.0], [0.5, nan, 1.5], [1.5, nan, 2.5])
    made = chart.svg(chart.Chart("title", "x", [series]), 430, 230)
    assert made.count("h0") == 4  # as lines and as dots
    assert "nan" not in made


def test_long_curves_are_averaged_and_the_page_stays_small(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"rollout/m{i}" for i in range(30)]
    lines = [
        {"step": n, "phase": "rl", "phase_step": n, "time_s": n, "train/loss": float(n)} | dict(zip(names, rng.normal(size=30)))
        for n in range(1, 4991)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    started = time.process_time()
    page = written(tmp_path / "out.html", folder)
    assert time.process_time() - started < 60  # not a matter of minutes
    loss = data_of(page)["charts"]["chart0"]["series"][0]
    assert len(loss["y"]) == 200
    assert loss["y"][0] == np.mean(range(1, 26))
    assert (loss["x"][-1], loss["y"][-1]) == (4983.0, 4983.0)  # of 4976 to 4990
    assert "mean of 25 lines per point" in page
    assert len(page.encode()) < 3_000_000


# --- the command and the end of a run ---


def command(*words):
    return subprocess.run([sys.executable, "-m", "jaxreason.report", *map(str, words)], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.process
def test_the_command_writes_a_page_and_pngs(tmp_path):
    pytest.importorskip("matplotlib")
    folder = write_run(tmp_path / "run")
    done = command(folder, "--png")
    assert done.returncode == 0, done.stderr
    paths = [line.removeprefix("wrote ") for line in done.stdout.splitlines()]
    assert paths[0] == str(folder / "report.html")
    pngs = sorted(folder.glob("report_*.png"))
    assert sorted(paths[1:]) == [str(path) for path in pngs]
    assert len(pngs) >= 3
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 100_000 for path in pngs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", "does not exist; needed: the folder of a run, which holds metrics.jsonl"),
        (lambda folder: folder, "holds no metrics.jsonl"),
        (lambda folder: write_run(folder / "run") / "metrics.jsonl", "is no folder"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as caught:
        report.write_report([make(tmp_path)], tmp_path / "out.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.html").exists()


@pytest.mark.process
def test_errors_of_the_command_are_one_line(tmp_path):
    run = write_run(tmp_path / "run")
    for words_, message in (((), "needed: one or more folders"), ((tmp_path,), "metrics.jsonl"), ((run, "--out=x.pdf"), ".html")):
        done = command(*words_)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_report_that_fails_only_warns(tmp_path, capsys):
    from jaxreason import main

    main.report(write_run(tmp_path / "run"))
    assert (tmp_path / "run" / "report.html").is_file()
    assert capsys.readouterr().out == ""
    main.report(tmp_path / "nothing")
    out = capsys.readouterr().out
    assert out.startswith("warning: no report.html: ValueError: ")
    assert len(out.splitlines()) == 1


# --- in a browser ---


@pytest.fixture
def browser():
    made = open_browser()
    made.implicitly_wait(20)  # events such as `toggle` come later
    yield made
    made.quit()


def visible_charts(browser):
    return [e for e in browser.find_elements("css selector", "[data-unit] figure") if e.is_displayed()]


@pytest.mark.slow
def test_a_page_in_a_browser(tmp_path, browser):
    from selenium.webdriver.common.keys import Keys

    folders = [write_run(tmp_path / name, lr=lr) for name, lr in (("a", 1), ("b", HOSTILE.replace("\ud800", "")))]
    written(tmp_path / "out.html", *folders)
    browser.get((tmp_path / "out.html").as_uri())
    assert browser.get_log("browser") == []
    (figure,) = visible_charts(browser)
    assert "since the start of phase rl" in figure.text
    assert "<script>alert(1)</script>" in browser.find_element("tag name", "body").text

    browser.find_element("css selector", "input[name=unit][value=flops]").send_keys(Keys.SPACE)
    browser.find_element("css selector", "input[name=range][value='2']").send_keys(Keys.ARROW_LEFT)  # to prior
    (figure,) = visible_charts(browser)
    assert "FLOPs since the start of phase prior" in figure.text

    svg = figure.find_element("css selector", "svg[tabindex]")
    svg.send_keys(Keys.END)
    read = figure.find_element("css selector", ".readout").text
    low, high = estimators.wilson(30, 120)
    assert f"0.25 [{low:.3f}, {high:.3f}]" in read.replace("\n", " ")
    figure.find_element("css selector", "details.numbers summary").send_keys(Keys.ENTER)
    rows = figure.find_elements("css selector", "tbody tr")
    assert len(rows) == 4  # two runs, two evaluations
    assert rows[1].text.split()[-4:] == ["1.6×10¹⁰", "0.25", f"{low:.4f}", f"{high:.4f}"]

    for width in (1400, 800):
        browser.set_window_size(width, 1000)
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_seeds_that_differ_by_the_same_have_no_interval():
    """One without width would say that the difference is certain."""

    from jaxreason.types import Evaluation

    def evaluated(accuracy):
        return Evaluation("rl", 4, "chain", accuracy, 0.0, 1.0, 20, 0.0)

    equal = paired.by_seed([(evaluated(0.5), evaluated(0.6)), (evaluated(0.4), evaluated(0.5))], ("a", "b"))
    assert (equal.low, equal.high, equal.p) == (None, None, 0.5)
    assert "all differences are equal" in equal.how
    other = paired.by_seed([(evaluated(0.5), evaluated(0.6)), (evaluated(0.4), evaluated(0.6))], ("a", "b"))
    assert other.low < other.difference < other.high
