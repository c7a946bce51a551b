# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Where LoRA is placed: on which layers of a block, in which blocks, at which rank.

Xue, Mirzasoleiman 2025 (arXiv 2507.17075) find that rank 1 on the up projections of middle blocks is enough to learn
refusals, and costs less than LoRA on all layers.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

Layers = Literal["all", "mlp", "attention", "up_proj"]
"""All linear layers, those of MLPs, those of attention, or only up projections of the middle third of blocks."""

KINDS: dict[Layers, list[str]] = {
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "up_proj": ["up_proj"],
}
"""The names of the layers in Llama's blocks."""


def lora_knobs(layers: Layers, blocks: int) -> dict[str, Any]:
    """Return the options that differ from LoRA on all layers. The scaling `lora_alpha / r` stays 2.

    Args:
        layers: The layers to place LoRA on.
        blocks: Number of the model's blocks.
    """
    if layers == "all":
        return {}
    if layers == "up_proj":
        middle = list(range(blocks // 3, blocks - blocks // 3))
        return {"target_modules": KINDS[layers], "layers_to_transform": middle, "r": 1, "lora_alpha": 2}
    return {"target_modules": KINDS[layers]}


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """Return the linear layers by name: all but the output layer, like PEFT's `"all-linear"`."""
    output = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    }


def kinds(model: Any) -> list[str]:
    """Return the last parts of the linear layers' names, for code of PEFT that does not know `"all-linear"`."""
    return sorted({name.rpartition(".")[2] for name in linear_layers(model)})
