# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""`ogpsa sft`: SFT with TRL's trainer, and reference sets for the abilities to preserve.

Its options are in `arguments.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from trl import SFTConfig, SFTTrainer

from .training import train


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    train("sft", SFTConfig, SFTTrainer, arguments)
