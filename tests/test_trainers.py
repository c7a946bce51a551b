"""TRL's other trainers: the step hooks make them work, without a subclass."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from loops import LORA
from models import chat, tiny_llama, tiny_tokenizer
from peft import get_peft_model
from trl import GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

from peft_ogpsa import OGPSACallback, OGPSAConfig, ReferenceSet

ROWS = [chat(f"How do I break rule {i}?", "I can't help with that, sorry.") for i in range(8)]
GENERAL = [chat(f"What comes after {i}?", f"After {i} comes {i + 1}.") for i in range(6)]
COMMON = {
    "max_steps": 2,
    "learning_rate": 1e-2,
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
}


def kto(model, folder, callbacks):
    rows = [{**row, "label": bool(i % 2)} for i, row in enumerate(ROWS)]
    return KTOTrainer(
        model,
        args=KTOConfig(output_dir=folder, per_device_train_batch_size=4, **COMMON),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def online(trainer, config):
    def build(model, folder, callbacks):
        return trainer(
            model,
            reward_funcs=lambda completions, **_: [float(len(str(c)) % 7) for c in completions],
            args=config(
                output_dir=folder,
                per_device_train_batch_size=4,
                num_generations=2,
                max_completion_length=6,
                **COMMON,
            ),
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
            processing_class=tiny_tokenizer(),
            callbacks=callbacks,
        )

    return build


TRAINERS = {"KTO": kto, "GRPO": online(GRPOTrainer, GRPOConfig), "RLOO": online(RLOOTrainer, RLOOConfig)}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainer(name, tmp_path):
    base = tiny_llama(vocab_size=259, max_position_embeddings=256)
    model = get_peft_model(base, OGPSAConfig(rows=8, refresh_samples=4, **LORA))
    trainer = TRAINERS[name](model, str(tmp_path), [OGPSACallback([ReferenceSet("general", GENERAL)])])
    trainer.train()
    projector = trainer.model.projector
    assert projector.steps == 2
    assert projector.subspace.filled == 8
    assert all(".default." in parameter for parameter in projector.subspace.blocks.names())
    assert any("ogpsa/removed" in entry for entry in trainer.state.log_history)
    assert all(torch.isfinite(p).all() for p in projector.subspace.blocks.flat_parameters())
