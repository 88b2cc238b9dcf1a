"""Estimators against enumeration and closed forms."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import special

from jaxreason import estimators


@pytest.mark.parametrize(("correct", "n"), [(1, 3), (8, 10), (400, 1319), (0, 12), (12, 12)])
def test_wilson_bounds_solve_the_score_equation(correct, n):
    z = special.ndtri(0.975)
    low, high = estimators.wilson(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    for bound in (low, high):
        score = abs(correct / n - bound) - z * math.sqrt(bound * (1 - bound) / n)
        assert score == pytest.approx(0, abs=1e-9)
    assert low < high


def test_wilson_known_values_and_confidence():
    assert estimators.wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert estimators.wilson(0, 0) == (0.0, 1.0)
    narrow, wide = estimators.wilson(8, 10, 0.5), estimators.wilson(8, 10, 0.99)
    assert wide[0] < narrow[0] < 0.8 < narrow[1] < wide[1]
    with pytest.raises(ValueError, match="11 correct of 10"):
        estimators.wilson(11, 10)
    with pytest.raises(ValueError, match="confidence 95"):
        estimators.wilson(8, 10, 95)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            samples = [True] * c + [False] * (n - c)
            subsets = list(itertools.combinations(samples, k))
            assert estimators.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)
    with pytest.raises(ValueError, match="k = 5 of 4 samples"):
        estimators.pass_at_k(4, 1, 5)


def vote(answers, correct):
    """Compute the probability that a majority vote is right, ties broken evenly, by
    counting.
    """
    counts = {answer: answers.count(answer) for answer in answers if answer is not None}
    if not counts:
        return Fraction(0)
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    right = [Fraction(sum(c for a, c in zip(answers, correct) if a == winner), counts[winner]) for winner in winners]
    return sum(right) / len(winners)


@pytest.mark.parametrize(
    "answers",
    ["aaabb", "aabbc", "abcde", "aabb-", "-----", "aabbcc--", "aaab-cdd", "bbbbaaa"],
)
def test_majority_at_k_is_the_mean_vote_over_subsets(answers):
    answers = [None if a == "-" else a for a in answers]
    correct = [a == "a" for a in answers]
    for k in range(1, len(answers) + 1):
        votes = [
            vote([answers[i] for i in chosen], [correct[i] for i in chosen])
            for chosen in itertools.combinations(range(len(answers)), k)
        ]
        assert estimators.majority_at_k(answers, correct, k) == pytest.approx(float(sum(votes) / len(votes)), abs=1e-12)


def test_majority_at_k_over_classes():
    answers, correct = ["1/2", "0.5", "3", "3"], [True, True, False, False]

    def same(a, b):
        return Fraction(a) == Fraction(b)

    assert estimators.majority_at_k(answers, correct) == 0  # as strings, the two threes win
    assert estimators.majority_at_k(answers, correct, same=same) == 0.5  # as numbers, a tie
    assert estimators.majority_at_k([*answers, "2/4"], [*correct, True], same=same) == 1
    assert estimators.majority_at_k(["a", "a", None, None, None], [True, True, False, False, False]) == 1  # None never wins
    assert estimators.majority_at_k(["a", "a", "a"], [True, False, False]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="2 answers but 1 verdicts"):
        estimators.majority_at_k(["a", "b"], [True])


def test_majority_at_k_of_more_samples_than_binomials_in_float64():
    """With two classes the larger one wins unless fewer than half of the draws are of
    it: a hypergeometric tail.
    """
    for right, n, k in ((551, 1100, 551), (550, 1100, 550), (30, 5000, 9)):
        answers = ["a"] * right + [None if n == 5000 else "b"] * (n - right)
        got = estimators.majority_at_k(answers, [a == "a" for a in answers], k)
        if n == 5000:  # the only class wins if it is drawn at all
            expected = 1 - Fraction(math.comb(n - right, k), math.comb(n, k))
        else:
            ways = [
                math.comb(right, i) * math.comb(n - right, k - i) * (1 if 2 * i > k else Fraction(2 * i == k, 2))
                for i in range(k + 1)
            ]
            expected = Fraction(sum(ways), math.comb(n, k))
        assert got == pytest.approx(float(expected), rel=1e-10)


def test_majority_at_k_of_many_samples_is_finite_and_a_probability():
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 40, size=256).tolist()
    assert 0 < estimators.majority_at_k(answers, [a < 20 for a in answers], 64) < 1
    alike = [1] * 200 + [2] * 56
    assert estimators.majority_at_k(alike, [a == 1 for a in alike], 64) == pytest.approx(1, abs=1e-5)


def test_mcnemar_against_all_coin_flips():
    both, neither = [(1, 1)] * 5, [(0, 0)] * 7
    for only_a, only_b in itertools.product(range(6), repeat=2):
        a, b = zip(*both, *neither, *[(1, 0)] * only_a, *[(0, 1)] * only_b)
        n, seen = only_a + only_b, abs(only_a - only_b)
        flips = [abs(2 * sum(f) - n) >= seen for f in itertools.product((0, 1), repeat=n)]
        assert estimators.mcnemar(a, b) == pytest.approx(sum(flips) / len(flips), abs=1e-12)
    with pytest.raises(ValueError, match="paired_bootstrap"):
        estimators.mcnemar([0.5, 1], [1, 1])
    with pytest.raises(ValueError, match="can't be paired"):
        estimators.mcnemar([1, 1], [1, 1, 0])


def test_paired_bootstrap_is_about_the_difference():
    rng = np.random.default_rng(0)
    a = rng.random(400)  # problems differ widely in difficulty
    difference, low, high = estimators.paired_bootstrap(a, a + 0.05)
    assert (difference, low, high) == pytest.approx((0.05, 0.05, 0.05))  # variation common to both cancels
    b = a + 0.05 + 0.1 * rng.standard_normal(400)
    difference, low, high = estimators.paired_bootstrap(a, b, draws=4000)
    half = special.ndtri(0.975) * np.std(b - a) / math.sqrt(400)
    assert difference == pytest.approx(np.mean(b - a))
    assert (low, high) == pytest.approx((difference - half, difference + half), abs=1.5e-3)
    assert estimators.paired_bootstrap(a, b, draws=100, seed=1) == estimators.paired_bootstrap(a, b, draws=100, seed=1)


def test_mean_interval_is_students():
    values = [0.1, 0.4, 0.2, 0.35]
    mean, low, high = estimators.mean_interval(values)
    half = special.stdtrit(3, 0.975) * np.std(values, ddof=1) / 2
    assert (mean, low, high) == pytest.approx((np.mean(values), np.mean(values) - half, np.mean(values) + half))
    assert estimators.mean_interval([0.3]) == (0.3, -math.inf, math.inf)
    with pytest.raises(ValueError, match="no values"):
        estimators.mean_interval([])


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 29, 100])
@pytest.mark.parametrize("p", [0.6, 0.95, 0.975, 0.995])
def test_t_quantile(freedom, p):
    assert estimators._t_quantile(p, freedom) == pytest.approx(special.stdtrit(freedom, p), rel=1e-9)
