# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run trains, in its checkpoints, so that no other run goes on from them by mistake.

The trainer takes the optimizer and its schedule from a checkpoint, and all other settings from the new run. So a run
with another learning rate would keep the old one, and one with another `lora_alpha` would change all that was learned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import ModelConfig

from ..core.files import read_json, replace_json
from ..trainer.checkpoint import CheckpointError

NAME = "ogpsa_options.json"
_ROWS = "training rows"  # the option `rows` is another thing

# Options that change what is learned. Not those that a run may be continued with, such as its length or batches.
_LORA = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
    "load_in_4bit",
    "load_in_8bit",
)
_TRAINING = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "neftune_noise_alpha",
    "seed",
    "data_seed",
    "max_length",
    "packing",
    "completion_only_loss",
    "assistant_only_loss",
    "loss_type",
    "beta",
    "label_smoothing",
)


def options_of(
    stage: str, method: Any, model: ModelConfig, training: TrainingArguments, rows: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the options that change what is learned, by name, and a digest of the training rows.

    Args:
        stage: The command.
        method: The options of the method, a dataclass.
        model: TRL's options of the model and its adapter.
        training: The trainer's options. Those that a stage does not have are left out.
        rows: The training rows, as the trainer gets them.
    """
    found = {"stage": stage, **{name: getattr(model, name, None) for name in _LORA}, **vars(method)}
    found |= {name: getattr(training, name) for name in _TRAINING if hasattr(training, name)}
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    # As they come out of a file, to compare them with one.
    return json.loads(json.dumps(found, default=str)) | {_ROWS: digest.hexdigest()}


class KeepOptions(TrainerCallback):
    """Writes the options of a run into each of its checkpoints, and compares them where a run goes on from one.

    A checkpoint without options, such as one of another script, is not compared.

    Args:
        options: From `options_of`.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the options with those in the checkpoint.

        Raises:
            CheckpointError: If they differ, or the file is damaged.
        """
        checkpoint = args.resume_from_checkpoint
        if not isinstance(checkpoint, str) or not (Path(checkpoint) / NAME).is_file():
            return
        try:
            saved = read_json(Path(checkpoint) / NAME)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        told = ", ".join(
            f"other {_ROWS}" if name == _ROWS else f"{name}={saved[name]!r} instead of {own!r}"
            for name, own in self._options.items()
            if name in saved and saved[name] != own
        )
        if told:
            raise CheckpointError(
                f"resume_from_checkpoint={checkpoint!r} is of a run with {told}. Give the options and the data of "
                "that run, or leave out resume_from_checkpoint to start from the beginning."
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the file. The trainer has just written the rest of the checkpoint."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            replace_json(folder / NAME, self._options)
