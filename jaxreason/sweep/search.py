"""Search within a budget: optuna chooses arms, and stops those that do worse than
others did.

    random, tpe     arms are drawn from the values of the grid's fields
    halving         a run stops at a rung if it is not among the best there (Li et al.
                    2018, arXiv 1810.05934)
    wilcoxon        an arm gets no further seeds once those that it has are worse than
                    the best arm's on the same seeds

The study is a file in the folder of the sweep, so nothing is lost if the sweep is
killed. An arm that was stopped early is recorded with the reason, and is in no test.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxreason.options import unknown_name_message
from jaxreason.sweep.arms import Sweep, name_of
from jaxreason.sweep.progress import last_metrics
from jaxreason.sweep.results import name_metric, parse_metric
from jaxreason.sweep.runs import SweepRun, make_runs

SEARCHES = ("random", "tpe")
PRUNERS = ("halving", "wilcoxon", "none")
UNITS = ("steps", "flops", "device_s", "joules")


def parse_budget(text: str | None) -> tuple[str, float] | None:
    """Read `flops=1e15` as a unit and an amount.

    Raises:
      ValueError: another unit, or an amount that is not above 0.
    """
    if text is None:
        return None
    unit, _, amount = text.partition("=")
    if unit not in UNITS:
        raise ValueError(unknown_name_message("unit of --budget", unit, UNITS))
    try:
        value = float(amount)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"--budget got {text!r}; allowed: {unit}=AMOUNT, above 0")
    return unit, value


def spent(runs: Sequence[SweepRun], unit: str) -> float:
    """Sum the use of a unit over runs; shared phases count once."""
    total = 0.0
    for run in runs:
        values, before = last_metrics(run.folder), last_metrics(run.shared) if run.shared else {}
        total += _used(values, unit) - (_used(before, unit) if values else 0.0)
    return total


def _used(values: Mapping[str, Any], unit: str) -> float:
    if unit == "steps":
        return float(values.get("step", 0))
    return sum(amount for name, amount in values.items() if name.partition("ledger/")[2].endswith(f"_{unit}"))


class Search:
    """A study of the arms of a grid: which arm is run next, and which run is stopped.

    An arm runs its seeds one after the other. What is maximised is its mean over seeds.
    """

    def __init__(
        self, sweep: Sweep, folder: Path, *, search: str, pruner: str, trials: int, share: bool = True, machine: str = ""
    ):
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        if search not in SEARCHES:
            raise ValueError(unknown_name_message("search", search, SEARCHES))
        if pruner not in PRUNERS:
            raise ValueError(unknown_name_message("pruner", pruner, PRUNERS))
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.folder, self.trials, self.pruner = sweep, folder, trials, pruner
        self.share, self.machine = share, machine
        config = make_runs(sweep._replace(seeds=sweep.seeds[:1]), folder, share=False)[0].config
        phases = [config[name] for name in config["phases"]]
        self.start, every = sum(phase["steps"] for phase in phases[:-1]), phases[-1]["evaluate_every"]
        if pruner == "halving" and not every:
            raise ValueError(f"--pruner=halving stops runs at evaluations; set --config.{config['phases'][-1]}.evaluate_every")
        if pruner == "wilcoxon" and len(sweep.seeds) < 2:
            raise ValueError("--pruner=wilcoxon compares arms over their seeds; give it two or more, or choose halving")
        pruners = {
            "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=every, reduction_factor=2),
            "wilcoxon": optuna.pruners.WilcoxonPruner,
            "none": optuna.pruners.NopPruner,
        }
        samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / "study.log"))),
            study_name="sweep",
            direction="maximize",
            sampler=samplers[search](seed=0),
            pruner=pruners[pruner](),
            load_if_exists=True,
        )
        self.fields = {field: list(dict.fromkeys(arm[field] for arm in sweep.arms)) for field in sweep.arms[0]}
        under_way = self.study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
        self.open = {self._arm(t): optuna.trial.Trial(self.study, t._trial_id) for t in under_way}  # of a call that was stopped
        self.values: dict[str, list[float]] = {arm: [] for arm in self.open}
        self.queue = [(arm, 0) for arm in self.open]
        self.reported = {self._arm(t): set(t.intermediate_values) for t in under_way}  # steps

    def _arm(self, trial) -> str:
        return name_of({field: trial.params[field] for field in self.fields})

    def more(self) -> list[SweepRun]:
        """The next run: of an arm that waits for its next seed, or of a new arm."""
        if not self.queue and not self._ask():
            return []
        name, index = self.queue.pop(0)
        arm = {field: self.open[name].params[field] for field in self.fields}
        one = self.sweep._replace(arms=[arm], seeds=[self.sweep.seeds[index]])
        trunk_and_run = make_runs(self.sweep._replace(seeds=one.seeds), self.folder, self.share, self.machine)
        found = [run for run in trunk_and_run if run.stop_after is None and run.arm == name]
        shared = [run for run in trunk_and_run if run.folder == found[0].shared and not run.is_done()]
        return [*shared, *found]

    def _ask(self) -> bool:
        """Begin a trial of an arm that had none; False if there is no more."""
        tried = {self._arm(t) for t in self.study.get_trials(deepcopy=False) if self.fields.keys() <= t.params.keys()}
        if len(tried) >= min(self.trials, len(self.sweep.arms)):
            return False
        for _ in range(100):
            trial = self.study.ask()
            for field, values in self.fields.items():
                trial.suggest_categorical(field, values)
            if (name := self._arm(trial)) not in tried:
                self.open[name], self.values[name] = trial, []
                self.queue.append((name, 0))
                return True
            self.study.tell(trial, state=self._states().FAIL)  # drawn before: it says nothing new
        return False

    @staticmethod
    def _states():
        from optuna.trial import TrialState

        return TrialState

    def prune(self, run: SweepRun) -> str:
        """Why a run is to be stopped: it is not among the best at one of its rungs."""
        trial = self.open.get(run.arm)
        if trial is None or self.pruner != "halving" or run.seed != self.sweep.seeds[0] or run.stop_after:
            return ""
        seen = self.reported.setdefault(run.arm, set())
        for step, value in self.curve(run):
            if step in seen:
                continue
            seen.add(step)
            trial.report(value, step)
            if trial.should_prune():
                return f"not among the best at step {step} of the last phase, with {value:.3f}"
        return ""

    def curve(self, run: SweepRun) -> list[tuple[int, float]]:
        """Steps of the last phase and accuracies, at its evaluations so far."""
        metric = name_metric(*parse_metric(self.sweep.metric, run.config))
        lines = []
        path = run.folder / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with contextlib.suppress(ValueError):  # the last may not be whole yet
                lines.append(json.loads(line))
        last = run.config["phases"][-1]
        return [(line["step"] - self.start, line[metric]) for line in lines if line.get("phase") == last and metric in line]

    def finished(self, run: SweepRun, status: str) -> None:
        """Record the end of a run: its arm gets the next seed, or its trial a value."""
        trial = self.open.get(run.arm)
        if trial is None or run.stop_after:
            return
        if status != "done":
            state = self._states().PRUNED if status == "pruned" else self._states().FAIL
            self.study.tell(trial, state=state)
            del self.open[run.arm]
            return
        index = list(self.sweep.seeds).index(run.seed)
        self.values[run.arm].append(self.curve(run)[-1][1])
        if self.pruner == "wilcoxon":
            trial.report(self.values[run.arm][-1], index)
        if index + 1 < len(self.sweep.seeds) and not (self.pruner == "wilcoxon" and trial.should_prune()):
            self.queue.insert(0, (run.arm, index + 1))
            return
        state = self._states().COMPLETE if index + 1 == len(self.sweep.seeds) else self._states().PRUNED
        values = statistics.fmean(self.values[run.arm]) if state == self._states().COMPLETE else None
        self.study.tell(trial, values, state=state)
        del self.open[run.arm]


# --- a search on runs that were made ---


def best_so_far(values: Sequence[float], value: float, factor: int) -> bool:
    """Tell whether a value is among the best 1 / factor of those that reached its rung,
    itself included; at least one always is.
    """
    kept = max(1, (len(values) + 1) // factor)
    return sum(other > value for other in values) < kept


def replay_halving(curves: Mapping[str, Sequence[tuple[int, float, float]]], *, first: int, factor: int = 2) -> tuple[str, float]:
    """Replay asynchronous successive halving on the curves of finished runs, in their
    order, one at a time.

    A curve has (step, value, cost so far) at each evaluation. Rungs are at `first`,
    `first * factor`, ... steps. Return the arm with the best value among those that
    were not stopped, and the cost of all.
    """
    seen: dict[int, list[float]] = {}
    finished, cost = {}, 0.0
    for arm, curve in curves.items():
        for step, value, used in curve[:-1]:
            if not _is_rung(step, first, factor):
                continue
            stays = best_so_far(seen.get(step, []), value, factor)
            seen.setdefault(step, []).append(value)
            if not stays:
                cost += used
                break
        else:
            finished[arm] = curve[-1][1]
            cost += curve[-1][2]
    return max(finished, key=finished.get), cost


def _is_rung(step: int, first: int, factor: int) -> bool:
    rung = first
    while rung < step:
        rung *= factor
    return rung == step
