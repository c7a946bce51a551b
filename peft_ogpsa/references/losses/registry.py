# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The reference losses by name, and the functions that find the loss of examples and of batches.

`base.py` says how to add a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .answer import AllLoss, AnswerLoss, BothLoss
from .base import TAG, ReferenceLoss
from .dpo import DPOLoss
from .kl import KLLoss

LOSSES: dict[str, ReferenceLoss] = {
    loss.name: loss for loss in (AnswerLoss(), AllLoss(), KLLoss(), BothLoss(), DPOLoss())
}
"""The losses that `ReferenceSet(loss=...)` accepts, by name."""

answer_loss = LOSSES[AnswerLoss.name].loss
"""The cross-entropy of a batch's labels, also for the training data of a loop of your own."""


def loss_of(examples: Sequence[Any]) -> ReferenceLoss:
    """Return the loss of examples of one set."""
    return LOSSES[examples[0].loss]


def collate(examples: Sequence[Any], pad_token_id: int, device: torch.device | str) -> dict[str, Any]:
    """Make a batch from examples of one set, as their loss does."""
    return loss_of(examples).collate(examples, pad_token_id, device)


def reference_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Compute the loss of a batch from `ReferenceLoader.batches`.

    The batch names its loss. A batch without a name is scored by the cross-entropy of its `labels`.
    """
    return LOSSES[batch.get(TAG, AnswerLoss.name)].loss(model, batch)
