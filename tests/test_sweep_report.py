"""Reports of sweeps that a sceptic would write: odd numbers of seeds and problems,
damaged summaries, hostile names, arms that are no grid.
"""

import json
import math
import re
import shlex

import numpy as np
import pytest
from runs import METRIC, result, written

from jaxreason import estimators
from jaxreason.sweep import __main__, over, product, report, results, zip_


def arm_of(name, values, **more):
    return {seed: result(name, seed, value, **more) for seed, value in enumerate(values)}


def made_report(tmp_path, values, arms=None, seeds=None, **more):
    states = written(tmp_path, values)
    seeds = range(max(map(len, values.values()))) if seeds is None else seeds
    return report.make_report(tmp_path, arms or {name: {} for name in values}, tuple(seeds), METRIC, states, **more)


# --- tests and intervals ---


def test_differences_that_are_equal_for_all_seeds_are_not_certain(tmp_path):
    """Two equal differences are no proof, and an interval without width is none."""
    values = {"base": (0.5, 0.6), "above": (0.6, 0.7), "alike": (0.5, 0.6)}
    made = made_report(tmp_path, values)
    for c in made.comparisons:
        assert math.isinf(c.low)
    assert [c.p for c in made.comparisons] == [0.5, 1.0]
    text = report.write_report(made, tmp_path)
    assert "- above is not shown to differ from base (+10.0 points), no interval, corrected p 1, n = 2 paired seeds" in text
    assert "as all differences are equal" in text
    assert "+10.0 to +10.0" not in text
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity


def test_an_arm_whose_seeds_are_equal_has_no_interval_over_them(tmp_path):
    text = report.markdown(made_report(tmp_path, {"base": (0.5, 0.6), "ones": (1.0, 1.0)}), tmp_path)
    assert "| ones | 2 | 1.000 | [all seeds equal] | [0.981, 1.000] |" in text


def test_intervals_of_accuracies_end_at_0_and_1():
    def runs(arm: str, *values: float) -> dict[int, results.Result]:
        rest = {"flops": 1.0, "device_s": 1.0, "joules": 0.0, "wall_s": 1.0, "code": ""}
        return {seed: results.Result(arm, seed, value, 0.0, 1.0, 10, "", **rest) for seed, value in enumerate(values)}

    good, bad = runs("a", 0.9, 1.0), runs("b", 0.1, 0.0)
    assert results.summarise("a", list(good.values())).over_seeds == (pytest.approx(0.3147, abs=1e-4), 1.0)
    found = results.compare(good, bad, "a", "b")
    assert (found.low, found.high) == (pytest.approx(-0.3706, abs=1e-4), 1.0)


def test_one_seed_whose_verdicts_are_alike_has_an_interval():
    same = results.compare(arm_of("b", (1.0,)), arm_of("a", (1.0,)), "b", "a")
    assert same.low < -0.005 < 0.005 < same.high
    few = results.compare(arm_of("b", (1.0,), n=3), arm_of("a", (0.0,), n=3), "b", "a")
    assert few.low < few.difference <= few.high == 1


def test_one_seed_has_its_corrected_p_in_its_sentence():
    base = {0: result("a", 0, 0.5, verdicts="1" * 100 + "0" * 100)}
    arms = [results.compare({0: result(n, 0, 0.54, verdicts="1" * 108 + "0" * 92)}, base, n, "a") for n in "bcdefghi"]
    (first, *_) = results.corrected(arms)
    assert first.p < 0.01
    assert "not shown to differ" in report.sentence(first, None)
    assert f"corrected p {first.corrected:.2g} (one seed: McNemar" in report.sentence(first, None)


def test_samples_of_one_problem_are_no_problems():
    """Four samples of each of 50 problems, alike: nothing is known of 200 problems."""
    verdicts = {"a": "0" * 100 + "1" * 100, "b": "0" * 80 + "1" * 120}
    a, b = (result(name, 0, letters.count("1") / 200, 50, letters)._replace(samples=4) for name, letters in verdicts.items())
    assert a.correct_NK().shape == (50, 4)
    c = results.compare({0: b}, {0: a}, "b", "a")
    assert c.p > 0.01  # McNemar's test of 200 gave 2e-6
    low, high = results.problems_interval([a])
    assert (low, high) == pytest.approx(estimators.wilson(25, 50), abs=0.01)
    assert results.compare({0: b._replace(samples=3)}, {0: a}, "b", "a").p == 1  # nothing to pair


