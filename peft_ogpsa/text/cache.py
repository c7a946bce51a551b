# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Location of results that are kept between runs and can be regenerated."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return `peft_ogpsa` in the user's cache directory: `$XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_ogpsa"
