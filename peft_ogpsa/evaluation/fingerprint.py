# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Short checksums of weights and of data, to find out whether something was measured before."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def of_weights(model: torch.nn.Module) -> str:
    """Return a checksum of a model's parameters, buffers and LoRA scales, wherever it was loaded from.

    Only the sum of each tensor's bits enters, which takes a moment even for a large model. Sums of integers are exact,
    so the result does not depend on the device or the number of threads.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, torch.Tensor):  # the state of a quantized layer
            continue
        bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {bits.sum(dtype=torch.int64).item()}\n".encode())
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):  # the scale follows from settings such as lora_alpha, not from the weights
            digest.update(f"{name} {sorted(module.scaling.items())}\n".encode())
    return digest.hexdigest()[:16]


def of_data(*data: Any) -> str:
    """Return a checksum of values that JSON can hold."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
