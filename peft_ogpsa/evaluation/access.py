# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Ways into a model: its base, its language model, its device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from peft_ogpsa.modes import same_trainable


def language_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a `PeftModel` (its adapter layers stay in place), or the model itself."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go, also when the layers are spread over devices."""
    return next(model.get_input_embeddings().parameters()).device


@contextmanager
def base_model(model: torch.nn.Module) -> Iterator[None]:
    """The model without its adapter, of whatever type.

    Raises:
        ValueError: The model is no `PeftModel`, so its base cannot be reached.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"model is a {type(model).__name__}, not a PeftModel: there is no adapter to disable, so its base"
            " cannot be reached. Measure the base before training: Evaluator.base(base_model)."
        )
    with same_trainable(model), model.disable_adapter():
        yield
