# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""What share of the optimizer's steps a constraint takes away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .places import Place


class Shares:
    """Squared lengths of every tensor's steps, and of what constraints take from them.

    A share is a length removed over a length proposed; of several tensors or steps, the root of the summed squares
    over that of the others.

    Args:
        places: Of the tensors.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = list(places)
        self._proposed: list[Tensor] = []
        self._removed: list[Mapping[str, Tensor]] = []

    def add(self, proposed: Tensor, removed: Mapping[str, Tensor]) -> None:
        """Takes a step's squared lengths, `(pieces,)`, the removed ones by constraint."""
        self._proposed.append(proposed)
        self._removed.append(removed)

    def by(self, group: Callable[[Place], str]) -> dict[str, dict[str, float]]:
        """Over all steps, by constraint and group of tensors."""
        members: dict[str, list[int]] = {}
        for piece, own in enumerate(self._places):
            members.setdefault(group(own), []).append(piece)
        proposed = torch.stack(self._proposed).sum(0)
        return {
            constraint: {
                name: _share(torch.stack([step[constraint] for step in self._removed]).sum(0)[own], proposed[own])
                for name, own in members.items()
            }
            for constraint in self._removed[0]
        }

    def along(self, matrices: str) -> dict[str, list[float]]:
        """Of the matrices `A`, `B`, or `AB` together, by constraint and step."""
        own = [piece for piece, where in enumerate(self._places) if where.matrix in matrices]
        return {
            constraint: [
                _share(removed[constraint][own], proposed[own])
                for removed, proposed in zip(self._removed, self._proposed, strict=True)
            ]
            for constraint in self._removed[0]
        }


def _share(removed: Tensor, proposed: Tensor) -> float:
    # A tensor that does not move, as A in the first step, loses nothing.
    return float((removed.sum() / proposed.sum().clamp(min=torch.finfo(proposed.dtype).tiny)).sqrt())
