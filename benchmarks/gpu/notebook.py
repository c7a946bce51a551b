# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Run a notebook and keep its output. The notebook itself does not change.

python -m benchmarks.gpu.notebook notebooks/02_sft_then_dpo.ipynb --output FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "notebooks"))

from execute import execute  # noqa: E402

MODEL = re.compile(r'^MODEL = ".*?"', re.MULTILINE)


def with_model(path: Path, model: str, folder: Path) -> Path:
    """Write a copy of a notebook that loads another model.

    Raises:
        ValueError: If no cell sets `MODEL`.
    """
    notebook = nbformat.read(path, as_version=4)
    changed = 0
    for cell in notebook.cells:
        cell.source, count = MODEL.subn(lambda _: f"MODEL = {model!r}", cell.source)
        changed += count
    if not changed:
        raise ValueError(f"No cell of {path} sets MODEL.")
    copied = folder / path.name
    nbformat.write(notebook, copied)
    return copied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="Folder for the executed notebook and its time.")
    parser.add_argument("--model", help="Chat model to use instead of the notebook's own.")
    parser.add_argument("--steps", type=int, help="Number of steps, for a short run.")
    arguments = parser.parse_args()
    if arguments.steps:
        os.environ["OGPSA_NOTEBOOK_STEPS"] = str(arguments.steps)
    arguments.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        path = arguments.notebook
        if arguments.model:
            path = with_model(path, arguments.model, Path(scratch))
        executed = execute(path, scratch)
    nbformat.write(executed, arguments.output / arguments.notebook.name)
    report = {"notebook": arguments.notebook.name, "seconds": time.perf_counter() - start}
    (arguments.output / "notebook.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
