# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The passes of one refresh: from the batches of the reference sets to raw reference gradients in rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .gradients import (
    LossFn,
    batch_gradient,
    batch_size,
    example_gradients,
    examples_of,
    first_tensor,
    sharded_gradient,
)
from .linalg import small_dtype
from .precision import bit_sum
from .rows import Rows, Slots

Losses = list[tuple[Tensor, float]]
"""The losses of passes, each with its weight in the mean."""


WEIGHT = "reference_weight"
"""Key of a batch that holds the reference weight of its set, for a configuration with `reference_weight=None`."""


@dataclass(frozen=True)
class SetBatches:
    """The batches of one reference set.

    Attributes:
        name: The set.
        batches: Its batches.
        sizes: Number of examples of each batch.
    """

    name: str
    batches: Sequence[Any]
    sizes: Sequence[int]

    @property
    def weight(self) -> float:
        """The set's reference weight, which its first batch names. 1 without a name."""
        first = self.batches[0]
        return float(first.get(WEIGHT, 1.0)) if isinstance(first, Mapping) else 1.0

    def rows(self, row_of: str) -> int:
        """Number of rows that the batches need, if one row is the gradient of a set, a batch or an example."""
        return {"set": 1, "batch": len(self.sizes), "example": sum(self.sizes)}[row_of]


class ReferenceBatches(dict[str, list[Any]]):
    """The batches of each reference set, made for one of the two things that `refresh` does.

    Attributes:
        everything: Whether they hold all examples, to build an activation subspace. Otherwise they are one draw, for
            reference gradients.
    """

    def __init__(self, sets: Mapping[str, list[Any]], everything: bool) -> None:
        super().__init__(sets)
        self.everything = everything


def check_purpose(batches: Mapping[str, Iterable[Any]], build: bool) -> None:
    """Check that batches of a `ReferenceLoader` are for what `refresh` will do now. Other batches may be for both.

    Raises:
        ValueError: If they are not.
    """
    if isinstance(batches, ReferenceBatches) and batches.everything != build:
        now, given = ("builds the activation subspace", "one draw") if build else ("needs one draw", "all examples")
        raise ValueError(
            f"refresh() now {now}, but these batches are {given} of the reference sets. Call "
            "loader.batches(device, everything=projector.unbuilt) for every refresh."
        )


def checked(batches: Mapping[str, Iterable[Any]]) -> dict[str, list[Any]]:
    """The batches of each set as lists.

    Raises:
        ValueError: If the batches are not in a mapping, if one batch stands where a list of batches is expected, if
            there is no set, if a set has no batch, or if a batch has no example.
    """
    if not isinstance(batches, Mapping) or any(isinstance(items, Mapping) for items in batches.values()):
        raise ValueError(
            "refresh() expects a mapping from the names of the reference sets to lists of batches, such as "
            '{"general": [batch]}.'
        )
    sets = {name: list(items) for name, items in batches.items()}
    if not sets:
        raise ValueError(
            "refresh() received no reference set. Give a mapping from the names of the sets to their batches."
        )
    for name, items in sets.items():
        if not items:
            raise ValueError(f"Reference set {name!r} has no batch. Give it at least one example, or leave it out.")
        sizes = [batch_size(batch) for batch in items]
        if 0 in sizes:
            raise ValueError(
                f"Batch {sizes.index(0)} of reference set {name!r} has 0 examples: the first dimension of its first "
                "tensor is empty. Leave it out, or give it at least one example."
            )
    return sets


def sized(sets: Mapping[str, Sequence[Any]]) -> list[SetBatches]:
    """The sets with the sizes of their batches."""
    return [SetBatches(name, items, [batch_size(batch) for batch in items]) for name, items in sets.items()]


def check_alike(sets: Sequence[SetBatches], device: torch.device) -> None:
    """Check that all processes have batches of the same sizes and with the same first tensor, such as the token ids.

    Otherwise they would wait for one another in vain.

    Raises:
        ValueError: If they do not.
    """
    if distributed.count() == 1:
        return
    numbers = [number for own in sets for number in (len(own.sizes), *own.sizes)]
    numbers += [bit_sum(first_tensor(batch)) for own in sets for batch in own.batches]
    if not distributed.agree(numbers, device):
        raise ValueError(
            "The sizes of the reference batches, or their tokens, differ between the processes. Give all processes "
            "the same batches."
        )


