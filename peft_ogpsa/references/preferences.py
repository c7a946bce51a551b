# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Has moved to `peft_ogpsa.references.losses.dpo`."""

import warnings

from .losses.dpo import DPOLoss, Pair, log_probabilities, with_margins

__all__ = ["Pair", "log_probabilities", "preference_loss", "with_margins"]

preference_loss = DPOLoss().loss

warnings.warn(
    "peft_ogpsa.references.preferences has moved to peft_ogpsa.references.losses.dpo. The old name will be removed.",
    DeprecationWarning,
    stacklevel=2,
)
