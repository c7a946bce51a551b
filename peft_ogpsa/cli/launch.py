# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Parts of the `accelerate launch` setup that full-parameter training in several processes depends on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .. import compat

if TYPE_CHECKING:
    from transformers import Trainer


def shard_on_cpu(trainer: Trainer) -> None:
    """Let FSDP2 run without a GPU, to try things out.

    This does nothing if FSDP was not requested or if there are GPUs.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        compat.shard_on_cpu(trainer)


def check_saves_whole_model(trainer: Trainer) -> None:
    """Check that the trainer gathers the shards into one model at the end.

    Raises:
        ValueError: If FSDP uses a state dict type other than the full one.
    """
    if not trainer.is_fsdp_enabled:
        return
    kind = str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
    if "FULL_STATE_DICT" not in kind:
        raise ValueError(
            f"fsdp_state_dict_type is {kind.rpartition('.')[2]}, and this setting would save no model. Set "
            "fsdp_state_dict_type: FULL_STATE_DICT."
        )
