# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Pure functions on stacked tensors: spans, orthogonal complements and cones.

Shapes: `B` blocks are stacked, each with `m` rows (reference gradients) of `d` dimensions. Rows are stored in
float32, bfloat16 or int8 and converted tile by tile; what is `m x m` is computed in float64. Nothing reads a value
back from the device, except `cone_coefficients` on a CPU and what `torch.linalg.eigh` does inside, at refresh.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 2**18
"""Most elements of `rows` that are converted to another dtype at a time on a CPU: what stays in its cache."""

ACCELERATOR_TILE = 2**24
"""The same elsewhere, where it keeps the number of kernels low."""

TOLERANCE = 5e-7
"""Smallest singular value kept, relative to the largest.

Two unit rows at angle `t` have the singular value ratio `tan(t / 2)`, so this is the published rule of dropping a
second direction whose Gram-Schmidt remainder is shorter than 1e-6.
"""


def small_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype of the `m x m` problems: float64, but float32 on mps, which has no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def _tiles(rows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices over blocks and over dimensions that together cover `rows`, each of about `TILE` elements at most."""
    blocks, m, d = rows.shape
    size = TILE if rows.device.type == "cpu" else ACCELERATOR_TILE
    # Parts of equal width, in whole cache lines where they are wide: stray alignment makes products much slower.
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
    """Euclidean norms of the rows, neither under- nor overflowing for any float32 input.

    Args:
        rows: `[B, m, d]`, any floating dtype or int8.

    Returns:
        `[B, m]`, float64; not finite where a row has an element that is not.
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
    """Rows divided by their lengths; a row whose length is zero or not finite becomes zero, which constrains nothing.

    Args:
        rows: `[B, m, d]`, any floating dtype.
        lengths: `[B, m]`, float64: of whole rows where `rows` is a part of them; by default `norms(rows)`.

    Returns:
        `[B, m, d]`, float32.
    """
    lengths = norms(rows) if lengths is None else lengths
    usable = (lengths > 0) & lengths.isfinite()
    unit = divide_(rows.to(torch.float32, copy=True), torch.where(usable, lengths, 1.0))
    return unit.masked_fill_(~usable.unsqueeze(-1), 0.0)


def divide_(rows: Tensor, lengths: Tensor) -> Tensor:
    """Divides rows by their lengths, in place.

    Args:
        rows: `[B, m, d]`, float32.
        lengths: `[B, m]`, float64, finite; a row of length zero stays as it is.

    Returns:
        `rows`.
    """
    lengths = torch.where(lengths > 0, lengths, 1.0).unsqueeze(-1)
    # A power of two, so without rounding, brings any length within float32's range.
    shift = lengths.log2().round().clamp(min=-126, max=126).neg().exp2()
    return rows.mul_(shift.float()).mul_((1.0 / (lengths * shift)).float())


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest multiples of `1/127` of the largest absolute value of each vector.

    Args:
        values: `[..., d]`, float32.

    Returns:
        The multiples, `[..., d]`, int8, and what they are multiplied with, `[...]`; that is 0 for a zero vector, and
        not finite for one that is not.
    """
    peaks = values.abs().amax(-1)
    usable = peaks.isfinite() & (peaks > 0)
    multiples = (values / torch.where(usable, peaks, 1.0).unsqueeze(-1) * 127).round()
    return torch.where(usable.unsqueeze(-1), multiples, 0.0).to(torch.int8), torch.where(usable, peaks / 127, peaks)


def gram(rows: Tensor, index: Sequence[int] | slice | None = None) -> Tensor:
    """Inner products of the rows of each block with one another, accumulated in float64.

    Args:
        rows: `[B, m, d]`, float32, bfloat16 or int8.
        index: Only the products of these `n` rows with all rows; by default of all. A slice is faster than a list.

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
        `[B, m]`, float32. Where TensorFloat-32 products are switched on, so are they here, with three digits.
    """
    # As `v R^T`: on a CPU `R v` is five times slower in torch 2.13.
    factors = vectors.float().unsqueeze(-2)
    if rows.dtype == torch.float32:
        return torch.bmm(factors, rows.mT).squeeze(-2)
    result = torch.zeros(rows.shape[0], 1, rows.shape[1], device=rows.device)
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
        if rows.device.type != "cpu" or d == 0:  # an empty shard has nothing to choose
            return torch.bmm(weights, rows).squeeze(-2)
        # Few rows bind, and the others are not read. (An accelerator would have to wait for their number.)
        used = weights != 0
        ends = used.sum((-2, -1)).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        index = used.flatten().nonzero().squeeze(-1)
        return F.embedding_bag(index, rows.reshape(-1, d), starts, mode="sum", per_sample_weights=weights[used])
    result = torch.empty(blocks, d, device=rows.device)
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
    return (_times(gram, c) * c).sum(-1).clamp(min=0.0)


def span_weights(gram: Tensor, rank: int | None = None, tolerance: float = TOLERANCE) -> Tensor:
    """Weights `W` that make the rows `Q = W R` an orthonormal basis of the top directions of `R`.

    The directions are eigenvectors of the Gram matrix, largest eigenvalue first. Directions beyond `rank`, or with a
    singular value of at most `tolerance` times the block's largest, get zero rows in `W`, so that shapes are static.

    Args:
        gram: `[B, m, m]`, from `gram`. Rows should be of unit length: the tolerance is relative to the largest.
        rank: Most directions to keep; None keeps all that pass the tolerance.
        tolerance: Relative, on singular values. The default is explained at `TOLERANCE`; a value below
            `sqrt(m * eps)`, which rounding of the Gram matrix hides, is raised to that.

    Returns:
        `[B, m, m]`, float64; NaN for a block whose Gram matrix is not finite.
    """
    m = gram.shape[-1]
    problem = gram.to(small_dtype(gram.device))
    finite = problem.isfinite().all(-1).all(-1)[:, None, None]
    # eigh raises for the whole batch when a single block is not finite.
    values, vectors = torch.linalg.eigh(torch.where(finite, problem, 0.0))
    singular = values.flip(-1).clamp(min=0.0).sqrt()
    floor = max(tolerance, (m * torch.finfo(problem.dtype).eps) ** 0.5)
    kept = singular > floor * singular[:, :1]
    if rank is not None:
        kept = kept & (torch.arange(m, device=gram.device) < rank)
    scales = torch.where(kept, 1.0 / torch.where(kept, singular, 1.0), 0.0)
    return torch.where(finite, scales.unsqueeze(-1) * vectors.flip(-1).mT, torch.nan)


def orthonormal_rows(rows: Tensor, weights: Tensor) -> Tensor:
    """Orthonormal rows `Q = W R`, accumulated in float64.

    Weights reach `1 / TOLERANCE`, where float32 sums would keep one digit of seven. With these rows,
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


def pseudo_inverse(gram: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Pseudo-inverses of Gram matrices, `W^T W` with the `W` of `span_weights`.

    Args:
        gram: `[B, m, m]`, from `gram`.
        tolerance: As in `span_weights`.

    Returns:
        `[B, m, m]`, float64.
    """
    weights = span_weights(gram, tolerance=tolerance)
    return weights.mT @ weights


def orthogonal_coefficients(inverse_gram: Tensor, products: Tensor) -> Tensor:
    """Coefficients `c = G^+ p` for which `v - R^T c` has no component in the span of the rows.

    This needs no second copy of the rows, but the rounding of float32 products is magnified by the ratio of the
    largest singular value to the smallest one kept. Use `orthonormal_rows` where rows may be close to dependent.

    Args:
        inverse_gram: `[B, m, m]`, from `pseudo_inverse`.
        products: `[B, m]`, `p = R v`.

    Returns:
        `[B, m]`, float64.
    """
    return _times(inverse_gram, products.to(inverse_gram.dtype))


class Correlations(NamedTuple):
    """A Gram matrix of rows scaled to length 1, and what it takes to solve with it; see `correlations`."""

    matrix: Tensor
    """`[B, m, m]`, with the ridge."""
    lengths: Tensor
    """`[B, m]`, 1 for a zero row."""
    empty: Tensor
    """`[B, m]`: whether a row is zero."""
    finite: Tensor
    """`[B]`: whether a block's matrix is."""
    ridge: float


def correlations(gram: Tensor) -> Correlations:
    """Scales a Gram matrix to a unit diagonal, so that tolerances are relative; made once for many solutions.

    Args:
        gram: `[B, m, m]`, from `gram`.
    """
    dtype = small_dtype(gram.device)
    diagonal = gram.to(dtype).diagonal(dim1=-2, dim2=-1)
    empty = diagonal <= 0
    lengths = torch.where(empty, 1.0, diagonal).sqrt()
    matrix = gram.to(dtype) / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2))
    ridge = 1e-9 if dtype == torch.float64 else 1e-5
    matrix.diagonal(dim1=-2, dim2=-1).add_(torch.where(empty, 1.0, ridge))
    return Correlations(matrix, lengths, empty, matrix.isfinite().all(-1).all(-1), ridge)


