# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA-Null (Tang et al. 2025, arXiv 2503.02659), with the start of the paper.

The null space of a layer is spanned by the r directions in which its inputs have the least energy. Here r is LoRA's
rank, and the directions are the columns of V. The adapter starts as the part of the weight that reads these
directions, `scaling * B A = W V V^T`, split evenly between A and B by its singular values. The base keeps
`W - W V V^T`. Then both A and B are trained, or, in the paper's second variant, B alone.

"null space at the start alone" differs: its A is random, in the complement of the 288 or 512 leading directions, which
is wider than r. Its B starts at zero, so that the base keeps all of W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_ogpsa.core.isolation import isolated_eval

from .placement import linear_layers


def adapted(base: Any, knobs: dict[str, Any], sequences: Sequence[Tensor]) -> PeftModel:
    """Give a model the adapter that LoRA-Null starts with.

    Args:
        base: A copy of the base. Its weights change.
        knobs: Options of LoRA.
        sequences: Token ids of the references, `(1, tokens)` each.
    """
    moments = second_moments(base, list(linear_layers(base).values()), sequences)
    model = get_peft_model(base, LoraConfig(**knobs))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            _start(layer, moments.pop(layer.get_base_layer()))
    return model


@torch.no_grad()
def _start(layer: Any, moment: Tensor) -> None:
    weight, scaling = layer.get_base_layer().weight, layer.scaling["default"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    null = torch.linalg.eigh(moment).eigenvectors[:, : len(a)]  # those of the smallest eigenvalues
    left, sizes, right = torch.linalg.svd(weight.double() @ null, full_matrices=False)
    roots = (sizes / scaling).sqrt()
    a.copy_(roots[:, None] * (right @ null.T))
    b.copy_(left * roots)
    weight.sub_(scaling * b @ a)


def second_moments(model: Any, layers: Sequence[nn.Linear], sequences: Sequence[Tensor]) -> dict[nn.Linear, Tensor]:
    """Add up `x x^T` over the inputs x of each layer, `(in, in)`, in float64 to keep the least energies exact."""
    found = {
        layer: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=layer.weight.device)
        for layer in layers
    }

    def add(layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2).double()
        found[layer].addmm_(rows.T, rows)

    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    with isolated_eval(model):
        for ids in sequences:
            model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found
