# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Counts the optimizer's steps, and says when reference gradients must be computed again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from .config import ProjectionConfig


class Schedule:
    """The counters of a projector.

    Attributes:
        steps: Number of steps of the optimizer that trains the parameters, projected or not.
        skipped: Number of steps that a gradient scaler has skipped. `steps` does not count them.
        moves: Whether the current step can change a parameter.
        moved: Number of steps that could change a parameter. Steps with a learning rate of 0 do not count.
        since_refresh: Number of such steps since the last refresh.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.moves = True
        self.reset()

    def reset(self) -> None:
        """Restart the counters, for a new stage of training."""
        self.steps = self.moved = self.since_refresh = 0

    def due(self, config: ProjectionConfig) -> bool:
        """Whether a refresh is due: after `refresh_steps` steps, and after the first step."""
        return self.since_refresh >= config.refresh_steps or self.moved == self.since_refresh == 1

    def begin_step(self, optimizer: Optimizer, stepped: Collection[int]) -> None:
        """Find whether the step that begins can change a parameter. With a learning rate of 0 it cannot.

        Some optimizers have no learning rate. In others it is `None`, because they find it themselves. Reading a rate
        from an accelerator waits for the device, so this is done only for the first steps.

        Args:
            optimizer: The optimizer of the parameters.
            stepped: The `id` of every parameter in training that the optimizer holds. Only their groups' rates count.
        """

        def still(rate: Any) -> bool:
            if rate is None or (isinstance(rate, Tensor) and rate.device.type != "cpu" and self.moved > 0):
                return False
            return not rate

        own = (group for group in optimizer.param_groups if any(id(one) in stepped for one in group["params"]))
        self.moves = not all(still(group.get("lr")) for group in own)

    def end_step(self) -> None:
        """Count the step."""
        self.steps += 1
        if self.moves:
            self.moved += 1
            self.since_refresh += 1

    def state_dict(self) -> dict[str, int]:
        """The counters, JSON-ready."""
        return {"steps": self.steps, "moved": self.moved, "steps_since_refresh": self.since_refresh}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.steps, self.moved = int(state["steps"]), int(state["moved"])
        self.since_refresh = int(state["steps_since_refresh"])
