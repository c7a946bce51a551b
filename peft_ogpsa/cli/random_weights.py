# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Build a model with the right architecture and random weights, to try a run without downloading weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig  # transformers 4 calls it PretrainedConfig


@dataclass(frozen=True)
class RandomWeights:
    """A reduced architecture: its number of layers, its width, and the seed of its random weights."""

    layers: int
    width: int | None = None
    seed: int = 0

    def build(self, config: PreTrainedConfig, dtype: Any = None, attention: str | None = None) -> PreTrainedModel:
        """Build a causal language model whose weights are the same in every process.

        Args:
            config: The architecture. It is changed in place.
            dtype: A torch dtype or its name. `None` and `"auto"` use the configuration's dtype.
            attention: The attention implementation. `None` leaves the choice to transformers.

        Raises:
            ValueError: If the architecture has fewer layers, or does not allow that width.
        """
        shrink(config, self.layers, self.width)
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        if not isinstance(dtype, torch.dtype):
            dtype = config.dtype or torch.float32
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def shrink(config: PreTrainedConfig, layers: int, width: int | None = None) -> None:
    """Cut an architecture to its first layers and, if requested, narrow it. Heads and vocabulary do not change.

    Args:
        config: The architecture. It is changed in place.
        layers: How many layers to keep.
        width: The hidden size. The intermediate size and the size of a head shrink in proportion.

    Raises:
        ValueError: If the architecture has fewer layers, or the width cannot be divided among the heads in even sizes,
            which rotary embeddings need.
    """
    text = config.get_text_config()
    if not 1 <= layers <= text.num_hidden_layers:
        raise ValueError(
            f"random_layers={layers} is not allowed: this {text.model_type} model has {text.num_hidden_layers} "
            f"layers. Use a number from 1 to {text.num_hidden_layers}."
        )
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:layers]
    if width is None:
        return
    missing = [n for n in ("hidden_size", "intermediate_size", "num_attention_heads") if not hasattr(text, n)]
    if missing:
        raise ValueError(
            f"random_width={width} is not allowed: the configuration of {text.model_type} has no {missing[0]}. Leave "
            "out random_width."
        )
    heads = text.num_attention_heads
    if width < 1 or width % (2 * heads):
        raise ValueError(
            f"random_width={width} is not allowed: this {text.model_type} model has {heads} heads, and the size of a "
            f"head must be even. Use a multiple of {2 * heads}."
        )
    text.intermediate_size = max(1, round(text.intermediate_size * width / text.hidden_size))
    text.hidden_size = width
    if getattr(text, "head_dim", None) is not None:
        text.head_dim = width // heads
