"""Held-out accuracy and held-out text.

Each suite of tasks is attempted once per temperature and judged; accuracy has a 95 %
Wilson interval. Windows of text are scored token by token, the measure of pretraining.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.draw import ALL, Filter
from jaxreason.environment import Environment
from jaxreason.estimators import wilson
from jaxreason.rollout import SAMPLING_LOCK, Completer, Request, collect_local, gather_groups
from jaxreason.types import Batch, Evaluation, Prompted, Rollout

EVALUATION = 2**31  # folded into the seed's key; training folds in the index of the phase


class Suite(NamedTuple):
    """Named set of held-out tasks with the environment that judges them."""

    name: str
    tasks: Sequence[Prompted]
    environment: Environment


class Text(NamedTuple):
    """Named set of held-out windows of text."""

    name: str
    batches: Sequence[Batch]  # all of one shape


class Result(NamedTuple):
    """Outcome of an evaluation.

    `evaluations` are of suites; `nll` is the mean negative log-likelihood of each text,
    in nats per token.
    """

    evaluations: list[Evaluation]
    rollouts: list[Rollout]
    nll: dict[str, float]
    work: dict[str, float]  # tokens sampled and FLOPs, for the ledger


def score(token_logp: Callable, params, texts: Sequence[Text]) -> dict[str, float]:
    """Return the mean negative log-likelihood of each text over tokens with a weight.

    `token_logp(params, batch) -> logp_BT`.
    """
    found = {}
    for text in texts:
        # Sum on the devices: a process may not hold all rows.
        total = sum(float(jnp.sum(token_logp(params, batch))) for batch in text.batches)
        found[text.name] = -total / sum(np.count_nonzero(batch.weight_BT) for batch in text.batches)
    return found


def evaluate(
    completer: Completer,
    params,
    suites: Sequence[Suite],
    *,
    temperatures: Sequence[float],
    n: int,
    seed: int,
    phase: str,
    step: int,
    filter: Filter = ALL,
) -> tuple[list[Evaluation], list[Rollout]]:
    """Attempt the first n tasks of each suite at each temperature.

    Also return the rollouts, in the order of the evaluations. Every call uses the same
    tasks and random keys, so two evaluations differ only by their params.
    """
    evaluations, all_rollouts = [], []
    with SAMPLING_LOCK:
        weights = completer.sampler.prepare(params)
    for i, suite in enumerate(suites):
        tasks = [suite.tasks[j] for j in range(min(n, len(suite.tasks)))]
        wanted = [[Request(task, j, 0, prompt)] for j, (task, prompt) in enumerate(tasks)]
        for temperature in temperatures:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), EVALUATION), i)
            options = {"key": key, "temperature": temperature, "filter": filter}
            groups, _ = gather_groups(collect_local(completer, weights, wanted, suite.environment, **options), wanted)
            rollouts = [r for group in groups for r in group.attempts]
            correct = sum(r.verdict.correct for r in rollouts)
            low, high = wilson(correct, len(rollouts))
            accuracy = correct / len(rollouts)
            verdicts = "".join("01"[bool(r.verdict.correct)] for r in rollouts)
            evaluations.append(Evaluation(phase, step, suite.name, accuracy, low, high, len(rollouts), temperature, verdicts))
            all_rollouts += rollouts
    return evaluations, all_rollouts
