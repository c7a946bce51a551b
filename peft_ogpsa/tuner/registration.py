# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Registration of OGPSA with PEFT."""

from __future__ import annotations

import functools
import os
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, LoraModel, PeftType
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import CONFIG_NAME, register_peft_method
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

from .config import SIDECAR_NAME, OGPSAConfig


def register(config_cls: type[OGPSAConfig], model_cls: type[LoraModel]) -> None:
    """Make OGPSA a PEFT type. Registering again replaces the classes.

    It is not compatible with `PeftMixedModel`, whose own tuner would train OGPSA adapters as plain LoRA.
    """
    peft_type = _peft_type("OGPSA")
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
        mapping.pop(peft_type, None)
    register_peft_method(name="ogpsa", config_cls=config_cls, model_cls=model_cls, prefix="lora_")
    CONFIG_KEYS_TO_CHECK[peft_type] = CONFIG_KEYS_TO_CHECK[PeftType.LORA]
    _read_sidecars(config_cls)


def _peft_type(name: str) -> PeftType:
    # PEFT accepts only members of this enumeration, and code around it reads `peft_type.value`.
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    setattr(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    getattr(PeftType, "_hashable_values_", []).append(name)  # Python 3.13: `in PeftType` reads this list
    return member


def _read_sidecars(config_cls: type[OGPSAConfig]) -> None:
    # All loading functions of PEFT and transformers read configurations through this method. The saved type is LORA,
    # so later code could not distinguish an OGPSA adapter from another.
    from_pretrained = PeftConfigMixin.__dict__["from_pretrained"].__func__
    from_pretrained = getattr(from_pretrained, "_without_ogpsa", from_pretrained)

    @functools.wraps(from_pretrained)
    def with_sidecar(
        cls: type[PeftConfigMixin], pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfigMixin:
        config = from_pretrained(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if type(config) is not LoraConfig:
            return config
        sidecar = _find_sidecar(pretrained_model_name_or_path, subfolder, cls._split_kwargs(kwargs)[0])
        return config if sidecar is None else config_cls.from_lora_config(config, sidecar)

    with_sidecar._without_ogpsa = from_pretrained  # type: ignore[attr-defined]
    PeftConfigMixin.from_pretrained = classmethod(with_sidecar)  # type: ignore[method-assign,assignment]


def _find_sidecar(name_or_path: str, subfolder: str | None, hub_kwargs: dict[str, Any]) -> str | None:
    folder = os.path.join(name_or_path, subfolder or "")
    if os.path.isfile(os.path.join(folder, CONFIG_NAME)):  # PEFT's own check for a local adapter
        sidecar = os.path.join(folder, SIDECAR_NAME)
        return sidecar if os.path.isfile(sidecar) else None
    try:
        return hf_hub_download(name_or_path, SIDECAR_NAME, subfolder=subfolder, **hub_kwargs)
    except EntryNotFoundError:
        return None
