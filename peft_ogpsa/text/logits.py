# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Compute a model's logits at the positions where it predicts an answer."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from .access import acting_model, input_device, language_model
from .batching import padded_ids
from .tokenization import IGNORED, Example

_OTHERS = "For other models give your own loss to model.projector.refresh(batches, loss_fn) in a loop of your own."


def answer_logits(model: torch.nn.Module, examples: Sequence[Example]) -> list[torch.Tensor]:
    """Return the logits that predict each example's answer tokens.

    Call this under `isolated_eval`. The output layer is skipped for the prompts if the model allows it.

    Returns:
        One tensor per example, (answer tokens, vocabulary), in the model's own precision. Upcasting one example at a
        time keeps memory use low.
    """
    lm = acting_model(model)
    inputs = padded_ids([example.ids for example in examples], 0, input_device(lm))
    width = inputs["input_ids"].shape[1]
    first = min(example.answer_start for example in examples) - 1
    options = {"logits_to_keep": width - first} if "logits_to_keep" in inspect.signature(lm.forward).parameters else {}
    output = lm(**inputs, use_cache=False, **options)
    logits = output.logits[:, first - width :]
    return [
        logits[row, example.answer_start - 1 - first : len(example.ids) - 1 - first]
        for row, example in enumerate(examples)
    ]


def scored_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """Return which positions predict a scored token: `(examples, tokens - 1)`, as the last position predicts none."""
    return batch["labels"][:, 1:] != IGNORED


def scored_logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits at the scored positions of a batch, with gradients, in float32.

    Args:
        model: The model, as it is called in training. It is called with `input_ids` and `attention_mask`, and returns
            an object with `logits` `(examples, tokens, vocabulary)`.
        batch: `input_ids`, `attention_mask` and `labels`, `(examples, tokens)` each.

    Returns:
        `(scored tokens, vocabulary)`, one example after the other.

    Raises:
        ValueError: If the model is not a causal language model.
    """
    # Convert only the scored positions to float32: the logits are the largest tensor of the pass.
    return _logits(model, batch)[:, :-1][scored_positions(batch)].float()


def pass_through(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Pass a batch through a model for what its layers see, and not for its logits, which are its largest tensor.

    The output layer computes the last position alone if the model has this option, and if nothing that is adapted or
    in training comes after the backbone.

    Args:
        model: The model, as it is called in training.
        batch: `input_ids` and `attention_mask`, `(examples, tokens)` each.

    Returns:
        The logits that were computed.

    Raises:
        ValueError: If the model is not a causal language model.
    """
    lm = language_model(model)
    # The signature of the class, because the trainer replaces the bound method for mixed precision.
    able = "logits_to_keep" in inspect.signature(type(lm).forward).parameters
    return _logits(model, batch, **({"logits_to_keep": 1} if able and _ends_with_backbone(lm) else {}))


def _ends_with_backbone(lm: PreTrainedModel) -> bool:
    """Whether no layer after the backbone is adapted or in training, so that none needs all positions."""
    backbone = getattr(lm, "base_model", lm)
    if backbone is lm:  # not told apart
        return False
    inside = set(backbone.modules())
    return not any(
        # PEFT freezes adapters while it turns them off, so their parameters do not tell.
        isinstance(module, BaseTunerLayer) or any(own.requires_grad for own in module.parameters(recurse=False))
        for module in lm.modules()
        if module not in inside
    )


def _logits(model: Any, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    lm = language_model(model)
    # The logits of masked language models and of taggers may have the same shape.
    if type(lm).__module__.startswith("transformers.") and not lm.can_generate():
        raise ValueError(
            f"Reference losses need a causal language model, and this {type(lm).__name__} does not generate text. "
            f"{_OTHERS}"
        )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False, **options).logits
    if logits.dim() != 3:
        raise ValueError(
            f"Reference losses need a causal language model, and this {type(model).__name__} returns logits of shape "
            f"{tuple(logits.shape)} instead of (examples, tokens, vocabulary). {_OTHERS}"
        )
    return logits
