# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Report input errors without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import yaml


@contextlib.contextmanager
def input_errors(command: str) -> Iterator[None]:
    """End the command with one line and exit status 1 if the user's input is at fault.

    Wrap only code that reads, checks and loads input: every `ValueError`, `OSError` and `ImportError` raised inside
    counts as an input error.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, yaml.YAMLError) as error:
        raise SystemExit(f"ogpsa {command}: {error}") from error
