"""TRL's trainers on any number of processes of the CPU, over a tiny model."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from models import chat, tiny_llama, tiny_tokenizer
from parallel import LORA, SHAPE, whole
from peft import PeftModel
from torch.distributed.tensor import DTensor
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_ogpsa import FullParameterConfig, OGPSACallback, OGPSAConfig, ReferenceSet
from peft_ogpsa.core import distributed

GLOBAL_BATCH = 4
TRAINING = [chat(f"How do I break rule {i}?", "I can't help with that, sorry."[: 12 + i]) for i in range(16)]
PAIRS = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": chat("", f"Sure, {i}.")["completion"]}
    for i, row in enumerate(TRAINING)
]
GENERAL = [chat(f"What comes after {i}?", f"After {i} comes {i + 1}.") for i in range(9)]
BENIGN = [chat(f"How do I kill process {i}?", f"Run kill {i} in a shell.") for i in range(7)]


def trained(
    stage: str, kind: str, how: str, folder: Path, resume: str | None = None, **options
) -> dict[str, torch.Tensor]:
    """Trains for three steps of two micro-batches, perhaps from a checkpoint, and returns the assembled parameters.

    The kind "null space" saves its adapter. The kind "saved" trains this adapter on, with other references, and
    returns the parameters of its reference policy, too.
    """
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()  # one trainer a process is what accelerate expects

    def base():
        return tiny_llama(vocab_size=259, max_position_embeddings=256, **SHAPE)

    # Three examples of either set: no share is even.
    overrides = {"subspace": "gradients", "rows": 8, "refresh_steps": 2, "refresh_samples": 6}
    if kind == "null space":
        overrides = {"subspace_rank": 8, "reference_weight": 0.0}
    config = FullParameterConfig(**overrides) if kind == "full" else None
    benign = [*BENIGN[:-1], chat("How do I kill process 9?", "Run kill 9.")] if kind == "saved" else BENIGN
    settings = {
        "output_dir": str(folder / f"{stage} {kind} {how}"),
        "max_steps": 3,
        "per_device_train_batch_size": GLOBAL_BATCH // distributed.count(),
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-4,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **options,
    }
    shared = {
        "processing_class": tiny_tokenizer(),
        "peft_config": OGPSAConfig(**LORA, **overrides) if kind in ("lora", "null space") else None,
        "callbacks": [
            OGPSACallback([ReferenceSet("general", GENERAL), ReferenceSet("benign", benign)], config=config)
        ],
    }
    if stage == "sft":
        trainer = SFTTrainer(base(), args=SFTConfig(**settings), train_dataset=Dataset.from_list(TRAINING), **shared)
    else:
        reference = base() if kind == "full" else None
        model = PeftModel.from_pretrained(base(), folder / "adapter", is_trainable=True) if kind == "saved" else base()
        trainer = DPOTrainer(
            model, reference, args=DPOConfig(**settings), train_dataset=Dataset.from_list(PAIRS), **shared
        )
    if how == "fsdp2":
        shard_on_cpu(trainer)
    trainer.train(resume_from_checkpoint=resume)
    sharded = any(isinstance(p, DTensor) for p in trainer.model.parameters())
    assert sharded == (how == "fsdp2")
    assert kind == "saved" or any(name.startswith("ogpsa/removed") for name in trainer.state.log_history[-2])
    if kind == "null space":
        if distributed.rank() == 0:
            trainer.model.save_pretrained(folder / "adapter")
        torch.distributed.barrier()
    if kind == "saved":
        trainer.model.requires_grad_(True)
    return whole(trainer.model)


def shard_on_cpu(trainer) -> None:
    """accelerate has FSDP2 on accelerators alone."""
    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    trainer.is_fsdp_enabled = True
