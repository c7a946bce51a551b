# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Build the activation subspace of a 4-bit model of any shape with random weights, and take steps in it.

python -m benchmarks.gpu.building --shape llama3.1-8b --output building

With random weights, the energy of the inputs is spread more evenly than with trained ones. So every input gets the
largest number of directions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from benchmarks.memory import SHAPES, Clock, DeviceMeter, autocast, build
from peft_ogpsa import OGPSAConfig
from peft_ogpsa.references.losses import answer_loss

STEPS = 5


def run(shape: str, device: str, examples: int, length: int, batch: int, rows_dtype: str) -> dict[str, Any]:
    """Measure the build (seconds, peak bytes, bytes held), and a step with and without projection (seconds)."""
    config = OGPSAConfig(
        reference_weight=0,
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        rows_dtype=rows_dtype,
    )
    model: Any = get_peft_model(build(SHAPES[shape], device), config)
    generator = torch.Generator().manual_seed(0)

    def references(count: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(model.config.vocab_size, (count, length), generator=generator).to(device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with autocast(device):
            return answer_loss(model, inputs)

    batches = [references(min(batch, examples - i)) for i in range(0, examples, batch)]
    before = torch.cuda.memory_allocated() if device == "cuda" else None
    watch, meter = Clock(device), DeviceMeter()
    peak = meter.phase("build") if device == "cuda" else contextlib.nullcontext()
    with watch.phase("build"), peak:
        model.projector.refresh({"references": batches}, loss)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for enabled in (True, False):
        model.projector.enabled = enabled
        for _ in range(2 + STEPS):
            for parameter in trained:
                parameter.grad = torch.randn_like(parameter)
            with watch.phase(f"step {enabled}"):
                optimizer.step()
    directions = model.projector.activations
    seconds = {
        name: statistics.median([own for phase, own in watch.seconds if phase == name][2:])
        for name in ("step True", "step False")
    }
    return {
        "tokens": examples * length,
        "seconds": watch.seconds[0][1],
        "memory_before": before,
        "peak_memory": meter.peaks.get("build"),
        "held": directions.bytes(),
        "kinds": [str(kind) for kind in directions.kinds()],
        "step_with_projection": seconds["step True"],
        "step_without": seconds["step False"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Name of the .json file, without its ending.")
    parser.add_argument("--shape", choices=SHAPES, default="llama3.1-8b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--examples", type=int, default=144, help="Number of reference examples.")
    parser.add_argument("--length", type=int, default=128, help="Tokens per reference example.")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows-dtype", choices=("float32", "bfloat16"), default="bfloat16")
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    report = {"arguments": arguments, **run(**arguments)}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
