# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The LoRA model with a projector."""

from __future__ import annotations

from typing import Any

from peft import LoraModel, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .. import compat
from ..core.full_parameter import PROJECTOR
from ..core.projector import Projector
from .config import OGPSAConfig
from .registration import register
from .targets import AdapterTargets

# Where a base model stores its OGPSAModel: in `__dict__`, so that nn.Module does not treat it as a submodule. PEFT
# discards the tuner when it only injects (`inject_adapter_in_model`, transformers' `add_adapter`). Without this
# reference the projector would be lost too, and training would silently be plain LoRA.
_TUNER = "_ogpsa_tuner"


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
        ValueError: If the base model already carries adapters of another type.
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
        first = self.model.__dict__.get(_TUNER)
        if first is None or first.peft_config is not self.peft_config:
            if first is not None:
                first._projector.retire()  # `get_peft_model` got the same base again: the old adapter is gone
            self._projector = Projector(AdapterTargets(self))
            self.model.__dict__[_TUNER] = self
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(["lora", "ogpsa"])  # PEFT's model card adds "lora" only for its own LoRA

    @property
    def projector(self) -> Projector:
        """The projector that projects the optimizer's steps."""
        return projector_of(self.model)

    # A copy gets a new projector: the rows belong to one training run, and only its `state_dict` saves them to disk.

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if "_projector" in state:
            state["_projector"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_projector" in state:
            self._projector = Projector(AdapterTargets(self))

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
            if (first := self.model.__dict__.get(_TUNER)) is not None:
                first._projector._targets.forget()  # an earlier adapter may have had this name

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if isinstance(config, OGPSAConfig):
            state_dict = compat.converted_for_transformers(model, config.lora_config(), adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Merge the adapters into the base model and return it, as LoRA does."""
        return _without_tuner(super().merge_and_unload(*args, **kwargs))

    def unload(self) -> nn.Module:
        """Remove the adapters and return the base model, as LoRA does."""
        return _without_tuner(super().unload())


def projector_of(model: nn.Module) -> Projector:
    """The projector of a model with an OGPSA adapter, or of a model that was given to `attach`.

    Args:
        model (`nn.Module`): A `PeftModel`, an `OGPSAModel`, a base model with an injected adapter, a model given to
            `attach`, or any module around one of them (compiled, distributed).

    Raises:
        ValueError: If there is none.
    """
    for module in model.modules():
        held = module.__dict__.get(PROJECTOR)
        if held is not None and held.projector is not None:
            return held.projector
    return tuner_of(model)._projector


def tuner_of(model: nn.Module) -> OGPSAModel:
    """The `OGPSAModel` in a model with an adapter. Arguments and errors are those of `projector_of`."""
    for module in model.modules():
        if (tuner := module.__dict__.get(_TUNER)) is not None:
            return tuner
    raise ValueError(
        f"This {type(model).__name__} has no OGPSA adapter. Add one with get_peft_model(model, OGPSAConfig(...)). To "
        "train the model's own weights, use attach(model, FullParameterConfig(...)) or OGPSACallback(..., "
        "config=FullParameterConfig(...))."
    )


def _without_tuner(model: nn.Module) -> nn.Module:
    if (tuner := model.__dict__.pop(_TUNER, None)) is not None:
        tuner._projector.retire()  # the base may get another adapter, with parameters of the same names
    return model


def _refuse_other_adapters(model: nn.Module) -> None:
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    configs = getattr(model, "peft_config", {})
    others = []
    for name in sorted({name for layer in layers for name in layer._all_available_adapter_names()}):
        config = configs.get(name)
        if not isinstance(config, OGPSAConfig):
            others.append(f"{name!r} ({'type unknown' if config is None else config.peft_type.value})")
    if others:
        raise ValueError(
            f"The model already has adapters that are not OGPSA adapters: {', '.join(others)}. Merge them "
            "(`model.merge_and_unload()`) or remove them (`model.unload()`) first."
        )


register(OGPSAConfig, OGPSAModel)
