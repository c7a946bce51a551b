# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""A number with its 95 % interval."""

from dataclasses import dataclass

from .intervals import wilson
from .losses import LossResult


@dataclass(frozen=True)
class Estimate:
    """One number: its value, its 95 % interval, and the number of examples or prompts behind it."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def from_loss(cls, loss: LossResult) -> "Estimate":
        """Build the estimate of a loss in nats per token."""
        return cls(loss.mean, *loss.interval(), n=len(loss.example_means))

    @classmethod
    def from_count(cls, count: int, n: int) -> "Estimate":
        """Build the estimate of a rate."""
        return cls(count / n, *wilson(count, n), n=n)
