# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""What happens to the gradient before an optimizer step, and to the parameters after it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .. import compat
from . import distributed
from .building import Builder
from .config import ProjectionConfig
from .diagnostics import Diagnostics
from .gradient_subspace import GradientSubspace
from .layout import Blocks, Stack
from .precision import LOW_PRECISION, full_precision
from .refreshing import Refresher

if TYPE_CHECKING:
    from .kernels import Launcher


class Step:
    """Projects the steps of the optimizer, one after another.

    Args:
        refresher (`Refresher`): Holds the gradient subspace.
        builder (`Builder`): Holds the activation subspace.
        diagnostics (`Diagnostics`): Receives the figures of every step.

    Attributes:
        masters (`Stack`, *optional*): The float32 copy of parameters of low precision; `None` if there are none.
    """

    def __init__(self, refresher: Refresher, builder: Builder, diagnostics: Diagnostics) -> None:
        self._refresher, self._builder, self._diagnostics = refresher, builder, diagnostics
        self.forget()

    def forget(self) -> None:
        """Forget everything that belongs to the rows or to a step."""
        self.masters: Stack | None = None
        # In a step after a refresh: this process's part of the inner products of the gradient and the rows.
        self._overlaps: Tensor | None = None
        self.last_launcher: Launcher | None = None
        self.forget_parameters()

    def forget_parameters(self) -> None:
        """Forget the copy of the parameters before a step. The copy remains if the step raised an error."""
        self._before: Stack | None = None
        self._remembered = False  # whether the activation subspace will project the current step

    @property
    def device(self) -> torch.device | None:
        """The device that solves small problems. `None` before there is a subspace."""
        if self._refresher.subspace is not None:
            return self._refresher.subspace.blocks.device
        return None if self._builder.subspace is None else self._builder.subspace.device

    # Before the optimizer

    @torch.no_grad()
    def process_gradients(self, optimizer: Optimizer, config: ProjectionConfig, max_grad_norm: float | None) -> None:
        """Process the final gradients of a step: record figures, project them, and add the reference gradient.

        Args:
            optimizer (`Optimizer`): The optimizer that makes the step.
            config (`ProjectionConfig`): The settings.
            max_grad_norm (`float`, *optional*): Clip the mean reference gradient to this norm.
        """
        if self.device is None:
            return
        with full_precision(self.device):
            # Without rows of these parameters, only a step that they do not constrain is processed.
            if config.refreshes and self._refresher.covers_training():
                assert self._refresher.subspace is not None
                self._process_with_rows(self._refresher.subspace, optimizer, config, max_grad_norm)
            if config.uses_activations:
                assert self._builder.subspace is not None
                with self._diagnostics.stopwatch("projection", self._builder.subspace.device):
                    self._builder.subspace.project_gradients()

    def _process_with_rows(
        self, subspace: GradientSubspace, optimizer: Optimizer, config: ProjectionConfig, max_grad_norm: float | None
    ) -> None:
        blocks, fresh = subspace.blocks, self._refresher.fresh
        project = config.constrains and config.projection == "gradient"
        if not (project or fresh):
            return
        with self._diagnostics.stopwatch("projection", blocks.device):
            gradients = [parameter.grad for parameter in blocks.flat_parameters()]
            stack = blocks.stack(gradients)
            if fresh:
                self._overlaps = subspace.overlaps(stack)
                if not config.constrains:
                    self._record_cosines(subspace, *blocks.total(self._overlaps))
            if project:
                missing = [place for place, gradient in enumerate(gradients) if gradient is None]
                if not blocks.are_split_by(missing):
                    missing = []  # a block without any gradient gets no correction
                coefficients = self._solve(subspace, stack, missing)
                for own, correction in zip(blocks.shaped(stack), subspace.corrections(coefficients), strict=True):
                    torch._foreach_add_(own, correction)
                # Parameters without a gradient get no correction. The others of their block meet the constraint alone.
                views = blocks.views(stack)
                for place in missing:
                    views[place].zero_()
            # Added after the projection, which would remove all of it, because it lies in the rows' span.
            factors = self._refresher.factors(config)
            weighted = bool(fresh and any(factors.values()))
            if weighted:
                weights = subspace.mean_weights(fresh, factors) * _clipping(subspace, fresh, max_grad_norm)
                self._diagnostics.record_reference(subspace.length(weights))
                # A fused optimizer may unscale float16 gradients itself. Then they are still scaled here.
                scale = compat.gradient_scale(optimizer)
                weights = weights if scale is None else weights * scale.to(weights.device)
                for group, reference in zip(stack, subspace.rows.combine(weights), strict=True):
                    group.add_(reference)
                    del reference  # before the next group's is computed
            if project or weighted:
                if weighted:
                    _give_gradients(blocks, stack)
                    gradients = [parameter.grad for parameter in blocks.flat_parameters()]
                found = [
                    (distributed.local(gradient), own)
                    for gradient, own in zip(gradients, chain.from_iterable(blocks.shaped(stack)), strict=True)
                    if gradient is not None
                ]
                torch._foreach_copy_([gradient for gradient, _ in found], [own for _, own in found])

    def remember_parameters(self, config: ProjectionConfig, kernels: bool) -> None:
        """Copy the parameters before the step, if the projection needs them.

        Args:
            config (`ProjectionConfig`): The settings.
            kernels (`bool`): Use the Triton kernels if they apply.
        """
        if not config.projects:
            return
        assert self.device is not None
        with full_precision(self.device), self._diagnostics.stopwatch("projection", self.device):
            if config.uses_activations:
                assert self._builder.subspace is not None
                self._builder.subspace.remember()
                self._remembered = True
            if config.constrains and config.projection == "update":
                assert self._refresher.subspace is not None
                self._before = self._snapshot(self._refresher.subspace, kernels)

    def _snapshot(self, subspace: GradientSubspace, kernels: bool) -> Stack:
        launcher = self._launcher(subspace, kernels)
        if launcher is not None:
            return launcher.snapshot()
        blocks = subspace.blocks
        stored = blocks.stack()
        if any(group.dtype in LOW_PRECISION for group in blocks.groups):
            # Parameters of low precision cannot hold a small projected update, so a float32 copy collects it. If the
            # stored parameter is no longer the rounded copy, other code has changed it. Then its value is used.
            masters = stored if self.masters is None else self.masters
            self.masters = [
                torch.where(master.to(group.dtype).float() == now, master, now)
                for master, now, group in zip(masters, stored, blocks.groups, strict=True)
            ]
        return stored

    # Around a step within the step

    def remember_inner(self) -> None:
        """Copy what the activation subspace projects, before a step within the step."""
        if self._remembered:
            assert self._builder.subspace is not None
            self._builder.subspace.remember_inner()

    def project_inner(self) -> None:
        """Project the change since `remember_inner`, with its gain."""
        if self._remembered:
            assert self._builder.subspace is not None
            with full_precision(self._builder.subspace.device):
                self._builder.subspace.project_inner_step()

    # After the optimizer

    def project(self, kernels: bool) -> None:
        """Project the change of the parameters since `remember_parameters`.

        Args:
            kernels (`bool`): Use the Triton kernels if they apply.
        """
        if not self._remembered and self._before is None:
            return
        assert self.device is not None
        with full_precision(self.device), self._diagnostics.stopwatch("projection", self.device):
            activations = self._builder.subspace if self._remembered else None
            if activations is not None:
                activations.project_step()
            if self._before is not None:
                assert self._refresher.subspace is not None
                self._project_update(self._refresher.subspace, self._before, kernels)
                if activations is not None:  # the removed part lay in the complement, up to rounding
                    activations.return_to_complement()
        self.forget_parameters()

    def _project_update(self, subspace: GradientSubspace, before: Stack, kernels: bool) -> None:
        launcher = self._launcher(subspace, kernels)
        if launcher is not None:
            if self._overlaps is not None:
                self._record_cosines(subspace, self._overlaps)
            self._diagnostics.record_projection(*launcher.project(subspace, before))
            return
        blocks = subspace.blocks
        parameters = blocks.local_parameters()
        # The step as a descent direction (before minus after), in the snapshot's memory.
        step = before
        torch._foreach_sub_(list(chain.from_iterable(blocks.shaped(step))), list(chain.from_iterable(parameters)))
        coefficients = self._solve(subspace, step)
        if self.masters is None:
            # Subtracting only the correction keeps parameters the same, to the bit, if nothing conflicts.
            for own, correction in zip(parameters, subspace.corrections(coefficients), strict=True):
                torch._foreach_sub_(own, correction)
                del correction  # before the next group's is computed
            return
        torch._foreach_sub_(self.masters, step)
        masters = blocks.shaped(self.masters)
        for own, master, correction in zip(parameters, masters, subspace.corrections(coefficients), strict=True):
            torch._foreach_sub_(master, correction)
            torch._foreach_copy_(own, master)
            del correction

    # Both

    def _solve(self, subspace: GradientSubspace, stack: Stack, missing: Sequence[int] = ()) -> Tensor:
        """The coefficients of a descent direction's correction, in which the parameters at some places have no part.

        All communication of a step happens here.
        """
        blocks = subspace.blocks
        waiting = [] if self._overlaps is None else [self._overlaps]
        products, total, *overlaps = blocks.total(subspace.directed(stack), blocks.square_length(stack), *waiting)
        if overlaps:
            self._record_cosines(subspace, overlaps[0])
        gram = subspace.gram_without(missing) if missing else None
        coefficients, removed = subspace.coefficients(products, gram)
        self._diagnostics.record_projection(removed.sum(), total)
        return coefficients

    def _record_cosines(self, subspace: GradientSubspace, overlaps: Tensor) -> None:
        self._diagnostics.record_cosines(subspace.cosines(overlaps))
        self._overlaps = None

    def _launcher(self, subspace: GradientSubspace, kernels: bool) -> Launcher | None:
        """The Triton kernels, if they are switched on and can make this step."""
        if not kernels or self.masters is not None or find_spec("triton") is None:
            return None
        from .kernels import launcher

        self.last_launcher = launcher(subspace, self.last_launcher)
        return self.last_launcher


