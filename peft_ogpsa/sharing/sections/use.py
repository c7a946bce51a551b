# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The sections of the card on how to load the adapter, and on versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

from ..names import on_hub, public

_MODEL_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def use_section(config: LoraConfig, base: str, run: Mapping[str, Any]) -> str:
    """Show how to load the adapter."""
    task = str(getattr(config.task_type, "value", config.task_type))
    auto = run.get("model_class") or ""
    auto = auto if auto.isidentifier() else _MODEL_CLASSES.get(task, "AutoModel")
    name = base if on_hub(base) else f"PATH/TO/{public(base) or 'BASE'}"
    revision = f", revision={config.revision!r}" if on_hub(base) and config.revision else ""
    return (
        "## Use\n\nThis is a plain LoRA adapter. PEFT loads it without other packages. `ADAPTER` is this folder or "
        "repository.\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f"base = {name!r}\n"
        f'model = PeftModel.from_pretrained({auto}.from_pretrained(base{revision}, dtype="auto"), "ADAPTER")\n'
        f"tokenizer = AutoTokenizer.from_pretrained(base{revision})\n"
        "```\n\n"
        "To merge the adapter, load the base without quantization, even if the adapter was trained on a 4-bit base "
        "(QLoRA). In a quantized base, rounding would lose what the adapter learned. "
        '`peft_ogpsa.merge_adapter("ADAPTER", "merged")` merges it in this way.'
    )


def versions_section(config: LoraConfig, run: Mapping[str, Any]) -> str:
    """List the versions of the libraries."""
    versions = {k: v for k, v in (run.get("versions") or {}).items() if k.lower() != "peft"}
    return "\n".join([f"- PEFT {config.peft_version}", *(f"- {name} {value}" for name, value in versions.items())])
