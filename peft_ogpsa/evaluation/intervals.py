# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals for rates and means, and for differences of rates."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch

Interval = tuple[float, float]


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Compute Wilson's score interval for a rate (Wilson 1927), which stays sensible at 0 and n successes.

    Args:
        successes: How often the event happened.
        n: How often it could have happened.
        level: Confidence level.

    Raises:
        ValueError: If `n` is below 1, or `successes` is not between 0 and `n`.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes is {successes} and n is {n}. Give n >= 1 and 0 <= successes <= n.")
    z = _normal_quantile(level)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At 0 and at n successes, one bound is the rate itself, up to rounding.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def rate_difference(first: tuple[int, int], second: tuple[int, int], level: float = 0.95) -> Interval:
    """Compute Newcombe's interval (1998, method 10) for the second rate minus the first, from Wilson's intervals.

    For rates of independent samples. If both rates are of the same prompts, it is valid but wide.

    Args:
        first: How often the event happened, and how often it could have happened.
        second: The same for the second rate.
        level: Confidence level.
    """
    (low_1, high_1), (low_2, high_2) = wilson(*first, level), wilson(*second, level)
    rate_1, rate_2 = first[0] / first[1], second[0] / second[1]
    difference = rate_2 - rate_1
    return (
        difference - math.hypot(rate_2 - low_2, high_1 - rate_1),
        difference + math.hypot(high_2 - rate_2, rate_1 - low_1),
    )


def paired_difference(
    first: Sequence[bool], second: Sequence[bool], level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Bootstrap an interval for the rate of `second` minus the rate of `first`, where both are of the same prompts.

    Two imaginary prompts are added, one where only the first outcome is true and one where only the second is (Bonett
    and Price 2012). Without them, the interval is too narrow if few prompts differ: 4 that all differ in the same way
    would exclude zero.

    Args:
        first: One outcome per prompt.
        second: The outcomes of the same prompts in the same order.
        level: Confidence level.
        draws: Number of bootstrap samples.
        seed: Seed of the bootstrap samples.

    Raises:
        ValueError: If there are no outcomes, or their numbers differ.
    """
    if not first or len(first) != len(second):
        raise ValueError(
            f"There are {len(first)} and {len(second)} outcomes. Give the same number of both, and at least one."
        )
    pairs = list(zip(first, second, strict=True))
    n, only_first, only_second = len(pairs) + 2, pairs.count((True, False)) + 1, pairs.count((False, True)) + 1
    # A sample of n prompts is a multinomial draw of three counts.
    generator = torch.Generator().manual_seed(seed)
    total = torch.full((draws,), float(n), dtype=torch.float64)
    up = torch.binomial(total, torch.full_like(total, only_second / n), generator)
    down = torch.binomial(total - up, torch.full_like(total, only_first / (n - only_second)), generator)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = ((up - down) / n).quantile(tails).tolist()
    return low, high


def mean_interval(values: Sequence[float], level: float = 0.95, weights: Sequence[float] | None = None) -> Interval:
    """Compute Student's interval for a mean, or for a weighted mean, of independent examples.

    With weights (for example, tokens per example) the mean is a ratio of two sums. Its standard error is that of the
    linearized ratio, which is the usual standard error if the weights are equal.

    Args:
        values: One value per example.
        level: Confidence level.
        weights: One weight per example. Default: equal weights.

    Returns:
        Both bounds. They are infinite for a single value, whose spread is unknown.

    Raises:
        ValueError: If there are no values, or the number of weights is different.
    """
    n = len(values)
    weights = [1.0] * n if weights is None else weights
    if n == 0 or len(weights) != n:
        raise ValueError(
            f"There are {n} values and {len(weights)} weights. Give the same number of both, and at least one."
        )
    total = sum(weights)
    mean = sum(weight * value for weight, value in zip(weights, values, strict=True)) / total
    if n == 1:
        return -math.inf, math.inf
    squares = sum((weight * (value - mean)) ** 2 for weight, value in zip(weights, values, strict=True))
    half = _student_quantile(level, n - 1) * math.sqrt(n / (n - 1) * squares) / total
    return mean - half, mean + half


def _normal_quantile(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}. Give a confidence level between 0 and 1, for example 0.95.")
    return NormalDist().inv_cdf((1 + level) / 2)


def _student_quantile(level: float, freedom: int) -> float:
    """Return a quantile of Student's t-distribution.

    It is exact for 1 and 2 degrees of freedom. For more, it uses the expansion of Abramowitz and Stegun 26.7.5 (0.2 %
    off at 3).
    """
    z = _normal_quantile(level)
    if freedom == 1:
        return math.tan(math.pi * level / 2)
    if freedom == 2:
        return level * math.sqrt(2 / (1 - level * level))
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
