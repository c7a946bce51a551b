# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Find the language model inside a wrapper, and the device of its inputs."""

from typing import cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel


def language_model(model: torch.nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a `PeftModel` (its adapter layers stay in place), or the model itself."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device for token ids, also if the layers are spread over several devices."""
    return next(model.get_input_embeddings().parameters()).device
