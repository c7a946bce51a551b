# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The share of the optimizer's steps that a constraint removes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .places import Place


class Shares:
    """Squared lengths of every tensor's steps, and of the parts that constraints remove.

    A share is the removed length divided by the proposed length. For several tensors or steps, each length is the root
    of their summed squares.

    Args:
        places: Place of each tensor.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = list(places)
        self._proposed: list[Tensor] = []
        self._removed: list[Mapping[str, Tensor]] = []

    def add(self, proposed: Tensor, removed: Mapping[str, Tensor]) -> None:
        """Add the squared lengths of a step, `(pieces,)`: the proposed ones, and the removed ones by constraint."""
        self._proposed.append(proposed)
        self._removed.append(removed)

    def by(self, group: Callable[[Place], str]) -> dict[str, dict[str, float]]:
        """Return the shares over all steps, by constraint and group of tensors."""
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
        """Return the shares of the matrices `A`, `B`, or `AB` together, by constraint and step."""
        own = [piece for piece, where in enumerate(self._places) if where.matrix in matrices]
        return {
            constraint: [
                _share(removed[constraint][own], proposed[own])
                for removed, proposed in zip(self._removed, self._proposed, strict=True)
            ]
            for constraint in self._removed[0]
        }


def _share(removed: Tensor, proposed: Tensor) -> float:
    # A tensor that does not move, such as A in the first step, loses nothing.
    return float((removed.sum() / proposed.sum().clamp(min=torch.finfo(proposed.dtype).tiny)).sqrt())
