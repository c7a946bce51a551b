# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""What every reference loss defines. Subclass `ReferenceLoss` to add one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...text.batching import padded_examples
from ...text.logits import scored_positions
from ...text.tokenization import Example, ProcessingClass, Row, encode_row

TAG = "loss"
"""Key of a batch that holds the name of its loss."""


class ReferenceLoss(ABC):
    """A loss of reference examples, in nats.

    To add a loss, write a subclass in a file of its own and list it in `registry.py`. It must be a mean over the
    examples of a batch, so that the gradient of an example does not depend on the others.
    """

    name: ClassVar[str]
    """Its name in `ReferenceSet(loss=...)`. Every example carries it as `example.loss`."""
    cost: ClassVar[float] = 1.0
    """Cost of an example. A forward and a backward pass together cost 1."""
    default_weight: ClassVar[float] = 1.0
    """How much of the mean reference gradient is added to the training gradient, with `reference_weight=None`."""
    null_space_weight: ClassVar[float | None] = None
    """The same with an activation subspace, where less may be enough. `None`: the default weight."""
    learns_answers: ClassVar[bool] = True
    """Whether it falls as the model learns the given answers. A large weight then slows safety learning."""
    needs_base: ClassVar[bool] = False
    """Whether it needs the base, which is the model without its adapter."""
    needs_policy: ClassVar[bool] = False
    """Whether `prepare` must first compute log-probabilities of a reference policy."""
    for_own_answers: ClassVar[bool] = False
    """Whether it can score answers of the model itself, see `ReferenceSet.from_prompts`."""
    without_base: ClassVar[tuple[str, ...]] = ()
    """Losses to use instead where there is no base."""

    def tokenize(self, processing_class: ProcessingClass, row: Row, name: str, beta: float) -> list[Any]:
        """Convert a row to examples. By default, it becomes one example.

        Args:
            processing_class: The tokenizer, or a processor with one.
            row: A row of the reference set.
            name: Name of the row in error messages.
            beta: `ReferenceSet.beta`, for preference losses.

        Returns:
            Objects with `loss`, the name of this class; `ids`, which define their length in a batch; and
            `cut(max_length)`, as in `Example`.

        Raises:
            ValueError: If the row has no known format, or its format is not the one that this loss needs.
        """
        return [replace(encode_row(processing_class, row, name), loss=self.name)]

    # Most losses need neither a check nor a preparation.
    def check(self, model: nn.Module) -> None:  # noqa: B027
        """Before training, reject a model that this loss does not work with.

        Raises:
            ValueError: If the model is rejected.
        """

    def prepare(
        self,
        examples: Sequence[Any],
        model: nn.Module,
        batch_size: int,
        collate: Callable[[Sequence[Any]], dict[str, Any]],
        progress: Callable[[list], Iterable] = iter,
    ) -> list[Any]:
        """Add to the examples what must be computed once, before training. By default, this is nothing.

        Args:
            examples: All examples of a set.
            model: The model in training, as the trainer calls it.
            batch_size: Examples per forward pass.
            collate: Makes a batch from examples.
            progress: Wraps the list of passes, for a progress bar.
        """
        return list(examples)

    def sequences(self, example: Any) -> list[Example]:
        """Return the token sequences of an example, without the other data that the loss needs."""
        return [example]

    def collate(self, examples: Sequence[Any], pad_token_id: int, device: torch.device | str) -> dict[str, Any]:
        """Make a batch from examples.

        Returns:
            The arguments of `loss`, with the name of this loss as `TAG`. Tensors have one entry per example in their
            first dimension.
        """
        return {**padded_examples(examples, pad_token_id, device), TAG: self.name}

    @abstractmethod
    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """Compute the loss of a batch, a scalar.

        Args:
            model: A causal language model. It is called with `input_ids` and `attention_mask`, and returns an object
                with `logits` `(examples, tokens, vocabulary)`.
            batch: A batch from `collate`.
        """


def mean_of_examples(tokens: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Average the losses of a batch's scored tokens within each example, then over the examples."""
    scored = scored_positions(batch)
    weights = 1.0 / scored.sum(1, keepdim=True).clamp(min=1).expand_as(scored)[scored]
    return (tokens * weights).sum() / len(scored)


def both_sides(row: Row, name: str, loss: str) -> list[Row]:
    """Return a preference pair, and the same pair with its answers swapped.

    Raises:
        ValueError: If the row is not a pair.
    """
    if "chosen" not in row or "rejected" not in row:
        raise ValueError(
            f"{name} is not a preference pair, but loss={loss!r} needs pairs. Give chosen and rejected answers."
        )
    return [row, {**row, "chosen": row["rejected"], "rejected": row["chosen"]}]
