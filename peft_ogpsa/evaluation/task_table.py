# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Table of the scores of tasks, for the terminal and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .. import extras
from .comparison import Comparison
from .grid import text_grid
from .report import Measurement
from .scores import TaskScore

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("task", "metric", "examples", "model", "score", "difference")
NOTE = "The arrow shows which direction is better."
_ARROWS = {True: " ↑", False: " ↓", None: ""}


def task_rows(comparison: Comparison) -> list[list[str]]:
    """Return one row of texts for each task, metric and model, under `HEADINGS`."""
    measurements = comparison.measurements
    by_key: dict[tuple[str, str], dict[str, TaskScore]] = {}
    for name, measurement in measurements.items():
        for score in measurement.tasks:
            by_key.setdefault((score.task, score.metric), {})[name] = score
    rows = []
    for (task, metric), scores in by_key.items():
        for name, score in scores.items():
            metric_text = metric + _ARROWS[score.higher_is_better]
            told = comparison.text(name, "task", task, metric, rate=False)
            rows.append([task, metric_text, f"{score.n}", name, _score_text(score), told])
    return rows


def task_table(measurements: Mapping[str, Measurement], reference: str | None = None) -> Table:
    """Build a table of the scores of tasks for the terminal. The arguments are those of `Comparison`."""
    extras.check("eval", "The table of tasks")
    comparison = Comparison(measurements, reference)
    title = f"Task scores, and differences from {comparison.reference}"
    note = f"{NOTE} {comparison.note}"
    return text_grid(title, note, HEADINGS, task_rows(comparison), left=("task", "metric", "model"))


def _score_text(score: TaskScore) -> str:
    if score.interval is None:
        return f"{score.value:.3f}"
    low, high = score.interval
    return f"{score.value:.3f} ({low:.3f} to {high:.3f})"
