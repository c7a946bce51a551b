# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Cosines of stacked vectors with stacked rows, in float64.

A change of the parameters whose cosine with a reference gradient is above 0 raises that reference loss to first order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_ogpsa.core.layout import Stack


def products(rows: Stack, vectors: Stack) -> Tensor:
    """Return the inner products of each tensor's vector with its rows: `(pieces, rows)`."""
    parts = zip(rows, vectors, strict=True)
    return torch.cat([torch.einsum("prd,pd->pr", own.double(), vector.double()) for own, vector in parts])


def squares(stack: Stack) -> Tensor:
    """Return the squared lengths in every tensor: `(pieces,)` for vectors, `(pieces, rows)` for rows."""
    return torch.cat([torch.linalg.vecdot(part.double(), part.double()) for part in stack])


def cosine(inner: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute cosines from inner products and squared lengths. A cosine with a zero vector is NaN."""
    return inner / (left * right).sqrt()


def whole(rows: Stack, vectors: Stack) -> Tensor:
    """Return the cosine of the vectors with each row, over all tensors together: `(rows,)`."""
    return cosine(products(rows, vectors).sum(0), squares(rows).sum(0), squares(vectors).sum())


def worst(rows: Stack, vectors: Stack) -> float:
    """Return the largest cosine of one tensor's vector with one of its rows. Zero tensors do not count."""
    cosines = cosine(products(rows, vectors), squares(rows), squares(vectors).unsqueeze(1))
    return float(cosines[cosines.isfinite()].max())


def plain(cosines: Tensor) -> list[float | None]:
    """Convert cosines to a list for JSON, with `None` for NaN, which JSON does not have."""
    return [value if value == value else None for value in cosines.tolist()]
