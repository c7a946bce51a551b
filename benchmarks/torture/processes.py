# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Run a function in a forked process, which costs no imports, and see how it ends."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def run(function: Callable[[], object], log: Path, kill_after: float | None = None, limit: float = 300) -> int:
    """Run a function in a child process, with its output in a file.

    Args:
        function: What the child does.
        log: The file that gets what the child prints.
        kill_after: Seconds after which the child is killed (SIGKILL).
        limit: Seconds after which a child that hangs is killed.

    Returns:
        0 if the function returned, 1 if it raised an error, `-N` if signal N ended the process.

    Raises:
        TimeoutError: If the child hangs.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _child(function, log)
    begun = time.monotonic()
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        spent = time.monotonic() - begun
        if spent > limit or (kill_after is not None and spent > kill_after):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if spent > limit:
                raise TimeoutError(f"A run did not end within {limit} seconds. See {log}.")
            return -signal.SIGKILL
        time.sleep(0.002)


def _child(function: Callable[[], object], log: Path) -> None:
    """Run the function and exit without cleaning up the parent's objects."""
    code = 1
    try:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
