"""Warnings about a run that continues but may not learn, each given once per phase.

`Alarms.hear` gets every line of metrics. Its fields are JSON and part of a checkpoint,
so a run that resumes gives the same warnings as one that was never interrupted.
Thresholds are constants here, with the reason behind each; they were checked on runs of
configs/tiny.py that learned.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxreason.runtime.terminal import STABLE_KL

IN_A_ROW = 5  # lines for which a condition must hold: one batch may be unlucky
LEAST_ENTROPY = 0.02  # nats per token; below it nearly all attempts at a problem are one text
SOLVED = 0.9  # correct attempts, from which low entropy is what is wanted, and accuracy has little left to gain
MOST_CUT = 0.5  # of the attempts: above it most of the learning signal is about length
MOST_FAILED = 0.01  # of the verdicts: a verifier that fails more often distorts the reward
SPIKE, WINDOW, FEWEST = 10.0, 50, 10  # times the median norm of the last WINDOW lines, of FEWEST at least
RISE, FLAT = 0.1, 0.01  # of the reward since a suite was best, while its accuracy gained no more than FLAT
ENDS = 10  # lines over which rewards are averaged
# Of params that are older than those that learn, a KL above which the probability of a
# usual token has changed by more than exp(sqrt(2 x 0.1)) = 1.6 times, which every usual
# clip cuts off.
STALE_KL = 0.1


class Warning(NamedTuple):
    step: int
    phase: str
    name: str
    text: str


class Traits(NamedTuple):
    """Facts about a phase that the warnings depend on."""

    needs_group: bool = True  # attempts at a problem are compared, so equal rewards are a loss
    stale: bool = False  # some updates are from attempts of older params: `lag`, `replay`, or several updates per batch
    trained: Sequence[str] = ()  # suites whose tasks are like those of the source


USUAL = Traits()


@dataclasses.dataclass
class Mark:
    """The best evaluation of a suite so far, from the last one before the phase on. A
    later one replaces it if its accuracy is higher by more than FLAT.
    """

    accuracy: dict[str, float]  # by temperature
    line: int = 0  # the number of rewards before it
    reward: float | None = None  # mean of the next ENDS rewards; None: there are not so many yet


@dataclasses.dataclass
class Alarms:
    """The warnings of a run, and what they are decided from. All fields are JSON."""

    phase: str = ""
    given: list[str] = dataclasses.field(default_factory=list)  # names of the warnings of this phase
    count: dict[str, int] = dataclasses.field(default_factory=dict)  # lines in a row for which a condition holds
    norms: list[float] = dataclasses.field(default_factory=list)  # of the gradient in the last WINDOW lines
    lines: int = 0  # with a reward
    rewards: list[float] = dataclasses.field(default_factory=list)  # of the last ENDS of them
    latest: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # suite -> temperature -> accuracy
    marks: dict[str, dict] = dataclasses.field(default_factory=dict)  # suite -> fields of a Mark

    def begin(self, phase: str) -> None:
        """Forget what belongs to the phase before."""
        self.phase, self.given, self.count, self.norms, self.lines, self.rewards = phase, [], {}, [], 0, []
        self.marks = {suite: dataclasses.asdict(Mark(dict(accuracy))) for suite, accuracy in self.latest.items()}

    def hear(self, step: int, phase: str, values: Mapping[str, float], traits: Traits = USUAL) -> list[Warning]:
        """Take a line of metrics; return the warnings that it is a reason for."""
        if phase != self.phase:
            self.begin(phase)
        found = [*self.of_conditions(values, traits), *self.of_spike(values), *self.of_accuracy(values, traits)]
        made = [Warning(step, phase, name, text) for name, text in found if name not in self.given]
        self.given += [warning.name for warning in made]
        return made

    def of_conditions(self, values: Mapping[str, float], traits: Traits) -> list[tuple[str, str]]:
        found = []
        if not any(name.startswith(("rollout/", "train/")) for name in values):
            return found  # a line of an evaluation alone says nothing about the steps around it
        for name, (holds, text) in conditions(values, traits).items():
            self.count[name] = self.count.get(name, 0) + 1 if holds else 0
            if self.count[name] == (1 if name == "verifier" else IN_A_ROW):
                found.append((name, text))
        return found

    def of_spike(self, values: Mapping[str, float]) -> list[tuple[str, str]]:
        norm = values.get("train/grad_norm")
        if norm is None:
            return []
        usual = statistics.median(self.norms) if len(self.norms) >= FEWEST else 0.0
        if math.isfinite(norm):  # there is no median beside NaN
            self.norms = [*self.norms, norm][-WINDOW:]
        if not usual or not norm > SPIKE * usual:
            return []
        times = f"{norm / usual:.0f} times its median"
        return [("gradient", f"the gradient's norm is {norm:.3g}, {times}; look at the batch, lower the rate or the clip")]

    def of_accuracy(self, values: Mapping[str, float], traits: Traits) -> list[tuple[str, str]]:
        """Compare the reward with the accuracy of each suite, at an evaluation."""
        if math.isfinite(reward := values.get("rollout/reward", math.nan)):
            self.lines += 1
            self.rewards = [*self.rewards, reward][-ENDS:]
            for mark in self.marks.values():
                if self.lines == mark["line"] + ENDS:
                    mark["reward"] = statistics.fmean(self.rewards)
        evaluated: dict[str, dict[str, float]] = {}
        for name, value in values.items():
            if name.startswith("eval/") and name.endswith("/accuracy"):
                suite, _, mode = name.removeprefix("eval/").removesuffix("/accuracy").rpartition("/")
                evaluated.setdefault(suite, {})[mode] = value
        told = {suite: self.of_suite(suite, accuracy) for suite, accuracy in evaluated.items()}
        self.latest |= evaluated
        return [(f"reward/{suite}", text) for suite, text in told.items() if text and suite in traits.trained]

    def of_suite(self, suite: str, accuracy: dict[str, float]) -> str:
        """Say that the reward has risen since the accuracy on a suite was best, and
        that the accuracy, at no temperature, is above the best or above the evaluation
        before; "" otherwise. An accuracy that rose and fell counts, one that recovers
        does not.
        """
        mark, before = Mark(**self.marks[suite]) if suite in self.marks else None, self.latest.get(suite, {})
        if mark is None or is_above(accuracy, mark.accuracy):
            best = {mode: max(value, mark.accuracy.get(mode, value)) for mode, value in accuracy.items()} if mark else accuracy
            self.marks[suite] = dataclasses.asdict(Mark(dict(best), self.lines))
            return ""
        if mark.reward is None or self.lines < mark.line + 2 * ENDS or max(accuracy.values()) >= SOLVED:
            return ""
        if is_above(accuracy, before):
            return ""
        if not (rise := statistics.fmean(self.rewards) - mark.reward) > RISE:
            return ""
        changes = ", ".join(f"{mode} {mark.accuracy[mode]:.3f} then, {value:.3f} now" for mode, value in accuracy.items())
        return (
            f"the reward has risen by {rise:.2f} since the accuracy on {suite} was best, and that has not ({changes}); the model "
            "may satisfy the verifier in another way, or learn the training problems by heart"
        )


def is_above(accuracy: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Tell whether an accuracy has gained more than FLAT, at any temperature."""
    return any(value > other.get(mode, -1.0) + FLAT for mode, value in accuracy.items())


