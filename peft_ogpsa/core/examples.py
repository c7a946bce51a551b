# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Reference examples that are passed together, and which of their positions count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from .gradients import batch_size, examples_of, tensors_of

IGNORED = -100
"""The label of a position that is not trained on, as in torch's cross-entropy."""

HELD_OUT = 8
"""One in this many examples of a set is not used to find the directions. It shows how well they fit."""

Batches = Mapping[str, Sequence[Any]]
"""The batches of each reference set, by name."""

Tokens = Literal["all", "answer"]


@dataclass(frozen=True)
class Part:
    """Examples of one reference set that are passed together.

    Attributes:
        name: The reference set.
        batch: The examples.
        size: Number of examples.
        tokens: Positions whose tokens count: `(examples, tokens)`; `None` if all count.
        weight: Weight of each token.
    """

    name: str
    batch: Any
    size: int
    tokens: Tensor | None
    weight: float

    def of(self, indices: Sequence[int]) -> Part:
        """Select some of the examples."""
        tokens = None if self.tokens is None else self.tokens[list(indices)]
        return replace(self, batch=examples_of(self.batch, indices), size=len(indices), tokens=tokens)

    def counts(self) -> list[int]:
        """Return how many tokens of each example count."""
        if self.tokens is not None:
            return self.tokens.reshape(self.size, -1).sum(1).tolist()
        return [count(self) // self.size] * self.size


def split(batches: Batches, tokens: Tokens) -> tuple[list[Part], list[Part]]:
    """Split into used and held-out examples, with weights that let every set count the same."""
    used: list[Part] = []
    held: list[Part] = []
    for name, own in batches.items():
        kept, out, seen = [], [], 0
        for batch in own:
            size = batch_size(batch)
            where = _tokens_of(batch, tokens, name)
            part = Part(name, batch, size, where, 1.0)
            places = [i for i in range(size) if (seen + i) % HELD_OUT == HELD_OUT - 1]
            seen += size
            if not places:
                kept.append(part)
                continue
            out.append(part.of(places))
            rest = [i for i in range(size) if i not in places]
            if rest:
                kept.append(part.of(rest))
        used += _weighted(kept, name, len(batches))
        held += _weighted([part for part in out if count(part)], name, len(batches))
    return used, held


def _weighted(parts: list[Part], name: str, sets: int) -> list[Part]:
    total = sum(count(part) for part in parts)
    if parts and not total:
        raise ValueError(
            f"Reference set {name!r} has no token for the activation subspace. Give it other examples, or use "
            "tokens='all'."
        )
    return [replace(part, weight=1 / (total * sets)) for part in parts]


def count(part: Part) -> int:
    """Return how many tokens of the part count."""
    if part.tokens is not None:
        return int(part.tokens.sum())
    named = part.batch if isinstance(part.batch, Mapping) else {}
    for key in ("input_ids", "inputs_embeds"):
        if isinstance(named.get(key), Tensor):
            return _positions(named[key])
    # Others, such as labels of classes, often have fewer axes. The order of the batch's keys must not matter.
    tensors = tensors_of(part.batch)
    most = max(tensor.dim() for tensor in tensors)
    return max(_positions(tensor) for tensor in tensors if tensor.dim() == most)


def _positions(tensor: Tensor) -> int:
    """Number of positions of ids, or of vectors."""
    return tensor.shape[:-1].numel() if tensor.is_floating_point() else tensor.numel()


def _tokens_of(batch: Any, tokens: Tokens, name: str) -> Tensor | None:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if tokens == "answer":
        if labels is None:
            raise ValueError(
                "tokens='answer' needs `labels` in every batch, with -100 at other positions, but a batch of "
                f"{name!r} has no `labels`. Add them, or use tokens='all'."
            )
        key = "input_ids" if batch.get("input_ids") is not None else "attention_mask"
        positions = batch.get(key)
        if positions is not None and labels.shape != positions.shape:
            raise ValueError(
                f"tokens='answer' needs one label for each token, but in a batch of {name!r} `labels` has the shape "
                f"{tuple(labels.shape)} and `{key}` has the shape {tuple(positions.shape)}. Labels of classes are not "
                "one per token: use tokens='all'."
            )
        return labels != IGNORED
    return None if mask is None else mask.bool()
