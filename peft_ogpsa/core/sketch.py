# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The leading directions of a stream of vectors, in memory proportional to their number times the width.

This is a randomized range finder. It does not store the second moment `C = sum w x x^T`, but only `Y = C W`. The
matrix `W` has a few more columns than the number of wanted directions. The Nystroem approximation `Y (W^T Y)^+ Y^T`
then gives the directions (Tropp, Yurtsever, Udell, Cevher 2017, arXiv 1706.05736). With a random `W` it misses part of
what the best directions hold if the spectrum falls slowly, as that of activations does. So `W` is turned first: it is
set to the orthonormalized `Y` of a part of the stream. This is a step of subspace iteration (Halko, Martinsson, Tropp
2011, arXiv 0909.4061).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg import small_dtype

OVERSAMPLING = 16
"""Additional columns beyond the number of wanted directions."""

_NOISE = 1e-6
"""Directions with less energy than this, relative to the strongest, are rounding errors of float32 sums."""


class Sketch:
    """The second moment of weighted vectors.

    It is stored in full if that takes at most twice the memory, `2 columns >= width`. The directions are then exact.

    Args:
        width (`int`): Width of the vectors.
        rank (`int`): Maximum number of directions that will be requested.
        device (`torch.device`): Device of the sketch.
        seed (`int`): Seed of the random matrix.

    Attributes:
        exact (`bool`): Whether the second moment is stored in full.
        energy (`Tensor`): Scalar: the trace of the second moment, which is the weighted sum of the vectors' squared
            lengths.
        vectors (`Tensor`): Scalar: the number of vectors.
    """

    def __init__(self, width: int, rank: int, device: torch.device, seed: int = 0) -> None:
        columns = min(rank + OVERSAMPLING, width)
        self._test: Tensor | None = None
        if 2 * columns < width:
            # Drawn on the CPU, so that every device has the same matrix.
            generator = torch.Generator().manual_seed(seed)
            self._test = torch.randn(width, columns, generator=generator, dtype=torch.float32).to(device)
        self.exact = self._test is None
        double = small_dtype(device)
        # A full second moment is small enough for the wider dtype, in which rounding creates no directions.
        shape, dtype = ((width, width), double) if self.exact else ((width, columns), torch.float32)
        self._image = torch.zeros(shape, dtype=dtype, device=device)
        self.energy = torch.zeros((), dtype=double, device=device)
        self.vectors = torch.zeros((), dtype=double, device=device)
        self._rank = rank

    def add(self, vectors: Tensor, weight: float = 1.0) -> None:
        """Add `(n, width)` vectors of any dtype, each with the same weight."""
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = vectors.float()
            images = vectors if self._test is None else vectors @ self._test
            self._image.add_(vectors.T @ images, alpha=weight)
        self.vectors += len(vectors)
        self.energy += vectors.square().sum(dtype=self.energy.dtype) * weight

    def parts(self) -> list[Tensor]:
        """The stored tensors. To sum them over processes, change them in place."""
        return [self._image, self.energy, self.vectors]

    def turn(self) -> None:
        """Start over with a test matrix that is turned toward the vectors seen so far."""
        if self._test is not None and bool(self.energy > 0):
            self._test = torch.linalg.qr(self._image)[0]
        for own in self.parts():
            own.zero_()

    def leading(self) -> tuple[Tensor, Tensor]:
        """The leading directions, strongest first.

        Returns:
            Their energies, `(k,)`, and orthonormal columns, `(width, k)`, both float64. `k` is at most `rank`, and
            less if the vectors span less. The energy of a direction is the second moment along it, which the range
            finder underestimates a little.
        """
        if self._rank == 0:  # an input of width 1
            return torch.zeros(0, dtype=torch.float64), torch.zeros(len(self._image), 0, dtype=torch.float64)
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
