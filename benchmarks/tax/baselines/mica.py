# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Minor component adaptation (MiCA, arXiv 2604.01694), by PEFT.

B is the r left singular vectors of the weight with the smallest singular values, and stays so. A starts at zero and is
trained. It takes nothing from the references, and leaves the base as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor


def adapted(base: Any, knobs: dict[str, Any], sequences: Sequence[Tensor]) -> PeftModel:
    """Give a model the adapter that MiCA starts with. `sequences` are not used."""
    return get_peft_model(base, LoraConfig(**knobs, init_lora_weights="mica"))