def _give_gradients(blocks: Blocks, stack: Stack) -> None:
    """Give parameters without a gradient one of zeros, if the stack has a part for them.

    This is so in an expert that the training batch skips and the references reach. If neither reaches a parameter, it
    stays without a gradient: with one of zeros, the optimizer would step it by its momentum and weight decay.
    """
    parts = zip(blocks.flat_parameters(), blocks.views(stack), strict=True)
    missing = [(parameter, part) for parameter, part in parts if parameter.grad is None]
    if not missing:
        return  # otherwise the step waits for the device
    reached = torch.stack([part.count_nonzero().to(blocks.device) for _, part in missing])
    (reached,) = blocks.total(reached)  # a shard alone may be zero
    for (parameter, _), count in zip(missing, reached.tolist(), strict=True):
        if count:
            parameter.grad = torch.zeros_like(parameter)


def _clipping(subspace: GradientSubspace, fresh: list[int], max_grad_norm: float | None) -> Tensor | float:
    """The factor that clips the mean reference gradient to a norm, as `clip_grad_norm_` would."""
    if max_grad_norm is None or max_grad_norm <= 0:  # as in transformers' Trainer
        return 1.0
    return (max_grad_norm / (subspace.length(subspace.mean_weights(fresh)) + 1e-6)).clamp(max=1.0)
