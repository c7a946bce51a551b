# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The reference gradients stored for every block, and the projection that they define.

The rows of a block form a ring: new reference gradients replace the oldest. Rows are scaled to unit norm per block,
which changes neither their span nor their cone. Their norms are stored separately. A row consists of one piece of each
parameter. The stored values of a piece are multiplied by a scale: 1, or with int8 the scale that the piece's largest
element requires. Memory is `rows x projected parameters`. The orthogonal constraint also stores its orthonormal basis,
so it needs twice that.

If parameters are sharded, a process holds the same shard of every row. Norms, Gram matrices and inner products are
then summed over the processes, so that all of them have the same values. All processes must call a method if its
docstring says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy

import torch
from torch import Tensor

from . import cone, distributed, linalg
from .layout import Blocks, Stack

NEGLIGIBLE = 1e-6
"""Rows shorter than this, relative to the longest row of their block, constrain nothing."""


class Slots:
    """Write access to some rows of a stack, in which gradients add up.

    Args:
        blocks (`Blocks`): The layout.
        stack (`Stack`): The rows.
        scales (`Stack`): The factors of each piece's rows, `(pieces, rows)` per group.
        slots (`Sequence[int]`): The indices of the rows.

    Attributes:
        weight (`float`): The factor by which gradients are multiplied when they are added.
    """

    def __init__(self, blocks: Blocks, stack: Stack, scales: Stack, slots: Sequence[int]) -> None:
        self.weight = 1.0
        self._stack, self._stacked_scales = stack, scales
        self._views = blocks.views(stack)
        # (rows,) of each parameter, or (slices, rows).
        self._scales = [
            own[0] if group.slices == 1 else own
            for part, group in zip(scales, blocks.groups, strict=True)
            for own in part.unflatten(0, (-1, group.slices))
        ]
        self._take(slots)
        self.clear()

    def _take(self, slots: Sequence[int]) -> None:
        self._slots, self._own = list(slots), _index(slots)

    def of(self, places: Sequence[int]) -> Slots:
        """Access to some of these rows, given by their positions. The contents of the rows stay as they are."""
        part = copy(self)
        part._take([self._slots[place] for place in places])
        return part

    def clear(self) -> None:
        """Set the rows to zero."""
        for _, own in _runs(self._slots):
            for part, scales in zip(self._stack, self._stacked_scales, strict=True):
                part[:, own] = 0
                scales[:, own] = 1

    def add_products(self, piece: int, outputs: Tensor, inputs: Tensor, factor: float) -> None:
        """Add `factor` times the gradients of one matrix, `outputs^T inputs`, to all rows.

        Args:
            piece (`int`): The index of the matrix.
            outputs (`Tensor`): `(rows, tokens, out)`, float32: gradients of the outputs of a linear map.
            inputs (`Tensor`): `(rows, tokens, in)`, float32: the inputs of that map.
            factor (`float`): The factor of the gradients.
        """
        view = self._views[piece]
        own = self._own
        direct = view.dtype == outputs.dtype and view.device == outputs.device
        if direct and isinstance(own, slice) and view.shape[1:] == (outputs.shape[-1], inputs.shape[-1]):
            view[own].baddbmm_(outputs.mT, inputs, alpha=factor * self.weight)
        else:
            self.add(piece, torch.bmm(outputs.mT, inputs).mul_(factor))

    def add(self, piece: int, gradients: Tensor, first: int = 0) -> None:
        """Add the `(n, *shape)` gradients of one parameter to the rows `first, first + 1, ...`."""
        view, scales = self._views[piece], self._scales[piece]
        new = gradients.to(view.device).reshape(len(gradients), *view.shape[1:])
        for given, own in _runs(self._slots[first : first + len(new)]):
            if view.dtype == torch.int8:
                old = scales[..., own].movedim(-1, 0)
                whole = new[given] * self.weight + view[own] * old.reshape(old.shape + (1,) * (view.dim() - old.dim()))
                multiples, fresh = linalg.quantize(
                    whole.flatten(1) if old.dim() == 1 else whole  # one scale per piece
                )
                view[own], scales[..., own] = multiples.view(whole.shape), fresh.movedim(0, -1)
            else:
                view[own].add_(new[given], alpha=self.weight)


