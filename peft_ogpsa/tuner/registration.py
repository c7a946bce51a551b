# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Registration of OGPSA with PEFT."""

from __future__ import annotations

import logging
import os
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig, LoraModel, PeftConfig, PeftModel
from peft.utils import CONFIG_NAME

from .. import compat
from .config import BEFORE_SAVING, SIDECAR_NAME, OGPSAConfig, run_all

logger = logging.getLogger(__name__)


def register(config_cls: type[OGPSAConfig], model_cls: type[LoraModel]) -> None:
    """Make OGPSA a PEFT type. Registering again replaces the classes.

    It is not compatible with `PeftMixedModel`, whose own tuner would train OGPSA adapters as plain LoRA.
    """
    compat.register_lora_like("ogpsa", config_cls, model_cls)
    compat.state_dicts_like_lora("ogpsa")

    # The saved type is LORA, so without the sidecar nothing distinguishes an OGPSA adapter from another.
    def with_sidecar(
        config: PeftConfig, name_or_path: str, subfolder: str | None, hub_kwargs: dict[str, Any]
    ) -> PeftConfig:
        if type(config) is not LoraConfig:
            return config
        sidecar = _find_sidecar(name_or_path, subfolder, hub_kwargs)
        return config if sidecar is None else config_cls.from_lora_config(config, sidecar)

    compat.after_reading_configs(with_sidecar)

    def prepare(model: PeftModel, folder: str) -> None:
        if any(isinstance(config, config_cls) for config in model.peft_config.values()):
            run_all(BEFORE_SAVING, folder)

    compat.before_model_cards(prepare)


def _find_sidecar(name_or_path: str, subfolder: str | None, hub_kwargs: dict[str, Any]) -> str | None:
    folder = os.path.join(name_or_path, subfolder or "")
    if os.path.isfile(os.path.join(folder, CONFIG_NAME)):  # PEFT's own check for a local adapter
        sidecar = os.path.join(folder, SIDECAR_NAME)
        return sidecar if os.path.isfile(sidecar) else None
    try:
        return hf_hub_download(name_or_path, SIDECAR_NAME, subfolder=subfolder, **hub_kwargs)
    except LocalEntryNotFoundError:  # the hub cannot be asked, and its cache does not have the file
        filename = f"{subfolder}/{SIDECAR_NAME}" if subfolder else SIDECAR_NAME
        where = {name: hub_kwargs[name] for name in ("cache_dir", "revision") if name in hub_kwargs}
        if try_to_load_from_cache(name_or_path, filename, **where) is None:  # not known to be missing
            logger.warning(
                "%s is loaded as plain LoRA. If it was trained with OGPSA, its %s is missing in the hub's cache, and "
                "the hub cannot be reached. Load it once while you are online to continue its training with OGPSA.",
                name_or_path,
                SIDECAR_NAME,
            )
        return None
    except EntryNotFoundError:
        return None
