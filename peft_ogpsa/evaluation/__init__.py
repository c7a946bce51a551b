# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""What safety training gained and what it cost: refusal, over-refusal, general loss, divergence from the base."""

from peft_ogpsa.evaluation.divergence import BaseAnswers, kl_from_base, own_answers
from peft_ogpsa.evaluation.generation import generate
from peft_ogpsa.evaluation.intervals import mean_interval, wilson
from peft_ogpsa.evaluation.losses import LossResult, nats_per_token
from peft_ogpsa.evaluation.plots import tradeoff
from peft_ogpsa.evaluation.refusal import Verdict, classify
from peft_ogpsa.evaluation.report import Evaluation, Evaluator, Figure, Measurement, Sample, evaluate, table

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
