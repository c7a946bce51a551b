# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The section of the card on the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from ..names import on_hub, public
from .markdown import code

_PATTERNS = ("rank_pattern", "alpha_pattern")
_STAGES = {"sft": "supervised fine-tuning (SFT)", "dpo": "direct preference optimization (DPO)"}


def training_section(config: LoraConfig, base: str, referenced: bool, run: Mapping[str, Any]) -> str:
    """Describe the training, as far as it is recorded. `referenced`: whether training used reference sets."""
    modules = config.target_modules
    names = [modules] if isinstance(modules, str) else sorted(modules or [])
    kinds = [name for name, used in (("rsLoRA", config.use_rslora), ("DoRA", config.use_dora)) if used]
    patterns = ", ".join(f"{name} {code(str(own))}" for name in _PATTERNS if (own := getattr(config, name)))
    variant = "".join(f", {own}" for own in (*kinds, patterns) if own)
    lines = [
        f"- Base model: {_base_link(base)}{f', revision {code(config.revision)}' if config.revision else ''}",
        f"- LoRA: rank {config.r}, alpha {config.lora_alpha}{variant}; "
        f"on {', '.join(map(code, names)) or 'parameters'}",
    ]
    if others := _trained_whole(config):
        lines.append(f"- Also trained, beside LoRA's matrices and without projection: {', '.join(others)}")
    if run.get("started_from"):
        lines.append(f"- Started from the adapter {code(public(run['started_from']))}")
    if run.get("stage") or run.get("steps"):
        stage = _STAGES.get(run.get("stage") or "", run.get("stage") or "training")
        steps = f", {run['steps']} optimizer steps" if run.get("steps") else ""
        if run.get("best_step") and run["best_step"] != run.get("steps"):
            steps += f" (the weights are those of step {run['best_step']}, the best in evaluation)"
        seconds = f", {run['seconds']:.0f} seconds" if run.get("seconds") else ""
        lines.append(f"- Stage: {stage}{steps}{seconds}")
    lines.append(f"- Training data: {code(public(run['dataset'])) if run.get('dataset') else 'not recorded'}")
    if run.get("own_refusals"):
        lines.append(
            "- Refusals: written by the base model itself, under a safety instruction that is not in the rows"
        )
    if run.get("lookalikes"):
        lines.append(
            f"- {run['lookalikes']:.0%} of the training data: benign look-alikes with the base model's own answers"
        )
    if referenced:
        sets = [f"{code(name)} from {code(public(spec))}" for name, spec in (run.get("references") or {}).items()]
        lines.append(f"- Reference sets (the abilities to preserve): {', '.join(sets) or 'not recorded'}")
    if run.get("reference_share"):
        lines.append(
            f"- Cost of the references: {run['reference_share']:.0%} more examples in the forward and backward passes"
        )
    return "## Training\n\n" + "\n".join(lines)


def _trained_whole(config: LoraConfig) -> list[str]:
    """What is trained besides LoRA's matrices."""
    found = [code(name) for name in config.modules_to_save or ()]
    if getattr(config, "trainable_token_indices", None):
        found.append("embeddings of some tokens")
    if config.bias != "none":
        found.append(f"biases ({code(config.bias)})")
    return found


def _base_link(base: str) -> str:
    if not base:
        return "not recorded"
    return f"[{base}](https://huggingface.co/{base})" if on_hub(base) else f"{code(public(base))}, a local model"
