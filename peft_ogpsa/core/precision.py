# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Numerical precision: dtypes that lose a projected step to rounding, a context with full precision, exact sums."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

LOW_PRECISION = (torch.bfloat16, torch.float16)
_PART = 2**24  # numbers that are converted to 64 bits at once
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def compute_dtype(device: str | torch.device | None = None) -> torch.dtype:
    """Return the dtype in which a device computes fast: float32 on a CPU, bfloat16 elsewhere.

    Many CPUs only emulate 16-bit types: one without AVX-512 took forty times as long in bfloat16 as in float32. GPUs
    such as a T4 or a V100 only emulate bfloat16, and compute in float16.

    Args:
        device: The device. None: the accelerator, or the CPU if there is no accelerator.
    """
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    kind = torch.device(device).type
    if kind == "cpu":
        return torch.float32
    emulated = kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if emulated else torch.bfloat16


def bit_sum(tensor: torch.Tensor) -> int:
    """Sum a tensor's bits as integers: a checksum that is the same on every device and with any number of threads."""
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    # In parts, because torch converts everything to 64 bits before it adds.
    return int(torch.stack([part.sum(dtype=torch.int64) for part in bits.split(_PART)]).sum())


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable TF32 and autocast. A training loop may call its optimizer while they are on."""
    # From torch 2.9 on TF32 has two settings. The older one cannot be read while the newer one differs from it.
    older = None
    with contextlib.suppress(RuntimeError):
        older = torch.get_float32_matmul_precision()
    places = [own for own in _matmuls() if hasattr(own, "fp32_precision")]
    # A value that equals the general one counts as inherited, so that a later change of the general one still acts.
    general = getattr(torch.backends, "fp32_precision", None)
    newer = ["none" if own.fp32_precision == general else own.fp32_precision for own in places]
    if older is not None:
        torch.set_float32_matmul_precision("highest")
    for own in places:
        own.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for own, value in zip(places, newer, strict=True):
            own.fp32_precision = value


def _matmuls() -> list[Any]:
    """Where torch keeps the precision of matrix products, by backend."""
    return [getattr(backend, "matmul", None) for backend in (torch.backends.cuda, torch.backends.mkldnn)]