def cone_coefficients(
    gram: Tensor | Correlations, products: Tensor, iterations: int = 32, start: Tensor | None = None
) -> Tensor:
    """Coefficients `l >= 0` for which `D' = D - R^T l` is the update closest to `D` with `R D' <= 0`.

    They minimise `l^T G l / 2 - l^T p`, the dual problem (Lopez-Paz and Ranzato 2017, equation 11). On a CPU block
    principal pivoting (Judice and Pires 1994) solves most blocks in a few rounds; it cycles on rows that are nearly
    opposed or more than the dimensions. Those blocks, and on an accelerator all, are solved by Mehrotra's
    predictor-corrector interior-point method (Nocedal and Wright 2006, algorithm 16.4), whose number of iterations
    hardly depends on the rows. A tiny ridge, undone at the end where that keeps `l >= 0`, makes `l` unique for
    dependent rows.

    Exactly zero, so that `D' = D`, for a block without a positive product, and for a zero row. Positive scaling of a
    row leaves `D'` unchanged; scaling `D` scales it. `l` grows as rows approach opposition: at 1e-3 rad from it, `l`
    may be 1e3 times `|D|`, and `R D' / (|R||D|)` as computed in float32 is up to 1e-4 instead of 1e-7. It is up to
    1e-5 for linearly dependent rows that oppose one another together. Projecting `D'` once more lowers both. (The
    ridge treats rows that cancel to within float32 rounding as cancelling, which they are but for that rounding.)

    Args:
        gram: `[B, m, m]`, `G = R R^T`, from `gram`, or its `correlations`.
        products: `[B, m]`, `p = R D`.
        iterations: Interior-point iterations run on an accelerator, with nothing read back from it; a CPU stops as
            soon as all blocks have converged. Independent rows take 10 to 18, dependent ones up to 28.
        start: `[B, m]`, a guess of the coefficients, of which only the signs count: where pivoting starts. The last
            step's are a good one.

    Returns:
        `[B, m]`, float64; NaN for a block with input that is not finite, the other blocks being unharmed.
    """
    h, lengths, empty, finite, ridge = gram if isinstance(gram, Correlations) else correlations(gram)
    # Products of at most 1. NaN must stay NaN.
    p = torch.where(empty, -torch.inf, products.to(h.dtype) / lengths)
    peak = torch.where(empty, 0.0, p).abs().amax(-1, keepdim=True)
    peak = torch.where(peak == 0, 1.0, peak)
    p = (p / peak).clamp(min=-1.0)
    if p.device.type == "cpu":
        x = _pivoted(h, p, ridge, finite, p > 0 if start is None else start > 0, iterations)
    else:
        x = _interior_point(h, p, ridge, iterations)
    return x * peak / lengths


