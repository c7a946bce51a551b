# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Has moved to `peft_ogpsa.references.losses.kl`."""

import warnings
from functools import partial

from ..text.tokenization import Example
from .losses.kl import KLLoss

__all__ = ["COST", "Anchored", "divergence_loss"]

Anchored = partial(Example, loss=KLLoss.name)
COST = KLLoss.cost
divergence_loss = KLLoss().loss

warnings.warn(
    "peft_ogpsa.references.divergence has moved to peft_ogpsa.references.losses.kl. The old name will be removed.",
    DeprecationWarning,
    stacklevel=2,
)
