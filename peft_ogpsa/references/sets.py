# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Reference sets: the examples of an ability to keep, and their loss."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import torch

from ..text.tokenization import Example, Prompt, encode_row, shared_length
from .divergence import Anchored
from .preferences import Pair
from .self_answers import AnswerCounts, self_answers

LOSSES = ("answer", "all", "kl", "both", "dpo")


@dataclass
class ReferenceSet:
    """A few hundred examples of an ability that fine-tuning must not harm.

    Rows may have any of the formats that TRL's trainers read, plain or conversational: `messages`,
    `prompt`/`completion`, `text`, or `prompt`/`chosen`/`rejected` (also without `prompt`, where it is part of both
    answers). The loss is the cross-entropy of the answer in nats per token, averaged within an example and then over
    examples. For preference pairs the answer is the chosen one, unless `loss` says otherwise.

    Args:
        name (`str`): What the set is called in logs; unique among the sets of a run.
        dataset (`Iterable[Mapping]`): The rows: a `datasets.Dataset`, a list of dicts, or any iterable of them.
        samples (`int`, *optional*): Use at most this many rows, from the start. `None`: all.
        max_length (`int`): In tokens; what is longer is cut off at the end.
        loss (`str`): `"answer"` (the completion, the chosen answer, or the last assistant turn; all of a `text`),
            `"all"` (every token), or `"kl"`: the divergence of the model from its base along the answer, which cannot
            be lowered by learning the answer's style; it needs an adapter and one forward pass more. For preference
            pairs also `"both"` (the chosen and the rejected answer, an example each, which is what the published
            code does in its DPO stage) and `"dpo"`: the DPO loss of the
            pair against the frozen reference policy, which is TRL's `ref` adapter where there is one (a DPO run that
            goes on with an adapter), and else the base model.
        beta (`float`): Of the DPO loss; take the trainer's.

    Raises:
        ValueError: If an argument is out of range, the set is empty, a row has no known format, or truncation leaves
            a row without a token to learn from in all rows.
    """

    name: str
    dataset: Iterable[Mapping[str, Any]]
    samples: int | None = 200
    max_length: int = 512
    loss: str = "answer"
    beta: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"ReferenceSet: name={self.name!r} must be a non-empty string.")
        for limit, value in (("samples", self.samples), ("max_length", self.max_length)):
            if not (value is None and limit == "samples") and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise ValueError(f"ReferenceSet {self.name!r}: {limit}={value!r} must be an integer of at least 1.")
        if self.loss not in LOSSES:
            raise ValueError(
                f"ReferenceSet {self.name!r}: loss={self.loss!r} is unknown. Choose from: {', '.join(LOSSES)}."
            )
        if not isinstance(self.beta, int | float) or not 0 < self.beta < math.inf:
            raise ValueError(f"ReferenceSet {self.name!r}: beta={self.beta!r} must be a number above 0.")

    @classmethod
    def from_prompts(
        cls,
        name: str,
        prompts: Iterable[Prompt],
        model: torch.nn.Module,
        processing_class: Any,
        *,
        samples: int | None = None,
        max_new_tokens: int = 128,
        batch_size: int = 16,
        seed: int = 0,
        sample: bool = False,
        cache_dir: str | os.PathLike | None = None,
        max_length: int = 512,
        loss: str = "kl",
        progress: bool = True,
    ) -> AnsweredSet:
        """A set without labelled data: the base model answers the prompts, and its answers are what is kept.

        Refusals and degenerate answers (empty, symbols, loops) are dropped; `.counts` of the result says how many.
        Of an answer that was cut at `max_new_tokens`, the end of the turn is not scored. The answers are kept on disk
        and used again for the same model, prompts and settings; a damaged file is rebuilt with a warning. Nothing of
        model, tokenizer or random state is changed.

        Args:
            name (`str`): See the class.
            prompts (`Iterable`): Strings, lists of messages, or rows with `prompt` or `messages`, such as
                `peft_ogpsa.data.load_prompts("general")`.
            model: The causal language model; the adapter of a `PeftModel` is off while it answers.
            processing_class: Its tokenizer, or a processor that has one as `.tokenizer`.
            samples (`int`, *optional*): Answer at most this many prompts, from the start. `None`: all.
            max_new_tokens (`int`): Where an answer is cut.
            batch_size (`int`): Prompts answered at once.
            seed (`int`): Of the draws.
            sample (`bool`): Draw from the model's distribution instead of taking the likeliest token. Off by default:
                the likeliest answers are the better ones, most of all of small models, and depend on no seed. Drawn
                answers cover more of what the model might say.
            cache_dir (`str`, *optional*): Where answers are kept. `None`: `peft_ogpsa` in the user's cache directory
                (`$XDG_CACHE_HOME` or `~/.cache`).
            max_length (`int`): See the class; prompts that leave no room for an answer are dropped.
            loss (`str`): `"kl"`, or `"answer"`, which whole weights need; see the class.
            progress (`bool`): Show a bar.

        Raises:
            ValueError: If an argument is out of range, there are no prompts, a prompt has no known format, or no
                answer can be kept.
            OSError: If `cache_dir` cannot be written.
        """
        if loss not in ("answer", "kl"):
            raise ValueError(
                f"Reference set {name!r}: loss={loss!r} has no meaning for a model's own answers. Use 'kl' or "
                "'answer'."
            )
        ReferenceSet(name, [], samples, max_length)  # its checks, before the work
        rows, counts = self_answers(
            name,
            prompts,
            model,
            processing_class,
            samples=samples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            sample=sample,
            cache_dir=cache_dir,
            max_length=max_length,
            progress=progress,
        )
        return AnsweredSet(name, rows, None, max_length, loss, counts=counts)

    def tokenize(self, processing_class: Any) -> list[Example] | list[Pair]:
        """Tokenises the rows, with the tokenizer's chat template where they are conversational.

        Args:
            processing_class: A transformers tokenizer, or a processor that has one as `.tokenizer`.

        Returns:
            One example a row, two with `loss="both"`, or with `loss="dpo"` one pair, yet without its margin.

        Raises:
            ValueError: See the class.
        """
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        rows = list(islice(self.dataset, self.samples))
        if not rows:
            raise ValueError(f"Reference set {self.name!r} is empty. Give it at least one example.")
        named = [(row, f"Reference set {self.name!r}: row {i}") for i, row in enumerate(rows)]
        if self.loss in ("both", "dpo"):
            named = [(side, name) for row, name in named for side in self._sides(row, name)]
        encoded = [encode_row(tokenizer, row, name) for row, name in named]
        whole: list[Any] = encoded
        if self.loss == "all":
            whole = [Example(example.ids, 1) for example in encoded]
        elif self.loss == "kl":
            whole = [Anchored(example.ids, example.answer_start) for example in encoded]
        elif self.loss == "dpo":
            whole = [Pair(*sides, self.beta) for sides in zip(encoded[::2], encoded[1::2], strict=True)]
        examples = [example for example in (example.cut(self.max_length) for example in whole) if example is not None]
        if not examples:
            raise ValueError(
                f"Reference set {self.name!r}: max_length={self.max_length} cuts off the answer of every one of its "
                f"{len(rows)} rows, so there is nothing to learn from. Raise max_length or shorten the prompts."
            )
        return examples

    def _sides(self, row: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
        """A preference pair, and the same with its answers changed about."""
        if "chosen" not in row or "rejected" not in row:
            raise ValueError(
                f"{name} is no preference pair, which loss={self.loss!r} needs. Give chosen and rejected answers."
            )
        return [row, {**row, "chosen": row["rejected"], "rejected": row["chosen"]}]


@dataclass
class AnsweredSet(ReferenceSet):
    """A reference set whose rows are a model's own answers.

    A row with a true `unfinished` was cut at `max_new_tokens`: where it stops is no place to stop, so the end of its
    turn is not scored.
    """

    counts: AnswerCounts = field(kw_only=True)

    def tokenize(self, processing_class: Any) -> list[Example]:
        """As in `ReferenceSet`, without the end of the turn where the answer was cut."""
        # The tokens that stay the same when the answer goes on are those of the answer, whatever the template.
        longer = ReferenceSet(self.name, [_going_on(row) for row in self.dataset], None, self.max_length, self.loss)
        answered = cast(list[Example], super().tokenize(processing_class))
        pairs = zip(answered, cast(list[Example], longer.tokenize(processing_class)), strict=True)
        cut = (example.cut(shared_length(example.ids, other.ids)) for example, other in pairs)
        return [example for example in cut if example is not None]


def _going_on(row: Mapping[str, Any]) -> Mapping[str, Any]:
    if not row["unfinished"]:
        return row
    completion = row["completion"]
    if isinstance(completion, str):
        return {**row, "completion": completion + " and"}
    return {**row, "completion": [{**message, "content": message["content"] + " and"} for message in completion]}


def check_sets(reference_sets: Sequence[ReferenceSet], where: str) -> None:
    """Refuses a list without sets, or with two sets of one name, of which a mapping by name would lose one.

    Raises:
        ValueError: If it is one of these; the message begins with `where`.
    """
    if not reference_sets:
        raise ValueError(
            f"{where}: reference_sets is empty. Give at least one ReferenceSet(name, rows) of an ability to preserve; "
            "a few hundred examples are enough."
        )
    names = [own.name for own in reference_sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: reference_sets has two sets of the name {twice[0]!r}. Rename one.")
