# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""How fast reference gradients age: the gradient of an example, now and some steps later."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_ogpsa.core.layout import Stack

from .angles import cosine, squares
from .places import Place

MATRICES = ("A", "B")


class Ages:
    """Compare the gradients at a few anchor steps with those at all later steps.

    Args:
        places: Place of each tensor.
        owners: Reference set of each example.
        anchors: Steps whose gradients are kept for comparison.

    Attributes:
        cosines: By matrix and anchor: for every later step, one cosine per example, over all matrices of the kind.
        others: By matrix: for every step, the mean cosine of two examples of one set. It shows how well the row of one
            example stands for other examples.
        lengths: By matrix: for every step, the mean length of an example's gradient.
    """

    def __init__(self, places: Sequence[Place], owners: Sequence[str], anchors: Sequence[int]) -> None:
        self._members = {m: [i for i, place in enumerate(places) if place.matrix == m] for m in MATRICES}
        self._pairs = torch.tensor([[a == b and i != j for j, b in enumerate(owners)] for i, a in enumerate(owners)])
        self._kept: dict[int, Stack] = {}
        self.cosines: dict[str, dict[int, list[Tensor]]] = {m: {anchor: [] for anchor in anchors} for m in MATRICES}
        self.others: dict[str, list[Tensor]] = {m: [] for m in MATRICES}
        self.lengths: dict[str, list[float]] = {m: [] for m in MATRICES}

    def add(self, step: int, gradients: Stack) -> None:
        """Add the gradients of a step, `(pieces, examples, numel)` per group. Do not change the stack afterwards."""
        lengths = squares(gradients)
        products = torch.cat([part.double() @ part.double().mT for part in gradients])
        for matrix, own in self._members.items():
            total = lengths[own].sum(0)
            self.lengths[matrix].append(float(total.sqrt().mean()))
            between = cosine(products[own].sum(0), total.unsqueeze(0), total.unsqueeze(1))
            self.others[matrix].append(between[self._pairs].mean())
        for anchor, then in self._kept.items():
            inner = torch.cat(
                [torch.linalg.vecdot(a.double(), b.double()) for a, b in zip(then, gradients, strict=True)]
            )
            before = squares(then)
            for matrix, own in self._members.items():
                found = cosine(inner[own].sum(0), before[own].sum(0), lengths[own].sum(0))
                self.cosines[matrix][anchor].append(found)
        if step in self.cosines["A"]:
            self._kept[step] = gradients
