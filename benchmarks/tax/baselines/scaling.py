# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Scale the finished adapter: WiSE-FT (Wortsman et al. 2021, arXiv 2109.01903), which for LoRA needs no second model.

The weights between those of the base and the trained ones are `W + scale * scaling * B A`. So one training run gives a
whole curve, from the base at scale 0 to the trained model at scale 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.helpers import rescale_adapter_scale


def along_scales(model: Any, count: int) -> Iterator[float]:
    """Scale the adapter of a model, evenly from the smallest scale up to 1. Restore the scaling after each scale.

    Args:
        model: A trained model with LoRA.
        count: Number of scales.

    Yields:
        The scale that the adapter has now.
    """
    for i in range(1, count + 1):
        with rescale_adapter_scale(model, i / count):
            yield i / count
