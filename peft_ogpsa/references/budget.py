# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""How many reference examples a refresh draws."""

from __future__ import annotations

import sys

from ..core.config import ProjectionConfig


def refresh_samples(
    config: ProjectionConfig, step_examples: int, batch_size: int, sets: int, cost: float = 1.0
) -> int | None:
    """Return how many reference examples a refresh draws. `None` means all.

    Args:
        config: The projection's settings. `refresh_samples` decides, or else `reference_budget`.
        step_examples: Training examples of one optimizer step, in all processes.
        batch_size: Batch size of a reference pass.
        sets: How many reference sets there are.
        cost: Cost of a reference example. A training example costs 1.

    Raises:
        ValueError: If `rows_from="set"` and `refresh_samples` leaves a set without its row.
    """
    given = config.refresh_samples
    # Rows that are only added to the gradient need not cover every set each time.
    each_set = config.constrains and config.rows_from == "set"
    if each_set and given is not None and given < sets:
        raise ValueError(
            f"refresh_samples={given} is less than the number of reference sets ({sets}). With rows_from='set', "
            f"every set needs an example for its row. Set refresh_samples={sets} or more, or give fewer sets."
        )
    if given is not None or config.reference_budget is None:
        return given
    examples = float(config.reference_budget) * config.refresh_steps * step_examples / cost
    wanted = max(1, round(min(examples, sys.maxsize)))
    if not config.constrains:
        return wanted
    if each_set:
        return max(wanted, sets)
    # Do not draw more than the ring of rows holds.
    if config.row_of == "example":
        return min(wanted, config.rows)
    # A batch holds examples of one set: take `full` full batches of each set, and one more example of `further` sets.
    full, further = divmod(config.rows, sets)
    return min(wanted, full * sets * batch_size + further)


def check_rows(config: ProjectionConfig, needed: int) -> None:
    """Check that `rows` can hold all reference gradients, before training and not at its first step.

    Args:
        config: The projection's settings.
        needed: The largest number of rows that one refresh needs.

    Raises:
        ValueError: If there are too many. Rows that do not constrain the step are only added to the training gradient.
            Their number has no limit.
    """
    if config.constrains and needed > config.rows:
        what = {"example": "examples", "batch": "batches", "set": "sets"}[config.row_of]
        raise ValueError(
            f"rows={config.rows} is too small: a refresh uses up to {needed} reference {what}, and each of them "
            f"needs a row. Set rows={needed}, or lower refresh_samples ({config.refresh_samples}) or "
            f"reference_budget ({config.reference_budget}). With both at None, a refresh uses all examples."
        )
