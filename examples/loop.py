# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The same in a training loop of your own: one call when a refresh is due, nothing else.

python examples/loop.py --steps 20
"""

from __future__ import annotations

import argparse
import itertools

import torch
from peft import get_peft_model
from torch.utils.data import DataLoader

from peft_ogpsa import OGPSAConfig, ReferenceLoader, ReferenceSet, data, reference_loss
from peft_ogpsa.cli.models import SMOLLM2, load_model
from peft_ogpsa.references.losses import answer_loss, collate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    base, tokenizer, _ = load_model(arguments.model, dtype=torch.float32)
    config = OGPSAConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)

    # With the default subspace, all reference examples are passed once, before the first step. Then a few are passed
    # every five steps, for the reference weight.
    references = [ReferenceSet(name, data.load(name)) for name in ("general", "benign")]
    loader = ReferenceLoader.from_sets(references, tokenizer, config, step_examples=arguments.batch_size)
    training = DataLoader(
        ReferenceSet("training", data.load("harmful")).tokenize(tokenizer),
        batch_size=arguments.batch_size,
        shuffle=True,
        collate_fn=lambda examples: collate(examples, loader.pad_token_id, base.device),
    )
    model.train()
    for step, batch in enumerate(itertools.islice(itertools.cycle(training), arguments.steps)):
        while model.projector.due:
            batches = loader.batches(base.device, everything=model.projector.unbuilt)
            losses = model.projector.refresh(batches, reference_loss)
            print(f"step {step}: reference losses " + ", ".join(f"{k} {v:.3f}" for k, v in losses.items()))
        loss = answer_loss(model, batch)
        loss.backward()
        optimizer.step()  # projected
        optimizer.zero_grad()
    print(f"training loss {loss.item():.3f}", model.projector.diagnostics.collect())


if __name__ == "__main__":
    main()
