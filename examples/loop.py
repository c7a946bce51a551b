# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The same in a training loop of your own: one call when a refresh is due, nothing else.

python examples/loop.py --steps 20
"""

from __future__ import annotations

import argparse

import torch
from peft import get_peft_model

from peft_ogpsa import OGPSAConfig, ReferenceSet, data
from peft_ogpsa.cli.models import SMOLLM2, load_model
from peft_ogpsa.reference import answer_loss, collate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    base, tokenizer, _ = load_model(arguments.model, dtype=torch.float32)
    # Given answers are also learnt with a reference weight; the default is for the model's own (examples/sft.py).
    config = OGPSAConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", reference_weight=1.0)
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)

    def batches(rows: list[dict]):
        examples = ReferenceSet("rows", rows).tokenize(tokenizer)
        while True:
            for i in range(0, len(examples) - arguments.batch_size + 1, arguments.batch_size):
                yield collate(examples[i : i + arguments.batch_size], tokenizer.pad_token_id, base.device)

    training, general, benign = (batches(data.load(name)) for name in ("harmful", "general", "benign"))
    model.train()
    for step in range(arguments.steps):
        if model.projector.due:
            losses = model.projector.refresh({"general": [next(general)], "benign": [next(benign)]}, answer_loss)
            print(f"step {step}: reference losses " + ", ".join(f"{k} {v:.3f}" for k, v in losses.items()))
        loss = answer_loss(model, next(training))
        loss.backward()
        optimizer.step()  # projected
        optimizer.zero_grad()
    print(f"training loss {loss.item():.3f}", model.projector.diagnostics.collect())


if __name__ == "__main__":
    main()
