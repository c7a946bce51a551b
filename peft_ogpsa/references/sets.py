# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Reference sets: the examples of an ability to preserve, and their loss."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from ..core.forms import is_count
from ..text.tokenization import Example, ProcessingClass, Prompt, columns_of, shared_length, template_of, tokenizer_of
from .losses import LOSSES
from .losses.dpo import Pair
from .self_answers import AnswerCounts, base_answers, kept_answers

logger = logging.getLogger(__name__)

OF_OWN_ANSWERS = sorted(
    (name for name, loss in LOSSES.items() if loss.for_own_answers), key=lambda name: LOSSES[name].learns_answers
)
"""The losses that `ReferenceSet.from_prompts` takes. Those that learn nothing from the answers come first."""


@dataclass
class ReferenceSet:
    """A few hundred examples of an ability that fine-tuning must not harm.

    Rows are text, plain or conversational, in one of these formats of TRL's trainers: `prompt`/`chosen`/`rejected`
    (`prompt` may be missing if it is part of both answers), `prompt`/`completion`, `messages`, or `text`. If a row has
    the columns of several formats, the first of these counts. The loss is the cross-entropy of the answer in nats per
    token, averaged within an example and then over examples. For preference pairs the answer is the chosen one, unless
    `loss` says otherwise.

    Args:
        name (`str`): Name of the set in logs. It must be unique among the sets of a run.
        dataset (`Iterable[Mapping]`): The rows: a `datasets.Dataset`, a list of dicts, or any iterable of them.
        samples (`int`, *optional*): Use at most this many rows, from the start. `None`: all.
        max_length (`int`): Maximum number of tokens. Longer examples are cut at the end.
        loss (`str`): `"answer"` scores the completion, the chosen answer, or the last assistant turn (all of a
            `text`). `"all"` scores every token. `"kl"` is KL from base along the answer, which cannot be lowered by
            learning the answer's style. It needs an adapter and one more forward pass. For preference pairs, there
            are two more losses. `"both"` scores the chosen and the rejected answer, as one example each. The
            published code does this in its DPO stage. `"dpo"` is the DPO loss of the pair against the frozen
            reference policy. That policy is TRL's `ref` adapter if there is one (a DPO run that continues with an
            adapter), and otherwise the base model.
        beta (`float`): Beta of the DPO loss. Use the trainer's value.

    Raises:
        ValueError: If an argument is out of range, the set is empty, a row has no known format, or truncation leaves
            no row with a token to learn from.
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
        if not hasattr(self.dataset, "__iter__") or isinstance(self.dataset, str | bytes | Mapping):
            raise ValueError(
                f"ReferenceSet {self.name!r}: dataset is of the type {type(self.dataset).__name__}. Give a list of "
                "rows, or a datasets.Dataset."
            )
        for limit, value in (("samples", self.samples), ("max_length", self.max_length)):
            if not (value is None and limit == "samples") and not is_count(value):
                raise ValueError(f"ReferenceSet {self.name!r}: {limit}={value!r} must be an integer of at least 1.")
        if not isinstance(self.loss, str) or self.loss not in LOSSES:
            raise ValueError(
                f"ReferenceSet {self.name!r}: loss={self.loss!r} is unknown. Choose from: {', '.join(LOSSES)}."
            )
        if not isinstance(self.beta, int | float) or not 0 < self.beta <= sys.float_info.max:
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
        """Build a set without labeled data: the base model answers the prompts, and the rows hold its answers.

        Refusals and degenerate answers (empty, symbols, loops) are dropped; `.counts` of the result says how many.
        If an answer was cut at `max_new_tokens`, the end of its turn is not scored. The answers are stored on disk and
        reused for the same model, tokenizer, prompts and settings. A damaged file is rebuilt with a warning. The
        model, the tokenizer and the random state are not changed.

        Args:
            name (`str`): See the class.
            prompts (`Iterable`): Strings, lists of messages, or rows with `prompt` or `messages`, such as
                `peft_ogpsa.data.load_prompts("general")`.
            model: The causal language model. The adapter of a `PeftModel` is disabled while it answers.
            processing_class: Its tokenizer, or a processor that has one as `.tokenizer`.
            samples (`int`, *optional*): Answer at most this many prompts, from the start. `None`: all.
            max_new_tokens (`int`): Maximum number of tokens of an answer. Longer answers are cut.
            batch_size (`int`): Prompts per batch.
            seed (`int`): Seed of the sampling.
            sample (`bool`): Sample from the model's distribution instead of taking the most likely token. Off by
                default: the most likely answers are better, especially those of small models, and do not depend on a
                seed. Sampled answers cover more of what the model might say.
            cache_dir (`str`, *optional*): Where answers are stored. `None`: `peft_ogpsa` in the user's cache directory
                (`$XDG_CACHE_HOME` or `~/.cache`).
            max_length (`int`): See the class. Prompts that leave no room for an answer are dropped.
            loss (`str`): `"kl"` or `"answer"`; see the class. Full-parameter training needs `"answer"`.
            progress (`bool`): Show a progress bar.

        Raises:
            ValueError: If an argument is out of range, there are no prompts, a prompt has no known format, or no
                answer can be kept.
            OSError: If `cache_dir` cannot be written.
        """
        if loss not in OF_OWN_ANSWERS:
            raise ValueError(
                f"Reference set {name!r}: loss={loss!r} does not work with a model's own answers. Use "
                f"{' or '.join(map(repr, OF_OWN_ANSWERS))}."
            )
        ReferenceSet(name, [], samples, max_length)  # run its checks before the work
        where = f"Reference set {name!r}"
        answers, too_long = base_answers(
            where,
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
        rows, counts = kept_answers(where, answers, len(too_long))
        own = template_of(processing_class) or ""
        return AnsweredSet(name, rows, None, max_length, loss, counts=counts, chat_template=own)

    def tokenize(self, processing_class: Any) -> list[Example] | list[Pair]:
        """Tokenize the rows, with the tokenizer's chat template if they are conversational.

        Args:
            processing_class: A transformers tokenizer, or a processor that has one as `.tokenizer`.

        Returns:
            One example per row, two with `loss="both"`. With `loss="dpo"` one pair per row, still without its margin.

        Raises:
            ValueError: See the class.
        """
        rows = self.rows()
        if not rows:
            raise ValueError(f"Reference set {self.name!r} is empty. Give it at least one example.")
        named = [(row, f"Reference set {self.name!r}: row {i}") for i, row in enumerate(rows)]
        whole = [example for row, name in named for example in self._encoded(processing_class, row, name)]
        examples = [example for example in (example.cut(self.max_length) for example in whole) if example is not None]
        if not examples:
            raise ValueError(
                f"Reference set {self.name!r}: max_length={self.max_length} cuts off the answers of all {len(rows)} "
                "rows, so there is nothing to learn from. Raise max_length, or shorten the prompts."
            )
        if len(examples) < len(whole):
            logger.warning(
                "Reference set %r: max_length=%d cuts off the answers of %d of %d examples, so they are not used. "
                "Raise max_length, or shorten the prompts.",
                self.name,
                self.max_length,
                len(whole) - len(examples),
                len(whole),
            )
        return examples

    def rows(self) -> list[Mapping[str, Any]]:
        """Return the rows that are used."""
        rows = list(islice(self.dataset, self.samples))
        if isinstance(self.dataset, Iterator) or not isinstance(self.dataset, Sized):
            self.dataset = rows  # an iterator can be read once only, and a stream is slow
        return rows

    def _encoded(self, processing_class: ProcessingClass, row: Mapping[str, Any], name: str) -> list[Any]:
        """Return the examples of a row, uncut."""
        return LOSSES[self.loss].tokenize(processing_class, columns_of(row, name), name, self.beta)


@dataclass
class AnsweredSet(ReferenceSet):
    """A reference set whose rows are a model's own answers.

    A row whose `unfinished` is true was cut at `max_new_tokens`. Its answer should not stop there, so the end of its
    turn is not scored. A row with `ids` keeps the model's own tokens, because the chat template would show others.
    """

    counts: AnswerCounts = field(kw_only=True)
    chat_template: Any = field(default=None, kw_only=True)
    """The chat template under which the model answered, if it is known."""

    def _encoded(self, processing_class: ProcessingClass, row: Mapping[str, Any], name: str) -> list[Any]:
        """Return the example of a row, uncut, without the end of the turn if the answer was cut."""
        if "ids" in row:  # the chat template would show another answer than the model's
            return [Example(list(row["ids"]), row["answer_start"], self.loss)]
        (example,) = super()._encoded(processing_class, row, name)
        if not row["unfinished"]:
            return [example]
        # The tokens that stay the same when the answer continues belong to the answer, whatever the template.
        (longer,) = super()._encoded(processing_class, _going_on(row), name)
        cut = example.cut(shared_length(example.ids, longer.ids))
        return [] if cut is None else [cut]


def _going_on(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row whose answer continues."""
    completion = row["completion"]
    if isinstance(completion, str):
        return {**row, "completion": completion + " and"}
    return {**row, "completion": [{**message, "content": message["content"] + " and"} for message in completion]}


