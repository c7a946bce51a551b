# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The models of `ogpsa eval`: a base, and adapters that are loaded onto it one after the other."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from ..evaluation import fingerprint
from ..evaluation.pieces import BASE
from ..sharing.folder import weights_digest
from ..sharing.run_record import read_run
from ..tuner.adapters import moving_setting
from ..tuner.merge import saved_tokenizer
from .loading import load_adapter, read_adapter_config

T = TypeVar("T")


@dataclass(frozen=True)
class Adapter:
    """A saved adapter."""

    path: str
    title: str
    """Its name in tables."""
    config: LoraConfig
    weights: str | None
    """The checksum of its weights. None: the adapter is on the hub."""
    started_from: str | None
    """The checksum of the adapter that its training continued, if that is recorded."""


def read_adapters(paths: Sequence[str], titles: Sequence[str] | None) -> list[Adapter]:
    """Read the settings of saved adapters.

    Args:
        paths: Their folders or hub names.
        titles: Their names in tables. By default, this is the folder's name, with the folders above it as far as they
            are needed to distinguish the adapters.

    Raises:
        ValueError: If one of them is not a LoRA adapter, has the name of the base, or has a damaged record of its
            training.
    """
    titles = titles or _distinct_ends(paths)
    if BASE in titles:
        raise ValueError(
            f"name={BASE!r} for adapter={paths[titles.index(BASE)]!r} is the base's own name in tables. Give another "
            "name."
        )
    return [_read_adapter(path, title) for path, title in zip(paths, titles, strict=True)]


def _read_adapter(path: str, title: str) -> Adapter:
    config = read_adapter_config(path)
    return Adapter(path, title, config, weights_digest(path), read_run(path).get("started_from_weights"))


def _distinct_ends(paths: Sequence[str]) -> list[str]:
    """Return the shortest end of each path that no other path has, or the whole path if there is none."""
    every = [Path(path).parts for path in paths]
    ends = [[Path(*parts[-count:]).as_posix() for count in range(1, len(parts) + 1)] for parts in every]
    counts = Counter(end for own in ends for end in own)
    return [next((end for end in own if counts[end] == 1), path) for own, path in zip(ends, paths, strict=True)]


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


def base_revision(adapters: Sequence[Adapter], name: str | None) -> str:
    """Return the revision of a base that the adapters of this base name.

    Raises:
        ValueError: If they name different ones.
    """
    own = [adapter for adapter in adapters if adapter.config.base_model_name_or_path == name]
    named = {adapter.path: adapter.config.revision or "main" for adapter in own}
    if len(set(named.values())) > 1:
        told = ", ".join(f"{path}: {revision}" for path, revision in named.items())
        raise ValueError(
            f"adapter names adapters of different revisions of {name!r} ({told}). Measure them one by one."
        )
    return next(iter(named.values()), "main")


def refuse_moved_base(adapters: Sequence[Adapter]) -> None:
    """Reject adapters whose KL from base cannot be measured, because the model without them is not the base.

    Raises:
        ValueError: If there is one.
    """
    for adapter in adapters:
        setting = moving_setting(adapter.config) or ("layer_replication" if adapter.config.layer_replication else None)
        if setting is not None:
            raise ValueError(
                f"adapter={adapter.path!r} has {setting}={getattr(adapter.config, setting)!r}, which changes the base "
                "itself. So the model without the adapter is not the base, and the KL from base cannot be measured. "
                "Merge the adapter (peft_ogpsa.merge_adapter) and give the merged model as model. Or, after "
                "init_lora_weights='pissa' or 'olora', save the adapter with PEFT's "
                "path_initial_model_for_weight_conversion. Or give data without general rows."
            )


def common_tokenizer(adapters: Sequence[Adapter], base: Any) -> tuple[Any, str | None]:
    """Return the tokenizer with which the base and all adapters are asked.

    This is the base's, unless a tokenizer is saved beside the adapters that has another chat template or end token:
    the adapters were trained with it.

    Args:
        adapters: The adapters.
        base: The base's tokenizer.

    Returns:
        The tokenizer, and the path of an adapter if it is that adapter's.

    Raises:
        ValueError: If the adapters need different ones, or one of them cannot be loaded.
    """
    found = {adapter.path: saved_tokenizer(adapter.path) or base for adapter in adapters}
    kinds = {path: asked_as(own) for path, own in found.items()}
    if len(set(kinds.values())) > 1:
        first, *others = found
        other = next(path for path in others if kinds[path] != kinds[first])
        raise ValueError(
            f"adapter names adapters with different chat templates or end tokens: {first} and {other}. (An adapter "
            "without a tokenizer in its folder has the base's.) Measure them one by one."
        )
    for path, kind in kinds.items():
        if kind != asked_as(base):
            return found[path], path
    return base, None


def asked_as(tokenizer: Any) -> str:
    """Return a checksum of what a tokenizer puts around a prompt and an answer: the chat template, the end token."""
    return fingerprint.of_data(tokenizer.chat_template, tokenizer.eos_token)


class Base:
    """The base, as it was loaded. If an adapter has changed it, it is loaded again.

    PEFT leaves trained biases, the modules of `modules_to_save` and what PiSSA left of the weights in the base when
    an adapter is taken off.

    Args:
        model: The base.
        load: Loads it again.
    """

    def __init__(self, model: PreTrainedModel, load: Callable[[], PreTrainedModel]):
        self.model = model
        self._load = load

    def on_each(self, adapters: Sequence[Adapter], act: Callable[[Adapter, PeftModel], T]) -> list[T]:
        """Load one adapter after the other onto the base, call a function, and take the adapter off again.

        One at a time, because a model cannot hold adapters of two types, such as plain LoRA and OGPSA.

        Raises:
            ValueError: If an adapter does not fit the base.
        """
        results = []
        for adapter in adapters:
            # Not once for all: on a CPU, bitsandbytes stores 4-bit weights in another order at their first use.
            before = fingerprint.of_weights(self.model)
            model = load_adapter(self.model, adapter.path, adapter.config, trainable=False)
            results.append(act(adapter, model))
            self.model = cast(PreTrainedModel, model.unload())
            del model
            if fingerprint.of_weights(self.model) != before:
                del self.model  # the memory may not hold two
                gc.collect()
                self.model = self._load()
        return results

    def check_fit(self, adapters: Sequence[Adapter]) -> None:
        """Load every adapter once, so that one that does not fit is an error before anything is measured.

        Raises:
            ValueError: If an adapter does not fit the base.
        """
        self.on_each(adapters, lambda adapter, model: None)
