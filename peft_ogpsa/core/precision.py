# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Numerical precision: dtypes that lose a projected step to rounding, and a context with full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LOW_PRECISION = (torch.bfloat16, torch.float16)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable TF32 and autocast. A training loop may call its optimizer while they are on."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
