# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The reference gradients stored for every block.

The rows of a block form a ring: new reference gradients replace the oldest. Rows are scaled to unit norm per block,
which changes neither their span nor their cone. Their norms are stored separately. A row consists of one piece of each
parameter. The stored values of a piece are multiplied by a scale: 1, or with int8 the scale that the piece's largest
element requires. Memory is `rows x projected parameters`.

If parameters are sharded, a process holds the same shard of every row. Norms, Gram matrices and inner products are
then summed over the processes, so that all of them have the same values. All processes must call a method if its
docstring says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from . import distributed, linalg
from .layout import Blocks, Stack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""The dtypes in which rows and directions are stored, by the value of `rows_dtype`."""


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

    def add_products(self, index: int, outputs: Tensor, inputs: Tensor, factor: float) -> None:
        """Add `factor` times the gradients of one matrix, `outputs^T inputs`, to all rows.

        Args:
            index (`int`): The matrix's place in `Blocks.flat_parameters()`.
            outputs (`Tensor`): `(rows, tokens, out)`, float32: gradients of the outputs of a linear map.
            inputs (`Tensor`): `(rows, tokens, in)`, float32: the inputs of that map.
            factor (`float`): The factor of the gradients.
        """
        view = self._views[index]
        own = self._own
        direct = view.dtype == outputs.dtype and view.device == outputs.device
        if direct and isinstance(own, slice) and view.shape[1:] == (outputs.shape[-1], inputs.shape[-1]):
            view[own].baddbmm_(outputs.mT, inputs, alpha=factor * self.weight)
        else:
            self.add(index, torch.bmm(outputs.mT, inputs).mul_(factor))

    def add(self, index: int, gradients: Tensor, first: int = 0) -> None:
        """Add the `(n, *shape)` gradients of one parameter to the rows `first, first + 1, ...`."""
        view, scales = self._views[index], self._scales[index]
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

    Rows that a slice selects are a view. Rows that a list selects are a copy.
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


class Rows:
    """A ring of reference gradients per block.

    Args:
        blocks (`Blocks`): The layout of the projected parameters.
        capacity (`int`): Number of rows per block.
        dtype (`torch.dtype`): The dtype in which the rows are stored. int8 does not work with shards. Every
            computation is in float32 or wider.
        on_host (`bool`): Store the rows in host memory, and copy one group at a time to the parameters' device.

    Attributes:
        stack (`Stack`): The stored values.
        scales (`Stack`): Their factors, `(pieces, rows)` per group.
        norms (`Tensor`): The norms of the raw rows, `(blocks, rows)`.
        gram (`Tensor`): The inner products of the unit rows, `(blocks, rows, rows)`.
        sets (`list[str | None]`): The reference set that each row came from. `None`: empty, or not finite.
        cursor (`int`): The slot that is taken next.

    Raises:
        ValueError: If the rows of shards are to be stored as int8.
    """

    def __init__(
        self, blocks: Blocks, capacity: int, dtype: torch.dtype = torch.float32, on_host: bool = False
    ) -> None:
        if blocks.sharded and dtype == torch.int8:
            raise ValueError(
                "rows_dtype='int8' is not allowed with sharded parameters, because a scale belongs to a whole "
                "matrix. Use rows_dtype='bfloat16'."
            )
        self.blocks = blocks
        self.capacity = capacity
        self.stack = blocks.zeros(capacity, dtype, on_host)
        self.scales: Stack = [
            torch.ones(part.shape[:2], dtype=torch.float32, device=part.device) for part in self.stack
        ]
        self.norms = torch.zeros(blocks.count, capacity, dtype=linalg.small_dtype(blocks.device), device=blocks.device)
        # Saved with the rows. If it were recomputed in one piece, its last bit and a resumed run could differ.
        self.gram = torch.zeros(blocks.count, capacity, capacity, dtype=self.norms.dtype, device=blocks.device)
        self.sets: list[str | None] = [None] * capacity
        self.cursor = 0

    @property
    def filled(self) -> int:
        """Number of rows that hold a reference gradient."""
        return sum(name is not None for name in self.sets)

    def by_set(self, slots: Iterable[int]) -> dict[str, list[int]]:
        """Of each reference set those of the given slots that hold its rows. Empty slots are left out."""
        members: dict[str, list[int]] = {}
        for slot in slots:
            name = self.sets[slot]
            if name is not None:
                members.setdefault(name, []).append(slot)
        return members

    def parameters_with_rows(self) -> Tensor:
        """Whether each parameter has a row with a nonzero element: `(parameters,)`, in `blocks.order`.

        All processes must call it.
        """
        pieces = zip(self.blocks.names(), self.blocks.views(self.stack), strict=True)
        has = {name: view.any().to(self.blocks.device) for name, view in pieces}
        (total,) = self.blocks.total(torch.stack([has[name] for name in self.blocks.order]).float())
        return total > 0

    def views_of(self, slots: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """Some rows of every parameter, `(rows, *shape)` by name, as views: one run of neighboring slots at a time.

        The shapes are those of `Blocks.views`.
        """
        views = dict(zip(self.blocks.names(), self.blocks.views(self.stack), strict=True))
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
        """Take one slot for each of these sets: the slot whose row came from the set, or an empty one."""
        owners = list(self.sets)
        for name in sets:
            if name not in owners:
                owners[owners.index(None)] = name  # there is one: see `Refresher.capacity_for`
        return [owners.index(name) for name in sets]

    def adopt(self, other: Rows) -> None:
        """Take over the rows of a smaller ring of the same parameters."""
        old = slice(other.capacity)
        for mine, theirs in zip(self.stack, other.stack, strict=True):
            mine[:, old] = theirs
        for mine, theirs in zip(self.scales, other.scales, strict=True):
            mine[:, old] = theirs
        self.norms[:, old] = other.norms
        self.gram[:, old, old] = other.gram
        self.sets[old], self.cursor = other.sets, other.cursor

    def open(self, slots: Sequence[int]) -> Slots:
        """Empty the slots and return a writer for their raw gradients. A call of `commit` must follow."""
        # The last step may still copy rows from pinned memory (`near`).
        for device in {g.device for rows, g in zip(self.stack, self.blocks.groups, strict=True) if rows.is_pinned()}:
            torch.cuda.current_stream(device).synchronize()
        return Slots(self.blocks, self.stack, self.scales, slots)

    def commit(self, slots: Sequence[int], sets: Sequence[str]) -> list[int]:
        """Scale newly written rows to unit norm per block and update the Gram matrices.

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
            lengths = self.scaled([linalg.norms(row) for row in self.near([slot])], [slot])
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

    def discard(self, slots: Sequence[int]) -> None:
        """Empty slots that were opened and cannot be committed.

        It cannot be used with shards, because other processes may be at a different point.
        """
        self.open(slots)
        self.norms[:, list(slots)] = 0
        for slot in slots:
            self.sets[slot] = None
        self._update_gram(slots)

    def add_up(self, slots: Sequence[int]) -> None:
        """Sum raw gradients over processes that hold whole parameters and wrote their shares.

        All processes must call it.
        """
        if distributed.count() == 1 or self.blocks.sharded:
            return
        index = list(slots)
        for rows, scales, own in zip(self.stack, self.scales, self.near(index), strict=True):
            (total,) = distributed.summed([own * scales[:, index].to(own.device).unsqueeze(-1)])
            if rows.dtype == torch.int8:
                total, scales[:, index] = (part.to(rows.device) for part in linalg.quantize(total))
            rows[:, index] = total.to(rows.device, rows.dtype)

    def near(self, slots: Sequence[int] | None = None, stack: Stack | None = None) -> Iterator[Tensor]:
        """Rows on the parameters' device, `(pieces, rows, numel)`, group by group.

        These are all rows of a stack, or the rows of some slots.
        """
        for rows, group in zip(self.stack if stack is None else stack, self.blocks.groups, strict=True):
            own = rows if slots is None else rows[:, _index(slots)]
            yield own.to(group.device, non_blocking=True)

    def scaled(self, values: Sequence[Tensor], slots: Sequence[int] | None = None) -> list[Tensor]:
        """Values of stored rows, `(pieces, rows)` per group, times the rows' scales: of all rows, or of some slots."""
        return [
            own * (scales if slots is None else scales[:, slots]).to(own.device, non_blocking=True)
            for own, scales in zip(values, self.scales, strict=True)
        ]

    def _normalize(self, slot: int, norms: Tensor) -> None:
        """Scale one row to unit norm per block. The norms must be finite."""
        own = slice(slot, slot + 1)
        lengths = self.blocks.spread(norms)
        for rows, scales, row, length in zip(self.stack, self.scales, self.near([slot]), lengths, strict=True):
            if rows.dtype == torch.int8:
                inverse = torch.where(length > 0, 1.0 / torch.where(length > 0, length, 1.0), 0.0)
                scales[:, own] *= inverse.to(scales.device)
            elif rows.dtype == torch.float32 and rows.device == row.device:
                linalg.divide_(row, length)
            else:
                rows[:, own] = linalg.normalize(row, length).to(rows.device, rows.dtype)
        self.norms[:, own] = norms

    def _update_gram(self, changed: Sequence[int]) -> None:
        index = _index(changed)
        grams = []
        for rows, scales in zip(self.near(), self.scales, strict=True):
            scales = scales.to(rows.device)
            grams.append(linalg.gram(rows, index) * scales[:, index].unsqueeze(-1) * scales.unsqueeze(-2))
        (fresh,) = self.blocks.total(self.blocks.reduce(grams))
        self.gram[:, index] = fresh
        self.gram[:, :, index] = fresh.mT

    def products(self, vectors: Stack) -> Tensor:
        """Inner products of all (unit) rows with the vectors: `(blocks, rows)`, float32; for this process's part."""
        return self.blocks.reduce(
            self.scaled([linalg.products(rows, vector) for rows, vector in zip(self.near(), vectors, strict=True)])
        )

    def combine(self, coefficients: Tensor) -> Iterator[Tensor]:
        """The rows' linear combination, group by group, from `(blocks, rows)` coefficients of the unit rows."""
        spread = self.scaled(self.blocks.spread(coefficients))
        return map(linalg.combine, self.near(), spread)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The ring as tensors by name (`rows.PARAMETER`: `(rows, *shape)`), and a JSON-ready rest.

        If parameters are sharded, all processes must call it, because it gathers the shards. The first process gets
        the tensors, in host memory. The others get none.
        """
        tensors = self.blocks.gathered("rows", self.stack)
        if not self.blocks.sharded or distributed.rank() == 0:
            tensors |= self._small()
        return tensors, {"sets": list(self.sets), "cursor": self.cursor, "order": self._order()}

    def _order(self) -> list[str]:
        """The order of the parameters to which the values in `_small` belong: that of the blocks or of the pieces."""
        by_piece = self.blocks.scope == "slice" or self.stack[0].dtype == torch.int8
        return self.blocks.names() if by_piece else self.blocks.order

    def _small(self) -> dict[str, Tensor]:
        """The tensors that are saved in addition to the rows. They are the same in all processes."""
        small = {"norms": self.norms, "gram": self.gram}
        if self.stack[0].dtype == torch.int8:
            small |= {f"scales.{i}": scales for i, scales in enumerate(self.scales)}
        return small

    def check_state(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any], more: dict[str, Tensor]) -> None:
        """Check that a state fits, before anything is changed.

        Args:
            tensors (`Mapping[str, Tensor]`): The saved tensors.
            rest (`Mapping`): The saved rest.
            more (`dict[str, Tensor]`): Further tensors that the state must hold, with their names and shapes.

        Raises:
            ValueError: If the state was made for other parameters, shapes or numbers of rows, or if it is damaged.
        """
        order, own = rest["order"], self._order()
        if order != own and sorted(order) == sorted(own):
            raise ValueError(
                "The subspace was saved while the parameters were on other devices or had other dtypes (device_map, "
                "upcast), so its values are in another order. Use the same, or rebuild it from the references."
            )
        pieces = self.blocks.by_name().items()
        expected = {f"rows.{name}": (self.capacity, *parameter.shape) for name, parameter in pieces}
        expected |= {name: tuple(own.shape) for name, own in (self._small() | more).items()}
        missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        if missing or surplus:
            raise ValueError(
                f"The subspace was made for another adapter: {len(missing)} tensors are missing "
                f"({', '.join(missing[:3]) or 'none'}), and {len(surplus)} are unexpected "
                f"({', '.join(surplus[:3]) or 'none'}). Load it with the same `target_modules`, `scope` and base "
                "model, or rebuild it from the references."
            )
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(
                    f"The subspace does not fit: {name} has the shape {tuple(tensors[name].shape)}, but the shape "
                    f"{shape} (rows x parameter shape) is needed. Use the same `rows`, `r` and `scope`, or rebuild "
                    "it from the references."
                )
        if len(rest["sets"]) != self.capacity or not 0 <= int(rest["cursor"]) < self.capacity:
            raise ValueError(
                f"The subspace does not fit: its list of sets or its next slot does not match rows={self.capacity}. "
                "Use the same `rows`, or rebuild it from the references."
            )
        for name in expected:
            if tensors[name].is_floating_point() and not tensors[name].isfinite().all():
                raise ValueError(
                    f"The subspace is damaged: {name} has values that are not finite. Rebuild it from the references."
                )

    def load_state_dict(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`, which `check_state` has accepted, in any number of processes."""
        self.blocks.scatter("rows", tensors, self.stack)
        for name, own in self._small().items():
            own.copy_(tensors[name])
        self.sets, self.cursor = list(rest["sets"]), int(rest["cursor"])
