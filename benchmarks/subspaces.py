# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Measure the activation subspace of a model: the spread of its energy, its fit to held-out references, its size.

python -m benchmarks.subspaces --output benchmarks/results/activations      # a figure and its numbers
python -m benchmarks.subspaces --sizes                        # bytes at 7 and 8 B, computed
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from peft_ogpsa import ReferenceSet, data
from peft_ogpsa.cli.models import SMOLLM2, load_model
from peft_ogpsa.core import inputs
from peft_ogpsa.core.activation_subspace import most_directions
from peft_ogpsa.core.isolation import isolated_eval
from peft_ogpsa.core.kinds import kind_of
from peft_ogpsa.core.sketch import OVERSAMPLING
from peft_ogpsa.references.loader import ReferenceLoader
from peft_ogpsa.references.losses import reference_loss

SHAPES = {"Llama-3.1-8B": (32, 4096, 14336), "Qwen2.5-7B": (28, 3584, 18944), "Qwen2.5-1.5B": (28, 1536, 8960)}
"""Number of blocks, hidden size, width of the MLP. Each block has four inputs: q, k and v; o; gate and up; down."""


def sizes() -> None:
    """Print the size of the directions, and the memory that is needed while they are found."""
    print("| model | directions | held, float32 | held, bfloat16 | while it is built |")
    print("|---|---|---|---|---|")
    for name, (blocks, hidden, wide) in SHAPES.items():
        for rank in (128, 256, 512):
            elements = blocks * rank * (3 * hidden + wide)
            # A sketch and its test matrix, in float32.
            meanwhile = 2 * 4 * blocks * (rank + OVERSAMPLING) * (3 * hidden + wide)
            # Rounded directions are oblique, and have an inverse in float32 for each input.
            inverses = 4 * blocks * 4 * rank**2
            mib = [count / 2**20 for count in (4 * elements, 2 * elements + inverses, meanwhile)]
            print(f"| {name} | {rank} | {mib[0]:,.0f} MiB | {mib[1]:,.0f} MiB | {mib[2]:,.0f} MiB |")


def measured(model_name: str, prompts: int) -> dict[str, Any]:
    """Measure the energies of every kind of layer, on the base's own answers to built-in prompts."""
    base, tokenizer, source = load_model(model_name)
    sets = [
        ReferenceSet.from_prompts(name, data.load_prompts(name), base, tokenizer, samples=prompts, max_new_tokens=64)
        for name in ("general", "arithmetic", "lookalikes")
    ]
    loader = ReferenceLoader({own.name: own.tokenize(tokenizer) for own in sets}, None, 16, pad_token_id=0)
    batches = loader.batches("cpu", everything=True)
    layers = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    shares: dict[str, list[torch.Tensor]] = {}
    held: dict[str, list[float]] = {}
    start = time.perf_counter()
    with isolated_eval(base):
        found = inputs.find(layers, reference_loss, base, batches, most=most_directions, progress=tqdm)
    seconds = time.perf_counter() - start
    for item in found:
        kind = kind_of(item.layers)
        shares.setdefault(kind, []).append(item.energies.cumsum(0) / item.energy)
        held.setdefault(kind, []).append(item.held_out or 0.0)
    kinds = {}
    for kind, own in shares.items():
        shortest = min(map(len, own))
        mean = torch.stack([share[:shortest] for share in own]).mean(0)
        own_held = held[kind]
        kinds[kind] = {
            "share": mean.tolist(),
            "directions": shortest,
            "held_out_share_of_all_directions": sum(own_held) / len(own_held),
        }
    return {"model": source, "references": {own.name: len(own.dataset) for own in sets}, "seconds": seconds} | {
        "kinds": kinds
    }


def draw(report: dict[str, Any], file: Path) -> None:
    """Draw the share of the energy over the number of directions."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for kind, own in report["kinds"].items():
        axes.plot(range(1, len(own["share"]) + 1), own["share"], label=kind)
    axes.axhline(0.9, color="grey", linewidth=0.8, linestyle="--")
    axes.set(
        xscale="log",
        xlabel="directions",
        ylabel="share of the inputs' energy",
        title="Inputs on reference tokens, mean over the layers of a kind",
        ylim=(0, 1),
    )
    axes.legend(frameon=False)
    figure.savefig(file, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Path of the .json and .png files, without suffix.")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--prompts", type=int, default=48, help="Prompts of each reference set.")
    parser.add_argument("--sizes", action="store_true", help="Only compute bytes for larger models.")
    arguments = parser.parse_args()
    if arguments.sizes:
        sizes()
        return
    if arguments.output is None:
        parser.error("--output is missing.")
    report = measured(arguments.model, arguments.prompts)
    arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(report, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
