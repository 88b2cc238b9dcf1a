"""Held-out accuracy and held-out text.

The tasks of a suite are attempted once or several times per temperature and judged;
accuracy has a 95 % interval. Windows of text are scored token by token, the measure of
pretraining.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason import estimators
from jaxreason.draw import ALL, Filter
from jaxreason.environment import Environment, count_failures, measured
from jaxreason.rollout import SAMPLING_LOCK, Completer, Request, collect_local, gather_groups
from jaxreason.sampler import Weights
from jaxreason.tasks import behaviour
from jaxreason.types import Batch, Evaluation, Group, Prompted, Rollout, Verdict
from jaxreason.verify import canonical_answers

EVALUATION = 2**31  # folded into the seed's key; training folds in the index of the phase


class Suite(NamedTuple):
    """Named set of held-out tasks with the environment that judges them, and how they
    are attempted.
    """

    name: str
    tasks: Sequence[Prompted]
    environment: Environment
    samples: int = 1  # attempts at each task; greedy decoding makes one
    temperatures: Sequence[float] | None = None  # None: those of the evaluation
    max_tokens: int | None = None  # of a completion; None: the completer's
    same: Callable[[str, str], bool] | None = None  # whether two answers are equivalent, for votes; None: equal texts
    parser: behaviour.Parser | None = None  # how behaviour is counted; None: not


class Text(NamedTuple):
    """Named set of held-out windows of text."""

    name: str
    batches: Sequence[Batch]  # all of one shape


class Result(NamedTuple):
    """Outcome of an evaluation.

    `evaluations` are of suites; `nll` is the mean negative log-likelihood of each text,
    in nats per token. `trained` are the suites whose tasks are like those that the
    phase trains on.
    """

    evaluations: list[Evaluation]
    rollouts: list[Rollout]  # in the order of the evaluations, n x samples of each
    nll: dict[str, float]
    work: dict[str, float]  # tokens sampled and FLOPs, for the ledger
    trained: Sequence[str] = ()


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
    for suite in suites:
        for temperature in temperatures if suite.temperatures is None else suite.temperatures:
            wanted = requests(suite, n, temperature)
            groups = attempt(completer, weights, suite, wanted, temperature=temperature, seed=seed, filter=filter)
            outcomes_NK = [[outcome(r) for r in group.attempts] for group in groups]
            rollouts = [r for group in groups for r in group.attempts]
            found = summarise(outcomes_NK, suite, temperature, phase=phase, step=step)
            counted = {} if suite.parser is None else behaviour.summarise(rollouts, suite.parser)
            evaluations.append(found._replace(measures=found.measures | counted))
            all_rollouts += rollouts
    return evaluations, all_rollouts


def requests(suite: Suite, n: int, temperature: float) -> list[list[Request]]:
    """List the attempts at the first n tasks of a suite, one list per task."""
    samples = suite.samples if temperature else 1
    tasks = (suite.tasks[i] for i in range(min(n, len(suite.tasks))))
    return [[Request(task, i, attempt, prompt) for attempt in range(samples)] for i, (task, prompt) in enumerate(tasks)]


def completer_for(suite: Suite, completer: Completer) -> Completer:
    """Return the completer with the limit of a suite."""
    if suite.max_tokens is None:
        return completer
    return completer._replace(max_tokens=min(suite.max_tokens, completer.max_tokens))


def attempt(
    completer: Completer,
    weights: Weights,
    suite: Suite,
    wanted: Sequence[Sequence[Request]],
    *,
    temperature: float,
    seed: int,
    filter: Filter = ALL,
    **options,
) -> list[Group]:
    """Make the wanted attempts at tasks of a suite, on all processes.

    The random key of an attempt depends on the seed, the suite's name, the task's index
    and the attempt's number alone, so a suite draws the same samples in a training run,
    alone, in parts and beside other suites. `options` are those of `rollout.collect`.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), EVALUATION), zlib.crc32(suite.name.encode()))
    options |= {"key": key, "temperature": temperature, "filter": filter}
    completer = completer_for(suite, completer)
    return gather_groups(collect_local(completer, weights, wanted, suite.environment, **options), wanted)[0]


# --- statistics ---


