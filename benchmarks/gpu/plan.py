# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Which stages fit into a budget, and which of them run side by side."""

from __future__ import annotations

from collections.abc import Sequence

from .stages import Stage


def chosen(stages: Sequence[Stage], budget: float | None, workers: int) -> list[Stage]:
    """The stages that fit, in order of worth; a stage that does not fit leaves room for later ones.

    Args:
        stages: In order of worth.
        budget: Minutes; `None` takes all.
        workers: Stages that run side by side, where they may.
    """
    if budget is None:
        return list(stages)
    found, left = [], budget
    for stage in stages:
        minutes = stage.minutes / (workers if stage.beside else 1)
        if minutes <= left:
            found.append(stage)
            left -= minutes
    return found


def groups(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Neighbors that may run side by side, together; every other stage alone."""
    found: list[list[Stage]] = []
    for stage in stages:
        if found and stage.beside and found[-1][0].beside:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found
