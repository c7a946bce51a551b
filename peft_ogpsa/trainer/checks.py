# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of a trainer and its reference losses, before training."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy

from .. import compat
from ..core import distributed
from ..core.config import ProjectionConfig
from ..core.full_parameter import FullParameterConfig
from ..core.projector import Projector
from ..references.losses import ReferenceLoss
from ..references.sets import AnsweredSet, ReferenceSet
from ..text.tokenization import template_of

logger = logging.getLogger(__name__)

_MOST_OF_ANSWERS = 2.0
"""A larger `reference_weight` for given answers triggers a warning. 1 worked well, 5 slowed safety learning."""


def refuse_unsupported(args: TrainingArguments, model: nn.Module) -> None:
    """Reject models and kinds of distributed training in which steps cannot be projected."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            "OGPSACallback does not work with encoder-decoder models. Use your own loop: call "
            "model.projector.refresh(batches, loss_fn) before a step, while model.projector.due is true."
        )
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


def uploads_checkpoints(args: TrainingArguments) -> bool:
    """Whether the trainer uploads its checkpoints during training."""
    return args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)


def refuse_early_upload(args: TrainingArguments) -> None:
    """Reject uploads of checkpoints that begin before the subspace can be in them."""
    if not uploads_checkpoints(args):
        return
    if not hasattr(TrainerCallback, "on_push_begin"):
        reason = "transformers before 5.0 begins an upload without telling callbacks. Install transformers>=5"
    elif compat.fsdp_plugin() is not None and distributed.count() > 1:
        reason = (
            "the parameters are sharded: only the first process knows of the upload, but the subspace must be "
            "gathered from all processes. Upload the checkpoint folders after training"
        )
    else:
        return
    strategy = HubStrategy(args.hub_strategy).value
    raise ValueError(
        f"hub_strategy={strategy!r} would upload checkpoints without the subspace, because {reason}. To save and "
        "upload them without it, give OGPSACallback(save_subspace=False)."
    )


def refuse_second_callback(trainer: Trainer | None, callback: TrainerCallback) -> None:
    """Reject a second callback of this kind, which would build its own subspace in place of the first one's."""
    own = [] if trainer is None else trainer.callback_handler.callbacks
    if sum(isinstance(other, type(callback)) for other in own) > 1:
        raise ValueError(
            f"The trainer has several callbacks {type(callback).__name__}. Each would replace the subspace of the "
            "other. Use one callback with all reference sets."
        )


def refuse_base_as_reference(trainer: Trainer | None, projector: Projector) -> None:
    """Reject preference training of a trained adapter if its reference policy is the base: before TRL 0.29."""
    if trainer is None or trainer.state.global_step > 0 or not compat.takes_base_as_reference(trainer):
        return
    for name, _, parameter in projector.targets.trained():
        if (".lora_B." in name or ".lora_embedding_B." in name) and parameter.any():
            raise ValueError(
                f"{type(trainer).__name__} trains an adapter that is already trained, but its reference policy is the "
                "base model, because TRL before 0.29 turns the adapter off for it. DPO then starts with a wrong loss. "
                "Install trl>=1.0. Or load the adapter a second time under the name 'ref' and set "
                'DPOConfig(model_adapter_name="default", ref_adapter_name="ref"), or give ref_model. Or merge the '
                "adapter into the base (peft_ogpsa.merge_adapter) and train a new one; in LLaMA-Factory, set "
                "create_new_adapter: true."
            )


def refuse_forgotten_adapter(model: nn.Module, checkpoint: Path) -> None:
    """Reject a resumed run whose trainer has not loaded the trained adapter: before transformers 5.23."""
    adapters = getattr(model, "peft_config", {})
    if "default" not in adapters or len(adapters) == 1 or not compat.forgets_default_adapter():
        return
    file = checkpoint / SAFETENSORS_WEIGHTS_NAME
    if compat.fsdp_plugin() is not None or (file.is_file() and _has_weights(model, load_file(file))):
        return
    raise ValueError(
        f"The run is resumed, but the adapter 'default' does not have the weights of {checkpoint}. transformers "
        "before 5.23 does not load this adapter if the checkpoint holds a second one, such as the adapter 'ref' of "
        "TRL's DPOTrainer. Install transformers>=5.23. Or load the checkpoint's adapter yourself before you create "
        "the trainer: PeftModel.from_pretrained(base, CHECKPOINT, is_trainable=True). If the checkpoint is in another "
        "directory, give OGPSACallback(resume_from=DIRECTORY)."
    )


def _has_weights(model: nn.Module, saved: Mapping[str, Tensor]) -> bool:
    own = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    rounding = 2**-8  # TRL may have rounded the adapter to bfloat16
    return all(
        name in saved and torch.allclose(value.float().cpu(), saved[name].float(), rtol=rounding, atol=0)
        for name, value in own.items()
    )


def warn_of_other_template(reference_sets: Sequence[ReferenceSet], processing_class: Any) -> None:
    """Warn if the chat template has changed since the base answered, for example by TRL's `chat_template_path`."""
    template = template_of(processing_class) or ""
    for own in reference_sets:
        if isinstance(own, AnsweredSet) and own.chat_template not in (None, template):
            logger.warning(
                "Reference set %r holds answers that the base gave under another chat template than that of the "
                "trainer, so they are not what it says now. If the trainer changes the template "
                "(chat_template_path), change that of the tokenizer before ReferenceSet.from_prompts.",
                own.name,
            )
            return


def check_losses(losses: Mapping[str, ReferenceLoss], config: ProjectionConfig, model: nn.Module) -> None:
    """Reject losses that do not work with the model. Warn about a weight that is too large for them."""
    for name, loss in losses.items() if config.refreshes else ():
        if loss.needs_base and isinstance(config, FullParameterConfig):
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
