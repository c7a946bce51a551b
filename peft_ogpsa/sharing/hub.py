# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Upload an adapter to the hub."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from peft.utils import CONFIG_NAME

from ..core.files import read_json, replacing, write_json
from ..trainer.checkpoint import STATE_NAME, TENSORS_NAME
from .card import save_card
from .evaluation_record import EVALUATION_NAME
from .folder import read_config
from .names import on_hub, public

logger = logging.getLogger(__name__)
# Training state and other files that a trainer leaves in its output folder. `training_args.bin` is a pickle and holds
# the machine's paths.
_NOT_SHARED = [
    "checkpoint-*",
    "_*",
    ".*",
    "*.part",
    "README.md.bak*",  # a card that could not be read
    "*.json.pieces",  # what `ogpsa eval` keeps
    "runs/*",
    "*tfevents*",
    "training_args.bin",
    "trainer_state.json",
    "optimizer.*",
    "scheduler.*",
    "scaler.*",
    "rng_state*",
    TENSORS_NAME,
    STATE_NAME,
]


def push_adapter(
    directory: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
) -> str:
    """Upload a saved adapter with its card to the Hugging Face hub.

    `model.push_to_hub` and `trainer.push_to_hub` write their own cards. This function uploads the card in the folder,
    after `save_card` has updated it. A card that is already on the hub is replaced. Checkpoints, training state and
    results of `ogpsa eval` are not uploaded.

    Args:
        directory (`str` or `os.PathLike`): The folder of the adapter.
        repo_id (`str`): `"owner/name"`, or a name under your own account. The repository is created if necessary.
        private (`bool`, *optional*): Whether a new repository is private. Default: the hub's setting.
        token (`str` or `bool`, *optional*): The hub token. Default: the token of your login.
        revision (`str`, *optional*): The branch, which is created if necessary. Default: the main branch.
        commit_message (`str`): The commit message.

    Returns:
        The URL of the repository.

    Raises:
        ValueError: If the folder holds no LoRA adapter, or one of its files is damaged.
        HfHubHTTPError: If the hub rejects the request.
    """
    save_card(directory)
    base = read_config(Path(directory)).base_model_name_or_path
    if base and not on_hub(base):
        logger.warning(
            "In %s, base_model_name_or_path is the local folder %r, which others cannot load. The uploaded file has "
            "its name without the path. If the base is on the hub, write its hub name there and push again.",
            CONFIG_NAME,
            base,
        )
    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repository.repo_id, branch=revision, exist_ok=True)
    with _shared_folder(Path(directory)) as folder:
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            ignore_patterns=[*_NOT_SHARED, *_results(folder)],
        )
    return str(repository)


def _results(folder: Path) -> list[str]:
    """Patterns of results of `ogpsa eval`, which hold prompts and answers. The card and its files have the figures."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).as_posix()
        with contextlib.suppress(ValueError, OSError):  # files of other programs
            saved = read_json(path)
            several = saved.get("results")
            each = several if isinstance(several, list) else [saved]
            if name != EVALUATION_NAME and any(isinstance(own, dict) and "evaluation" in own for own in each):
                found.append(name)
    if found:
        logger.warning("%s: not uploaded, because results of `ogpsa eval` hold prompts and answers.", ", ".join(found))
    return [glob.escape(name) for name in found]  # a name may have brackets


@contextmanager
def _shared_folder(folder: Path) -> Iterator[Path]:
    """Give a folder with the same files, in which `adapter_config.json` names a local base without its path."""
    base = read_config(folder).base_model_name_or_path
    if not base or on_hub(base):
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "adapter"
        # Training state may be large, and is not shared.
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*_NOT_SHARED), copy_function=_link)
        config = read_json(folder / CONFIG_NAME)
        with replacing(copy / CONFIG_NAME) as part:  # and not into the linked file
            write_json(part, {**config, "base_model_name_or_path": public(base)})
        yield copy


def _link(source: str, target: str) -> None:
    """Make a hard link if possible, or else copy the file."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
