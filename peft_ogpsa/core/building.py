# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Builds the activation subspace from the reference sets."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from . import distributed, inputs
from .activation_subspace import LEAK, ActivationSubspace, most_directions
from .config import ProjectionConfig
from .diagnostics import Diagnostics
from .gradients import LossFn
from .isolation import isolated_eval
from .parameters import Parameters
from .passes import check_alike, sized
from .precision import full_precision
from .rows import DTYPES

logger = logging.getLogger(__name__)

INPUTS = ("subspace_rank", "subspace_energy", "tokens", "rows_dtype")
"""The settings that an activation subspace is built with."""


class Builder:
    """Builds the activation subspace and holds it.

    Args:
        parameters (`Parameters`): The parameters in training.
        diagnostics (`Diagnostics`): Receives the figures of the subspace.

    Attributes:
        subspace (`ActivationSubspace`, *optional*): `None` before it is built.
    """

    def __init__(self, parameters: Parameters, diagnostics: Diagnostics) -> None:
        self.subspace: ActivationSubspace | None = None
        self._parameters, self._diagnostics = parameters, diagnostics
        self._built_with: tuple = ()  # the settings that the subspace depends on
        self._built_for: dict[str, nn.Parameter] = {}  # the parameters in training when it was built
        # When the base was last checked: the adapters that were active, and everything that was in training.
        self._checked: tuple[set[tuple[str, ...]], set[int]] | None = None
        self._all: list[weakref.ref[nn.Parameter]] = []  # the model's parameters, those of the base included

    def parameters(self) -> dict[str, Tensor]:
        """The parameters that the subspace was built for, by name. Empty before there is a subspace."""
        return {} if self.subspace is None else dict(self._built_for)

    def lacks(self, config: ProjectionConfig) -> bool:
        """Whether the subspace must be built: it is missing, or made for other parameters or settings."""
        if not config.uses_activations:
            return False
        if self.subspace is None or self._built_with != _inputs_of(config) or not self.subspace.in_place():
            return True
        return not self._parameters.same_as(self._built_for)

    def memory(self) -> tuple[int, int]:
        """Bytes that the subspace always uses, and the additional bytes of an optimizer step."""
        return (0, 0) if self.subspace is None else (self.subspace.bytes(), self.subspace.step_bytes())

    def build(
        self,
        config: ProjectionConfig,
        batches: inputs.Batches,
        forward: LossFn,
        model: nn.Module,
        progress: Callable[[list], Iterable],
    ) -> None:
        """Build the subspace, store it, and move the adapter into its complement. See `Projector.refresh`."""
        targets = self._parameters.targets
        distributed.reshard(targets.model)
        targets.forget()
        targets.check()
        matrices = targets.matrices()
        if not matrices:
            self._parameters.layout(config)  # raises a better error if nothing at all is in training
            raise ValueError(
                f"subspace={config.subspace!r} projects LoRA matrices A or weights of linear layers, but none of "
                "them is in training. Train at least one of them, or set subspace='gradients'."
            )
        device = distributed.local(matrices[0].parameter).device
        check_alike(sized(batches), device)
        with self._diagnostics.stopwatch("build", device), isolated_eval(model), targets.original():
            found = inputs.find(
                {matrix.layer: matrix.module for matrix in matrices},
                forward,
                model,
                batches,
                most=most_directions,
                rank=config.subspace_rank,
                energy=config.subspace_energy,
                tokens=config.tokens,
                progress=progress,
            )
        distributed.reshard(targets.model)
        with full_precision(device):
            subspace = ActivationSubspace(matrices, found, DTYPES[config.rows_dtype])
            _enter(subspace)
            self.hold(subspace, config)
            self._diagnostics.record_energies({own.name: own.held_out for own in subspace.kinds()})

    def enter_again(self, config: ProjectionConfig) -> None:
        """Move the adapter into the complement again, if its weights have left it without a projection.

        Raises:
            ValueError: See `ActivationSubspace.enter`.
        """
        if not config.uses_activations or self.lacks(config) or not self.leaks():
            return
        assert self.subspace is not None
        with full_precision(self.subspace.device):
            _enter(self.subspace)

    def leaks(self) -> bool:
        """Whether more of the adapter acts in the subspace than rounding explains. Waits for the device."""
        if self.subspace is None:
            return False
        with full_precision(self.subspace.device):
            return self.subspace.leak() > LEAK

    def check_base(self, config: ProjectionConfig) -> None:
        """Check the base again if other adapters have become active, or other parameters are in training.

        Raises:
            ValueError: See `check_original`.
        """
        if self.subspace is None or not config.uses_activations:
            return
        now = self.subspace.active(), self._in_training()
        if now != self._checked:
            self.check_original()
            self._checked = now

    def _in_training(self) -> set[int]:
        """The `id` of every parameter of the model in training, whichever optimizer holds it."""
        # Walking through a large model takes milliseconds, so its parameters are kept until one of them is gone.
        own = [reference() for reference in self._all]
        if not own or any(parameter is None for parameter in own):
            model = self._parameters.targets.model
            distributed.reshard(model)
            self._all = [weakref.ref(parameter) for parameter in model.parameters()]
            own = [reference() for reference in self._all]
        return {id(parameter) for parameter in own if parameter is not None and parameter.requires_grad}

    def check_original(self) -> None:
        """Check that the model without the adapter in training is still the base.

        Raises:
            ValueError: If the base itself is in training, or another adapter is active.
        """
        if self.subspace is not None:
            with self._parameters.targets.original():
                pass

    def hold(self, subspace: ActivationSubspace, config: ProjectionConfig) -> None:
        """Store a subspace. It replaces the previous one."""
        self.subspace, self._built_with = subspace, _inputs_of(config)
        self._built_for, self._checked, self._all = self._parameters.by_name(), None, []
        self._diagnostics.removed_by_kind = subspace.removed

    def drop(self) -> None:
        """Forget the subspace."""
        self.subspace, self._built_for = None, {}
        self._diagnostics.removed_by_kind = dict

    def restored(
        self, config: ProjectionConfig, directions: Mapping[str, Tensor], rest: Sequence[Mapping[str, Any]] | None
    ) -> ActivationSubspace | None:
        """Rebuild the subspace from the output of its `state_dict`, without storing it.

        Raises:
            ValueError: If the state does not fit.
        """
        if rest is None:
            return None
        matrices = self._parameters.targets.matrices()
        return ActivationSubspace.restored(matrices, directions, rest, DTYPES[config.rows_dtype])


def _enter(subspace: ActivationSubspace) -> None:
    """Move the adapter into the null space, and log how much of it was removed."""
    leak = subspace.enter()
    if leak > LEAK:
        logger.warning(
            "Not all of the adapter was in the null space of the reference sets. Up to %.1f %% of its effect in a "
            "layer acted on the reference inputs. This part was removed.",
            100 * leak,
        )
    else:
        logger.info(
            "At most %.2g %% of the adapter's effect in a layer was in the activation subspace. This part was "
            "removed.",
            100 * leak,
        )


def _inputs_of(config: ProjectionConfig) -> tuple:
    return tuple(getattr(config, name) for name in INPUTS)
