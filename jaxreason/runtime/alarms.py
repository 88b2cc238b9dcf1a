"""Warnings about a run that goes on but may not learn, each given once per run.

`Alarms.hear` gets every line of metrics. Thresholds are constants here, with the reason
behind each; they were checked on runs of configs/tiny.py that learned.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from jaxreason.runtime.terminal import STABLE_KL

IN_A_ROW = 5  # lines for which a condition must hold: one batch may be unlucky
LEAST_ENTROPY = 0.02  # nats per token; below it nearly all attempts at a problem are one text
SOLVED = 0.9  # correct attempts, from which low entropy is what is wanted, and accuracy has little left to gain
MOST_CUT = 0.5  # of the attempts: above it most of the learning signal is about length
MOST_FAILED = 0.01  # of the verdicts: a verifier that fails more often distorts the reward
SPIKE, WINDOW, FEWEST = 10.0, 50, 10  # times the median norm of the last WINDOW lines, of FEWEST at least
RISE, FLAT = 0.1, 0.01  # of the reward since the phase began, while held-out accuracy has gained no more than FLAT
ENDS = 10  # lines at each end of a phase, over which rewards are averaged


class Warning(NamedTuple):
    step: int
    name: str
    text: str


class Alarms:
    """The warnings of a run. `given` are the names of those that it has had."""

    def __init__(self, given: set[str]):
        self.given = given
        self.accuracies: dict[str, list[float]] = {}  # from the last one before the phase
        self.begin("")

    def begin(self, phase: str) -> None:
        """Forget what belongs to the phase before."""
        self.phase = phase
        self.count: collections.Counter[str] = collections.Counter()  # lines in a row for which a condition holds
        self.norms: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self.rewards: list[float] = []
        self.accuracies = {name: seen[-1:] for name, seen in self.accuracies.items()}

    def hear(self, step: int, phase: str, values: Mapping[str, float]) -> list[Warning]:
        """Take a line of metrics; return the warnings that it is a reason for."""
        if phase != self.phase:
            self.begin(phase)
        found = [*self.of_conditions(values), *self.of_spike(values), *self.of_accuracy(values)]
        made = [Warning(step, name, text) for name, text in found if name not in self.given]
        self.given |= {warning.name for warning in made}
        return made

    def of_conditions(self, values: Mapping[str, float]) -> list[tuple[str, str]]:
        found = []
        if not any(name.startswith(("rollout/", "train/")) for name in values):
            return found  # a line of an evaluation alone says nothing about the steps around it
        for name, (holds, text) in conditions(values).items():
            self.count[name] = self.count[name] + 1 if holds else 0
            if self.count[name] == (1 if name == "verifier" else IN_A_ROW):
                found.append((name, text))
        return found

    def of_spike(self, values: Mapping[str, float]) -> list[tuple[str, str]]:
        norm = values.get("train/grad_norm")
        if norm is None:
            return []
        usual = statistics.median(self.norms) if len(self.norms) >= FEWEST else 0.0
        if math.isfinite(norm):  # there is no median beside NaN
            self.norms.append(norm)
        if not usual or not norm > SPIKE * usual:
            return []
        times = f"{norm / usual:.0f} times its median"
        return [("gradient", f"the gradient's norm is {norm:.3g}, {times}; look at the batch, lower the rate or the clip")]

    def of_accuracy(self, values: Mapping[str, float]) -> list[tuple[str, str]]:
        """Compare the rise of the reward with that of the first suite's accuracy, at an
        evaluation.
        """
        if "rollout/reward" in values:
            self.rewards.append(values["rollout/reward"])
        for name, value in values.items():
            if name.startswith("eval/") and name.endswith("/accuracy"):
                self.accuracies.setdefault(name, []).append(value)
        if not self.accuracies or not any(name.startswith("eval/") for name in values) or len(self.rewards) < 2 * ENDS:
            return []
        name, seen = next(iter(self.accuracies.items()))
        rise = statistics.fmean(self.rewards[-ENDS:]) - statistics.fmean(self.rewards[:ENDS])
        if len(seen) < 2 or seen[0] >= SOLVED or not rise > RISE or max(seen[1:]) - seen[0] > FLAT:
            return []
        return [
            (
                "reward",
                f"the reward has risen by {rise:.2f} in this phase, and {name.removeprefix('eval/')} has not ({seen[0]:.3f} to "
                f"{seen[-1]:.3f}); the model may satisfy the verifier in another way, or learn the training problems by heart",
            )
        ]


def conditions(values: Mapping[str, float]) -> dict[str, tuple[bool, str]]:
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
            sampled and values.get("rollout/informative_groups") == 0,
            "all attempts at each problem earn the same, so there is no gradient; choose easier or harder problems, larger "
            "groups, or look at the verifier",
        ),
        "length": (
            cut > MOST_CUT,
            f"{cut:.0%} of the attempts are cut off at their limit; raise max_tokens, or look at what they write",
        ),
        "mismatch": (
            kl > STABLE_KL,
            f"the KL between sampler and learner is {kl:.2g}, above {STABLE_KL:g}; with no lag and one update per batch they "
            "should agree: look at dtypes and at rollout/kl_sampler_learner by depth",
        ),
        "verifier": (
            failed > MOST_FAILED,
            f"the verifier failed on {failed:.1%} of the attempts, which earn 0; look at the first failures above",
        ),
    }
