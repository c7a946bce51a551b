# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Dry run of a training command: how much memory it needs and how long it would take."""

from __future__ import annotations

import math
import sys
import time
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from ..core.config import ProjectionConfig
from ..core.projector import Projector
from ..tuner.model import projector_of
from .arguments import MethodConfig

_STEPS = 2  # both steps refresh, and the second step and refresh are free of warm-up costs


def save_nothing(training: TrainingArguments, scratch: str) -> None:
    """Turn off everything that makes the trainer write, report or evaluate. Remaining output goes to `scratch`."""
    training.output_dir = scratch
    training.save_strategy, training.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    training.load_best_model_at_end = training.push_to_hub = training.eval_on_start = False
    training.report_to = []
    training.resume_from_checkpoint = None


class _Clock(TrainerCallback):
    """Record the seconds of every step and of every refresh, in order."""

    def __init__(self, projected: bool) -> None:
        self.projected = projected
        self.projector: Projector | None = None
        self.steps: list[float] = []
        self.refreshes: list[float] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self.projected:  # in full-parameter training, OGPSACallback has created it by now
            self.projector = projector_of(cast(nn.Module, model))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = _now()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.steps.append(_now() - self._start)
        if self.projector is not None:
            total = self.projector.diagnostics.stopwatch.totals().get("refresh", 0.0)
            self.refreshes.append(total - sum(self.refreshes))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def dry_run(trainer: Trainer, config: MethodConfig, console: Console) -> None:
    """Take two steps, and print memory and time.

    Args:
        trainer: A trainer that is ready to train. `save_nothing` has been applied to its arguments, and
            `OGPSACallback` is among its callbacks.
        config: The method's configuration. The projection is measured if it is a `ProjectionConfig`.
        console: Where to print.
    """
    steps = planned_steps(trainer)
    trainer.args.max_steps = _STEPS
    trainer.args.lr_scheduler_type = SchedulerType.CONSTANT  # a step at rate 0, as in a warm-up, calls for no refresh
    clock = _Clock(isinstance(config, ProjectionConfig))
    trainer.add_callback(clock)  # after OGPSACallback, so that the step's time does not include the refresh
    trainer.train()
    projector = clock.projector

    step = clock.steps[-1]
    total = steps * step
    figures = {"peak memory": _peak_memory()}
    processes = trainer.args.world_size
    each = f", in each of {processes} processes" if processes > 1 else ""
    build = 0.0
    if projector is not None and projector.activations is not None:
        build = projector.diagnostics.stopwatch.totals()["build"]
        size = projector.activations.bytes()
        figures["activation subspace"] = f"{size:,} bytes ({_mebibytes(size)}), built in {build:.1f} seconds{each}"
        total += build
    if projector is not None and projector.subspace is not None:
        subspace = projector.subspace
        rows = subspace.rows.stack
        stacks = [rows] if subspace.directions is rows else [rows, subspace.directions]
        size = sum(part.numel() * part.element_size() for stack in stacks for part in stack)
        figures["reference rows"] = (
            f"{size:,} bytes ({_mebibytes(size)}), {subspace.rows.capacity} rows in each block{each}"
        )
    figures["seconds per step"] = f"{step:.3f}"
    if projector is not None and projector.subspace is not None:
        refresh = clock.refreshes[-1]
        refreshes = planned_refreshes(steps, projector.config.refresh_steps)
        total += refreshes * refresh
        figures["seconds per refresh"] = f"{refresh:.3f}"
        figures["whole run"] = f"{_duration(total)} for {steps} steps and {refreshes} refreshes"
        figures["share spent on references"] = f"{(build + refreshes * refresh) / total:.0%}"
    else:
        figures["whole run"] = f"{_duration(total)} for {steps} steps"
        if build:
            figures["share spent on references"] = f"{build / total:.0%}"
    console.print(f"Dry run: it took {_STEPS} steps and saved nothing.")
    for name, figure in figures.items():
        console.print(f"  {name:<27}{figure}", highlight=False)


def planned_steps(trainer: Trainer) -> int:
    """Return the optimizer steps of the whole run, with as many processes as this run has."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    batches = len(trainer.train_dataset) / (args.train_batch_size * args.world_size)  # type: ignore[arg-type]
    whole = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return math.ceil(args.num_train_epochs * max(math.ceil(whole / args.gradient_accumulation_steps), 1))


def planned_refreshes(steps: int, refresh_steps: int) -> int:
    """Return the refreshes of the whole run: before the first and the second step, then at regular intervals."""
    return steps if steps < 2 else 2 + (steps - 2) // refresh_steps


def _peak_memory() -> str:
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return f"{_mebibytes(peak)} on the GPU"
    try:
        import resource
    except ImportError:  # Windows has none
        return "not measured on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return f"{_mebibytes(peak if sys.platform == 'darwin' else peak * 1024)} of main memory for the whole process"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {round(seconds) % 60:02} s"
