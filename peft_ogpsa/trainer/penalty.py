# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Reference losses as a plain penalty, without projection: the baseline for methods with projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm
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
    """Add the gradient of a few reference examples to the training gradient, without projection.

    With `loss="kl"` this is a KL penalty. With given answers it is replay. It adds what OGPSA adds for the same
    `reference_weight`. The examples are drawn before the first step, after it, and then every `every` steps. Every
    set counts equally. The mean of the sets' mean gradients is clipped to the trainer's `max_grad_norm`, multiplied by
    the weight, and added after the trainer has clipped the training gradient.

    Args:
        reference_sets (`Sequence[ReferenceSet]`): The abilities to preserve.
        weight (`float`, *optional*): Factor of the mean gradient. `None`: 8 for sets with `loss="kl"` and 1 for
            other losses.
        samples (`int`, *optional*): Examples per draw. `None`: as many as the default `reference_budget` allows.
        every (`int`): Optimizer steps between draws.
        processing_class (*optional*): Tokenizer or processor. Default: the trainer's own.

    Attributes:
        examples (`int`): Number of reference examples that the model has processed.

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
        """Check the settings and tokenize the references."""
        if args.fp16:
            raise ValueError(
                "ReferencePenalty does not work with fp16=True, which scales gradients. Use bf16=True, or float32."
            )
        if distributed.count() > 1:
            raise ValueError(
                f"ReferencePenalty works only in one process, but there are {distributed.count()} processes. Start "
                "only one."
            )
        # As for the null space: `rows` does not limit the number of gradients that are only added.
        config = ProjectionConfig(subspace="activations", refresh_steps=self.every, refresh_samples=self.samples)
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
        """Draw examples and add their gradient, if a draw is due."""
        assert model is not None
        if state.global_step and state.global_step % self.every != 1 % self.every:
            return
        drawn = self._loader.batches(next(model.parameters()).device)
        counts = {
            name: sum(len(batch["input_ids"]) for batch in batches) for name, batches in drawn.items() if batches
        }
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        training = [parameter.grad for parameter in trained]
        mean, weighted = ([torch.zeros_like(parameter) for parameter in trained] for _ in range(2))
        with isolated_eval(model, gradients=True):
            for name, count in counts.items():
                weight = self._loader.losses[name].default_weight if self.weight is None else self.weight
                for batch in drawn[name]:
                    model.zero_grad()
                    # Every set counts equally, as in a projector.
                    (reference_loss(model, batch) * (len(batch["input_ids"]) / (count * len(counts)))).backward()
                    for i, parameter in enumerate(trained):
                        if parameter.grad is not None:
                            mean[i] += parameter.grad
                            weighted[i].add_(parameter.grad, alpha=weight)
        clip: torch.Tensor | float = 1.0
        if args.max_grad_norm and args.max_grad_norm > 0:
            clip = (args.max_grad_norm / (get_total_norm(mean) + 1e-6)).clamp(max=1.0)
        for parameter, gradient, own in zip(trained, training, weighted, strict=True):
            parameter.grad = own.mul_(clip) if gradient is None else gradient.add_(own.mul_(clip))
        self.examples += sum(counts.values())
