# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Figures about what the projector did and what it cost, collected without waiting for the device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Stopwatch:
    """Total seconds spent under each name. On CUDA it uses events, so that nothing waits."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def __call__(self, name: str, device: torch.device) -> Iterator[None]:
        """Time the enclosed work."""
        if device.type != "cuda":
            start = time.perf_counter()
            try:
                yield
            finally:
                self._add(name, time.perf_counter() - start)
            return
        events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        with torch.cuda.device(device):
            events[0].record()
            try:
                yield
            finally:
                events[1].record()
        self._pending.append((name, *events))
        if len(self._pending) >= 512:  # a loop that never asks for totals must not keep events forever
            self._settle(self._pending[:256])
            del self._pending[:256]

    def totals(self) -> dict[str, float]:
        """Seconds by name since the start. Waits for the device."""
        self._settle(self._pending)
        self._pending = []
        return dict(self.seconds)

    def _settle(self, events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]]) -> None:
        for name, start, end in events:
            end.synchronize()
            self._add(name, start.elapsed_time(end) / 1000)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class Diagnostics:
    """Figures for the log, averaged since the last collection.

    Attributes:
        stopwatch (`Stopwatch`): Seconds spent in `"build"`, `"refresh"` and `"projection"`.
        removed_by_kind (`Callable`): Returns, by kind of layer, the share of the steps that an activation subspace
            removed since the previous call.
        reference_examples (`int`): Reference examples passed forward and backward so far.
        refreshes (`int`): Refreshes so far.
    """

    def __init__(self) -> None:
        self.stopwatch = Stopwatch()
        self.reference_examples = 0
        self.refreshes = 0
        self._losses: dict[str, float] = {}
        self._cosines: dict[str, Tensor] = {}
        self._removed: Tensor | None = None
        self._reference: Tensor | None = None
        self._steps = 0
        self._energies: dict[str, float] = {}
        self.removed_by_kind: Callable[[], dict[str, float]] = dict
        self._reported: dict[str, float] = {}

    def forget(self) -> None:
        """Drop what is left of the stage before, for a new stage of training with its own sets and its own steps."""
        self._losses, self._cosines, self._reference = {}, {}, None
        self._removed, self._steps = None, 0
        self.removed_by_kind()  # it counts from the last call on

    def record_losses(self, losses: dict[str, float]) -> None:
        """Record the reference loss of every set, in the loss's own unit (nats per token for `ReferenceSet`)."""
        self._losses.update(losses)

    def record_cosines(self, cosines: dict[str, Tensor]) -> None:
        """Record the cosine of the training gradient with every set's mean reference gradient."""
        self._cosines = dict(cosines)

    def record_reference(self, norm: Tensor) -> None:
        """Record the norm of what was added to the training gradient, after its weight and its clipping."""
        self._reference = norm

    def record_projection(self, removed_squared: Tensor, total_squared: Tensor) -> None:
        """Record the squared norms of one step: of the removed part, and of the step before projection."""
        share = (removed_squared / total_squared.clamp(min=torch.finfo(total_squared.dtype).tiny)).sqrt()
        self._removed = share if self._removed is None else self._removed + share
        self._steps += 1

    def record_energies(self, shares: dict[str, float | None]) -> None:
        """Record the share of held-out inputs' energy that the activation subspace holds, by kind of layer."""
        self._energies = {kind: share for kind, share in shares.items() if share is not None}

    def collect(self) -> dict[str, float]:
        """The figures since the last call, by log name; waits for the device.

        Returns:
            The figures by name. `ogpsa/loss/SET` is the loss at the last refresh that used the set. `ogpsa/cosine/SET`
            is the cosine at the last refresh; if it is positive, the training gradient also lowers that reference
            loss. `ogpsa/reference_norm` is the norm of the weighted reference gradient that was last added to the
            training gradient, whose own norm is `grad_norm`. `ogpsa/removed` is the removed norm divided by the norm
            before, mean over steps, 0 to 1. `ogpsa/seconds_refresh`, `ogpsa/seconds_build` and
            `ogpsa/seconds_projection` are times. With an activation subspace there are `ogpsa/removed/KIND` (the same
            by kind of layer, of the matrices that the subspace projects) and, once, `ogpsa/energy/KIND` (the share of
            the energy of held-out reference inputs that lies in the subspace). Empty if nothing has happened.
        """
        figures = {f"ogpsa/loss/{name}": loss for name, loss in self._losses.items()}
        figures |= {f"ogpsa/cosine/{name}": float(value) for name, value in self._cosines.items()}
        if self._reference is not None:
            figures["ogpsa/reference_norm"] = float(self._reference)
        if self._removed is not None:
            figures["ogpsa/removed"] = float(self._removed) / self._steps
        self._removed, self._steps = None, 0
        figures |= {f"ogpsa/removed/{kind}": share for kind, share in self.removed_by_kind().items()}
        figures |= {f"ogpsa/energy/{kind}": share for kind, share in self._energies.items()}
        self._energies = {}
        for name, seconds in self.stopwatch.totals().items():
            figures[f"ogpsa/seconds_{name}"] = seconds - self._reported.get(name, 0.0)
            self._reported[name] = seconds
        return figures
