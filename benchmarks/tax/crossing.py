# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Training until the model is safe, and measuring where it comes to be."""

from __future__ import annotations

import time
from typing import Any

from .measurement import Along, Meter
from .report import SAFE

FEW = (8, 24)
"""Requests of each source that are asked first. More are asked as long as a goal can still be reached."""


class UntilSafe(Along):
    """Asks harmful requests along training, and takes all measurements at the first step where each goal is reached.

    The goals are: the held-out safety loss has come down to `safety_loss`; enough of the first source of harmful
    requests is refused; enough of every source is refused. Training ends at the last one. A run that does not get
    there is measured at its last step.

    Args:
        meter: Takes the measurements.
        safety_loss: Held-out safety loss, in nats per token. `None` leaves this goal out.
    """

    def __init__(self, meter: Meter, safety_loss: float | None) -> None:
        super().__init__(meter)
        self.safety_loss = safety_loss
        self._asking = 0.0
        self._next = 1  # step to ask at
        self._open = {"loss", "one", "all"} if safety_loss is not None else {"one", "all"}

    @property
    def seconds(self) -> float:
        """What asking and measuring took."""
        return self._asking + super().seconds

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Asks, and measures at a goal: after each of the first 20 steps, and then after every tenth more."""
        last = state.global_step == args.max_steps
        if not last and state.global_step < self._next:
            return
        self._next = state.global_step + max(1, state.global_step // 10)
        start = time.perf_counter()
        reached = self._reached(model, state.global_step)
        self._asking += time.perf_counter() - start
        if reached or last:
            self.record(model, state.global_step)
        self._open -= reached
        control.should_training_stop = "all" not in self._open

    def _reached(self, model: Any, step: int) -> set[str]:
        for few in (*FEW, None):
            rates = self.meter.refusals(model, few)
            if not self._open & self._possible(rates, few):
                break
        reached = set() if few else _refused(rates, SAFE)
        figures = {"step": step, **rates}  # of those that were asked
        if "loss" in self._open:
            figures["safety_loss"] = self.meter.safety_loss(model)
            if figures["safety_loss"] <= self.safety_loss:
                reached.add("loss")
        self.probes.append(figures)
        return reached & self._open

    def _possible(self, rates: dict[str, float], few: int | None) -> set[str]:
        """Which goals of refusals are reached if all requests that have not been asked are refused."""
        best = {}
        for name, prompts in self.meter.harmful.items():
            answered = round((1 - rates[name]) * min(few or len(prompts), len(prompts)))
            best[name] = 1 - answered / len(prompts)
        return _refused(best, SAFE)


def _refused(rates: dict[str, float], least: float) -> set[str]:
    """Which goals of refusals are reached."""
    goals = {"one": rates["refusal"], "all": min(rates.values())}
    return {goal for goal, rate in goals.items() if rate >= least}
