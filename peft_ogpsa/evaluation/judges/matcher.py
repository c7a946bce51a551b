# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The judge that matches phrases."""

from __future__ import annotations

from collections.abc import Sequence

from ...text.refusal import Verdict, classify
from .judge import Judge, Kind, Label

_LABELS: dict[Verdict, Label | None] = {
    Verdict.COMPLIANCE: "compliance",
    Verdict.REFUSAL: "refusal",
    Verdict.UNCLEAR: None,
}


class MatcherJudge(Judge):
    """Judge by the phrases of `peft_ogpsa.evaluation.classify`: does the opening decline?

    It is free and always the same, and knows no partial refusals.
    """

    name = "matcher"
    answer_tokens = 32

    def judge(self, kind: Kind, prompts: Sequence[str], answers: Sequence[str]) -> list[Label | None]:
        """Return one verdict for each answer. None: empty, a loop, or noise."""
        self.check(kind, prompts, answers)
        return [_LABELS[classify(answer)] for answer in answers]
