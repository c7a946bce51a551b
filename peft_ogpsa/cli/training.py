# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""A training command, from its options to the saved adapter."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

from datasets import Dataset
from peft import LoraConfig
from peft.utils import CONFIG_NAME
from rich.console import Console
from trl import get_peft_config

from ..core.config import ProjectionConfig
from ..core.full_parameter import FullParameterConfig
from ..references.lookalikes import with_lookalikes
from ..references.sets import ReferenceSet
from ..sharing.card import push_adapter, save_card, save_run, weights_digest
from ..trainer.callback import OGPSACallback
from ..trainer.checkpoint import CheckpointError
from ..tuner.config import SIDECAR_NAME, OGPSAConfig
from ..tuner.model import projector_of
from .arguments import adapter_config, parser, whole_config
from .datasets import PromptSet, check_columns, load_rows, prompt_set, reference_sets
from .dryrun import dry_run, save_nothing
from .errors import input_errors
from .launch import check_saves_whole_model, shard_on_cpu
from .loading import load_adapter, load_base, read_adapter_config
from .random_weights import RandomWeights

LOOKALIKE_TOKENS = 512
"""Maximum number of tokens of a look-alike and its answer."""


def train(stage: Literal["sft", "dpo"], training_class: type, trainer_class: type, arguments: Sequence[str]) -> None:
    """Run a training command.

    Args:
        stage: The command's name.
        training_class: TRL's `SFTConfig` or `DPOConfig`.
        trainer_class: TRL's `SFTTrainer` or `DPOTrainer`.
        arguments: The command-line arguments after the command's name.
    """
    console = Console(width=None if sys.stdout.isatty() else 150)
    with contextlib.ExitStack() as cleanup:
        with input_errors(stage):
            ogpsa, data, run, training, model = parser(stage, training_class).parse_args_and_config(list(arguments))
            if run.full_parameter:
                _check_whole(run, training, model)
            elif training.world_size > 1:
                raise ValueError(
                    f"the command trains LoRA in a single process, but it was launched in {training.world_size} "
                    "processes. To train in several processes, set full_parameter, or use examples/full_parameter.py, "
                    "which can also train LoRA."
                )
            if training.process_index:  # only one process prints
                console.quiet = True
            if run.dry_run:
                save_nothing(training, cleanup.enter_context(tempfile.TemporaryDirectory()))
            trainer, config = _prepare(stage, trainer_class, ogpsa, data, run, training, model)
            # Read this before training, which may save to the same folder.
            started_from = weights_digest(run.adapter) if run.adapter else None
        try:
            if run.dry_run:
                dry_run(trainer, config, console)
                return
            trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        except ValueError as error:
            # Before the first step is done, the input is at fault. Later errors need a traceback.
            if trainer.state.global_step and not isinstance(error, CheckpointError):
                raise
            raise SystemExit(f"ogpsa {stage}: {error}") from error
    if run.full_parameter:
        _save_whole(stage, ogpsa, data, run, trainer, config)
        console.print(f"Saved the model: {Path(training.output_dir).resolve()}", soft_wrap=True)
        return
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")  # DPO's copy of the adapter that it started from
    if not isinstance(config, OGPSAConfig):  # an earlier run may have left one
        (Path(training.output_dir) / SIDECAR_NAME).unlink(missing_ok=True)
    trainer.save_model(training.output_dir, _internal_call=True)  # this does not push to the hub
    record = _record(stage, ogpsa, data, run, trainer, config)
    save_card(training.output_dir, run=record | {"started_from_weights": started_from})
    console.print(f"Saved a plain LoRA adapter: {Path(training.output_dir).resolve()}", soft_wrap=True)
    if training.push_to_hub:
        name = trainer.hub_model_id
        url = push_adapter(training.output_dir, name, private=training.hub_private_repo, token=training.hub_token)
        console.print(f"Pushed: {url}", soft_wrap=True)
    trainer.end()


def _check_whole(run: Any, training: Any, model: Any) -> None:
    """Reject options that cannot be combined with full-parameter training."""
    for name in ("load_in_4bit", "load_in_8bit", "use_peft"):
        if getattr(model, name):
            raise ValueError(f"{name} cannot be combined with full_parameter. Leave out one of them.")
    if training.push_to_hub:
        raise ValueError(
            "push_to_hub only uploads adapters. With full_parameter, leave it out and upload the saved folder "
            "afterwards: hf upload OWNER/NAME OUTPUT_DIR."
        )
    if not run.dry_run and (Path(training.output_dir) / CONFIG_NAME).is_file():
        raise ValueError(
            f"output_dir={training.output_dir!r} contains a LoRA adapter. transformers would load it on top of the "
            "saved model. Give another folder, or delete the adapter."
        )


def _save_whole(stage: str, ogpsa: Any, data: Any, run: Any, trainer: Any, config: Any) -> None:
    """Save the model in the usual format, and how it was trained. All processes must call this."""
    folder = trainer.args.output_dir
    shard_on_cpu(trainer)  # again: accelerate lost this setting when it prepared the optimizer
    trainer.save_model(folder, _internal_call=True)
    if trainer.args.should_save:
        record = _record(stage, ogpsa, data, run, trainer, config)
        record["started_from"] = trainer.model.config._name_or_path
        save_run(folder, record | {"full_parameter": {} if config is None else asdict(config)})
    trainer.end()


