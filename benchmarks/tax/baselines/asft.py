# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""ASFT, anchored supervised fine-tuning (Zhu et al. 2025, arXiv 2509.23753): near the base on the training tokens.

The loss of an answer's token y after the context x is

    -sg(p(y | x)) log p(y | x) + weight * KL(base || model)(. | x)

with `sg` for no gradient, and its mean is over all answer tokens of a batch. The divergence has this direction in the
paper's equation 6 and in its code (github.com/zhuchichi56/ASFT). The paper's weight is 0.05; the default of its first
code, and of LLaMA-Factory's `use_asft_loss`, is 0.1. Without the factor `sg(p)`, which is that of dynamic fine-tuning
(arXiv 2508.05629), it is cross-entropy with a divergence: the paper's baseline "SFT + KL".
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
    """A trainer with ASFT's loss, for a model with an adapter. A step needs one more forward pass, of the base.

    Args:
        weight: Of the divergence from the base.
        reweighted: Whether the cross-entropy of each token counts times the token's probability, as in ASFT.
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
        base: The base's.
        labels: `(tokens,)`.
        weight: Of the divergence.
        reweighted: See `AnchoredTrainer`.
    """
    log_model = logits.log_softmax(-1)
    divergence = F.kl_div(log_model, base.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    likelihood = log_model.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    importance = likelihood.detach().exp() if reweighted else 1.0
    return (weight * divergence - importance * likelihood).mean()
