# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The reference gradients held of every block, and the projection that they define.

The rows of a block form a ring: new reference gradients replace the oldest. They are scaled to unit norm per block,
which changes neither their span nor their cone, and their norms are kept beside them. What is stored of a row is its
piece of each parameter times a scale: 1, or with int8 what its largest element asks for. Memory is `rows x projected
parameters`, and nothing is ever of the size of a base weight; the orthogonal constraint keeps its orthonormal basis as
well, and so needs it twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from . import geometry
from .blocks import Blocks, Stack


class Slots:
    """Write access to some rows of a stack, in which gradients add up.

    Args:
        blocks (`Blocks`): The layout.
        stack (`Stack`): The rows.
        scales (`Stack`): What a piece's rows are multiplied with, `(pieces, rows)` per group.
        slots (`Sequence[int]`): Which rows.

    Attributes:
        weight (`float`): What gradients are multiplied with when they are added.
    """

    def __init__(self, blocks: Blocks, stack: Stack, scales: Stack, slots: Sequence[int]) -> None:
        self.weight = 1.0
        self._views = blocks.views(stack)
        self._scales = [piece for part in scales for piece in part.unbind(0)]
        self._slots = list(slots)
        self.clear()

    def clear(self) -> None:
        """Sets the rows to zero."""
        for view, scales in zip(self._views, self._scales, strict=True):
            view[self._slots] = 0
            scales[self._slots] = 1

    def add(self, piece: int, gradients: Tensor, first: int = 0) -> None:
        """Adds `(n, *shape)` gradients of one piece to the rows `first, first + 1, ...`."""
        view, scales = self._views[piece], self._scales[piece]
        for slot, gradient in zip(self._slots[first:], gradients, strict=False):
            if view.dtype == torch.int8:
                whole = gradient * self.weight + view[slot] * scales[slot]
                view[slot], scales[slot] = geometry.quantize(whole)
            else:
                view[slot].add_(gradient, alpha=self.weight)