def digest_of_rows(reference_sets: Sequence[ReferenceSet], processing_class: ProcessingClass) -> str:
    """Digest the rows that are used and the chat template, which may show another date on another day."""
    facts = [
        (own.name, own.loss, own.max_length, [columns_of(row, own.name) for row in own.rows()])
        for own in sorted(reference_sets, key=lambda own: own.name)
    ]
    shown_by = template_of(processing_class), len(tokenizer_of(processing_class))
    return hashlib.sha256(repr((facts, shown_by)).encode()).hexdigest()[:16]


def check_sets(reference_sets: Sequence[ReferenceSet], where: str) -> None:
    """Reject a list without sets, with other objects, or with two sets of one name: a mapping would lose one of them.

    Raises:
        ValueError: If the list is rejected. The message begins with `where`.
    """
    if not reference_sets:
        raise ValueError(
            f"{where}: reference_sets is empty. Give at least one ReferenceSet(name, rows) for an ability to "
            "preserve. A few hundred examples are enough."
        )
    # Not isinstance: the command line has sets whose prompts are answered later.
    other = next((own for own in reference_sets if not hasattr(own, "name")), None)
    if other is not None:
        raise ValueError(
            f"{where}: reference_sets contains an object of the type {type(other).__name__}. Give reference sets: "
            "[ReferenceSet(name, rows)]."
        )
    names = [own.name for own in reference_sets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: reference_sets has two sets with the name {twice[0]!r}. Rename one of them.")
