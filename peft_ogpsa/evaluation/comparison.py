# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""All differences of several models from one of them, and which of them are larger than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..text.refusal import Verdict
from .chance import holm
from .difference import Difference
from .estimates import Estimate
from .judgments import Judgment
from .losses import LossResult
from .means import Mean
from .report import Measurement, Sample
from .scores import TaskScore


class Comparison:
    """All differences of measurements from one of them, and which of them are larger than chance.

    All differences are tested together with Holm's method. If chance alone makes them, the probability that any of
    them is marked is at most 5 %, however many there are.

    Args:
        measurements: Measurements by the name to print.
        reference: Name of the measurement from which differences are computed. Default: the first one.
    """

    def __init__(self, measurements: Mapping[str, Measurement], reference: str | None = None):
        self.measurements = measurements
        self.reference = reference or next(iter(measurements), None)
        self.differences: dict[tuple[str, ...], Difference] = {}
        for name, own in measurements.items():
            if self.reference is not None and name != self.reference:
                found = _all_differences(measurements[self.reference], own)
                self.differences |= {(name, *key): difference for key, difference in found.items()}
        marks = holm([difference.p for difference in self.differences.values()])
        self.marked = {key for key, mark in zip(self.differences, marks, strict=True) if mark}

    @property
    def sets(self) -> list[str]:
        """Names of the further sets of prompts that any of the models was measured on."""
        return list(dict.fromkeys(name for measurement in self.measurements.values() for name in measurement.sets))

    def text(self, *key: str, rate: bool) -> str:
        """Format a difference with its interval and, if it is larger than chance, a star.

        Args:
            key: The model's name, and `"own"` with a quantity, `"set"` with its name and a quantity, `"task"` with its
                name and metric, or `"judge"` with the set (empty for the own data), the judge's name and the kind of
                prompts. A difference that is not known is a dash.
            rate: Format as a percentage.
        """
        difference = self.differences.get(key)
        if difference is None:
            return "-"
        style = "+.0%" if rate else "+.3f"
        value, low, high = (format(number, style) for number in (difference.value, difference.low, difference.high))
        interval = f"{low} to {high}" if math.isfinite(difference.high - difference.low) else "no interval"
        return f"{value} ({interval}){' *' if key in self.marked else ''}"

    @property
    def note(self) -> str:
        """Say what a star means, for the caption of a table. Empty if there are no differences."""
        n = len(self.differences)
        if not n:
            return ""
        which = f"all {n} differences from {self.reference} together" if n > 1 else "this one difference"
        return (
            f"Each 95 % interval is for one difference alone. * is larger than chance, by Holm's test of {which}: if "
            "chance alone makes the differences, at least 95 of 100 comparisons have no star."
        )


def differences(first: Measurement, second: Measurement) -> dict[str, Difference]:
    """Compare two measurements. Only quantities that both have are in the result.

    Rates on the same prompts are compared prompt by prompt (`paired_difference`), losses on the same rows row by row.
    If the outcomes are not stored or the prompts differ, the intervals are those of independent samples, which are
    wider.

    Returns:
        Differences by quantity: `general` and `kl` in nats per token, `refusal` and `over_refusal` as rates.
    """
    found = {
        "general": _general_difference(first, second),
        "kl": _loss_difference(first.kl, second.kl, first.kl_loss, second.kl_loss),
        "refusal": _rate_difference(first.refusal, second.refusal, first.harmful_samples, second.harmful_samples),
        "over_refusal": _rate_difference(
            first.over_refusal, second.over_refusal, first.benign_samples, second.benign_samples
        ),
    }
    return {
        name: Difference.of_mean(own) if isinstance(own, Mean) else own
        for name, own in found.items()
        if own is not None
    }


