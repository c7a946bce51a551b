# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Safety fine-tuning with LoRA and without the alignment tax."""

from .callback import OGPSACallback
from .card import push_adapter, save_card
from .config import OGPSAConfig
from .full_parameter import FullParameterConfig, attach
from .merge import merge_adapter
from .model import OGPSAModel, projector_of
from .reference import ReferenceLoader, ReferenceSet, reference_loss

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
