# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""ASFT, anchored supervised fine-tuning (Zhu et al. 2025, arXiv 2509.23753): KL from base on the training tokens.

The loss of an answer's token y after the context x is

    -sg(p(y | x)) log p(y | x) + weight * KL(base || model)(. | x)

where `sg` stops the gradient. The mean is over all answer tokens of a batch. The KL has this direction in the paper's
equation 6 and in its code (github.com/zhuchichi56/ASFT). The paper's weight is 0.05. The default of its first code,
and of LLaMA-Factory's `use_asft_loss`, is 0.1. The factor `sg(p)` comes from dynamic fine-tuning (arXiv 2508.05629).
Without it, the loss is cross-entropy with a KL penalty: the paper's baseline "SFT + KL".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from peft_ogpsa.text.logits import scored_logits, scored_positions
from peft_ogpsa.tuner.adapters import without_adapter


class AnchoredTrainer(Trainer):
    """A trainer with ASFT's loss, for a model with an adapter. Each step needs one more forward pass, of the base.

    Args:
        weight: Weight of KL from base.
        reweighted: Whether to multiply the cross-entropy of each token by the token's probability, as in ASFT.
    """

    def __init__(self, *args: Any, weight: float, reweighted: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight, self.reweighted = weight, reweighted

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss of a batch. Only training is supported, so the outputs are never returned."""
        with torch.no_grad(), without_adapter(model):
            base = scored_logits(model, inputs)
        labels = inputs["labels"][:, 1:][scored_positions(inputs)]
        return anchored_loss(scored_logits(model, inputs), base, labels, self.weight, self.reweighted)


def anchored_loss(logits: Tensor, base: Tensor, labels: Tensor, weight: float, reweighted: bool) -> Tensor:
    """Compute ASFT's loss.

    Args:
        logits: The model's logits, `(tokens, vocabulary)`.
        base: The base's logits, `(tokens, vocabulary)`.
        labels: The labels, `(tokens,)`.
        weight: Weight of KL from base.
        reweighted: See `AnchoredTrainer`.
    """
    log_model = logits.log_softmax(-1)
    divergence = F.kl_div(log_model, base.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    likelihood = log_model.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    importance = likelihood.detach().exp() if reweighted else 1.0
    return (weight * divergence - importance * likelihood).mean()
