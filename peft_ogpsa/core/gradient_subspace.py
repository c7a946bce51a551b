# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The projection that the stored reference gradients of every block define.

The orthogonal constraint stores an orthonormal basis of the rows' span, so it needs twice the memory of the rows. If
parameters are sharded, inner products are summed over the processes, so that all of them have the same coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cone, distributed, linalg
from .layout import Blocks, Stack
from .rows import Rows

NEGLIGIBLE = 1e-6
"""Rows shorter than this, relative to the longest row of their block, constrain nothing."""


class GradientSubspace:
    """A ring of reference gradients per block, under one constraint.

    Args:
        blocks (`Blocks`): The layout of the projected parameters.
        rows (`int`): Number of rows per block.
        constraint (`str`): `"cone"` or `"orthogonal"`.
        dtype (`torch.dtype`): The dtype in which the rows are stored. int8 works only with the cone and without
            shards. Every computation is in float32 or wider.
        rank (`int`, *optional*): For `"orthogonal"`: use only the span of the leading `rank` directions.
        on_host (`bool`): Store the rows in host memory, and copy one group at a time to the parameters' device.

    Attributes:
        rows (`Rows`): The stored reference gradients.
        directions (`Stack`): The unit rows, or for `"orthogonal"` an orthonormal basis of their span.
        active_gram (`Tensor`): The Gram matrices of the rows that constrain something, `(blocks, rows, rows)`.

    Raises:
        ValueError: If the rows of shards are to be stored as int8.
    """

    def __init__(
        self,
        blocks: Blocks,
        rows: int,
        constraint: str,
        dtype: torch.dtype = torch.float32,
        rank: int | None = None,
        on_host: bool = False,
    ) -> None:
        self.blocks = blocks
        self.constraint = constraint
        self.rank = rank
        self.rows = Rows(blocks, rows, dtype, on_host)
        # The rows that bound the last step are the starting point of the next search. Saved, because the path of the
        # search may decide the last bit.
        self.start = torch.zeros_like(self.rows.norms)
        self.active_gram = self.rows.gram
        self.directions = self.rows.stack
        self._matrix: Tensor | cone.Correlations = cone.correlations(self.rows.gram)
        # Of each set, its rows. On the device, because a step would wait if it moved them there.
        self._slots: dict[str, Tensor] = {}

    def adopt(self, other: GradientSubspace) -> None:
        """Take over the rows of a smaller subspace of the same parameters."""
        self.rows.adopt(other.rows)
        self.start[:, : other.rows.capacity] = other.start
        self._solve()

    def commit(self, slots: Sequence[int], sets: Sequence[str]) -> list[int]:
        """Commit newly written rows and rebuild the projection; see `Rows.commit`. All processes must call it."""
        bad = self.rows.commit(slots, sets)
        self._solve()
        return bad

    def discard(self, slots: Sequence[int]) -> None:
        """Discard newly written rows and rebuild the projection; see `Rows.discard`."""
        self.rows.discard(slots)
        self._solve()

    def _solve(self) -> None:
        """Prepare what a projection needs from the rows and their Gram matrix.

        If a row is far shorter than the longest row of its block, it is a zero gradient with rounding errors. At unit
        length it would count as much as the others, so it constrains nothing.
        """
        members = self.rows.by_set(range(self.rows.capacity))
        self._slots = {name: torch.tensor(own, device=self.blocks.device) for name, own in members.items()}
        active = self.rows.norms > NEGLIGIBLE * self.rows.norms.amax(1, keepdim=True)
        self.active_gram = self.rows.gram * (active.unsqueeze(-1) & active.unsqueeze(-2))
        if self.constraint == "cone":
            self._matrix = cone.correlations(self.active_gram)
            return
        self.directions = self.rows.stack  # free the old basis before the new one is computed
        # An explicit basis stays exact for nearly parallel rows; the Gram matrix alone would lose them.
        weights = self.blocks.spread(linalg.span_weights(self.active_gram, self.rank))
        self.directions = [
            linalg.orthonormal_rows(near, weight).to(rows.device, rows.dtype)
            for weight, near, rows in zip(weights, self.rows.near(), self.rows.stack, strict=True)
        ]
        (gram,) = self.blocks.total(
            self.blocks.reduce([linalg.gram(basis) for basis in self.rows.near(stack=self.directions)])
        )
        self._matrix = linalg.pseudo_inverse(gram)

    def directed(self, vectors: Stack) -> Tensor:
        """Inner products of the projection's directions with the vectors, `(blocks, rows)`, of this process's part.

        The directions are the unit rows, or their orthonormal basis.
        """
        if self.constraint == "cone":
            return self.rows.products(vectors)
        directions = self.rows.near(stack=self.directions)
        return self.blocks.reduce(
            [linalg.products(rows, vector) for rows, vector in zip(directions, vectors, strict=True)]
        )

    def gram_without(self, missing: Sequence[int]) -> Tensor:
        """The Gram matrices `(blocks, rows, rows)` of the directions without their parts of some parameters.

        It is computed from all elements of the rows, and the orthogonal constraint may wait for it.

        Args:
            missing (`Sequence[int]`): The parameters' places in the list of all. They are not cut into slices.
        """
        grams = [linalg.gram(own) for own in self.rows.near(stack=self.directions)]
        if self.constraint == "cone":
            factors = [
                scales.to(gram.device, non_blocking=True) for scales, gram in zip(self.rows.scales, grams, strict=True)
            ]
            grams = [g * own.unsqueeze(-1) * own.unsqueeze(-2) for g, own in zip(grams, factors, strict=True)]
        pieces = [piece for gram in grams for piece in gram]
        for place in missing:
            pieces[place].zero_()
        (gram,) = self.blocks.total(self.blocks.reduce(grams))
        # As in `_solve`: what remains of a row may be a zero gradient with rounding errors.
        lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        if self.constraint == "cone":
            lengths = lengths * self.rows.norms
        active = lengths > NEGLIGIBLE * lengths.amax(1, keepdim=True)
        return gram * (active.unsqueeze(-1) & active.unsqueeze(-2))

    def coefficients(self, products: Tensor, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coefficients of the rows' combination that, added to descent directions, makes them meet the constraint.

        A descent direction `v` is subtracted from the parameters: a gradient, or their value before a step minus their
        value after it. Orthogonal (arXiv 2602.07892, the projection of its update rule): `v - Q^T Q v`, where Q is an
        orthonormal basis of the rows' span. Cone (Lopez-Paz and Ranzato 2017, section 3): `v + R^T lambda` with
        `lambda >= 0`, the closest vector with `R v >= 0`, which raises no reference loss.

        Args:
            products (`Tensor`): The result of `directed` for the descent directions, summed over processes.
            gram (`Tensor`, *optional*): The result of `gram_without`, if only some parameters can be corrected.

        Returns:
            The coefficients for `corrections`, `(blocks, rows)`, and the squared norm of the correction in each block,
            `(blocks,)`.
        """
        if self.constraint == "cone":
            matrix = self._matrix if gram is None else cone.correlations(gram)
            coefficients = cone.cone_coefficients(matrix, -products, start=self.start)
            self.start = coefficients
            return coefficients, linalg.lengths_squared(self.rows.gram if gram is None else gram, coefficients)
        matrix = self._matrix if gram is None else linalg.pseudo_inverse(gram)
        assert isinstance(matrix, Tensor)
        coefficients = -linalg.orthogonal_coefficients(matrix, products)
        return coefficients, -(coefficients * products).sum(-1)  # |Q^T Q v|^2 is the inner product with v

    def corrections(self, coefficients: Tensor) -> Iterator[list[Tensor]]:
        """The corrections for the result of `coefficients`, group by group: one per parameter, in its shape.

        Only one group's corrections are in memory at a time, if the caller releases them.
        """
        spread = self.blocks.spread(coefficients)
        if self.constraint == "cone":
            spread = self.rows.scaled(spread)
        parts = zip(self.rows.near(stack=self.directions), spread, self.blocks.local_parameters(), strict=True)
        for directions, own, parameters in parts:
            combined = linalg.combine(directions, own)
            yield [
                part.view(parameter.shape)
                for part, parameter in zip(combined.unflatten(0, (len(parameters), -1)), parameters, strict=True)
            ]

    def mean_weights(self, slots: Sequence[int], factors: Mapping[str, float] | None = None) -> Tensor:
        """Coefficients `(blocks, rows)` of the mean over sets of the mean raw gradient of the given slots.

        Args:
            slots (`Sequence[int]`): The rows.
            factors (`Mapping[str, float]`, *optional*): The factor of each set's gradient; 1 by default.
        """
        members = self.rows.by_set(slots)
        weights = torch.zeros(self.rows.capacity, dtype=self.rows.norms.dtype)
        for name, own in members.items():
            weights[own] = (1.0 if factors is None else factors[name]) / (len(own) * len(members))
        return self.rows.norms * weights.to(self.rows.norms.device, non_blocking=True)

    def length(self, coefficients: Tensor) -> Tensor:
        """The norm, over all blocks together, of a combination of the unit rows with `(blocks, rows)` coefficients."""
        return linalg.lengths_squared(self.rows.gram, coefficients).sum().sqrt()

    def overlaps(self, vectors: Stack) -> Tensor:
        """The values of the vectors that `cosines` needs: `(rows + 1,)`, of this process's part.

        They are the inner products with the raw rows, over all blocks together, and the squared length.
        """
        # Small matrices only: the raw rows are the unit rows times their norms, in each block.
        products = (self.rows.norms * self.rows.products(vectors)).sum(0)
        length = self.blocks.square_length(vectors)
        return torch.cat([products, length.to(products.dtype).unsqueeze(0)])

    def cosines(self, overlaps: Tensor) -> dict[str, Tensor]:
        """Cosine of some vectors, over all blocks together, with the mean raw gradient of each set's rows.

        Args:
            overlaps (`Tensor`): The result of `overlaps` for the vectors, summed over processes.
        """
        products, length = overlaps[:-1], overlaps[-1].sqrt()
        gram = (self.rows.norms.unsqueeze(-1) * self.rows.gram * self.rows.norms.unsqueeze(-2)).sum(0)
        cosines = {}
        for name, own in self._slots.items():
            mean_norm = gram[own][:, own].mean().clamp(min=0).sqrt()
            cosines[name] = products[own].mean() / (mean_norm * length).clamp(min=torch.finfo(torch.float32).tiny)
        return cosines

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The rows and the start of the next search. See `Rows.state_dict` for the format and for shards."""
        tensors, rest = self.rows.state_dict()
        if not self.blocks.sharded or distributed.rank() == 0:
            tensors["start"] = self.start
        return tensors, rest

    def load_state_dict(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`, in any number of processes.

        Raises:
            ValueError: If the state was made for other parameters, shapes or numbers of rows, or if it is damaged.
                Nothing is changed then.
        """
        self.rows.check_state(tensors, rest, {"start": self.start})
        self.rows.load_state_dict(tensors, rest)
        self.start.copy_(tensors["start"])
        self._solve()
