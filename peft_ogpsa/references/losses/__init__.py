# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The reference losses, one class each. To add one, see `ReferenceLoss` in `base.py`."""

import warnings
from typing import Any

from ...text import batching
from .base import ReferenceLoss
from .kl import KLLoss
from .registry import LOSSES, answer_loss, collate, loss_of, reference_loss

__all__ = ["LOSSES", "ReferenceLoss", "answer_loss", "collate", "loss_of", "reference_loss"]


def __getattr__(name: str) -> Any:
    """Return objects under the names of earlier versions, with a warning."""
    moved = {
        "ANCHORED_WEIGHT": (KLLoss.default_weight, "peft_ogpsa.references.losses.kl.KLLoss.default_weight"),
        "batched": (_batched, "peft_ogpsa.text.batching.by_length"),
        "padding_of": (batching.padding_of, "peft_ogpsa.text.batching.padding_of"),
    }
    if name not in moved:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value, place = moved[name]
    warnings.warn(f"{__name__}.{name} is now {place}. The old name will be removed.", DeprecationWarning, stacklevel=2)
    return value


def _batched(examples: Any, size: int) -> list[list[Any]]:
    return batching.by_length(examples, size, lambda example: len(example.ids))
