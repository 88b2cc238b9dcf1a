"""Searches of a grid, driven by hand: runs that are resumed, failed, finished before
anybody looked, and arms that a sampler does not find. Grids in one line, and the
prediction of what runs need.
"""

import json
import random

import pytest
from runs import SMOKE, load_config, run_config

from jaxreason.sweep import Sweep, arms, over, predict, product, queue, search, zip_
from jaxreason.sweep.runs import SweepRun, make_runs, read_config

optuna = pytest.importorskip("optuna")

LRS = ["0.0003", "0.001", "0.003", "0.01"]
ONE_FIELD = over("rl.optimizer.lr", LRS)
BASE = {"rl.evaluate_every": "1"}


def end(run, values):
    """Write what a run leaves that was evaluated at each step."""
    run.folder.mkdir(parents=True, exist_ok=True)
    before = run.config["prior"]["steps"] if "prior" in run.config["phases"] else 0
    lines = [{"phase": "rl", "step": before + i + 1, "eval/chain/greedy/accuracy": value} for i, value in enumerate(values)]
    lines.append({"phase": "rl", "step": before + len(values), "rollout/reward": 1.0})  # a step that is not evaluated
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def drive(study, values_of, status="done", most=1000):
    """Execute what a search asks for; return arms and seeds, in order."""
    asked = []
    while len(asked) < most and (runs := study.more()):
        for run in runs:
            asked.append((run.arm, run.seed))
            end(run, values_of(run))
            study.finished(run, status)
    return asked


def begin(folder, made=ONE_FIELD, seeds=(0, 1), trials=100, pruner="none", kind="random", **more):
    sweep = Sweep(SMOKE, made, seeds=seeds, common=BASE)
    return search.Search(sweep, folder, search=kind, pruner=pruner, trials=trials, share=False, **more)


def state_of(study):
    return sorted(t.state.name for t in study.study.get_trials() if t.state.name != "FAIL")


@pytest.mark.parametrize("kind", ["random", "tpe"])
@pytest.mark.parametrize("count", [1, 30])
def test_all_arms_of_a_grid_are_found(tmp_path, kind, count):
    made = over("rl.optimizer.lr", [f"{i + 1}e-5" for i in range(count)])
    study = begin(tmp_path, made, seeds=(0,), kind=kind)
    assert sorted(drive(study, lambda run: [0.5, 0.5])) == sorted((arms.name_of(arm), 0) for arm in made)
    assert state_of(study) == ["COMPLETE"] * count


def test_the_last_arms_are_found_if_the_sampler_does_not_draw_them(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "DRAWS", 2)
    assert len(drive(begin(tmp_path, seeds=(0,)), lambda run: [0.5])) == len(LRS)


def test_a_search_that_was_killed_loses_and_repeats_no_trial(tmp_path):
    first = drive(begin(tmp_path), lambda run: [0.5, 0.5], most=3)  # the second arm has one of its seeds
    study = begin(tmp_path)
    again = drive(study, lambda run: [0.5, 0.5])
    assert again[0] == first[2]
    assert sorted(set(first + again)) == sorted((arms.name_of(arm), seed) for arm in ONE_FIELD for seed in (0, 1))
    assert state_of(study) == ["COMPLETE"] * len(LRS)


def test_the_queue_continues_behind_a_run_that_is_done(tmp_path, monkeypatch):
    """One worker, and a search that was killed between the seeds of an arm."""
    drive(begin(tmp_path), lambda run: [0.5, 0.5], most=1)
    study, state = begin(tmp_path), queue.State(tmp_path / "state.json")
    (tmp_path / "runs").mkdir(exist_ok=True)
    for path in (tmp_path / "runs").glob("*/*"):
        (path / "summary.json").write_text('{"done": true}')

    def launch(run, worker, log):
        end(run, [0.5, 0.5])
        (run.folder / "summary.json").write_text('{"done": true}')
        return type("Process", (), {"returncode": 0, "poll": lambda self: 0})()

    monkeypatch.setattr(queue, "POLL_S", 0.0)
    steps = {"more": study.more, "finished": study.finished, "launch": launch}
    queue.execute([], queue.make_workers(1), state, tmp_path, say=[].append, **steps)
    assert sum(one["status"] == "done" for one in state.runs.values()) == 2 * len(LRS)


