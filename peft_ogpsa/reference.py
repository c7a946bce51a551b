# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Reference sets: the examples of an ability to keep, and their loss."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .budget import check_rows, refresh_samples
from .divergence import COST, Anchored, divergence_loss
from .encoding import IGNORED, Example, Prompt, encode_row
from .preferences import Pair, preference_loss

if TYPE_CHECKING:
    from .answers import AnsweredSet
    from .projection import ProjectionConfig

ANCHORED_WEIGHT = 8.0
"""The default reference weight of a set with loss="kl"; docs/tax.md has the measurement."""

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
        for field, value in (("samples", self.samples), ("max_length", self.max_length)):
            if not (value is None and field == "samples") and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise ValueError(f"ReferenceSet {self.name!r}: {field}={value!r} must be an integer of at least 1.")
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
        from .answers import answered_set  # builds on this module

        return answered_set(
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
            loss=loss,
            progress=progress,
        )

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


def collate(
    examples: Sequence[Example] | Sequence[Pair], pad_token_id: int, device: torch.device | str
) -> dict[str, Tensor]:
    """Pads examples on the right.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each `(examples, tokens)`, and of anchored examples also
        `anchored`, `(examples,)`. Of pairs `(pairs, 2, tokens)` each, the
        chosen answer first, and `beta` and, where it is known, `margin`, `(pairs,)`.
    """
    if isinstance(examples[0], Pair):
        pairs = cast(Sequence[Pair], examples)
        sides = collate([side for pair in pairs for side in (pair.chosen, pair.rejected)], pad_token_id, device)
        batch = {name: tensor.unflatten(0, (-1, 2)) for name, tensor in sides.items()}
        batch["beta"] = torch.tensor([pair.beta for pair in pairs], device=device)
        if pairs[0].margin is not None:
            batch["margin"] = torch.tensor([pair.margin for pair in pairs], device=device)
        return batch
    examples = cast(Sequence[Example], examples)

    def padded(rows: list[list[int]], value: int) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)

    batch = {
        "input_ids": padded([example.ids for example in examples], pad_token_id),
        "attention_mask": padded([[1] * len(example.ids) for example in examples], 0),
        "labels": padded([example.labels for example in examples], IGNORED),
    }
    if isinstance(examples[0], Anchored):
        batch["anchored"] = torch.ones(len(examples), dtype=torch.bool, device=device)
    return batch


def _plain(examples: Sequence[Any]) -> list[Example]:
    """The token sequences alone, without what a loss needs beside them."""
    found = []
    for example in examples:
        sides = (example.chosen, example.rejected) if isinstance(example, Pair) else (example,)
        found += [Example(side.ids, side.answer_start) for side in sides]
    return found


def reference_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of a batch from `collate`: `preference_loss` of pairs, `divergence_loss`, or `answer_loss`."""
    if "margin" in batch:
        return preference_loss(model, batch)
    return divergence_loss(model, batch) if "anchored" in batch else answer_loss(model, batch)


def answer_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of a causal language model on the labels, in nats per token.

    Args:
        model: Called with `input_ids` and `attention_mask`; returns an object with `logits` `(examples, tokens,
            vocabulary)`.
        batch: From `collate`.

    Returns:
        A scalar: the mean over tokens within each example, then over examples, so that the gradient of every example
        is its own, whatever else is in the batch.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    if logits.dim() != 3:
        raise ValueError(
            f"Reference losses need a causal language model, and this {type(model).__name__} returns logits of shape "
            f"{tuple(logits.shape)} instead of (examples, tokens, vocabulary). For other models give your own loss to "
            "model.projector.refresh(batches, loss_fn) in a loop of your own."
        )
    labels = batch["labels"][:, 1:]
    learnt = labels != IGNORED
    # Only the positions that are learnt are widened to float32: the logits are the largest tensor of the pass.
    losses = F.cross_entropy(logits[:, :-1][learnt].float(), labels[learnt], reduction="none")
    weights = 1.0 / learnt.sum(1, keepdim=True).clamp(min=1).expand_as(labels)[learnt]
    return (losses * weights).sum() / len(labels)


def batched(examples: Sequence[Any], size: int) -> list[list[Any]]:
    """Batches of examples (or pairs) of similar length, short ones first."""
    ordered = sorted(examples, key=lambda example: len(example.ids))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


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


def padding_of(tokenizer: Any) -> int:
    """The token id for padding. Padding is masked, so any id works."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


