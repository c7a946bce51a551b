# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Group sequences by length, and pad them to one width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .tokenization import IGNORED, Example

T = TypeVar("T")


def by_length(
    items: Iterable[T], batch_size: int, length: Callable[[T], int], *, longest_first: bool = False
) -> list[list[T]]:
    """Group items of similar length into batches.

    Args:
        items: The items. Those of equal length stay in their order.
        batch_size: Items per batch.
        length: Returns the length of an item.
        longest_first: Return the longest first, so that a batch that is too large for memory fails at once.

    Raises:
        ValueError: If `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}. Give at least 1.")
    ordered = sorted(items, key=length, reverse=longest_first)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def padded(
    rows: Sequence[Sequence[int]], value: int, device: torch.device | str = "cpu", *, left: bool = False
) -> Tensor:
    """Pad rows of integers with `value`, on the right or on the left, to `(rows, width)`."""
    width = max(map(len, rows))
    gaps = [[value] * (width - len(row)) for row in rows]
    whole = [[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)]
    return torch.tensor(whole, dtype=torch.long, device=device)


def padded_ids(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str = "cpu", *, left: bool = False
) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` of token ids, `(rows, width)` each."""
    ones = [[1] * len(row) for row in rows]
    return {
        "input_ids": padded(rows, pad_token_id, device, left=left),
        "attention_mask": padded(ones, 0, device, left=left),
    }


def padded_examples(
    examples: Sequence[Example], pad_token_id: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Return `input_ids`, `attention_mask` and `labels`, `(examples, tokens)` each, padded on the right."""
    ids = padded_ids([example.ids for example in examples], pad_token_id, device)
    return {**ids, "labels": padded([example.labels for example in examples], IGNORED, device)}


def padding_of(tokenizer: Any) -> int:
    """Return the token id for padding. Padding is masked, so any id works."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
