# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Ways into a model: its base, its language model, its device."""

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def base_model(model: torch.nn.Module) -> Iterator[None]:
    """The model without its adapter.

    PEFT turns the gradients of every active adapter on when it enables adapters again, those of a frozen one too, so
    the parameters' flags are put back.

    Raises:
        ValueError: The model is no `PeftModel`, so its base cannot be reached.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"model is a {type(model).__name__}, not a PeftModel: there is no adapter to disable, so its base"
            " cannot be reached. Measure the base before training: Evaluator.base(base_model)."
        )
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
