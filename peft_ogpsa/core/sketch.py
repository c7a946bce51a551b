# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The leading directions of a stream of vectors, in memory of their number times the width.

A randomised range finder: of the second moment `C = sum w x x^T` only `Y = C W` is held, with a matrix `W` of a few
more columns than directions are wanted. The Nystroem approximation `Y (W^T Y)^+ Y^T` then gives the directions (Tropp,
Yurtsever, Udell, Cevher 2017, arXiv 1706.05736). With a random `W` it misses part of what the best directions hold
where the spectrum falls slowly, as that of activations does. So `W` is first turned: to `Y` of a part of the stream,
orthonormalised, which is a step of subspace iteration (Halko, Martinsson, Tropp 2011, arXiv 0909.4061).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg import small_dtype

OVERSAMPLING = 16
"""Columns beyond the directions that are wanted."""

_NOISE = 1e-6
"""Directions with less energy than this, relative to the strongest, are rounding errors of float32 sums."""


class Sketch:
    """The second moment of weighted vectors.

    It is held whole where that takes at most twice the memory, `2 columns >= width`; the directions are then exact.

    Args:
        width (`int`): Of the vectors.
        rank (`int`): Most directions that will be asked for.
        device (`torch.device`): Where it is.
        seed (`int`): Of the random matrix.

    Attributes:
        exact (`bool`): Whether it is held whole.
        energy (`Tensor`): Scalar: the trace of the second moment, which is the weighted sum of the vectors'
            squared lengths.
    """

    def __init__(self, width: int, rank: int, device: torch.device, seed: int = 0) -> None:
        columns = min(rank + OVERSAMPLING, width)
        self._test: Tensor | None = None
        if 2 * columns < width:
            # Drawn on the CPU, so that every device has the same.
            generator = torch.Generator().manual_seed(seed)
            self._test = torch.randn(width, columns, generator=generator).to(device)
        self.exact = self._test is None
        double = small_dtype(device)
        # Sums of a whole second moment are small enough for the wider type, in which rounding makes no directions.
        shape, dtype = ((width, width), double) if self.exact else ((width, columns), torch.float32)
        self._image = torch.zeros(shape, dtype=dtype, device=device)
        self.energy = torch.zeros((), dtype=double, device=device)
        self._rank = rank

    def add(self, vectors: Tensor, weight: float = 1.0) -> None:
        """Adds `(n, width)` vectors of any dtype, each with the same weight."""
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = vectors.float()
            images = vectors if self._test is None else vectors @ self._test
            self._image.add_(vectors.T @ images, alpha=weight)
        self.energy += vectors.square().sum(dtype=self.energy.dtype) * weight

    def parts(self) -> list[Tensor]:
        """What is held, for sums over processes: change it in place."""
        return [self._image, self.energy]

    def turn(self) -> None:
        """Begins anew, with a test matrix that is turned towards what has been seen."""
        if self._test is not None and bool(self.energy > 0):
            self._test = torch.linalg.qr(self._image)[0]
        self._image.zero_()
        self.energy.zero_()

    def leading(self) -> tuple[Tensor, Tensor]:
        """The leading directions, strongest first.

        Returns:
            Their energies, `(k,)`, and orthonormal columns, `(width, k)`, both float64; `k` is at most `rank`, and
            less where the vectors span less. A direction's energy is the second moment along it, which the range
            finder underestimates a little.
        """
        # mps has no float64.
        image = (self._image.cpu() if self.energy.dtype == torch.float32 else self._image).double()
        if self._test is None:
            values, vectors = torch.linalg.eigh((image + image.T) / 2)
        else:
            test = self._test.to(image.device).double()
            core = test.T @ image
            weights, axes = torch.linalg.eigh((core + core.T) / 2)
            weights, axes = weights[kept := weights > _NOISE * weights[-1]], axes[:, kept]
            basis, triangle = torch.linalg.qr(image)
            half = triangle @ axes * weights.rsqrt()
            values, turned = torch.linalg.eigh(half @ half.T)
            vectors = basis @ turned
        values, vectors = values.flip(0)[: self._rank], vectors.flip(1)[:, : self._rank]
        real = values > _NOISE * values[0].clamp(min=torch.finfo(torch.float64).tiny)
        return values[real], vectors[:, real]
