# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of a trainer and its reference losses, before training."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import TrainingArguments

from .. import compat
from ..core import distributed
from ..core.config import ProjectionConfig
from ..core.full_parameter import FullParameterConfig
from ..references.losses import ReferenceLoss

logger = logging.getLogger(__name__)

_MOST_OF_ANSWERS = 2.0
"""A larger `reference_weight` for given answers triggers a warning. 1 worked well, 5 slowed safety learning."""


def refuse_unsupported(args: TrainingArguments, model: nn.Module) -> None:
    """Reject kinds of distributed training in which steps cannot be projected."""
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "OGPSA does not work with DeepSpeed. Its engine stores gradients and updates parameters in flat "
            "partitions, which no optimizer hook sees. Train without DeepSpeed. FSDP2 (fsdp_version: 2) also shards "
            "parameters."
        )
    plugin = compat.fsdp_plugin()
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            f"OGPSA does not work with FSDP {plugin.fsdp_version}, which flattens several parameters into one. Use "
            "FSDP2 (fsdp_version: 2)."
        )
    if plugin is not None and isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "OGPSA does not work if FSDP2 offloads parameters to the host. Set fsdp_offload_params: false."
        )
    if distributed.count() > 1 and len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(
            f"The model is spread over several devices (device_map), but it is trained in {distributed.count()} "
            "processes. Load it without device_map."
        )


def check_losses(losses: Mapping[str, ReferenceLoss], config: ProjectionConfig, model: nn.Module) -> None:
    """Reject losses that do not work with the model. Warn about a weight that is too large for them."""
    for name, loss in losses.items():
        if config.refreshes and loss.needs_base and isinstance(config, FullParameterConfig):
            others = " or ".join(f'"{other}"' for other in loss.without_base)
            raise ValueError(
                f'Reference set {name!r}: loss="{loss.name}" needs the model without its adapter, but a '
                f"model whose own weights are trained has no adapter. Use loss={others}."
            )
        loss.check(model)
    learned = [name for name, loss in losses.items() if loss.learns_answers]
    if learned and (config.reference_weight or 0.0) > _MOST_OF_ANSWERS:
        logger.warning(
            "Reference set %r has a loss of given answers. With reference_weight=%s, the model learns these "
            "answers as fast as refusals, so it learns safety slowly. Set reference_weight=None or 1.0, or use "
            'reference sets with loss="kl".',
            learned[0],
            config.reference_weight,
        )
