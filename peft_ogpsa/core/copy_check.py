# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Recognizes optimizers that keep their own copy of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 32
"""The number of steps that are compared with the correction before them."""

_REPORTS = (4, 8, 16, _STEPS)
"""The steps after which the check waits for the device to report what it found. It never waits in other steps."""

_SAME = 0.1
"""The share of the previous correction that may be missing from its reversal."""


class CopyCheck:
    """Finds out whether an optimizer undoes the projection, because it writes its own copy over the weights.

    Such an optimizer (CPU offload, float32 master weights) makes the step `u - c`, where `c` is what the projection
    added to the weights after the previous step. A gain above 2 then enlarges `-c` again and again, and A grows
    without bound. A smaller gain only loses its effect, which is not found.
    """

    def __init__(self) -> None:
        self._count = 0
        # The two least shares of a correction that a step did not reverse. A line search may reverse one by chance.
        self._least: tuple[Tensor, Tensor] | None = None
        self._step: Tensor | None = None
        self._correction: Tensor | None = None

    def before(self, step: Tensor) -> None:
        """Compare a step that the optimizer has made with the previous correction, before the step is projected.

        Args:
            step: The change of the weights.
        """
        if self._count == _STEPS or (step.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._step = self._correction = None
            return
        if self._correction is not None:
            rest = torch.linalg.vector_norm(step + self._correction) / torch.linalg.vector_norm(self._correction)
            rest = rest.nan_to_num(nan=torch.inf)  # 0 / 0 does not count
            least, second = self._least or (torch.full_like(rest, torch.inf),) * 2
            self._least = torch.minimum(least, rest), torch.minimum(second, torch.maximum(least, rest))
        self._step = step.clone()

    def after(self, step: Tensor) -> None:
        """Note the same step as it was projected.

        Args:
            step: The change of the weights.

        Raises:
            RuntimeError: If two steps have reversed the correction before them. Only some steps wait for the device
                to find this.
        """
        if self._step is None:
            return
        self._correction = step - self._step
        self._step = None
        self._count += 1
        if self._count in _REPORTS and self._least is not None and bool(self._least[1] < _SAME):
            raise RuntimeError(
                "Steps of the optimizer reversed the projection's corrections of the steps before. So the optimizer "
                "steps a copy of the weights that it keeps itself (CPU offload, or float32 master weights), and "
                "writes it over the projected weights. The adapter would grow without bound. Use an optimizer that "
                "steps the parameters themselves, such as AdamW, and keep the adapter in float32."
            )
