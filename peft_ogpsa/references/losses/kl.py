# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""KL from base as a reference loss. Unlike cross-entropy, it cannot be lowered by imitating style.

The cross-entropy of given answers falls as the model learns their style. It says nothing about the other answers that
the model could give. KL(base || model) is zero only for the base itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.isolation import no_gradients
from ...text.logits import scored_logits
from ...tuner.adapters import refuse_moving_base, without_adapter
from .base import ReferenceLoss, mean_of_examples


class KLLoss(ReferenceLoss):
    """KL(base || model) along the answer, in nats per token."""

    name = "kl"
    # The base needs a forward pass as well. A backward pass through frozen weights costs as much as a forward pass.
    cost = 3 / 2
    # benchmarks/results/tax.md and heldout.md have the measurements.
    default_weight = 8.0
    null_space_weight = 2.0
    learns_answers = False
    needs_base = True
    for_own_answers = True
    without_base = ("answer",)

    def check(self, model: nn.Module) -> None:
        """Reject a base that is trained together with its adapter.

        Raises:
            ValueError: If the configuration trains biases, or a weight outside the adapter is in training.
        """
        refuse_moving_base(model)

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """Compute KL(base || model) at the answers' tokens, over the whole vocabulary.

        The gradient is exactly zero as long as the adapter changes nothing. The base is the model without its adapter.
        It needs a forward pass of its own, so this loss costs 1.5 times as much as cross-entropy.

        Args:
            model: A causal language model with an adapter. It is called with `input_ids` and `attention_mask`.
            batch: A batch from `collate`.

        Returns:
            A scalar: the mean over tokens within each example, then over examples.

        Raises:
            ValueError: If the model has no adapter, its adapter is merged, or its base is trained (as with
                `bias="all"`).
        """
        with no_gradients(model), without_adapter(model):
            base = scored_logits(model, batch)
        return mean_of_examples(_Divergence.apply(scored_logits(model, batch), base), batch)


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
