# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The subspace in a training checkpoint: one safetensors file and one JSON file."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..core.files import read_json, replacing, write_json

TENSORS_NAME = "ogpsa_subspace.safetensors"
STATE_NAME = "ogpsa_state.json"
_TRAINER_STATE_NAME = "trainer_state.json"

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """The subspace of a checkpoint is missing, damaged, or does not fit."""


def save(directory: str | os.PathLike, state: dict[str, Any]) -> None:
    """Write `{"tensors": {name: Tensor}, "rest": JSON-ready dict}` into a checkpoint directory.

    Each file replaces its predecessor only when it is complete. `STATE_NAME` appears last: it marks a whole
    checkpoint.

    Raises:
        OSError: If a file cannot be written, for example because the disk is full.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tensors = _writable(state["tensors"])
    with replacing(path / STATE_NAME) as rest, replacing(path / TENSORS_NAME) as stacked:
        try:
            save_file(tensors, stacked)
        except SafetensorError as error:
            raise OSError(f"{path / TENSORS_NAME} cannot be written: {error}") from error
        write_json(rest, state["rest"])


def _writable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors that safetensors rejects: views into a stack share memory and may have gaps.

    Gathered rows of whole weights are fresh tensors. A copy of them would take their memory again.
    """
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        memory = own.untyped_storage()
        if memory.nbytes() > own.nbytes or memory.data_ptr() in taken:
            own = own.clone()
        taken.add(own.untyped_storage().data_ptr())
        found[name] = own
    return found


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
        rest = read_json(path / STATE_NAME)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    try:
        tensors = load_file(path / TENSORS_NAME)
    except SafetensorError as error:
        raise CheckpointError(f"{path / TENSORS_NAME} is damaged: {error}.") from error
    return {"tensors": tensors, "rest": rest}


def last_whole(output_dir: str | os.PathLike, *, subspace: bool = True) -> Path | None:
    """Return the newest whole checkpoint of a run. A warning names each one that is skipped, and why.

    If several runs have written to the folder, the run counts that has written last. A run that is killed while it
    saves, or whose disk is full, leaves a checkpoint that is not whole. transformers' `resume_from_checkpoint=True`
    takes the newest one, whole or not. Give this one instead:

    ```py
    trainer.train(resume_from_checkpoint=last_whole(trainer.args.output_dir))
    ```

    Args:
        output_dir: The output folder of the run.
        subspace: Whether a whole checkpoint includes the subspace. False: the run does not save it, or rebuilds it.
    """
    steps = {path: _step(path) for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()}
    found = sorted((path for path in steps if steps[path] is not None), key=lambda path: steps[path] or 0)
    newest = max(found, key=_written, default=None)
    while found:
        path = found.pop()
        flaw = _flaw(path, subspace)
        if flaw is not None:
            logger.warning("%s is skipped, because it is not whole: %s.", path, flaw)
        elif newest in found and _run(newest) != _run(path):
            logger.warning("%s is skipped, because another run has written %s later.", path, newest)
        else:
            return path
    return None


def _written(path: Path) -> float:
    return max(entry.lstat().st_mtime for entry in (path, *path.iterdir()))  # a link may lead nowhere


def _run(path: Path | None) -> Any:
    """What distinguishes the run that has written a checkpoint from others. `None`: it has not written that."""
    try:
        return None if path is None else read_json(path / STATE_NAME).get("run")
    except (OSError, ValueError):
        return None


def _step(path: Path) -> int | None:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isascii() and number.isdigit() else None


def _flaw(path: Path, subspace: bool) -> str | None:
    """Say what a checkpoint lacks, or return None for a whole one. The trainer writes its state after the weights."""
    needed = [_TRAINER_STATE_NAME, *([TENSORS_NAME, STATE_NAME] if subspace else [])]
    for name in needed:
        if not (path / name).is_file():
            return f"{name} is missing"
        try:
            if name.endswith(".json"):
                read_json(path / name)
        except (ValueError, OSError) as error:
            return str(error).rstrip(".")
    for file in sorted(path.rglob("*")):
        if file.suffix == ".safetensors" and not _complete_tensors(file):
            return f"{file.name} is cut off"
        if file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):  # torch writes zip files
            return f"{file.name} is cut off"
    return None


def _complete_tensors(file: Path) -> bool:
    """Return whether a safetensors file can be opened, which checks its header and its length."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False
