# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""OGPSA under transformers' `Trainer` and TRL's trainers: refreshes, logs and checkpoints."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import checkpoint, processes
from .config import OGPSAConfig
from .divergence import COST, Anchored
from .full_parameter import FullParameterConfig, attach
from .model import projector_of, tuner_of
from .preferences import Pair, with_margins
from .projection import ProjectionConfig
from .projector import Projector
from .reference import ReferenceLoader, ReferenceSet, batched, collate, reference_loss

logger = logging.getLogger(__name__)

_MOST_OF_ANSWERS = 2.0
"""The largest `reference_weight` of given answers that is not warned of: 1 was measured to be right, 5 to be slow."""


class OGPSACallback(TrainerCallback):
    """Keeps the reference subspace up to date during training.

    Works with `Trainer`, `SFTTrainer` and `DPOTrainer`, without a subclass:

    ```py
    trainer = SFTTrainer(model, ..., callbacks=[OGPSACallback([ReferenceSet("general", rows)])])
    ```

    Logs, with the trainer's own figures: `ogpsa/loss/SET`, `ogpsa/cosine/SET`, `ogpsa/removed`,
    `ogpsa/seconds_refresh` and `ogpsa/seconds_projection` (see `Diagnostics.collect`).

    Each checkpoint of the trainer also gets the subspace, so that a resumed run goes on exactly.

    In several processes (DDP, FSDP2) all draw the same examples and each passes its share of them. To train a model's
    own weights instead of an adapter, give `config`.

    Args:
        reference_sets (`Sequence[ReferenceSet]`): The abilities to keep.
        processing_class (*optional*): Tokenizer or processor; the trainer's own by default.
        config (`FullParameterConfig`, *optional*): Projects the model's own weights. An adapter has settings of its
            own.
        batch_size (`int`, *optional*): Examples per reference pass and process; by default the trainer's batch size
            per device. It changes memory and speed, and with `rows_from="batch"` also what a row is: the gradient of
            so many examples of every process.
        seed (`int`): Of the order in which examples are drawn.
        save_subspace (`bool`): Whether checkpoints get the subspace (`rows` times the size of the adapter).
        resume_from (`str`, *optional*): Checkpoint directory to take the subspace from when a run is resumed; by
            default `checkpoint-STEP` in the output directory.
        rebuild_subspace (`bool`): When resuming, compute new reference gradients instead of loading the saved ones;
            the run then goes on correctly, but not bit for bit as if it had never stopped.

    Raises:
        ValueError: At construction, if there is no set or two of one name. At the start of training, if a set is
            empty or nothing of it is left to learn, no tokenizer is at hand, the model has no OGPSA adapter and
            `config` is not given (or both are), training is distributed in a way that is not supported (DeepSpeed,
            FSDP 1, parameters offloaded to the host), or a resumed checkpoint's subspace is missing, damaged, or does
            not fit.
    """

    def __init__(
        self,
        reference_sets: Sequence[ReferenceSet],
        processing_class: Any = None,
        *,
        config: FullParameterConfig | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        save_subspace: bool = True,
        resume_from: str | os.PathLike | None = None,
        rebuild_subspace: bool = False,
    ) -> None:
        sets = list(reference_sets) if not isinstance(reference_sets, ReferenceSet) else [reference_sets]
        if not sets:
            raise ValueError(
                "OGPSACallback: reference_sets is empty. Give at least one ReferenceSet(name, rows) of an ability to "
                "keep; a few hundred examples are enough."
            )
        names = [reference_set.name for reference_set in sets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"OGPSACallback: reference_sets has two sets of the name {twice[0]!r}. Rename one.")
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ValueError(f"OGPSACallback: batch_size={batch_size!r} must be an integer of at least 1.")
        if config is not None and not isinstance(config, FullParameterConfig):
            raise ValueError(
                f"OGPSACallback: config={config!r} must be a FullParameterConfig. An OGPSAConfig is given to "
                "get_peft_model, or to the trainer as peft_config."
            )
        self.reference_sets = sets
        self.config = config
        self.processing_class = processing_class
        self.batch_size = batch_size
        self.seed = seed
        self.save_subspace = save_subspace
        self.resume_from = resume_from
        self.rebuild_subspace = rebuild_subspace

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Holds the adapter in float32, before the optimizer is made and a checkpoint is loaded."""
        if model is not None and self.config is None:
            with contextlib.suppress(ValueError):  # no OGPSA adapter, which on_train_begin will say
                _widen(projector_of(model))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Checks everything, tokenises the references, and restores the subspace of a resumed run."""
        assert model is not None
        _move_to_front(self)
        _refuse_unsupported(args, model)
        projector = self._projector_of(model)
        tokenizer = self.processing_class or processing_class
        if tokenizer is None:
            raise ValueError(
                "OGPSACallback needs a tokenizer for its reference sets. Give OGPSACallback(processing_class=...), or "
                "processing_class to the trainer."
            )
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        examples = {
            reference_set.name: reference_set.tokenize(tokenizer)
            for reference_set in tqdm(self.reference_sets, "Tokenising references", delay=2, disable=args.disable_tqdm)
        }
        self._pad_token_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        # Each process passes its share of a batch.
        batch_size = (self.batch_size or args.per_device_train_batch_size) * processes.count()
        for name, own in examples.items():
            if isinstance(own[0], Pair | Anchored) and self.config is not None:
                loss, others = (
                    ("dpo", 'loss="both" or "answer"') if isinstance(own[0], Pair) else ("kl", 'loss="answer"')
                )
                raise ValueError(
                    f'Reference set {name!r}: loss="{loss}" is measured against the model without its adapter, and '
                    f"there is none where whole weights are trained. Use {others}."
                )
            if isinstance(own[0], Pair):
                bar = tqdm(batched(own, batch_size), f"Reference policy on {name}", disable=args.disable_tqdm)
                examples[name] = with_margins(model, tuner_of(model), bar, lambda p: self._collate(p, model))
        costs = [COST if isinstance(own[0], Anchored) else 1.0 for own in examples.values()]
        cost = sum(costs) / len(costs)
        samples = refresh_samples(projector.config, args, batch_size, len(examples), cost)
        learnt = [name for name, own in examples.items() if not isinstance(own[0], Anchored)]
        if learnt and projector.config.reference_weight > _MOST_OF_ANSWERS:
            logger.warning(
                "Reference set %r has a loss of given answers, which are learnt as fast as refusals with "
                "reference_weight=%s: safety comes slowly then. Set reference_weight=1.0, or take references with "
                'loss="kl".',
                learnt[0],
                projector.config.reference_weight,
            )
        self._loader = ReferenceLoader(examples, samples, batch_size, self.seed)
        self._projector = projector
        # A second stage (SFT, then DPO) trains from where the first ended, and on rows of its own.
        projector.reset()
        if state.global_step > 0 and not self.rebuild_subspace:
            self._resume(args, state, projector)
        if not args.disable_tqdm:
            tqdm.write(self._plan(args, samples, cost))

    def _plan(self, args: TrainingArguments, samples: int | None, cost: float) -> str:
        """What the run will cost, for the user to see before it starts."""
        config = self._projector.config
        drawn = samples or sum(map(len, self._loader.sets.values()))
        trained = config.refresh_steps * examples_per_step(args)
        held, more = self._projector.memory(len(self._loader.sets))
        share = drawn * cost / trained
        return (
            f"OGPSA: {drawn} reference examples every {config.refresh_steps} steps, {share:.0%} of the training's own "
            f"passes; {held / 2**20:,.0f} MiB for the reference gradients, and {more / 2**20:,.0f} MiB "
            "more during an optimizer step."
        )

    def _projector_of(self, model: nn.Module) -> Projector:
        if self.config is None:
            projector = projector_of(model)
            _widen(projector)  # where the callback was added to a trainer already made
            return projector
        try:
            tuner_of(model)
        except ValueError:
            return attach(model, self.config)
        raise ValueError(
            "OGPSACallback: config is for a model without an OGPSA adapter, and this one has one, with its own "
            "settings. Leave config out, or train the base model."
        )

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Refreshes the subspace where it is due."""
        if self._projector.enabled and self._projector.due:
            assert model is not None
            self._refresh(args, model)

    def _refresh(self, args: TrainingArguments, model: nn.Module) -> None:
        batches = self._loader.draw()
        total = sum(map(len, batches.values()))
        with tqdm(total=total, desc="Reference gradients", delay=5, leave=False, disable=args.disable_tqdm) as bar:
            # The trainer's own model, not the bare one: it carries the trainer's mixed precision.
            def loss(_: nn.Module, batch: dict) -> torch.Tensor:
                bar.update()
                return reference_loss(model, batch)

            self._projector.refresh(
                {name: [self._collate(batch, model) for batch in own] for name, own in batches.items()}, loss, model
            )

    def _collate(self, examples: Sequence[Any], model: nn.Module) -> dict[str, torch.Tensor]:
        return collate(examples, self._pad_token_id, processes.local(next(model.parameters())).device)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds our figures to the trainer's."""
        if logs is None or "loss" not in logs:  # evaluation logs and the summary at the end are not about steps
            return
        figures = self._projector.diagnostics.collect()
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the subspace into the checkpoint that the trainer has just written."""
        if not self.save_subspace or self._projector.subspace is None:
            return
        saved = self._projector.state_dict()  # in all processes, which gathers shards
        saved["rest"]["loader"] = self._loader.state_dict()
        if state.is_world_process_zero:
            checkpoint.save(_checkpoint_directory(args, state), saved)

    def _resume(self, args: TrainingArguments, state: TrainerState, projector: Projector) -> None:
        directory = Path(self.resume_from) if self.resume_from else _checkpoint_directory(args, state)
        try:
            saved = checkpoint.load(directory)
            try:
                self._loader.load_state_dict(saved["rest"]["loader"])
                projector.load_state_dict(saved)
            except (KeyError, TypeError) as error:
                raise checkpoint.CheckpointError(
                    f"{directory / checkpoint.STATE_NAME} is damaged: {error}."
                ) from error
        except ValueError as error:
            raise checkpoint.CheckpointError(
                f"The run resumes at step {state.global_step}, and its reference subspace cannot be restored: {error} "
                "Give OGPSACallback(resume_from=DIRECTORY) if the checkpoint lies elsewhere, or "
                "OGPSACallback(rebuild_subspace=True) to compute new reference gradients."
            ) from error


def examples_per_step(args: TrainingArguments) -> int:
    """Training examples of one optimizer step, in all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def refresh_samples(
    config: ProjectionConfig, args: TrainingArguments, batch_size: int, sets: int, cost: float = 1.0
) -> int | None:
    """How many reference examples a refresh takes; `None` is all.

    Args:
        config: What decides it: `refresh_samples`, or else `reference_budget`.
        args: The trainer's, which tell how many examples are trained on from one refresh to the next.
        batch_size: Of a reference pass.
        sets: How many reference sets there are.
        cost: Of a reference example, where that of a training example is 1.

    Raises:
        ValueError: If `refresh_samples` leaves a set without its row, with `rows_from="set"`.
    """
    given = config.refresh_samples
    if config.rows_from == "set" and given is not None and given < sets:
        raise ValueError(
            f"refresh_samples={given} is less than the {sets} reference sets, and with rows_from='set' every set has "
            f"a row. Set refresh_samples={sets} or more, or give fewer sets."
        )
    if given is not None or config.reference_budget is None:
        return given
    wanted = max(1, round(config.reference_budget * config.refresh_steps * examples_per_step(args) / cost))
    if config.rows_from == "set":
        return max(wanted, sets)
    # More than the ring holds would be work thrown away.
    return min(wanted, config.rows if config.rows_from == "example" else config.rows * batch_size)


