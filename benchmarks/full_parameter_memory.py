# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Compute the memory and the traffic of each process, for OGPSA over whole weights under FSDP2.

    python benchmarks/full_parameter_memory.py --estimate --output benchmarks/results/full_parameter_memory
    python benchmarks/full_parameter_memory.py --estimate --shape qwen2.5-7b --processes 16 --rows 8

The script builds the model without storage, and adds up the shards of the process that holds most. The figures leave
out activations, and the layers that FSDP2 gathers one at a time: these are the same in training without OGPSA. The
script prints a Markdown table and writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
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
    """Count the elements of a parameter's largest shard. FSDP2 splits the first axis, as `torch.chunk` does."""
    return -(-shape[0] // processes) * shape[1:].numel()


def groups(parameters: Sequence[torch.Tensor], processes: int) -> list[int]:
    """Count the elements of each group of parameters: many pieces of one size, or one larger piece."""
    found = []
    for (_, piece), count in Counter((p.numel(), shard(p.shape, processes)) for p in parameters).items():
        most = max(1, LARGEST_GROUP // piece)
        found += [piece * min(most, count - first) for first in range(0, count, most)]
    return found


def pinned(size: int) -> int:
    """Count the bytes that torch allocates for a pinned tensor: the next power of two."""
    return 1 << (size - 1).bit_length()


def estimate(config: PretrainedConfig, settings: FullParameterConfig, processes: int) -> dict[str, float]:
    """Compute the bytes of each component, for the process that holds most.

    Args:
        config: The model's shape. Parameters, gradients and AdamW's two moments are float32 (mixed precision).
        settings: OGPSA's settings.
        processes: Number of processes over which FSDP2 shards.

    Returns:
        Memory of training without OGPSA, and what OGPSA adds. `"exchanged in a step"` is what a process puts into the
        one all-reduce. For comparison, `"exchanged by FSDP2"` is what a process receives or sends in the forward and
        backward passes of one micro-batch (two gathers in bfloat16, one scatter in float32).
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = list(model.parameters())
    local = sum(shard(p.shape, processes) for p in parameters)
    projected = [p for _, _, p in WholeTargets(model, settings).trained()]
    row = sum(shard(p.shape, processes) for p in projected)
    each = settings.rows * _BYTES[settings.rows_dtype]  # bytes of one element in all rows
    rows = row * each
    basis = rows if settings.constraint == "orthogonal" else 0
    sizes = groups(projected, processes)
    group = max(sizes)  # corrections are computed group by group
    on_host = settings.rows_device == "cpu"
    # Every tensor is a block: its products with every row. And once, the squared length of the step.
    values = len(projected) * settings.rows + 1
    return {
        "parameters": 4 * local,
        "gradients": 4 * local,
        "AdamW": 8 * local,
        "rows": 0 if on_host else rows + basis,
        "rows in the host's memory": rows + basis if on_host else 0,
        # The rows are pinned, one tensor a group. The basis is not.
        "rows in the host's memory, as allocated": sum(pinned(each * own) for own in sizes) + basis if on_host else 0,
        "Gram matrices, norms, coefficients": 8 * len(projected) * settings.rows * (settings.rows + 3),
        "step: snapshot": 4 * row,
        "step: correction": 4 * group,
        "step: rows of a group": group * each if on_host else 0,
        "exchanged in a step": 4 * values,
        "exchanged by FSDP2": (2 * 2 + 4) * sum(p.numel() for p in parameters) * (processes - 1) / processes,
    }


def markdown(estimates: dict[str, dict[str, float]]) -> str:
    """Return a table with one column per estimate, in GiB. What is exchanged in a step is in KiB."""
    names = [name for name in next(iter(estimates.values())) if any(own[name] for own in estimates.values())]
    lines = ["| per process | " + " | ".join(estimates) + " |", "|---|" + "---|" * len(estimates)]
    for name in names:
        unit, label = (1024, "KiB") if name == "exchanged in a step" else (GIB, "GiB")
        cells = [f"{own[name] / unit:,.2f}" for own in estimates.values()]
        lines.append(f"| {name}, {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimate", action="store_true", required=True, help="required: nothing is measured")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-7b")
    parser.add_argument("--processes", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rows-dtype", choices=_BYTES, default="bfloat16")
    parser.add_argument("--constraint", choices=("cone", "orthogonal"), default="cone")
    parser.add_argument("--exclude", nargs="*", default=["embed_tokens", "lm_head"])
    parser.add_argument("--output", type=Path, help="path of the .json file, without suffix")
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
