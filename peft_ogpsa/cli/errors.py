# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Input errors, told without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import yaml


@contextlib.contextmanager
def input_errors(command: str) -> Iterator[None]:
    """Ends the command with one line and exit status 1 where what the user gave is at fault.

    Wrap only what reads, checks and loads input: inside, every `ValueError`, `OSError` and `ImportError` counts.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, yaml.YAMLError) as error:
        raise SystemExit(f"ogpsa {command}: {error}") from error
