# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The cone: find the closest update along which no reference loss rises, for many blocks at once.

Nothing reads a value back from the device, except `cone_coefficients` on a CPU. `kernels.py` solves the same problem
in a Triton kernel, if it is switched on.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .linalg import small_dtype, times


class Correlations(NamedTuple):
    """A Gram matrix of rows scaled to length 1, and the values needed to solve with it; see `correlations`."""

    matrix: Tensor
    """`[B, m, m]`, including the ridge."""
    lengths: Tensor
    """`[B, m]`: the rows' lengths, 1 for a zero row."""
    empty: Tensor
    """`[B, m]`: whether a row is zero."""
    finite: Tensor
    """`[B]`: whether a block's matrix is finite."""
    ridge: float


def correlations(gram: Tensor) -> Correlations:
    """Scale a Gram matrix to a unit diagonal, so that tolerances are relative; done once for many solutions.

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

    The coefficients minimize `l^T G l / 2 - l^T p`, the dual problem (Lopez-Paz and Ranzato 2017, equation 11). On a
    CPU, block principal pivoting (Judice and Pires 1994) solves most blocks in a few rounds. It cycles if rows are
    nearly opposed, or if there are more rows than dimensions. Mehrotra's predictor-corrector interior-point method
    (Nocedal and Wright 2006, algorithm 16.4) solves those blocks, and on an accelerator all blocks. Its number of
    iterations hardly depends on the rows. A tiny ridge makes `l` unique for dependent rows. The ridge is undone at the
    end where that keeps `l >= 0`.

    The coefficients are exactly zero, so that `D' = D`, for a block without a positive product. A zero row has the
    coefficient zero. Scaling a row by a positive factor leaves `D'` unchanged; scaling `D` scales `D'`. `l` grows as
    rows approach opposition: at 1e-3 rad from it, `l` may be 1e3 times `|D|`, and `R D' / (|R||D|)` as computed in
    float32 is up to 1e-4 instead of 1e-7. This ratio is up to 1e-5 for linearly dependent rows that together oppose
    one another. Projecting `D'` once more lowers both values. (The ridge treats rows that cancel to within float32
    rounding as if they canceled exactly, and apart from that rounding they do.)

    Args:
        gram: `[B, m, m]`, `G = R R^T`, from `gram`, or its `correlations`.
        products: `[B, m]`, `p = R D`.
        iterations: Number of interior-point iterations on an accelerator, from which nothing is read back. A CPU stops
            as soon as all blocks have converged. Independent rows take 10 to 18 iterations, dependent ones up to 28.
        start: `[B, m]`, a guess of the coefficients, from which pivoting starts. Only their signs count. The
            coefficients of the last step are a good guess.

    Returns:
        `[B, m]`, float64. A block with input that is not finite gets NaN; the other blocks are not affected.
    """
    h, lengths, empty, finite, ridge = gram if isinstance(gram, Correlations) else correlations(gram)
    # Scale products to at most 1. NaN must stay NaN.
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
"""Rounds of pivoting before a block counts as cycling."""


def _pivoted(h: Tensor, p: Tensor, ridge: float, finite: Tensor, passive: Tensor, iterations: int) -> Tensor:
    """Minimize `x^T h x / 2 - x^T p` over `x >= 0`. After every round, read back which blocks are left."""
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
"""How far below zero rounding may move a slope, with products of at most 1."""


def _on_face(h: Tensor, p: Tensor, ridge: float, passive: Tensor) -> tuple[Tensor, Tensor]:
    """The minimizer with all coefficients zero except the passive ones, and the slope there."""
    # Few rows bind. Solve for the largest number of passive rows in any block.
    count = int(passive.sum(-1).max())
    order = passive.to(torch.uint8).argsort(-1, descending=True)[:, :count]
    inner = h.gather(1, order.unsqueeze(-1).expand(-1, -1, h.shape[-1]))
    inner = inner.gather(2, order.unsqueeze(-2).expand(-1, count, -1))
    binding, own = passive.gather(1, order), p.gather(1, order)
    factor = _face(inner, binding)
    solution = _refined(inner, own, ridge, binding, _solve(factor, torch.where(binding, own, 0.0)), factor)
    x = torch.zeros_like(p).scatter_(1, order, solution)
    return x, times(h, x) - p


def _face(h: Tensor, passive: Tensor) -> Tensor:
    """Cholesky factors of the passive rows and columns, with ones on the diagonal elsewhere."""
    both = passive.unsqueeze(-1) & passive.unsqueeze(-2)
    return torch.linalg.cholesky_ex(torch.where(both, h, torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)))[0]


def _refined(h: Tensor, p: Tensor, ridge: float, passive: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """One step of iterative refinement toward the solution without the ridge, where that keeps `x >= 0`."""
    refined = x + _solve(factor, torch.where(passive, p - times(h, x) + ridge * x, 0.0))
    return torch.where((refined >= 0).all(-1, keepdim=True), refined, x)


def _interior_point(h: Tensor, p: Tensor, ridge: float, iterations: int) -> Tensor:
    """Find the same minimizer in a fixed number of iterations; a CPU stops early."""
    gap, rounding = (1e-18, 1e-13) if p.dtype == torch.float64 else (1e-10, 1e-5)
    conflict = (p > 0).any(-1, keepdim=True)
    x, y = torch.ones_like(p), torch.ones_like(p)
    for _ in range(iterations):
        slope = times(h, x) - p
        mean = (x * y).mean(-1, keepdim=True)
        residual = (slope - y).abs().amax(-1, keepdim=True)
        busy = conflict & ((mean > gap) | (residual > rounding * (1.0 + x.amax(-1, keepdim=True))))
        if p.device.type == "cpu" and not busy.any():
            break
        factor, _ = torch.linalg.cholesky_ex(h + torch.diag_embed(y / x))
        # Predictor: the Newton step toward x y = 0. Corrector: toward a common, smaller x y, to second order.
        dx = _solve(factor, -slope)
        dy = -y - y / x * dx
        length = torch.minimum(_longest(x, dx), _longest(y, dy))
        predicted = ((x + length * dx) * (y + length * dy)).mean(-1, keepdim=True)
        shift = (mean * (predicted / mean) ** 3 - dx * dy) / x
        dx = _solve(factor, shift - slope)
        dy = shift - y - y / x * dx
        length = torch.minimum(_longest(x, dx), _longest(y, dy)) * 0.995
        x, y = torch.where(busy, x + length * dx, x), torch.where(busy, y + length * dy, y)

    passive = x > y  # False in a block without conflict, which keeps its start x = y.
    return _refined(h, p, ridge, passive, torch.where(passive, x, 0.0), _face(h, passive))


def _solve(factors: Tensor, vectors: Tensor) -> Tensor:
    # On CUDA, `torch.cholesky_solve` of a batch uses MAGMA with pointers in host memory, which no CUDA graph can hold.
    half = torch.linalg.solve_triangular(factors, vectors.unsqueeze(-1), upper=False)
    return torch.linalg.solve_triangular(factors.mT, half, upper=True).squeeze(-1)


def _longest(x: Tensor, dx: Tensor) -> Tensor:
    """The longest step of at most 1 that keeps `x + step * dx >= 0`, for each block."""
    return torch.where(dx < 0, x / -dx, torch.inf).amin(-1, keepdim=True).clamp(max=1.0)
