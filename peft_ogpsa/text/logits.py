# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Compute a model's logits at the positions where it predicts an answer."""

import inspect
from collections.abc import Sequence

import torch

from .access import input_device, language_model
from .tokenization import Example


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group positions into batches of similar length.

    The longest come first, so that a batch that is too large for memory fails at once.

    Raises:
        ValueError: If `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}. Give at least 1.")
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer_logits(model: torch.nn.Module, examples: Sequence[Example]) -> list[torch.Tensor]:
    """Return the logits that predict each example's answer tokens.

    Call this under `undisturbed`. The output layer is skipped for the prompts if the model allows it.

    Returns:
        One tensor per example, (answer tokens, vocabulary), in the model's own precision. Upcasting one example at a
        time keeps memory use low.
    """
    lm = language_model(model)
    device = input_device(lm)
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = 1
    first = min(example.answer_start for example in examples) - 1
    options = {"logits_to_keep": width - first} if "logits_to_keep" in inspect.signature(lm.forward).parameters else {}
    output = lm(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **options)
    logits = output.logits[:, first - width :]
    return [
        logits[row, example.answer_start - 1 - first : len(example.ids) - 1 - first]
        for row, example in enumerate(examples)
    ]
