# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of tasks, and the accuracy on rows whose answers are either right or wrong."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..text.generation import generate
from ..text.thoughts import after_thought
from .exact import correct
from .intervals import Interval, wilson
from .means import Mean


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task: of lm-eval (a task or a group of tasks), or of the built-in held-out sets."""

    task: str
    metric: str
    """The metric's name. If the task has several filters, the filter follows after a comma."""
    value: float
    stderr: float | None
    """The standard error. None: lm-eval has none for this metric."""
    n: int
    """Number of examples."""
    higher_is_better: bool | None = None
    values: list[float] = field(default_factory=list)
    """The score of each example, to compare two models example by example. Empty if `value` is not their mean."""
    examples: str = ""
    """A checksum of the examples. Two scores with the same checksum can be compared example by example."""

    @property
    def is_rate(self) -> bool:
        """Whether each example is either right or wrong."""
        return bool(self.values) and set(self.values) <= {0.0, 1.0}

    @property
    def mean(self) -> Mean | None:
        """The score with its standard error, as a mean of examples. None without a standard error."""
        return None if self.stderr is None else Mean(self.value, self.stderr, self.n - 1)

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval: Wilson's for a rate, otherwise Student's. None without a standard error."""
        if self.is_rate:
            return wilson(round(sum(self.values)), self.n)
        return None if self.mean is None else self.mean.interval()


def accuracy(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    progress: bool = False,
) -> TaskScore:
    """Let a model answer rows of `load_heldout("facts")` or `load_heldout("arithmetic")`, and score the answers.

    Args:
        model: A causal language model, with or without adapter.
        tokenizer: Its tokenizer.
        task: Name of the score.
        rows: The rows, as in `correct`.
        max_new_tokens: Length at which an unfinished answer is cut. Worked solutions need more than the default.
        batch_size: Prompts per batch.
        progress: Show a progress bar.
    """
    answers = generate(model, tokenizer, rows, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
    values = [float(correct(row, after_thought(answer) or "")) for row, answer in zip(rows, answers, strict=True)]
    rate, n = sum(values) / len(values), len(values)
    stderr = math.sqrt(rate * (1 - rate) / (n - 1)) if n > 1 else None
    return TaskScore(task, "acc", rate, stderr, n, True, values, checksum(row["prompt"] for row in rows))


def checksum(examples: Iterable[str]) -> str:
    """Return a checksum of examples in their order."""
    return hashlib.sha256("\n".join(examples).encode()).hexdigest()
