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
            "OGPSA does not work under DeepSpeed: its engine keeps gradients and steps flat partitions of the "
            "parameters where no optimizer hook sees them. Train without DeepSpeed; FSDP2 shards as well "
            "(fsdp_version: 2)."
        )
    plugin = compat.fsdp_plugin()
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            f"OGPSA does not work under FSDP {plugin.fsdp_version}, which flattens parameters of different tensors "
            "into one. Use FSDP2: fsdp_version: 2."
        )
    if plugin is not None and isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "OGPSA does not work with FSDP2's offloading of parameters to the host. Set fsdp_offload_params: false."
        )
    if distributed.count() > 1 and len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(
            f"The model is spread over several devices (device_map) and trained in {distributed.count()} processes. "
            "Load it without device_map."
        )


def check_losses(losses: Mapping[str, ReferenceLoss], config: ProjectionConfig, model: nn.Module) -> None:
    """Reject losses that have no meaning for the model. Warn of a weight that is too large for them."""
    for name, loss in losses.items():
        if config.refreshes and loss.needs_base and isinstance(config, FullParameterConfig):
            others = " or ".join(f'"{other}"' for other in loss.without_base)
            raise ValueError(
                f'Reference set {name!r}: loss="{loss.name}" is measured against the model without its adapter, '
                f"and there is none where whole weights are trained. Use loss={others}."
            )
        loss.check(model)
    learned = [name for name, loss in losses.items() if loss.learns_answers]
    if learned and (config.reference_weight or 0.0) > _MOST_OF_ANSWERS:
        logger.warning(
            "Reference set %r has a loss of given answers, which are learned as fast as refusals with "
            "reference_weight=%s: safety comes slowly then. Set reference_weight=None or 1.0, or take references "
            'with loss="kl".',
            learned[0],
            config.reference_weight,
        )