def _checkpoint_directory(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _refuse_unsupported(args: TrainingArguments, model: nn.Module) -> None:
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "OGPSA does not work under DeepSpeed: its engine keeps gradients and steps flat partitions of the "
            "parameters where no optimizer hook sees them. Train without DeepSpeed; FSDP2 shards as well "
            "(fsdp_version: 2)."
        )
    # Making an AcceleratorState to ask it would reset its type of distribution (accelerate 1.15).
    plugin = AcceleratorState._shared_state.get("fsdp_plugin")
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError(
            f"OGPSA does not work under FSDP {plugin.fsdp_version}, which flattens parameters of different tensors "
            "into one. Use FSDP2: fsdp_version: 2."
        )
    if plugin is not None and isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "OGPSA does not work with FSDP2's offloading of parameters to the host. Set fsdp_offload_params: false."
        )
    if processes.count() > 1 and len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(
            f"The model is spread over several devices (device_map) and trained in {processes.count()} processes. "
            "Load it without device_map."
        )


def _widen(projector: Projector) -> None:
    if isinstance(projector.config, OGPSAConfig):  # whole weights keep the type that the user has chosen
        projector.widen()


def _move_to_front(callback: TrainerCallback) -> None:
    """Lets our `on_log` run before the reporting callbacks (TensorBoard, W&B), which then see our figures.

    The trainer puts its reporting callbacks before the user's and tells callbacks nothing of their handler, which is
    therefore looked up in the calling frames. Were it not found there, only the progress bar and the log history
    would show our figures.
    """
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            # A new list: the handler is walking through the old one.
            handler.callbacks = [callback, *(other for other in handler.callbacks if other is not callback)]
            return
        frame = frame.f_back
