# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Table of refusal and over-refusal on several sets of prompts, for the terminal and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .. import extras
from .comparison import Comparison
from .grid import text_grid
from .report import Measurement, on_set, rate_text, unclear_text

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("set", "model", "prompts", "refuses harmful", "difference", "refuses benign", "difference", "unclear")
NOTE = "Values have 95 % intervals. Prompts and unclear answers: harmful / benign."


def set_rows(comparison: Comparison) -> list[list[str]]:
    """Return one row of texts for each set and model, under `HEADINGS`."""
    rows = []
    for set_name in comparison.sets:
        for name, own in on_set(set_name, comparison.measurements).items():
            rows.append(
                [
                    set_name,
                    name,
                    " / ".join("-" if rate is None else f"{rate.n}" for rate in (own.refusal, own.over_refusal)),
                    rate_text(own.refusal),
                    comparison.text(name, "set", set_name, "refusal", rate=True),
                    rate_text(own.over_refusal),
                    comparison.text(name, "set", set_name, "over_refusal", rate=True),
                    unclear_text(own),
                ]
            )
    return rows


def set_table(measurements: Mapping[str, Measurement], reference: str | None = None) -> Table:
    """Build a table of refusal by set for the terminal. The arguments are those of `Comparison`."""
    extras.check("eval", "The table of sets")
    comparison = Comparison(measurements, reference)
    title = f"Refusal by set of prompts, and differences from {comparison.reference}"
    note = f"{NOTE} {comparison.note}"
    return text_grid(title, note, HEADINGS, set_rows(comparison), left=("set", "model"))
