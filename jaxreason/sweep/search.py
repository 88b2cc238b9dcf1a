"""Search within a budget: optuna chooses arms, and stops those that do worse than
others did.

    random, tpe     arms are drawn from the values of the grid's fields
    halving         an arm stops at a rung of its first seed if it is not among the best
                    there (Li et al. 2018, arXiv 1810.05934)
    wilcoxon        an arm gets no further seeds once those that it has are worse than
                    the best arm's on the same seeds (p below 0.1: from the fourth on)

The study is a file in the folder of the sweep, so nothing is lost if the sweep is
killed. An arm that was stopped early is recorded with the reason, and is in no test. An
arm that failed is tried again by the next call.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxreason.options import unknown_name_message
from jaxreason.runtime.workdir import last_metrics
from jaxreason.sweep.arms import Sweep, named_arms, word_of
from jaxreason.sweep.results import is_grid, name_metric, parse_metric
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
    unit, equals, amount = text.partition("=")
    if not equals:
        raise ValueError(f"--budget got {text!r}; allowed: UNIT=AMOUNT, as flops=1e15; units: {', '.join(UNITS)}")
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
    `stop_arm(run, reason)` is told the run that an arm did not get.
    """

    def __init__(
        self,
        sweep: Sweep,
        folder: Path,
        *,
        search: str,
        pruner: str,
        trials: int,
        share: bool = True,
        machine: str = "",
        stop_arm: Callable[[SweepRun, str], None] = lambda run, reason: None,
    ):
        import optuna

        if search not in SEARCHES:
            raise ValueError(unknown_name_message("search", search, SEARCHES))
        if pruner not in PRUNERS:
            raise ValueError(unknown_name_message("pruner", pruner, PRUNERS))
        self.arms = {name: {field: word_of(value) for field, value in arm.items()} for name, arm in named_arms(sweep).items()}
        if any(self.arms.values()) and not is_grid(self.arms):
            raise ValueError(
                "--search chooses a value for each field; needed: arms that are all combinations of values, as of --grid"
            )
        self.fields = {
            field: list(dict.fromkeys(arm[field] for arm in self.arms.values())) for field in next(iter(self.arms.values()))
        }
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.folder, self.trials, self.pruner = sweep, folder, trials, pruner
        self.share, self.machine, self.stop_arm = share, machine, stop_arm
        config = make_runs(sweep._replace(seeds=sweep.seeds[:1]), folder, share=False)[0].config
        every = config[config["phases"][-1]]["evaluate_every"]
        if pruner == "halving" and not every:
            raise ValueError(f"--pruner=halving stops runs at evaluations; set --config.{config['phases'][-1]}.evaluate_every")
        if pruner == "wilcoxon" and len(sweep.seeds) <= FIRST_WILCOXON:
            raise ValueError(
                f"--pruner=wilcoxon got {len(sweep.seeds)} seeds; needed: {FIRST_WILCOXON + 1} or more, since the test finds "
                f"nothing from fewer than {FIRST_WILCOXON}; or choose halving"
            )
        self.study, under_way = open_study(folder / "study.log", self.fields, search, pruner, every)
        self.open = {self._arm(seen): trial for seen, trial in under_way}
        self.values: dict[str, list[float]] = {arm: [] for arm in self.open}
        self.queue = [(arm, 0) for arm in self.open]
        self.reported = {self._arm(seen): set(seen.intermediate_values) for seen, _ in under_way}  # steps, or seeds
        self.failed: set[str] = set()  # in this call

    def _arm(self, trial) -> str:
        """The name of the arm that a trial drew."""
        drawn = {field: trial.params[field] for field in self.fields}
        return next(name for name, arm in self.arms.items() if arm == drawn)

    def _runs(self, name: str, index: int) -> list[SweepRun]:
        """An arm's run with a seed, behind the one that trains what it shares."""
        made = make_runs(self.sweep._replace(seeds=[self.sweep.seeds[index]]), self.folder, self.share, self.machine)
        (found,) = (run for run in made if run.stop_after is None and run.arm == name)
        return [*(run for run in made if run.folder == found.shared and not run.is_done()), found]

    def more(self) -> list[SweepRun]:
        """The next run: of an arm that waits for its next seed, or of a new arm."""
        if not self.queue and not self._ask():
            return []
        return self._runs(*self.queue.pop(0))

    def _ask(self) -> bool:
        """Begin a trial of an arm that had none; False if there is no more."""
        trials = [t for t in self.study.get_trials(deepcopy=False) if t.state != self._states().FAIL]
        tried = {self._arm(t) for t in trials if self.fields.keys() <= t.params.keys()} | self.failed
        if len(tried) >= min(self.trials, len(self.arms)):
            return False
        for draw in range(DRAWS):
            if draw == DRAWS - 1:  # few are left, and the sampler does not find them
                self.study.enqueue_trial(next(arm for name, arm in self.arms.items() if name not in tried))
            trial = self.study.ask()
            for field, values in self.fields.items():
                trial.suggest_categorical(field, values)
            if (name := self._arm(trial)) not in tried:
                self.open[name], self.values[name] = trial, []
                self.reported.pop(name, None)
                self.queue.append((name, 0))
                return True
            self.study.tell(trial, state=self._states().FAIL)  # drawn before: it says nothing new
        raise AssertionError("an arm that was not tried was asked for")

    @staticmethod
    def _states():
        from optuna.trial import TrialState

        return TrialState

    def prune(self, run: SweepRun) -> str:
        """Why a run is to be stopped: it is not among the best at one of its rungs.

        The end of a run is no rung: nothing is saved by stopping it there.
        """
        trial = self.open.get(run.arm)
        if trial is None or self.pruner != "halving" or run.seed != self.sweep.seeds[0] or run.stop_after:
            return ""
        seen, end = self.reported.setdefault(run.arm, set()), run.config[run.config["phases"][-1]]["steps"]
        for step, value in self.curve(run):
            if step in seen or step >= end:
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
        *before, last = run.config["phases"]
        start = sum(run.config[name]["steps"] for name in before)
        found = [(line["step"] - start, line.get(metric)) for line in lines if line.get("phase") == last]
        return [(step, value) for step, value in found if isinstance(value, int | float)]

    def finished(self, run: SweepRun, status: str) -> None:
        """Record the end of a run: its arm gets the next seed, or its trial a value.

        A run may end before anybody looks at its rungs. They are recorded then, and
        decide whether its arm gets further seeds.
        """
        trial = self.open.get(run.arm)
        if trial is None or run.stop_after:
            return
        curve = self.curve(run)
        if status not in ("done", "pruned") or (status == "done" and not curve):
            self.failed.add(run.arm)  # not to be tried again in this call
            self._end(run, self._states().FAIL)
            return
        index = list(self.sweep.seeds).index(run.seed)
        reason = self.prune(run) if status == "done" else "pruned"
        if status == "done":
            self.values[run.arm].append(curve[-1][1])
        if status == "done" and self.pruner == "wilcoxon":
            if index not in (seen := self.reported.setdefault(run.arm, set())):
                seen.add(index)
                trial.report(self.values[run.arm][-1], index)
            reason = "worse than the best arm on the same seeds (Wilcoxon)" if trial.should_prune() else ""
        if index + 1 == len(self.sweep.seeds) and status == "done":
            self._end(run, self._states().COMPLETE, statistics.fmean(self.values[run.arm]))
        elif reason:
            if status == "done":
                self.stop_arm(self._runs(run.arm, index + 1)[-1], reason)
            self._end(run, self._states().PRUNED)
        else:
            self.queue.insert(0, (run.arm, index + 1))

    def _end(self, run: SweepRun, state, value: float | None = None) -> None:
        self.study.tell(self.open.pop(run.arm), value, state=state)


DRAWS = 100  # of the sampler, for an arm that it did not draw before
FIRST_WILCOXON = 4  # seeds: the lowest p of three pairs is 0.125, that of four 0.0625


def open_study(file: Path, fields: Mapping[str, Sequence[str]], search: str, pruner: str, every: int):
    """Open the study of these fields in a file, or begin it; return it, and the trials
    of an earlier call that are under way.

    optuna can't change the values of a field within a study, so a grid that gained some
    has another one. The runs that are done count in it as soon as it draws their arms.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    pruners = {
        "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=every, reduction_factor=2),
        "wilcoxon": optuna.pruners.WilcoxonPruner,
        "none": optuna.pruners.NopPruner,
    }
    samplers = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    storage, name = JournalStorage(JournalFileBackend(str(file))), f"sweep {json.dumps(fields, sort_keys=True)}"
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        direction="maximize",
        sampler=samplers[search](seed=0),
        pruner=pruners[pruner](),
        load_if_exists=True,
    )
    under_way = []
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        if fields.keys() <= trial.params.keys():
            number = storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(name), trial.number)
            under_way.append((trial, optuna.trial.Trial(study, number)))
    return study, under_way


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
