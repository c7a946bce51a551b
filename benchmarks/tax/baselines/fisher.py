# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The diagonal of the Fisher information of a model's weights, on reference examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_ogpsa.core.isolation import isolated_eval
from peft_ogpsa.text.batching import padded_examples
from peft_ogpsa.text.logits import scored_logits
from peft_ogpsa.text.tokenization import Example
from peft_ogpsa.tuner.adapters import same_trainable

Fisher = dict[nn.Parameter, Tensor]
"""Of each weight, the mean square of the gradient of a token's log-probability, in float32 or wider."""


def fisher(
    model: nn.Module, weights: Sequence[nn.Parameter], sets: Mapping[str, Sequence[Example]], seed: int
) -> Fisher:
    """Estimate the diagonal per answer token: the mean within each example, then over examples, then over sets.

    To second order, `sum F d^2 / 2` is then the part of KL(base || model) per token that each changed weight causes
    alone, in the same nats per token as the KL penalty.

    The labels are drawn from the model's own distribution at every position. The gradients of an example's tokens are
    then uncorrelated, so that the square of their sum estimates the sum of their squares without bias,
    and one backward pass an example is enough. With the given tokens as labels it would be the "empirical Fisher",
    which differs (Kunstner, Balles, Hennig 2019, arXiv 1905.12558).

    Args:
        model: The base, without an adapter.
        weights: Those to estimate it for.
        sets: Examples by reference set.
        seed: Of the labels.
    """
    found = {
        weight: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights
    }

    def add(weight: Tensor) -> None:
        gradient = weight.grad.to(found[weight].dtype)
        found[weight].addcmul_(gradient, gradient)
        weight.grad = None  # so that one gradient at a time is in memory

    with same_trainable(model), isolated_eval(model, gradients=True, seed=seed):
        model.requires_grad_(False)
        hooks = []
        for weight in weights:
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(add))
        for own in sets.values():
            for example in own:
                logits = scored_logits(model, padded_examples([example], 0, weights[0].device))
                drawn = torch.multinomial(logits.detach().softmax(-1), 1).squeeze(-1)
                share = 1 / (len(drawn) * len(own) * len(sets))
                (share**0.5 * F.cross_entropy(logits, drawn, reduction="sum")).backward()
        for hook in hooks:
            hook.remove()
    return found
