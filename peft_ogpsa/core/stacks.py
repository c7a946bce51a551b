# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Matrices of like layers and the directions of their inputs, stacked, so that a step takes a few batched products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import distributed
from .linalg import small_dtype


@dataclass(frozen=True)
class InputMatrix:
    """A matrix that is applied to a layer's input: LoRA's A, or the weight of a linear layer.

    Attributes:
        name: Name of the parameter.
        layer: Name of the layer.
        module: The layer. Its first argument is the input.
        holder: The module that has the matrix: LoRA's `lora_A[adapter]`, or the layer itself.
        parameter: The matrix, `(out, width)`.
        after: LoRA's B, `(features, out)`; `None` for a full weight.
    """

    name: str
    layer: str
    module: nn.Module
    holder: nn.Module
    parameter: nn.Parameter
    after: nn.Parameter | None = None


@dataclass(frozen=True)
class InputStack:
    """Inputs of one kind of layer, with their matrices stacked.

    Attributes:
        kind: The layers' names without the part that differs between the model's blocks: `q_proj+k_proj+v_proj`.
        inputs: Indices of the inputs in the subspace.
        matrices: The matrices of each input.
        basis: `(inputs, width, k)`, in the dtype in which the directions are stored. Inputs with fewer directions are
            padded with columns of zeros.
        inverse: Pseudoinverse of the Gram matrices, `(inputs, k, k)`, if rounding has made the basis oblique; else
            `None`.
        gain: The factor of the steps, `(inputs, 1, 1)`; 1 for full weights.
    """

    kind: str
    inputs: list[int]
    matrices: list[list[InputMatrix]]
    basis: Tensor
    inverse: Tensor | None
    gain: Tensor

    def parameters(self) -> list[nn.Parameter]:
        """The matrices of all inputs, in the order of the inputs."""
        return [matrix.parameter for own in self.matrices for matrix in own]

    def copies(self, tensors: Sequence[Tensor]) -> Tensor:
        """Stack this process's part of tensors like `parameters()`: `(inputs, rows, width)`, float32 or wider."""
        own = [distributed.local(tensor) for tensor in tensors]
        shape = (len(self.inputs), sum(len(t) for t in own) // len(self.inputs), self.basis.shape[1])
        stacked = own[0].new_empty(shape, dtype=torch.promote_types(torch.float32, own[0].dtype))
        torch._foreach_copy_(self.views(stacked), own)
        return stacked

    def views(self, stacked: Tensor) -> list[Tensor]:
        """Split a stack into its parts, in the order of `parameters()`."""
        sizes = [len(distributed.local(matrix.parameter)) for matrix in self.matrices[0]]
        return [part for own in stacked for part in own.split(sizes)]

    def write(self, stacked: Tensor) -> None:
        """Put this process's part of a stack back into the matrices."""
        torch._foreach_copy_([distributed.local(own) for own in self.parameters()], self.views(stacked))

    def along(self, stacked: Tensor, place: int | slice = slice(None)) -> Tensor:
        """Coordinates of every row along the directions, `(inputs, rows, k)`: `M U (U^T U)^-1`."""
        places = slice(place, place + 1) if isinstance(place, int) else place
        along = torch.bmm(stacked, self.basis[places].to(stacked.dtype))
        return along if self.inverse is None else torch.bmm(along, self.inverse[places].to(stacked.dtype))

    def spread(self, along: Tensor, place: int | slice = slice(None)) -> Tensor:
        """Compute rows from their coordinates: `(inputs, rows, width)`."""
        places = slice(place, place + 1) if isinstance(place, int) else place
        return torch.bmm(along, self.basis[places].to(along.dtype).mT)

    def inside(self, stacked: Tensor) -> Tensor:
        """The part of every row that lies in its subspace."""
        return self.spread(self.along(stacked))


def inverse_of(basis: Tensor) -> Tensor | None:
    """The pseudoinverse of the Gram matrices of rounded directions; `None` if the directions are not rounded."""
    if basis.dtype == torch.float32:
        return None
    exact = basis.to(small_dtype(basis.device))
    return torch.linalg.pinv(exact.mT @ exact, rtol=1e-6, hermitian=True).float()
