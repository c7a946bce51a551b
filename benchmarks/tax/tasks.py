# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of lm-eval's tasks at the end of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_ogpsa.evaluation.tasks import TaskRunner


@dataclass(frozen=True)
class Tasks:
    """What to score.

    Attributes:
        names: Names of lm-eval's tasks.
        folder: A folder with more task files, or with others of the same names.
        limit: Number of examples of each task. The first ones are used.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None

    def runner(self) -> TaskRunner:
        """Load the tasks and their data."""
        return TaskRunner(self.names, include_path=str(self.folder) if self.folder else None, limit=self.limit)


def scores(runner: TaskRunner, model: Any, tokenizer: Any) -> dict[str, str]:
    """Score a model: for each metric that is right or wrong, a string of 0 and 1, one per example."""
    found = runner.run(model, tokenizer)
    return {
        f"{score.task}, {score.metric}": "".join(f"{value:.0f}" for value in score.values)
        for score in found
        if score.is_rate
    }