def test_an_arm_that_failed_is_tried_again_by_the_next_call(tmp_path):
    failed = drive(begin(tmp_path), lambda run: [0.5], status="failed")
    assert len(failed) == len(LRS)  # each once
    assert len(drive(begin(tmp_path), lambda run: [0.5])) == 2 * len(LRS)


def test_a_run_without_an_evaluation_is_a_failure(tmp_path):
    study = begin(tmp_path)
    assert len(drive(study, lambda run: [None])) == len(LRS)
    assert not state_of(study)


def test_a_grid_that_gained_values_is_searched_whole(tmp_path):
    drive(begin(tmp_path), lambda run: [0.5])
    more = over("rl.optimizer.lr", [*LRS, "0.03"])
    assert ("rl.optimizer.lr=0.03", 0) in drive(begin(tmp_path, more), lambda run: [0.5])


def test_values_of_any_type_are_searched(tmp_path):
    """As an experiment's, which are no words: a tuple comes back from a file as a
    list.
    """
    made = over("evaluate.temperatures", [(0.0,), (0.0, 1.0)])
    drive(begin(tmp_path, made), lambda run: [0.5], most=1)
    assert len(drive(begin(tmp_path, made), lambda run: [0.5])) == 4


def test_arms_have_the_names_of_their_experiment(tmp_path):
    sweep = Sweep(SMOKE, ONE_FIELD, seeds=(0,), names=("p", "q", "r", "s"), common=BASE)
    study = search.Search(sweep, tmp_path, search="random", pruner="none", trials=9, share=False)
    assert {arm for arm, _ in drive(study, lambda run: [0.5])} == set("pqrs")


def test_arms_that_are_no_grid_are_not_searched(tmp_path):
    zipped = zip_(over("rl.optimizer.lr", LRS[:2]), over("rl.steps", ["1", "2"]))
    with pytest.raises(ValueError, match="--search chooses a value for each field; needed"):
        begin(tmp_path, zipped)


def test_a_wilcoxon_search_stops_arms_and_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"--pruner=wilcoxon got 4 seeds; needed: 5 or more"):
        begin(tmp_path, seeds=range(4), pruner="wilcoxon")
    stopped = []
    study = begin(tmp_path, seeds=range(6), pruner="wilcoxon", stop_arm=lambda run, reason: stopped.append((run.name, reason)))
    asked = drive(study, lambda run: [float(run.arm.partition("=")[2]) * (1 + run.seed / 10)])
    assert state_of(study).count("PRUNED") == len(stopped) > 0
    for name, reason in stopped:
        arm, _, seed = name.partition("/seed")
        assert (arm, 3) in asked
        assert (arm, int(seed)) not in asked
        assert "worse than the best arm on the same seeds" in reason


def halved(tmp_path, seeds=(0,)):
    """Search with halving; each run is looked at only once it has ended."""
    made = product(over("rl.optimizer.lr", LRS), over("prior.steps", ["4", "6"]), over("rl.steps", ["9"]))
    height = {arms.name_of(arm): random.Random(i).random() for i, arm in enumerate(made)}
    stopped = []
    study = begin(tmp_path, made, seeds, pruner="halving", stop_arm=lambda run, reason: stopped.append(run.arm))
    asked = drive(study, lambda run: [height[run.arm] * step for step in range(1, 10)])
    return study, asked, stopped, height


def test_arms_are_stopped_as_in_the_replay_if_their_runs_end_first(tmp_path):
    """Also where arms have priors of different lengths."""
    study, asked, stopped, height = halved(tmp_path, seeds=(0, 1))
    order = [arm for arm, seed in asked if seed == 0]
    kept, seen = [], {}
    for arm in order:
        for rung in (1, 2, 4, 8):
            values = seen.setdefault(rung, [])
            stays = search.best_so_far(values, height[arm] * rung, 2)
            values.append(height[arm] * rung)
            if not stays:
                break
        else:
            kept.append(arm)
    assert 0 < len(stopped) < len(order)
    assert [arm for arm in order if arm not in stopped] == kept == [arm for arm, seed in asked if seed == 1]
    assert {step for t in study.study.get_trials() for step in t.intermediate_values} <= set(range(1, 9))


