# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The DPO loss of preference pairs, against the frozen reference policy, as a reference loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.isolation import isolated_eval
from ...text.batching import by_length, padded_examples
from ...text.logits import scored_logits, scored_positions
from ...text.tokenization import Example, ProcessingClass, Row, encode_row
from ...tuner.adapters import reference_policy
from .base import TAG, ReferenceLoss, both_sides


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. The model should keep preferring the chosen one."""

    loss: ClassVar[str] = "dpo"

    chosen: Example
    rejected: Example
    beta: float
    """Beta of the DPO loss."""
    margin: float | None = None
    """Log-probability of the chosen answer minus that of the rejected one under the reference policy, in nats."""

    @property
    def ids(self) -> list[int]:
        """The token ids of the longer side, which decides the length of a padded batch."""
        return max(self.chosen.ids, self.rejected.ids, key=len)

    def cut(self, max_length: int) -> Pair | None:
        """Cut both sides. Return `None` if one of them has no token of its answer left."""
        chosen, rejected = self.chosen.cut(max_length), self.rejected.cut(max_length)
        return None if chosen is None or rejected is None else Pair(chosen, rejected, self.beta, self.margin)


class DPOLoss(ReferenceLoss):
    """The DPO loss (Rafailov et al. 2023, equation 7), averaged over pairs.

    The loss is `-log sigmoid(beta * ((log p(chosen) - log p(rejected)) - margin))`, where `margin` is that of the
    reference policy.
    """

    name = Pair.loss
    cost = 2.0  # both sides; the reference policy's part is computed once
    needs_base = True
    needs_policy = True
    without_base = ("both", "answer")

    def tokenize(self, processing_class: ProcessingClass, row: Row, name: str, beta: float) -> list[Pair]:
        """Convert a preference pair to one `Pair`, still without its margin."""
        chosen, rejected = (encode_row(processing_class, side, name) for side in both_sides(row, name, self.name))
        return [Pair(chosen, rejected, beta)]

    def prepare(
        self,
        examples: Sequence[Pair],
        model: nn.Module,
        batch_size: int,
        collate: Callable[[Sequence[Pair]], dict[str, Any]],
        progress: Callable[[list], Iterable] = iter,
    ) -> list[Pair]:
        """Return the pairs with their margins, short pairs first."""
        batches = by_length(examples, batch_size, lambda pair: len(pair.ids))
        return with_margins(model, progress(batches), collate)

    def sequences(self, example: Pair) -> list[Example]:
        """Return both sides."""
        return [example.chosen, example.rejected]

    def collate(self, examples: Sequence[Pair], pad_token_id: int, device: torch.device | str) -> dict[str, Any]:
        """Make a batch from pairs.

        Returns:
            `input_ids`, `attention_mask` and `labels`, `(pairs, 2, tokens)` each with the chosen answer first; `beta`,
            `(pairs,)`; and `margin`, `(pairs,)`, if it is known.
        """
        sides = padded_examples([side for pair in examples for side in self.sequences(pair)], pad_token_id, device)
        batch: dict[str, Any] = {name: tensor.unflatten(0, (-1, 2)) for name, tensor in sides.items()}
        batch["beta"] = torch.tensor([pair.beta for pair in examples], device=device)
        if examples[0].margin is not None:
            batch["margin"] = torch.tensor([pair.margin for pair in examples], device=device)
        return {**batch, TAG: self.name}

    def loss(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """Compute the loss of pairs with their margins. See the class for the formula."""
        answers = log_probabilities(model, batch)
        return -F.logsigmoid(batch["beta"] * (answers[:, 0] - answers[:, 1] - batch["margin"])).mean()


def log_probabilities(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Compute the log-probabilities of the answers, summed over their tokens, in nats.

    Args:
        model: The model. It is called with `input_ids` and `attention_mask`, and returns an object with `logits`.
        batch: `input_ids`, `attention_mask` and `labels`, `(pairs, 2, tokens)` each.

    Returns:
        `(pairs, 2)`: chosen and rejected.
    """
    sides = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "labels")}
    scored = scored_positions(sides)
    labels = sides["labels"][:, 1:]
    tokens = F.cross_entropy(scored_logits(model, sides), labels[scored], reduction="none")
    sums = tokens.new_zeros(len(labels)).index_add(0, scored.nonzero()[:, 0], -tokens)
    return sums.view(-1, 2)


def with_margins(
    model: nn.Module, batches: Iterable[Sequence[Pair]], collate: Callable[[Sequence[Pair]], dict]
) -> list[Pair]:
    """Return the pairs with their margins under the frozen reference policy.

    Args:
        model: The policy in training, as the trainer calls it.
        batches: Pairs, grouped by forward pass.
        collate: Makes a batch from such a group.
    """
    done = []
    with isolated_eval(model), reference_policy(model):
        for pairs in batches:
            answers = log_probabilities(model, collate(pairs))
            margins = (answers[:, 0] - answers[:, 1]).tolist()
            done += [replace(pair, margin=m) for pair, m in zip(pairs, margins, strict=True)]
    return done
