# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""A judge that is a model and grades answers by the logits of number tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from ...core.isolation import isolated_eval
from ...text.batching import by_length
from ...text.logits import answer_logits
from ...text.tokenization import Example
from .model import ModelJudge

_LEAST_MASS = 0.5


class GradingJudge(ModelJudge):
    """Judge by the expected grade over the logits of the grades' tokens. The arguments are those of `ModelJudge`."""

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """Return the score of each answer, from 0 (lowest grade) to 1 (highest grade). None: unclear."""
        return [None if output is None else _number(output) for output in self.outputs(prompts, answers)]

    def _asked(self, encoded: list[list[int]]) -> list[str]:
        vocabulary = self.tokenizer.get_vocab()
        grades = [vocabulary[grade] for grade in self.format.grades]
        found: dict[int, str] = {}
        batches = by_length(range(len(encoded)), self.batch_size, lambda i: len(encoded[i]), longest_first=True)
        with (
            isolated_eval(self.model),
            tqdm(total=len(encoded), desc=self.name, disable=not self.progress) as bar,
        ):
            for batch in batches:
                # The logits that predict one more token.
                examples = [Example([*encoded[i], grades[0]], answer_start=len(encoded[i])) for i in batch]
                for i, logits in zip(batch, answer_logits(self.model, examples), strict=True):
                    found[i] = str(expected_grade(logits[0], grades))
                bar.update(len(batch))
        return [found[i] for i in range(len(encoded))]


def expected_grade(logits: torch.Tensor, grades: Sequence[int]) -> float:
    """Return the expected grade over the logits of one position, scaled to 0 (lowest) to 1 (highest).

    It is not a number if the model would rather write something else: the grades then have less than half of the
    probability, and say nothing.

    Args:
        logits: `(vocabulary,)`.
        grades: Token ids of the grades, from the lowest to the highest.
    """
    probabilities = logits.cpu().double().softmax(-1)[list(grades)]  # some devices have no float64
    if not probabilities.sum() >= _LEAST_MASS:
        return float("nan")
    steps = torch.linspace(0, 1, len(grades), dtype=torch.float64, device=probabilities.device)
    return float((probabilities * steps).sum() / probabilities.sum())


def _number(output: str) -> float | None:
    score = float(output)
    return score if 0 <= score <= 1 else None
