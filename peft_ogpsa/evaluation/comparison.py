# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Differences between two models, with intervals that use that both were measured on the same prompts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import extras
from ..text.refusal import Verdict
from .estimates import Estimate
from .intervals import mean_interval, paired_difference, rate_difference
from .losses import LossResult
from .report import Measurement, Sample
from .scores import TaskScore

if TYPE_CHECKING:
    from rich.table import Table


_HEADINGS = {
    "general": "general loss",
    "kl": "KL from base",
    "refusal": "refuses harmful",
    "over_refusal": "refuses benign",
}


@dataclass(frozen=True)
class Difference:
    """The second model's value minus the first one's, and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def larger_than_chance(self) -> bool:
        """Whether the interval excludes zero."""
        return not self.low <= 0 <= self.high


def differences(first: Measurement, second: Measurement) -> dict[str, Difference]:
    """Compare two measurements. Only quantities that both have are in the result.

    Rates on the same prompts are compared prompt by prompt (`paired_difference`), losses on the same rows row by row.
    If the outcomes are not stored or the prompts differ, the intervals are those of independent samples, which are
    wider.

    Returns:
        Differences by quantity: `general` and `kl` in nats per token, `refusal` and `over_refusal` as rates.
    """
    found = {
        "general": _mean_difference(first, second),
        "kl": _loss_difference(first.kl, second.kl, first.kl_loss, second.kl_loss),
        "refusal": _rate_difference(first.refusal, second.refusal, first.harmful_samples, second.harmful_samples),
        "over_refusal": _rate_difference(
            first.over_refusal, second.over_refusal, first.benign_samples, second.benign_samples
        ),
    }
    return {name: difference for name, difference in found.items() if difference is not None}


def task_difference(first: TaskScore, second: TaskScore) -> Difference | None:
    """Compare two scores in one metric. Scores of the same examples are compared example by example.

    Returns:
        The difference. None if one of the scores has no standard error.
    """
    value = second.value - first.value
    if first.values and second.values and first.examples == second.examples:
        if first.is_rate and second.is_rate:
            return Difference(value, *paired_difference(_right(first), _right(second)))
        return Difference(value, *mean_interval([b - a for a, b in zip(first.values, second.values, strict=True)]))
    if first.stderr is None or second.stderr is None:
        return None
    half = 1.96 * math.hypot(first.stderr, second.stderr)
    return Difference(value, value - half, value + half)


def difference_table(measurements: Mapping[str, Measurement]) -> "Table":
    """Build a table of the differences from the first measurement. A star marks those that are larger than chance.

    Args:
        measurements: Two or more measurements by the name to print.
    """
    extras.check("eval", "The table of differences")
    from rich.table import Table
    from rich.text import Text

    (first_name, first), *others = measurements.items()
    grid = Table(
        title=Text(f"Differences from {first_name}"),
        caption="* is larger than chance: the 95 % interval excludes 0. One in 20 does so by chance alone.",
    )
    grid.add_column("model")
    for heading in _HEADINGS.values():
        grid.add_column(heading, justify="right")
    for name, measurement in others:
        found = differences(first, measurement)
        grid.add_row(
            Text(name), *(difference_text(found.get(column), rate="refusal" in column) for column in _HEADINGS)
        )
    return grid


def _rate_difference(
    first: Estimate | None, second: Estimate | None, first_samples: list[Sample], second_samples: list[Sample]
) -> Difference | None:
    if first is None or second is None:
        return None
    if first_samples and [s.prompt for s in first_samples] == [s.prompt for s in second_samples]:
        interval = paired_difference(_refused(first_samples), _refused(second_samples))
    else:
        interval = rate_difference(_count(first), _count(second))
    return Difference(second.value - first.value, *interval)


def _right(score: TaskScore) -> list[bool]:
    return [value == 1 for value in score.values]


def _refused(samples: list[Sample]) -> list[bool]:
    return [sample.verdict is Verdict.REFUSAL for sample in samples]


def _count(rate: Estimate) -> tuple[int, int]:
    return round(rate.value * rate.n), rate.n


def _loss_difference(
    first: Estimate | None, second: Estimate | None, first_loss: LossResult | None, second_loss: LossResult | None
) -> Difference | None:
    if first is None or second is None:
        return None
    value = second.value - first.value
    if first_loss is None or second_loss is None or first_loss.example_tokens != second_loss.example_tokens:
        half = math.hypot(first.high - first.low, second.high - second.low) / 2
        return Difference(value, value - half, value + half)
    each = [b - a for a, b in zip(first_loss.example_means, second_loss.example_means, strict=True)]
    return Difference(value, *mean_interval(each, weights=first_loss.example_tokens))


def _mean_difference(first: Measurement, second: Measurement) -> Difference | None:
    """Return the difference of the mean over the general sets, whose half-widths add like standard errors."""
    if not first.general or first.general.keys() != second.general.keys():
        return None
    each = [
        _loss_difference(first.general[name], second.general[name], first.losses.get(name), second.losses.get(name))
        for name in first.general
    ]
    known = [difference for difference in each if difference is not None]
    value = sum(difference.value for difference in known) / len(known)
    half = math.hypot(*((difference.high - difference.low) / 2 for difference in known)) / len(known)
    return Difference(value, value - half, value + half)


def difference_text(difference: Difference | None, *, rate: bool) -> str:
    """Format a difference for a table, with its interval and, if it is larger than chance, a star."""
    if difference is None:
        return "-"
    style = "+.0%" if rate else "+.3f"
    value, low, high = (format(number, style) for number in (difference.value, difference.low, difference.high))
    return f"{value} ({low} to {high}) {'*' if difference.larger_than_chance else ' '}"
