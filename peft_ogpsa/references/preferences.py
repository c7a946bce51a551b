# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Preference pairs as references: the DPO loss against the frozen reference policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.isolation import isolated_eval
from ..text.tokenization import IGNORED, Example
from ..tuner.adapters import reference_policy

if TYPE_CHECKING:
    from ..tuner.model import OGPSAModel


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. The model should keep preferring the chosen one."""

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


def log_probabilities(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Compute the log-probabilities of the answers, summed over their tokens, in nats.

    Args:
        model: The model. It is called with `input_ids` and `attention_mask`, and returns an object with `logits`.
        batch: `input_ids`, `attention_mask` and `labels`, each `(pairs, 2, tokens)`.

    Returns:
        `(pairs, 2)`: chosen and rejected.
    """
    ids, mask, labels = (batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "labels"))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    labels = labels[:, 1:]
    learned = labels != IGNORED
    # Convert only the scored positions to float32: the logits are the largest tensor of the pass.
    tokens = F.cross_entropy(logits[:, :-1][learned].float(), labels[learned], reduction="none")
    sums = tokens.new_zeros(len(labels)).index_add(0, learned.nonzero()[:, 0], -tokens)
    return sums.view(-1, 2)


def preference_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Compute the DPO loss (Rafailov et al. 2023, equation 7), averaged over pairs.

    The loss is `-log sigmoid(beta * ((log p(chosen) - log p(rejected)) - margin))`, where `margin` is that of the
    reference policy.

    Args:
        model: See `log_probabilities`.
        batch: A batch from `losses.collate`, of pairs with their margins. It also has `beta` and `margin`,
            `(pairs,)`.

    Returns:
        A scalar in nats.
    """
    answers = log_probabilities(model, batch)
    return -F.logsigmoid(batch["beta"] * (answers[:, 0] - answers[:, 1] - batch["margin"])).mean()


def with_margins(
    model: nn.Module, tuner: OGPSAModel, batches: Iterable[Sequence[Pair]], collate: Callable[[Sequence[Pair]], dict]
) -> list[Pair]:
    """Return the pairs with their margins under the frozen reference policy.

    Args:
        model: The policy in training, as the trainer calls it.
        tuner: Its tuner, see `reference_policy`.
        batches: Pairs, grouped by forward pass.
        collate: Makes a batch from such a group.
    """
    done = []
    with isolated_eval(model), reference_policy(tuner):
        for pairs in batches:
            answers = log_probabilities(model, collate(pairs))
            margins = (answers[:, 0] - answers[:, 1]).tolist()
            done += [dataclasses.replace(pair, margin=m) for pair, m in zip(pairs, margins, strict=True)]
    return done
