# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The models of `ogpsa eval`: a base, and adapters that are loaded onto it one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from ..evaluation.pieces import BASE
from .loading import load_adapter, read_adapter_config


@dataclass(frozen=True)
class Adapter:
    """A saved adapter."""

    path: str
    title: str
    """Its name in tables."""
    config: LoraConfig


def read_adapters(paths: Sequence[str], titles: Sequence[str] | None) -> list[Adapter]:
    """Read the settings of saved adapters. Without titles, each has its folder's name, or its path if that is unclear.

    Raises:
        ValueError: If one of them is not a LoRA adapter, or has the name of the base.
    """
    names = [Path(path).name for path in paths]
    titles = titles or [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]
    if BASE in titles:
        raise ValueError(
            f"name={BASE!r} for adapter={paths[titles.index(BASE)]!r} is the base's own name in tables. Give another "
            "name."
        )
    return [Adapter(path, title, read_adapter_config(path)) for path, title in zip(paths, titles, strict=True)]


def base_name(adapters: Sequence[Adapter]) -> str | None:
    """Return the base that the adapters name.

    Raises:
        ValueError: If they name different ones.
    """
    named = {adapter.path: adapter.config.base_model_name_or_path for adapter in adapters}
    if len(set(named.values())) > 1:
        told = ", ".join(f"{path}: {base}" for path, base in named.items())
        raise ValueError(
            f"adapter names adapters of different bases ({told}). Measure them one by one, or give model."
        )
    return next(iter(named.values()), None)


def each_on(base: PreTrainedModel, adapters: Sequence[Adapter]) -> Iterator[tuple[Adapter, PeftModel]]:
    """Load one adapter after the other onto the base, and take it off again.

    One at a time, because a model cannot hold adapters of two types, such as plain LoRA and OGPSA.

    Raises:
        ValueError: If an adapter does not fit the base.
    """
    for adapter in adapters:
        model = load_adapter(base, adapter.path, adapter.config, trainable=False)
        yield adapter, model
        base = cast(PreTrainedModel, model.unload())


def check_fit(base: PreTrainedModel, adapters: Sequence[Adapter]) -> None:
    """Load every adapter once, so that one that does not fit is an error before anything is measured.

    Raises:
        ValueError: If an adapter does not fit the base.
    """
    for _ in each_on(base, adapters):
        pass
