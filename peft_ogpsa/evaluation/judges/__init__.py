# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Judges: the matcher, published judge models, and models behind an OpenAI-compatible address."""

from .agreement import Agreement, agreement
from .endpoint import EndpointJudge
from .format import Format
from .grading import GradingJudge
from .judge import Judge, Kind, Label
from .loading import FORMATS, load_judges
from .matcher import MatcherJudge
from .model import ModelJudge

__all__ = [
    "FORMATS",
    "Agreement",
    "EndpointJudge",
    "Format",
    "GradingJudge",
    "Judge",
    "Kind",
    "Label",
    "MatcherJudge",
    "ModelJudge",
    "agreement",
    "load_judges",
]
