# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Attaches a projector to a model, and finds it: the only place that knows where a model stores it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .projector import Projector

# In `__dict__`, so that nn.Module treats it neither as a submodule nor as state. The projector is freed with
# its model. It keeps its targets alive, and with them the tuner of an adapter. PEFT discards the tuner when it only
# injects (`inject_adapter_in_model`, transformers' `add_adapter`).
_ATTRIBUTE = "_ogpsa_projector"


class _Attachment:
    """A model's reference to its projector.

    Args:
        projector: The projector; `None` in a copy that has none.
        copied: Whether a copy of the model gets a projector of its own. It never shares this one.
    """

    def __init__(self, projector: Projector | None = None, copied: bool = False) -> None:
        self.projector = projector
        self.copied = copied

    def __reduce__(self) -> tuple:
        return _Attachment, ((self.projector, True) if self.copied else ())


def attach(model: nn.Module, projector: Projector, *, copied: bool = False) -> None:
    """Attach a projector to a model. It replaces the previous one.

    Args:
        model (`nn.Module`): The model.
        projector (`Projector`): The projector.
        copied (`bool`): Whether a copy of the model gets a projector of its own.
    """
    detach(model)
    model.__dict__[_ATTRIBUTE] = _Attachment(projector, copied)


def detach(model: nn.Module) -> None:
    """Undo `attach` and close the projector. The weights stay as they are."""
    projector = attached_to(model)
    model.__dict__.pop(_ATTRIBUTE, None)
    if projector is not None:
        projector.close()


def attached_to(module: nn.Module) -> Projector | None:
    """The projector of this module itself. Modules inside it are not searched."""
    held = module.__dict__.get(_ATTRIBUTE)
    return None if held is None else held.projector


def projectors_in(model: nn.Module) -> Iterator[Projector]:
    """The projectors of a model and of the modules inside it, from the outside in."""
    for module in model.modules():
        if (projector := attached_to(module)) is not None:
            yield projector


def projector_of(model: nn.Module) -> Projector:
    """The projector of a model with an OGPSA adapter, or of a model that was given to `attach`.

    Args:
        model (`nn.Module`): A `PeftModel`, an `OGPSAModel`, a base model with an injected adapter, a model given to
            `attach`, or any module around one of them (compiled, distributed).

    Raises:
        ValueError: If the model has no projector.
    """
    for projector in projectors_in(model):
        return projector
    raise ValueError(
        f"This {type(model).__name__} has no OGPSA adapter. Add one with get_peft_model(model, OGPSAConfig(...)). For "
        "a plain LoRA adapter, use OGPSACallback(..., config=OGPSAConfig(...)) or attach(model, OGPSAConfig(...)). To "
        "train the model's own weights, use OGPSACallback(..., config=FullParameterConfig(...)) or attach(model, "
        "FullParameterConfig(...))."
    )
