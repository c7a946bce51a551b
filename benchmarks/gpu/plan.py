# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Which stages fit into a budget, and which of them run side by side."""

from __future__ import annotations

from collections.abc import Sequence

from .stages import Stage


def chosen(stages: Sequence[Stage], budget: float | None, workers: int) -> list[Stage]:
    """Choose the stages that fit into a budget. If a stage does not fit, later ones can take its time.

    Args:
        stages: Stages, most useful first.
        budget: Minutes. `None`: all stages.
        workers: How many stages run side by side, if they may.
    """
    if budget is None:
        return list(stages)
    found: list[Stage] = []
    for stage in stages:
        if minutes([*found, stage], workers) <= budget:
            found.append(stage)
    return found


def minutes(stages: Sequence[Stage], workers: int) -> float:
    """Minutes that stages take, group by group. In a group, each worker takes the next stage when it can."""
    total = 0.0
    for group in groups(stages):
        busy = [0.0] * workers
        for stage in group:
            busy[busy.index(min(busy))] += stage.minutes
        total += max(busy)
    return total


def groups(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Group neighbors that may run side by side. Every other stage is a group of its own."""
    found: list[list[Stage]] = []
    for stage in stages:
        if found and stage.beside and found[-1][0].beside:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found