def test_seeds_that_are_needed_are_more_than_there_were():
    """Also after the correction for the number of arms."""
    draw = np.random.default_rng(0)
    for _ in range(50):
        made = [results.over_seeds(f"{i}", "a", dict(enumerate(draw.normal(0.5, 0.5, 5)))) for i in range(4)]
        for c in results.corrected(made):
            assert c.corrected < 0.05 or c.needed is None or c.needed > 5


def test_the_cheapest_of_equal_arms_is_in_front_and_equals_are_all(tmp_path):
    def arm(name, mean, flops):
        return results.ArmSummary(name, (0,), mean, (0, 1), (0, 1), flops, 0.0, 0.0, 0.0)

    arms = [arm("a", 0.5, 1.0), arm("b", 0.5, 1.0), arm("c", 0.5, 2.0), arm("d", 0.6, 2.0), arm("e", 0.1, 3.0)]
    assert results.pareto(arms) == ["a", "b", "d"]


# --- fields ---


def test_an_effect_that_changes_its_sign_with_other_fields_says_so():
    made = dict(zip("abcd", product(over("x", ["1", "2"]), over("y", ["1", "2"])), strict=True))
    noise = np.array([0, 0.01, -0.01, 0.005, 0])
    values = {"a": 0.5, "b": 0.7, "c": 0.7, "d": 0.5}
    found = {name: arm_of(name, value + noise * (1 + ord(name) % 3)) for name, value in values.items()}
    x, _ = results.field_effects(made, found)
    assert x.settings == 2
    assert x.settings_range == pytest.approx((-0.2, 0.2), abs=0.02)
    said = report.sentence(x, None, of_field=True)
    assert re.search(r"on average over 2 settings of the other fields, in which it differs by -\d+\.\d to \+\d+\.\d", said)
    del found["d"][0]
    assert results.field_effects(made, found)[0].seeds == (1, 2, 3, 4)
    found["d"].clear()
    assert results.field_effects(made, found)[0].settings == 1


def test_arms_that_are_no_grid_are_all_in_a_sentence(tmp_path):
    zipped = zip_(over("x", ["1", "2"]), over("y", ["1", "2"]))
    made = made_report(tmp_path, {"a": (0.5, 0.6), "b": (0.6, 0.71)}, dict(zip("ab", zipped, strict=True)))
    assert not made.effects
    assert not made.is_grid
    assert "- b is " in report.markdown(made, tmp_path)
    assert results.is_grid(dict(enumerate(product(over("x", "12"), over("y", "123")))))
    assert not results.is_grid(dict(enumerate([*zipped, {"x": "1"}])))
    assert not results.is_grid({"base": {}})


@pytest.mark.parametrize("value", ["", "it's", "a=b", "x|y", "<b>"])
def test_values_of_fields_are_said_as_they_are(value):
    made = {"a": {"f": "1"}, "b": {"f": value}}
    (c,) = results.field_effects(made, {"a": arm_of("a", (0.5, 0.6)), "b": arm_of("b", (0.6, 0.8))})
    said = {"": "''", "x|y": "x\\|y", "<b>": "&lt;b>"}.get(value, value)
    assert report.sentence(c, None, of_field=True).startswith(f"f: {said} is not shown to differ from 1 (")


# --- runs that are missing, damaged or asked something else ---


@pytest.mark.parametrize(
    "change",
    [
        {"evaluations": None},
        {"evaluations": [{"suite": "chain"}]},
        {"evaluations": [3]},
        {"ledger": {"learn": {"flops": None, "device_s": 1.0, "joules": 0.0}}},
        {"ledger": {"learn": {"flops": math.nan, "device_s": 1.0, "joules": 0.0}}},
        {"ledger": []},
        {"wall_s": math.inf},
        {"accuracy": None},
        {"accuracy": math.nan},
        {"accuracy": 1.5},
        {"n": None},
    ],
)
def test_a_damaged_summary_is_a_missing_run(tmp_path, change):
    states = written(tmp_path, {"a": (0.5, 0.6), "b": (0.6, 0.7)})
    path = tmp_path / "runs" / "b" / "seed1" / "summary.json"
    summary = json.loads(path.read_text())
    for name, value in change.items():
        (summary if name in summary else summary["evaluations"][-1])[name] = value
    path.write_text(json.dumps(summary))
    made = report.make_report(tmp_path, {"a": {}, "b": {}}, (0, 1), METRIC, states)
    assert made.missing["b/seed1"].startswith("done, but its summary.json is damaged (")
    assert made.comparisons[0].seeds == (0,)
    report.write_report(made, tmp_path)
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)


