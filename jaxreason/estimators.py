"""Estimates from samples: pass@k, majority@k, best-of-k, intervals, and paired tests of
two runs on the same problems.

Everything runs on the host, in NumPy and exact integers; nothing is traced. An interval
is a pair `(low, high)`. Accuracy over problems has a Wilson interval, or one clustered
by problem if each problem has several samples; a mean over seeds has a t-interval. A
difference of two runs has a posterior, or the interval of the problems' differences if
they have several samples. They answer different questions (new problems, new seeds, new
problems for both runs) and can't replace each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np


def wilson(correct: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (Wilson, 1927).

    Unlike the normal interval it stays within 0..1 and has a width above 0 when none or
    all are correct. It is (0, 1) if n is 0. `correct` may be a fraction, as for
    problems with several samples each.
    """
    _check_confidence(confidence)
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n}; allowed: 0 <= correct <= n")
    if n == 0:
        return 0.0, 1.0
    return _score_interval(correct / n, n, NormalDist().inv_cdf(0.5 + confidence / 2))


def _score_interval(p: float, n: float, z: float) -> tuple[float, float]:
    """The proportions from which p, found of n, is at most z standard errors away."""
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the formula gives 0 and 1 up to rounding.
    return 0.0 if p == 0 else (centre - half) / scale, 1.0 if p == 1 else (centre + half) / scale


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of pass@k of one problem, from c correct of n
    samples.

    It is the fraction of k-subsets of the samples that contain a correct one: 1 -
    C(n-c, k) / C(n, k) (Chen et al., 2021, arXiv 2107.03374, eq. 1). Average it over
    problems.
    """
    if not 0 <= c <= n:
        raise ValueError(f"{c} correct of {n} samples; allowed: 0 <= c <= n")
    _check_k(k, n)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_hat_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of pass^k of one problem: that all of k samples are
    correct.

    It is C(c, k) / C(n, k), from c correct of n samples (Yao et al., 2024, arXiv
    2406.12045). Average it over problems.
    """
    if not 0 <= c <= n:
        raise ValueError(f"{c} correct of {n} samples; allowed: 0 <= c <= n")
    _check_k(k, n)
    return math.comb(c, k) / math.comb(n, k)


def best_of_k(scores: Sequence[float], correct: Sequence[bool], k: int) -> float:
    """Return the probability that the sample with the highest score among k of a
    problem's n samples is correct.

    The result is exact, over all k-subsets; samples of equal score are chosen with
    equal probability. With verdicts as scores it is pass@k.
    """
    if len(scores) != len(correct):
        raise ValueError(f"{len(scores)} scores but {len(correct)} verdicts; allowed: one verdict for each score")
    n = len(scores)
    _check_k(k, n)
    by_score: dict[float, list[bool]] = {}
    for score, right in zip(scores, correct):
        by_score.setdefault(float(score), []).append(bool(right))
    chance, lower = 0.0, 0
    for score in sorted(by_score):
        members = by_score[score]
        # Subsets whose best is of this score: none above it, at least one of it.
        wins = math.comb(lower + len(members), k) - math.comb(lower, k)
        chance += wins / math.comb(n, k) * sum(members) / len(members)
        lower += len(members)
    return chance


class AnswerClass(NamedTuple):
    """Samples of a problem with equivalent answers."""

    answer: Hashable  # of the first
    correct: list[bool]  # of each


def answer_classes(
    answers: Sequence[Hashable | None], correct: Sequence[bool], same: Callable[[Any, Any], bool] | None = None
) -> list[AnswerClass]:
    """Group a problem's samples by answer, in order of appearance.

    Answers are in one class if they are equal or, given `same`, if `same(first of the
    class, answer)`. None (no answer was found) is in no class.
    """
    if len(answers) != len(correct):
        raise ValueError(f"{len(answers)} answers but {len(correct)} verdicts; allowed: one verdict for each answer")
    classes: list[AnswerClass] = []
    position: dict[Hashable, int] = {}  # index of the class of an answer
    for answer, right in zip(answers, correct):
        if answer is None:
            continue
        if answer not in position:
            i = len(classes) if same is None else next((i for i, c in enumerate(classes) if same(c.answer, answer)), len(classes))
            position[answer] = i
            if i == len(classes):
                classes.append(AnswerClass(answer, []))
        classes[position[answer]].correct.append(bool(right))
    return classes


