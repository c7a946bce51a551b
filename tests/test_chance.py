"""P-values, Student's intervals and the test of many differences at once, against SciPy and definitions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from peft_ogpsa.evaluation import mean_interval, wilson
from peft_ogpsa.evaluation.chance import fisher, holm, mcnemar, student
from peft_ogpsa.evaluation.means import Mean, student_quantile

LEVELS = [0.5, 0.95, 1 - 0.05 / 12, 1 - 0.05 / 100]


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 9), (3, 12), (7, 7), (40, 90), (900, 1100), (0, 200)])
def test_mcnemar_is_the_exact_binomial_test(b, c):
    expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == mcnemar(c, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("first", "second"),
    [((3, 10), (9, 12)), ((0, 5), (0, 9)), ((0, 41), (12, 60)), ((24, 24), (23, 24)), ((700, 1319), (640, 1319))],
)
def test_fisher_is_twice_the_smaller_tail(first, second):
    counts = [[first[0], first[1] - first[0]], [second[0], second[1] - second[0]]]
    tails = [stats.fisher_exact(counts, alternative=side).pvalue for side in ("less", "greater")]
    expected = pytest.approx(min(1, 2 * min(tails)), rel=1e-8)
    assert fisher(first, second) == expected
    assert fisher(second, first) == expected


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 23, 24, 149, 150, 5000])
def test_student(freedom):
    for ratio in (0.0, 0.3, 1.0, 2.1, -2.9, 5.0, 9.0, 80.0):
        assert student(ratio, freedom) == pytest.approx(2 * stats.t.sf(abs(ratio), freedom), rel=1e-6, abs=1e-12)
    for level in LEVELS:
        assert student_quantile(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-7)
    assert student(math.inf, freedom) == pytest.approx(0, abs=1e-12)


def test_what_is_unknown_is_not_larger_than_chance():
    assert student(math.nan, 9) == student(7.0, 0) == Mean(3.0, math.nan, 9).p == Mean.of([5.0]).p == 1.0
    assert Mean.of([0.0, 0.0]).p == 1.0


@pytest.mark.parametrize("n", [2, 3, 5, 6, 24])
@pytest.mark.parametrize("value", [0.5, -2 / 41, 1 / 48])
def test_equal_examples_have_the_sign_tests_p(n, value):
    rounded = [value + (i % 2) * 1e-17 for i in range(n - 1)] + [1 + value - 1]
    for values in ([value] * n, rounded):
        mean = Mean.of(values)
        assert mean.p == pytest.approx(stats.binomtest(n, n).pvalue)
        unknown = stats.binomtest(n, n).pvalue > 0.05
        assert mean.interval() == ((-math.inf, math.inf) if unknown else (mean.value, mean.value))
        assert Mean.from_interval(mean.value, mean.interval(), n).p == pytest.approx(1 if unknown else mean.p)


def test_weights_must_count():
    with pytest.raises(ValueError, match="above 0"):
        Mean.of([1.0, 2.0], [0.0, 0.0])


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize(("k", "n"), [(0, 24), (3, 24), (149, 150)])
def test_wilson_holds_at_small_tails(k, n, level):
    expected = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert wilson(k, n, level) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(st.lists(st.sampled_from([0.0, 0.001, 0.004, 0.006, 0.0125, 0.02, 0.04, 0.05, 0.3, 1.0]), max_size=7))
def test_holm_is_the_closed_test(p_values):
    """A difference is marked if and only if every group that has it fails Bonferroni's test."""
    everything = range(len(p_values))
    groups = [g for size in range(1, len(p_values) + 1) for g in itertools.combinations(everything, size)]
    failed = {group for group in groups if min(p_values[i] for i in group) <= 0.05 / len(group)}
    expected = [all(group in failed for group in groups if i in group) for i in everything]
    assert holm(p_values) == expected


class TestMean:
    def test_weights_as_in_the_jackknife(self):
        rng = np.random.default_rng(0)
        values, weights = rng.normal(2, 1, 9), rng.integers(1, 200, 9).astype(float)
        mean = Mean.of(values.tolist(), weights.tolist())
        left_out = [np.average(np.delete(values, i), weights=np.delete(weights, i)) for i in range(9)]
        assert mean.value == pytest.approx(np.average(values, weights=weights))
        assert mean.stderr == pytest.approx(math.sqrt(8 / 9 * np.sum((np.array(left_out) - mean.value) ** 2)))
        assert mean.freedom == int(weights.sum() ** 2 / (weights**2).sum()) - 1
        half = stats.t.ppf(0.975, mean.freedom) * mean.stderr
        assert mean.interval() == pytest.approx((mean.value - half, mean.value + half))
        assert mean.p == pytest.approx(2 * stats.t.sf(mean.value / mean.stderr, mean.freedom))

    def test_equal_weights_are_students(self):
        values = [0.3, 1.2, 0.7, 2.0]
        test = stats.ttest_1samp(values, 0)
        for mean in (Mean.of(values), Mean.of(values, [7.0] * 4)):
            assert mean.p == pytest.approx(test.pvalue)
            assert mean.interval(0.99) == pytest.approx(tuple(test.confidence_interval(0.99)))

    def test_it_is_recovered_from_its_interval(self):
        mean = Mean.of([0.3, 1.2, 0.7, 2.0])
        again = Mean.from_interval(mean.value, mean.interval(), 4)
        assert (again.value, again.stderr, again.freedom) == pytest.approx((mean.value, mean.stderr, 3))
        assert Mean.from_interval(0.0, (0.0, 0.0), 30) == Mean(0.0, 0.0, 29)  # the base's KL from itself
        assert Mean.from_interval(2.0, (-math.inf, math.inf), 1).p == 1.0

    def test_independent_means(self):
        one, two = Mean(1.0, 0.3, 20), Mean(3.0, 0.4, 9)
        assert two.minus(one) == Mean(2.0, 0.5, 9)
        assert Mean.average([one, two]) == Mean(2.0, 0.25, 9)

    @pytest.mark.parametrize("level", LEVELS[1:3])
    def test_examples_of_very_different_lengths(self, level):
        """The interval misses the truth about as often as it says. With n - 1 degrees of freedom: 2 to 4 times."""
        rng = np.random.default_rng(0)
        n, runs = 24, 8000
        weights = np.exp(rng.normal(4, 1, (runs, n))).tolist()
        values = rng.normal(0, 1, (runs, n)).tolist()
        misses = sum(Mean.of(v, w).p < 1 - level for v, w in zip(values, weights, strict=True))
        assert misses <= 1.4 * (1 - level) * runs

    def test_one_example_has_all_the_weight(self):
        mean = Mean.of([3.0, 5.0], [2.0, 0.0])
        assert mean.value == 3.0
        assert mean.interval() == (-math.inf, math.inf)
        assert mean.p == 1.0

    def test_bad_input(self):
        assert mean_interval([1.0]) == (-math.inf, math.inf)
        with pytest.raises(ValueError, match="level is 95"):
            mean_interval([1.0, 2.0], level=95)
