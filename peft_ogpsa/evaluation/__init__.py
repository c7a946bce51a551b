# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure the gain and the cost of safety training: refusal, over-refusal, general loss, divergence from the base."""

from ..text.generation import generate
from ..text.refusal import Verdict, classify
from .divergence import BaseAnswers, kl_from_base, own_answers
from .intervals import mean_interval, wilson
from .losses import LossResult, nats_per_token
from .plots import tradeoff
from .report import Evaluation, Evaluator, Figure, Measurement, Sample, evaluate, table

__all__ = [
    "BaseAnswers",
    "Evaluation",
    "Evaluator",
    "Figure",
    "LossResult",
    "Measurement",
    "Sample",
    "Verdict",
    "classify",
    "evaluate",
    "generate",
    "kl_from_base",
    "mean_interval",
    "nats_per_token",
    "own_answers",
    "table",
    "tradeoff",
    "wilson",
]
