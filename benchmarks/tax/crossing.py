# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Train until the model is safe, and measure at that step."""

from __future__ import annotations

import time
from typing import Any

from .measurement import Along, Meter
from .report import SAFE

FEW = (8, 24)
"""How many requests of each source are asked first. More follow as long as a goal can still be reached."""


SCALES = 20
"""How many scales of a finished adapter are asked, as many as the steps that are asked one by one."""


class UntilSafe(Along):
    """Ask harmful requests along training, and take all measurements at the first step that reaches each goal.

    There are three goals. The held-out safety loss has come down to `safety_loss`. Enough harmful requests of the
    first source are refused. Enough harmful requests of every source are refused. Training ends at the third goal. A
    run that does not reach it is measured at its last step.

    Args:
        meter: The meter that takes the measurements.
        safety_loss: Held-out safety loss, in nats per token. `None` leaves this goal out.
    """

    def __init__(self, meter: Meter, safety_loss: float | None) -> None:
        super().__init__(meter, SCALES)
        self.safety_loss = safety_loss
        self._asking = 0.0
        self._next = 1  # the next step at which to ask
        self._open = {"loss", "one", "all"} if safety_loss is not None else {"one", "all"}

    @property
    def seconds(self) -> float:
        """Seconds that asking and measuring took."""
        return self._asking + super().seconds

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Ask after each of the first 20 steps, then after 10 % more steps each time. Measure if a goal is reached."""
        last = state.global_step == args.max_steps
        if not last and state.global_step < self._next:
            return
        self._next = state.global_step + max(1, state.global_step // 10)
        control.should_training_stop = self._ask(model, state.global_step, last)

    def at_scale(self, model: Any, step: int, scale: float) -> bool:
        """Ask at a scale of the adapter. Measure if a goal is reached. Return whether all are."""
        return self._ask(model, step, scale == 1, scale=scale)

    def _ask(self, model: Any, step: int, last: bool, **more: float) -> bool:
        start = time.perf_counter()
        reached = self._reached(model, step, **more)
        self._asking += time.perf_counter() - start
        if reached or last:
            self.record(model, step, **more)
        self._open -= reached
        return "all" not in self._open

    def _reached(self, model: Any, step: int, **more: float) -> set[str]:
        for few in (*FEW, None):
            rates = self.meter.refusals(model, few)
            if not self._open & self._possible(rates, few):
                break
        reached = set() if few else _refused(rates, SAFE)
        figures = {"step": step, **more, **rates}  # rates of the requests that were asked
        if "loss" in self._open:
            figures["safety_loss"] = self.meter.safety_loss(model)
            if figures["safety_loss"] <= self.safety_loss:
                reached.add("loss")
        self.probes.append(figures)
        return reached & self._open

    def _possible(self, rates: dict[str, float], few: int | None) -> set[str]:
        """Return the refusal goals that are reached if all requests that were not asked are refused."""
        best = {}
        for name, prompts in self.meter.harmful.items():
            answered = round((1 - rates[name]) * min(few or len(prompts), len(prompts)))
            best[name] = 1 - answered / len(prompts)
        return _refused(best, SAFE)


def _refused(rates: dict[str, float], least: float) -> set[str]:
    """Return the refusal goals that these rates reach."""
    goals = {"one": rates["refusal"], "all": min(rates.values())}
    return {goal for goal, rate in goals.items() if rate >= least}
