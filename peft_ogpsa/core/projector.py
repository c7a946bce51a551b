# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The projector, which projects an optimizer's own steps in any training loop.

`hooks` notifies the projector of every optimizer step. If the optimizer trains the projector's parameters, the
projector changes the gradient before the step, or the parameters after it.

With several processes, each computes reference gradients of its share of every batch. Under DDP the sum of these
gradients makes the same rows everywhere, so every process projects its own, equal step by itself. Under FSDP2 every
process holds a shard of the rows and of the step. In a step the processes exchange only one sum of inner products.
"""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from . import distributed, hooks, inputs
from .activation_subspace import LEAK, PREFIX, ActivationSubspace, most_directions
from .config import ProjectionConfig
from .diagnostics import Diagnostics
from .gradient_subspace import Slots, Subspace
from .gradients import LossFn, batch_gradient, batch_size, example_gradients, examples_of, sharded_gradient
from .guard import Guard, refuse_averaging
from .isolation import undisturbed
from .layout import Blocks, Stack

if TYPE_CHECKING:
    from .kernels import Launcher
    from .targets import Targets

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_LOW_PRECISION = (torch.bfloat16, torch.float16)


class Projector:
    """The reference subspace of the parameters in training, which projects each optimizer step.

    `get_peft_model(model, OGPSAConfig(...))` creates it, or `attach` for a model's own weights. The training loop only
    needs to call `refresh`. `OGPSACallback` makes this call in the trainers of transformers and TRL. In an adapter,
    only the LoRA matrices A and B in training are projected. The optimizer steps other trainable parameters
    (`modules_to_save`, biases, DoRA magnitudes) as usual.

    With `projection="update"` the constraint holds for the parameters' real change in the step, whatever caused it:
    momentum, preconditioning, clipping and decoupled weight decay are included. With `projection="gradient"` the
    constraint holds only for the gradient, as in the paper. The step that the optimizer makes from this gradient may
    not meet it.

    Attributes:
        enabled (`bool`): Set to `False` to train without projection for a while.
        diagnostics (`Diagnostics`): What was done and what it cost.
        kernels (`bool`): Set to `True`, or set the environment variable `PEFT_OGPSA_KERNELS=1`, to use the Triton
            kernels of `kernels.py` where they apply: the cone on the update of float32 parameters on CUDA, with up to
            64 rows in float32 or bfloat16. Experimental: the kernels have been compiled for GPUs and run in Triton's
            interpreter, but not on a GPU yet.
        max_grad_norm (`float`, *optional*): The norm that the training gradient is clipped to. The callback takes it
            from the trainer's arguments. The mean reference gradient is clipped to the same norm, before it is
            multiplied by `reference_weight`. `None`: no clipping.
        steps (`int`): Number of steps of the optimizer that trains the parameters, projected or not.
        skipped (`int`): Number of steps that a gradient scaler has skipped. `steps` does not count them.
    """

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self.enabled = True
        self.diagnostics = Diagnostics()
        self.kernels = os.environ.get("PEFT_OGPSA_KERNELS") == "1"
        self.max_grad_norm: float | None = None
        self.steps = self.skipped = 0
        self.subspace: Subspace | None = None
        self.activations: ActivationSubspace | None = None
        self._built_with: tuple = ()  # the settings that the activation subspace depends on
        self._built_for: dict[str, nn.Parameter] = {}  # the parameters in training when it was built
        self._moves = True  # whether the current step can move anything
        self._moved = 0  # steps that could move something, so not those with a learning rate of 0
        self._steps_since_refresh = 0  # counts only such steps
        self._fresh: list[int] = []  # slots whose rows were computed at the current parameters
        self._weights: dict[str, float] = {}  # of the reference sets, if the configuration gives none
        self._made_with: tuple | None = None  # the settings that the subspace depends on
        self.guard = Guard(self)
        self._before: Stack | None = None
        self._remembered = False  # whether the activation subspace will project the current step
        self._masters: Stack | None = None
        self._last_launcher: Launcher | None = None
        self._warned = False
        # Other models' optimizers, with the parameters that they and we had, so that their steps need no search.
        self._strangers: weakref.WeakKeyDictionary[Optimizer, tuple[set[int], set[int]]] = weakref.WeakKeyDictionary()
        # At a step that follows a refresh: the gradient's overlaps with the rows, this process's part.
        self._overlaps: Tensor | None = None
        hooks.watch(self)

    # The parameters in training

    @property
    def config(self) -> ProjectionConfig:
        """The settings of the parameters in training.

        Raises:
            ValueError: If several trainable OGPSA adapters have different projection settings.
        """
        return self._targets.config

    @property
    def _model(self) -> nn.Module:
        return self._targets.model

    def _trained(self) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """The parameters in training by name, and their owners."""
        trained = self._targets.trained()
        return {name: parameter for name, _, parameter in trained}, {name: owner for name, owner, _ in trained}

    def _trained_ids(self) -> set[int]:
        return {id(parameter) for _, _, parameter in self._targets.trained()}

    @property
    def names_others(self) -> bool:
        """Whether the user gets the names of trained parameters that are not projected."""
        return self._targets.names_others

    def widen(self) -> None:
        """Convert the parameters in training to float32 if they have lower precision; made for adapters.

        In bfloat16 a small projected update is lost to rounding. Rounding alone then breaks the constraint, and Adam's
        moments do not change. TRL casts the adapters of quantized models to bfloat16 and offers no choice. Autocast
        still computes in the lower precision.
        """
        self._targets.forget()
        for parameter in self._trained()[0].values():
            if parameter.dtype in _LOW_PRECISION:
                parameter.data = parameter.data.float()

    # Reference gradients

    @property
    def due(self) -> bool:
        """Whether a refresh is due before the next step.

        An activation subspace needs one refresh before the first step, which builds it. Reference gradients need one
        every `refresh_steps` steps, and one more after the first step that moved the parameters. At LoRA's usual start
        B is zero, and so are all gradients of A, so the first rows contain nothing about A. A step with a learning
        rate of 0, such as the first step of a warm-up, moves nothing and does not count. A refresh is also due if the
        subspace was made for other parameters or settings than those in training, as after `set_adapter`. If both
        kinds are due, the first refresh builds the activation subspace and another refresh is due at once. So call
        `refresh` in a loop, `while` this is true.
        """
        config = self.config
        if self._lacks_activations(config):
            return True
        if not config.refreshes:
            self.guard.check_changes()
            return False
        if self.subspace is None or self._made_with != _shape_of(config):
            return True
        if not _same_parameters(self.subspace.blocks, self._trained()[0]):
            return True
        self.guard.check_changes()
        return self._steps_since_refresh >= self.config.refresh_steps or self._moved == self._steps_since_refresh == 1

    def refresh(
        self,
        batches: Mapping[str, Iterable[Any]],
        loss_fn: LossFn,
        model: nn.Module | None = None,
        weights: Mapping[str, float] | None = None,
        progress: Callable[[list], Iterable] = iter,
    ) -> dict[str, float]:
        """Build the activation subspace, if it is configured and missing; otherwise compute reference gradients.

        Reference gradients are computed at the current parameters and stored in the gradient subspace. Training is not
        disturbed: `.grad`, random states and the mode of every module are the same afterwards.

        With several processes, all must call it with the same batches. Each passes every n-th example of a batch
        (under FSDP2 with `rows_from="example"` all of them, one at a time). Call it between optimizer steps, not
        between the micro-batches of one step.

        Args:
            batches (`Mapping[str, Iterable]`): The batches of each reference set, by name. With `rows_from="batch"`
                each batch gives one reference gradient, with `"example"` each example gives one, and with `"set"` the
                gradient is the mean over all batches of the set, weighted by their numbers of examples.
            loss_fn (`Callable`): `loss_fn(model, batch)` returns the scalar loss to preserve, a mean over the batch.
            model (`nn.Module`, *optional*): The model that is passed to `loss_fn`; by default the OGPSA model itself,
                uncompiled. Under FSDP2 it must be, or be inside, the module that was sharded as a whole by the
                outermost `fully_shard`.
            weights (`Mapping[str, float]`, *optional*): For each set, how much of its mean gradient is added to the
                training gradient if the configuration has `reference_weight=None`. A set without an entry has the
                weight 1, which suits losses of given answers.
            progress (`Callable`, *optional*): Wraps the list of passes that build the activation subspace, for a
                progress bar.

        Returns:
            The mean loss of each set over its finite batches. Empty if the activation subspace was built. In that case
            `loss_fn` only passes the batches through the model, without its adapter.

        Raises:
            ValueError: If there is no set, a set without batches, or more reference gradients than `rows`; if
                `loss_fn` returns no scalar that depends on the adapter; if the adapter is merged, or two parameters
                share memory; if processes get different batches. Existing rows are kept, except after a failed FSDP2
                pass, which clears them.
            FloatingPointError: If no reference gradient is finite. If only some are not finite, their rows are left
                out, with a warning.
        """
        config = self.config
        sets = _checked(batches)
        if self._lacks_activations(config):
            self._build(config, sets, loss_fn, self._model if model is None else model, progress)
            return {}
        if not config.refreshes:
            return {}
        sizes = {name: [batch_size(batch) for batch in items] for name, items in sets.items()}
        counts = {name: _rows_given(config.row_of, own) for name, own in sizes.items()}
        self._targets.check()
        subspace = self._subspace_for(config, list(sets))
        distributed.check_agreement(
            [number for own in sizes.values() for number in (len(own), *own)],
            subspace.blocks.device,
            "The sizes of the reference batches",
        )
        by_set = config.row_of == "set"
        slots = subspace.claim_for(list(sets)) if by_set else subspace.claim(sum(counts.values()))
        model = self._model if model is None else model
        with (
            self.diagnostics.stopwatch("refresh", subspace.blocks.device),
            undisturbed(model, gradients=True),
        ):
            sums, free = [], iter(slots)
            try:
                for name, items in sets.items():
                    own = [next(free) for _ in range(counts[name])]
                    sums.append(self._fill(subspace, own, config.row_of, model, items, sizes[name], loss_fn))
            except BaseException:
                if subspace.blocks.sharded:
                    self.subspace = None  # all processes must discard it, and some may be at a different point
                else:
                    subspace.discard(slots)  # the older rows stay as they were
                raise
            if self.activations is not None and config.uses_activations:
                with self._full_precision():
                    for rows in subspace.views_of(slots):
                        self.activations.project_rows(rows)
            subspace.add_up(slots)
            owners = [name for name, count in counts.items() for _ in range(count)]
            bad = subspace.commit(slots, owners)
            (means,) = distributed.summed([torch.stack(sums)])
        losses = {
            name: total / weight if weight else math.nan
            for name, (total, weight) in zip(sets, means.tolist(), strict=True)
        }
        self._report_bad(bad, slots, owners)
        self._fresh = [slot for slot in slots if slot not in bad]
        self._weights = {name: 1.0 if weights is None else weights.get(name, 1.0) for name in sets}
        self._steps_since_refresh = 0
        self.diagnostics.refreshes += 1
        self.diagnostics.reference_examples += sum(map(sum, sizes.values()))
        self.diagnostics.record_losses(losses)
        self.guard.after_refresh(self._moved)
        return losses

    # The activation subspace

    @property
    def unbuilt(self) -> bool:
        """Whether the next refresh builds the activation subspace. That refresh needs all reference examples."""
        return self._lacks_activations(self.config)

    def _lacks_activations(self, config: ProjectionConfig) -> bool:
        """Whether the activation subspace must be built: it is missing, or made for other parameters or settings."""
        if not config.uses_activations:
            return False
        if self.activations is None or self._built_with != _inputs_of(config):
            return True
        trained, _ = self._trained()
        own = self._built_for
        return own.keys() != trained.keys() or any(own[name] is not trained[name] for name in own)

    def _drop_activations(self) -> None:
        self.activations, self._built_for = None, {}
        self.diagnostics.removed_by_kind = dict

    def _build(
        self,
        config: ProjectionConfig,
        batches: inputs.Batches,
        forward: LossFn,
        model: nn.Module,
        progress: Callable[[list], Iterable],
    ) -> None:
        distributed.reshard(self._model)
        self._targets.forget()
        self._targets.check()
        matrices = self._targets.matrices()
        if not matrices:
            raise ValueError(
                f"There is no matrix for subspace={config.subspace!r} to project: no LoRA matrix A, or weight of a "
                "linear layer, is in training."
            )
        device = distributed.local(matrices[0].parameter).device
        sizes = {name: [batch_size(batch) for batch in own] for name, own in batches.items()}
        distributed.check_agreement(
            [number for own in sizes.values() for number in (len(own), *own)], device, "The sizes of the batches"
        )
        with self.diagnostics.stopwatch("build", device), undisturbed(model), self._targets.original():
            found = inputs.find(
                {matrix.layer: matrix.module for matrix in matrices},
                forward,
                model,
                batches,
                most=most_directions,
                rank=config.subspace_rank,
                energy=config.subspace_energy,
                tokens=config.tokens,
                progress=progress,
            )
        distributed.reshard(self._model)
        with _full_precision(device):
            self._hold(ActivationSubspace(matrices, found, _DTYPES[config.rows_dtype]), config)

    def _hold(self, activations: ActivationSubspace, config: ProjectionConfig) -> None:
        """Store a subspace and move the adapter into its complement."""
        leak = activations.enter()
        if leak > LEAK:
            logger.warning(
                "Up to %.1f %% of what the adapter did in a layer acted on the reference inputs: it was trained with "
                "other reference sets. That part has been removed from it.",
                100 * leak,
            )
        else:
            logger.info(
                "At most %.2g %% of what the adapter did in a layer lay in the subspace. It was removed.", 100 * leak
            )
        self.activations, self._built_with = activations, _inputs_of(config)
        self._built_for, _ = self._trained()
        self.diagnostics.removed_by_kind = activations.removed
        self.diagnostics.record_energies({own.name: own.held_out for own in activations.kinds()})
        self.subspace = self._before = self._masters = None  # they belong to the adapter as it was
        self.guard.forget()
        self.guard.after_step()

    # Reference gradients

    def _subspace_for(self, config: ProjectionConfig, sets: Sequence[str]) -> Subspace:
        distributed.reshard(self._model)
        self._targets.forget()  # loading weights may have replaced parameters
        parameters, _ = self._trained()
        old = self.subspace
        if old is not None and not (self._made_with == _shape_of(config) and _same_parameters(old.blocks, parameters)):
            old = None  # its rows cannot be used
        capacity = config.rows
        if config.row_of == "set":
            held = [name for name in (old.sets if old else ()) if name is not None]
            names = dict.fromkeys([*held, *sets])
            capacity = len(names)
            if capacity > config.rows:
                raise ValueError(
                    f"rows={config.rows} cannot hold one row for each of {capacity} reference sets "
                    f"({', '.join(map(repr, names))}). Set rows={capacity} or more."
                )
            capacity = max(capacity, old.capacity if old else 0)
        if old is None:
            self.subspace = None  # free the old rows before the new ones are created
            self._before = self._masters = None
            self.guard.forget()
        if old is None or old.capacity != capacity:
            self.subspace, self._made_with = self._new_subspace(config, capacity), _shape_of(config)
            if old is not None:
                self.subspace.adopt(old)
        assert self.subspace is not None
        return self.subspace

    def _new_subspace(self, config: ProjectionConfig, capacity: int) -> Subspace:
        parameters, owners = self._trained()
        blocks = Blocks(parameters, owners, config.scope, config.slices)
        linears = _linears_of(self._model)
        self._linears = [linears.get(id(parameter)) for parameter in blocks.flat_parameters()]
        return Subspace(
            blocks,
            capacity,
            config.constraint,
            _DTYPES[config.rows_dtype],
            config.subspace_rank,
            self._targets.rows_on_host,
        )

    def _fill(
        self,
        subspace: Subspace,
        slots: Sequence[int],
        rows_from: str,
        model: nn.Module,
        batches: Sequence[Any],
        sizes: Sequence[int],
        loss_fn: LossFn,
    ) -> Tensor:
        """Fill one set's slots with this process's part of its raw gradients.

        Returns:
            `(2,)`: the losses of the set's finite passes, summed with their numbers of examples as weights, and the
            sum of these weights.
        """
        blocks = subspace.blocks
        losses: list[tuple[Tensor, float]] = []

        def add(batch: Any, size: int, sink: Slots, weight: float) -> None:
            """Add this process's part. The sum over processes is the batch's gradient times `weight`."""
            own = distributed.share(size)
            if blocks.sharded:
                # All processes must make a pass. A process without examples passes another's, with weight 0.
                part = examples_of(batch, own or [0])
                loss = sharded_gradient(model, part, loss_fn, blocks, sink, weight * len(own) / size)
            elif own:
                sink.weight = weight * len(own) / size
                part = batch if len(own) == size else examples_of(batch, own)
                loss = batch_gradient(model, part, loss_fn, blocks, sink)
            if own:
                losses.append((loss, len(own)))

        if rows_from == "set":
            # Summed in float32, whatever the dtype of the rows.
            total = blocks.zeros(rows=1)
            mean = Slots(blocks, total, [part.new_ones(part.shape[:2]) for part in total], [0])
            for batch, size in zip(batches, sizes, strict=True):
                add(batch, size, mean, size / sum(sizes))
            row = subspace.open(slots)
            for piece, view in enumerate(blocks.views(total)):
                row.add(piece, view)
        elif rows_from == "batch":
            for slot, batch, size in zip(slots, batches, sizes, strict=True):
                add(batch, size, subspace.open([slot]), 1.0)
        else:
            writer = subspace.open(slots)
            start = 0
            for batch, size in zip(batches, sizes, strict=True):
                mine = range(start, start + size)
                start += size
                if blocks.sharded:
                    for i, place in enumerate(mine):
                        share = 1 / distributed.count()
                        part = examples_of(batch, [i])
                        loss = sharded_gradient(model, part, loss_fn, blocks, writer.of([place]), share)
                        losses.append((loss, share))
                elif own := distributed.share(size):
                    sink = writer.of([mine[i] for i in own])
                    part = batch if len(own) == size else examples_of(batch, own)
                    losses.append((example_gradients(model, part, loss_fn, blocks, sink, self._linears), len(own)))
        if not losses:
            return torch.zeros(2, dtype=torch.float64, device=blocks.device)
        values = torch.stack([loss for loss, _ in losses]).double()
        weights = torch.tensor([weight for _, weight in losses], dtype=values.dtype, device=values.device)
        finite = torch.isfinite(values)
        return torch.stack([(torch.where(finite, values, 0.0) * weights).sum(), (finite * weights).sum()])

    def _report_bad(self, bad: Sequence[int], slots: Sequence[int], owners: Sequence[str]) -> None:
        if not bad:
            return
        counts = {name: sum(owners[slots.index(slot)] == name for slot in bad) for name in dict.fromkeys(owners)}
        listing = ", ".join(f"{count} of {owners.count(name)} in {name!r}" for name, count in counts.items() if count)
        if len(bad) == len(slots):
            self.subspace = None
            raise FloatingPointError(
                f"No reference gradient is finite ({listing}). Check the model's loss on the reference sets and the "
                "dtype (float16 overflows: use bfloat16 or float32), and lower the learning rate if training diverged."
            )
        logger.warning("Reference gradients that are not finite were skipped: %s.", listing)

    def memory(self, sets: int) -> tuple[int, int]:
        """Bytes for `sets` reference sets: of the subspaces, which stay stored, and more for an optimizer step.

        The numbers are computed from the parameters in training, before any row exists, for this process's part. Gram
        matrices, norms and, for parameters of lower precision, their float32 copy are not counted.
        """
        config = self.config
        blocks = Blocks(*self._trained(), config.scope, config.slices)
        held, more = (0, 0) if self.activations is None else (self.activations.bytes(), self.activations.step_bytes())
        if config.refreshes:
            rows = sets if config.row_of == "set" else config.rows
            bases = 2 if config.constrains and config.constraint == "orthogonal" else 1
            numels = [group.pieces * group.numel for group in blocks.groups]
            held += bases * rows * sum(numels) * _DTYPES[config.rows_dtype].itemsize
            more += 4 * (sum(numels) + max(numels))  # the snapshot, and the correction of one group
        return held, more

    def reset(self) -> None:
        """Forget the rows and restart the counters, for a new stage of training.

        The activation subspace stays if the adapter in its complement is in use.
        """
        if self.activations is not None and not self.activations.in_use():
            self._drop_activations()
        self.subspace = self._before = self._masters = self._overlaps = self._last_launcher = None
        self._fresh = []
        self._weights = {}
        self.steps = self._moved = self._steps_since_refresh = 0
        self.diagnostics.forget()
        self.guard.forget()

    def retire(self) -> None:
        """Stop watching the optimizer's steps permanently, because the adapter has been unloaded."""
        self.reset()
        self._drop_activations()
        hooks.unwatch(self)

    # The optimizer step

    def _full_precision(self) -> AbstractContextManager:
        """Disable TF32 and autocast, in which a loop may step its optimizer."""
        device = self._device
        return nullcontext() if device is None else _full_precision(device)

    def trains(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer is about to step our parameters; see `hooks.Watcher`."""
        if not self._stepped(optimizer):
            return False
        if _skips(optimizer):
            self.skipped += 1
            self.guard.expect_changes()
            return False
        return True

    def begin_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Run before every step of our parameters; may replace the step's arguments to wrap a closure."""
        self._before = None  # may remain from a step that raised an error
        self._remembered = False
        self._moves = self._can_move(optimizer)
        config = self.config
        if not (self.enabled and self._is_ready(optimizer, config)):
            return None
        refuse_averaging(optimizer, config)
        self.guard.check_changes()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        assert self._device is not None
        with self._full_precision():
            if closure is None:
                self._on_gradient(optimizer)
                self._fresh = []  # not at the end: if the step fails and is tried again, they are in its gradient
            # For any learning rate: the rate only decides whether the step counts.
            with self.diagnostics.stopwatch("projection", self._device):
                if config.uses_activations:
                    assert self.activations is not None
                    self.activations.remember()
                    self._remembered = True
                if config.constrains and config.projection == "update":
                    assert self.subspace is not None
                    self._snapshot(self.subspace.blocks)
        if closure is None:
            return None

        def then_project() -> Any:
            loss = closure()
            with torch.no_grad(), self._full_precision():
                self._on_gradient(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": then_project}
        return (args[0], then_project, *args[2:]), kwargs

    def _stepped(self, optimizer: Optimizer) -> set[int]:
        """The `id` of each of our parameters in training that the optimizer holds."""
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trained = self._trained_ids()
        if not trained & owned and self._strangers.get(optimizer) != (owned, trained):
            self._targets.forget()  # the optimizer may hold parameters that have replaced those we know
            trained = self._trained_ids()
            if not trained & owned:
                self._strangers[optimizer] = owned, trained
        return trained & owned

    def _can_move(self, optimizer: Optimizer) -> bool:
        """Whether a step can move anything. With a learning rate of 0 it cannot.

        Some optimizers have no rate, or `None` if they find their own. Reading a rate from an accelerator would wait
        for the device, so this is done only for the first steps.
        """

        def still(rate: Any) -> bool:
            if rate is None or (isinstance(rate, Tensor) and rate.device.type != "cpu" and self._moved > 0):
                return False
            return not rate

        return not all(still(group.get("lr")) for group in optimizer.param_groups)

    @property
    def _device(self) -> torch.device | None:
        """The device that solves small problems; `None` before there is a subspace."""
        if self.subspace is not None:
            return self.subspace.blocks.device
        return None if self.activations is None else self.activations.device

    def projected(self) -> dict[str, Tensor]:
        """The parameters that a subspace was made for, by name; empty before there is one."""
        own: dict[str, Tensor] = {} if self.activations is None else dict(self._built_for)
        if self.subspace is not None:
            blocks = self.subspace.blocks
            own |= dict(zip(blocks.names(), blocks.flat_parameters(), strict=True))
        return own

    def _is_ready(self, optimizer: Optimizer, config: ProjectionConfig) -> bool:
        """Whether everything that is needed to project a step of this optimizer is available."""
        stepped = self._stepped(optimizer)
        trained, _ = self._trained()
        rows = self.subspace
        lacking = []
        if self._lacks_activations(config):
            lacking.append(("activation subspace", self.activations is not None))
        if config.refreshes and (rows is None or not _same_parameters(rows.blocks, trained)):
            lacking.append(("reference gradients", rows is not None))
        if lacking:
            if self._moves:
                self._missing_reference(*lacking[0])
            # Otherwise nothing moves. torch makes such a step when it loads an optimizer's state from shards.
            return False
        if len(stepped) < len(trained):
            absent = next(name for name, parameter in trained.items() if id(parameter) not in stepped)
            raise RuntimeError(
                f"The optimizer holds {len(stepped)} of the {len(trained)} {self._targets.kind} parameters in "
                f"training; {absent}, for one, is not in it. Give all of them to one optimizer, or freeze the others "
                "(requires_grad_(False)) and refresh."
            )
        return True

    def _missing_reference(self, what: str, outdated: bool) -> None:
        mode = self.config.missing_reference
        if mode == "ignore":
            return
        found = f"{what} of another adapter only" if outdated else f"no {what}"
        message = (
            f"The optimizer steps {self._targets.what} that has {found}, so there is nothing to project onto. Add "
            "OGPSACallback(reference_sets=[ReferenceSet(...)]) to the trainer, or call "
            "model.projector.refresh(batches, loss_fn) before the step in your own loop, while model.projector.due. "
            f'To train without projection, set missing_reference="ignore" in {self._targets.settings}.'
        )
        if mode == "error":
            raise RuntimeError(message)
        if not self._warned:
            logger.warning(message)
            self._warned = True

    @torch.no_grad()
    def _on_gradient(self, optimizer: Optimizer) -> None:
        """Process the step's final gradients: figures, reference weight, gradient projection."""
        config = self.config
        if self.subspace is not None and config.refreshes:
            self._on_rows(optimizer, self.subspace, config)
        if config.uses_activations:
            assert self.activations is not None
            with self.diagnostics.stopwatch("projection", self.activations.device):
                self.activations.project_gradients()

    def _on_rows(self, optimizer: Optimizer, subspace: Subspace, config: ProjectionConfig) -> None:
        blocks = subspace.blocks
        project = config.constrains and config.projection == "gradient"
        if not (project or self._fresh):
            return
        with self.diagnostics.stopwatch("projection", blocks.device):
            parameters = blocks.flat_parameters()
            gradients = [parameter.grad for parameter in parameters]
            stack = blocks.stack(gradients)
            if self._fresh:
                self._overlaps = subspace.overlaps(stack)
                if not config.constrains:
                    self._record_cosines(*blocks.total(self._overlaps))
            if project:
                coefficients = self._solve(stack)
                for own, correction in zip(blocks.shaped(stack), subspace.corrections(coefficients), strict=True):
                    torch._foreach_add_(own, correction)
            # Added after the projection, which would remove all of it, because it lies in the rows' span.
            factors = self._factors()
            weighted = bool(self._fresh and any(factors.values()))
            if weighted:
                weights = subspace.mean_weights(self._fresh, factors) * self._clipping(subspace)
                self.diagnostics.record_reference(subspace.length(weights))
                # A fused optimizer may unscale float16 gradients itself. Then they are still scaled here.
                scale = getattr(optimizer, "grad_scale", None)
                weights = weights if scale is None else weights * scale.to(weights.device)
                torch._foreach_add_(stack, subspace.combine(weights))
            if project or weighted:
                found = [
                    (distributed.local(gradient), own)
                    for gradient, own in zip(gradients, chain.from_iterable(blocks.shaped(stack)), strict=True)
                    if gradient is not None
                ]
                torch._foreach_copy_([gradient for gradient, _ in found], [own for _, own in found])

    def _clipping(self, subspace: Subspace) -> Tensor | float:
        """The factor that clips the mean reference gradient to `max_grad_norm`, as `clip_grad_norm_` would."""
        if self.max_grad_norm is None:
            return 1.0
        return (self.max_grad_norm / (subspace.length(subspace.mean_weights(self._fresh)) + 1e-6)).clamp(max=1.0)

    def _factors(self) -> dict[str, float]:
        """The factor of each fresh set's mean gradient when it is added to the training gradient."""
        given = self.config.reference_weight
        if given is None and not self.config.constrains:
            given = 0.0
        return self._weights if given is None else dict.fromkeys(self._weights, given)

    def _solve(self, stack: Stack) -> Tensor:
        """The coefficients of a descent direction's correction. All communication of a step happens here."""
        subspace = self.subspace
        assert subspace is not None
        parts = [part.flatten().dot(part.flatten()).to(subspace.blocks.device) for part in stack]
        waiting = [] if self._overlaps is None else [self._overlaps]
        products, total, *overlaps = subspace.blocks.total(
            subspace.directed(stack), torch.stack(parts).sum(), *waiting
        )
        if overlaps:
            self._record_cosines(overlaps[0])
        coefficients, removed = subspace.coefficients(None, products)
        self.diagnostics.record_projection(removed.sum(), total)
        return coefficients

    def _record_cosines(self, overlaps: Tensor) -> None:
        assert self.subspace is not None
        self.diagnostics.record_cosines(self.subspace.cosines(None, overlaps))
        self._overlaps = None

    def _launcher(self) -> Launcher | None:
        """The Triton kernels, if they are switched on and can make this step."""
        assert self.subspace is not None
        if not self.kernels or self._masters is not None or find_spec("triton") is None:
            return None
        from .kernels import launcher

        self._last_launcher = launcher(self.subspace, self._last_launcher)
        return self._last_launcher

    def _snapshot(self, blocks: Blocks) -> None:
        launcher = self._launcher()
        if launcher is not None:
            self._before = launcher.snapshot()
            return
        stored = blocks.stack()
        if any(group.dtype in _LOW_PRECISION for group in blocks.groups):
            # Parameters of low precision cannot hold a small projected update, so a float32 copy collects it. If the
            # stored parameter is no longer the rounded copy, other code has changed it. Then its value is used.
            masters = stored if self._masters is None else self._masters
            self._masters = [
                torch.where(master.to(group.dtype).float() == now, master, now)
                for master, now, group in zip(masters, stored, blocks.groups, strict=True)
            ]
        self._before = stored

    def end_step(self, optimizer: Optimizer) -> None:
        """Run after every step of our parameters that raised no error."""
        if self._remembered or self._before is not None:
            assert self._device is not None
            with self._full_precision(), self.diagnostics.stopwatch("projection", self._device):
                if self._remembered:
                    assert self.activations is not None
                    self.activations.project_step()
                if self._before is not None:
                    assert self.subspace is not None
                    self._project_update(self.subspace.blocks, self._before)
                    if self._remembered:  # the removed part lay in the complement, up to rounding
                        assert self.activations is not None
                        self.activations.project_step(record=False)
            self._before, self._remembered = None, False
        self.steps += 1
        if self._moves:
            self._moved += 1
            self._steps_since_refresh += 1
            self._fresh = []
        self.guard.after_step()

    def _project_update(self, blocks: Blocks, before: Stack) -> None:
        assert self.subspace is not None
        launcher = self._launcher()
        if launcher is not None:
            if self._overlaps is not None:
                self._record_cosines(self._overlaps)
            self.diagnostics.record_projection(*launcher.project(self.subspace, before))
            return
        parameters = blocks.local_parameters()
        # The step as a descent direction (before minus after), in the snapshot's memory.
        step = before
        torch._foreach_sub_(list(chain.from_iterable(blocks.shaped(step))), list(chain.from_iterable(parameters)))
        coefficients = self._solve(step)
        if self._masters is None:
            # Subtracting only the correction keeps parameters the same, to the bit, if nothing conflicts.
            for own, correction in zip(parameters, self.subspace.corrections(coefficients), strict=True):
                torch._foreach_sub_(own, correction)
                del correction  # before the next group's is computed
            return
        torch._foreach_sub_(self._masters, step)
        masters = blocks.shaped(self._masters)
        for own, master, correction in zip(parameters, masters, self.subspace.corrections(coefficients), strict=True):
            torch._foreach_sub_(master, correction)
            torch._foreach_copy_(own, master)
            del correction

    # State

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue exactly: the subspace and the refresh counters.

        Under FSDP2 all processes must call it. The first process gets the full tensors; the others get none.

        Returns:
            `{"tensors": {name: Tensor}, "rest": JSON-ready dict}`.

        Raises:
            RuntimeError: If no reference gradients have been computed yet.
        """
        tensors: dict[str, Tensor] = {}
        rest: dict[str, Any] = {}
        if self.subspace is not None:
            tensors, rest = self.subspace.state_dict()
            rest["rows"] = self.subspace.capacity
            if self._masters is not None:
                tensors |= self.subspace.blocks.gathered("masters", self._masters)
        if self.activations is not None:
            directions, rest["inputs"] = self.activations.state_dict()
            tensors |= directions
        if not rest:
            raise RuntimeError("There is no subspace to save yet: call refresh() first.")
        rest |= {
            "config": self.config.ogpsa_dict(),
            "steps": self.steps,
            "moved": self._moved,
            "steps_since_refresh": self._steps_since_refresh,
            "fresh": self._fresh,
            "weights": self._weights,
            "fingerprint": self._fingerprint(),
            "reference_examples": self.diagnostics.reference_examples,
            "refreshes": self.diagnostics.refreshes,
        }
        return {"tensors": tensors, "rest": rest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`, in any number of processes, after the parameters have been restored.

        Raises:
            ValueError: If the state was made for other settings, parameters, shapes or numbers of rows, or at other
                values of the parameters, or if it is damaged. Nothing is changed then.
        """
        tensors, rest = dict(state["tensors"]), state["rest"]
        config = self.config
        differing = sorted(
            f"{field}={value!r} (saved: {rest['config'].get(field)!r})"
            for field, value in config.ogpsa_dict().items()
            if field in ("rows_from", *_SHAPE, *_INPUTS) and rest["config"].get(field) != value
        )
        if differing:
            raise ValueError(
                f"The saved subspace was made with other settings: {', '.join(differing)}. Use the saved settings, or "
                "rebuild the subspace from the references."
            )
        masters, directions = (
            {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
            for prefix in ("masters.", PREFIX)
        )
        distributed.reshard(self._model)
        self._targets.forget()
        subspace = activations = None
        if "rows" in rest:
            subspace = self._new_subspace(config, int(rest["rows"]))
            subspace.load_state_dict(tensors, rest)
        if "inputs" in rest:
            activations = ActivationSubspace.restored(
                self._targets.matrices(), directions, rest["inputs"], _DTYPES[config.rows_dtype]
            )
        if (subspace is None and config.refreshes) or (activations is None and config.uses_activations):
            raise ValueError(f"The saved state holds no subspace of the kind that subspace={config.subspace!r} needs.")
        self._compare_fingerprint(rest["fingerprint"])
        self.subspace, self._made_with = subspace, _shape_of(config)
        self._drop_activations()
        if activations is not None:
            self.activations, self._built_with = activations, _inputs_of(config)
            self._built_for, _ = self._trained()
            self.diagnostics.removed_by_kind = activations.removed
        self._masters = None
        if masters:
            assert subspace is not None
            self._masters = subspace.blocks.zeros()
            subspace.blocks.scatter("masters", masters, self._masters)
        self.steps, self._moved = int(rest["steps"]), int(rest["moved"])
        self._weights = {name: float(weight) for name, weight in rest["weights"].items()}
        self._steps_since_refresh = int(rest["steps_since_refresh"])
        self._fresh = list(rest["fresh"])
        self.diagnostics.reference_examples = int(rest["reference_examples"])
        self.diagnostics.refreshes = int(rest["refreshes"])
        self.guard.forget()

    def _fingerprint(self) -> dict[str, float]:
        """The norm of every parameter in training, by name. It distinguishes one run's adapter from another's."""
        parameters, _ = self._trained()
        own = [
            torch.linalg.vector_norm(distributed.local(parameter), dtype=torch.float32).cpu()
            for parameter in parameters.values()
        ]
        squares = torch.stack(own).square()
        if distributed.are_sharded(parameters.values()):
            (squares,) = distributed.summed([squares.to(distributed.local(next(iter(parameters.values()))).device)])
        return dict(zip(parameters, squares.sqrt().tolist(), strict=True))

    def _compare_fingerprint(self, saved: Mapping[str, float]) -> None:
        # Rounding to bfloat16 changes a norm by less than this.
        for name, norm in self._fingerprint().items():
            if abs(norm - saved[name]) > 2**-8 * max(norm, saved[name]):
                raise ValueError(
                    f"The saved subspace belongs to other weights: {name} has the norm {norm:.6g}, and had "
                    f"{saved[name]:.6g} when the subspace was saved. Restore the weights of the same checkpoint first."
                )


_INPUTS = ("subspace_rank", "subspace_energy", "tokens", "rows_dtype")
"""The settings that an activation subspace is built with."""

_SHAPE = ("subspace", "constraint", "scope", "slices", "rows", "rows_dtype", "subspace_rank")
"""The settings that a subspace is made with."""


def _inputs_of(config: ProjectionConfig) -> tuple:
    return tuple(getattr(config, name) for name in _INPUTS)


def _shape_of(config: ProjectionConfig) -> tuple:
    return (config.row_of == "set", *(getattr(config, name) for name in _SHAPE))


def _skips(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler has found an overflow, so that the step will do nothing.

    In that case the scaler does not call a plain optimizer at all, but it does call a fused one.
    """
    return bool(getattr(optimizer, "found_inf", False))


def _checked(batches: Mapping[str, Iterable[Any]]) -> dict[str, list[Any]]:
    sets = {name: list(items) for name, items in batches.items()}
    if not sets:
        raise ValueError("refresh() was given no reference set. Give a mapping from a set's name to its batches.")
    for name, items in sets.items():
        if not items:
            raise ValueError(f"Reference set {name!r} has no batch. Give it at least one example, or leave it out.")
    return sets


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _rows_given(rows_from: str, sizes: Sequence[int]) -> int:
    return {"set": 1, "batch": len(sizes), "example": sum(sizes)}[rows_from]


def _same_parameters(blocks: Blocks, parameters: Mapping[str, Tensor]) -> bool:
    own = dict(zip(blocks.names(), blocks.flat_parameters(), strict=True))
    return own.keys() == parameters.keys() and all(own[name] is parameters[name] for name in own)


def _linears_of(model: nn.Module) -> dict[int, nn.Linear | None]:
    """The linear modules by the `id` of their weight; `None` if several modules share one."""
    linears: dict[int, nn.Linear | None] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            linears[id(module.weight)] = None if id(module.weight) in linears else module
    return linears
