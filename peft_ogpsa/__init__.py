# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Safety fine-tuning with LoRA and with less of the alignment tax."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import compat

if TYPE_CHECKING:
    from .core.full_parameter import FullParameterConfig
    from .references.loader import ReferenceLoader
    from .references.losses import reference_loss
    from .references.refusals import refusals_from_prompts
    from .references.sets import ReferenceSet
    from .sharing.card import save_card
    from .sharing.hub import push_adapter
    from .trainer.callback import OGPSACallback
    from .tuner.attaching import attach
    from .tuner.config import OGPSAConfig
    from .tuner.merge import merge_adapter
    from .tuner.model import OGPSAModel, projector_of

__version__ = "0.1.0"

_HOMES = {
    "FullParameterConfig": "core.full_parameter",
    "OGPSACallback": "trainer.callback",
    "OGPSAConfig": "tuner.config",
    "OGPSAModel": "tuner.model",
    "ReferenceLoader": "references.loader",
    "ReferenceSet": "references.sets",
    "attach": "tuner.attaching",
    "merge_adapter": "tuner.merge",
    "projector_of": "tuner.model",
    "push_adapter": "sharing.hub",
    "reference_loss": "references.losses",
    "refusals_from_prompts": "references.refusals",
    "save_card": "sharing.card",
}
"""The module of each public name. It is imported when the name is used: torch and PEFT take seconds to load."""

__all__ = [
    "FullParameterConfig",
    "OGPSACallback",
    "OGPSAConfig",
    "OGPSAModel",
    "ReferenceLoader",
    "ReferenceSet",
    "attach",
    "merge_adapter",
    "projector_of",
    "push_adapter",
    "reference_loss",
    "refusals_from_prompts",
    "save_card",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    """Make OGPSA a PEFT type, and let every saved adapter get a model card."""
    config = import_module(".tuner.config", __name__)
    config.BEFORE_SAVING["model card"] = lambda folder: import_module(".sharing.card", __name__).set_aside(folder)
    config.AFTER_SAVING["model card"] = lambda folder: import_module(".sharing.card", __name__).save_card(folder)
    import_module(".tuner.model", __name__)


compat.when_imported("peft", _register)
