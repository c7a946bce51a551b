# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Reference losses as a plain penalty, without projection: the baseline for everything that projects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core import distributed
from ..core.config import ProjectionConfig
from ..core.isolation import isolated_eval
from ..references.loader import ReferenceLoader
from ..references.losses import reference_loss
from ..references.sets import ReferenceSet, check_sets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


class ReferencePenalty(TrainerCallback):
    """Add the mean gradient of a few reference examples to the training gradient, without projection.

    With reference sets of `loss="kl"` this is a KL penalty, with given answers it is replay. The examples are drawn
    when and as OGPSA draws them with `subspace="gradients"`: before the first step, after it, and every `every` steps.
    The gradient is added after the trainer has clipped the training gradient, as a `reference_weight` is.

    Args:
        reference_sets (`Sequence[ReferenceSet]`): The abilities to preserve.
        weight (`float`, *optional*): Factor of the mean gradient. `None`: what the losses call for, 8 with
            `loss="kl"` and 1 with other losses.
        samples (`int`, *optional*): Examples per draw. `None`: as many as the default `reference_budget` allows.
        every (`int`): Optimizer steps between draws.
        processing_class (*optional*): Tokenizer or processor. Default: the trainer's own.

    Attributes:
        examples (`int`): Number of reference examples that were passed.

    Raises:
        ValueError: At construction, if there is no set or two sets have the same name. At the start of training, if a
            set has a loss that needs a reference policy, there are several processes, or training is in float16.
    """

    def __init__(
        self,
        reference_sets: Sequence[ReferenceSet],
        weight: float | None = None,
        samples: int | None = None,
        every: int = 5,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    ) -> None:
        check_sets(reference_sets, "ReferencePenalty")
        self.reference_sets = list(reference_sets)
        self.weight = weight
        self.samples = samples
        self.every = every
        self.processing_class = processing_class
        self.examples = 0
        self._loader: ReferenceLoader

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        **kwargs: Any,
    ) -> None:
        """Tokenize the references."""
        if args.fp16:
            raise ValueError("ReferencePenalty: fp16=True scales gradients. Use bf16=True, or float32.")
        if distributed.count() > 1:
            raise ValueError(
                f"ReferencePenalty works in one process, and there are {distributed.count()}. Start only one."
            )
        config = ProjectionConfig(subspace="gradients", refresh_steps=self.every, refresh_samples=self.samples)
        size = args.train_batch_size
        self._loader = ReferenceLoader.from_sets(
            self.reference_sets,
            self.processing_class or processing_class,
            config,
            step_examples=size * args.gradient_accumulation_steps,
            batch_size=size,
            seed=args.seed,
        )

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the gradient, if it is time for a draw."""
        assert model is not None
        if state.global_step and state.global_step % self.every != 1 % self.every:
            return
        drawn = self._loader.batches(next(model.parameters()).device)
        count = sum(len(batch["input_ids"]) for batches in drawn.values() for batch in batches)
        with isolated_eval(model, gradients=True):
            for name, batches in drawn.items():
                weight = self._loader.weights[name] if self.weight is None else self.weight
                for batch in batches:
                    (reference_loss(model, batch) * (weight * len(batch["input_ids"]) / count)).backward()
        self.examples += count