def test_a_run_without_the_metric_says_so(tmp_path):
    states = written(tmp_path, {"a": (0.5,)})
    made = report.make_report(tmp_path, {"a": {}}, (0,), ("other", 0.7), states)
    assert made.missing == {"a/seed0": "done, but it has no eval/other/t0.7/accuracy"}
    assert "No run is done." in report.write_report(made, tmp_path)


def test_a_baseline_without_runs_is_said(tmp_path):
    text = report.markdown(made_report(tmp_path, {"base": (None, None), "b": (0.6, 0.7)}), tmp_path)
    assert "- No run of the baseline base is done, so no arm is compared with it." in text
    assert "- Not in the table: base/seed0, 1 (failed: exit 1: it went wrong)." in text


def test_a_hundred_arms_that_wait_are_one_line(tmp_path):
    values = {"base": (0.5, 0.6)} | {f"arm{i}": () for i in range(100)}
    made = made_report(tmp_path, values)
    text = report.markdown(made, tmp_path)
    assert "- Not in the table: runs of 100 arms (waiting); report.json names them." in text
    assert len(text.splitlines()) < 20
    assert len(made.missing) == 200


def test_arms_that_were_asked_other_problems_are_flagged(tmp_path):
    arms = {"a": {"evaluate.suites.chain.ops": "5"}, "b": {"evaluate.suites.chain.ops": "2"}}
    made = made_report(tmp_path, {"a": (0.5, 0.6), "b": (0.6, 0.7)}, arms)
    assert "- Accuracies may be of different problems: arms set evaluate.suites.chain.ops." in report.markdown(made, tmp_path)
    counts = report.asked_apart({"a": {}, "b": {"x": 1}}, {"a": arm_of("a", (0.5,), n=100), "b": arm_of("b", (0.5,), n=200)})
    assert counts == ["runs were asked 100, 200 problems"]
    assert not report.asked_apart({"a": {"evaluated": 1}}, {"a": arm_of("a", (0.5,))})


def test_what_a_failed_run_printed_stays_in_its_line(tmp_path):
    states = written(tmp_path, {"a": (0.5,), "b": (None,)})
    states["b/seed0"]["reason"] = "exit 1:\n# heading | <img src=x> `code`"
    made = report.make_report(tmp_path, {"a": {}, "b": {}}, (0,), METRIC, states)
    assert "- Not in the table: b/seed0 (failed: exit 1: # heading \\| &lt;img src=x> \\`code\\`)." in report.markdown(
        made, tmp_path
    )


# --- what was run ---


def test_the_report_says_what_was_run_and_measured(tmp_path):
    made = made_report(tmp_path, {"a": (0.5, 0.6), "b": (0.6, 0.7)})
    made.setting = __main__.setting({"config": "configs/tiny.py:smoke", "common": {"phases": "('rl',)"}})
    text = report.markdown(made, tmp_path)
    assert shlex.split(re.search(r"- Config: `(.*)`\.", text)[1]) == ["--config=configs/tiny.py:smoke", "--config.phases=('rl',)"]
    assert "- Baseline: a. Code: " in text
    assert "at the end of each run, on 200 held-out problems." in text
    assert "*over seeds* by Student's t" in text


def test_fields_that_a_name_drops_are_in_the_report(tmp_path):
    """`grpo` against `rloo` in configs/tiny.py is also another loss aggregation."""
    made = made_report(tmp_path, {"a": (0.5, 0.6), "b": (0.6, 0.7), "c": (0.6, 0.8)})
    made.dropped = {"b": ["dropped x=1"], "c": ["dropped x=1"]}
    assert "- Not only the named field differs: dropped x=1 (2 arms, as b)." in report.markdown(made, tmp_path)