_ROUNDS = 10
"""Of pivoting, before a block counts as cycling."""


def _pivoted(h: Tensor, p: Tensor, ridge: float, finite: Tensor, passive: Tensor, iterations: int) -> Tensor:
    """Minimises `x^T h x / 2 - x^T p` over `x >= 0`, reading back after every round which blocks are left."""
    finite = finite & p.isfinite().all(-1)
    x = torch.zeros_like(p).masked_fill_(~finite.unsqueeze(-1), torch.nan)
    left = ((p > 0).any(-1) & finite).nonzero()[:, 0]
    passive = passive[left]
    for _ in range(_ROUNDS):
        if not len(left):
            return x
        own = p[left]
        solution, slope = _on_face(h[left], own, ridge, passive)
        wrong = torch.where(passive, solution < 0, slope < -_SLACK)
        good = ~wrong.any(-1)
        x[left[good]] = solution[good]
        left, passive = left[~good], (passive ^ wrong)[~good]
    if len(left):
        x[left] = _interior_point(h[left], p[left], ridge, iterations)
    return x


_SLACK = 1e-10
"""How far below zero a slope may be through rounding, where products are at most 1."""


def _on_face(h: Tensor, p: Tensor, ridge: float, passive: Tensor) -> tuple[Tensor, Tensor]:
    """The minimiser with all but the passive coefficients zero, and the slope there."""
    # Few rows bind: solve for as many as the block with the most has.
    count = int(passive.sum(-1).max())
    order = passive.to(torch.uint8).argsort(-1, descending=True)[:, :count]
    inner = h.gather(1, order.unsqueeze(-1).expand(-1, -1, h.shape[-1]))
    inner = inner.gather(2, order.unsqueeze(-2).expand(-1, count, -1))
    binding, own = passive.gather(1, order), p.gather(1, order)
    factor = _face(inner, binding)
    solution = _refined(inner, own, ridge, binding, _solve(factor, torch.where(binding, own, 0.0)), factor)
    x = torch.zeros_like(p).scatter_(1, order, solution)
    return x, _times(h, x) - p


