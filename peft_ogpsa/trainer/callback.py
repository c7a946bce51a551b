# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""OGPSA under transformers' `Trainer` and TRL's trainers: refreshes, logs and checkpoints."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import compat
from ..core import distributed
from ..core.attachment import projector_of, projectors_in
from ..core.config import ProjectionConfig
from ..core.forms import is_count
from ..core.full_parameter import FullParameterConfig
from ..core.guard import refuse_averaging
from ..core.parameters import OtherWeightsError
from ..core.projector import Projector
from ..references.loader import ReferenceLoader
from ..references.losses import reference_loss
from ..references.sets import ReferenceSet, check_sets, digest_of_rows
from ..text.batching import padding_of
from ..text.logits import pass_through
from ..text.tokenization import tokenizer_of
from ..tuner.attaching import attached
from ..tuner.config import OGPSAConfig
from ..tuner.targets import LoraTargets
from . import base_weights, checkpoint, checks
from .reference_policy import ReferencePolicy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer

logger = logging.getLogger(__name__)


@dataclass
class _Run:
    """The data of one call of a trainer's `train`. A callback may serve several trainers, also nested ones.

    Attributes:
        state: The trainer's state, a separate object for each call.
        projector: The projector of the run's steps.
        loader: The loader of the run's reference examples.
        first: The step that the run begins with.
        still: Whether the projection is off, because the run is finished.
        uploaded: The step whose checkpoint is being uploaded, with its subspace.
        over: Whether training has ended.
        name: What distinguishes the run, also after it was resumed.
        base: The checksums of the base, for an activation subspace.
    """

    state: weakref.ref[TrainerState]
    projector: Projector
    loader: ReferenceLoader
    first: int = 0
    still: bool = False
    uploaded: int | None = None
    over: bool = False
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    base: dict[str, str] = field(default_factory=dict)


