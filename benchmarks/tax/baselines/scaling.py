# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Scale the finished adapter: WiSE-FT (Wortsman et al. 2021, arXiv 2109.01903), which for LoRA needs no second model.

Weights between the base's and the trained ones are `W + scale * scaling * B A`. So one training gives a whole curve,
from the base at scale 0 to the trained model at scale 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.helpers import rescale_adapter_scale


def along_scales(measure: Callable[[Any, int], dict[str, Any]], model: Any, step: int, count: int) -> list[Any]:
    """Measure a model with LoRA at evenly spaced scales of its adapter, from the smallest up to 1.

    Args:
        measure: `measure(model, step)` returns the figures of a state.
        model: The trained model. Its scaling is as before afterwards.
        step: Optimizer steps that it was trained for.
        count: Number of scales.

    Returns:
        The figures at each scale, with the scale as `scale`.
    """
    points = []
    for i in range(1, count + 1):
        with rescale_adapter_scale(model, i / count):
            points.append(measure(model, step) | {"scale": i / count})
    return points
