# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The callback for training tools, in which model and tokenizer exist only when training starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ..cli.datasets import PromptSet
from ..references.sets import ReferenceSet
from ..text.tokenization import template_of
from ..trainer.callback import OGPSACallback

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

logger = logging.getLogger(__name__)


class ToolCallback(OGPSACallback):
    """`OGPSACallback` whose reference sets may be prompts that the base model answers when training starts.

    Args:
        reference_sets: The abilities to preserve.
        **options: Arguments of `OGPSACallback`.
    """

    def __init__(self, reference_sets: Sequence[ReferenceSet | PromptSet], **options: Any) -> None:
        # The names, which both kinds have, are all that is needed before training.
        super().__init__(cast("Sequence[ReferenceSet]", reference_sets), **options)
        self._given = reference_sets

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Check what can be checked before training."""
        self._refuse_prompts_in_several_processes(args)
        super().on_init_end(args, state, control, model=model, **kwargs)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Let the base model answer the prompts, with its adapter disabled. Then do what `OGPSACallback` does."""
        self._refuse_prompts_in_several_processes(args)
        tokenizer = self.processing_class or processing_class
        if tokenizer is not None:  # OGPSACallback reports a missing one
            self._warn_without_template(tokenizer)
            base = cast("PreTrainedModel", model)
            self.reference_sets = [
                own.answered(base, tokenizer) if isinstance(own, PromptSet) else own for own in self._given
            ]
        super().on_train_begin(args, state, control, model, processing_class, optimizer, **kwargs)

    def _warn_without_template(self, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
        if template_of(processing_class) is None and any(isinstance(own, PromptSet) for own in self._given):
            logger.warning(
                "The tokenizer has no chat template, so the base model completes the reference prompts as plain text. "
                "If your tool trains with a template of its own, this is not how the model is asked in training. Then "
                "set it as the tokenizer's chat template, too, or use an instruct model."
            )

    def _refuse_prompts_in_several_processes(self, args: TrainingArguments) -> None:
        if args.world_size > 1 and any(isinstance(own, PromptSet) for own in self._given):
            raise ValueError(
                "references has prompts without answers. The base model can answer them only in a single process. "
                "Give references with answers, or train in a single process."
            )
