# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of given answers: of one answer, of all tokens, or of both answers of a preference pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...text.batching import padded_examples
from ...text.logits import scored_logits, scored_positions
from ...text.tokenization import ProcessingClass, Row
from .base import ReferenceLoss, both_sides, mean_of_examples


class AnswerLoss(ReferenceLoss):
    """Cross-entropy of the answer, in nats per token."""

    name = "answer"
    for_own_answers = True

    def collate(self, examples: Sequence[Any], pad_token_id: int, device: torch.device | str) -> dict[str, Any]:
        """Make a batch of `input_ids`, `attention_mask` and `labels`, `(examples, tokens)` each.

        It has no tag, so that `model(**batch)` works too. `reference_loss` scores batches without a tag as answers.
        """
        return dict(padded_examples(examples, pad_token_id, device))

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """Compute the cross-entropy of the labels: the mean over tokens within each example, then over examples."""
        labels = batch["labels"][:, 1:][scored_positions(batch)]
        tokens = F.cross_entropy(scored_logits(model, batch), labels, reduction="none")
        return mean_of_examples(tokens, batch)


class AllLoss(AnswerLoss):
    """Cross-entropy of every token, those of the prompt included."""

    name = "all"
    for_own_answers = False

    def tokenize(self, processing_class: ProcessingClass, row: Row, name: str, beta: float) -> list[Any]:
        """Convert a row to one example that is scored from its second token. Nothing predicts the first."""
        return [replace(example, answer_start=1) for example in super().tokenize(processing_class, row, name, beta)]


class BothLoss(AnswerLoss):
    """Cross-entropy of the chosen and of the rejected answer. The published code does this in its DPO stage."""

    name = "both"
    for_own_answers = False

    def tokenize(self, processing_class: ProcessingClass, row: Row, name: str, beta: float) -> list[Any]:
        """Convert a preference pair to two examples, the chosen one first."""
        tokenize = super().tokenize
        return [e for side in both_sides(row, name, self.name) for e in tokenize(processing_class, side, name, beta)]
