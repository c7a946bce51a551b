# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The diagonal of the Fisher information of a model's weights, on reference examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_ogpsa.core.isolation import isolated_eval
from peft_ogpsa.text.batching import by_length, padded_examples
from peft_ogpsa.text.logits import scored_logits
from peft_ogpsa.text.tokenization import Example
from peft_ogpsa.tuner.adapters import same_trainable

SAMPLES = 24
"""Examples per reference set. They are few, because a pass for the gradients of all weights costs a lot."""

Fisher = dict[nn.Parameter, Tensor]
"""For each weight, the mean square of the gradient of a token's log-probability, in float32 or wider."""


def fisher(
    model: nn.Module,
    weights: Sequence[nn.Parameter],
    sets: Mapping[str, Sequence[Example]],
    seed: int,
    batch_size: int = 8,
) -> Fisher:
    """Estimate the diagonal per answer token: the mean within each example, then over examples, then over sets.

    To second order, `sum F d^2 / 2` is then the part of KL(base || model) per token that each changed weight causes
    alone, in the same nats per token as the KL penalty.

    The labels are drawn from the model's own distribution at every position. The gradients of the tokens are then
    uncorrelated, so that the square of a batch's summed gradient estimates the sum of their squares without bias. With
    the given tokens as labels it would be the "empirical Fisher", which differs (Kunstner, Balles, Hennig 2019, arXiv
    1905.12558).

    Args:
        model: The base, without an adapter.
        weights: Weights whose diagonal to estimate.
        sets: Examples by reference set.
        seed: Seed of the labels.
        batch_size: Examples per backward pass. A larger batch is faster and less exact.
    """
    found = {
        weight: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights
    }

    def add(weight: Tensor) -> None:
        gradient = weight.grad.to(found[weight].dtype)
        found[weight].addcmul_(gradient, gradient)
        weight.grad = None  # so that only one gradient is in memory

    with same_trainable(model), isolated_eval(model, gradients=True, seed=seed):
        model.requires_grad_(False)
        hooks = []
        for weight in weights:
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(add))
        for own in sets.values():
            for batch in by_length(own, batch_size, lambda example: len(example.ids)):
                logits = scored_logits(model, padded_examples(batch, 0, weights[0].device))
                drawn = torch.multinomial(logits.detach().softmax(-1), 1).squeeze(-1)
                shares = [1 / (len(e.answer) * len(own) * len(sets)) for e in batch for _ in e.answer]
                factors = logits.new_tensor(shares).sqrt()
                (factors * F.cross_entropy(logits, drawn, reduction="none")).sum().backward()
        for hook in hooks:
            hook.remove()
    return found
