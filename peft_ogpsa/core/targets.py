# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""What a projector projects: the LoRA matrices of an adapter, or a model's own weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from .activation_subspace import InputMatrix
from .config import ProjectionConfig


class Targets(Protocol):
    """The parameters to project, and how."""

    kind: str  # of parameters, as messages call them
    what: str  # the optimizer steps
    settings: str  # the class of the configuration
    rows_on_host: bool
    names_others: bool  # whether what is trained and not projected may surprise the user

    @property
    def model(self) -> nn.Module:
        """What loss functions are given, and whose modules the parameters are in."""

    @property
    def config(self) -> ProjectionConfig:
        """The projection's settings."""

    def trained(self) -> list[tuple[str, str, nn.Parameter]]:
        """Name, owner (the module that it belongs to) and parameter of everything in training."""

    def matrices(self) -> list[InputMatrix]:
        """What an activation subspace projects; raises a `ValueError` where it could not hold."""

    def original(self) -> AbstractContextManager:
        """The model as it was before training."""

    def forget(self) -> None:
        """The parameters may have been replaced by others."""

    def check(self) -> None:
        """Raises a `ValueError` where a pass of the model would give no gradients of the parameters."""
