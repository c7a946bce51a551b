# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Project an update onto the cone with a few Triton kernels, for CUDA.

The same step in torch launches several kernels for each iteration of the solver, and more with more layers. Here the
number of launches is `3 groups + 1`, whatever the model's depth. A group is the parameters of one size (`layout.py`).
The kernels are:

    snapshot   per group: gathers the parameters before the optimizer's step into a stack
    products   per group: computes the inner products of the step with the rows, one chunk of a parameter at a time
    solve      once: sums the chunks of every block and solves its cone problem
    correct    per group: subtracts the rows' combination from the parameters

A program of a kernel handles one *chunk* of one piece. No value is added up with atomics, so a run repeats to the bit.
Parameters are separate tensors, so the kernels find them by their addresses. This module needs `triton`, of version
3.6 or later (`refuse_old_triton`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradient_subspace import GradientSubspace
from .layout import Blocks, Stack

OLDEST_TRITON = "3.6"
"""The first version whose compiler accepts `_solve`. 3.4 and 3.5 fail in a pass of theirs that removes layouts."""

MOST_ROWS = 64
"""Maximum rows per block. The block's Gram matrix must fit into the registers of one program."""

DEVICES = ("cuda",)
"""Types of devices that the kernels run on. Triton's interpreter adds the CPU."""

CHUNK = 4096
"""Elements of a parameter that one program handles."""

_TILE = 4096
"""Elements of rows that a program holds at a time: `_TILE / rows` of the parameter's dimensions."""

_DEPENDENT = tl.constexpr(1e-10)
"""A unit row counts as dependent if its part orthogonal to the binding rows is shorter than the root of this."""

_SLACK = tl.constexpr(1e-10)
"""How far above zero a product may remain, with products of at most 1."""

_PIVOTS = tl.constexpr(8)
"""Maximum pivots per row. Typical problems take about one."""


@triton.jit
def _parameter(addresses, piece):
    """Pointer to a float32 parameter, which starts at a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(addresses + piece).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def _snapshot(addresses, stack, numel, chunks, CHUNK: tl.constexpr):
    piece = (tl.program_id(0) // chunks).to(tl.int64)
    index = (tl.program_id(0) % chunks) * CHUNK + tl.arange(0, CHUNK)
    inside = index < numel
    values = tl.load(_parameter(addresses, piece) + index, mask=inside)
    tl.store(stack + piece * numel + index, values, mask=inside)


@triton.jit
def _products(
    addresses,
    stack,
    rows,
    positions,
    partials,
    squares,
    numel,
    chunks,
    m,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    piece = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    parameter = _parameter(addresses, piece)
    before = stack + piece * numel
    row = tl.arange(0, ROWS)
    row_starts = rows + (piece * m + row[:, None]) * numel
    products = tl.zeros((ROWS, TILE), tl.float32)
    square = tl.zeros((TILE,), tl.float32)
    for start in range(0, CHUNK, TILE):
        index = chunk * CHUNK + start + tl.arange(0, TILE)
        inside = index < numel
        step = tl.load(before + index, mask=inside, other=0.0) - tl.load(parameter + index, mask=inside, other=0.0)
        tile = tl.load(row_starts + index[None, :], mask=(row < m)[:, None] & inside[None, :], other=0.0)
        products += tile.to(tl.float32) * step[None, :]
        square += step * step
    position = tl.load(positions + piece) + chunk
    tl.store(partials + position * m + row, tl.sum(products, axis=1), mask=row < m)
    tl.store(squares + position, tl.sum(square, axis=0))


@triton.jit
def _solve(
    gram,
    partials,
    squares,
    offsets,
    coefficients,
    removed,
    lengths,
    m,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, ROWS)
    own = i < m

    # The products of the rows with the update, which is minus the step.
    sums = tl.zeros((TILE, ROWS), tl.float64)
    square = tl.zeros((TILE,), tl.float64)
    last = tl.load(offsets + block + 1)
    for start in range(tl.load(offsets + block), last, TILE):
        chunk = start + tl.arange(0, TILE)
        here = chunk < last
        sums += tl.load(partials + chunk[:, None] * m + i[None, :], mask=here[:, None] & own[None, :], other=0.0)
        square += tl.load(squares + chunk, mask=here, other=0.0)
    p = -tl.sum(sums, axis=0)
    tl.store(lengths + block, tl.sum(square, axis=0))

    # Scale to a unit diagonal and products of at most 1, so that tolerances are relative.
    entries = gram + block * m * m + i[:, None] * m + i[None, :]
    tableau = tl.load(entries, mask=own[:, None] & own[None, :], other=0.0)
    diagonal = tl.load(gram + block * m * m + i * (m + 1), mask=own, other=0.0)
    finite = tl.sum(p - p, axis=0) + tl.sum(tl.sum(tableau - tableau, axis=1), axis=0) == 0.0
    usable = diagonal > 0.0
    unit = 1.0 / tl.sqrt(tl.where(usable, diagonal, 1.0))
    p = tl.where(usable, p * unit, 0.0)
    peak = tl.max(tl.abs(p), axis=0)
    peak = tl.where(peak > 0.0, peak, 1.0)
    p = p / peak
    tableau *= unit[:, None] * unit[None, :]

    # P are the passive rows, whose coefficients may be positive. A are the others. The tableau holds
    # [-H_PP^-1, H_PP^-1 H_PA; ., H_AA - H_AP H_PP^-1 H_PA], and `pivot` holds its diagonal. In P, `column` holds the
    # minimizer with A's coefficients zero. In A, it holds the remaining products.
    pivot = tl.where(usable, diagonal * unit * unit, 0.0)
    column = p
    passive = i < 0
    x = tl.zeros_like(p)
    count = 0
    busy = finite
    while busy:
        # Move toward that minimizer. If a coefficient reaches zero before, its row leaves P ...
        blocked = passive & (column <= 0.0)
        reach = tl.where(blocked, x / tl.where(blocked & (x > 0.0), x - column, 1.0), float("inf"))
        shortest = tl.min(reach, axis=0)
        leaves = shortest <= 1.0
        onward = x + tl.where(leaves, shortest, 1.0) * (column - x)
        # ... else the row that is violated most joins P, if there is one.
        broken = tl.where((passive == 0) & (pivot > _DEPENDENT), column, -float("inf"))
        k = tl.where(leaves, tl.argmin(reach, axis=0), tl.argmax(broken, axis=0))
        at = i == k
        x = tl.where(passive, tl.maximum(onward, 0.0), 0.0)
        busy = (leaves | (tl.max(broken, axis=0) > _SLACK)) & (count < _PIVOTS * m)
        if busy:
            inverse = 1.0 / tl.sum(tl.where(at, pivot, 0.0), axis=0)
            signed = tl.where(leaves, -inverse, inverse)
            own_column = tl.sum(tl.where(at, column, 0.0), axis=0)
            line = tl.sum(tl.where(at[None, :], tableau, 0.0), axis=1)
            tableau -= line[:, None] * line[None, :] * inverse
            tableau = tl.where(at[:, None], signed * line[None, :], tableau)
            tableau = tl.where(at[None, :], tl.where(at, -inverse, signed * line)[:, None], tableau)
            column = tl.where(at, signed * own_column, column - line * own_column * inverse)
            pivot = tl.where(at, -inverse, pivot - line * line * inverse)
            passive = passive ^ at
            count += 1

    # At the minimizer x, x H x = x p.
    square_length = tl.maximum(tl.sum(x * p, axis=0) * peak * peak, 0.0)
    tl.store(coefficients + block * m + i, tl.where(finite, x * peak * unit, float("nan")), mask=own)
    tl.store(removed + block, tl.where(finite, square_length, float("nan")))


@triton.jit
def _correct(
    addresses,
    rows,
    coefficients,
    owners,
    numel,
    chunks,
    m,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    piece = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    row = tl.arange(0, ROWS)
    own = tl.load(coefficients + tl.load(owners + piece) * m + row, mask=row < m, other=0.0).to(tl.float32)
    binds = own != 0.0  # true for NaN
    if tl.max(binds.to(tl.int32), axis=0) != 0:
        parameter = _parameter(addresses, piece)
        row_starts = rows + (piece * m + row[:, None]) * numel
        for start in range(0, CHUNK, TILE):
            index = chunk * CHUNK + start + tl.arange(0, TILE)
            inside = index < numel
            # Read first: if warps share elements, the sum's barrier then separates all reads from the write.
            value = tl.load(parameter + index, mask=inside, other=0.0)
            tile = tl.load(row_starts + index[None, :], mask=binds[:, None] & inside[None, :], other=0.0)
            correction = tl.sum(tile.to(tl.float32) * own[:, None], axis=0)
            tl.store(parameter + index, value - correction, mask=inside)


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: int) -> None:
    kernel[(programs,)](*arguments, **constants)


def _chunks(numel: int) -> int:
    return triton.cdiv(numel, CHUNK)


def _tiles(rows: int) -> dict[str, int]:
    """Kernel constants: rows, padded to a power of two, and the number of parameter dimensions taken at a time."""
    padded = triton.next_power_of_2(rows)
    return {"CHUNK": CHUNK, "ROWS": padded, "TILE": _TILE // padded}


def snapshot(addresses: Tensor, numel: int) -> Tensor:
    """Copy the parameters of a group into a stack. Reads and writes 4 bytes per parameter.

    Args:
        addresses: `(pieces,)`, int64: where the float32 parameters begin, each a multiple of 16.
        numel: Number of elements of each.

    Returns:
        `(pieces, numel)`, float32.
    """
    stack = torch.empty(len(addresses), numel, dtype=torch.float32, device=addresses.device)
    chunks = _chunks(numel)
    _launch(_snapshot, len(addresses) * chunks, addresses, stack, numel, chunks, CHUNK=CHUNK)
    return stack


def products(
    addresses: Tensor, stack: Tensor, rows: Tensor, positions: Tensor, partials: Tensor, squares: Tensor
) -> None:
    """Multiply the step, which is a snapshot minus the current parameters, with the rows.

    Reads the rows once and 8 bytes per parameter. The step itself stays in registers.

    Args:
        addresses: As for `snapshot`.
        stack: `(pieces, numel)`, float32, from `snapshot`.
        rows: `(pieces, m, numel)`, float32 or bfloat16.
        positions: `(pieces,)`, int32: where in `partials` each piece's chunks begin.
        partials: `(chunks of all groups, m)`, float32; receives every chunk's products.
        squares: `(chunks of all groups,)`, float32; receives every chunk's squared length.
    """
    pieces, m, numel = rows.shape
    chunks = _chunks(numel)
    tensors = (addresses, stack, rows, positions, partials, squares)
    _launch(_products, pieces * chunks, *tensors, numel, chunks, m, **_tiles(m))


def solve(gram: Tensor, partials: Tensor, squares: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The coefficients of `cone.cone_coefficients`, with one program per block; reads only small tensors.

    This is an active-set method (Lawson and Hanson 1974, chapter 23) in float64, with the Gram matrix in registers.
    Rows join and leave the binding set one at a time. They do so by symmetric pivots, which keep the matrix's inverse
    over that set available. The method begins with no row. As a rule it ends after as many pivots as rows bind, and
    after `8 m` at most. If several coefficients give the same correction, as with equal rows, they may differ from the
    other solver's.

    Args:
        gram: `(blocks, m, m)`, float64.
        partials: From `products`. The chunks of one block follow one another.
        squares: Likewise.
        offsets: `(blocks + 1,)`, int32: where the chunks of each block begin and end.

    Returns:
        The coefficients `(blocks, m)`, the squared norm of the correction and that of the step, both `(blocks,)`; all
        float64. Coefficients are exactly zero without conflict, and NaN if an input of the block is not finite.
    """
    blocks, m, _ = gram.shape
    coefficients = gram.new_empty(blocks, m)
    removed, lengths = gram.new_empty(blocks), gram.new_empty(blocks)
    padded = triton.next_power_of_2(m)
    sizes = {"ROWS": padded, "TILE": 1024 // padded, "num_warps": 1 if m <= 16 else 4 if m <= 32 else 8}
    _launch(_solve, blocks, gram, partials, squares, offsets, coefficients, removed, lengths, m, **sizes)
    return coefficients, removed, lengths


def correct(addresses: Tensor, rows: Tensor, coefficients: Tensor, owners: Tensor) -> None:
    """Subtract the rows' combination from the parameters.

    Reads the rows whose coefficient is not zero, and reads and writes 4 bytes per parameter. If all coefficients of a
    piece are zero, it touches nothing, so the piece's parameters stay the same to the bit.

    Args:
        addresses: As for `snapshot`.
        rows: `(pieces, m, numel)`, float32 or bfloat16.
        coefficients: `(blocks, m)`, float64.
        owners: `(pieces,)`, int64: the block of each piece.
    """
    pieces, m, numel = rows.shape
    chunks = _chunks(numel)
    tensors = (addresses, rows, coefficients, owners)
    _launch(_correct, pieces * chunks, *tensors, numel, chunks, m, **_tiles(m))


class Launcher:
    """The kernels for the parameters of one layout, at their current addresses.

    Args:
        blocks (`Blocks`): The layout.
        addresses (`list[list[int]]`): For each group, the addresses of its pieces.
    """

    def __init__(self, blocks: Blocks, addresses: list[list[int]]) -> None:
        self.blocks = blocks
        self.addresses = addresses
        device = blocks.device
        self._pointers = [torch.tensor(own, device=device) for own in addresses]
        self._owners = blocks.spread(torch.arange(blocks.count, device=device))
        # Chunks are numbered block by block, and within a block piece by piece.
        owners = torch.cat(self._owners).tolist()
        chunks = [_chunks(group.numel) for group in blocks.groups for _ in range(group.pieces)]
        positions, block_chunks, total = [0] * blocks.pieces, [0] * blocks.count, 0
        for piece in sorted(range(blocks.pieces), key=owners.__getitem__):
            positions[piece] = total
            total += chunks[piece]
            block_chunks[owners[piece]] += chunks[piece]
        sizes = [group.pieces for group in blocks.groups]
        self._positions = torch.tensor(positions, dtype=torch.int32, device=device).split(sizes)
        self._offsets = torch.tensor([0, *accumulate(block_chunks)], dtype=torch.int32, device=device)
        self._chunks = total

    def snapshot(self) -> Stack:
        """Copy the parameters into a stack."""
        with _on(self.blocks.device):
            groups = zip(self._pointers, self.blocks.groups, strict=True)
            return [snapshot(pointers, group.numel) for pointers, group in groups]

    def project(self, subspace: GradientSubspace, before: Stack) -> tuple[Tensor, Tensor]:
        """Project the parameters' change since the snapshot `before`.

        Returns:
            The squared norms, over all blocks, of the removed part and of the step before projection.
        """
        with _on(self.blocks.device):
            sizes = (self._chunks, subspace.rows.capacity)
            partials = torch.empty(sizes, dtype=torch.float32, device=self.blocks.device)
            squares = torch.empty(self._chunks, dtype=torch.float32, device=self.blocks.device)
            for group in zip(self._pointers, before, subspace.rows.stack, self._positions, strict=True):
                products(*group, partials, squares)
            coefficients, removed, lengths = solve(subspace.active_gram, partials, squares, self._offsets)
            subspace.start = coefficients
            for pointers, rows, owners in zip(self._pointers, subspace.rows.stack, self._owners, strict=True):
                correct(pointers, rows, coefficients, owners)
            return removed.sum(), lengths.sum()


def launcher(subspace: GradientSubspace, last: Launcher | None) -> Launcher | None:
    """The launcher of the kernels for a subspace: the last one, as long as the parameters stay at their addresses.

    Returns:
        `None` if the kernels do not apply. They apply only to the cone, and not to int8 rows, more than `MOST_ROWS`
        rows or rows in host memory. The parameters must be plain contiguous float32 tensors, with their slices on a
        multiple of 16 bytes, on one CUDA device.
    """
    blocks = subspace.blocks
    if blocks.sharded:
        return None
    addresses = [
        [parameter.data_ptr() + 4 * group.numel * i for parameter in parameters for i in range(group.slices)]
        for group, parameters in zip(blocks.groups, blocks.parameters, strict=True)
    ]
    if last is not None and last.blocks is blocks and last.addresses == addresses:
        return last
    fits = (
        subspace.constraint == "cone"
        and subspace.rows.capacity <= MOST_ROWS
        and all(rows.is_floating_point() and rows.device == blocks.device for rows in subspace.rows.stack)
        and blocks.device.type in DEVICES
        and all(
            type(parameter.data) is Tensor  # and not, say, a shard
            and parameter.dtype == torch.float32
            and parameter.device == blocks.device
            and parameter.is_contiguous()
            for parameter in blocks.flat_parameters()
        )
        and all(address % 16 == 0 for own in addresses for address in own)
    )
    return Launcher(blocks, addresses) if fits else None


def refuse_old_triton() -> None:
    """Reject a Triton that cannot compile the kernels.

    Raises:
        ImportError: If the installed version is older than `OLDEST_TRITON`.
    """
    if _numbers(triton.__version__) < _numbers(OLDEST_TRITON):
        raise ImportError(
            f"The Triton kernels need triton>={OLDEST_TRITON}, but triton {triton.__version__} is installed. torch "
            "2.10 and later come with a new enough Triton. Or do not ask for the kernels: unset PEFT_OGPSA_KERNELS, "
            "or set projector.kernels = False. torch then does the same work."
        )


def _numbers(version: str) -> tuple[int, ...]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _on(device: torch.device) -> AbstractContextManager:
    """Make the tensors' device the current one, because kernels start on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
