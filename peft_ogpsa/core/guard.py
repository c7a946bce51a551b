# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks that a training run is what the user expects: they detect steps and parameters that the projection missed.

The checks compare what the projector did with what the optimizer, the trainer and the model did. A certain mistake
raises an error. Something that may be intended gives a warning, once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from . import distributed
from .building import Builder
from .config import ProjectionConfig
from .parameters import Parameters, held_by
from .refreshing import Refresher
from .schedule import Schedule

logger = logging.getLogger(__name__)

_LATE = 2
"""Reference gradients that are older than so many times `refresh_steps` are not those that were asked for."""

_UNPROJECTED = "The projected parameters changed outside a projected optimizer step. These changes were not projected."
_UNSEEN = (
    "The parameters changed outside an optimizer step that OGPSA saw. Such a step does not get the reference gradient."
)
_REMEDY = (
    "Add OGPSACallback(reference_sets=[ReferenceSet(...)]) to the trainer. In your own loop, call "
    "model.projector.refresh(batches, loss_fn) before the step, while model.projector.due is true."
)


class Guard:
    """The checks of one projector.

    Args:
        parameters (`Parameters`): The parameters in training.
        refresher (`Refresher`): Holds the gradient subspace.
        builder (`Builder`): Holds the activation subspace.
        schedule (`Schedule`): The counters.
    """

    def __init__(self, parameters: Parameters, refresher: Refresher, builder: Builder, schedule: Schedule) -> None:
        self._parameters, self._refresher, self._builder = parameters, refresher, builder
        self._schedule = schedule
        self._warned_of_missing = False
        self.forget()

    def forget(self) -> None:
        """Start over, for other rows or another stage of training."""
        self._counted = 0  # refreshes after a step that moved something
        self._seen: Tensor | None = None
        self._versions: list[int] | None = None
        self._warned_of_changes = False
        self._warned_of_others = False
        self._trained: set[int] | None = None  # by the optimizer, in the step before
        self._checked_others = False  # whether those that are not projected were looked for among them
        self.note_step()

    def projected(self) -> dict[str, Tensor]:
        """The parameters that a subspace was made for, by name; empty before there is one."""
        return self._builder.parameters() | self._refresher.parameters()

    # Check that a step can be projected

    def is_ready(self, optimizer: Optimizer, config: ProjectionConfig) -> bool:
        """Whether everything that is needed to project a step of this optimizer is available.

        Reference gradients that do not constrain the step are not needed. Without them, only the reference weight is
        not applied.

        Args:
            optimizer: The optimizer of the parameters.
            config: The projection's settings.

        Raises:
            RuntimeError: If something is missing and `missing_reference="error"`, or if the optimizer does not hold
                all parameters in training.
        """
        self._note_trained(optimizer)
        without_subspace = self._builder.lacks(config)
        without_rows = config.refreshes and not self._refresher.covers_training()
        # A step that moves nothing needs nothing. torch makes one when it loads an optimizer's state from shards.
        if self._schedule.moves:
            if without_subspace:
                self._report_missing("activation subspace", self._builder.subspace is not None, config)
            elif without_rows:
                subspace = self._refresher.subspace
                outdated = subspace is not None and subspace.rows.filled > 0
                self._report_missing("reference gradients", outdated, config)
            elif config.refreshes and self._schedule.since_refresh >= _LATE * config.refresh_steps:
                self._report_late(config)
        if without_subspace or (without_rows and config.constrains):
            return False
        self._parameters.check_all_stepped_by(optimizer)
        return True

    def _note_trained(self, optimizer: Optimizer) -> None:
        """Look for the parameters again if the optimizer trains others: these may have replaced the known ones."""
        groups = optimizer.param_groups
        trained = {id(parameter) for group in groups for parameter in group["params"] if parameter.requires_grad}
        if trained != self._trained:
            self._trained, self._checked_others = trained, False
            self._parameters.targets.forget()

    def _report_missing(self, what: str, outdated: bool, config: ProjectionConfig) -> None:
        targets = self._parameters.targets
        found = f"only the {what} of other parameters" if outdated else f"no {what}"
        if config.constrains or what == "activation subspace":
            effect = "the step cannot be projected"
            without = f'To train without projection, set missing_reference="ignore" in {targets.settings}.'
        else:
            effect = "the reference weight cannot be applied"
            without = f"To train without it, set reference_weight=0 in {targets.settings}."
            if not config.projects:
                without = f'To go on without it, set missing_reference="ignore" in {targets.settings}.'
        step = f"The optimizer makes a step with {targets.what} that has {found}, so {effect}."
        self._report(f"{step} {_REMEDY} {without}", config)

    def _report_late(self, config: ProjectionConfig) -> None:
        if config.constrains:
            effect = "steps are projected with old rows"
        else:
            effect = "the reference weight is no longer applied"
        self._report(
            f"The last reference gradients are {self._schedule.since_refresh} steps old, with refresh_steps="
            f"{config.refresh_steps}, so {effect}. {_REMEDY} If you want fewer refreshes, set a larger refresh_steps.",
            config,
        )

    def _report(self, message: str, config: ProjectionConfig) -> None:
        if config.missing_reference == "ignore":
            return
        if config.missing_reference == "error":
            raise RuntimeError(message)
        if not self._warned_of_missing:
            logger.warning(message)
            self._warned_of_missing = True

    # Check that every parameter in training has had a reference gradient

    def after_refresh(self, config: ProjectionConfig) -> None:
        """Warn about parameters without a nonzero reference gradient, if these gradients constrain the step.

        It does so at the second refresh after a step that moved any parameter. At the start of training the gradients
        of A are zero because B is zero, so the first refresh shows nothing. All processes must call it.

        Args:
            config: The projection's settings.
        """
        self.note_parameters()
        self._warned_of_missing = False  # what was missing is here; if it goes missing again, that is news
        subspace = self._refresher.subspace
        if not config.constrains or subspace is None or self._counted >= 2:
            return
        seen = subspace.rows.parameters_with_rows()
        self._seen = seen if self._seen is None else self._seen | seen
        self._counted += self._schedule.moved > 0
        if self._counted < 2:
            return
        blind = [name for name, has in zip(subspace.blocks.order, self._seen.tolist(), strict=True) if not has]
        if blind:
            logger.warning(
                "%d of the %d projected parameters had no nonzero reference gradient in the first refreshes, so "
                "their steps are not projected: %s. The reference examples may not reach these parameters, for "
                "example experts to which no token was routed. If the abilities of these parameters matter, give "
                "other or more reference examples.",
                len(blind),
                len(subspace.blocks.order),
                _some(blind),
            )

    # Check that the parameters change only in projected steps

    def note_parameters(self) -> None:
        """Record the parameters as they are, so that `check_changes` sees a later change."""
        own = self.projected().values()
        self._versions = self._current_versions() if own and not distributed.are_sharded(own) else None
        # Before the first step, a wrapper such as DDP may copy the parameters over themselves.
        first = self._versions is not None and not self._schedule.steps
        self._norms = self._parameters.fingerprint() if first else None

    def _current_versions(self) -> list[int]:
        """How often each parameter was changed in place, as torch counts. Changes through `.data` do not count."""
        return [parameter._version for parameter in self.projected().values()]

    def check_changes(self, config: ProjectionConfig) -> None:
        """Warn, once, if parameters have changed since the last step or refresh, and move them into the null space.

        It runs before a step, and when the projector checks whether a refresh is due.

        Args:
            config: The projection's settings.

        Raises:
            ValueError: If too much of the new weights acts on the reference inputs.
        """
        if self._versions is None or self._versions == self._current_versions():
            return
        if not self._harmful(config):
            self.note_parameters()
            return
        if not self._warned_of_changes:
            self._warned_of_changes = True
            logger.warning(
                "%s There are two possible causes. First, the optimizer, or a wrapper around it, does not call "
                "super().__init__() of torch.optim.Optimizer, so torch calls no hooks. Then use another optimizer. "
                "Second, your code changed the weights. If it loaded them on purpose, call projector.reset() "
                "afterwards.",
                _UNPROJECTED if config.projects else _UNSEEN,
            )
        self._builder.enter_again(config)  # otherwise the next step would do so without a word
        self.note_parameters()

    def _harmful(self, config: ProjectionConfig) -> bool:
        """Whether a change that torch has counted can matter. May wait for the device."""
        if self._norms is not None:
            return self._norms != self._parameters.fingerprint()
        if not config.projects_changes:
            return False  # nothing binds the parameters themselves, and schedule-free optimizers move them to and fro
        return config.subspace != "activations" or self._builder.leaks()

    def expect_changes(self) -> None:
        """Skip the next check, because torch may count a fused step that skipped itself as a change."""
        self._versions = None

    # Check that the projector makes as many steps as the optimizer, with the parameters that it trains

    def note_step(self) -> None:
        """Record the projector's counts before one step of the trainer."""
        self._steps, self._skipped = self._schedule.steps, self._schedule.skipped

    def check_step(self, optimizer: Optimizer | None) -> None:
        """Compare the projector's counts after a step of the trainer with those that `note_step` recorded.

        A step that a gradient scaler skipped does not count as a step. In that case the scaler does not call a plain
        optimizer. It does call a fused one, which skips the step by itself.

        Args:
            optimizer: The trainer's optimizer.

        Raises:
            RuntimeError: If the projector has not seen the step, or has seen several.
        """
        seen = self._schedule.steps - self._steps
        skipped = self._schedule.skipped > self._skipped or getattr(optimizer, "step_was_skipped", False)
        if seen == 1 or (seen == 0 and skipped):
            return
        name = type(getattr(optimizer, "optimizer", optimizer)).__name__
        if seen == 0:
            effect = "was not projected"
            if not self._parameters.targets.config.projects:
                effect = "OGPSA did not see, so it lacks the reference gradient"
            raise RuntimeError(
                f"The optimizer {name} made a step that {effect}. Either torch calls no hooks around its "
                "`step`, or it does not hold the parameters in training. Use an optimizer that calls "
                "super().__init__() of torch.optim.Optimizer, for example optim='adamw_torch', and give it the "
                "parameters of this model. To switch OGPSA off, set projector.enabled = False."
            )
        raise RuntimeError(
            f"The optimizer {name} made {seen} steps with the projected parameters in one step of the trainer. OGPSA "
            "counts the trainer's steps to decide when to refresh. Use an optimizer that makes one step at a time."
        )

    def check_parameters(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Compare the projected parameters with those that the optimizer trains, after a refresh.

        Args:
            model: The model in training, wrapped or not.
            optimizer: The trainer's optimizer; `None` if it is not known.

        Raises:
            RuntimeError: If a projected parameter is not the model's own.
            ValueError: See `check_others`.
        """
        distributed.reshard(model)  # modules that an evaluation has left gathered hold other tensors
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        for name, parameter in self.projected().items():
            if id(parameter) not in trained:
                raise RuntimeError(
                    f"The projected parameter {name} is not, or is no longer, a trainable parameter of this "
                    f"{type(model).__name__}. Create the optimizer and the trainer after the last change to the "
                    "adapter."
                )
        self._report_others(model, optimizer)

    def check_others(self, optimizer: Optimizer) -> None:
        """Name the parameters that the optimizer trains without projection.

        It looks before the first step of a stage, and again when the optimizer trains others.

        Raises:
            ValueError: If they are the base's own, whose changes an activation subspace cannot keep from acting on
                the reference inputs.
        """
        if not self._checked_others:
            self._report_others(self._parameters.targets.model, optimizer)
            self._checked_others = True

    def _report_others(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        if not self._parameters.targets.names_others:
            return
        projected = {id(parameter) for parameter in self.projected().values()}
        held = None if optimizer is None else held_by(optimizer)
        names = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and id(parameter) not in projected and (held is None or id(parameter) in held)
        ]
        if names:
            self._builder.check_original()
        if names and not self._warned_of_others:
            self._warned_of_others = True
            projects = self._parameters.targets.config.projects
            logger.warning(
                "%d parameters are trained %s, because they are not LoRA matrices A or B: %s. Nothing "
                "prevents their steps from harming the abilities in the reference sets.",
                len(names),
                "but not projected" if projects else "without reference gradients",
                _some(names),
            )


def refuse_averaging(optimizer: Optimizer, config: ProjectionConfig) -> None:
    """Reject schedule-free optimizers: the weights that they evaluate and save are an average that is not projected.

    They work only if just the gradient is projected, or nothing.

    Args:
        optimizer: The optimizer of the parameters.
        config: The projection's settings.

    Raises:
        ValueError: If the optimizer is schedule-free and the settings project the change of the parameters.
    """
    if not config.projects_changes:
        return
    if any("train_mode" in group for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} is schedule-free: it evaluates and saves an average of weights. OGPSA "
            "projects the steps, but not this average. Use optim='adamw_torch' or another optimizer that is not "
            "schedule-free. Or use subspace='gradients' with projection='gradient'."
        )


def refuse_maximizing(optimizer: Optimizer, config: ProjectionConfig) -> None:
    """Reject optimizers that go up the gradient, where a reference gradient is added to it or solved with it.

    Args:
        optimizer: The optimizer of the parameters.
        config: The projection's settings.

    Raises:
        ValueError: If it maximizes, and the settings add reference gradients or project the gradient on a cone.
    """
    solved = config.constrains and config.projection == "gradient" and config.constraint == "cone"
    added = config.reference_weight != 0
    if (added or solved) and any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} has maximize=True, but reference losses must be minimized. Set "
            "maximize=False, and give backward() the negative of what you maximize."
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
