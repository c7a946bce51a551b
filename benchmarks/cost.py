# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Draw what training with OGPSA costs, from the files that `overhead.py` and `memory.py` wrote.

python benchmarks/cost.py --output benchmarks/results/cost
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
METHODS = (
    "plain LoRA",
    "replay of the same examples",
    "OGPSA, cone, given answers",
    "OGPSA, cone, KL penalty",
    "OGPSA, published rule",
)
"""The methods of `overhead.json` that the figure shows."""


def draw(file: Path) -> None:
    """Draw the time of training, and the peak memory of two models."""
    times = json.loads((RESULTS / "overhead.json").read_text(encoding="utf-8"))["methods"]
    models = json.loads((RESULTS / "memory_estimate.json").read_text(encoding="utf-8"))["computed"]
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    medians = [times[name]["total"]["median"] for name in METHODS]
    left.bar_label(left.barh(METHODS, medians, color="#009E73"), fmt="%.2f", padding=3)
    left.axvline(1, color="grey", linewidth=0.8, linestyle="--")
    left.invert_yaxis()
    left.set(title="Time, of plain LoRA's (2 CPU cores)", xlim=(0, 3.2))
    for offset, (model, runs) in zip((-0.2, 0.2), models.items(), strict=True):
        names = [f"gradients, {run['rows']} rows" if run["rows"] else "plain QLoRA" for run in runs]
        peaks = [max(run["peaks"].values()) / 2**30 for run in runs]
        bars = right.barh([place + offset for place in range(len(runs))], peaks, height=0.38, label=model)
        right.bar_label(bars, fmt="%.1f", padding=3)
        right.set_yticks(range(len(runs)), names)
    right.invert_yaxis()
    right.set(title="Peak memory, GiB (computed)", xlim=(0, 18))
    right.legend(frameon=False, loc="upper right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Name of the .png file, without its ending.")
    draw(parser.parse_args().output.with_suffix(".png"))


if __name__ == "__main__":
    main()
