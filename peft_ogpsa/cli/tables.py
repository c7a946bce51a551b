# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""What the commands print: the console, and the tables of measurements."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console

from ..evaluation import Evaluation, Measurement, difference_table, judge_tables, set_table, table, task_table


def console() -> Console:
    """Return a console. A file or a pipe has no terminal width to respect, and the tables are wide."""
    return Console(width=None if sys.stdout.isatty() else 150)


def print_tables(
    to: Console,
    evaluations: Mapping[str, Evaluation],
    measurements: Mapping[str, Measurement],
    reference: str | None = None,
    extra: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Print the tables of everything that was measured.

    Args:
        to: Where to print.
        evaluations: The results, by the name to print.
        measurements: Their models and their base, by the name to print.
        reference: Name of the measurement from which differences are computed. Default: the first one.
        extra: Further columns of the first table, as in `table`.
    """
    models = [evaluation.model for evaluation in evaluations.values()]
    if any(model.has_own_data for model in models):
        to.print(table(evaluations, extra=extra))
        if len(measurements) > 1:
            to.print(difference_table(measurements, reference))
    if any(model.sets for model in models):
        to.print(set_table(measurements, reference))
    if any(model.tasks for model in models):
        to.print(task_table(measurements, reference))
    for judge_table in judge_tables(measurements, reference):
        to.print(judge_table)
