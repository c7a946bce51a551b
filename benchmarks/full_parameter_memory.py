# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""What OGPSA over whole weights costs under FSDP2, by each process: memory, and what is exchanged. Computed.

    python benchmarks/full_parameter_memory.py --estimate --output benchmarks/results/full_parameter_memory
    python benchmarks/full_parameter_memory.py --estimate --shape qwen2.5-7b --processes 16 --rows 8

Builds the model without storage and adds up the shards of the largest process. Activations and what FSDP2 gathers
for a layer at a time are those of training without OGPSA and not among the figures. Prints a table in Markdown and
writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from memory import SHAPES
from transformers import AutoModelForCausalLM, PretrainedConfig

from peft_ogpsa import FullParameterConfig
from peft_ogpsa.core.full_parameter import WholeTargets
from peft_ogpsa.core.layout import LARGEST_GROUP

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2}


def shard(shape: torch.Size, processes: int) -> int:
    """Elements of the largest shard of a parameter: FSDP2 cuts the first axis, as `torch.chunk` does."""
    return -(-shape[0] // processes) * shape[1:].numel()


def estimate(config: PretrainedConfig, settings: FullParameterConfig, processes: int) -> dict[str, float]:
    """Bytes by component, of the largest process.

    Args:
        config: The model's shape. Parameters, gradients and AdamW's two moments are float32 (mixed precision).
        settings: OGPSA's settings.
        processes: Among which FSDP2 shards.

    Returns:
        Memory of training as it is, what OGPSA adds, `"exchanged in a step"` (what a process puts into the one
        all-reduce) and, beside it, `"exchanged by FSDP2"` in the forward and backward passes of one micro-batch (two
        gathers in bfloat16, one scatter in float32; what a process receives or sends of either).
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = list(model.parameters())
    local = sum(shard(p.shape, processes) for p in parameters)
    projected = [p for _, _, p in WholeTargets(model, settings).trained()]
    pieces = [shard(p.shape, processes) for p in projected]
    row = sum(pieces)
    rows = settings.rows * row * _BYTES[settings.rows_dtype]
    basis = rows if settings.constraint == "orthogonal" else 0
    # A correction is made of one group at a time, which is of many pieces of one size or a single larger one.
    sizes = {piece: pieces.count(piece) for piece in pieces}
    group = max(piece * min(count, max(1, LARGEST_GROUP // piece)) for piece, count in sizes.items())
    on_host = settings.rows_device == "cpu"
    # Blocks are tensors; products of every row, and the squared length of the step.
    values = len(projected) * settings.rows + 1
    return {
        "parameters": 4 * local,
        "gradients": 4 * local,
        "AdamW": 8 * local,
        "rows": 0 if on_host else rows + basis,
        "rows in the host's memory": rows + basis if on_host else 0,
        "Gram matrices, norms, coefficients": 8 * len(projected) * settings.rows * (settings.rows + 3),
        "step: snapshot": 4 * row,
        "step: correction": 4 * group,
        "step: rows of a group": settings.rows * group * _BYTES[settings.rows_dtype] if on_host else 0,
        "exchanged in a step": 4 * values,
        "exchanged by FSDP2": (2 * 2 + 4) * sum(p.numel() for p in parameters) * (processes - 1) / processes,
    }


def markdown(estimates: dict[str, dict[str, float]]) -> str:
    """A table with one column an estimate, in GiB, but what is exchanged in a step, in KiB."""
    names = [name for name in next(iter(estimates.values())) if any(own[name] for own in estimates.values())]
    lines = ["| per process | " + " | ".join(estimates) + " |", "|---|" + "---|" * len(estimates)]
    for name in names:
        unit, label = (1024, "KiB") if name == "exchanged in a step" else (GIB, "GiB")
        cells = [f"{own[name] / unit:,.2f}" for own in estimates.values()]
        lines.append(f"| {name}, {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimate", action="store_true", required=True, help="compute; nothing is measured")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-7b")
    parser.add_argument("--processes", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rows-dtype", choices=_BYTES, default="bfloat16")
    parser.add_argument("--constraint", choices=("cone", "orthogonal"), default="cone")
    parser.add_argument("--exclude", nargs="*", default=["embed_tokens", "lm_head"])
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json")
    arguments = parser.parse_args()

    estimates = {}
    for processes in arguments.processes:
        for device in ("model", "cpu"):
            settings = FullParameterConfig(
                rows=arguments.rows,
                rows_dtype=arguments.rows_dtype,
                constraint=arguments.constraint,
                exclude=arguments.exclude,
                rows_device=device,
            )
            place = "" if device == "model" else ", rows in the host's memory"
            estimates[f"{processes} GPUs{place}"] = estimate(SHAPES[arguments.shape], settings, processes)
    print(markdown(estimates))
    if arguments.output:
        chosen = {**vars(arguments), "output": None}
        text = json.dumps({"settings": chosen, "bytes": estimates}, indent=2, default=str)
        arguments.output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
