# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Numerical precision: the dtypes that are too coarse for a projected step, and the modes that make others so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LOW_PRECISION = (torch.bfloat16, torch.float16)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable TF32 and autocast, in which a loop may step its optimizer."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