def conditions(values: Mapping[str, float], traits: Traits = USUAL) -> dict[str, tuple[bool, str]]:
    """Return the conditions of a line: name -> whether it holds, and what to say."""
    entropy, correct = values.get("train/entropy"), values.get("rollout/correct")
    cut, kl = values.get("rollout/cut", 0.0), values.get("rollout/kl_sampler_learner", 0.0)
    failed = values.get("rollout/verifier_errors", 0.0) + values.get("rollout/verifier_timeouts", 0.0)
    sampled = correct is not None
    return {
        "entropy": (
            sampled and entropy is not None and entropy < LEAST_ENTROPY and correct < SOLVED,
            f"the entropy is below {LEAST_ENTROPY:g} nats a token and only {correct or 0:.0%} of the attempts are correct: "
            "they hardly differ, so nothing new is tried; lower the rate, or set an entropy bonus or a KL to the reference",
        ),
        "groups": (
            sampled and traits.needs_group and values.get("rollout/informative_groups") == 0,
            "all attempts at each problem earn the same, so there is no gradient; choose easier or harder problems, larger "
            "groups, or look at the verifier",
        ),
        "length": (
            cut > MOST_CUT,
            f"{cut:.0%} of the attempts are cut off at their limit; raise max_tokens, or look at what they write",
        ),
        "mismatch": (
            not traits.stale and kl > STABLE_KL,
            f"the KL between sampler and learner is {kl:.2g}, above {STABLE_KL:g}; with no lag and one update per batch they "
            "should agree: look at dtypes and at rollout/kl_sampler_learner by depth",
        ),
        "stale": (
            traits.stale and kl > STALE_KL,
            f"the KL between the older params that sample and those that learn is {kl:.2g}, above {STALE_KL:g}, and most of such "
            "updates are clipped; lower the lag, the updates per batch or the learning rate",
        ),
        "verifier": (
            failed > MOST_FAILED,
            f"the verifier failed on {failed:.1%} of the attempts, which earn 0; look at the first failures above",
        ),
    }
