# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure the gain and the cost of safety training: refusal, over-refusal, general loss, KL from base."""

import warnings
from typing import Any

from ..text.generation import generate
from ..text.refusal import Verdict, classify
from .comparison import Difference, difference_table, differences, task_difference
from .divergence import BaseAnswers, kl_from_base, own_answers
from .exact import correct
from .intervals import mean_interval, paired_difference, rate_difference, wilson
from .losses import LossResult, nats_per_token
from .plots import tradeoff
from .report import Estimate, Evaluation, Evaluator, Measurement, Sample, evaluate, table
from .scores import TaskScore, accuracy
from .set_table import set_table
from .task_table import task_table
from .tasks import TASKS, TaskRunner

__all__ = [
    "TASKS",
    "BaseAnswers",
    "Difference",
    "Estimate",
    "Evaluation",
    "Evaluator",
    "LossResult",
    "Measurement",
    "Sample",
    "TaskRunner",
    "TaskScore",
    "Verdict",
    "accuracy",
    "classify",
    "correct",
    "difference_table",
    "differences",
    "evaluate",
    "generate",
    "kl_from_base",
    "mean_interval",
    "nats_per_token",
    "own_answers",
    "paired_difference",
    "rate_difference",
    "set_table",
    "table",
    "task_difference",
    "task_table",
    "tradeoff",
    "wilson",
]


def __getattr__(name: str) -> Any:
    if name != "Figure":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.Figure is now {__name__}.Estimate, and will go.", DeprecationWarning, stacklevel=2)
    return Estimate