def _mean_cost(sets: Mapping[str, Sequence[Any]]) -> float:
    costs = [COST if isinstance(own[0], Anchored) else 1.0 for own in sets.values()]
    return sum(costs) / len(costs)


class ReferenceLoader:
    """Draws reference examples in turn from every set, on a random generator of its own.

    Args:
        sets (`Mapping[str, Sequence]`): Tokenised examples, or pairs, by set name.
        samples (`int`, *optional*): Examples per draw, spread evenly over the sets; of fewer than there are sets,
            every draw takes other sets. `None`: all of every set.
        batch_size (`int`): Examples per batch; batches hold examples of similar length.
        seed (`int`): Of the order, which differs from epoch to epoch.
        pad_token_id (`int`): Fills short examples up in `batches`.

    Attributes:
        weights (`dict[str, float]`): For `refresh`: how much of each set's mean gradient is added to the training
            gradient where the configuration leaves it to the loss. 8 with `loss="kl"`, 1 with other losses.
        cost (`float`): Of an example on average, where a training example costs 1.
    """

    def __init__(
        self,
        sets: Mapping[str, Sequence[Any]],
        samples: int | None,
        batch_size: int,
        seed: int = 0,
        pad_token_id: int = 0,
    ) -> None:
        self.sets = {name: list(examples) for name, examples in sets.items()}
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.pad_token_id = pad_token_id
        anchored = {name: isinstance(examples[0], Anchored) for name, examples in self.sets.items()}
        self.weights = {name: ANCHORED_WEIGHT if its else 1.0 for name, its in anchored.items()}
        self.cost = _mean_cost(self.sets)
        self._drawn = dict.fromkeys(self.sets, 0)
        self._draws = 0
        self._digest: str | None = None

    @classmethod
    def for_training(
        cls,
        sets: Mapping[str, Sequence[Any]],
        config: ProjectionConfig,
        step_examples: int,
        batch_size: int,
        seed: int = 0,
        pad_token_id: int = 0,
    ) -> ReferenceLoader:
        """A loader that draws as many examples as the projection's settings say; the other arguments are the class's.

        Args:
            sets (`Mapping[str, Sequence]`): See the class.
            config (`ProjectionConfig`): An `OGPSAConfig`, for its `refresh_samples` or `reference_budget`.
            step_examples (`int`): Training examples of one optimizer step.
            batch_size (`int`): See the class.
            seed (`int`): See the class.
            pad_token_id (`int`): See the class.

        Raises:
            ValueError: If a refresh would draw more than `rows` holds, or leave out a set with `rows_from="set"`.
        """
        samples = refresh_samples(config, step_examples, batch_size, len(sets), _mean_cost(sets))
        loader = cls(sets, samples, batch_size, seed, pad_token_id)
        check_rows(config, loader.most_drawn(), loader.most_drawn(by_batch=True))
        return loader

    @classmethod
    def from_sets(
        cls,
        reference_sets: Sequence[ReferenceSet],
        processing_class: Any,
        config: ProjectionConfig,
        step_examples: int,
        batch_size: int = 8,
        seed: int = 0,
    ) -> ReferenceLoader:
        """A loader for a training loop of your own.

        ```py
        loader = ReferenceLoader.from_sets(references, tokenizer, config, step_examples=8)
        projector = model.projector
        while projector.due:
            batches = loader.batches(model.device, everything=projector.unbuilt)
            projector.refresh(batches, reference_loss, weights=loader.weights)
        ```

        Args:
            reference_sets (`Sequence[ReferenceSet]`): The abilities to preserve.
            processing_class: A transformers tokenizer, or a processor that has one as `.tokenizer`.
            config (`ProjectionConfig`): An `OGPSAConfig`, for its `refresh_samples` or `reference_budget`.
            step_examples (`int`): Training examples of one optimizer step.
            batch_size (`int`): Reference examples passed at once.
            seed (`int`): Of the order.

        Raises:
            ValueError: If there is no set or two of one name, if a set is empty or has `loss="dpo"`, whose reference
                policy the trainer's callback knows, or if a refresh would draw more than `rows` holds.
        """
        check_sets(reference_sets, "ReferenceLoader.from_sets")
        pairs = [own.name for own in reference_sets if own.loss == "dpo"]
        if pairs:
            raise ValueError(
                f"Reference set {pairs[0]!r} has loss='dpo', which needs the log-probabilities of a reference policy. "
                "Use OGPSACallback with a trainer, or another loss."
            )
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        sets = {own.name: own.tokenize(tokenizer) for own in reference_sets}
        return cls.for_training(sets, config, step_examples, batch_size, seed, padding_of(tokenizer))

    def batches(self, device: torch.device | str, everything: bool = False) -> dict[str, list[dict[str, Tensor]]]:
        """Draws and pads: what `refresh` takes as `batches`, with `reference_loss` as its `loss_fn`.

        Args:
            device: Where the tensors go.
            everything: All examples of all sets, once, as token sequences: what an activation subspace is built from.
                Nothing is drawn then.
        """
        if everything:
            drawn = {name: batched(_plain(own), self.batch_size) for name, own in self.sets.items()}
        else:
            drawn = self.draw()
        return {name: [collate(batch, self.pad_token_id, device) for batch in own] for name, own in drawn.items()}

    def draw(self) -> dict[str, list[list[Any]]]:
        """The next examples by set, in batches; sets of which none is drawn this time are left out."""
        drawn = {name: batched(list(self._take(name)), self.batch_size) for name in self.sets}
        self._draws += 1
        return {name: batches for name, batches in drawn.items() if batches}

    def most_drawn(self, by_batch: bool = False) -> int:
        """The largest number of examples, or of batches, that any draw has."""
        if self.samples is None:
            counts = [[len(examples) for examples in self.sets.values()]]
        else:
            share, extra = divmod(self.samples, len(self.sets))
            sizes = [len(examples) for examples in self.sets.values()]
            # One example more of another `extra` sets at every draw.
            counts = [
                [min(size, share + ((place - draw) % len(sizes) < extra)) for place, size in enumerate(sizes)]
                for draw in range(len(sizes))
            ]
        return max(sum(-(-count // self.batch_size) if by_batch else count for count in draw) for draw in counts)

    def _take(self, name: str) -> Iterator[Any]:
        examples = self.sets[name]
        if self.samples is None:
            yield from examples
            return
        names = list(self.sets)
        share, extra = divmod(self.samples, len(names))
        # What does not divide evenly goes to another set at every draw.
        count = share + ((names.index(name) - self._draws) % len(names) < extra)
        for _ in range(min(count, len(examples))):
            epoch, position = divmod(self._drawn[name], len(examples))
            yield examples[self._order(name, epoch)[position]]
            self._drawn[name] += 1

    def _order(self, name: str, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(len(self.sets[name]), generator=generator).tolist()

    def state_dict(self) -> dict[str, Any]:
        """The loader's place in its sets, JSON-ready."""
        return {
            "drawn": dict(self._drawn),
            "draws": self._draws,
            "seed": self.seed,
            "sizes": self._sizes(),
            "digest": self.digest,
        }

    @property
    def digest(self) -> str:
        """Of all tokens of all sets: other reference sets have another one."""
        if self._digest is None:
            found = hashlib.sha256()
            for name, own in self.sets.items():
                found.update(json.dumps([name, [[e.ids, e.answer_start] for e in _plain(own)]]).encode())
            self._digest = found.hexdigest()[:16]
        return self._digest

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: If the sets have other names, sizes or examples.
        """
        if state["sizes"] != self._sizes():
            raise ValueError(
                f"The checkpoint's reference sets have the sizes {state['sizes']}, these {self._sizes()}. Resume with "
                "the same sets, or rebuild the subspace."
            )
        if state["digest"] != self.digest:
            raise ValueError(
                "The checkpoint's reference sets have the names and sizes of these, and other examples. Resume with "
                "the same sets, or rebuild the subspace."
            )
        self._drawn, self._draws, self.seed = dict(state["drawn"]), int(state["draws"]), int(state["seed"])

    def _sizes(self) -> dict[str, int]:
        return {name: len(examples) for name, examples in self.sets.items()}
