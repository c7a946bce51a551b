# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The parameters in training: their names, their layout, and the optimizers that step them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from . import distributed
from .config import ProjectionConfig
from .layout import Blocks, refuse_shared_memory
from .precision import LOW_PRECISION
from .targets import Targets


class OtherWeightsError(ValueError):
    """A saved subspace belongs to other weights than those in training."""


def held_by(optimizer: Optimizer) -> set[int]:
    """The `id` of every parameter that an optimizer holds."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


class Parameters:
    """The parameters in training.

    Args:
        targets (`Targets`): What is projected.
    """

    def __init__(self, targets: Targets) -> None:
        self.targets = targets
        # Optimizers of other models, so that their steps need no search. The sets are the parameters that such an
        # optimizer held, and the parameters that were in training.
        self._strangers: weakref.WeakKeyDictionary[Optimizer, tuple[set[int], set[int]]] = weakref.WeakKeyDictionary()

    def by_name(self) -> dict[str, nn.Parameter]:
        """The parameters by name."""
        return {name: parameter for name, _, parameter in self.targets.trained()}

    def layout(self, config: ProjectionConfig) -> Blocks:
        """Group the parameters into blocks, as the settings say.

        Raises:
            ValueError: If none is in training, or if two of them share memory.
        """
        trained = self.targets.trained()
        if not trained:
            raise ValueError(f"There is no parameter to project: {self.targets.untrained}")
        parameters = {name: parameter for name, _, parameter in trained}
        refuse_shared_memory(parameters, self.targets.untied)
        return Blocks(parameters, {name: owner for name, owner, _ in trained}, config.scope, config.slices)

    def same_as(self, others: Mapping[str, Tensor]) -> bool:
        """Whether the others are the same objects under the same names."""
        own = self.by_name()
        return own.keys() == others.keys() and all(own[name] is others[name] for name in own)

    def stepped_by(self, optimizer: Optimizer) -> set[int]:
        """The `id` of every parameter in training that the optimizer holds."""
        owned = held_by(optimizer)
        trained = self._ids()
        if not trained & owned and self._strangers.get(optimizer) != (owned, trained):
            self.targets.forget()  # the optimizer may hold parameters that replaced the known ones
            trained = self._ids()
            if not trained & owned:
                self._strangers[optimizer] = owned, trained
        return trained & owned

    def _ids(self) -> set[int]:
        return {id(parameter) for _, _, parameter in self.targets.trained()}

    def check_frozen(self, optimizer: Optimizer) -> None:
        """Check that the optimizer makes no step with a frozen parameter. It does so if there is a gradient.

        Raises:
            RuntimeError: If it would. Such a step is not projected.
        """
        stepped = {id(parameter): name for name, parameter in self.targets.frozen() if parameter.grad is not None}
        found = next(iter(stepped.keys() & held_by(optimizer)), None) if stepped else None
        if found is not None:
            raise RuntimeError(
                f"The optimizer would step {stepped[found]}, which is frozen (requires_grad=False) but has a "
                "gradient. This step would not be projected. Freeze parameters, or activate another adapter, after "
                "the step and after zero_grad(set_to_none=True)."
            )

    def check_all_stepped_by(self, optimizer: Optimizer) -> None:
        """Check that an optimizer that holds some of the parameters holds all of them.

        Raises:
            RuntimeError: If it does not.
        """
        stepped, trained = self.stepped_by(optimizer), self.by_name()
        if len(stepped) < len(trained):
            absent = next(name for name, parameter in trained.items() if id(parameter) not in stepped)
            pairs = self.targets.config.uses_activations and self.targets.kind == "LoRA"
            together = ", A and B of a layer together," if pairs else ""
            raise RuntimeError(
                f"The optimizer holds only {len(stepped)} of the {len(trained)} {self.targets.kind} parameters in "
                f"training. For example, it does not hold {absent}. Give all of them to one optimizer. Or freeze the "
                f"others (requires_grad_(False)){together} and refresh."
            )

    def upcast(self) -> None:
        """Convert the parameters to float32 if they have lower precision."""
        self.targets.forget()
        for parameter in self.by_name().values():
            if parameter.dtype in LOW_PRECISION:
                parameter.data = parameter.data.float()

    def fingerprint(self) -> dict[str, float]:
        """The norm of every parameter, by name. It distinguishes one run's adapter from another's."""
        parameters = self.by_name()
        parts = map(distributed.local, parameters.values())
        own = [
            torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float32)).float().cpu()
            for part in parts
        ]
        squares = torch.stack(own).square()
        if distributed.are_sharded(parameters.values()):
            (squares,) = distributed.summed([squares.to(distributed.local(next(iter(parameters.values()))).device)])
        return dict(zip(parameters, squares.sqrt().tolist(), strict=True))

    def check_fingerprint(self, saved: Mapping[str, float]) -> None:
        """Compare the result of `fingerprint` with a saved one.

        Raises:
            OtherWeightsError: If they differ.
        """
        # Rounding to bfloat16 changes a norm by less than this.
        for name, norm in self.fingerprint().items():
            if name not in saved:
                raise OtherWeightsError(f"The saved subspace belongs to other weights: they have no parameter {name}.")
            if abs(norm - saved[name]) > 2**-8 * max(norm, saved[name]):
                raise OtherWeightsError(
                    f"The saved subspace belongs to other weights: {name} has the norm {norm:.6g}, but it had the "
                    f"norm {saved[name]:.6g} when the subspace was saved. Restore the weights of the same checkpoint "
                    "first."
                )
