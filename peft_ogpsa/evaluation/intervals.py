# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals for rates, and for differences of rates."""

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
    z = NormalDist().inv_cdf(1 - tail(level))
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


def paired_difference(first: Sequence[bool], second: Sequence[bool], level: float = 0.95) -> Interval:
    """Compute the bootstrap's interval for the rate of `second` minus the rate of `first` on the same prompts.

    The distribution over all bootstrap samples is computed exactly, so no samples are drawn.

    Two imaginary prompts are added, one where only the first outcome is true and one where only the second is (Bonett
    and Price 2012). Without them, the interval is too narrow if few prompts differ: 4 that all differ in the same way
    would exclude zero.

    Args:
        first: One outcome per prompt.
        second: The outcomes of the same prompts in the same order.
        level: Confidence level.

    Raises:
        ValueError: If there are no outcomes, or their numbers differ.
    """
    if not first or len(first) != len(second):
        raise ValueError(
            f"There are {len(first)} and {len(second)} outcomes. Give the same number of both, and at least one."
        )
    pairs = list(zip(first, second, strict=True))
    n, only_first, only_second = len(pairs) + 2, pairs.count((True, False)) + 1, pairs.count((False, True)) + 1
    # One prompt of a sample adds -1, 0 or 1. The Fourier transform of a sum of n is a power of that of one.
    one = torch.zeros(2 * n + 1, dtype=torch.float64)
    one[0], one[1], one[-1] = (n - only_first - only_second) / n, only_second / n, only_first / n
    sums = torch.fft.irfft(torch.fft.rfft(one) ** n, len(one)).roll(n)  # the probabilities of -n to n
    outside = torch.tensor(tail(level), dtype=torch.float64)
    low = int(torch.searchsorted(sums.cumsum(0), outside)) - n
    high = n - int(torch.searchsorted(sums.flip(0).cumsum(0), outside))
    return low / n, high / n


def tail(level: float) -> float:
    """Return the probability on either side of an interval of this confidence level.

    Raises:
        ValueError: If the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}. Give a confidence level between 0 and 1, for example 0.95.")
    return (1 - level) / 2