def test_the_end_of_a_run_is_no_rung(tmp_path):
    study = begin(tmp_path, product(ONE_FIELD, over("rl.steps", ["2"])), seeds=(0,), pruner="halving")
    for value in (0.9, 0.1, 0.2):
        (run,) = study.more()
        end(run, [0.5, value])
        assert study.prune(run) == ""
        study.finished(run, "done")
    assert state_of(study) == ["COMPLETE"] * 3


def test_the_replay_decides_as_optuna():
    for seed in range(40):
        draw = random.Random(seed)
        first, factor, length = draw.choice([1, 5, 10]), draw.choice([2, 3, 4]), draw.choice([4, 8, 9, 16])
        names = [f"arm{i}" for i in range(draw.randint(1, 9))]
        curves = {name: [(first * k, draw.randint(0, 6) / 6, float(k)) for k in range(1, length + 1)] for name in names}
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=factor)
        study, ended, cost = optuna.create_study(direction="maximize", pruner=pruner), {}, 0.0
        for name, curve in curves.items():
            trial = study.ask()
            for step, value, used in curve[:-1]:
                trial.report(value, step)
                if trial.should_prune():
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                    cost += used
                    break
            else:
                ended[name] = curve[-1][1]
                study.tell(trial, ended[name])
                cost += curve[-1][2]
        assert search.replay_halving(curves, first=first, factor=factor) == (max(ended, key=ended.get), cost)


def test_a_run_of_another_arm_is_left_alone(tmp_path):
    study = begin(tmp_path)
    study.finished(SweepRun("x/seed0", "x", 0, (), tmp_path / "x", {}), "done")
    assert study.prune(SweepRun("x/seed0", "x", 0, (), tmp_path / "x", {})) == ""


# --- grids ---


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a=0..2,5", ["0", "1", "2", "5"]),
        ("a=0 .. 2", ["0", "1", "2"]),
        ("a=-3..-1", ["-3", "-2", "-1"]),
        ("a='0..2'", ["0..2"]),
        ("a=../x,x..y", ["../x", "x..y"]),
        ("a=None,True,''", ["None", "True", ""]),
        ("a==x", ["=x"]),
        (" a = 1 , 2 ; ; ", ["1", "2"]),
    ],
)
def test_ranges_and_values(text, values):
    assert [arm["a"] for arm in arms.parse_grid(text)[0]] == values


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr=1e-4..1e-3", "range 1e-4..1e-3; allowed: whole numbers; list other values"),
        ("lr=0.1..0.5,1", "range 0.1..0.5; allowed: whole numbers"),
        ("seed=0..1000000000", "1,000,000,001 values; allowed: 10,000"),
        ("a=0..999; b=0..999", "--grid has 1,000,000 arms; allowed: 10,000"),
    ],
)
def test_grids_that_nobody_meant(text, said):
    with pytest.raises(ValueError, match=r".") as caught:
        arms.parse_grid(text)
    assert said in str(caught.value)


def test_seeds_may_be_ranges_and_numbers():
    assert arms.parse_grid("seed=0..2,5") == ([{}], (0, 1, 2, 5))


def test_arms_that_are_one_config_are_refused(tmp_path):
    """Their runs would be equal, and a test of them would say nothing."""
    with pytest.raises(ValueError, match=r"the arms 'base' and 'rl.steps=2' are the same config; allowed: arms that differ"):
        make_runs(Sweep(SMOKE, [{}, {"rl.steps": "2"}], seeds=(0, 1)), tmp_path)  # as in the config


# --- predictions ---


def test_a_run_takes_no_more_flops_than_predicted(tmp_path):
    """With several samples, a reference and an own suite of temperatures."""
    suite = {"name": "chain", "ops": 2, "samples": 3, "temperatures": (0.0, 1.0, 0.5)}
    config = load_config(
        "tiny", "smoke", **{"evaluate.suites": {"own": suite}, "rl.objective": {"name": "grpo", "kl_coefficient": 0.1}}
    )
    found = run_config(config, tmp_path)["ledger"]
    used = sum(kind["flops"] for kind in found.values())
    words = {"evaluate.suites": repr({"own": suite}), "rl.objective": repr({"name": "grpo", "kl_coefficient": 0.1})}
    at_most = predict.flops_at_most(read_config(SMOKE, words))
    assert 0.2 * at_most < used <= at_most


