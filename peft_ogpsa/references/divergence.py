# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""KL from base as a reference loss. Unlike cross-entropy, it cannot be lowered by imitating style.

The loss of given answers falls as the model learns their style, and it says nothing about the other answers that the
model might have given. KL(base || model) is zero only for the base itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..text.tokenization import IGNORED, Example
from ..tuner.adapters import without_adapter

COST = 3 / 2
"""Cost of such an example. A forward and a backward pass together cost 1. The base needs a forward pass as well, and a
backward pass through frozen weights costs as much as a forward pass."""


@dataclass(frozen=True)
class Anchored(Example):
    """A prompt with an answer along which the model should stay close to its base."""


class _Divergence(torch.autograd.Function):
    """KL(softmax(base) || softmax(logits)), `(tokens, vocabulary)` each -> `(tokens,)`.

    Its gradient is `softmax(logits) - softmax(base)`. Autograd of the formula itself would leave rounding noise where
    the two are equal. This matters because a reference gradient counts at unit length, however small it is.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, base: Tensor) -> Tensor:
        log_model, log_base = logits.log_softmax(-1), base.log_softmax(-1)
        expected = log_base.exp()
        ctx.save_for_backward(log_model.exp() - expected)
        return (expected * (log_base - log_model)).sum(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0].unsqueeze(-1) * slope, None


def divergence_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Compute KL(base || model) at the answers' tokens, over the whole vocabulary, in nats per token.

    The gradient is exactly zero as long as the adapter changes nothing. The base is the model without its adapter. It
    needs a forward pass of its own, so this loss takes 1.5 times the work of a loss of the answers themselves.

    Args:
        model: A causal language model with an adapter. It is called with `input_ids` and `attention_mask`.
        batch: A batch from `losses.collate`.

    Returns:
        A scalar: the mean over tokens within each example, then over examples, so that the gradient of an example
        does not depend on the other examples in the batch.

    Raises:
        ValueError: If the model has no adapter, its adapter is merged, or its base is trained (as with `bias="all"`).
    """
    learned = batch["labels"][:, 1:] != IGNORED

    def logits() -> Tensor:
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        # Convert only the scored positions to float32: the logits are the largest tensor of the pass.
        return found[:, :-1][learned].float()

    with torch.no_grad(), without_adapter(model):
        base = logits()
    tokens = _Divergence.apply(logits(), base)
    weights = 1.0 / learned.sum(1, keepdim=True).clamp(min=1).expand_as(learned)[learned]
    return (tokens * weights).sum() / len(learned)
