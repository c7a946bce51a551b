# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Table of the differences in general loss, KL from base, refusal and over-refusal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .. import extras
from .comparison import Comparison
from .grid import text_grid
from .report import Measurement

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = {
    "general": "general loss",
    "kl": "KL from base",
    "refusal": "refuses harmful",
    "over_refusal": "refuses benign",
}


def difference_table(measurements: Mapping[str, Measurement], reference: str | None = None) -> Table:
    """Build a table of the differences from one measurement. A star marks those that are larger than chance.

    Args:
        measurements: Two or more measurements by the name to print.
        reference: Name of the measurement from which differences are computed. Default: the first one.
    """
    extras.check("eval", "The table of differences")
    comparison = Comparison(measurements, reference)
    rows = [
        [name, *(comparison.text(name, "own", quantity, rate="refusal" in quantity) for quantity in _HEADINGS)]
        for name in measurements
        if name != comparison.reference
    ]
    title = f"Differences from {comparison.reference}"
    return text_grid(title, comparison.note, ["model", *_HEADINGS.values()], rows, left=("model",))
