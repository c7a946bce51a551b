# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Short checksums of models, tokenizers and data, to find out whether something was measured before."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.precision import bit_sum


def of_weights(model: torch.nn.Module) -> str:
    """Return a checksum of a model's parameters, buffers and LoRA scales, wherever it was loaded from.

    Only the sum of each tensor's bits enters, which takes a moment even for a large model.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, torch.Tensor):  # the state of a quantized layer
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {bit_sum(tensor)}\n".encode())
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):  # the scale follows from settings such as lora_alpha, not from the weights
            digest.update(f"{name} {sorted(module.scaling.items())}\n".encode())
    return digest.hexdigest()[:16]


def of_settings(model: PreTrainedModel) -> str:
    """Return a checksum of a model's settings: those of its layers, and those of its generation (end tokens, ...)."""
    generation = model.generation_config
    own = None if generation is None else generation.to_json_string(use_diff=False)
    return of_data(model.config.to_json_string(use_diff=False), own)


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a checksum of a tokenizer's vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers in Python have none
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return of_data(rules, tokenizer.special_tokens_map, tokenizer.chat_template)


def of_data(*data: Any) -> str:
    """Return a checksum of values. Those that JSON cannot hold, such as dates in columns of rows, enter as text."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]
