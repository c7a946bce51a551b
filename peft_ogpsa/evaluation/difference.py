# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""A difference between two models: its interval, and how likely it is by chance alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .chance import fisher, mcnemar
from .intervals import paired_difference, rate_difference
from .means import Mean


@dataclass(frozen=True)
class Difference:
    """The second model's value minus the first one's, and its 95 % interval."""

    value: float
    low: float
    high: float
    p: float
    """The probability of a difference at least as large if chance alone makes it (two-sided)."""

    @classmethod
    def of_pairs(cls, first: Sequence[bool], second: Sequence[bool]) -> Difference:
        """Compare two rates on the same prompts: the paired bootstrap's interval, and McNemar's exact test."""
        value = sum(second) / len(second) - sum(first) / len(first)
        pairs = list(zip(first, second, strict=True))
        return cls(
            value,
            *paired_difference(first, second),
            mcnemar(pairs.count((True, False)), pairs.count((False, True))),
        )

    @classmethod
    def of_rates(cls, first: tuple[int, int], second: tuple[int, int]) -> Difference:
        """Compare two rates of independent samples: Newcombe's interval, and Fisher's exact test.

        Args:
            first: How often the event happened, and how often it could have happened.
            second: The same for the second rate.
        """
        value = second[0] / second[1] - first[0] / first[1]
        return cls(value, *rate_difference(first, second), fisher(first, second))

    @classmethod
    def of_mean(cls, mean: Mean) -> Difference:
        """Build a difference from a mean of differences: Student's interval and test."""
        return cls(mean.value, *mean.interval(), mean.p)

    @property
    def larger_than_chance(self) -> bool:
        """Whether this difference alone is larger than chance: p is at most 0.05.

        One in 20 differences is so by chance. `Comparison` tests many differences together.
        """
        return self.p <= 0.05
