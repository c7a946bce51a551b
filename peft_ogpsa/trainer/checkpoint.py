# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The subspace in a training checkpoint: one safetensors file and one JSON file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..core.files import replacing

TENSORS_NAME = "ogpsa_subspace.safetensors"
STATE_NAME = "ogpsa_state.json"


class CheckpointError(ValueError):
    """The subspace of a checkpoint is missing, damaged, or does not fit."""


def save(directory: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write `{"tensors": {name: Tensor}, "rest": JSON-ready dict}` into a checkpoint directory.

    Each file replaces its predecessor only when it is complete.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    # Views into a stack share memory and may have gaps. safetensors rejects both.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state["tensors"].items()
    }
    with replacing(path / STATE_NAME) as rest, replacing(path / TENSORS_NAME) as stacked:
        save_file(tensors, stacked)
        rest.write_text(json.dumps(state["rest"], indent=2) + "\n", encoding="utf-8")


def load(directory: str | os.PathLike) -> dict[str, Any]:
    """Read what `save` wrote.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    path = Path(directory)
    for name in (TENSORS_NAME, STATE_NAME):
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing.")
    try:
        rest = json.loads((path / STATE_NAME).read_text(encoding="utf-8"))
        if not isinstance(rest, dict):
            raise ValueError("it does not contain a JSON object")
    except ValueError as error:
        raise CheckpointError(f"{path / STATE_NAME} is damaged: {error}.") from error
    try:
        tensors = load_file(path / TENSORS_NAME)
    except SafetensorError as error:
        raise CheckpointError(f"{path / TENSORS_NAME} is damaged: {error}.") from error
    return {"tensors": tensors, "rest": rest}