def _runs(slots: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Split slots into runs of neighbors, each with its positions among the slots.

    A slice of rows is a view; a list of rows is not.
    """
    start = 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] != slots[end - 1] + 1:
            yield slice(start, end), slice(slots[start], slots[end - 1] + 1)
            start = end


def _index(slots: Sequence[int]) -> slice | list[int]:
    """The index that selects the rows of these slots: a slice if they are neighbors, else a list."""
    runs = [own for _, own in _runs(slots)]
    return runs[0] if len(runs) == 1 else list(slots)


class Subspace:
    """A ring of reference gradients per block, under one constraint.

    Args:
        blocks (`Blocks`): The layout of the projected parameters.
        rows (`int`): Number of rows per block.
        constraint (`str`): `"cone"` or `"orthogonal"`.
        dtype (`torch.dtype`): The dtype in which the rows are stored. int8 works only with the cone and without
            shards. Every computation is in float32 or wider.
        rank (`int`, *optional*): For `"orthogonal"`: use only the span of the leading `rank` directions.
        on_host (`bool`): Store the rows in host memory, and copy one group at a time to the parameters' device.

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
        if blocks.sharded and dtype == torch.int8:
            raise ValueError(
                "rows_dtype='int8' is not allowed where parameters are sharded: its scales are those of whole "
                "matrices. Use 'bfloat16'."
            )
        self.blocks = blocks
        self.capacity = rows
        self.constraint = constraint
        self.rank = rank
        self.rows = blocks.zeros(rows, dtype, on_host)
        self.scales: Stack = [torch.ones(part.shape[:2], device=part.device) for part in self.rows]
        self.norms = torch.zeros(blocks.count, rows, dtype=linalg.small_dtype(blocks.device), device=blocks.device)
        self.sets: list[str | None] = [None] * rows  # which reference set a row came from; None: empty or bad
        self.cursor = 0
        # Saved with the rows. Recomputed in one piece, it could differ in the last bit, and so could a resumed run.
        self.gram = torch.zeros(blocks.count, rows, rows, dtype=self.norms.dtype, device=blocks.device)
        # The rows that bound the last step are the starting point of the next search. Saved, because the path of the
        # search may decide the last bit.
        self.start = torch.zeros_like(self.norms)
        self.active_gram = self.gram
        self.directions = self.rows
        self._matrix: Tensor | cone.Correlations = cone.correlations(self.gram)

    @property
    def filled(self) -> int:
        """Number of rows that hold a reference gradient."""
        return sum(name is not None for name in self.sets)

    def parameters_with_rows(self) -> Tensor:
        """Whether each parameter has a row with a nonzero element: `(parameters,)`, in `blocks.order`.

        All processes must call it.
        """
        pieces = zip(self.blocks.names(), self.blocks.views(self.rows), strict=True)
        has = {name: view.any().to(self.blocks.device) for name, view in pieces}
        (total,) = self.blocks.total(torch.stack([has[name] for name in self.blocks.order]).float())
        return total > 0

    def views_of(self, slots: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """Some rows of every parameter, `(rows, *shape)` by name, as views: one run of neighboring slots at a time.

        The shapes are those of `Blocks.views`.
        """
        views = dict(zip(self.blocks.names(), self.blocks.views(self.rows), strict=True))
        for _, own in _runs(slots):
            yield {name: view[own] for name, view in views.items()}

    def claim(self, count: int) -> list[int]:
        """Take the next `count` slots of the ring, oldest first. Their previous rows are lost.

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

    def claim_for(self, sets: Sequence[str]) -> list[int]:
        """Take one slot for each of these sets: the slot whose row came from the set, or an empty one.

        Raises:
            ValueError: If no empty slot is left for a set.
        """
        owners = list(self.sets)
        for name in sets:
            if name not in owners:
                if None not in owners:
                    raise ValueError(f"There is no slot left for the set {name!r} in rows={self.capacity}.")
                owners[owners.index(None)] = name
        return [owners.index(name) for name in sets]

    def adopt(self, other: Subspace) -> None:
        """Take over the rows of a smaller subspace of the same parameters."""
        old = slice(other.capacity)
        for mine, theirs in zip(self.rows, other.rows, strict=True):
            mine[:, old] = theirs
        for mine, theirs in zip(self.scales, other.scales, strict=True):
            mine[:, old] = theirs
        self.norms[:, old], self.start[:, old] = other.norms, other.start
        self.gram[:, old, old] = other.gram
        self.sets[old], self.cursor = other.sets, other.cursor
        self._solve()

    def open(self, slots: Sequence[int]) -> Slots:
        """Empty the slots and return a writer for their raw gradients. A call of `commit` must follow."""
        return Slots(self.blocks, self.rows, self.scales, slots)

    def commit(self, slots: Sequence[int], sets: Sequence[str]) -> list[int]:
        """Scale newly written rows to unit norm per block and rebuild the projection.

        A row with any value that is not finite becomes a zero row, which constrains nothing. All processes must call
        it.

        Args:
            slots (`Sequence[int]`): The slots that `open` gave access to.
            sets (`Sequence[str]`): For each slot, the reference set that its row came from.

        Returns:
            The slots whose row was not finite.
        """
        own = []
        for slot in slots:
            lengths = self._scaled([linalg.norms(row) for row in self._near([slot])], [slot])
            own.append(self.blocks.reduce([part.square() for part in lengths]))
        (squares,) = self.blocks.total(torch.stack(own))
        finite = squares.isfinite().flatten(1).all(-1).tolist()
        for slot, square, good, name in zip(slots, squares, finite, sets, strict=True):
            if good:
                self._normalize(slot, square.sqrt())
            else:
                self.open([slot])
                self.norms[:, slot] = 0
            self.sets[slot] = name if good else None
        self._update_gram(slots)
        return [slot for slot, good in zip(slots, finite, strict=True) if not good]

    def _near(self, slots: Sequence[int] | None = None, stack: Stack | None = None) -> Iterator[Tensor]:
        """Rows on the parameters' device, `(pieces, rows, numel)`, group by group: all of a stack, or some slots."""
        for rows, group in zip(self.rows if stack is None else stack, self.blocks.groups, strict=True):
            own = rows if slots is None else rows[:, _index(slots)]
            yield own.to(group.device, non_blocking=True)

    def _scaled(self, values: Sequence[Tensor], slots: Sequence[int] | None = None) -> list[Tensor]:
        """Values of stored rows, `(pieces, rows)` per group, times the rows' scales: of all rows, or of some slots."""
        return [
            own * (scales if slots is None else scales[:, slots]).to(own.device)
            for own, scales in zip(values, self.scales, strict=True)
        ]

    def _normalize(self, slot: int, norms: Tensor) -> None:
        """Scale one row to unit norm per block. The norms must be finite."""
        own = slice(slot, slot + 1)
        lengths = self.blocks.spread(norms)
        for rows, scales, row, length in zip(self.rows, self.scales, self._near([slot]), lengths, strict=True):
            if rows.dtype == torch.int8:
                inverse = torch.where(length > 0, 1.0 / torch.where(length > 0, length, 1.0), 0.0)
                scales[:, own] *= inverse.to(scales.device)
            elif rows.dtype == torch.float32 and rows.device == row.device:
                linalg.divide_(row, length)
            else:
                rows[:, own] = linalg.normalize(row, length).to(rows.device, rows.dtype)
        self.norms[:, own] = norms

    def add_up(self, slots: Sequence[int]) -> None:
        """Sum raw gradients over processes that hold whole parameters and wrote their shares.

        All processes must call it.
        """
        if distributed.count() == 1 or self.blocks.sharded:
            return
        index = list(slots)
        for rows, scales, own in zip(self.rows, self.scales, self._near(index), strict=True):
            (total,) = distributed.summed([own * scales[:, index].to(own.device).unsqueeze(-1)])
            if rows.dtype == torch.int8:
                total, scales[:, index] = (part.to(rows.device) for part in linalg.quantize(total))
            rows[:, index] = total.to(rows.device, rows.dtype)

    def discard(self, slots: Sequence[int]) -> None:
        """Empty slots that were opened and cannot be committed.

        It cannot be used with shards, because other processes may be at a different point.
        """
        self.open(slots)
        self.norms[:, list(slots)] = 0
        for slot in slots:
            self.sets[slot] = None
        self._update_gram(slots)

    def _update_gram(self, changed: Sequence[int]) -> None:
        index = _index(changed)
        grams = []
        for rows, scales in zip(self._near(), self.scales, strict=True):
            scales = scales.to(rows.device)
            grams.append(linalg.gram(rows, index) * scales[:, index].unsqueeze(-1) * scales.unsqueeze(-2))
        (fresh,) = self.blocks.total(self.blocks.reduce(grams))
        self.gram[:, index] = fresh
        self.gram[:, :, index] = fresh.mT
        self._solve()

    def _solve(self) -> None:
        """Prepare what a projection needs from the rows and their Gram matrix.

        If a row is far shorter than the longest row of its block, it is a zero gradient with rounding errors. At unit
        length it would count as much as the others, so it constrains nothing.
        """
        active = self.norms > NEGLIGIBLE * self.norms.amax(1, keepdim=True)
        self.active_gram = self.gram * (active.unsqueeze(-1) & active.unsqueeze(-2))
        if self.constraint == "cone":
            self._matrix = cone.correlations(self.active_gram)
            return
        self.directions = self.rows  # free the old basis before the new one is computed
        # An explicit basis stays exact for nearly parallel rows; the Gram matrix alone would lose them.
        weights = self.blocks.spread(linalg.span_weights(self.active_gram, self.rank))
        self.directions = [
            linalg.orthonormal_rows(near, weight).to(rows.device, rows.dtype)
            for weight, near, rows in zip(weights, self._near(), self.rows, strict=True)
        ]
        (gram,) = self.blocks.total(
            self.blocks.reduce([linalg.gram(basis) for basis in self._near(stack=self.directions)])
        )
        self._matrix = linalg.pseudo_inverse(gram)

    def products(self, vectors: Stack) -> Tensor:
        """Inner products of all (unit) rows with the vectors: `(blocks, rows)`, float32; of this process's part."""
        return self.blocks.reduce(
            self._scaled([linalg.products(rows, vector) for rows, vector in zip(self._near(), vectors, strict=True)])
        )

    def combine(self, coefficients: Tensor) -> Stack:
        """The rows' linear combination as a stack, from `(blocks, rows)` coefficients of the unit rows."""
        spread = self._scaled(self.blocks.spread(coefficients))
        return [linalg.combine(rows, c) for rows, c in zip(self._near(), spread, strict=True)]

    def directed(self, vectors: Stack) -> Tensor:
        """Inner products of the projection's directions with the vectors, `(blocks, rows)`, of this process's part.

        The directions are the unit rows, or their orthonormal basis.
        """
        if self.constraint == "cone":
            return self.products(vectors)
        directions = self._near(stack=self.directions)
        return self.blocks.reduce(
            [linalg.products(rows, vector) for rows, vector in zip(directions, vectors, strict=True)]
        )

    def coefficients(self, vectors: Stack | None, products: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Coefficients of the rows' combination that, added to descent directions, makes them meet the constraint.

        A descent direction `v` is subtracted from the parameters: a gradient, or their value before a step minus their
        value after it. Orthogonal (arXiv 2602.07892, the projection of its update rule): `v - Q^T Q v`, where Q is an
        orthonormal basis of the rows' span. Cone (Lopez-Paz and Ranzato 2017, section 3): `v + R^T lambda` with
        `lambda >= 0`, the closest vector with `R v >= 0`, which raises no reference loss.

        Args:
            vectors (`Stack`): `(pieces, numel)` per group, float32.
            products (`Tensor`, *optional*): The result of `directed` for the vectors, summed over processes. With it
                the vectors are not needed.

        Returns:
            The coefficients for `corrections`, `(blocks, rows)`, and the squared norm of the correction in each block,
            `(blocks,)`.
        """
        if products is None:
            assert vectors is not None
            (products,) = self.blocks.total(self.directed(vectors))
        if self.constraint == "cone":
            coefficients = cone.cone_coefficients(self._matrix, -products, start=self.start)
            self.start = coefficients
            return coefficients, linalg.lengths_squared(self.gram, coefficients)
        assert isinstance(self._matrix, Tensor)
        coefficients = -linalg.orthogonal_coefficients(self._matrix, products)
        return coefficients, -(coefficients * products).sum(-1)  # |Q^T Q v|^2 is the inner product with v

    def corrections(self, coefficients: Tensor) -> Iterator[list[Tensor]]:
        """The corrections for the result of `coefficients`, group by group: one per parameter, in its shape.

        Only one group's corrections are in memory at a time, if the caller releases them.
        """
        spread = self.blocks.spread(coefficients)
        if self.constraint == "cone":
            spread = self._scaled(spread)
        parts = zip(self._near(stack=self.directions), spread, self.blocks.local_parameters(), strict=True)
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
        members: dict[str, list[int]] = {}
        for slot in slots:
            name = self.sets[slot]
            if name is not None:
                members.setdefault(name, []).append(slot)
        weights = torch.zeros(self.capacity, dtype=self.norms.dtype)
        for name, own in members.items():
            weights[own] = (1.0 if factors is None else factors[name]) / (len(own) * len(members))
        return self.norms * weights.to(self.norms.device)

    def length(self, coefficients: Tensor) -> Tensor:
        """The norm, over all blocks together, of a combination of the unit rows with `(blocks, rows)` coefficients."""
        return linalg.lengths_squared(self.gram, coefficients).sum().sqrt()

    def overlaps(self, vectors: Stack) -> Tensor:
        """The values of the vectors that `cosines` needs: `(rows + 1,)`, of this process's part.

        They are the inner products with the raw rows, over all blocks together, and the squared length.
        """
        # Small matrices only: the raw rows are the unit rows times their norms, in each block.
        products = (self.norms * self.products(vectors)).sum(0)
        length = torch.stack([part.flatten().dot(part.flatten()).to(self.blocks.device) for part in vectors]).sum()
        return torch.cat([products, length.to(products.dtype).unsqueeze(0)])

    def cosines(self, vectors: Stack | None, overlaps: Tensor | None = None) -> dict[str, Tensor]:
        """Cosine of the vectors, over all blocks together, with the mean raw gradient of each set's rows.

        Args:
            vectors (`Stack`): `(pieces, numel)` per group.
            overlaps (`Tensor`, *optional*): The result of `overlaps` for the vectors, summed over processes. With it
                the vectors are not needed.
        """
        if overlaps is None:
            assert vectors is not None
            (overlaps,) = self.blocks.total(self.overlaps(vectors))
        products, length = overlaps[:-1], overlaps[-1].sqrt()
        gram = (self.norms.unsqueeze(-1) * self.gram * self.norms.unsqueeze(-2)).sum(0)
        cosines = {}
        for name in dict.fromkeys(name for name in self.sets if name is not None):
            own = [slot for slot, owner in enumerate(self.sets) if owner == name]
            mean_norm = gram[own][:, own].mean().clamp(min=0).sqrt()
            cosines[name] = products[own].mean() / (mean_norm * length).clamp(min=torch.finfo(torch.float32).tiny)
        return cosines

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """The ring as tensors by name (`rows.PARAMETER`: `(rows, *shape)`), and a JSON-ready rest.

        If parameters are sharded, all processes must call it, because it gathers the shards. The first process gets
        the tensors, in host memory. The others get none.
        """
        tensors = self.blocks.gathered("rows", self.rows)
        if not self.blocks.sharded or distributed.rank() == 0:
            tensors |= self._small()
        return tensors, {"sets": list(self.sets), "cursor": self.cursor}

    def _small(self) -> dict[str, Tensor]:
        """The tensors that are saved in addition to the rows. They are the same in all processes."""
        small = {"norms": self.norms, "gram": self.gram, "start": self.start}
        if self.rows[0].dtype == torch.int8:
            small |= {f"scales.{i}": scales for i, scales in enumerate(self.scales)}
        return small

    def load_state_dict(self, tensors: Mapping[str, Tensor], rest: Mapping) -> None:
        """Restore the result of `state_dict`, in any number of processes.

        Raises:
            ValueError: If the state was made for other parameters, shapes or numbers of rows. Nothing is changed then.
        """
        pieces = dict(zip(self.blocks.names(), self.blocks.flat_parameters(), strict=True))
        expected = {f"rows.{name}": (self.capacity, *parameter.shape) for name, parameter in pieces.items()}
        small = self._small()
        expected |= {name: tuple(own.shape) for name, own in small.items()}
        missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        if missing or surplus:
            raise ValueError(
                "The subspace was made for another adapter: "
                f"{len(missing)} tensors are missing ({', '.join(missing[:3]) or 'none'}), "
                f"{len(surplus)} are not known here ({', '.join(surplus[:3]) or 'none'}). "
                "Load it with the same `target_modules`, `scope` and base model, or rebuild it from the references."
            )
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(
                    f"The subspace does not fit: {name} has shape {tuple(tensors[name].shape)}, expected "
                    f"{shape} (rows x parameter shape). Use the same `rows`, `r` and `scope`, or rebuild "
                    "it from the references."
                )
        if len(rest["sets"]) != self.capacity or not 0 <= int(rest["cursor"]) < self.capacity:
            raise ValueError(f"The subspace does not fit: its ring is not one of rows={self.capacity}.")
        for name in expected:
            if tensors[name].is_floating_point() and not tensors[name].isfinite().all():
                raise ValueError(
                    f"The subspace is damaged: {name} has values that are not finite. Rebuild it from the references."
                )
        self.blocks.scatter("rows", tensors, self.rows)
        for name, own in small.items():
            own.copy_(tensors[name])
        self.sets, self.cursor = list(rest["sets"]), int(rest["cursor"])
        self._solve()
