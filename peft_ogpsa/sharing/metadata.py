# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The metadata of a model card."""

from __future__ import annotations

from huggingface_hub import CardData
from peft import LoraConfig

from .names import on_hub


def renew_metadata(
    data: CardData, config: LoraConfig, base: str, ogpsa: bool, dataset: str | None, earlier: str | None
) -> None:
    """Bring a card's metadata up to date. Entries of others are kept.

    Args:
        data: The metadata, which is changed.
        config: The adapter's settings.
        base: The name of the base.
        ogpsa: Whether training used a projection.
        dataset: The training data, as in `save_card`.
        earlier: The training data of the run before, whose entry is removed.
    """
    data["library_name"] = "peft"
    kept = data.get("base_model")
    if not isinstance(kept, list) and not on_hub(kept or ""):
        kept = None  # PEFT puts a local folder there, which the hub rejects
    data["base_model"] = kept or (base if on_hub(base) else None)
    if config.task_type == "CAUSAL_LM":
        data["pipeline_tag"] = data.get("pipeline_tag") or "text-generation"
    tags = [tag for tag in data.get("tags", []) if not str(tag).startswith("base_model:adapter:")]
    tags += [tag for tag in ("lora", "ogpsa") if tag not in tags]
    tags += [f"base_model:adapter:{base}"] if on_hub(base) else []
    data["tags"] = [tag for tag in tags if ogpsa or tag != "ogpsa"]
    source, former = _hub_dataset(dataset), _hub_dataset(earlier)
    kept = data.get("datasets") or []
    kept = kept if isinstance(kept, list) else [kept]
    datasets = [name for name in kept if name != former or name == source]
    datasets += [source] if source and source not in datasets else []
    if datasets != kept:
        data["datasets"] = datasets or None


def _hub_dataset(spec: str | None) -> str | None:
    """Return the name on the hub of training data, or None if it is not there."""
    name = (spec or "").partition("[")[0].partition(":")[0]
    return name if "/" in name and on_hub(name) else None
