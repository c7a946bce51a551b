# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Elastic weight consolidation (EWC; Kirkpatrick et al. 2017, arXiv 1612.00796) for LoRA.

The penalty of a change D of the weights is `weight / 2 * sum F D^2`, with F the diagonal Fisher information of the
base on the reference sets. LoRA's change is `D = scaling * B A`, so the penalty is on its effect, and not on A and B,
of which the base has none.

The diagonal sees little of what LoRA does, since many weights change together: with SmolLM2-135M, the sum at weight 1
was 0.0005 where the KL from base was 0.15, and 0.0011 where it was 0.22 (plain LoRA after 5 and 8 steps; 24 examples).
So the weights of the grid are 100 to 10,000.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import TrainerCallback

from .fisher import Fisher


class EWC(TrainerCallback):
    """Add the penalty's gradient to the training gradient, in every step.

    As the gradient of references in `ReferencePenalty`, it is added after the trainer has clipped the training
    gradient.

    Args:
        fisher: Of the weights under LoRA.
        weight: Of the penalty.
        examples: How many reference examples F has taken.
    """

    def __init__(self, fisher: Fisher, weight: float, examples: int) -> None:
        self.fisher, self.weight, self.examples = fisher, weight, examples

    @torch.enable_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Add it, one layer after the other, so that one dense change is in memory at a time."""
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                importance = self.fisher[layer.get_base_layer().weight]
                (self.weight * penalty(importance, a, b, layer.scaling["default"])).backward()


def penalty(importance: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Compute `sum F (scaling * B A)^2 / 2` of a layer.

    Args:
        importance: F, `(out, in)`.
        a: LoRA's A, `(r, in)`.
        b: LoRA's B, `(out, r)`.
        scaling: `lora_alpha / r`.
    """
    return (importance * (scaling * b @ a).square()).sum() / 2