@pytest.mark.parametrize("field", ["rl.source.problems", "rl.source.group", "prior.source.rows"])
def test_any_number_of_rows_is_predicted_without_a_list_of_them(field):
    few, many = (predict.flops_at_most(read_config(SMOKE, {field: str(rows)})) for rows in (8, 2**32 - 1))
    assert few < many < float("inf")
    assert predict.flops_unrecorded(read_config(SMOKE, {field: str(2**32 - 1)})) <= many


def test_predictions_count_samples_references_texts_and_the_phases_before_a_stop():
    def flops(stop_after=None, **fields):
        return predict.flops_at_most(read_config(SMOKE, fields), stop_after)

    base = flops()
    suites = "{'a': {'name': 'chain', 'ops': 2, 'samples': 4}}"
    alone = "{'a': {'name': 'chain', 'ops': 2}}"
    assert flops(**{"evaluate.suites": suites}) > flops(**{"evaluate.suites": alone})
    assert flops(**{"rl.objective.kl_coefficient": "0.1"}) > base
    assert flops(**{"evaluate.texts": "{'t': {'task': {'name': 'chain', 'ops': 2}, 'length': 64}}"}) > base
    assert flops(**{"evaluate.texts": "{'t': {'task': {'name': 'chain', 'ops': 2}}}"}) is None  # it needs a length
    assert flops("prior") < base
    assert flops("rl") == base


def test_work_that_is_in_no_record_is_bounded_by_the_interval_of_the_log():
    def flops(stop_after=None, **fields):
        config = read_config(SMOKE, {"prior.steps": "100", "rl.steps": "100", **fields})
        return predict.flops_unrecorded(config, stop_after), predict.flops_at_most(config, stop_after)

    (often, whole), (rarely, _) = flops(**{"rl.log_every": "1"}), flops(**{"rl.log_every": "50"})
    assert 0 < often < rarely < whole
    assert flops(**{"rl.log_every": "50"}, stop_after="prior") == flops(**{"rl.log_every": "1"}, stop_after="prior")
    assert flops(**{"rl.log_every": "1000"})[0] <= whole
    assert flops(**{"evaluate.texts": "{'t': {'task': {'name': 'chain', 'ops': 2}}}"}) == (None, None)


def test_shared_phases_count_once_in_the_flops_of_a_sweep(tmp_path):
    two = Sweep(SMOKE, over("rl.objective.name", ["rloo", "grpo"]), seeds=(0,))
    total = {}
    for share in (True, False):
        runs = make_runs(two, tmp_path, share)
        total[share] = predict.flops_left(runs, predict.needs(runs))
    prior = predict.flops_at_most(make_runs(two, tmp_path, False)[0].config, "prior")
    assert total[True] == pytest.approx(total[False] - prior)
    unknown = {run.name: predict.Need(None) for run in runs}
    assert predict.flops_left(runs, unknown) is None


def test_an_arm_that_was_not_run_needs_its_own_flops(tmp_path):
    """Not those of an arm that has a quarter of its steps."""
    runs = make_runs(Sweep(SMOKE, over("rl.steps", ["1", "40"]), seeds=(0, 1)), tmp_path)
    done = next(run for run in runs if run.name == "rl.steps=1/seed0")
    done.folder.mkdir(parents=True)
    ledger = {"learn": {"flops": 1e6, "joules": 2.0}}
    (done.folder / "summary.json").write_text(json.dumps({"done": True, "ledger": ledger, "wall_s": 3.0}))
    needs = predict.needs(runs)
    assert (needs[done.name].flops, needs["rl.steps=1/seed1"].flops) == (1e6, 1e6)
    assert not needs["rl.steps=1/seed1"].by_formula
    longer = needs["rl.steps=40/seed0"]
    assert longer.by_formula
    assert longer.flops > 1e7
    assert longer.wall_s == 3.0
    trunk = next(run for run in runs if run.stop_after)
    assert needs[trunk.name].flops < longer.flops
