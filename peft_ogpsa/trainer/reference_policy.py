# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The reference policy of preference training: a frozen copy of the adapter that is trained further."""

from __future__ import annotations

import logging

import torch

from ..core import distributed
from ..core.activation_subspace import LEAK
from ..core.projector import Projector
from ..core.stacks import InputMatrix

logger = logging.getLogger(__name__)


class ReferencePolicy:
    """Keeps the copy equal to the adapter while the adapter moves into the null space of a new subspace.

    TRL copies the adapter when a trainer is created. What the move then removes from the adapter alone would be a
    difference of the two policies that no training has made.

    Args:
        adapter (`str`, *optional*): The copy's name. `None`: there is none.
        projector (`Projector`): The projector of the adapter in training, before the move.
    """

    def __init__(self, adapter: str | None, projector: Projector) -> None:
        self.adapter = adapter
        self._copies: list[tuple[InputMatrix, torch.nn.Parameter]] = []
        if adapter is None or not projector.config.uses_activations:
            return
        projector.targets.forget()  # sharding may have replaced the parameters
        for matrix in projector.targets.matrices():
            of_layer = [getattr(matrix.module, name, {}) for name in ("lora_A", "lora_B")]
            if matrix.after is None or not all(adapter in own for own in of_layer):
                continue
            a, b = (own[adapter].weight for own in of_layer)
            if _equal(a, matrix.parameter) and _equal(b, matrix.after):
                self._copies.append((matrix, a))

    @torch.no_grad()
    def follow(self, *, precomputed: bool) -> None:
        """Copy the matrices A of the adapter again, if a part of its effect has been removed.

        Args:
            precomputed: Whether the trainer has computed the copy's log probabilities already.

        Raises:
            ValueError: If it has, because they would be those of another policy.
        """
        removed = max((_removed(matrix, copy) for matrix, copy in self._copies), default=0.0)
        if removed <= LEAK:
            return
        if precomputed:
            raise ValueError(
                f"Up to {removed:.0%} of the adapter's effect in a layer acted on the reference inputs and was "
                "removed, but precompute_ref_log_probs=True has computed the reference policy with it. Set "
                "precompute_ref_log_probs=False, or use the reference sets that the adapter was trained with."
            )
        for matrix, copy in self._copies:
            distributed.local(copy).copy_(distributed.local(matrix.parameter))
        logger.warning(
            "The reference policy (adapter %r) is the adapter without that part, so that training starts where both "
            "policies are equal.",
            self.adapter,
        )


def _equal(copy: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a copy, which may have a lower precision, equals its own matrix."""
    copy, own = _whole(copy), _whole(own)
    return copy.shape == own.shape and torch.equal(copy, own.to(copy.dtype))


def _removed(matrix: InputMatrix, copy: torch.Tensor) -> float:
    """The length of the removed part of `B A`, relative to that of `B A`."""
    assert matrix.after is not None
    b, then, now = (_whole(own).float() for own in (matrix.after, copy, matrix.parameter))
    before = torch.linalg.vector_norm(b @ then)
    return float(torch.linalg.vector_norm(b @ (then - now)) / before) if before else 0.0


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """Gather a parameter of which each process may hold a part. All processes must call this."""
    return distributed.whole(distributed.local(parameter), parameter)