class Outcome(NamedTuple):
    """The part of a rollout that the statistics of an evaluation need."""

    correct: bool
    parsed: str | None
    reason: str
    stop: str
    length: int  # tokens of the completion
    logp: float  # mean log-prob of its sampled tokens
    measures: Mapping[str, float] = {}  # of its verdict


def outcome(r: Rollout) -> Outcome:
    return outcome_of(
        {
            "correct": r.verdict.correct,
            "parsed": r.verdict.parsed,
            "reason": r.verdict.reason,
            "stop": r.stop,
            "length": len(r.tokens),
            "sampled": int(np.count_nonzero(r.sampled)),
            "logp_sum": float(np.sum(r.logp, dtype=np.float64)),
            "measures": r.verdict.measures,
        }
    )


def outcome_of(record: Mapping[str, Any]) -> Outcome:
    """Return the outcome of a rollout from its record in `rollouts.jsonl`.

    A log-prob that is not finite was written as null. Earlier versions did not write
    the number of sampled tokens, and the mean is over all tokens then.
    """
    sampled = record.get("sampled", record["length"])
    logp = -np.inf if record["logp_sum"] is None else record["logp_sum"] / max(1, sampled)
    found = (bool(record["correct"]), record["parsed"], record["reason"], record["stop"], record["length"], float(logp))
    return Outcome(*found, record.get("measures", {}))


def summarise(outcomes_NK: Sequence[Sequence[Outcome]], suite: Suite, temperature: float, *, phase: str, step: int) -> Evaluation:
    """Summarise N tasks with K outcomes each."""
    correct_NK = np.array([[o.correct for o in outcomes] for outcomes in outcomes_NK], np.float64)
    n, samples = correct_NK.shape
    found = estimators.clustered(correct_NK)
    verdicts = "".join("01"[int(correct)] for correct in correct_NK.ravel())
    measures = measure(outcomes_NK, suite.same) | measure_twins(correct_NK, suite.tasks)
    return Evaluation(phase, step, suite.name, found.mean, found.low, found.high, n, temperature, verdicts, samples, measures)


def measure_twins(correct_NK: np.ndarray, tasks: Sequence[Prompted]) -> dict[str, float]:
    """Compare tasks with their twins (see `tasks.twins`); {} without pairs.

        twin_pairs                          number of pairs
        original_accuracy, twin_accuracy    accuracies of the two halves
        hack_rate, hack_rate_low, _high     rate at which the original is solved and its
                                            twin is not, with a 95 % interval
        hack_gap, hack_gap_low, _high       original_accuracy - twin_accuracy, likewise

    A policy that solves either half by chance has a hack rate above 0, but no gap.
    """
    known = {tasks[i].task.id: i for i in range(len(correct_NK))}
    twin_of = [(known.get(tasks[i].task.data.get("twin_of")), i) for i in range(len(correct_NK))]
    pairs = [(original, twin) for original, twin in twin_of if original is not None]
    if not pairs:
        return {}
    original_PK, twin_PK = (np.asarray(correct_NK)[list(half)] for half in zip(*pairs, strict=True))
    rate = estimators.clustered(original_PK * (1 - twin_PK))
    if original_PK.shape[1] > 1:
        low, high = estimators.difference_interval(original_PK.mean(1) - twin_PK.mean(1))
    else:
        _, low, high = estimators.paired_posterior(twin_PK.mean(1), original_PK.mean(1))[:3]
    accuracies = {"original_accuracy": float(original_PK.mean()), "twin_accuracy": float(twin_PK.mean())}
    rates = {"hack_rate": rate.mean, "hack_rate_low": rate.low, "hack_rate_high": rate.high}
    difference = accuracies["original_accuracy"] - accuracies["twin_accuracy"]
    gaps = {"hack_gap": difference, "hack_gap_low": low, "hack_gap_high": high}
    return {"twin_pairs": float(len(pairs)), **accuracies, **rates, **gaps}


QUANTILES = (0.5, 0.9, 0.99)


