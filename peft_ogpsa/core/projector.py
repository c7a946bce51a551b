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

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from .. import compat
from . import distributed, hooks
from .activation_subspace import ActivationSubspace
from .building import Builder
from .config import ProjectionConfig
from .diagnostics import Diagnostics
from .gradient_subspace import GradientSubspace
from .gradients import LossFn
from .guard import Guard, refuse_averaging, refuse_maximizing
from .parameters import Parameters
from .passes import SetBatches, check_purpose, checked, sized
from .refreshing import Refresher
from .schedule import Schedule
from .state import State
from .step import Step
from .targets import Targets


class Projector:
    """The reference subspace of the parameters in training, which projects each optimizer step.

    `get_peft_model(model, OGPSAConfig(...))` creates it, or `attach` for a plain LoRA adapter or whole weights. The
    training loop only needs to call `refresh`. `OGPSACallback` makes this call in the trainers of transformers and
    TRL. In an adapter, only the LoRA matrices A and B in training are projected. The optimizer steps other trainable
    parameters (`modules_to_save`, biases, DoRA magnitudes) as usual.

    With `projection="update"` the constraint holds for the parameters' real change in the step, whatever caused it:
    momentum, preconditioning, clipping and decoupled weight decay are included. With `projection="gradient"` the
    constraint holds only for the gradient, as in the paper. The step that the optimizer makes from this gradient may
    not meet it.

    Attributes:
        enabled (`bool`): Set to `False` to train without projection for a while. Set to `True` again, it moves the
            adapter back into the null space, with a warning, or a `ValueError` if too much of it has left.
        diagnostics (`Diagnostics`): What was done and what it cost.
        kernels (`bool`): Set to `True`, or set the environment variable `PEFT_OGPSA_KERNELS=1`, to use the Triton
            kernels of `kernels.py` where they apply: the cone on the update of float32 parameters on CUDA, with up to
            64 rows in float32 or bfloat16. They need Triton 3.6. Experimental: the kernels have been compiled for GPUs
            and run in Triton's interpreter, but not on a GPU yet.
        max_grad_norm (`float`, *optional*): The norm that the training gradient is clipped to. The callback takes it
            from the trainer's arguments. The mean reference gradient is clipped to the same norm, before it is
            multiplied by `reference_weight`. `None`, or 0 or less: no clipping.
        guard (`Guard`): The checks that training is what the user expects.
        targets (`Targets`): What is projected.
    """

    def __init__(self, targets: Targets) -> None:
        self.targets = targets
        self._enabled = True
        self.diagnostics = Diagnostics()
        self.kernels = os.environ.get("PEFT_OGPSA_KERNELS") == "1"
        self.max_grad_norm: float | None = None
        self._settings: dict[str, Any] = {}
        self._parameters = Parameters(targets)
        self._schedule = Schedule()
        self._refresher = Refresher(self._parameters, self.diagnostics)
        self._builder = Builder(self._parameters, self.diagnostics)
        self._step = Step(self._refresher, self._builder, self.diagnostics)
        self.guard = Guard(self._parameters, self._refresher, self._builder, self._schedule)
        self._state = State(
            self._parameters, self._refresher, self._builder, self._step, self._schedule, self.diagnostics
        )
        hooks.watch(self)

    def __reduce__(self) -> tuple:
        # A copy is a new projector: the rows belong to one training run, and only `state_dict` saves them to disk.
        return Projector, (self.targets,)

    @property
    def config(self) -> ProjectionConfig:
        """The settings of the parameters in training.

        Raises:
            ValueError: If several trainable OGPSA adapters have different projection settings.
        """
        return self.targets.config

    def _checked_config(self) -> ProjectionConfig:
        """Return the settings, and check them if they have been changed in place."""
        config = self.config
        settings = config.ogpsa_dict()
        if settings != self._settings:
            config._check_projection()
            self._settings = settings
        return config

    @property
    def subspace(self) -> GradientSubspace | None:
        """The gradient subspace; `None` before there is one."""
        return self._refresher.subspace

    @property
    def activations(self) -> ActivationSubspace | None:
        """The activation subspace; `None` before there is one."""
        return self._builder.subspace

    @property
    def steps(self) -> int:
        """Number of steps of the optimizer that trains the parameters, projected or not."""
        return self._schedule.steps

    @property
    def skipped(self) -> int:
        """Number of steps that a gradient scaler has skipped. `steps` does not count them."""
        return self._schedule.skipped

    @property
    def enabled(self) -> bool:
        """Whether steps are projected.

        Raises:
            ValueError: If it is set to `True` again, and too much of the adapter has left the null space.
        """
        return self._enabled

    @enabled.setter
    def enabled(self, wanted: bool) -> None:
        if wanted and not self._enabled:
            self._builder.enter_again(self.config)
            self.guard.note_parameters()
        self._enabled = wanted

    @property
    def kernels(self) -> bool:
        """Whether the Triton kernels are used where they apply.

        Raises:
            ImportError: If it is set to `True` and the installed Triton is too old for them.
        """
        return self._kernels

    @kernels.setter
    def kernels(self, wanted: bool) -> None:
        if wanted and find_spec("triton") is not None:
            from .kernels import refuse_old_triton

            refuse_old_triton()
        self._kernels = wanted

    def projected(self) -> dict[str, Tensor]:
        """The parameters that a subspace was made for, by name; empty before there is one."""
        return self.guard.projected()

    def upcast(self) -> None:
        """Convert the parameters in training to float32 if they have lower precision; made for adapters.

        In bfloat16 a small projected update is lost to rounding. Rounding alone then breaks the constraint, and Adam's
        moments do not change. TRL casts the adapters of quantized models to bfloat16 and offers no choice. Autocast
        still computes in the lower precision.
        """
        self._parameters.upcast()

    # Refreshes

    @property
    def unbuilt(self) -> bool:
        """Whether the next refresh builds the activation subspace. That refresh needs all reference examples."""
        return self._builder.lacks(self.config)

    def leaks(self) -> bool:
        """Whether the weights act in the activation subspace by more than rounding explains. Waits for the device."""
        return self._builder.leaks()

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
        if self._builder.lacks(config):
            return True
        if config.refreshes and not self._refresher.fits(config):
            return True
        self.guard.check_changes(config)
        return config.refreshes and self._schedule.due(config)

    def refresh(
        self,
        batches: Mapping[str, Iterable[Any]],
        loss_fn: LossFn,
        model: nn.Module | None = None,
        progress: Callable[[list], Iterable] = iter,
    ) -> dict[str, float]:
        """Build the activation subspace, if it is configured and missing; otherwise compute reference gradients.

        Reference gradients are computed at the current parameters and stored in the gradient subspace. Training is not
        disturbed: `.grad`, random states (of torch, Python and NumPy) and the mode of every module are the same
        afterwards. Only buffers that a forward pass changes even in evaluation mode, such as counters and observers,
        are not restored.

        With several processes, all must call it with the same batches. Each passes every n-th example of a batch
        (under FSDP2 with `rows_from="example"` all of them, one at a time). Call it between optimizer steps, not
        between the micro-batches of one step.

        Args:
            batches (`Mapping[str, Iterable]`): The batches of each reference set, by name. To build the activation
                subspace, give all examples: `loader.batches(device, everything=projector.unbuilt)`. A batch's key
                `attention_mask` (or `labels`, with `tokens="answer"`) says which positions are tokens. Without this
                key, and in a batch that is not a mapping, all positions count, padding included. For reference
                gradients, with `rows_from="batch"` each batch gives one, with `"example"` each example gives one, and
                with `"set"` the gradient is the mean over all batches of the set, weighted by their numbers of
                examples. With `reference_weight=None`, the entry `"reference_weight"` of a set's first batch says how
                much of the set's mean gradient is added to the training gradient. Batches of `ReferenceLoader` have it
                if their loss calls for another weight than 1. Without this entry, the weight is 1.
            loss_fn (`Callable`): `loss_fn(model, batch)` returns the scalar loss to preserve, a mean over the batch.
            model (`nn.Module`, *optional*): The model that is passed to `loss_fn`; by default the OGPSA model itself,
                uncompiled. Under FSDP2 it must be, or be inside, the module that was sharded as a whole by the
                outermost `fully_shard`.
            progress (`Callable`, *optional*): Wraps the list of passes that build the activation subspace, for a
                progress bar.

        Returns:
            The mean loss of each set over its finite batches. Empty if the activation subspace was built, or if no
            reference gradients are needed. To build it, `loss_fn` only passes the batches through the model, without
            its adapter.

        Raises:
            ValueError: If a setting was changed to a value that is not allowed; if there is no set, a set without
                batches, a batch without examples, or more reference gradients than `rows`; if a `ReferenceLoader` gave
                one draw and the subspace must be built, or gave all examples and it is; if `loss_fn` returns no scalar
                that depends on the adapter; if the adapter is merged, or two parameters share memory; if processes get
                different batches. The slots of a refresh that fails are empty afterwards, and all other rows are kept.
                A failed FSDP2 pass clears all rows.
            RuntimeError: Under `torch.inference_mode()`.
            FloatingPointError: If no reference gradient is finite. If only some are not finite, their rows are left
                out, with a warning.
        """
        config = self._checked_config()
        if model is None and getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                "alora_invocation_tokens acts only through the PeftModel, which finds the tokens in a batch. Give it: "
                "refresh(batches, loss_fn, model=peft_model)."
            )
        sets = checked(batches)
        model = self.targets.model if model is None else model
        build = self._builder.lacks(config)
        if not build and not config.refreshes:
            return {}
        check_purpose(batches, build)
        if build:
            self._builder.build(config, sets, loss_fn, model, progress)
            self._forget_rows()  # they belong to the adapter as it was
            self.guard.note_parameters()
            return {}
        own = sized(sets)
        self.targets.check()
        self._prepare(config, own)
        activations = self.activations if config.uses_activations else None
        losses = self._refresher.refresh(config, own, loss_fn, model, activations)
        self._schedule.since_refresh = 0
        self.guard.after_refresh(config)
        return losses

    def _prepare(self, config: ProjectionConfig, sets: Sequence[SetBatches]) -> None:
        """Make room for the rows of these sets."""
        distributed.reshard(self.targets.model)
        self.targets.forget()  # loading weights may have replaced parameters
        capacity = self._refresher.capacity_for(config, [own.name for own in sets])
        if not self._refresher.fits(config):
            self._forget_rows()  # free the old rows before the new ones are created
        self._refresher.prepare(config, capacity)

    def _forget_rows(self) -> None:
        self._refresher.drop()
        self._step.forget()
        self.guard.forget()

    def memory(self, sets: int) -> tuple[int, int]:
        """Bytes for `sets` reference sets: of the subspaces, which stay stored, and more for an optimizer step.

        The numbers are computed from the parameters in training, before any row exists, for this process's part. Gram
        matrices, norms and, for parameters of lower precision, their float32 copy are not counted.
        """
        held, more = self._builder.memory()
        rows_held, rows_more = self._refresher.memory(self.config, sets)
        return held + rows_held, more + rows_more

    def reset(self, *, rebuild: bool = False) -> None:
        """Forget the rows and restart the counters, for a new stage of training.

        The activation subspace stays if the adapter in its complement is in use. If other weights have been loaded
        into the adapter, their part in the subspace is removed, with a warning.

        Args:
            rebuild (`bool`): Forget the activation subspace, too, so that the next refresh builds it.

        Raises:
            ValueError: If too much of the adapter is in the subspace that stays. Nothing is changed.
        """
        if self.activations is not None and (rebuild or not self.activations.in_use()):
            self._builder.drop()
        elif self.activations is not None and self.enabled:
            self._builder.enter_again(self.config)
        self._restart()

    def _restart(self) -> None:
        self._schedule.reset()
        self._forget_rows()
        self.diagnostics.forget()

    def close(self) -> None:
        """Stop watching the optimizer's steps permanently, because the adapter has been unloaded."""
        self._builder.drop()
        self._restart()
        hooks.unwatch(self)

    # The optimizer step; see `hooks.StepWatcher`

    def trains(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer is about to step our parameters.

        Raises:
            RuntimeError: If it would step a frozen one, without projection.
        """
        if self._enabled:
            self._parameters.check_frozen(optimizer)
        return bool(self._parameters.stepped_by(optimizer))

    def skips(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer will skip the step that it begins, because a gradient scaler has told it to."""
        if not compat.skips_step(optimizer):
            return False
        self._schedule.skipped += 1
        self.guard.expect_changes()
        return True

    def begin_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Run before every step of our parameters; may replace the step's arguments to wrap a closure."""
        self._step.forget_parameters()
        self._schedule.begin_step(optimizer, self._parameters.stepped_by(optimizer))
        config = self._checked_config()
        if not (self.enabled and self.guard.is_ready(optimizer, config)):
            return None
        refuse_averaging(optimizer, config)
        refuse_maximizing(optimizer, config)
        self.guard.check_changes(config)
        self._builder.check_base(config)
        self.guard.check_others(optimizer)
        closure = hooks.closure_of(args, kwargs)
        if closure is None:
            self._step.process_gradients(optimizer, config, self.max_grad_norm)
            # Not at the end: if the step fails and is tried again, they are in its gradient.
            self._refresher.fresh = []
        # For any learning rate: the rate only decides whether the step counts.
        self._step.remember_parameters(config, self.kernels)
        if closure is None:
            return None

        def then_project() -> Any:
            loss = closure()
            self._step.process_gradients(optimizer, self.config, self.max_grad_norm)
            return loss

        return hooks.with_closure(args, kwargs, then_project)

    def end_step(self) -> None:
        """Run after every step of our parameters that raised no error."""
        self._step.project(self.kernels)
        self._schedule.end_step()
        self._refresher.fresh = []
        self.guard.note_parameters()

    def begin_inner_step(self) -> None:
        """Run before a step of an optimizer within the step that has begun, such as the one that Lookahead wraps."""
        self._step.remember_inner()

    def end_inner_step(self) -> None:
        """Run after that step."""
        self._step.project_inner()

    # State

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue exactly: the subspace and the refresh counters.

        Under FSDP2 all processes must call it. The first process gets the full tensors; the others get none.

        Returns:
            `{"tensors": {name: Tensor}, "rest": JSON-ready dict}`. The tensors are the projector's own: copy them if
            you keep them while the training goes on.

        Raises:
            RuntimeError: If there is no subspace yet.
        """
        return self._state.save()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`, in any number of processes, after the parameters have been restored.

        Raises:
            ValueError: If the state was made for other settings, parameters, shapes or numbers of rows, or at other
                values of the parameters, or if it is damaged. Nothing is changed then.
        """
        self._state.load(state)
        self.guard.forget()
