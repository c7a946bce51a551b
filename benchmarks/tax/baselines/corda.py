# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""CorDA in its knowledge-preserved mode (Yang et al. 2024, arXiv 2406.05223), by PEFT.

The adapter starts as the components of each weight that matter least for the knowledge to preserve, which is here that
of the reference sets. The base keeps the rest of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor

from .placement import kinds


def adapted(base: Any, knobs: dict[str, Any], sequences: Sequence[Tensor]) -> PeftModel:
    """Give a model the adapter that CorDA starts with.

    Args:
        base: A copy of the base. Its weights change.
        knobs: Options of LoRA.
        sequences: Token ids of the knowledge to preserve, `(1, tokens)` each. PEFT takes one sample at a time.
    """
    own = {"target_modules": kinds(base), "init_lora_weights": "corda"}
    config = LoraConfig(**knobs | own, corda_config=CordaConfig(corda_method="kpm"))

    def read() -> None:
        for ids in sequences:
            base(input_ids=ids, use_cache=False)

    preprocess_corda(base, config, read)
    model = get_peft_model(base, config)
    # An adapter that is added later (TRL's reference policy) must not take its start from the weights again.
    config.init_lora_weights, config.corda_config = True, None
    return model
