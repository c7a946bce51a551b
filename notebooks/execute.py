# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs the notebooks and writes their outputs into them.

python notebooks/execute.py [NOTEBOOK ...]

The notebooks' own files (adapters, plots) go to a temporary folder.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def execute(path: str | Path, folder: str | Path) -> nbformat.NotebookNode:
    """Runs one notebook.

    Args:
        path: The notebook; the file is not changed.
        folder: The working directory of its kernel.

    Returns:
        The notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    # Without the times of every cell, which would differ from run to run and help no reader.
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    return client.execute()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Runs the notebooks and writes their outputs into them.")
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS, help="Which; by default all.")
    for path in parser.parse_args().notebooks:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            executed = execute(path, folder)
        nbformat.write(executed, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