class Passes:
    """The passes of one refresh.

    Args:
        rows (`Rows`): Receives this process's part of the raw gradients.
        linears (`Sequence[nn.Linear | None]`): See `example_gradients`.
        model (`nn.Module`): Passed to `loss_fn`.
        loss_fn (`Callable`): `loss_fn(model, batch)` returns a scalar.
        row_of (`str`): What one row is the gradient of: a `"set"`, a `"batch"` or an `"example"`.
    """

    def __init__(
        self, rows: Rows, linears: Sequence[nn.Linear | None], model: nn.Module, loss_fn: LossFn, row_of: str
    ) -> None:
        self._rows, self._blocks = rows, rows.blocks
        self._linears = linears
        self._model, self._loss_fn = model, loss_fn
        self.row_of = row_of

    def fill(self, own: SetBatches, slots: Sequence[int]) -> Tensor:
        """Fill the slots of one set with this process's part of the raw gradients.

        Returns:
            `(2,)`: the losses of the set's finite passes, summed with their numbers of examples as weights, and the
            sum of these weights.
        """
        fillers = {"set": self._fill_with_mean, "batch": self._fill_by_batch, "example": self._fill_by_example}
        losses = fillers[self.row_of](own, slots)
        if not losses:
            return torch.zeros(2, dtype=small_dtype(self._blocks.device), device=self._blocks.device)
        values = torch.stack([loss for loss, _ in losses]).to(small_dtype(self._blocks.device))
        weights = torch.tensor([weight for _, weight in losses], dtype=values.dtype, device=values.device)
        finite = torch.isfinite(values)
        return torch.stack([(torch.where(finite, values, 0.0) * weights).sum(), (finite * weights).sum()])

    def _fill_with_mean(self, own: SetBatches, slots: Sequence[int]) -> Losses:
        # Summed in float32, whatever the dtype of the rows.
        total = self._blocks.zeros(rows=1)
        mean = Slots(self._blocks, total, [part.new_ones(part.shape[:2]) for part in total], [0])
        losses: Losses = []
        for batch, size in zip(own.batches, own.sizes, strict=True):
            losses += self._add(batch, size, mean, size / sum(own.sizes))
        row = self._rows.open(slots)
        for index, view in enumerate(self._blocks.views(total)):
            row.add(index, view)
        return losses

    def _fill_by_batch(self, own: SetBatches, slots: Sequence[int]) -> Losses:
        losses: Losses = []
        for slot, batch, size in zip(slots, own.batches, own.sizes, strict=True):
            losses += self._add(batch, size, self._rows.open([slot]), 1.0)
        return losses

    def _fill_by_example(self, own: SetBatches, slots: Sequence[int]) -> Losses:
        writer = self._rows.open(slots)
        losses: Losses = []
        start = 0
        for batch, size in zip(own.batches, own.sizes, strict=True):
            places = range(start, start + size)
            start += size
            if self._blocks.sharded:
                weight = 1 / distributed.count()
                for i, place in enumerate(places):
                    losses.append((self._sharded(examples_of(batch, [i]), writer.of([place]), weight), weight))
            elif share := distributed.share(size):
                sink = writer.of([places[i] for i in share])
                part = batch if len(share) == size else examples_of(batch, share)
                loss = example_gradients(self._model, part, self._loss_fn, self._blocks, sink, self._linears)
                losses.append((loss, len(share)))
        return losses

    def _add(self, batch: Any, size: int, sink: Slots, weight: float) -> Losses:
        """Add this process's part. The sum over processes is the batch's gradient times `weight`."""
        share = distributed.share(size)
        if self._blocks.sharded:
            # All processes must make a pass. A process without examples passes another's, with weight 0.
            loss = self._sharded(examples_of(batch, share or [0]), sink, weight * len(share) / size)
        elif share:
            sink.weight = weight * len(share) / size
            part = batch if len(share) == size else examples_of(batch, share)
            loss = batch_gradient(self._model, part, self._loss_fn, self._blocks, sink)
        return [(loss, len(share))] if share else []

    def _sharded(self, part: Any, sink: Slots, weight: float) -> Tensor:
        return sharded_gradient(self._model, part, self._loss_fn, self._blocks, sink, weight)
