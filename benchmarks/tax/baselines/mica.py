# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Minor component adaptation (MiCA, arXiv 2604.01694), by PEFT.

B consists of the weight's r left singular vectors with the smallest singular values, and is frozen. A starts at zero
and is trained. MiCA does not use references, and does not change the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor


def adapted(base: Any, knobs: dict[str, Any], sequences: Sequence[Tensor]) -> PeftModel:
    """Give a model the adapter that MiCA starts with. `sequences` is not used."""
    return get_peft_model(base, LoraConfig(**knobs, init_lora_weights="mica"))
