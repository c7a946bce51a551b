# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The reference policy of preference training: a frozen copy of the adapter that is trained further."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from ..core import distributed
from ..core.activation_subspace import LEAK
from ..core.projector import Projector

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Matrices:
    """A and B of the adapter in training, and A of its copy."""

    matrix: torch.Tensor
    after: torch.Tensor
    copy: torch.Tensor


class ReferencePolicy:
    """Keeps the copy equal to the adapter while the adapter moves into the null space of a new subspace.

    TRL copies the adapter when a trainer is created. The move then removes a part of the adapter, but not of the copy.
    The two policies would differ before any training. On a 4-bit base TRL also rounds the adapter to bfloat16, after
    the copy. Then the adapter gets its own weights back.

    Args:
        adapter (`str`, *optional*): The copy's name. `None`: there is none.
        projector (`Projector`): The projector of the adapter in training, before the move.
    """

    def __init__(self, adapter: str | None, projector: Projector) -> None:
        self.adapter = adapter
        self._matrices: list[_Matrices] = []
        targets = projector.targets
        if adapter is None or not projector.config.uses_activations:
            return
        distributed.reshard(targets.model)
        targets.forget()  # sharding may have replaced the parameters
        for name, owner, parameter in targets.trained():
            if ".lora_A." not in name:
                continue
            path, _, own = owner.rpartition(".")
            layer: Any = targets.model.get_submodule(path)
            if adapter in layer.lora_A and own in layer.lora_B:
                found = _Matrices(parameter, layer.lora_B[own].weight, layer.lora_A[adapter].weight)
                pairs = [(found.copy, parameter), (layer.lora_B[adapter].weight, found.after)]
                if all(_equal(copy, trained) for copy, trained in pairs):
                    self._matrices.append(found)
                    for copy, trained in pairs:
                        _restore(trained, copy)

    @torch.no_grad()
    def follow(self, *, precomputed: bool) -> bool:
        """Copy the matrices A of the adapter again, if a part of its effect has been removed.

        Args:
            precomputed: Whether the trainer has computed the copy's log probabilities already.

        Returns:
            Whether the copy has changed.

        Raises:
            ValueError: If it has, because they would be those of another policy.
        """
        removed = max(map(_removed, self._matrices), default=0.0)
        if removed <= LEAK:
            return False
        if precomputed:
            raise ValueError(
                f"Up to {removed:.0%} of the adapter's effect in a layer acted on the reference inputs and was "
                "removed, but precompute_ref_log_probs=True has computed the reference policy with it. Set "
                "precompute_ref_log_probs=False, or use the reference sets that the adapter was trained with."
            )
        for own in self._matrices:
            distributed.local(own.copy).copy_(distributed.local(own.matrix))
        logger.warning(
            "The reference policy (adapter %r) is the adapter without that part, so that training starts where both "
            "policies are equal.",
            self.adapter,
        )
        return True


def _equal(copy: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a copy equals its own matrix. The copy may have a lower precision, or the matrix was rounded."""
    copy, own = _whole(copy), _whole(own)
    if copy.shape != own.shape:
        return False
    return torch.equal(copy, own.to(copy.dtype)) or torch.equal(copy.to(torch.bfloat16).float(), own.float())


@torch.no_grad()
def _restore(own: torch.Tensor, copy: torch.Tensor) -> None:
    """Undo the rounding of a matrix of which the copy still has all bits."""
    if own.dtype == copy.dtype and not torch.equal(_whole(own), _whole(copy)):
        distributed.local(own).copy_(distributed.local(copy))


def _removed(own: _Matrices) -> float:
    """The length of the removed part of `B A`, relative to that of `B A`."""
    b, then, now = (_whole(weight).float() for weight in (own.after, own.copy, own.matrix))
    before, removed = torch.linalg.vector_norm(b @ then), torch.linalg.vector_norm(b @ (then - now))
    acts = before > 1e-6 * torch.linalg.vector_norm(b) * torch.linalg.vector_norm(then)
    return float(removed / before) if acts else 0.0  # an orthogonal start acts by rounding alone


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """Gather a parameter of which each process may hold a part. All processes must call this."""
    return distributed.whole(distributed.local(parameter), parameter)