class OGPSACallback(TrainerCallback):
    """Keep the reference subspace up to date during training.

    Works with `Trainer`, `SFTTrainer` and `DPOTrainer`, without a subclass:

    ```py
    trainer = SFTTrainer(model, ..., callbacks=[OGPSACallback([ReferenceSet("general", rows)])])
    ```

    It adds these figures to the trainer's logs: with an activation subspace `ogpsa/removed/KIND`, `ogpsa/energy/KIND`,
    `ogpsa/seconds_build` and `ogpsa/seconds_projection`; with reference gradients `ogpsa/loss/SET`,
    `ogpsa/cosine/SET`, `ogpsa/reference_norm` and `ogpsa/seconds_refresh`; with a gradient subspace `ogpsa/removed`
    (see `Diagnostics.collect`).

    It saves the subspace in each checkpoint of the trainer, so that a resumed run continues exactly.

    In several processes (DDP, FSDP2), all processes draw the same examples, and each one processes its share of them.
    To project a plain LoRA adapter that another tool made, or a model's own weights, give `config`.

    Args:
        reference_sets (`Sequence[ReferenceSet]`): The abilities to preserve.
        processing_class (*optional*): Tokenizer or processor. Default: the trainer's own.
        config (`OGPSAConfig` or `FullParameterConfig`, *optional*): An `OGPSAConfig` attaches the projection to the
            plain LoRA adapter of the model, with LoRA's settings of the adapter. A `FullParameterConfig` projects the
            model's own weights. Leave it out for an OGPSA adapter, which has its own settings.
        batch_size (`int`, *optional*): Examples per reference pass and process. Default: the trainer's batch size per
            device. It changes memory and speed. With `rows_from="batch"` it also changes what a row is: the gradient
            of this many examples of every process.
        seed (`int`): Seed of the order in which examples are drawn.
        save_subspace (`bool`): Whether checkpoints include the subspace. A gradient subspace has `rows` times the
            size of the adapter. For an activation subspace, a line before training gives the size.
        resume_from (`str`, *optional*): Checkpoint directory to load the subspace from when a run is resumed. Default:
            `checkpoint-STEP` in the output directory.
        rebuild_subspace (`bool`): Build the subspace from these sets, instead of loading that of a checkpoint or
            continuing in that of an earlier stage. A resumed run then continues correctly, but not bit for bit as if
            it had never stopped. The part of a trained adapter that lies in the new subspace is removed, with a
            warning, or refused if it is too large.

    Raises:
        ValueError: At construction, if there is no set or two sets have the same name. At the start of training, if a
            set is empty or has nothing left to learn from, there is no tokenizer, the model has no OGPSA adapter and
            `config` is not given (or both are), training is distributed in an unsupported way (DeepSpeed, FSDP 1,
            parameters offloaded to the host), the optimizer is schedule-free, a refresh would draw more reference
            examples than `rows` holds, or the subspace of a resumed checkpoint is missing, is damaged, belongs to
            other weights, or does not fit; if an old transformers has not loaded the adapter of a resumed checkpoint;
            if DPO of an already trained adapter would take the base as its reference policy (an old TRL); if the
            trainer has a second OGPSACallback; if it would upload checkpoints without the subspace.
        RuntimeError: During training, if a step was not projected, because torch has no hooks for the optimizer or the
            optimizer trains other parameters.
    """

    def __init__(
        self,
        reference_sets: Sequence[ReferenceSet],
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        *,
        config: ProjectionConfig | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        save_subspace: bool = True,
        resume_from: str | os.PathLike | None = None,
        rebuild_subspace: bool = False,
    ) -> None:
        sets = list(reference_sets) if not isinstance(reference_sets, ReferenceSet) else [reference_sets]
        check_sets(sets, "OGPSACallback")
        if batch_size is not None and not is_count(batch_size):
            raise ValueError(f"OGPSACallback: batch_size={batch_size!r} must be an integer of at least 1.")
        if config is not None and not isinstance(config, ProjectionConfig):
            raise ValueError(
                f"OGPSACallback: config={config!r} must be an OGPSAConfig, for a plain LoRA adapter, or a "
                "FullParameterConfig, for the model's own weights."
            )
        self.reference_sets = sets
        self.config = config
        self.processing_class = processing_class
        self.batch_size = batch_size
        self.seed = seed
        self.save_subspace = save_subspace
        self.resume_from = resume_from
        self.rebuild_subspace = rebuild_subspace
        self._runs: list[_Run] = []
        # The checkpoint that a run in progress was resumed from.
        self._restored: weakref.WeakKeyDictionary[Projector, Path] = weakref.WeakKeyDictionary()

    def _run_of(self, state: TrainerState) -> _Run:
        run = next((run for run in self._runs if run.state() is state), None)
        if run is None:
            raise RuntimeError(
                "OGPSACallback was added after training had begun, so its references were never prepared. Add it "
                "before trainer.train()."
            )
        return run

    def _forget(self, state: weakref.ref) -> None:
        """Drop a run, and with it its model, when its trainer is gone."""
        self._runs = [run for run in self._runs if run.state is not state]

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Convert the adapter to float32 before the optimizer is created and a checkpoint is loaded."""
        # Callbacks that copy the weights when training begins, for an average, must get those in the null space.
        compat.move_to_front(self)
        if model is not None and not isinstance(self.config, FullParameterConfig):
            with contextlib.suppress(ValueError):  # no adapter; on_train_begin reports it
                self._projector_of(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Check everything, tokenize the references, and restore the subspace of a resumed run."""
        assert model is not None
        if not compat.move_to_front(self):
            logger.info(
                "The trainer's callback handler was not found, so the trainer's reporters do not receive OGPSA's "
                "figures."
            )
        trainer = compat.trainer_of(self)
        checks.refuse_unsupported(args, model)
        checks.refuse_second_callback(trainer, self)
        if self.save_subspace:
            checks.refuse_early_upload(args)
        projector = self._projector_of(model)
        checks.refuse_base_as_reference(trainer, projector)
        if state.global_step > 0:
            checks.refuse_forgotten_adapter(model, self._checkpoint(args, state))
        if optimizer is not None:
            refuse_averaging(optimizer, projector.config)
        loader, step_examples = self._loader(args, state, projector.config, processing_class)
        checks.check_losses(loader.losses, projector.config, model)
        if projector.config.refreshes:
            _ask_policy(loader, model, args)
        projector.max_grad_norm = args.max_grad_norm
        policy = ReferencePolicy(compat.reference_adapter(trainer), projector)
        # A second stage (SFT, then DPO) starts where the first ended, and uses its own rows. A resumed run loads its
        # subspace or builds it, and does not go on in that of another run.
        projector.reset(rebuild=self.rebuild_subspace or state.global_step > 0)
        self._runs = [run for run in self._runs if run.projector is not projector]  # drops an earlier stage
        run = _Run(weakref.ref(state, self._forget), projector, loader, state.global_step)
        self._runs.append(run)
        if state.global_step > 0 and not self.rebuild_subspace:
            self._resume(args, state, run)
        kept = None if projector.unbuilt else projector.activations
        if kept is not None and kept.references and not loader.has_digest(kept.references):
            logger.warning(
                "The adapter continues in the activation subspace of its earlier stage, which was built from other "
                "reference sets. Abilities that only the new sets cover are not protected. To build the subspace from "
                "the new sets, give OGPSACallback(rebuild_subspace=True)."
            )
        if projector.enabled and projector.unbuilt:
            self._refresh(run, args, model)
            assert projector.activations is not None
            projector.activations.references = loader.digest
        moved = policy.follow(precomputed=bool(getattr(args, "precompute_ref_log_probs", False)))
        if moved and projector.config.refreshes:
            _ask_policy(loader, model, args)  # again, because its answers are others now
        self._prepare_saving(args, state, trainer, projector)
        if self.save_subspace and _is_on_a_base(projector):
            distributed.reshard(model)  # the passes that built the subspace have left some modules gathered
            run.base = base_weights.checksums(projector.targets.model)
        plan = _plan(run, step_examples)  # called even if not shown: it rejects parameters that share memory
        if args.disable_tqdm:
            logger.info("%s", plan)
        else:
            tqdm.write(plan)

    def _prepare_saving(
        self, args: TrainingArguments, state: TrainerState, trainer: Trainer | None, projector: Projector
    ) -> None:
        """Arrange what `on_save` alone cannot do."""
        if _saves_without_event(args) and self.save_subspace:
            if trainer is None:
                raise ValueError(
                    "enable_jit_checkpoint=True writes checkpoints without telling callbacks, so they would lack the "
                    "subspace, and the trainer was not found. Set enable_jit_checkpoint=False, or give "
                    "OGPSACallback(save_subspace=False)."
                )
            # Act only in this run, because the trainer keeps the function.
            compat.after_checkpoints(trainer, lambda: self._save(args, state) if trainer.state is state else None)
        config = projector.config
        if args.push_to_hub and self.config is None and isinstance(config, OGPSAConfig) and args.process_index == 0:
            # During training, transformers uploads the output folder, where PEFT has written only its own settings.
            config.save_sidecar(args.output_dir or ".")

    def _loader(
        self,
        args: TrainingArguments,
        state: TrainerState,
        config: ProjectionConfig,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    ) -> tuple[ReferenceLoader, int]:
        """Tokenize the references. Return their loader, and the training examples of one optimizer step."""
        processing_class = self.processing_class or processing_class
        if processing_class is None:
            raise ValueError(
                "OGPSACallback needs a tokenizer for its reference sets. Give OGPSACallback(processing_class=...), "
                "or give processing_class to the trainer."
            )
        checks.warn_of_other_template(self.reference_sets, processing_class)
        examples = {
            reference_set.name: reference_set.tokenize(processing_class)
            for reference_set in tqdm(self.reference_sets, "Tokenizing references", delay=2, disable=args.disable_tqdm)
        }
        # The trainer may have found a smaller batch that fits into memory.
        trained_batch = (args.auto_find_batch_size and state.train_batch_size) or args.train_batch_size
        # Each process handles its share of a batch.
        batch_size = (self.batch_size or trained_batch // max(1, args.n_gpu)) * distributed.count()
        step_examples = examples_per_step(args, trained_batch)
        padding = padding_of(tokenizer_of(processing_class))
        digest = digest_of_rows(self.reference_sets, processing_class)
        loader = ReferenceLoader.for_training(examples, config, step_examples, batch_size, self.seed, padding, digest)
        return loader, step_examples

    def _projector_of(self, model: nn.Module) -> Projector:
        if isinstance(self.config, FullParameterConfig) and any(
            isinstance(own.targets, LoraTargets) for own in projectors_in(model)
        ):
            raise ValueError(
                "OGPSACallback: config is only for a model without an OGPSA adapter, but this model has one, with its "
                "own settings. Leave out config, or train the base model."
            )
        projector = projector_of(model) if self.config is None else attached(model, self.config)
        if isinstance(projector.config, OGPSAConfig):  # full-parameter training keeps the user's dtype
            projector.upcast()  # not yet done if the callback was added to an existing trainer
        return projector

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Refresh the subspace if a refresh is due."""
        run = self._run_of(state)
        if 0 < state.max_steps <= state.global_step and run.projector.enabled:
            _hold_still(run, kwargs.get("optimizer"))
        if run.projector.enabled and (run.projector.due or state.global_step == run.first):
            assert model is not None
            if run.projector.unbuilt:  # after a change of adapters
                self._refresh(run, args, model)
            if run.projector.due:
                self._refresh(run, args, model)
            run.projector.guard.check_parameters(model, kwargs.get("optimizer"))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record how many steps the projector has seen."""
        self._run_of(state).projector.guard.note_step()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Check that the optimizer's step was projected.

        Raises:
            RuntimeError: If it was not projected.
        """
        run = self._run_of(state)
        if run.projector.enabled:
            run.projector.guard.check_step(optimizer)

    def _refresh(self, run: _Run, args: TrainingArguments, model: nn.Module) -> None:
        batches = run.loader.batches(_device_of(model), everything=run.projector.unbuilt)
        if run.projector.unbuilt:
            bar_of = partial(tqdm, desc="Reference inputs", disable=args.disable_tqdm)
            run.projector.refresh(batches, lambda _, batch: pass_through(model, batch), model, progress=bar_of)
            return
        total = sum(map(len, batches.values()))
        with tqdm(total=total, desc="Reference gradients", delay=5, leave=False, disable=args.disable_tqdm) as bar:
            # Use the trainer's own model, not the bare one, because it has the trainer's mixed precision.
            def loss(_: nn.Module, batch: dict) -> torch.Tensor:
                bar.update()
                return reference_loss(model, batch)

            run.projector.refresh(batches, loss, model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add our figures to the trainer's logs."""
        runs = [run for run in self._runs if run.state() is state]
        # Evaluation logs and the final summary are not about steps. There may also be logs before training.
        if logs is None or "loss" not in logs or not runs:
            return
        figures = runs[0].projector.diagnostics.collect()
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the subspace in the checkpoint that the trainer has just written."""
        if not _saves_without_event(args):
            self._save(args, state)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the subspace in a checkpoint that is to be uploaded. For that, `on_save` comes too late."""
        training = any(run.state() is state and not run.over for run in self._runs)
        if training and checks.uploads_checkpoints(args) and self._checkpoint_directory(args, state).is_dir():
            self._save(args, state)
            self._run_of(state).uploaded = state.global_step

    def _save(self, args: TrainingArguments, state: TrainerState) -> None:
        run = self._run_of(state)
        # Files that are being uploaded must not be replaced.
        if not self.save_subspace or not run.projector.projected() or run.uploaded == state.global_step:
            return
        saved = run.projector.state_dict()  # call this in all processes, because it gathers shards
        saved["rest"] |= {"loader": run.loader.state_dict(), "run": run.name, "trainer": self._kind_of_trainer()}
        if run.base:
            saved["rest"]["base_weights"] = run.base
        if state.is_world_process_zero:
            checkpoint.save(self._checkpoint_directory(args, state), saved)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the projector as a loop of the user's own expects it. Warn if the adapter has left the null space."""
        run = self._run_of(state)
        if run.projector.enabled and isinstance(run.projector.targets, LoraTargets) and run.projector.leaks():
            logger.warning(
                "At the end of training, the adapter acts on the reference inputs. Either load_best_model_at_end has "
                "loaded a checkpoint of another subspace, from before rebuild_subspace=True, or code has changed the "
                "weights without a step of the optimizer. Train for one more step, which removes that part, or save a "
                "later checkpoint."
            )
        self._restored.pop(run.projector, None)
        run.projector.max_grad_norm = None
        run.over = True
        if run.still:
            run.projector.enabled, run.still = True, False

    def _kind_of_trainer(self) -> str | None:
        """The trainer's class in TRL, which tells SFT from DPO, also for a subclass. `None` if it has none."""
        kinds = type(compat.trainer_of(self)).__mro__
        return next((kind.__name__ for kind in kinds if kind.__module__.split(".")[0] == "trl"), None)

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The directory of the checkpoint that a run resumes from."""
        return Path(self.resume_from) if self.resume_from else self._checkpoint_directory(args, state)

    def _checkpoint_directory(self, args: TrainingArguments, state: TrainerState) -> Path:
        folder = compat.output_directory(compat.trainer_of(self), args)
        return Path(folder) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    def _resume(self, args: TrainingArguments, state: TrainerState, run: _Run) -> None:
        directory = self._checkpoint(args, state)
        try:
            saved = checkpoint.load(directory)
            try:
                by, own = saved["rest"].get("trainer"), self._kind_of_trainer()
                if by and own and by != own:
                    raise checkpoint.CheckpointError(
                        f"{directory} is of another stage of training: {by} saved it, and this run has {own}."
                    )
                run.loader.load_state_dict(saved["rest"]["loader"])
                if _is_on_a_base(run.projector):
                    base_weights.check(run.projector.targets.model, saved["rest"].get("base_weights", {}))
                run.projector.load_state_dict(saved)
                run.name = str(saved["rest"].get("run", run.name))
                if run.projector.activations is not None:
                    run.projector.activations.references = run.loader.digest
            except (LookupError, TypeError, AttributeError) as error:
                raise checkpoint.CheckpointError(
                    f"{directory / checkpoint.STATE_NAME} is damaged: {error}."
                ) from error
            self._restored[run.projector] = directory
        except ValueError as error:
            retried = args.auto_find_batch_size and self._restored.get(run.projector) == directory
            if retried and isinstance(error, OtherWeightsError):
                logger.warning(
                    "The trainer tries a smaller batch from step %d on, but with the weights that it has reached, "
                    "which it does not load again. So the subspace of %s does not fit, and is built again.",
                    state.global_step,
                    directory,
                )
                return
            whole = checkpoint.last_whole(args.output_dir or "." if self.resume_from else directory.parent)
            instead = "" if whole in (None, directory) else f"The newest whole checkpoint is {whole}. "
            raise checkpoint.CheckpointError(
                f"The run resumes at step {state.global_step}, but its reference subspace cannot be restored: "
                f"{error} {instead}If the checkpoint is in another directory, give "
                "OGPSACallback(resume_from=DIRECTORY). To compute the subspace again, give "
                "OGPSACallback(rebuild_subspace=True)."
            ) from error


def examples_per_step(args: TrainingArguments, batch_size: int) -> int:
    """Return the training examples of one optimizer step in all processes, each with `batch_size` at a time."""
    return batch_size * args.gradient_accumulation_steps * args.world_size


def _plan(run: _Run, step_examples: int) -> str:
    """Describe what the run will cost, to show it to the user before the run starts."""
    config = run.projector.config
    drawn = run.loader.most_drawn("example")
    # Rows that do not constrain are those of one draw.
    held, more = run.projector.memory(len(run.loader.sets) if config.constrains else min(len(run.loader.sets), drawn))
    lines, activations = [], run.projector.activations
    if activations is not None and config.uses_activations:
        held -= activations.bytes()
        lines = [
            f"OGPSA: the activation subspace uses {activations.bytes() / 2**20:,.0f} MiB. It was built in "
            f"{run.projector.diagnostics.stopwatch.totals().get('build', 0.0):.1f} seconds.",
            *(f"  {own}" for own in activations.kinds()),
        ]
    if not config.projects:
        lines = ["OGPSA: subspace='none', so nothing is projected. The references only add to the gradient."]
    if not config.refreshes:
        return "\n".join(lines)
    share = drawn * run.loader.cost / (config.refresh_steps * step_examples)
    lines.append(
        f"OGPSA: {drawn} reference examples every {config.refresh_steps} steps, which add {share:.0%} to the passes "
        f"of training. The reference gradients use {held / 2**20:,.0f} MiB, and an optimizer step uses "
        f"{more / 2**20:,.0f} MiB more."
    )
    return "\n".join(lines)


def _hold_still(run: _Run, optimizer: torch.optim.Optimizer | None) -> None:
    """Make a step that changes nothing: transformers takes one more when it resumes a run that was finished."""
    if optimizer is None:
        return
    logger.warning("The resumed run was finished. transformers takes one more step, at a learning rate of 0.")
    for group in optimizer.param_groups:
        if group.get("lr") is not None:
            group["lr"] = group["lr"] * 0
    # Projecting the parameters again would round them again.
    run.projector.enabled, run.still = False, True


def _ask_policy(loader: ReferenceLoader, model: nn.Module, args: TrainingArguments) -> None:
    """Compute what the reference losses need of the reference policy."""

    def bar(name: str, passes: list) -> Iterable:
        return tqdm(passes, f"Reference policy on {name}", disable=args.disable_tqdm)

    loader.prepare(model, _device_of(model), bar)


def _device_of(model: nn.Module) -> torch.device:
    return distributed.local(next(model.parameters())).device


def _is_on_a_base(projector: Projector) -> bool:
    """Whether the subspace is that of frozen weights, which a checkpoint does not hold."""
    return projector.config.uses_activations and isinstance(projector.config, OGPSAConfig)


def _saves_without_event(args: TrainingArguments) -> bool:
    """Whether some checkpoints are written without the event `on_save`: from transformers 5 on, if asked for."""
    return bool(getattr(args, "enable_jit_checkpoint", False))
