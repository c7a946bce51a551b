# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Kinds of layers: those at the same place in each block of a model, and figures of their inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .inputs import Input


@dataclass(frozen=True)
class Kind:
    """Figures for the inputs of one kind of layer.

    Attributes:
        name: The kind, such as `q_proj+k_proj+v_proj`.
        inputs: Number of inputs.
        width: The smallest and the largest width of an input. Layers of one name may differ, as in an encoder and a
            decoder.
        directions: The smallest and the largest number of directions of an input.
        share: Share of the energy of the reference inputs that lies in the directions, from 0 to 1; mean over the
            inputs.
        held_out: The same share for reference examples that were not used to find the directions; `None` without any.
    """

    name: str
    inputs: int
    width: tuple[int, int]
    directions: tuple[int, int]
    share: float
    held_out: float | None

    def __str__(self) -> str:
        held = "" if self.held_out is None else f" and {self.held_out:.0%} of the energy of held-out ones"
        return (
            f"{self.name}: {self.inputs} inputs of width {_range(self.width)}. {_range(self.directions)} directions "
            f"hold {self.share:.0%} of the energy of reference inputs{held}"
        )

    @classmethod
    def of(cls, name: str, inputs: Sequence[Input]) -> Kind:
        """Compute the figures of these inputs."""
        widths = [item.width for item in inputs]
        counts = [len(item.energies) for item in inputs]
        held = [item.held_out for item in inputs if item.held_out is not None]
        share = sum(item.share for item in inputs) / len(inputs)
        return cls(
            name,
            len(inputs),
            (min(widths), max(widths)),
            (min(counts), max(counts)),
            share,
            sum(held) / len(held) if held else None,
        )


def _range(ends: tuple[int, int]) -> str:
    least, most = ends
    return f"{least}" if least == most else f"{least} to {most}"


def kind_of(layers: Sequence[str]) -> str:
    """The kind of layers that share an input: their names without the part that differs between the model's blocks."""
    return "+".join(dict.fromkeys(re.sub(r"\d+", "*", layer.rpartition(".")[2]) for layer in layers))
