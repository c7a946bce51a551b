# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Safety SFT in several processes: all weights, sharded by FSDP2, or LoRA under DDP.

    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/full_parameter.py --output_dir safe
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/full_parameter.py --lora --output_dir safe

Every option of TRL's `SFTConfig` works. Data: the small built-in set; put your own rows in its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer, TrlParser

from peft_ogpsa import FullParameterConfig, OGPSACallback, OGPSAConfig, ReferenceSet, data
from peft_ogpsa.cli.launch import shard_on_cpu
from peft_ogpsa.cli.models import SMOLLM2, load_model


@dataclass
class ScriptArguments:
    """What TRL's own arguments lack."""

    model_name_or_path: str = field(default=SMOLLM2, metadata={"help": "Instruct model to train."})
    lora: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of all weights."})
    layers: int | None = field(default=None, metadata={"help": "Keep only so many layers, to try the script."})
    reference_samples: int = field(default=200, metadata={"help": "Examples used from each reference set."})
    rows: int = field(default=4, metadata={"help": "Reference gradients held."})
    paper: bool = field(default=False, metadata={"help": "The paper's rule and schedule (all weights)."})


def main() -> None:
    script, training = TrlParser((ScriptArguments, SFTConfig)).parse_args_and_config()
    model, tokenizer, _ = load_model(script.model_name_or_path, dtype=torch.float32)
    if script.layers is not None:
        model.model.layers = model.model.layers[: script.layers]
        model.config.num_hidden_layers = script.layers

    adapter = config = None
    if script.lora:
        adapter = OGPSAConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    elif script.paper:
        config = FullParameterConfig.paper("sft")
    else:
        # Rows of the embeddings would cost as much as those of several layers.
        config = FullParameterConfig(rows=script.rows, exclude=["embed_tokens"])
    references = [
        ReferenceSet(name, data.load(name), samples=script.reference_samples) for name in ("general", "benign")
    ]
    trainer = SFTTrainer(
        model,
        args=training,
        train_dataset=Dataset.from_list(data.load("harmful")).select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[OGPSACallback(references, config=config)],
    )
    shard_on_cpu(trainer)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