def majority_at_k(
    answers: Sequence[Hashable | None],
    correct: Sequence[bool],
    k: int | None = None,
    *,
    same: Callable[[Any, Any], bool] | None = None,
) -> float:
    """Return the probability that a vote of k of a problem's n samples is correct.

    The vote picks the most frequent answer. The result is exact, over all k-subsets and
    all ways to break ties; k defaults to n, a plain vote. An answer of None uses up a
    sample but never wins; a vote with only None is lost. See `answer_classes` for
    `same`. If a class mixes right and wrong answers, a random one of its members
    decides.
    """
    n = len(answers)
    k = n if k is None else k
    classes = answer_classes(answers, correct, same)
    _check_k(k, n)
    sizes = [len(c.correct) for c in classes]
    blanks = n - sum(sizes)
    win = {size: _win_chance(size, sizes, blanks, k) for size in set(sizes)}  # classes of one size have equal chances
    return sum(win[len(c.correct)] * sum(c.correct) / len(c.correct) for c in classes)


def _win_chance(size: int, sizes: Sequence[int], blanks: int, k: int) -> float:
    """Return the probability that one class of `size` wins a vote of k samples.

    `sizes` are the sizes of all classes, this one included.
    """
    n = sum(sizes) + blanks
    if k == n:
        return (size == max(sizes)) / sizes.count(max(sizes))
    others = list(sizes)
    others.remove(size)

    def drawn(members: int, j: int) -> float:
        """Return the probability of j draws if each sample is drawn with probability k
        / n.

        Given k draws in all, every k-subset is equally likely, as required; and unlike
        binomial coefficients these values are neither huge nor tiny.
        """
        return math.comb(members, j) * k**j * (n - k) ** (members - j) / n**members  # a quotient of exact integers

    chance, none_K = 0.0, np.array([drawn(blanks, j) for j in range(k + 1)])
    drawn_of = {other: [drawn(other, j) for j in range(min(other, k) + 1)] for other in others}
    for votes in range(1, min(size, k) + 1):
        # chance_TK[t, j]: probability of j draws outside this class such that t other
        # classes tie at `votes` and none has more.
        T = min(len(others), k // votes)
        chance_TK = np.zeros((T + 1, k + 1))
        chance_TK[0] = none_K
        for other in others:
            drawn_TK = np.stack([np.convolve(chance_K, drawn_of[other][:votes])[: k + 1] for chance_K in chance_TK])
            if other >= votes:
                drawn_TK[1:, votes:] += drawn_of[other][votes] * chance_TK[:-1, : k + 1 - votes]
            chance_TK = drawn_TK
        fair = chance_TK[:, k - votes] / np.arange(1, T + 2)
        chance += drawn(size, votes) * float(fair.sum())
    return chance / drawn(n, k)


class Clustered(NamedTuple):
    """Accuracy over problems with K samples each, and what its error comes from.

    The variance of the accuracy is (between + within / K) / n for n problems: `between`
    is that of the problems' true accuracies, `within` that of a single sample of a
    problem, averaged over problems.
    """

    mean: float
    low: float
    high: float
    between: float
    within: float
    sampling_share: float  # part of the accuracy's variance that more samples per problem would remove; 0..1


ADDED = 0.25  # problems added at each end to the spread of an interval


def clustered(correct_NK: np.ndarray, confidence: float = 0.95) -> Clustered:
    """Return the accuracy of N problems with K samples each, with an interval clustered
    by problem.

    Samples of one problem are not independent, so the error of the accuracy is that of
    the problems' means (Miller, 2024, arXiv 2411.00640, sec. 2.2; equal cluster sizes).
    The interval is the Wilson interval of as many independent samples as would have
    this error. Their number follows from the spread of the problems' means (Korn and
    Graubard, 1998), to which a quarter of a problem that is always right and a quarter
    of one that is never right are added: near 0 and 1 a few problems make the whole
    spread, which is too low whenever there are fewer of them than usual. If all
    problems have one mean, or K is 1, it is the Wilson interval of N problems.

    Coverage of 2,000 evaluations each, on a grid of N in (8, 20, 50, 128, 400), K in
    (2, 4, 8, 16), accuracy in (0.01, 0.03, 0.1, 0.3, 0.5) and correlation within a
    problem in (0.02, 0.2, 0.5, 0.8, 0.98), with Beta-distributed problems: lowest,
    median, fraction of the grid below 0.93 and above 0.97, and mean width:

        this interval                                   0.909 0.956 0.02 0.22 1.05
        without the added problems, Student's quantile  0.853 0.955 0.09 0.18 1
        Clopper-Pearson in the place of Wilson          0.884 0.967 0.04 0.46 1.08
        Wilson interval of N problems                   0.909 0.983 0.02 0.69 1.43

    (2026-11-28). In nine of its ten cells below 0.93 nearly all samples of a problem
    agree, and Wilson's interval of N problems covers as little. Where N times the
    accuracy is at least 10 it covers 0.936 to 0.973.

    `sampling_share` is within / K over the variance of a problem's mean. A share near 1
    says that more samples would narrow the interval, one near 0 that only more problems
    would; it is 0 for K = 1, which can't tell.
    """
    _check_confidence(confidence)
    correct_NK = np.asarray(correct_NK, np.float64)
    if correct_NK.ndim != 2 or 0 in correct_NK.shape:
        raise ValueError(f"clustered got an array of shape {correct_NK.shape}; allowed: problems x samples, at least 1 x 1")
    N, K = correct_NK.shape
    mean_N = correct_NK.mean(axis=1)
    mean = float(mean_N.mean())
    within = float((mean_N * (1 - mean_N)).mean()) * K / (K - 1) if K > 1 else 0.0
    spread = float(mean_N.var(ddof=1)) if N > 1 else 0.0
    share = min(1.0, within / K / spread) if spread else float(within > 0)
    between = max(0.0, spread - within / K)
    if K == 1 or np.ptp(mean_N) == 0:
        low, high = wilson(mean * N, N, confidence)
    else:
        centre, variance = _widened(mean_N, 0.0, 1.0)
        alike = min(N * K, N * centre * (1 - centre) / variance)  # independent samples with the same error
        low, high = _score_interval(mean, alike, NormalDist().inv_cdf(0.5 + confidence / 2))
    return Clustered(mean, low, high, between, within, share)


def difference_interval(difference_N: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of the mean difference of two runs over N problems, from the
    differences of the problems' accuracies, of several samples each.

    The normal interval, with a quarter of a problem added at -1 and one at 1 to the
    spread, as in `clustered`: where few problems differ, a t-interval is too narrow.
    Coverage of 2,000 pairs each, on the grid of `clustered` with accuracies of 0.01,
    0.03, 0.1 and 0.5 and correlations of 0.2 and 0.8, where half of the problems are
    drawn anew, all become easier, or one in 50 becomes easy: lowest, median, fraction
    below 0.93 and above 0.97, and mean width:

        this interval       0.898 0.969 0.03 0.48 1.14
        the t-interval      0.594 0.948 0.24 0.20 1

    (2026-11-28). If all differences are equal they have no spread to judge by. New
    problems may then differ, anywhere from -1 to 1, but at most as many of them as 0 of
    N still allows.
    """
    _check_confidence(confidence)
    difference_N = np.asarray(difference_N, np.float64)
    if difference_N.ndim != 1 or not len(difference_N):
        raise ValueError(f"difference_interval got an array of shape {difference_N.shape}; allowed: one value per problem")
    N, mean = len(difference_N), float(difference_N.mean())
    if not varies(difference_N):
        others = wilson(0, N, confidence)[1]
        return mean - others * (1 + mean), mean + others * (1 - mean)
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt(_widened(difference_N, -1.0, 1.0)[1] / N)
    return max(-1.0, mean - half), min(1.0, mean + half)


def _widened(values_N: np.ndarray, lowest: float, highest: float) -> tuple[float, float]:
    """Mean and variance of values, with `ADDED` of the lowest and of the highest one
    there can be.
    """
    total = len(values_N) + 2 * ADDED
    mean = float(values_N.sum() + ADDED * (lowest + highest)) / total
    square = float(np.square(values_N).sum() + ADDED * (lowest**2 + highest**2)) / total
    return mean, (square - mean**2) * total / (total - 1)


class Calibration(NamedTuple):
    """How often votes are right, against their share of the samples."""

    error: float  # mean absolute difference between share and accuracy over bins, weighted by their problems
    bins: list[tuple[float, float, int, float, float]]  # lowest and highest share, problems, mean share, accuracy


def calibration(share_N: Sequence[float], right_N: Sequence[float], bins: int = 5) -> Calibration:
    """Compare the majority's share of a problem's samples with the chance that it is
    right, in bins of equal width (Guo et al., 2017, arXiv 1706.04599, eq. 3).

    `right_N` is the chance that the vote of a problem is right: 0 or 1 without ties.
    """
    share_N, right_N = _paired(share_N, right_N)
    edges = np.linspace(0, 1, bins + 1)
    bin_N = np.clip(np.searchsorted(edges, share_N, side="left") - 1, 0, bins - 1)
    found = []
    for b in range(bins):
        inside = bin_N == b
        if inside.any():
            found.append(
                (edges[b], edges[b + 1], int(inside.sum()), float(share_N[inside].mean()), float(right_N[inside].mean()))
            )
    gaps = sum(count * abs(share - right) for _, _, count, share, right in found)
    return Calibration(float(gaps / max(1, len(share_N))), [(float(low), float(high), *rest) for low, high, *rest in found])


def mcnemar(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> float:
    """Return the exact two-sided p-value of McNemar's test of two runs.

    It tests whether one run is right more often on the problems where the two differ.
    Problems that both or neither solved carry no information; under equality the rest
    are fair coins (McNemar, 1947). Use one sample per problem; with several, use
    `difference_interval` and `paired_t` on the differences of each problem's mean.
    """
    from scipy.stats import binomtest

    only_a, only_b, _ = _discordant(correct_a, correct_b)
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_posterior(
    correct_a: Sequence[bool], correct_b: Sequence[bool], *, confidence: float = 0.95, draws: int = 20_000, seed: int = 0
) -> tuple[float, float, float, float]:
    """Return the posterior of b's accuracy minus a's on new problems.

    The result is (mean, low, high, probability that b is better). The fractions of
    problems that only a solves, that only b solves, and of all others have a uniform
    prior, so the posterior is a Dirichlet distribution. Unlike a bootstrap interval,
    this one has a width even if all verdicts agree, and it is valid for few problems.
    """
    _check_confidence(confidence)
    only_a, only_b, same = _discordant(correct_a, correct_b)
    fractions = np.random.default_rng(seed).dirichlet([1 + only_a, 1 + only_b, 1 + same], size=draws)
    difference = fractions[:, 1] - fractions[:, 0]
    low, high = np.quantile(difference, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(difference.mean()), float(low), float(high), float((difference > 0).mean())


def mean_interval(
    values: Sequence[float], confidence: float = 0.95, within: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[float, float, float]:
    """Return the mean over seeds with its t-interval: (mean, low, high).

    The interval is cut to `within`, between which the mean is known to be: (0, 1) for
    accuracies, (-1, 1) for their differences. That takes nothing from its coverage.
    The interval of a single value is unbounded. It assumes roughly normal values; its
    half width is 12.7 standard errors for 2 seeds, 4.3 for 3 and 2.8 for 5. It has no
    width if all values are equal, as happens with few problems: see `varies`.
    """
    from scipy.stats import t

    _check_confidence(confidence)
    values = np.asarray(values, np.float64)
    n = len(values)
    if n == 0:
        raise ValueError("mean_interval got no values; allowed: at least 1")
    mean = float(values.mean())
    if n == 1:
        return mean, -math.inf, math.inf
    half = float(t.ppf(0.5 + confidence / 2, n - 1)) * float(values.std(ddof=1)) / math.sqrt(n)
    return mean, max(mean - half, within[0]), min(mean + half, within[1])


def varies(values: Sequence[float]) -> bool:
    """Return whether values differ by more than rounding.

    Accuracies of n problems are multiples of 1 / n, so that equal differences are often
    due to chance: for two seeds of 20 problems in 1 of 13 pairs of equal arms. Their
    spread can't be judged from them.
    """
    values = np.asarray(values, np.float64)
    return len(values) > 1 and float(np.ptp(values)) > 1e-12 * float(np.abs(values).max())


def paired_t(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the t-test that paired differences have mean 0.

    It is 1 for fewer than two differences, and if all are 0. If all are equal, the test
    has no spread to judge by, and the p-value is that of `sign_flip`, 2 / 2^n.
    """
    from scipy.stats import t

    values = np.asarray(differences, np.float64)
    n = len(values)
    if n < 2 or not values.any():
        return 1.0
    if not varies(values):
        return 2.0 ** (1 - n)
    error = float(values.std(ddof=1)) / math.sqrt(n)
    return float(2 * t.sf(abs(values.mean()) / error, n - 1))


def sign_flip(differences: Sequence[float]) -> float:
    """Return the exact two-sided p-value of the sign-flip test (Fisher, 1935).

    It is the fraction of all choices of signs whose mean is at least as far from 0 as
    the observed one. The test only assumes that without an effect a difference and its
    opposite are equally likely. The lowest p-value of n differences is 2 / 2^n: 0.5 for
    2 seeds, 0.0625 for 5, 0.03 for 6.
    """
    values = np.asarray(differences, np.float64)
    n = len(values)
    if not 1 <= n <= MOST_FLIPPED:
        raise ValueError(f"sign_flip got {n} differences; allowed: 1 to {MOST_FLIPPED}, as it tries all 2^n signs")
    signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    sums = np.abs(signs @ values)
    return float((sums >= sums[0] - 1e-12 * np.abs(values).sum()).mean())  # equal sums may differ by rounding


MOST_FLIPPED = 20


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm, 1979), in the same order.

    The chance of any false finding at a level is then at most the level.
    """
    order = np.argsort(p_values, kind="stable")
    corrected, highest = np.empty(len(order)), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected.tolist()


def seeds_needed(difference: float, deviation: float, *, power: float = 0.8, level: float = 0.05) -> int | None:
    """Return the number of paired seeds that a t-test needs to show a difference.

    `difference` is the mean over seeds, `deviation` the standard deviation. The power
    follows from the noncentral t distribution (Cohen, 1988, sec. 2.3). Return None if
    more than 10,000 seeds are needed.
    """
    from scipy.stats import nct, t

    if not (0 < power < 1 and 0 < level < 1 and deviation >= 0):
        raise ValueError(f"got power={power}, level={level}, deviation={deviation}; allowed: between 0 and 1, and 0 or more")
    if difference == 0:
        return None
    if deviation == 0:
        return 2
    n = 2
    while n <= 10_000:
        shift, edge = abs(difference) / deviation * math.sqrt(n), float(t.ppf(1 - level / 2, n - 1))
        if nct.sf(edge, n - 1, shift) + nct.cdf(-edge, n - 1, shift) >= power:
            return n
        n = n + 1 if n < 200 else math.ceil(n * 1.02)
    return None


def problems_needed(difference: float, variance: float, *, power: float = 0.8, level: float = 0.05) -> int | None:
    """Return the number of paired problems that show a difference of two accuracies.

    `variance` is that of the problems' differences: with one sample each, the fraction
    of problems that only one run solves, less the squared difference. The normal
    approximation (Miller, 2024, arXiv 2411.00640, eq. 9). Return None for a difference
    of 0.
    """
    if not (0 < power < 1 and 0 < level < 1 and variance >= 0):
        raise ValueError(f"got power={power}, level={level}, variance={variance}; allowed: between 0 and 1, and 0 or more")
    if difference == 0:
        return None
    quantiles = NormalDist().inv_cdf(1 - level / 2) + NormalDist().inv_cdf(power)
    return max(2, math.ceil(quantiles**2 * variance / difference**2))


def _discordant(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> tuple[int, int, int]:
    """The number of problems that only a solved, that only b solved, and of others."""
    a, b = _paired(correct_a, correct_b)
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise ValueError("a paired test got values other than 0 and 1; for a mean over samples use difference_interval")
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    return only_a, only_b, len(a) - only_a - only_b


def _paired(a: Sequence[float], b: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"runs of shapes {a.shape} and {b.shape} can't be paired; allowed: one value per problem, same problems")
    return a, b


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} of {n} samples; allowed: 1 <= k <= {n}; draw more samples or lower k")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}; allowed: between 0 and 1, such as 0.95")
