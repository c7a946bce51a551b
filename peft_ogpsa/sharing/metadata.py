# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The metadata of a model card."""

from __future__ import annotations

from huggingface_hub import CardData
from peft import LoraConfig

from .names import on_hub


def renew_metadata(data: CardData, config: LoraConfig, base: str, ogpsa: bool, dataset: str | None) -> None:
    """Bring a card's metadata up to date. Entries of others are kept.

    Args:
        data: The metadata, which is changed.
        config: The adapter's settings.
        base: The name of the base.
        ogpsa: Whether training used a projection.
        dataset: The training data, as in `save_card`.
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
    source = (dataset or "").partition("[")[0].partition(":")[0]
    if "/" in source and on_hub(source):
        kept = data.get("datasets", [])
        kept = kept if isinstance(kept, list) else [kept]
        data["datasets"] = kept + [source] * (source not in kept)
