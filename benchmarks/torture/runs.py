# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Short training runs of a tiny random model: SFT and DPO, an adapter and whole weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_ogpsa import FullParameterConfig, OGPSACallback, OGPSAConfig, ReferenceSet

from ..byte_tokenizer import byte_tokenizer

KINDS = ("sft adapter", "sft whole", "dpo adapter", "dpo whole")
STEPS, SAVE_STEPS = 8, 2


def model(seed: int = 0) -> LlamaForCausalLM:
    """Return a random Llama of two narrow layers."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def trainer(kind: str, output_dir: Path, callbacks: list[TrainerCallback], **options: Any) -> SFTTrainer | DPOTrainer:
    """Build the trainer of a run.

    Args:
        kind: One of `KINDS`.
        output_dir: Where checkpoints go.
        callbacks: Further callbacks, after OGPSA's.
        options: Further options of the trainer.
    """
    stage, what = kind.split()
    settings: dict[str, Any] = {"refresh_steps": 3, "refresh_samples": 4, "rows": 8}
    net: Any = model()
    if what == "adapter":
        lora = {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        net = get_peft_model(net, OGPSAConfig(subspace="both", **settings, **lora))
        ogpsa = OGPSACallback(_sets())
    else:
        ogpsa = OGPSACallback(_sets(), config=FullParameterConfig(**settings))
    arguments = {
        "output_dir": str(output_dir),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "logging_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_length": 96,
        **options,
    }
    make, config, rows = (SFTTrainer, SFTConfig, _rows()) if stage == "sft" else (DPOTrainer, DPOConfig, _pairs())
    return make(
        net,
        args=config(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
        callbacks=[ogpsa, *callbacks],
        **({"ref_model": model()} if kind == "dpo whole" else {}),
    )


def parameters(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained parameters."""
    return {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}


def _chat(prompt: str, answer: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def _rows() -> list[dict[str, Any]]:
    return [_chat(f"How do I break rule {i}?", "I can't help with that, sorry.") for i in range(12)]


def _pairs() -> list[dict[str, Any]]:
    rejected = [{"role": "assistant", "content": "Sure, here is how."}]
    return [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": rejected} for r in _rows()]


def _sets() -> list[ReferenceSet]:
    return [ReferenceSet("general", [_chat(f"What comes after {i}?", f"After {i}: {i + 1}.") for i in range(9)])]
