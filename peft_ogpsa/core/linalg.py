# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Pure functions on stacked tensors: lengths, products, spans and orthogonal complements.

Shapes: `B` blocks are stacked, each with `m` rows (reference gradients) of `d` dimensions. Rows are stored in float32,
bfloat16 or int8 and converted tile by tile. Values of size `m x m` are computed in float64. Nothing reads a value back
from the device, except `torch.linalg.eigh` internally, at refresh.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 2**18
"""Maximum elements of `rows` converted to another dtype at a time on a CPU, so that they stay in its cache."""

ACCELERATOR_TILE = 2**24
"""The same on other devices, where it keeps the number of kernels low."""

TOLERANCE = 5e-7
"""Smallest singular value kept, relative to the largest.

Two unit rows at angle `t` have the singular value ratio `tan(t / 2)`. This is therefore the published rule, which
drops a second direction if its Gram-Schmidt remainder is shorter than 1e-6.
"""


def small_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype of the `m x m` problems: float64, or float32 on mps, which has no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def _tiles(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices over blocks and over dimensions that together cover `rows`, each with at most about `TILE` elements."""
    blocks, m, d = rows.shape
    size = TILE if rows.device.type == "cpu" else ACCELERATOR_TILE
    # Parts have equal width. Wide parts are whole cache lines, because poor alignment makes products much slower.
    parts = -(-d * m // size) or 1
    width = -(-d // parts)
    width = min(d, -(-width // 64) * 64) if width > 64 else max(1, width)
    height = max(1, size // max(1, m * width))
    for b in range(0, blocks, height):
        for k in range(0, d, width):
            yield slice(b, b + height), slice(k, k + width)


def _converted(rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """The tiles of `rows` in another dtype, one after the other in the same memory."""
    memory = rows.new_empty(0, dtype=dtype)
    for b, k in _tiles(rows):
        part = rows[b, :, k]
        if memory.numel() < part.numel():
            memory = rows.new_empty(part.numel(), dtype=dtype)
        yield b, k, memory[: part.numel()].view(part.shape).copy_(part)


def norms(rows: Tensor) -> Tensor:
    """Euclidean norms of the rows, without underflow or overflow for any float32 input.

    Args:
        rows: `[B, m, d]`, any floating dtype or int8.

    Returns:
        `[B, m]`, float64; not finite if a row has an element that is not finite.
    """
    dtype = small_dtype(rows.device)
    squares = torch.zeros(rows.shape[:2], dtype=dtype, device=rows.device)
    if rows.shape[-1] == 0:  # an empty shard
        return squares
    # Without float64 the squares of 1e30 overflow and those of 1e-30 vanish: divide by the largest element first.
    narrow = dtype == torch.float32
    peaks = rows.abs().amax(-1).to(dtype) if narrow else torch.ones_like(squares)
    peaks = torch.where(peaks == 0, 1.0, peaks)
    for b, _, values in _converted(rows, dtype):
        values = values / peaks[b].unsqueeze(-1) if narrow else values
        squares[b] += torch.linalg.vector_norm(values, dim=-1).square()
    return peaks * squares.sqrt()


def normalize(rows: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Divide rows by their lengths. A row with a zero or non-finite length becomes zero, which constrains nothing.

    Args:
        rows: `[B, m, d]`, any floating dtype.
        lengths: `[B, m]`, float64: the lengths of the whole rows if `rows` is a part of them; by default
            `norms(rows)`.

    Returns:
        `[B, m, d]`, float32.
    """
    lengths = norms(rows) if lengths is None else lengths
    usable = (lengths > 0) & lengths.isfinite()
    unit = divide_(rows.to(torch.float32, copy=True), torch.where(usable, lengths, 1.0))
    return unit.masked_fill_(~usable.unsqueeze(-1), 0.0)


def divide_(rows: Tensor, lengths: Tensor) -> Tensor:
    """Divide rows by their lengths, in place.

    Args:
        rows: `[B, m, d]`, float32.
        lengths: `[B, m]`, float64, finite; a row of length zero stays as it is.

    Returns:
        `rows`.
    """
    lengths = torch.where(lengths > 0, lengths, 1.0).unsqueeze(-1)
    # A power of two brings any length within float32's range, without rounding.
    shift = lengths.log2().round().clamp(min=-126, max=126).neg().exp2()
    return rows.mul_(shift.float()).mul_((1.0 / (lengths * shift)).float())


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round each vector to the nearest multiples of `1/127` of its largest absolute value.

    Args:
        values: `[..., d]`, float32.

    Returns:
        The multiples, `[..., d]`, int8, and the factor to multiply them with, `[...]`. The factor is 0 for a zero
        vector, and not finite for a vector that is not finite.
    """
    peaks = values.abs().amax(-1)
    usable = peaks.isfinite() & (peaks > 0)
    multiples = (values / torch.where(usable, peaks, 1.0).unsqueeze(-1) * 127).round()
    return torch.where(usable.unsqueeze(-1), multiples, 0.0).to(torch.int8), torch.where(usable, peaks / 127, peaks)


def gram(rows: Tensor, index: Sequence[int] | slice | None = None) -> Tensor:
    """Inner products of the rows of each block with one another, accumulated in float64.

    Args:
        rows: `[B, m, d]`, float32, bfloat16 or int8.
        index: Compute only the products of these `n` rows with all rows; by default of all. A slice is faster than a
            list.

    Returns:
        `[B, m, m]`, or `[B, n, m]` with `index`, float64.
    """
    blocks, m, _ = rows.shape
    index = slice(None) if index is None else index
    count = len(range(m)[index]) if isinstance(index, slice) else len(index)
    result = torch.zeros(blocks, count, m, dtype=small_dtype(rows.device), device=rows.device)
    for b, _, tile in _converted(rows, result.dtype):
        result[b] += tile[:, index] @ tile.mT
    return result


def products(rows: Tensor, vectors: Tensor) -> Tensor:
    """Inner products of the rows of each block with its vector, `R v`.

    Args:
        rows: `[B, m, d]`, float32, bfloat16 or int8.
        vectors: `[B, d]`, any floating dtype.

    Returns:
        `[B, m]`, float32. If TensorFloat-32 products are switched on, these products use it too and have three digits.
    """
    # Computed as `v R^T`: on a CPU `R v` is five times slower in torch 2.13.
    factors = vectors.float().unsqueeze(-2)
    if rows.dtype == torch.float32:
        return torch.bmm(factors, rows.mT).squeeze(-2)
    result = torch.zeros(rows.shape[0], 1, rows.shape[1], dtype=torch.float32, device=rows.device)
    for b, k, tile in _converted(rows, torch.float32):
        result[b] += factors[b, :, k] @ tile.mT
    return result.squeeze(-2)


def combine(rows: Tensor, coefficients: Tensor) -> Tensor:
    """Sums of the rows of each block times their coefficients, `R^T c`.

    Args:
        rows: `[B, m, d]`, float32, bfloat16 or int8.
        coefficients: `[B, m]`, any floating dtype.

    Returns:
        `[B, d]`, float32.
    """
    weights = coefficients.float().unsqueeze(-2)
    blocks, _, d = rows.shape
    if rows.dtype == torch.float32:
        if rows.device.type != "cpu" or d == 0:  # an empty shard has nothing to select
            return torch.bmm(weights, rows).squeeze(-2)
        # Few rows bind, and the others are not read. (An accelerator would have to wait for their number.)
        used = weights != 0
        ends = used.sum((-2, -1)).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        index = used.flatten().nonzero().squeeze(-1)
        return F.embedding_bag(index, rows.reshape(-1, d), starts, mode="sum", per_sample_weights=weights[used])
    result = torch.empty(blocks, d, dtype=torch.float32, device=rows.device)
    for b, k, tile in _converted(rows, torch.float32):
        result[b, k] = (weights[b] @ tile).squeeze(-2)
    return result


def lengths_squared(gram: Tensor, coefficients: Tensor) -> Tensor:
    """Squared norms of the rows' combinations, `c^T G c`.

    Args:
        gram: `[B, m, m]`, from `gram`.
        coefficients: `[B, m]`.

    Returns:
        `[B]`, in the Gram matrix's dtype.
    """
    c = coefficients.to(gram.dtype)
    return (times(gram, c) * c).sum(-1).clamp(min=0.0)


def span_weights(gram: Tensor, rank: int | None = None) -> Tensor:
    """Weights `W` that make the rows `Q = W R` an orthonormal basis of the leading directions of `R`.

    The directions are eigenvectors of the Gram matrix, largest eigenvalue first. Directions beyond `rank`, or with a
    singular value of at most `TOLERANCE` times the block's largest, get zero rows in `W`, so that shapes are static.

    Args:
        gram: `[B, m, m]`, from `gram`. Rows should have unit length, because the tolerance is relative to the largest.
        rank: Maximum number of directions to keep; `None` keeps all that pass the tolerance.

    Returns:
        `[B, m, m]`, float64; NaN for a block whose Gram matrix is not finite.
    """
    m = gram.shape[-1]
    problem = gram.to(small_dtype(gram.device))
    finite = problem.isfinite().all(-1).all(-1)[:, None, None]
    # eigh raises for the whole batch when a single block is not finite.
    values, vectors = torch.linalg.eigh(torch.where(finite, problem, 0.0))
    singular = values.flip(-1).clamp(min=0.0).sqrt()
    # Rounding of the Gram matrix hides smaller values.
    floor = max(TOLERANCE, (m * torch.finfo(problem.dtype).eps) ** 0.5)
    kept = singular > floor * singular[:, :1]
    if rank is not None:
        kept = kept & (torch.arange(m, device=gram.device) < rank)
    scales = torch.where(kept, 1.0 / torch.where(kept, singular, 1.0), 0.0)
    return torch.where(finite, scales.unsqueeze(-1) * vectors.flip(-1).mT, torch.nan)


def orthonormal_rows(rows: Tensor, weights: Tensor) -> Tensor:
    """Orthonormal rows `Q = W R`, accumulated in float64.

    Weights reach `1 / TOLERANCE`. With such weights float32 sums would keep one digit of seven. With these rows,
    `v - combine(Q, products(Q, v))` is orthogonal to the span to float32 precision, however close the rows are.

    Args:
        rows: `[B, m, d]`, float32, bfloat16 or int8.
        weights: `[B, k, m]`, from `span_weights`, or its first `rank` rows.

    Returns:
        `[B, k, d]`, float32.
    """
    blocks, _, d = rows.shape
    result = torch.empty(blocks, weights.shape[1], d, dtype=torch.float32, device=rows.device)
    for b, k, tile in _converted(rows, weights.dtype):
        result[b, :, k] = weights[b] @ tile
    return result


def pseudo_inverse(gram: Tensor) -> Tensor:
    """Pseudo-inverses of Gram matrices, `W^T W` with the `W` of `span_weights`.

    Args:
        gram: `[B, m, m]`, from `gram`.

    Returns:
        `[B, m, m]`, float64.
    """
    weights = span_weights(gram)
    return weights.mT @ weights


def orthogonal_coefficients(inverse_gram: Tensor, products: Tensor) -> Tensor:
    """Coefficients `c = G^+ p` for which `v - R^T c` has no component in the span of the rows.

    This needs no second copy of the rows. However, it magnifies the rounding of float32 products by the ratio of the
    largest singular value to the smallest one kept. Use `orthonormal_rows` if rows may be close to dependent.

    Args:
        inverse_gram: `[B, m, m]`, from `pseudo_inverse`.
        products: `[B, m]`, `p = R v`.

    Returns:
        `[B, m]`, float64.
    """
    return times(inverse_gram, products.to(inverse_gram.dtype))


def times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """`[B, m, n]` matrices times `[B, n]` vectors: `[B, m]`."""
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)