def test_the_report_of_a_search_warns_of_selection(tmp_path):
    states = written(tmp_path, {"a": (0.5, 0.6), "b": (0.6, 0.7), "c": (0.1,)})
    states["c/seed0"] |= {"status": "pruned", "reason": "not among the best at step 1"}
    made = report.make_report(tmp_path, {name: {} for name in "abcd"}, (0, 1), METRIC, states)
    assert "chosen" not in report.markdown(made, tmp_path)
    made.search = "tpe, pruner halving, budget flops=1e9"
    text = report.markdown(made, tmp_path)
    assert "Arms were chosen by a search (tpe, pruner halving, budget flops=1e9): 3 of 4 were tried, 1 was stopped early." in text
    assert "c/seed0 (stopped early: not among the best at step 1)" in text
    assert "c/seed1 (not run: its arm was stopped early)" in text
    assert "d/seed0, 1 (waiting)" in text


def test_accuracies_that_can_not_differ_are_said(tmp_path):
    said = "the metric can't tell the arms apart"
    assert said in report.markdown(made_report(tmp_path / "0", {"a": (0.0, 0.0), "b": (0.0, 0.0)}), tmp_path)
    assert said not in report.markdown(made_report(tmp_path / "1", {"a": (0.0, 0.0), "b": (1.0, 1.0)}), tmp_path)


# --- figures ---


def with_curves(tmp_path, names, phase="rl", seeds=(0,)):
    for i, name in enumerate(names):
        for seed in seeds:
            lines = [{"phase": phase, "step": step, "eval/chain/greedy/accuracy": step / (9 + i)} for step in (2, 4, 6)]
            path = tmp_path / "runs" / name / f"seed{seed}" / "metrics.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_figures_of_forty_arms_can_be_read(tmp_path):
    pytest.importorskip("matplotlib")
    names, said = [f"rl.optimizer.lr=0.00{i},rl.source.group={i}" for i in range(40)], []
    made = made_report(tmp_path, {name: (i / 40,) for i, name in enumerate(names)})
    with_curves(tmp_path, names)
    for path in report.draw_figures(made, tmp_path, "rl", said.append):
        assert path.stat().st_size < 100_000
    assert said == ["curves.png has the first 8 arms, without 32 others"]


def test_the_axis_of_flops_does_not_magnify_noise(tmp_path, monkeypatch):
    """FLOPs that differ by the lengths of a few samples are drawn as equal."""
    pytest.importorskip("matplotlib")
    from jaxreason.look import figures

    drawn = []
    monkeypatch.setattr(figures, "save", lambda axes, out: drawn.append(axes))
    made = made_report(tmp_path, {"a": (0.0, 0.1), "b": (0.1, 0.3)})
    for flops, scale in ((1.001e9, "linear"), (4e9, "log")):
        made.arms = [made.arms[0]._replace(flops=1e9), made.arms[1]._replace(flops=flops)]
        report.draw_pareto(made, tmp_path / "pareto.png")
        assert drawn[-1].get_xscale() == scale
        left, right = drawn[-1].get_xlim()
        assert right / left > 1.5
        low, high = drawn[-1].get_ylim()
        assert -0.03 < low < high < 1.03


def test_updates_are_whole_numbers_in_figures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from jaxreason.look import figures

    drawn = []
    monkeypatch.setattr(figures, "save", lambda axes, out: drawn.append(axes))
    figures.draw({"a": [{0: 0.0, 2: 0.5}]}, "eval/chain/greedy/accuracy", "updates", tmp_path / "curves.png")
    assert all(tick == int(tick) for tick in drawn[0].get_xticks())


def test_an_arm_without_curves_does_not_end_the_report(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    values = {"a": (0.5, 0.5), "no_file": (0.6, 0.7), "other_phase": (0.6, 0.8), "half": (0.1, 0.2)}
    made = made_report(tmp_path, values)
    with_curves(tmp_path, ["a", "half"], seeds=(0, 1))
    with_curves(tmp_path, ["other_phase"], "prior", (0, 1))
    with (tmp_path / "runs" / "half" / "seed0" / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "r')
    said = []
    assert [path.name for path in report.draw_figures(made, tmp_path, "rl", said.append)] == ["curves.png", "pareto.png"]
    assert [line.partition(" ")[0] for line in said] == ["no_file", "other_phase", "half"]
    mine = tmp_path / "mine.py"
    mine.write_text("def figures(folder, report):\n    raise KeyError('seeds')\n")
    assert not __main__.draw(made, tmp_path, "rl", f"{mine}:quick")
    assert "mine.py: KeyError: 'seeds'" in capsys.readouterr().err
    assert __main__.draw(made, tmp_path, "rl", "elsewhere.py")
