"""Estimators against enumeration and closed forms."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import special, stats

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
    with pytest.raises(ValueError, match="difference_interval"):
        estimators.mcnemar([0.5, 1], [1, 1])
    with pytest.raises(ValueError, match="can't be paired"):
        estimators.mcnemar([1, 1], [1, 1, 0])


def test_the_interval_of_a_difference_is_normal_for_many_problems():
    rng = np.random.default_rng(0)
    difference = 0.05 + 0.1 * rng.standard_normal(4000)
    half = special.ndtri(0.975) * np.std(difference) / math.sqrt(4000)
    mean = np.mean(difference)
    assert estimators.difference_interval(difference) == pytest.approx((mean - half, mean + half), abs=1e-4)


def test_mean_interval_is_students():
    values = [0.1, 0.4, 0.2, 0.35]
    mean, low, high = estimators.mean_interval(values)
    half = special.stdtrit(3, 0.975) * np.std(values, ddof=1) / 2
    assert (mean, low, high) == pytest.approx((np.mean(values), np.mean(values) - half, np.mean(values) + half))
    assert estimators.mean_interval([0.3]) == (0.3, -math.inf, math.inf)
    assert estimators.mean_interval([0.9, 1.0, 1.0], within=(0, 1))[2] == 1
    assert estimators.mean_interval([0.0, 0.1], within=(0, 1))[1] == 0
    with pytest.raises(ValueError, match="no values"):
        estimators.mean_interval([])


# --- paired seeds ---


def test_the_t_test_and_its_interval_agree_with_scipy():
    draw = np.random.default_rng(0)
    for n in (2, 3, 5, 20):
        values = draw.normal(0.3, 1, n)
        theirs = stats.ttest_1samp(values, 0)
        assert estimators.paired_t(values) == pytest.approx(theirs.pvalue)
        interval = theirs.confidence_interval(0.9)
        assert estimators.mean_interval(values, 0.9)[1:] == pytest.approx((interval.low, interval.high))
    assert estimators.paired_t([0.0, 0.0]) == estimators.paired_t([3.0]) == 1.0


def test_equal_differences_are_no_proof():
    """Accuracies are multiples of 1 / problems, so that they are often due to chance."""
    for values in ([0.1, 0.1], [-0.1, -0.1], np.subtract([0.7, 0.6], [0.5, 0.4])):  # the last up to rounding
        assert not estimators.varies(values)
        assert estimators.paired_t(values) == estimators.sign_flip(values) == 0.5
    assert estimators.varies([0.1, 0.1 + 1e-9])
    draw, n = np.random.default_rng(0), 20
    false = [estimators.paired_t(np.subtract(*draw.binomial(n, 0.5, (2, 2))) / n) < 0.05 for _ in range(2000)]
    assert np.mean(false) < 0.02  # 0.075 if equal differences counted as certain


@pytest.mark.parametrize("values", [[0.06, 0.04, 0.0, -0.04, -0.06], [0.1, 0.2, -0.3], [0.7 - 0.6, 0.3 - 0.1, 0.2 - 0.5]])
def test_sums_that_are_equal_up_to_rounding_are_ties_of_sign_flips(values):
    assert estimators.sign_flip(values) == 1


@pytest.mark.parametrize(
    ("problems", "samples", "accuracy", "correlation"),
    [(128, 5, 0.99, 0.16), (50, 16, 0.01, 0.5), (20, 16, 0.97, 0.5), (50, 16, 0.03, 0.8), (128, 16, 0.01, 0.5), (8, 4, 0.3, 0.5)],
)
def test_the_clustered_interval_covers_near_its_ends(problems, samples, accuracy, correlation):
    """A t-interval of the problems' means covers 0.64 to 0.93 of these, and the interval
    without added problems 0.855 to 0.97.
    """
    draw, covered, total = np.random.default_rng(0), [], 1 / correlation - 1
    a, b = accuracy * total, (1 - accuracy) * total
    for _ in range(1500):
        found = estimators.clustered(draw.random((problems, samples)) < draw.beta(a, b, (problems, 1)))
        assert 0 <= found.low <= found.mean <= found.high <= 1
        covered.append(found.low <= accuracy <= found.high)
    assert np.mean(covered) > 0.94  # two standard errors below 0.95


@pytest.mark.parametrize(("problems", "samples"), [(50, 8), (50, 16), (200, 4)])
def test_the_interval_of_a_difference_covers_where_few_problems_differ(problems, samples):
    """One problem in 50 becomes easy; a t-interval covers 0.69 to 0.91 of these."""
    draw, covered = np.random.default_rng(0), []
    for _ in range(1500):
        a = draw.beta(0.0075, 0.2425, problems)
        b = np.where(draw.random(problems) < 0.02, 1.0, a)
        difference = (draw.binomial(samples, b) - draw.binomial(samples, a)) / samples
        low, high = estimators.difference_interval(difference)
        assert -1 <= low <= difference.mean() <= high <= 1
        covered.append(low <= 0.02 * (1 - 0.03) <= high)
    assert np.mean(covered) > 0.92


def test_the_interval_of_a_difference_by_hand():
    values = [1.0, 0.0, 0.5, -0.5]
    added = np.array([*values, *[1.0] * 4, *[-1.0] * 4])
    weights = [1.0] * 4 + [1 / 16] * 8  # a quarter of a problem at each end
    mean = np.average(added, weights=weights)
    variance = np.average((added - mean) ** 2, weights=weights) * 4.5 / 3.5
    low, high = estimators.difference_interval(values)
    half = 1.959964 * np.sqrt(variance / 4)
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half))
    assert estimators.difference_interval([1.0, 1.0, 0.0])[1] == 1.0
    with pytest.raises(ValueError, match="allowed: one value per problem"):
        estimators.difference_interval([])


def test_the_interval_of_few_problems_that_differ_has_a_width():
    """A bootstrap of the same problems covers 0.72."""
    draw, covered = np.random.default_rng(0), []
    for _ in range(300):
        better = draw.random(128) < 0.01
        _, low, high, _ = estimators.paired_posterior(np.zeros(128), better, draws=2000)
        covered.append(low <= 0.01 <= high)
    assert np.mean(covered) > 0.94


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_t_interval_of_few_seeds_covers_as_it_says(n):
    draw = np.random.default_rng(n)
    covered = [low <= 0.7 <= high for _, low, high in (estimators.mean_interval(draw.normal(0.7, 0.1, n)) for _ in range(4000))]
    assert 0.938 < np.mean(covered) < 0.962  # four standard errors


def test_signs_are_flipped_as_by_brute_force():
    draw = np.random.default_rng(1)
    for n in (1, 2, 4, 6):
        values = draw.normal(0.5, 1, n)
        means = [abs(np.dot(signs, values)) for signs in itertools.product((1, -1), repeat=n)]
        expected = np.mean([mean >= abs(values.sum()) - 1e-12 for mean in means])
        assert estimators.sign_flip(values) == pytest.approx(expected)
    assert estimators.sign_flip([0.1] * 5) == 2 / 2**5  # the lowest there is
    assert estimators.sign_flip([0.0] * 5) == 1
    with pytest.raises(ValueError, match="allowed: 1 to 20"):
        estimators.sign_flip([0.1] * 21)


def test_sign_flips_and_the_t_test_are_false_as_often_as_they_say():
    draw = np.random.default_rng(2)
    samples = draw.normal(0, 1, (3000, 6))
    assert 0.035 < np.mean([estimators.paired_t(values) < 0.05 for values in samples]) < 0.066
    assert np.mean([estimators.sign_flip(values) <= 0.05 for values in samples]) < 0.05  # 2 / 64 is the only one below


def test_holm_by_hand():
    assert estimators.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert estimators.holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert estimators.holm([]) == []


def test_seeds_that_are_needed_have_the_power_by_simulation():
    for ratio in (3.0, 1.5, 0.8):
        n = estimators.seeds_needed(ratio, 1.0)
        draw = np.random.default_rng(3)

        def power(n, draw=draw, ratio=ratio):
            return np.mean(stats.ttest_1samp(draw.normal(ratio, 1, (4000, n)), 0, axis=1).pvalue < 0.05)

        assert power(n) > 0.78
        assert n == 2 or power(n - 1) < 0.82
    assert estimators.seeds_needed(0.0, 1.0) is None
    assert estimators.seeds_needed(0.1, 0.0) == 2
    assert estimators.seeds_needed(1e-4, 1.0) is None


def test_the_posterior_of_few_problems_covers_and_has_a_width():
    draw, covered = np.random.default_rng(4), []
    for _ in range(1500):
        only_a, only_b, _ = shares = draw.dirichlet([1, 1, 1])  # the prior
        kinds = draw.choice(3, size=30, p=shares)
        _, low, high, _ = estimators.paired_posterior(kinds == 0, kinds == 1, draws=1000)
        covered.append(low <= only_b - only_a <= high)
    assert 0.925 < np.mean(covered) < 0.97
    mean, low, high, better = estimators.paired_posterior([1] * 20, [1] * 20)
    assert low < 0 < high
    assert (mean, better) == (pytest.approx(0, abs=0.01), pytest.approx(0.5, abs=0.02))


# --- several samples per problem ---


def subsets(values, k):
    return list(itertools.combinations(range(len(values)), k))


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_pass_hat_k_and_best_of_k_are_means_over_all_subsets(k):
    rng = np.random.default_rng(k)
    correct = rng.random(6) < 0.6
    scores = np.array([0.3, -1.0, 0.3, 2.0, 2.0, 0.0])  # with ties
    every = subsets(correct, k)
    assert estimators.pass_hat_k(6, int(correct.sum()), k) == pytest.approx(np.mean([correct[list(s)].all() for s in every]))
    best = []
    for s in map(list, every):
        top = [i for i in s if scores[i] == scores[s].max()]
        best.append(correct[top].mean())
    assert estimators.best_of_k(scores, correct, k) == pytest.approx(np.mean(best))
    assert estimators.best_of_k(correct, correct, k) == pytest.approx(estimators.pass_at_k(6, int(correct.sum()), k))


def test_answers_are_in_classes_by_equality_or_by_a_function():
    answers, correct = ["1/2", "0.5", None, "2", "1/2"], [True, True, False, False, False]
    assert [c.answer for c in estimators.answer_classes(answers, correct)] == ["1/2", "0.5", "2"]
    same = estimators.answer_classes(answers, correct, lambda a, b: {a, b} == {"1/2", "0.5"})
    assert [(c.answer, c.correct) for c in same] == [("1/2", [True, True, False]), ("2", [False])]


@pytest.mark.parametrize(("problems", "samples"), [(20, 4), (50, 8), (200, 2)])
def test_the_clustered_interval_covers_the_true_accuracy(problems, samples):
    """Problems of very different difficulty; samples taken for independent would cover
    far less.
    """
    rng = np.random.default_rng(0)
    covered = naive = 0
    for _ in range(1500):
        correct = rng.random((problems, samples)) < rng.beta(0.5, 0.5, problems)[:, None]
        found = estimators.clustered(correct)
        covered += found.low <= 0.5 <= found.high
        low, high = estimators.wilson(int(correct.sum()), correct.size)
        naive += low <= 0.5 <= high
    assert 0.92 < covered / 1500 < 0.975
    assert naive < covered


def test_the_variance_is_split_into_problems_and_samples():
    rng = np.random.default_rng(1)
    alike = estimators.clustered(rng.random((4000, 8)) < 0.3)  # every problem is as hard
    assert alike.within == pytest.approx(0.21, abs=0.01)
    assert alike.between < 0.005
    assert alike.sampling_share > 0.9
    hard = estimators.clustered(np.repeat(rng.random((4000, 1)) < 0.3, 8, axis=1))  # every sample of a problem is the same
    assert (hard.within, hard.sampling_share) == (0, 0)
    assert hard.between == pytest.approx(0.21, abs=0.01)
    # More samples narrow the interval by as much as the share says.
    p = rng.beta(2, 2, 4000)[:, None]
    few, many = (estimators.clustered(rng.random((4000, k)) < p) for k in (2, 1000))
    assert ((many.high - many.low) / (few.high - few.low)) ** 2 == pytest.approx(1 - few.sampling_share, abs=0.05)


def test_one_sample_has_the_wilson_interval():
    found = estimators.clustered(np.array([[1], [0], [1], [1]]))
    assert (found.mean, (found.low, found.high)) == (0.75, estimators.wilson(3, 4))
    every = estimators.clustered(np.ones((5, 3)))
    assert (every.low, every.high) == estimators.wilson(5, 5)
    with pytest.raises(ValueError, match="allowed: problems x samples"):
        estimators.clustered(np.zeros((0, 3)))


def test_calibration_by_hand():
    found = estimators.calibration([0.5, 0.5, 1.0, 1.0, 0.1], [1, 0, 1, 0, 0], bins=5)
    assert found.bins == [(0.0, 0.2, 1, 0.1, 0.0), (pytest.approx(0.4), pytest.approx(0.6), 2, 0.5, 0.5), (0.8, 1.0, 2, 1.0, 0.5)]
    assert found.error == pytest.approx((0.1 + 0 + 2 * 0.5) / 5)


def test_so_many_problems_show_a_difference():
    rng = np.random.default_rng(2)
    only_a, only_b = 0.05, 0.15
    variance = only_a + only_b - (only_b - only_a) ** 2
    n = estimators.problems_needed(only_b - only_a, variance)
    shown = 0
    for _ in range(2000):
        drawn = rng.multinomial(n, [only_a, only_b, 1 - only_a - only_b])
        difference = (drawn[1] - drawn[0]) / n
        error = np.sqrt(((drawn[0] + drawn[1]) / n - difference**2) / n)
        shown += abs(difference) > 1.96 * error
    assert shown / 2000 == pytest.approx(0.8, abs=0.04)
    assert estimators.problems_needed(0.0, 0.1) is None
