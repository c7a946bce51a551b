# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Why OGPSA projects the update and not the gradient: what each step does to the reference losses.

    OMP_NUM_THREADS=1 python benchmarks/why.py --output benchmarks/results/why

The script trains SmolLM2-135M-Instruct once, with a gradient subspace. Before every step it measures what is removed,
which steps other rules and optimizers would have made from the same gradient, and how far reference gradients have
turned. It writes figures, and their numbers as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peft import get_peft_model

from benchmarks.anatomy.figures import FIGURES
from benchmarks.anatomy.tables import TABLES
from benchmarks.anatomy.watch import watch
from benchmarks.tax.data import load
from benchmarks.tax.measurement import MAX_LENGTH
from benchmarks.tax.methods import METHODS
from benchmarks.tax.training import LORA, Settings, Workbench
from peft_ogpsa import OGPSAConfig
from peft_ogpsa.cli.models import SMOLLM2
from peft_ogpsa.text.tokenization import Example, encode_row


def observe(bench: Workbench, probed: int, seed: int) -> dict[str, Any]:
    """Train on the bench's data as `benchmarks.tax` does, and measure every step."""
    settings = bench.settings
    tokenized = {own.name: own.tokenize(bench.tokenizer) for own in bench.references("own")}
    sets = {name: [own for own in rows if isinstance(own, Example)] for name, rows in tokenized.items()}
    examples = [encode_row(bench.tokenizer, row, "row") for row in bench.rows(METHODS["cone"], seed)]
    kept = [example for example in (example.cut(MAX_LENGTH) for example in examples) if example is not None]
    torch.manual_seed(seed)
    return watch(
        get_peft_model(
            bench.base, OGPSAConfig(subspace="gradients", reference_weight=0.0, rows=24, refresh_samples=4, **LORA)
        ),
        [kept[i : i + settings.batch] for i in range(0, len(kept), settings.batch)],
        sets,
        probed=probed,
        rate=settings.learning_rate,
        pad=bench.tokenizer.pad_token_id,
    )


def rounded(value: Any) -> Any:
    """Round every number to four digits."""
    if isinstance(value, dict):
        return {name: rounded(own) for name, own in value.items()}
    if isinstance(value, list):
        return [rounded(own) for own in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("why"), help="path of the output files, without suffix")
    parser.add_argument("--data", type=Path, help="folder of rows, as for benchmarks.tax (default: the built-in rows)")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--references", type=int, default=48, help="rows of each reference set")
    parser.add_argument("--probed", type=int, default=4, help="how many of these rows are measured at every step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = Settings(arguments.model, arguments.device, arguments.steps)
    bench = Workbench(settings, load(arguments.data, arguments.references, tested=8))
    found = rounded(observe(bench, arguments.probed, arguments.seed))
    report = {
        "model": bench.source,
        "data": bench.data.source,
        "settings": asdict(settings),
        "references": arguments.references,
        "probed": arguments.probed,
        "seed": arguments.seed,
        "threads": torch.get_num_threads(),
        **found,
    }
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    for name, figure in FIGURES.items():
        figure(report).savefig(output.with_name(f"{output.name}_{name}.png"))
    print("\n".join(table(report) for table in TABLES))


if __name__ == "__main__":
    main()
