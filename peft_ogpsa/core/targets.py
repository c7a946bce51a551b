# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The interface of what a projector projects: the LoRA matrices of an adapter, or a model's own weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from .config import ProjectionConfig
from .stacks import InputMatrix

# What checkpointing, `torch.compile` and FSDP add to the names of parameters.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")


def without_wrappers(name: str) -> str:
    """Return a parameter's name in the model without wrappers. It is the same in all processes and runs."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


class Targets(Protocol):
    """The parameters to project, and their settings."""

    kind: str  # the kind of parameters, for messages
    what: str  # what the optimizer steps, for messages
    settings: str  # the name of the configuration class, for messages
    untrained: str  # that nothing is in training, and the remedy, for messages
    untied: str  # the remedy if two parameters share memory, for messages
    rows_on_host: bool
    names_others: bool  # whether to warn about parameters that are trained and not projected

    @property
    def model(self) -> nn.Module:
        """The model that is passed to loss functions, and whose modules contain the parameters."""

    @property
    def config(self) -> ProjectionConfig:
        """The projection's settings."""

    def trained(self) -> list[tuple[str, str, nn.Parameter]]:
        """Name, owner (the module that it belongs to) and parameter of everything in training."""

    def frozen(self) -> list[tuple[str, nn.Parameter]]:
        """Name and parameter of what would be projected if it were in training."""

    def matrices(self) -> list[InputMatrix]:
        """The matrices that an activation subspace projects; raises a `ValueError` if it cannot work with them."""

    def original(self) -> AbstractContextManager:
        """A context with the model as it was before training."""

    def forget(self) -> None:
        """Forget the known parameters, because others may have replaced them."""

    def check(self) -> None:
        """Raise a `ValueError` if a pass of the model would give no gradients of the parameters."""
