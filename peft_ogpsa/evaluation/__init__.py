# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure the gain and the cost of safety training: refusal, over-refusal, general loss, KL from base."""

import warnings
from typing import Any

from ..text.generation import generate
from ..text.refusal import Verdict, classify
from .comparison import Comparison, differences, task_difference
from .difference import Difference
from .difference_table import difference_table
from .divergence import BaseAnswers, kl_from_base, own_answers
from .exact import correct
from .intervals import paired_difference, rate_difference, wilson
from .judge_table import judge_tables
from .judges import Agreement, Judge, MatcherJudge, agreement, load_judges
from .judging import JudgeError, judged
from .judgments import JudgePair, Judgment, answer_length
from .losses import LossResult, nats_per_token
from .means import mean_interval
from .plots import tradeoff
from .report import Estimate, Evaluation, Evaluator, Measurement, Sample, evaluate, table
from .scores import TaskScore, accuracy
from .set_table import set_table
from .task_table import task_table
from .tasks import TASKS, TaskRunner

__all__ = [
    "TASKS",
    "Agreement",
    "BaseAnswers",
    "Comparison",
    "Difference",
    "Estimate",
    "Evaluation",
    "Evaluator",
    "Judge",
    "JudgeError",
    "JudgePair",
    "Judgment",
    "LossResult",
    "MatcherJudge",
    "Measurement",
    "Sample",
    "TaskRunner",
    "TaskScore",
    "Verdict",
    "accuracy",
    "agreement",
    "answer_length",
    "classify",
    "correct",
    "difference_table",
    "differences",
    "evaluate",
    "generate",
    "judge_tables",
    "judged",
    "kl_from_base",
    "load_judges",
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
