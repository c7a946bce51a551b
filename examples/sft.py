# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Safety SFT with TRL, and the abilities to keep as prompts that the base model answers itself.

    python examples/sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --output_dir safe --max_steps 60

Every option of TRL's `SFTConfig` works. Without a GPU, add `--bf16 false`.
Data: the small built-in set; put your own rows and prompts in its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer, TrlParser

from peft_ogpsa import OGPSACallback, OGPSAConfig, ReferenceSet, data


@dataclass
class ScriptArguments:
    """What TRL's own arguments lack."""

    model_name_or_path: str = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "Instruct model to train."}
    )
    reference_samples: int = field(default=64, metadata={"help": "Prompts of each reference set."})
    answer_tokens: int = field(default=64, metadata={"help": "Tokens at which the base's answers to them are cut."})


def main() -> None:
    script, training = TrlParser((ScriptArguments, SFTConfig)).parse_args_and_config()
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    # The base answers the prompts on the device that it is on.
    model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype="auto", device_map=training.device)
    config = OGPSAConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    set_seed(training.seed)  # the adapter starts at random
    model = get_peft_model(model, config)
    safety = Dataset.from_list(data.load("harmful")).select_columns(["prompt", "completion"])
    references = [
        ReferenceSet.from_prompts(
            name,
            data.load_prompts(name),
            model,
            tokenizer,
            samples=script.reference_samples,
            max_new_tokens=script.answer_tokens,
        )
        for name in ("general", "arithmetic", "lookalikes")
    ]
    trainer = SFTTrainer(
        model,
        args=training,
        train_dataset=safety,
        processing_class=tokenizer,
        callbacks=[OGPSACallback(references)],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()  # a plain LoRA adapter


if __name__ == "__main__":
    main()
