# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Ways into a model: its base, its language model, its device."""

from typing import cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel


def language_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a `PeftModel` (its adapter layers stay in place), or the model itself."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go, also when the layers are spread over devices."""
    return next(model.get_input_embeddings().parameters()).device
