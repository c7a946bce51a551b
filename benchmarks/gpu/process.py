# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""One command in a process of its own, which ends with all its children."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil


def run(argv: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path, seconds: float) -> int | None:
    """Runs a command, with its output in a file.

    Args:
        argv: The command.
        folder: Its working directory.
        environment: Its environment.
        log: The file.
        seconds: After which it is killed.

    Returns:
        Its exit code; `None` if it was killed.
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
    """Ends a process and all its descendants, whatever groups or sessions they have made."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(family, timeout=10)
    process.wait()
