# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Means of examples, with what is needed for their intervals and tests."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .chance import student
from .intervals import Interval, tail


@dataclass(frozen=True)
class Mean:
    """A mean, its standard error, and the degrees of freedom that Student's distribution has for it."""

    value: float
    stderr: float
    freedom: int

    @classmethod
    def of(cls, values: Sequence[float], weights: Sequence[float] | None = None) -> Mean:
        """Compute the mean, or the weighted mean, of independent examples.

        With weights (for example, tokens per example) the mean is a ratio of two sums. Its standard error is that of
        the jackknife, which is the usual one if the weights are equal. If a few examples have most of the weight,
        there are fewer degrees of freedom: by Kish's effective number of examples (1965), rounded down.

        Args:
            values: One value per example.
            weights: One weight per example. Default: equal weights.

        Raises:
            ValueError: If there are no values, the number of weights is different, or no weight is above 0.
        """
        n = len(values)
        weights = [1.0] * n if weights is None else weights
        if n == 0 or len(weights) != n:
            raise ValueError(
                f"There are {n} values and {len(weights)} weights. Give the same number of both, and at least one."
            )
        total = sum(weights)
        if not total > 0:
            raise ValueError(f"The weights sum to {total}. Give at least one that is above 0.")
        shares = [weight / total for weight in weights]
        mean = sum(share * value for share, value in zip(shares, values, strict=True))
        if max(shares) == 1:  # a single example, or a single one that counts
            return cls(mean, math.inf, 0)
        counted = [value for share, value in zip(shares, values, strict=True) if share]
        if math.isclose(min(counted), max(counted), rel_tol=1e-12):  # otherwise, rounding would pass for spread
            mean, values = counted[0], [counted[0]] * n
        changes = (share * (value - mean) / (1 - share) for share, value in zip(shares, values, strict=True))
        stderr = math.sqrt((n - 1) / n * sum(change * change for change in changes))
        effective = 1 / sum(share * share for share in shares)
        return cls(mean, stderr, max(1, math.floor(effective + 1e-9) - 1))

    @classmethod
    def from_interval(cls, value: float, interval: Interval, n: int) -> Mean:
        """Recover a mean of `n` examples from its 95 % interval."""
        half = (interval[1] - interval[0]) / 2
        stderr = 0.0 if half == 0 else math.inf if n < 2 else half / student_quantile(0.95, n - 1)
        return cls(value, stderr, n - 1)

    @classmethod
    def average(cls, means: Sequence[Mean]) -> Mean:
        """Return the mean of independent means. The smallest number of degrees of freedom is the careful choice."""
        n = len(means)
        stderr = math.hypot(*(mean.stderr for mean in means)) / n
        return cls(sum(mean.value for mean in means) / n, stderr, min(mean.freedom for mean in means))

    def minus(self, other: Mean) -> Mean:
        """Return the difference from an independent mean."""
        freedom = min(self.freedom, other.freedom)
        return Mean(self.value - other.value, math.hypot(self.stderr, other.stderr), freedom)

    def interval(self, level: float = 0.95) -> Interval:
        """Return Student's interval.

        Its bounds are infinite for a single example, whose spread is unknown, and for equal examples that are too few
        to show that the mean is not zero.
        """
        if self.freedom < 1 or (self.value and not self.stderr and self.p > 1 - level):
            return -math.inf, math.inf
        half = self.stderr and student_quantile(level, self.freedom) * self.stderr
        return self.value - half, self.value + half

    @property
    def p(self) -> float:
        """The probability of a mean at least as far from zero if the true mean is zero, by Student's test.

        Equal examples show no spread, and a few of them can be equal by chance. So theirs is that of the sign test:
        0.5 for two, 0.25 for three.
        """
        if self.value == 0:
            return 1.0
        return student(self.value / self.stderr, self.freedom) if self.stderr else 0.5**self.freedom


def mean_interval(values: Sequence[float], level: float = 0.95, weights: Sequence[float] | None = None) -> Interval:
    """Compute Student's interval for a mean, or for a weighted mean, of independent examples.

    Args:
        values: One value per example.
        level: Confidence level.
        weights: One weight per example, for example its number of tokens. Default: equal weights.

    Returns:
        Both bounds. They are infinite for a single value, whose spread is unknown.

    Raises:
        ValueError: If there are no values, or the number of weights is different.
    """
    return Mean.of(values, weights).interval(level)


@functools.cache
def student_quantile(level: float, freedom: int) -> float:
    """Return how many standard errors an interval of this level reaches to either side. Found by bisection."""
    outside = 2 * tail(level)
    low, high = 0.0, 1.0
    while student(high, freedom) > outside:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if student(middle, freedom) > outside else (low, middle)
    return high
