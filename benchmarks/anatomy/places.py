# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Where a LoRA matrix is in the model."""

from __future__ import annotations

import re
from typing import NamedTuple

_NAME = re.compile(r".*\.layers\.(\d+)\..*?(\w+?)(?:_proj)?\.lora_([AB])\..*")


class Place(NamedTuple):
    """The layer, kind of module (`q`, `down`, ...) and matrix (`A` or `B`) of a LoRA matrix."""

    layer: int
    kind: str
    matrix: str


def place(name: str) -> Place:
    """Read the place from a parameter's name.

    Raises:
        ValueError: If the parameter is not a LoRA matrix of a numbered layer.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no LoRA matrix of a numbered layer.")
    return Place(int(match[1]), match[2], match[3])
