# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Table of the scores of tasks, for the terminal and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .. import extras
from .comparison import difference_text, task_difference
from .grid import text_grid
from .report import Measurement
from .scores import TaskScore

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("task", "metric", "examples", "model", "score", "difference")
NOTE = (
    "The arrow shows which direction is better. * is larger than chance: the 95 % interval excludes 0. One in 20 does "
    "so by chance alone."
)
_ARROWS = {True: " ↑", False: " ↓", None: ""}


def task_rows(measurements: Mapping[str, Measurement], reference: str | None = None) -> list[list[str]]:
    """Return one row of texts for each task, metric and model, under `HEADINGS`.

    Args:
        measurements: Measurements by the name to print.
        reference: Name of the measurement from which differences are computed. Default: the first one.
    """
    reference = reference or next(iter(measurements), None)
    by_key: dict[tuple[str, str], dict[str, TaskScore]] = {}
    for name, measurement in measurements.items():
        for score in measurement.tasks:
            by_key.setdefault((score.task, score.metric), {})[name] = score
    rows = []
    for (task, metric), scores in by_key.items():
        for name, score in scores.items():
            difference = None
            if name != reference and reference in scores:
                difference = task_difference(scores[reference], score)
            metric_text = metric + _ARROWS[score.higher_is_better]
            told = difference_text(difference, rate=False).strip()
            rows.append([task, metric_text, f"{score.n}", name, _score_text(score), told])
    return rows


def task_table(measurements: Mapping[str, Measurement], reference: str | None = None) -> Table:
    """Build a table of the scores of tasks for the terminal. The arguments are those of `task_rows`."""
    extras.check("eval", "The table of tasks")
    reference = reference or next(iter(measurements), None)
    title = f"Task scores, and differences from {reference}"
    return text_grid(title, NOTE, HEADINGS, task_rows(measurements, reference), left=("task", "metric", "model"))


def _score_text(score: TaskScore) -> str:
    if score.interval is None:
        return f"{score.value:.3f}"
    low, high = score.interval
    return f"{score.value:.3f} ({low:.3f} to {high:.3f})"
