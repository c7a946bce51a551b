# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Safety fine-tuning with LoRA and without the alignment tax."""

from .core.full_parameter import FullParameterConfig
from .references.loader import ReferenceLoader
from .references.losses import reference_loss
from .references.sets import ReferenceSet
from .sharing.card import push_adapter, save_card
from .trainer.callback import OGPSACallback
from .tuner.attaching import attach
from .tuner.config import AFTER_SAVING, OGPSAConfig
from .tuner.merge import merge_adapter
from .tuner.model import OGPSAModel, projector_of

__version__ = "0.1.0.dev0"

AFTER_SAVING["model card"] = save_card

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
    "save_card",
]
