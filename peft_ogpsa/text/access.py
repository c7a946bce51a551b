# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Find the language model inside a wrapper, its own parameters, and the device of its inputs."""

from collections.abc import Iterator
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from .. import compat

_BASE = ("base_layer", "original_module")  # where a layer of an adapter holds what it adapts


def language_model(model: torch.nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a `PeftModel` (its adapter layers stay in place), or the model itself."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def acting_model(model: torch.nn.Module) -> PreTrainedModel:
    """Return what `language_model` does, for an adapter that acts within the model's layers.

    Raises:
        ValueError: If the adapter needs more than its layers: prompt learning, and activated LoRA.
    """
    if isinstance(model, PeftModel) and not _turned_off(model):
        configs = [model.peft_config[name] for name in model.active_adapters if name in model.peft_config]
        for config in configs:
            if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
                what = "prompt learning" if config.is_prompt_learning else "activated LoRA (alora_invocation_tokens)"
                raise ValueError(
                    f"The active adapter uses {what}, which changes what the model is given, and not only its layers. "
                    "It cannot be measured here: the figures would be the base's. Generate with the PeftModel itself."
                )
    return language_model(model)


def _turned_off(model: PeftModel) -> bool:
    """Whether the model is in `disable_adapter`. For prompt learning, PEFT then calls the base's `forward` instead."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return any(layer.disable_adapters for layer in layers) or model.forward == model.base_model.forward


def base_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters of a model without those of its adapters, under the names that they have without one."""
    layers = {path for path, module in model.named_modules() if compat.is_adapter_layer(module)}
    for name, parameter in model.named_parameters():
        own = _base_name(name, layers)
        if own is not None:
            yield own, parameter


def _base_name(name: str, layers: set[str]) -> str | None:
    """Return the name of a base's parameter without the layers of adapters above it, and None for other parameters."""
    kept: list[str] = []
    parts = name.split(".")
    for place, part in enumerate(parts):
        if ".".join(parts[:place]) not in layers:
            kept.append(part)
        # An adapter of some tokens has two layers: a wrapper, and in it the one that holds the base's embedding.
        elif part not in _BASE and ".".join(parts[: place + 1]) not in layers:
            return None
    return ".".join(kept)


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device for token ids, also if the layers are spread over several devices."""
    return next(model.get_input_embeddings().parameters()).device
