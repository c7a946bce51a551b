# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The files in the folder of a saved adapter."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..core.files import json_object, replace_json, replacing
from ..tuner.config import DAMAGED, SIDECAR_NAME

_WEIGHTS = "weights_sha256"


def read_config(folder: Path) -> LoraConfig:
    """Read the settings of a saved adapter.

    Raises:
        ValueError: If they are missing or damaged, or not those of a LoRA adapter.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():  # PEFT would look on the hub
        raise ValueError(f"{path} is missing. Give the folder of a saved adapter (`model.save_pretrained(folder)`).")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about settings that were already there in training
            config = PeftConfig.from_pretrained(str(folder))
    except (*DAMAGED, ValueError) as error:
        if SIDECAR_NAME in str(error):  # it is the other file, and the message says so
            raise
        raise ValueError(f"{path} is damaged ({error!r}). Save the adapter again.") from error
    if not isinstance(config.base_model_name_or_path, str | None):
        raise ValueError(f"{path} is damaged (base_model_name_or_path is no text). Save the adapter again.")
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{path} has peft_type={config.peft_type!r}. Give the folder of a LoRA adapter.")
    return config


def read_facts(folder: Path, name: str) -> dict[str, Any]:
    """Read the facts in a file. Return an empty dict if there is no file or it is about other weights.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / name
    if not path.is_file():
        return {}
    try:
        facts = json_object(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Restore it, or delete it to continue without it.") from error
    return facts if facts.pop(_WEIGHTS, None) == weights_digest(folder) else {}


def store_facts(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Write facts about an adapter's weights, with the checksum of the weights."""
    replace_json(folder / name, {_WEIGHTS: weights_digest(folder), **facts})


def write(path: Path, text: str) -> None:
    """Write a file. An old file is replaced only when the new one is complete."""
    with replacing(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        file.write(text)


def weights_digest(directory: str | os.PathLike) -> str | None:
    """Return the SHA-256 of an adapter's weights in hexadecimal digits, or None if the folder has no weights."""
    folder = Path(directory)
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            digest = hashlib.sha256()
            with open(folder / name, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            return digest.hexdigest()
    return None
