# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""How an adapter was trained, as a file beside it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.files import json_object, replace_json
from ..tuner.config import OGPSAConfig
from .folder import read_facts, store_facts
from .names import public

RUN_NAME = "ogpsa_run.json"
_RUN: dict[str, tuple[type, ...]] = {
    "stage": (str,),
    "model_class": (str,),
    "method": (str,),
    "started_from": (str,),
    "started_from_weights": (str,),
    "dataset": (str,),
    "own_refusals": (bool,),
    "lookalikes": (int, float),
    "references": (dict,),
    "steps": (int,),
    "best_step": (int,),
    "seconds": (int, float),
    "reference_share": (int, float),
    "versions": (dict,),
    "projection": (dict,),
}


def read_run(directory: str | os.PathLike) -> dict[str, Any]:
    """Read how an adapter was trained, as far as its folder records it, in the form that `save_card` takes.

    Raises:
        ValueError: If the file is damaged.
    """
    run = _renamed(read_facts(Path(directory), RUN_NAME))
    _check_run(run, f"{Path(directory) / RUN_NAME}")
    return run


def recorded_dataset(folder: Path) -> str | None:
    """Return the training data that the folder's record names, also if the record is about earlier weights."""
    try:
        return json_object((folder / RUN_NAME).read_text(encoding="utf-8")).get("dataset")
    except (OSError, ValueError):  # there is no record, or it is damaged
        return None


def store_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Check how an adapter was trained, and write it beside the adapter.

    Raises:
        ValueError: If `run` does not have the form that `save_card` takes.
    """
    if not isinstance(run, Mapping):
        raise ValueError(f"run={repr(run)[:80]} is not a mapping of facts, such as {{'dataset': 'owner/name'}}.")
    if "contrast" in run:
        warnings.warn("The entry contrast of run is now lookalikes.", DeprecationWarning, stacklevel=3)
        run = _renamed(run)
    _check_run(run, "run")
    store_facts(folder, RUN_NAME, _shareable_run(run))


def save_run(directory: str | os.PathLike, run: Mapping[str, Any]) -> None:
    """Write `ogpsa_run.json` next to a whole model, which has no card.

    The file holds the facts of `save_card`'s `run`. For files and folders, only the name is stored, not the path.

    Args:
        directory (`str` or `os.PathLike`): The folder of the model.
        run (`Mapping`): How the model was trained. Further entries are stored unchanged.
    """
    replace_json(Path(directory) / RUN_NAME, _shareable_run(run))


def _renamed(run: Mapping[str, Any]) -> dict[str, Any]:
    """Give an entry of an earlier version its new name."""
    return {"lookalikes" if name == "contrast" else name: value for name, value in run.items()}


def _check_run(run: Mapping[str, Any], where: str) -> None:
    for name, value in run.items():
        if name not in _RUN:
            raise ValueError(f"{where} has the unknown entry {name!r}. Use: {', '.join(_RUN)}.")
        kinds = _RUN[name]
        if name == "projection" and isinstance(value, dict):
            _check_projection(value, where)
            continue
        strings = list(value.values()) if isinstance(value, dict) else []
        if value is not None and not (isinstance(value, kinds) and all(isinstance(s, str) for s in strings)):
            wanted = " or ".join("dict of strings" if kind is dict else kind.__name__ for kind in kinds)
            raise ValueError(f"{where} has {name}={value!r}. Give a value of type {wanted}, or leave it out.")


def _check_projection(settings: dict[str, Any], where: str) -> None:
    if settings.keys() != OGPSAConfig().ogpsa_dict().keys():
        raise ValueError(
            f"{where} has projection={settings!r}. Give all settings, as OGPSAConfig(...).ogpsa_dict() returns them."
        )
    try:
        OGPSAConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} has settings in projection that do not work: {error}") from error


def _shareable_run(run: Mapping[str, Any]) -> dict[str, Any]:
    shared = dict(run)
    for name in ("started_from", "dataset"):
        if shared.get(name):
            shared[name] = public(shared[name])
    if shared.get("references"):
        shared["references"] = {name: public(spec) for name, spec in shared["references"].items()}
    return shared
