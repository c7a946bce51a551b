# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Table of refusal and over-refusal on several sets of prompts, for the terminal and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .. import extras
from .comparison import difference_text, differences
from .grid import text_grid
from .report import Estimate, Measurement, rate_text

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("set", "model", "prompts", "refuses harmful", "difference", "refuses benign", "difference", "unclear")
NOTE = (
    "Values have 95 % intervals. Prompts and unclear answers: harmful / benign. * is larger than chance: the 95 % "
    "interval of the difference excludes 0. One in 20 does so by chance alone."
)


def set_rows(measurements: Mapping[str, Measurement], reference: str | None = None) -> list[list[str]]:
    """Return one row of texts for each set and model, under `HEADINGS`.

    Args:
        measurements: Measurements by the name to print.
        reference: Name of the measurement from which differences are computed. Default: the first one.
    """
    reference = reference or next(iter(measurements), None)
    names = dict.fromkeys(name for measurement in measurements.values() for name in measurement.sets)
    rows = []
    for set_name in names:
        of_set = {name: own.sets[set_name] for name, own in measurements.items() if set_name in own.sets}
        for name, own in of_set.items():
            compared = name != reference and reference in of_set
            found = differences(of_set[str(reference)], own) if compared else {}
            rows.append(
                [
                    set_name,
                    name,
                    " / ".join("-" if rate is None else f"{rate.n}" for rate in (own.refusal, own.over_refusal)),
                    rate_text(own.refusal),
                    difference_text(found.get("refusal"), rate=True).strip(),
                    rate_text(own.over_refusal),
                    difference_text(found.get("over_refusal"), rate=True).strip(),
                    " / ".join(map(_share, (own.harmful_unclear, own.benign_unclear))),
                ]
            )
    return rows


def set_table(measurements: Mapping[str, Measurement], reference: str | None = None) -> Table:
    """Build a table of refusal by set for the terminal. The arguments are those of `set_rows`."""
    extras.check("eval", "The table of sets")
    reference = reference or next(iter(measurements), None)
    title = f"Refusal by set of prompts, and differences from {reference}"
    return text_grid(title, NOTE, HEADINGS, set_rows(measurements, reference), left=("set", "model"))


def _share(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.value:.0%}"
