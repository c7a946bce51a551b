# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The LoRA model with a projector."""

from __future__ import annotations

from typing import Any

from peft import LoraModel, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .. import compat
from ..core import attachment
from ..core.attachment import projector_of
from ..core.projector import Projector
from .config import OGPSAConfig
from .registration import register
from .targets import AdapterTargets


class OGPSAModel(LoraModel):
    """A LoRA model whose optimizer steps are projected.

    `get_peft_model(model, OGPSAConfig(...))` builds it. Layers, parameter names, merging and everything else are those
    of LoRA.

    Args:
        model (`nn.Module`): The base model.
        peft_config (`OGPSAConfig` or `dict[str, OGPSAConfig]`): The configuration, or configurations by adapter name.
        adapter_name (`str`): The adapter's name.
        low_cpu_mem_usage (`bool`): Create the adapter's weights on the meta device.
        state_dict (`dict`, *optional*): Take the layers to adapt from the keys of this state dict.

    Raises:
        ValueError: If the base model already carries adapters of another type, or is a PeftModel with OGPSA.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        _refuse_other_adapters(model)
        super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        # PEFT builds another tuner for each further adapter that is injected. All tuners share `peft_config` and one
        # projector.
        first = _first_tuner(self.model)
        if first is None or first.peft_config is not self.peft_config:
            # If `get_peft_model` got the same base again, the old adapter is gone, and its projector is closed.
            attachment.attach(self.model, Projector(AdapterTargets(self)), copied=True)
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(["lora", "ogpsa"])  # PEFT's model card adds "lora" only for its own LoRA

    @property
    def projector(self) -> Projector:
        """The projector that projects the optimizer's steps."""
        return projector_of(self.model)

    # PEFT checks for its LORA type in three places. The layers are LoRA's, so the same applies here.

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter's layers to the model.

        During the call the type is LORA, for PEFT's check of Mamba's layers and its conversion of targets in mixtures
        of experts.
        """
        try:
            with compat.treated_as_lora(self.peft_config[adapter_name]):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            if (first := attachment.attached_to(self.model)) is not None:
                first.targets.forget()  # an earlier adapter may have had this name
        config = self.peft_config[adapter_name]
        if not isinstance(config, OGPSAConfig) or config.inference_mode:
            return
        if config.uses_activations and config.target_parameters:
            raise ValueError(
                f"subspace={config.subspace!r} does not work here: PEFT made target_parameters="
                f"{sorted(config.target_parameters)} of target_modules, which are the weights of experts. Name the "
                "linear layers of the attention instead, for example target_modules=['q_proj', 'k_proj', 'v_proj', "
                "'o_proj'], or use subspace='gradients'. The model now has layers of this adapter: load it again."
            )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if isinstance(config, OGPSAConfig):
            state_dict = compat.converted_for_transformers(model, config.lora_config(), adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Merge the adapters into the base model and return it, as LoRA does."""
        return _without_projector(super().merge_and_unload(*args, **kwargs))

    def unload(self) -> nn.Module:
        """Remove the adapters and return the base model, as LoRA does."""
        return _without_projector(super().unload())


def _first_tuner(base: nn.Module) -> LoraModel | None:
    projector = attachment.attached_to(base)
    return projector.targets.tuner if projector and isinstance(projector.targets, AdapterTargets) else None


def _without_projector(model: nn.Module) -> nn.Module:
    attachment.detach(model)  # the base may get another adapter, with parameters of the same names
    return model


def _refuse_other_adapters(model: nn.Module) -> None:
    if isinstance(model, PeftModel) and any(isinstance(own, OGPSAConfig) for own in model.peft_config.values()):
        raise ValueError(
            "get_peft_model got a PeftModel and not a base model. Use model.add_adapter(name, config) for another "
            "adapter, or model.unload() for the base without its adapters."
        )
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    configs = getattr(model, "peft_config", {})
    others = []
    for name in sorted({name for layer in layers for name in compat.adapter_names(layer)}):
        config = configs.get(name)
        if not isinstance(config, OGPSAConfig):
            others.append(f"{name!r} ({'type unknown' if config is None else config.peft_type.value})")
    if others:
        raise ValueError(
            f"The model already has adapters that are not OGPSA adapters: {', '.join(others)}. Merge them "
            "(`model.merge_and_unload()`) or remove them (`model.unload()`) first."
        )


register(OGPSAConfig, OGPSAModel)