def task_difference(first: TaskScore, second: TaskScore) -> Difference | None:
    """Compare two scores in one metric. Scores of the same examples are compared example by example.

    Returns:
        The difference. None if one of the scores has no standard error.
    """
    same = first.examples == second.examples
    if first.is_rate and second.is_rate:
        right = _right(first), _right(second)
        return Difference.of_pairs(*right) if same else Difference.of_rates(*((sum(own), len(own)) for own in right))
    if same and first.values and second.values:
        return Difference.of_mean(Mean.of([b - a for a, b in zip(first.values, second.values, strict=True)]))
    if first.mean is None or second.mean is None:
        return None
    return Difference.of_mean(second.mean.minus(first.mean))


def _all_differences(first: Measurement, second: Measurement) -> dict[tuple[str, ...], Difference]:
    """Return all differences of two models, under the keys of `Comparison.text` without the model's name."""
    found: dict[tuple[str, ...], Difference | None] = {
        ("own", name): difference for name, difference in differences(first, second).items()
    }
    found |= _judge_differences("", first, second)
    for name in (own for own in second.sets if own in first.sets):
        pair = first.sets[name], second.sets[name]
        found |= {("set", name, quantity): difference for quantity, difference in differences(*pair).items()}
        found |= _judge_differences(name, *pair)
    scores = {(score.task, score.metric): score for score in first.tasks}
    for score in second.tasks:
        before = scores.get((score.task, score.metric))
        if before is not None:
            found["task", score.task, score.metric] = task_difference(before, score)
    return {key: difference for key, difference in found.items() if difference is not None}


def _judge_differences(place: str, first: Measurement, second: Measurement) -> dict[tuple[str, ...], Difference]:
    """Return the differences in refusal, as each judge sees it, on the kinds whose prompts are the same."""
    judgments = {(judgment.judge, judgment.kind): judgment for judgment in first.judgments}
    found: dict[tuple[str, ...], Difference] = {}
    for after in second.judgments:
        before = judgments.get((after.judge, after.kind))
        if before is not None and _same_prompts(first.samples(after.kind), second.samples(after.kind)):
            found["judge", place, after.judge, after.kind] = Difference.of_pairs(_refusals(before), _refusals(after))
    return found


def _rate_difference(
    first: Estimate | None, second: Estimate | None, first_samples: list[Sample], second_samples: list[Sample]
) -> Difference | None:
    if first is None or second is None:
        return None
    if first_samples and _same_prompts(first_samples, second_samples):
        return Difference.of_pairs(_refused(first_samples), _refused(second_samples))
    return Difference.of_rates(_count(first), _count(second))


def _loss_difference(
    first: Estimate | None, second: Estimate | None, first_loss: LossResult | None, second_loss: LossResult | None
) -> Mean | None:
    if first is None or second is None:
        return None
    if (
        first_loss is None
        or second_loss is None
        or first_loss.examples != second_loss.examples
        or first_loss.example_tokens != second_loss.example_tokens
    ):
        before, after = (Mean.from_interval(own.value, (own.low, own.high), own.n) for own in (first, second))
        return after.minus(before)
    each = [b - a for a, b in zip(first_loss.example_means, second_loss.example_means, strict=True)]
    return Mean.of(each, first_loss.example_tokens)


def _general_difference(first: Measurement, second: Measurement) -> Mean | None:
    """Return the difference of the mean over the general sets."""
    if not first.general or first.general.keys() != second.general.keys():
        return None
    each = [
        _loss_difference(first.general[name], second.general[name], first.losses.get(name), second.losses.get(name))
        for name in first.general
    ]
    return Mean.average([difference for difference in each if difference is not None])


def _right(score: TaskScore) -> list[bool]:
    return [value == 1 for value in score.values]


def _refused(samples: list[Sample]) -> list[bool]:
    return [sample.verdict is Verdict.REFUSAL for sample in samples]


def _refusals(judgment: Judgment) -> list[bool]:
    return [verdict == "refusal" for verdict in judgment.verdicts]


def _count(rate: Estimate) -> tuple[int, int]:
    return round(rate.value * rate.n), rate.n


def _same_prompts(first: list[Sample], second: list[Sample]) -> bool:
    return [sample.prompt for sample in first] == [sample.prompt for sample in second]
