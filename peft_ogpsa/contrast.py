# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Has moved to `peft_ogpsa.references.lookalikes`."""

import warnings

from .references.lookalikes import with_contrast

__all__ = ["with_contrast"]

warnings.warn(
    "peft_ogpsa.contrast has moved to peft_ogpsa.references.lookalikes. The old name will be removed.",
    DeprecationWarning,
    stacklevel=2,
)