def _face(h: Tensor, passive: Tensor) -> Tensor:
    """Cholesky factors of the passive rows and columns, with ones on the diagonal elsewhere."""
    both = passive.unsqueeze(-1) & passive.unsqueeze(-2)
    return torch.linalg.cholesky_ex(torch.where(both, h, torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)))[0]


def _refined(h: Tensor, p: Tensor, ridge: float, passive: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """One step of iterative refinement towards the solution without the ridge, where that stays `x >= 0`."""
    refined = x + _solve(factor, torch.where(passive, p - _times(h, x) + ridge * x, 0.0))
    return torch.where((refined >= 0).all(-1, keepdim=True), refined, x)


def _interior_point(h: Tensor, p: Tensor, ridge: float, iterations: int) -> Tensor:
    """The same minimiser in a fixed number of iterations; a CPU stops early."""
    gap, rounding = (1e-18, 1e-13) if p.dtype == torch.float64 else (1e-10, 1e-5)
    conflict = (p > 0).any(-1, keepdim=True)
    x, y = torch.ones_like(p), torch.ones_like(p)
    for _ in range(iterations):
        slope = _times(h, x) - p
        mean = (x * y).mean(-1, keepdim=True)
        residual = (slope - y).abs().amax(-1, keepdim=True)
        busy = conflict & ((mean > gap) | (residual > rounding * (1.0 + x.amax(-1, keepdim=True))))
        if p.device.type == "cpu" and not busy.any():
            break
        factor, _ = torch.linalg.cholesky_ex(h + torch.diag_embed(y / x))
        # Predictor: the Newton step towards x y = 0. Corrector: towards a common, smaller x y, to second order.
        dx = _solve(factor, -slope)
        dy = -y - y / x * dx
        length = torch.minimum(_longest(x, dx), _longest(y, dy))
        predicted = ((x + length * dx) * (y + length * dy)).mean(-1, keepdim=True)
        shift = (mean * (predicted / mean) ** 3 - dx * dy) / x
        dx = _solve(factor, shift - slope)
        dy = shift - y - y / x * dx
        length = torch.minimum(_longest(x, dx), _longest(y, dy)) * 0.995
        x, y = torch.where(busy, x + length * dx, x), torch.where(busy, y + length * dy, y)

    passive = x > y  # Nowhere in a block without conflict, which keeps its start x = y.
    return _refined(h, p, ridge, passive, torch.where(passive, x, 0.0), _face(h, passive))


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


def _solve(factors: Tensor, vectors: Tensor) -> Tensor:
    return torch.cholesky_solve(vectors.unsqueeze(-1), factors).squeeze(-1)


def _longest(x: Tensor, dx: Tensor) -> Tensor:
    """The longest step of at most 1 that keeps `x + step * dx >= 0`, for each block."""
    return torch.where(dx < 0, x / -dx, torch.inf).amin(-1, keepdim=True).clamp(max=1.0)