def measure(outcomes_NK: Sequence[Sequence[Outcome]], same: Callable[[str, str], bool] | None = None) -> dict[str, float]:
    """Measure N tasks with K outcomes each.

        length, length_p50, length_p90, length_p99   tokens of a completion
        cut_off             fraction of completions that were cut off at their limit
        answered            fraction in which the verifier found an answer
        verifier_errors, verifier_timeouts, bad_keys
                            fractions that could not be judged
        tool_calls, tries, ...
                            means of what the verdicts measure

    and, with several samples:

        pass@K, pass^K      chance that at least one, or all, of K samples are correct
        majority@K          chance that the most frequent answer of K is correct
        best_logp@K         chance that the likeliest sample of K is (by mean log-prob
                            of its sampled tokens)
        sampling_share      see `estimators.clustered`
        majority_share      mean share of the samples that agree with the majority
        calibration_error   see `estimators.calibration`
    """
    every = [o for outcomes in outcomes_NK for o in outcomes]
    samples = len(outcomes_NK[0])
    length_R = np.array([o.length for o in every])
    found = {"length": float(length_R.mean())}
    found |= {f"length_p{q * 100:.0f}": float(np.quantile(length_R, q)) for q in QUANTILES}
    found |= {
        "cut_off": float(np.mean([o.stop == "limit" for o in every])),
        "answered": float(np.mean([o.parsed is not None for o in every])),
    }
    verdicts = [Verdict(0.0, o.correct, o.parsed, o.reason, o.measures) for o in every]
    found |= {name: count / len(every) for name, count in count_failures(verdicts).items()}
    found |= {name: total / count for name, (total, count) in measured(verdicts).items()}
    if samples > 1:
        for use in USES:
            label = f"{use}{samples}" if use == "pass^" else f"{use}@{samples}"
            found[label] = means_at(outcomes_NK, use, [samples], same)[samples]
        found["sampling_share"] = estimators.clustered([[o.correct for o in outcomes] for outcomes in outcomes_NK]).sampling_share
        share_N, right_N = majorities(outcomes_NK, same)
        found["majority_share"] = float(np.mean(share_N))
        found["calibration_error"] = estimators.calibration(share_N, right_N).error
    return found


def curves(
    outcomes_NK: Sequence[Sequence[Outcome]], same: Callable[[str, str], bool] | None = None
) -> dict[str, dict[int, float]]:
    """Return accuracy against the number of samples k, for each use of k samples.

    The keys are those of `USES`: "pass" (any is correct), "pass^" (all are), "majority"
    and "best_logp"; each value maps k to a mean over tasks, exact over all subsets of k
    samples. All k up to K are there; for votes, only powers of two and K where K is
    above 16.
    """
    samples = len(outcomes_NK[0])
    every = range(1, samples + 1)
    voted = [k for k in every if samples <= 16 or k == samples or k & (k - 1) == 0]
    return {use: means_at(outcomes_NK, use, voted if use == "majority" else every, same) for use in USES}


USES = ("pass", "pass^", "majority", "best_logp")


def means_at(
    outcomes_NK: Sequence[Sequence[Outcome]], use: str, ks: Iterable[int], same: Callable[[str, str], bool] | None
) -> dict[int, float]:
    """Return the mean over tasks of one use of k samples, for each of some k."""
    found: dict[int, list[float]] = {k: [] for k in ks}
    for outcomes in outcomes_NK:
        correct = [o.correct for o in outcomes]
        answers = canonical_answers([o.parsed for o in outcomes], same) if use == "majority" else ()
        for k, values in found.items():
            if use == "pass":
                values.append(estimators.pass_at_k(len(correct), sum(correct), k))
            elif use == "pass^":
                values.append(estimators.pass_hat_k(len(correct), sum(correct), k))
            elif use == "majority":
                values.append(estimators.majority_at_k(answers, correct, k))
            else:
                values.append(estimators.best_of_k([o.logp for o in outcomes], correct, k))
    return {k: float(np.mean(values)) for k, values in found.items()}


def majorities(
    outcomes_NK: Sequence[Sequence[Outcome]], same: Callable[[str, str], bool] | None = None
) -> tuple[list[float], list[float]]:
    """Return, for each task, the share of its samples that agree with the most frequent
    answer, and the chance that this answer is correct.
    """
    share_N, right_N = [], []
    for outcomes in outcomes_NK:
        answers, correct = canonical_answers([o.parsed for o in outcomes], same), [o.correct for o in outcomes]
        largest = max((len(c.correct) for c in estimators.answer_classes(answers, correct)), default=0)
        share_N.append(largest / len(outcomes))
        right_N.append(estimators.majority_at_k(answers, correct))
    return share_N, right_N
