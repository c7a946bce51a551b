# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy on the answers of held-out rows."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from ..core.isolation import isolated_eval
from ..text.batching import by_length
from ..text.logits import answer_logits
from ..text.tokenization import Example, Row, encode_row
from . import fingerprint
from .intervals import Interval
from .means import mean_interval


@dataclass(frozen=True)
class LossResult:
    """A loss in nats per token, over the answer tokens of all examples."""

    mean: float
    tokens: int
    example_means: list[float]
    """Each example's own mean over its tokens, in the given order."""
    example_tokens: list[int]
    examples: str = ""
    """A checksum of the examples' tokens. Two losses with the same one can be compared example by example. Empty in
    results of earlier versions."""

    @classmethod
    def from_sums(cls, sums: list[float], tokens: list[int]) -> "LossResult":
        """Build the result from each example's sum of losses and its number of tokens."""
        means = [total / count for total, count in zip(sums, tokens, strict=True)]
        return cls(sum(sums) / sum(tokens), sum(tokens), means, tokens)

    @classmethod
    def of_examples(cls, sums: list[float], examples: Sequence[Example]) -> "LossResult":
        """Build the result from each example's sum of losses, with the checksum of the examples."""
        digest = fingerprint.of_data([[example.ids, example.answer_start] for example in examples])
        return replace(cls.from_sums(sums, [len(example.answer) for example in examples]), examples=digest)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "LossResult":
        """Rebuild a result from plain types, in which None stands for a loss that is infinite or NaN."""
        mean, *means = (math.nan if own is None else own for own in (plain["mean"], *plain["example_means"]))
        return cls(**{**plain, "mean": mean, "example_means": means})

    def interval(self, level: float = 0.95) -> Interval:
        """Return the interval of `mean`. Examples count as independent; the tokens of one answer do not."""
        return mean_interval(self.example_means, level, self.example_tokens)


def nats_per_token(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    *,
    batch_size: int = 16,
    max_length: int = 1024,
) -> LossResult:
    """Compute the mean cross-entropy of the answer tokens (natural logarithm), in float32 from the model's logits.

    Args:
        model: A causal language model, with or without adapter.
        tokenizer: Its tokenizer.
        rows: Rows in any format of `encode_row`.
        batch_size: Rows per forward pass.
        max_length: Maximum number of tokens per row. Longer rows are cut on the right.

    Raises:
        ValueError: If there are no rows, or a row has no answer token within `max_length`. The message names the row.
    """
    examples = [_scored(tokenizer, row, max_length, f"Row {index}") for index, row in enumerate(rows)]
    if not examples:
        raise ValueError("rows is empty. Give at least one row to measure a loss.")
    sums = [0.0] * len(examples)
    with isolated_eval(model):
        for batch in by_length(range(len(examples)), batch_size, lambda i: len(examples[i].ids), longest_first=True):
            for position, logits in zip(
                batch, answer_logits(model, [examples[position] for position in batch]), strict=True
            ):
                labels = torch.tensor(examples[position].answer, device=logits.device)
                sums[position] = functional.cross_entropy(logits.float(), labels, reduction="sum").item()
    return LossResult.of_examples(sums, examples)


def _scored(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int, name: str) -> Example:
    example = encode_row(tokenizer, row, name)
    cut = example.cut(max_length)
    if cut is None:
        raise ValueError(
            f"{name} has no answer token left: its prompt takes {example.answer_start} tokens, and max_length is "
            f"{max_length}. Raise max_length or drop the row."
        )
    return cut
