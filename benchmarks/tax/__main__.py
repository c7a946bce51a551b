# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Run the missing runs of the grid, then write tables and plots."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import torch
from tqdm import tqdm

from peft_ogpsa.cli.models import SMOLLM2

from .comparisons import MAIN
from .grid import Grid
from .methods import DRAWN
from .plots import tradeoffs
from .report import load
from .results import results
from .tasks import Tasks
from .training import Settings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tax", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="Folder for one .json file per run and the report.")
    parser.add_argument("--data", type=Path, help="Folder of rows. Default: the built-in rows.")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="+", help="Names, or `main` for those of the main table.")
    parser.add_argument("--stages", nargs="+", default=["sft"], choices=["sft", "dpo"], help="Stages share the steps.")
    parser.add_argument("--whole", action="store_true", help="Train whole weights instead of adapters.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--schedule", default=Settings.schedule, choices=["constant", "cosine", "linear"])
    parser.add_argument("--dpo-learning-rate", type=float, default=Settings.dpo_learning_rate)
    parser.add_argument("--measurements", type=int, default=Settings.measurements)
    parser.add_argument("--references", type=int, default=48, help="Rows of each reference set.")
    parser.add_argument("--tested", type=int, default=8, help="Held-out rows of each general set.")
    parser.add_argument("--heldout", action="store_true", help="Measure on the package's larger held-out sets.")
    parser.add_argument("--until-safe", action="store_true", help="End a run when it is safe, and measure then.")
    parser.add_argument("--tasks", nargs="+", help="lm-eval's tasks to score at the end of every run.")
    parser.add_argument("--include-path", type=Path, help="Folder with more of lm-eval's task files.")
    parser.add_argument("--limit", type=int, help="Number of examples of each task.")
    parser.add_argument("--workers", type=int, default=1, help="How many runs go side by side.")
    parser.add_argument("--plot", nargs="+", help="Methods to draw.")
    arguments = parser.parse_args()
    settings = Settings(
        arguments.model,
        arguments.device,
        arguments.steps,
        learning_rate=arguments.learning_rate,
        schedule=arguments.schedule,
        measurements=arguments.measurements,
        stages=tuple(arguments.stages),
        dpo_learning_rate=arguments.dpo_learning_rate,
        until_safe=arguments.until_safe,
    )
    if not arguments.tasks and (arguments.include_path or arguments.limit):
        parser.error("--include-path and --limit have no effect without --tasks. Name the tasks, or leave them out.")
    if arguments.until_safe and len(arguments.stages) > 1:
        parser.error("--until-safe ends a run where it is safe, so a second stage would not begin. Give one stage.")
    grid = Grid(
        arguments.output / "runs",
        settings,
        arguments.data,
        arguments.references,
        arguments.tested,
        arguments.whole,
        arguments.heldout,
        Tasks(tuple(arguments.tasks), arguments.include_path, arguments.limit) if arguments.tasks else None,
    )
    names = list(MAIN) if arguments.methods == ["main"] else arguments.methods or list(grid.methods)
    unknown = [name for name in names if name not in grid.methods]
    if unknown:
        parser.error(f"--methods {unknown[0]!r} is unknown. Choose from: {', '.join(grid.methods)}.")
    unscored = grid.unscored(names, arguments.seeds)
    if unscored:
        parser.error(f"--tasks scores new runs, and {unscored[0].name} has ended without. Give another --output.")
    if "plain" not in names and not list(grid.folder.glob("plain-seed*.json")):
        parser.error("plain LoRA has not been run, which all are compared with. Add it to --methods.")
    tasks = grid.missing(names, arguments.seeds)
    for line in tqdm(grid.run(tasks, arguments.workers), "Runs", total=len(tasks)):
        tqdm.write(line)
    base, runs = load(grid.folder)
    text = results(base, runs, _command(parser, arguments))
    (arguments.output / "results.md").write_text(text, encoding="utf-8")
    drawn = [name for name in arguments.plot or DRAWN if name in runs]
    tradeoffs(base, runs, drawn, arguments.output / "tradeoffs.png")
    print(text)


def _command(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """Return the command that makes all runs of a folder, even if this call made only some of them."""
    words = ["python", "-m", "benchmarks.tax"]
    for name, value in vars(arguments).items():
        if value == parser.get_default(name) or name in ("methods", "seeds", "plot", "workers", "device"):
            continue
        words += [f"--{name.replace('_', '-')}"]
        words += [] if value is True else value if isinstance(value, list) else [str(value)]
    folders = (str(arguments.data), str(arguments.include_path))
    words = ["FOLDER" if word in folders else word for word in words]
    return shlex.join(words)


if __name__ == "__main__":
    main()
