# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Batches of reference examples, and their losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..text.tokenization import IGNORED, Example
from .divergence import Anchored, divergence_loss
from .preferences import Pair, preference_loss

ANCHORED_WEIGHT = 8.0
"""The default reference weight of a set with loss="kl"; benchmarks/results/tax.md has the measurement."""


def collate(
    examples: Sequence[Example] | Sequence[Pair], pad_token_id: int, device: torch.device | str
) -> dict[str, Tensor]:
    """Pad examples on the right.

    Returns:
        For examples: `input_ids`, `attention_mask` and `labels`, each `(examples, tokens)`. Anchored examples also
        have `anchored`, `(examples,)`. For pairs: the same three, each `(pairs, 2, tokens)` with the chosen answer
        first, and `beta`, `(pairs,)`. If the margin is known, there is also `margin`, `(pairs,)`.
    """
    if isinstance(examples[0], Pair):
        pairs = cast(Sequence[Pair], examples)
        sides = collate([side for pair in pairs for side in (pair.chosen, pair.rejected)], pad_token_id, device)
        batch = {name: tensor.unflatten(0, (-1, 2)) for name, tensor in sides.items()}
        batch["beta"] = torch.tensor([pair.beta for pair in pairs], device=device)
        if pairs[0].margin is not None:
            batch["margin"] = torch.tensor([pair.margin for pair in pairs], device=device)
        return batch
    examples = cast(Sequence[Example], examples)

    def padded(rows: list[list[int]], value: int) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)

    batch = {
        "input_ids": padded([example.ids for example in examples], pad_token_id),
        "attention_mask": padded([[1] * len(example.ids) for example in examples], 0),
        "labels": padded([example.labels for example in examples], IGNORED),
    }
    if isinstance(examples[0], Anchored):
        batch["anchored"] = torch.ones(len(examples), dtype=torch.bool, device=device)
    return batch


def _plain(examples: Sequence[Any]) -> list[Example]:
    """Return only the token sequences, without the other data that a loss needs."""
    found = []
    for example in examples:
        sides = (example.chosen, example.rejected) if isinstance(example, Pair) else (example,)
        found += [Example(side.ids, side.answer_start) for side in sides]
    return found


def reference_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Compute the loss of a batch from `collate`.

    This is `preference_loss` for pairs, `divergence_loss` for anchored examples, and `answer_loss` for other examples.
    """
    if "margin" in batch:
        return preference_loss(model, batch)
    return divergence_loss(model, batch) if "anchored" in batch else answer_loss(model, batch)


def answer_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Compute the cross-entropy of a causal language model on the labels, in nats per token.

    Args:
        model: The model. It is called with `input_ids` and `attention_mask`, and returns an object with `logits`
            `(examples, tokens, vocabulary)`.
        batch: A batch from `collate`.

    Returns:
        A scalar: the mean over tokens within each example, then over examples, so that the gradient of an example
        does not depend on the other examples in the batch.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    if logits.dim() != 3:
        raise ValueError(
            f"Reference losses need a causal language model, and this {type(model).__name__} returns logits of shape "
            f"{tuple(logits.shape)} instead of (examples, tokens, vocabulary). For other models give your own loss to "
            "model.projector.refresh(batches, loss_fn) in a loop of your own."
        )
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORED
    # Convert only the scored positions to float32: the logits are the largest tensor of the pass.
    losses = F.cross_entropy(logits[:, :-1][learned].float(), labels[learned], reduction="none")
    weights = 1.0 / learned.sum(1, keepdim=True).clamp(min=1).expand_as(labels)[learned]
    return (losses * weights).sum() / len(labels)


def batched(examples: Sequence[Any], size: int) -> list[list[Any]]:
    """Group examples (or pairs) of similar length into batches, short ones first."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def padding_of(tokenizer: Any) -> int:
    """Return the token id for padding. Padding is masked, so any id works."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
