# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Agreement of two judges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..intervals import Interval, wilson
from .judge import Label


@dataclass(frozen=True)
class Agreement:
    """How often two judges give the same verdict on the same answers.

    Answers that are unclear to either judge are counted apart. They are in neither `share` nor `kappa`.
    """

    n: int
    """Number of answers that are clear to both."""
    same: int
    """Number of those on which both give the same verdict."""
    kappa: float | None
    """Cohen's kappa (1960): agreement beyond chance. 1 is perfect, 0 is chance. None: undefined, because no answer is
    clear to both, or both give one and the same verdict to all of them."""
    unclear_first: int
    """Number of answers that are unclear to the first judge alone."""
    unclear_second: int
    unclear_both: int

    @property
    def share(self) -> float | None:
        """Share of the clear answers on which both agree. None if there are none."""
        return self.same / self.n if self.n else None

    @property
    def interval(self) -> Interval | None:
        """Wilson's 95 % interval of `share`."""
        return wilson(self.same, self.n) if self.n else None


def agreement(first: Sequence[Label | None], second: Sequence[Label | None]) -> Agreement:
    """Compare the verdicts of two judges on the same answers.

    Args:
        first: The first judge's verdicts. None: unclear.
        second: The second judge's verdicts, in the same order.

    Raises:
        ValueError: If the numbers of verdicts differ.
    """
    if len(first) != len(second):
        raise ValueError(f"There are {len(first)} and {len(second)} verdicts. Give verdicts on the same answers.")
    pairs = list(zip(first, second, strict=True))
    clear = [(a, b) for a, b in pairs if a is not None and b is not None]
    n, same = len(clear), sum(a == b for a, b in clear)
    return Agreement(
        n=n,
        same=same,
        kappa=_kappa(n, same, Counter(a for a, _ in clear), Counter(b for _, b in clear)),
        unclear_first=sum(a is None and b is not None for a, b in pairs),
        unclear_second=sum(a is not None and b is None for a, b in pairs),
        unclear_both=sum(a is None and b is None for a, b in pairs),
    )


def _kappa(n: int, same: int, first: Counter[Label], second: Counter[Label]) -> float | None:
    # (observed - expected) / (1 - expected), multiplied by n * n: whole numbers up to the division.
    expected = sum(first[label] * second[label] for label in first)
    return None if expected == n * n else (n * same - expected) / (n * n - expected)
