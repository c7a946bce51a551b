"""`python tests/rehearse.py ARGUMENTS` is `python -m benchmarks.gpu ARGUMENTS`, with stages that share their imports.

Imports take most of the time of a toy stage. Here a server does them once, and every stage is a fork of it.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu import process
from benchmarks.gpu.__main__ import main

LIBRARIES = ["bitsandbytes", "datasets", "matplotlib.figure", "peft", "pytest", "trl.trainer.dpo_trainer"]


def run(argv: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path, seconds: float) -> int | None:
    """What `process.run` does, except that processes which a killed stage started live on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    stage = context.Process(target=_stage, args=(argv[1:], folder, environment, log))
    stage.start()
    stage.join(seconds)
    if stage.is_alive():
        stage.kill()
        return None
    return stage.exitcode


def _stage(command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path) -> None:
    with log.open("wb") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.chdir(folder)
    os.environ.update(environment)
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    if "forkserver" in multiprocessing.get_all_start_methods():
        process.run = run
    sys.exit(main())
