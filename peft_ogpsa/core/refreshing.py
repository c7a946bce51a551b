# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Refreshes: computing the reference gradients of the gradient subspace at the current parameters."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .activation_subspace import ActivationSubspace
from .config import ProjectionConfig
from .diagnostics import Diagnostics
from .gradient_subspace import GradientSubspace
from .gradients import LossFn, is_plain_linear, refuse_inference_mode
from .isolation import isolated_eval
from .parameters import Parameters
from .passes import Passes, SetBatches, check_alike
from .precision import full_precision
from .rows import DTYPES

logger = logging.getLogger(__name__)

SHAPE = ("subspace", "constraint", "scope", "slices", "rows", "rows_dtype", "subspace_rank")
"""The settings that a gradient subspace depends on."""


class Refresher:
    """Computes the rows of the gradient subspace and holds it.

    Args:
        parameters (`Parameters`): The parameters in training.
        diagnostics (`Diagnostics`): Receives the figures of every refresh.

    Attributes:
        subspace (`GradientSubspace`, *optional*): The reference gradients; `None` before the first refresh.
        fresh (`list[int]`): Slots whose rows were computed at the current parameters.
        weights (`dict[str, float]`): The reference weight of each set, for a configuration that gives none.
    """

    def __init__(self, parameters: Parameters, diagnostics: Diagnostics) -> None:
        self.subspace: GradientSubspace | None = None
        self.fresh: list[int] = []
        self.weights: dict[str, float] = {}
        self._parameters, self._diagnostics = parameters, diagnostics
        self._made_with: tuple = ()  # the settings that the subspace depends on
        self._linears: list[nn.Linear | None] = []  # for each parameter, the module that has it as its weight

    # The subspace

    def parameters(self) -> dict[str, Tensor]:
        """The parameters that the subspace was made for, by name. Empty before there is a subspace."""
        return {} if self.subspace is None else self.subspace.blocks.by_name()

    def covers_training(self) -> bool:
        """Whether the subspace has rows of the parameters in training, with their present dtype and device."""
        subspace = self.subspace
        return (
            subspace is not None
            and subspace.rows.filled > 0  # not so after a first refresh that failed
            and self._parameters.same_as(subspace.blocks.by_name())
            and subspace.blocks.are_as_grouped()
        )

    def fits(self, config: ProjectionConfig) -> bool:
        """Whether the subspace was made for the parameters in training, with these settings."""
        return self._made_with == _shape_of(config) and self.covers_training()

    def make(self, config: ProjectionConfig, capacity: int) -> GradientSubspace:
        """Make an empty subspace of the parameters in training."""
        return GradientSubspace(
            self._parameters.layout(config),
            capacity,
            config.constraint,
            DTYPES[config.rows_dtype],
            None if config.uses_activations else config.subspace_rank,
            self._parameters.targets.rows_on_host,
        )

    def hold(self, subspace: GradientSubspace | None, config: ProjectionConfig) -> None:
        """Store a subspace. It replaces the previous one."""
        self.subspace, self._made_with = subspace, _shape_of(config)
        if subspace is not None:
            linears = _linears_of(self._parameters.targets.model)
            self._linears = [linears.get(id(parameter)) for parameter in subspace.blocks.flat_parameters()]

    def drop(self) -> None:
        """Forget the rows."""
        self.subspace = None
        self.fresh, self.weights = [], {}

    def memory(self, config: ProjectionConfig, sets: int) -> tuple[int, int]:
        """Bytes that the rows of `sets` reference sets always use, and the additional bytes of an optimizer step."""
        layout = self._parameters.layout(config)  # computed even if not used: it rejects parameters that share memory
        if not config.refreshes:
            return 0, 0
        rows = sets if config.row_of == "set" else config.rows
        bases = 2 if config.constrains and config.constraint == "orthogonal" else 1
        numels = [group.pieces * group.numel for group in layout.groups]
        held = bases * rows * sum(numels) * DTYPES[config.rows_dtype].itemsize
        # the snapshot, or the gradients of a step after a refresh; and what changes one group of it
        return held, 4 * (sum(numels) + max(numels))

    # A refresh

    def capacity_for(self, config: ProjectionConfig, sets: Sequence[str]) -> int:
        """Number of rows that the subspace needs for a refresh of these sets.

        Raises:
            ValueError: If there are more sets than rows.
        """
        if config.row_of != "set":
            return config.rows
        old = self.subspace if self.fits(config) else None
        if not config.constrains:  # the rows are added to the next gradient, and then nobody needs them
            return max(len(sets) + len(self.fresh if old else ()), old.rows.capacity if old else 0)
        held = [name for name in (old.rows.sets if old else ()) if name is not None]
        names = dict.fromkeys([*held, *sets])
        if len(names) > config.rows:
            raise ValueError(
                f"rows={config.rows} cannot hold one row for each of {len(names)} reference sets "
                f"({', '.join(map(repr, names))}). Set rows={len(names)} or more."
            )
        return max(len(names), old.rows.capacity if old else 0)

    def prepare(self, config: ProjectionConfig, capacity: int) -> None:
        """Make the subspace if there is none. If it is too small, make a larger one that takes over the rows.

        Raises:
            RuntimeError: Under `torch.inference_mode()`.
        """
        refuse_inference_mode()
        old = self.subspace
        if old is None or old.rows.capacity != capacity:
            new = self.make(config, capacity)
            if old is not None:
                new.adopt(old)
            self.hold(new, config)

    def refresh(
        self,
        config: ProjectionConfig,
        sets: Sequence[SetBatches],
        loss_fn: LossFn,
        model: nn.Module,
        activations: ActivationSubspace | None,
    ) -> dict[str, float]:
        """Compute reference gradients and store them in the subspace, which `prepare` has made.

        It raises the errors that `Projector.refresh` documents.

        Args:
            config (`ProjectionConfig`): The settings.
            sets (`Sequence[SetBatches]`): The batches.
            loss_fn (`Callable`): `loss_fn(model, batch)` returns a scalar.
            model (`nn.Module`): Passed to `loss_fn`.
            activations (`ActivationSubspace`, *optional*): The part of the rows in this subspace is removed.

        Returns:
            The mean loss of each set.
        """
        subspace = self.subspace
        assert subspace is not None
        device = subspace.blocks.device
        check_alike(sets, device)
        owners = [own.name for own in sets for _ in range(own.rows(config.row_of))]
        if not config.constrains:  # only the fresh rows are needed
            slots = [slot for slot in range(subspace.rows.capacity) if slot not in self.fresh][: len(owners)]
        elif config.row_of == "set":
            slots = subspace.rows.claim_for(owners)
        else:
            slots = subspace.rows.claim(len(owners))
        passes = Passes(subspace.rows, self._linears, model, loss_fn, config.row_of)
        with self._diagnostics.stopwatch("refresh", device), isolated_eval(model, gradients=True):
            try:
                free = iter(slots)
                sums = [passes.fill(own, [next(free) for _ in range(own.rows(passes.row_of))]) for own in sets]
                if activations is not None:
                    with full_precision(device):
                        for rows in subspace.rows.views_of(slots):
                            activations.project_rows(rows)
                subspace.rows.add_up(slots)
                bad = subspace.commit(slots, owners)
            except BaseException:
                self._discard(subspace, slots)
                raise
            (means,) = distributed.summed([torch.stack(sums)])
        pairs = zip(sets, means.tolist(), strict=True)
        losses = {own.name: total / weight if weight else math.nan for own, (total, weight) in pairs}
        # Sets may be refreshed one after another before a step. Then all of them are fresh.
        self.fresh = sorted({*self.fresh, *slots} - set(bad))
        _report_bad(bad, slots, owners)
        self.weights |= {own.name: own.weight for own in sets}
        self._diagnostics.refreshes += 1
        self._diagnostics.reference_examples += sum(sum(own.sizes) for own in sets)
        self._diagnostics.record_losses(losses)
        return losses

    def _discard(self, subspace: GradientSubspace, slots: Sequence[int]) -> None:
        """Empty the slots of a refresh that failed. The older rows stay as they were, if that is possible."""
        self.fresh = [slot for slot in self.fresh if slot not in slots]
        self.subspace = None  # with shards, all processes must discard it, and some may be at a different point
        if not subspace.blocks.sharded:
            subspace.discard(slots)  # may fail too, for example if memory is short
            self.subspace = subspace

    def factors(self, config: ProjectionConfig) -> dict[str, float]:
        """The factor of each set's mean gradient when it is added to the training gradient."""
        given = config.reference_weight
        return self.weights if given is None else dict.fromkeys(self.weights, given)

    # State

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The subspace as tensors, and a JSON-ready rest. Both are empty before there is a subspace.

        Under FSDP2 all processes must call it.
        """
        if self.subspace is None:
            return {}, {}
        tensors, rest = self.subspace.state_dict()
        return tensors, rest | {"rows": self.subspace.rows.capacity}

    def restored(
        self, config: ProjectionConfig, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
    ) -> GradientSubspace | None:
        """Rebuild the subspace from the output of `state_dict`, without storing it.

        Raises:
            ValueError: If the state does not fit.
        """
        if "rows" not in rest:
            return None
        saved = {len(tensor) for name, tensor in tensors.items() if name.startswith("rows.") and tensor.dim()}
        if saved != {rest["rows"]}:  # before memory for so many rows is asked for
            raise ValueError(
                f"The saved state is damaged: it should have {rest['rows']} rows, but its tensors have "
                f"{', '.join(map(str, sorted(saved))) or 'none'}."
            )
        subspace = self.make(config, rest["rows"])
        subspace.load_state_dict(tensors, rest)
        return subspace


def _report_bad(bad: Sequence[int], slots: Sequence[int], owners: Sequence[str]) -> None:
    """Warn of the rows that are not finite, or raise an error if none is finite."""
    if not bad:
        return
    counts = {name: sum(owners[slots.index(slot)] == name for slot in bad) for name in dict.fromkeys(owners)}
    listing = ", ".join(f"{count} of {owners.count(name)} in {name!r}" for name, count in counts.items() if count)
    if len(bad) == len(slots):
        raise FloatingPointError(
            f"No reference gradient is finite ({listing}). Check the model's loss on the reference sets and the "
            "dtype (float16 overflows: use bfloat16 or float32), and lower the learning rate if training diverged."
        )
    logger.warning("Reference gradients that are not finite were skipped: %s.", listing)


def _shape_of(config: ProjectionConfig) -> tuple:
    return (config.row_of == "set", *(getattr(config, name) for name in SHAPE))


def _linears_of(model: nn.Module) -> dict[int, nn.Linear | None]:
    """The plain linear modules by the `id` of their weight.

    `None` for every other parameter, and if several modules share a weight, as tied embeddings do.
    """
    linears: dict[int, nn.Linear | None] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            alone = name == "weight" and id(parameter) not in linears
            linears[id(parameter)] = module if alone and is_plain_linear(module) else None
    return linears