class Subspace:
    """A ring of reference gradients per block, under one constraint.

    Args:
        blocks (`Blocks`): The layout of the projected parameters.
        rows (`int`): How many rows a block holds.
        constraint (`str`): `"cone"` or `"orthogonal"`.
        dtype (`torch.dtype`): In which the rows are stored, int8 under the cone alone; every computation is float32 or
            wider.
        rank (`int`, *optional*): For `"orthogonal"`: keep only the span of the leading `rank` directions.
    """

    def __init__(
        self,
        blocks: Blocks,
        rows: int,
        constraint: str,
        dtype: torch.dtype = torch.float32,
        rank: int | None = None,
    ) -> None:
        self.blocks = blocks
        self.capacity = rows
        self.constraint = constraint
        self.rank = rank
        self.rows = blocks.zeros(rows, dtype)
        self.scales: Stack = [torch.ones(part.shape[:2], device=part.device) for part in self.rows]
        self.norms = torch.zeros(blocks.count, rows, dtype=geometry.small_dtype(blocks.device), device=blocks.device)
        self.sets: list[str | None] = [None] * rows  # which reference set a row came from; None: empty or bad
        self.cursor = 0
        # Saved with the rows: computed anew in one piece it could differ in the last bit, and a resumed run with it.
        self.gram = torch.zeros(blocks.count, rows, rows, dtype=self.norms.dtype, device=blocks.device)
        # Which rows bound the last step is where the next one's search for them begins. Saved, as its way there may
        # decide the last bit.
        self.start = torch.zeros_like(self.norms)
        self.directions = self.rows
        self._matrix = self.gram

    @property
    def filled(self) -> int:
        """How many rows hold a reference gradient."""
        return sum(name is not None for name in self.sets)

    def claim(self, count: int) -> list[int]:
        """Takes the next `count` slots of the ring, oldest first; their former rows are lost.

        Raises:
            ValueError: If `count` exceeds the ring.
        """
        if count > self.capacity:
            raise ValueError(
                f"{count} reference gradients do not fit into rows={self.capacity}. Raise `rows`, or lower "
                "`refresh_samples` or the number of reference batches."
            )
        slots = [(self.cursor + i) % self.capacity for i in range(count)]
        self.cursor = (self.cursor + count) % self.capacity
        return slots

    def open(self, slots: Sequence[int]) -> Slots:
        """Empties the slots and returns a writer for their raw gradients; `commit` must follow."""
        return Slots(self.blocks, self.rows, self.scales, slots)

    def commit(self, slots: Sequence[int], sets: Sequence[str]) -> list[int]:
        """Scales freshly written rows to unit norm per block and rebuilds the projection.

        A row that is not finite anywhere becomes a zero row, which constrains nothing.

        Args:
            slots (`Sequence[int]`): The slots that `open` gave access to.
            sets (`Sequence[str]`): For each slot the reference set that it came from.

        Returns:
            The slots whose row was not finite.
        """
        usable = torch.stack([self._normalize(slot) for slot in slots]).tolist()
        for slot, name, good in zip(slots, sets, usable, strict=True):
            self.sets[slot] = name if good else None
        self._update_gram(slots)
        return [slot for slot, good in zip(slots, usable, strict=True) if not good]

    def _normalize(self, slot: int) -> Tensor:
        """Scales one row to unit norm per block; returns, on the device, whether it was finite in all of them."""
        row = [rows[:, slot : slot + 1] for rows in self.rows]
        scales = [own[:, slot : slot + 1] for own in self.scales]
        squares = [(geometry.norms(part) * scale).square() for part, scale in zip(row, scales, strict=True)]
        norms = self.blocks.reduce(squares).sqrt()
        finite = torch.isfinite(norms).all()
        spread = self.blocks.spread(torch.where(finite, norms, torch.nan))
        for part, scale, lengths in zip(row, scales, spread, strict=True):
            if part.dtype == torch.int8:
                usable = (lengths > 0) & lengths.isfinite()
                scale.copy_(torch.where(usable, scale / torch.where(usable, lengths, 1.0), 0.0))
            else:
                part.copy_(geometry.normalize(part, lengths))
        self.norms[:, slot : slot + 1] = torch.where(finite, norms, 0.0)
        return finite

    def discard(self, slots: Sequence[int]) -> None:
        """Empties slots that were opened and cannot be committed."""
        self.open(slots)
        self.norms[:, list(slots)] = 0
        for slot in slots:
            self.sets[slot] = None
        self._update_gram(slots)

    def _update_gram(self, changed: Sequence[int]) -> None:
        index = list(changed)
        fresh = self.blocks.reduce(
            [
                geometry.gram(rows, index) * scales[:, index].unsqueeze(-1) * scales.unsqueeze(-2)
                for rows, scales in zip(self.rows, self.scales, strict=True)
            ]
        )
        self.gram[:, index] = fresh
        self.gram[:, :, index] = fresh.mT
        self._solve()

    def _solve(self) -> None:
        """Prepares what a projection needs from the rows and their Gram matrix."""
        if self.constraint == "cone":
            return
        self.directions = self.rows  # frees the old basis before the new one is made
        # An explicit basis keeps nearly parallel rows exact, where the Gram matrix alone would lose them.
        weights = self.blocks.spread(geometry.span_weights(self.gram, self.rank))
        self.directions = [
            geometry.orthonormal_rows(rows, weight).to(rows.dtype)
            for weight, rows in zip(weights, self.rows, strict=True)
        ]
        self._matrix = geometry.pseudo_inverse(self.blocks.reduce([geometry.gram(basis) for basis in self.directions]))

    def products(self, vectors: Stack) -> Tensor:
        """Inner products of every row with the vectors: `(blocks, rows)`, unit rows, float32."""
        parts = zip(self.rows, self.scales, vectors, strict=True)
        return self.blocks.reduce([geometry.products(rows, vector) * scales for rows, scales, vector in parts])

    def combine(self, coefficients: Tensor) -> Stack:
        """The rows' linear combination, `(blocks, rows)` coefficients of unit rows, as a stack."""
        parts = zip(self.rows, self.scales, self.blocks.spread(coefficients), strict=True)
        return [geometry.combine(rows, c * scales) for rows, scales, c in parts]

    def coefficients(self, vectors: Stack) -> tuple[Tensor, Tensor]:
        """What combination of the rows, added to descent directions, makes them meet the constraint.

        A descent direction `v` is subtracted from the parameters: a gradient, or their value before a step minus that
        after it. Orthogonal (arXiv 2602.07892, the projection of its update rule): `v - Q^T Q v`, with Q an
        orthonormal basis of the rows' span. Cone (Lopez-Paz and Ranzato 2017, section 3): `v + R^T lambda` with
        `lambda >= 0`, the closest vector with `R v >= 0`, which raises no reference loss.

        Args:
            vectors (`Stack`): `(pieces, numel)` per group, float32.

        Returns:
            The coefficients for `corrections`, `(blocks, rows)`, and the squared norm of the correction in each
            block, `(blocks,)`.
        """
        if self.constraint == "cone":
            products = self.products(vectors)
            coefficients = geometry.cone_coefficients(self._matrix, -products, start=self.start)
            self.start = coefficients
            return coefficients, geometry.lengths_squared(self.gram, coefficients)
        products = self.blocks.reduce(
            [geometry.products(basis, vector) for basis, vector in zip(self.directions, vectors, strict=True)]
        )
        coefficients = -geometry.orthogonal_coefficients(self._matrix, products)
        return coefficients, -(coefficients * products).sum(-1)  # Q^T Q v is as long as its inner product with v says

    def corrections(self, coefficients: Tensor) -> Iterator[list[Tensor]]:
        """The corrections that `coefficients` gave, group by group: a list of the pieces in their parameters' shapes.

        Only one group's are in memory at a time, if the caller lets go of them.
        """
        own = self.blocks.spread(coefficients)
        if self.constraint == "cone":
            own = [c * scales for c, scales in zip(own, self.scales, strict=True)]
        for directions, c, parameters in zip(self.directions, own, self.blocks.parameters, strict=True):
            yield [
                piece.view(parameter.shape)
                for piece, parameter in zip(geometry.combine(directions, c).unbind(0), parameters, strict=True)
            ]

    def mean_weights(self, slots: Sequence[int]) -> Tensor:
        """Coefficients `(blocks, rows)` of the mean over sets of the mean raw gradient of the given slots."""
        members: dict[str, list[int]] = {}
        for slot in slots:
            name = self.sets[slot]
            if name is not None:
                members.setdefault(name, []).append(slot)
        weights = torch.zeros(self.capacity, dtype=self.norms.dtype)
        for own in members.values():
            weights[own] = 1.0 / (len(own) * len(members))
        return self.norms * weights.to(self.norms.device)

    def cosines(self, vectors: Stack) -> dict[str, Tensor]:
        """Cosine of the vectors, over all blocks together, with the mean raw gradient of each set's rows."""
        # Small matrices only: the raw rows are the unit rows times their norms, in each block.
        products = (self.norms * self.products(vectors)).sum(0)
        gram = (self.norms.unsqueeze(-1) * self.gram * self.norms.unsqueeze(-2)).sum(0)
        length = torch.stack([part.square().sum().to(self.blocks.device) for part in vectors]).sum().sqrt()
        cosines = {}
        for name in dict.fromkeys(name for name in self.sets if name is not None):
            own = [slot for slot, owner in enumerate(self.sets) if owner == name]
            mean_norm = gram[own][:, own].mean().clamp(min=0).sqrt()
            cosines[name] = products[own].mean() / (mean_norm * length).clamp(min=torch.finfo(torch.float32).tiny)
        return cosines

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """The ring as tensors by name (`rows.PARAMETER`: `(rows, *shape)`) and a JSON-ready rest."""
        names = self.blocks.names()
        tensors = {f"rows.{name}": view for name, view in zip(names, self.blocks.views(self.rows), strict=True)}
        tensors |= {"norms": self.norms, "gram": self.gram, "start": self.start}
        tensors |= {f"scales.{i}": scales for i, scales in enumerate(self.scales)}
        return tensors, {"sets": list(self.sets), "cursor": self.cursor}

    def load_state_dict(self, tensors: Mapping[str, Tensor], rest: Mapping) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: If the state was made for other parameters, shapes or numbers of rows; nothing is changed.
        """
        expected, _ = self.state_dict()
        missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        if missing or surplus:
            raise ValueError(
                "The subspace was made for another adapter: "
                f"{len(missing)} tensors are missing ({', '.join(missing[:3]) or 'none'}), "
                f"{len(surplus)} are not known here ({', '.join(surplus[:3]) or 'none'}). "
                "Load it with the same `target_modules`, `scope` and base model, or rebuild it from the references."
            )
        for name, own in expected.items():
            if own.shape != tensors[name].shape:
                raise ValueError(
                    f"The subspace does not fit: {name} has shape {tuple(tensors[name].shape)}, expected "
                    f"{tuple(own.shape)} (rows x parameter shape). Use the same `rows`, `r` and `scope`, or rebuild "
                    "it from the references."
                )
        if len(rest["sets"]) != self.capacity or not 0 <= int(rest["cursor"]) < self.capacity:
            raise ValueError(f"The subspace does not fit: its ring is not one of rows={self.capacity}.")
        for name, own in expected.items():
            own.copy_(tensors[name])
        self.sets, self.cursor = list(rest["sets"]), int(rest["cursor"])
        self._solve()
