# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The steps that optimizers take under each projection rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from peft_ogpsa.core.gradient_subspace import GradientSubspace
from peft_ogpsa.core.layout import Blocks, Stack


class Rule(NamedTuple):
    """A projection rule: what is projected (`gradient`, `update`, or `""` for nothing), and the constraint."""

    projection: str
    constraint: str


RULES = {
    "no projection": Rule("", ""),
    "orthogonal, gradient": Rule("gradient", "orthogonal"),
    "cone, gradient": Rule("gradient", "cone"),
    "orthogonal, update": Rule("update", "orthogonal"),
    "cone, update": Rule("update", "cone"),
}

OPTIMIZERS: dict[str, Callable[[list[Tensor], float], Optimizer]] = {
    "AdamW": lambda parameters, rate: AdamW(parameters, lr=rate, weight_decay=0.0),
    "SGD with momentum": lambda parameters, rate: SGD(parameters, lr=rate, momentum=0.9),
    "SGD": lambda parameters, rate: SGD(parameters, lr=rate),
}


class Follower:
    """An optimizer that gets the gradients of a training run, and steps from the parameters of that run.

    It works on float64 copies. If a step breaks a constraint, the optimizer is then the cause, and not rounding.
    """

    def __init__(self, make: Callable[[list[Tensor], float], Optimizer], rate: float, like: Stack) -> None:
        self._parameters = [part.to(torch.float64, copy=True).requires_grad_() for part in like]
        self._optimizer = make(self._parameters, rate)

    def change(self, at: Stack, gradient: Stack) -> Stack:
        """Take a step from `at`, and return the change."""
        for parameter, own, slope in zip(self._parameters, at, gradient, strict=True):
            parameter.data.copy_(own)
            parameter.grad = slope.double()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return [parameter.detach() - own for parameter, own in zip(self._parameters, at, strict=True)]


class Rules:
    """All rules under all optimizers, side by side, on the gradients of one run.

    Args:
        blocks: The trained parameters.
        rows: Number of rows per rule.
        rate: The learning rate.
    """

    def __init__(self, blocks: Blocks, rows: int, rate: float) -> None:
        self._blocks = blocks
        self._slots = list(range(rows))
        self._subspaces = {name: GradientSubspace(blocks, rows, name) for name in ("orthogonal", "cone")}
        # Rules that project the update do not change the optimizer's gradients, so they share one optimizer.
        self._followers = {
            (optimizer, constraint): Follower(make, rate, blocks.zeros())
            for optimizer, make in OPTIMIZERS.items()
            for constraint in ("", "orthogonal", "cone")
        }

    def changes(self, at: Stack, gradient: Stack, rows: Stack) -> Iterator[tuple[str, str, Stack]]:
        """Take a step from `at` under every rule, and yield the optimizer, the rule and the change.

        Consume the whole iterator. Otherwise some optimizers miss the step.

        Args:
            at: The parameters.
            gradient: The training gradient at these parameters.
            rows: The reference gradients at these parameters, `(pieces, rows, numel)` per group.
        """
        for subspace in self._subspaces.values():
            slots = subspace.rows.open(self._slots)
            for piece, view in enumerate(self._blocks.views(rows)):
                slots.add(piece, view)
            subspace.commit(self._slots, [str(slot) for slot in self._slots])
        gradients = {"": gradient} | {name: self._projected(gradient, name) for name in self._subspaces}
        for optimizer in OPTIMIZERS:
            changes = {name: self._followers[optimizer, name].change(at, own) for name, own in gradients.items()}
            for name, rule in RULES.items():
                if rule.projection == "update":
                    descent = self._projected([-part for part in changes[""]], rule.constraint)
                    yield optimizer, name, [-part for part in descent]
                else:
                    yield optimizer, name, changes[rule.constraint]

    def _projected(self, descent: Stack, constraint: str) -> Stack:
        """Project a descent direction so that it meets the constraint."""
        subspace = self._subspaces[constraint]
        coefficients, _ = subspace.coefficients(subspace.directed([part.float() for part in descent]))
        pieces = [piece for group in subspace.corrections(coefficients) for piece in group]
        return [part + own for part, own in zip(descent, self._blocks.stack(pieces), strict=True)]