def _record(stage: str, ogpsa: Any, data: Any, run: Any, trainer: Any, config: Any) -> dict[str, Any]:
    """Return what the model card says about the run."""
    training = trainer.args
    record = {
        "stage": stage,
        "method": ogpsa.method,
        "started_from": run.adapter,
        "dataset": data.dataset,
        **({"lookalikes": data.lookalikes} if data.lookalikes else {}),
        "steps": trainer.state.global_step,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "peft-ogpsa")},
    }
    summary = [entry for entry in trainer.state.log_history if "train_runtime" in entry]
    if summary:
        record["seconds"] = summary[-1]["train_runtime"]
    if isinstance(config, ProjectionConfig):
        examples = trainer.state.global_step * training.train_batch_size * training.gradient_accumulation_steps
        examples *= training.world_size
        record["references"] = dict(entry.split("=", 1) for entry in data.references)
        record["reference_share"] = projector_of(trainer.model).diagnostics.reference_examples / examples
    return record


def _prepare(
    stage: Literal["sft", "dpo"], trainer_class: type, ogpsa: Any, data: Any, run: Any, training: Any, model: Any
) -> tuple[Any, LoraConfig | FullParameterConfig | None]:
    """Return the trainer, ready to train, and the method's configuration. Quick checks come first."""
    config: LoraConfig | FullParameterConfig | None
    if run.full_parameter:
        config = whole_config(ogpsa, run, stage)
    else:
        model.use_peft = True
        lora = read_adapter_config(run.adapter) if run.adapter else get_peft_config(model)
        assert isinstance(lora, LoraConfig)
        config = adapter_config(ogpsa, lora, stage)
        model.model_name_or_path = model.model_name_or_path or lora.base_model_name_or_path
    train_rows = load_rows(data.dataset, "dataset", data.dataset_samples)
    if data.dataset_samples is not None:
        train_rows = train_rows.select(range(min(data.dataset_samples, len(train_rows))))
    check_columns(train_rows, stage, "dataset", data.dataset)
    held_out = load_rows(data.eval_dataset, "eval_dataset") if data.eval_dataset else None
    sets = []
    if isinstance(config, ProjectionConfig):
        beta = getattr(training, "beta", ReferenceSet.beta)
        sets = reference_sets(data.references, data.reference_samples, data.reference_max_length, beta)
    if training.world_size > 1 and any(isinstance(s, PromptSet) for s in sets):
        raise ValueError(
            "references has prompts without answers. The base model can answer them only in a single process. Give "
            "references with answers."
        )
    lookalikes = None
    if data.lookalikes:
        lookalikes = prompt_set("lookalike_prompts", data.lookalike_prompts, LOOKALIKE_TOKENS)
    if training.world_size > 1 and lookalikes is not None:
        raise ValueError(
            f"lookalikes={data.lookalikes} needs answers from the base model. The base model can give them only in a "
            "single process. Train in a single process, or leave out lookalikes."
        )
    loading: dict[str, Any] = {
        "trust_remote_code": training.trust_remote_code,
        "init_kwargs": training.model_init_kwargs,
        "random": None
        if run.random_layers is None
        else RandomWeights(run.random_layers, run.random_width, training.seed),
    }
    policy: dict[str, Any] = {}
    if run.full_parameter:
        # Do not spread the model over this machine's GPUs, because each process has one of them.
        loading["init_kwargs"] = {"device_map": None, **(training.model_init_kwargs or {})}
        # The model itself can give the reference log-probabilities before training, but not while it is unsharded.
        precomputed = getattr(training, "precompute_ref_log_probs", False)
        if stage == "dpo" and not (precomputed and training.world_size == 1):
            policy["ref_model"], _ = load_base(model, **loading)
    base, processing_class = load_base(model, **loading)
    training.model_init_kwargs = None  # already used; the trainer would warn that it cannot use them
    if lookalikes is not None:
        answered = lookalikes.answered(base, processing_class)
        train_rows = Dataset.from_list(with_lookalikes(train_rows, answered, data.lookalikes))
    callbacks = []
    if sets:
        known = [s.answered(base, processing_class) if isinstance(s, PromptSet) else s for s in sets]
        resume = training.resume_from_checkpoint
        callbacks.append(
            OGPSACallback(
                known,
                config=config if isinstance(config, FullParameterConfig) else None,
                seed=training.seed,
                resume_from=resume if isinstance(resume, str) else None,
            )
        )
    trainer = trainer_class(
        model=load_adapter(base, run.adapter, cast(LoraConfig, config), trainable=True) if run.adapter else base,
        args=training,
        train_dataset=train_rows,
        eval_dataset=held_out if training.eval_strategy != "no" else None,
        processing_class=processing_class,
        peft_config=config if isinstance(config, LoraConfig) and not run.adapter else None,
        callbacks=callbacks,
        **policy,
    )
    if run.full_parameter:
        shard_on_cpu(trainer)
        if not run.dry_run:
            check_saves_whole_model(trainer)
        if policy and training.precompute_ref_log_probs:
            trainer.ref_model = None  # no longer needed
    trainer.create_model_card = lambda *args, **kwargs: None  # TRL's card would replace ours at every checkpoint
    return trainer, config
