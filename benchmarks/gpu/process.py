# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Run a command in a process that ends together with all its children."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil


def run(argv: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path, seconds: float) -> int | None:
    """Run a command, and write its output to a file.

    Args:
        argv: The command.
        folder: Working directory of the command.
        environment: Environment variables of the command.
        log: File for the output.
        seconds: Seconds after which the command is killed.

    Returns:
        The exit code, or `None` if the command was killed.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also if the user interrupts
            if process.poll() is None:
                _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """Kill a process and all its descendants, including those in other process groups or sessions."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(family, timeout=10)
    process.wait()
