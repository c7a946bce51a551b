# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""A training command, from its options to the saved adapter."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig
from rich.console import Console
from trl import get_peft_config

from ..callback import OGPSACallback
from ..card import push_adapter, save_card, weights_digest
from ..checkpoint import CheckpointError
from ..config import SIDECAR_NAME, OGPSAConfig
from ..model import projector_of
from ..reference import ReferenceSet
from .arguments import adapter_config, parser
from .datasets import PromptSet, check_columns, load_rows, reference_sets
from .dryrun import dry_run, save_nothing
from .errors import input_errors
from .loading import load_adapter, load_base, read_adapter_config


def train(stage: Literal["sft", "dpo"], training_class: type, trainer_class: type, arguments: Sequence[str]) -> None:
    """Runs a training command.

    Args:
        stage: The command's name.
        training_class: TRL's `SFTConfig` or `DPOConfig`.
        trainer_class: TRL's `SFTTrainer` or `DPOTrainer`.
        arguments: The command line after the command.
    """
    console = Console(width=None if sys.stdout.isatty() else 150)
    with contextlib.ExitStack() as cleanup:
        with input_errors(stage):
            ogpsa, data, run, training, model = parser(stage, training_class).parse_args_and_config(list(arguments))
            if training.world_size > 1:
                raise ValueError(
                    f"the command trains in a single process, and was launched in {training.world_size}. For several "
                    "see examples/full_parameter.py, which trains LoRA too."
                )
            if run.dry_run:
                save_nothing(training, cleanup.enter_context(tempfile.TemporaryDirectory()))
            trainer, config = _prepare(stage, trainer_class, ogpsa, data, run, training, model)
            # Before training, which may save to the same folder.
            started_from = weights_digest(run.adapter) if run.adapter else None
        try:
            if run.dry_run:
                dry_run(trainer, config, console)
                return
            trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        except ValueError as error:
            # Until the first step it is the input that is at fault; after it, a traceback is wanted.
            if trainer.state.global_step and not isinstance(error, CheckpointError):
                raise
            raise SystemExit(f"ogpsa {stage}: {error}") from error
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")  # DPO's copy of the adapter that it started from
    if not isinstance(config, OGPSAConfig):  # of an earlier run, perhaps
        (Path(training.output_dir) / SIDECAR_NAME).unlink(missing_ok=True)
    trainer.save_model(training.output_dir, _internal_call=True)  # which does not push
    record = _record(stage, ogpsa, data, run, trainer, config)
    save_card(training.output_dir, run=record | {"started_from_weights": started_from})
    console.print(f"Saved a plain LoRA adapter: {Path(training.output_dir).resolve()}", soft_wrap=True)
    if training.push_to_hub:
        name = trainer.hub_model_id
        url = push_adapter(training.output_dir, name, private=training.hub_private_repo, token=training.hub_token)
        console.print(f"Pushed: {url}", soft_wrap=True)
    trainer.end()


def _record(stage: str, ogpsa: Any, data: Any, run: Any, trainer: Any, config: LoraConfig) -> dict[str, Any]:
    """What the model card tells of the run."""
    training = trainer.args
    record = {
        "stage": stage,
        "method": ogpsa.method,
        "started_from": run.adapter,
        "dataset": data.dataset,
        "steps": trainer.state.global_step,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "peft-ogpsa")},
    }
    summary = [entry for entry in trainer.state.log_history if "train_runtime" in entry]
    if summary:
        record["seconds"] = summary[-1]["train_runtime"]
    if isinstance(config, OGPSAConfig):
        examples = trainer.state.global_step * training.train_batch_size * training.gradient_accumulation_steps
        record["references"] = dict(entry.split("=", 1) for entry in data.references)
        record["reference_share"] = projector_of(trainer.model).diagnostics.reference_examples / examples
    return record


def _prepare(
    stage: Literal["sft", "dpo"], trainer_class: type, ogpsa: Any, data: Any, run: Any, training: Any, model: Any
) -> tuple[Any, LoraConfig]:
    """The trainer, ready to go, and the adapter's configuration. What is quick to check is checked first."""
    model.use_peft = True
    lora = read_adapter_config(run.adapter) if run.adapter else get_peft_config(model)
    assert isinstance(lora, LoraConfig)
    config = adapter_config(ogpsa, lora, stage)
    model.model_name_or_path = model.model_name_or_path or lora.base_model_name_or_path
    train_rows = load_rows(data.dataset, "dataset")
    check_columns(train_rows, stage, "dataset", data.dataset)
    held_out = load_rows(data.eval_dataset, "eval_dataset") if data.eval_dataset else None
    sets = []
    if isinstance(config, OGPSAConfig):
        beta = getattr(training, "beta", ReferenceSet.beta)
        sets = reference_sets(data.references, data.reference_samples, data.reference_max_length, beta)
    base, processing_class = load_base(
        model, trust_remote_code=training.trust_remote_code, init_kwargs=training.model_init_kwargs
    )
    training.model_init_kwargs = None  # used; the trainer would warn that it cannot
    callbacks = []
    if sets:
        known = [s.answered(base, processing_class) if isinstance(s, PromptSet) else s for s in sets]
        resume = training.resume_from_checkpoint
        callbacks.append(
            OGPSACallback(known, seed=training.seed, resume_from=resume if isinstance(resume, str) else None)
        )
    trainer = trainer_class(
        model=load_adapter(base, run.adapter, config, trainable=True) if run.adapter else base,
        args=training,
        train_dataset=train_rows,
        eval_dataset=held_out if training.eval_strategy != "no" else None,
        processing_class=processing_class,
        peft_config=None if run.adapter else config,
        callbacks=callbacks,
    )
    trainer.create_model_card = lambda *args, **kwargs: None  # TRL's would replace ours at every checkpoint
    return trainer, config
