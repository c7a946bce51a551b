# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Choose the reference examples for each refresh."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..core.forms import Form, check_form
from ..core.passes import WEIGHT, ReferenceBatches
from ..text.batching import by_length, padded_examples, padding_of
from ..text.tokenization import Example, tokenizer_of
from .budget import check_rows, refresh_samples
from .losses import LOSSES, loss_of
from .sets import ReferenceSet, check_sets, digest_of_rows

if TYPE_CHECKING:
    from ..core.config import ProjectionConfig


_FORM: Form = {"drawn": dict[str, int], "draws": int, "seed": int, "sizes": dict[str, int], "digest": str}


class ReferenceLoader:
    """Draw reference examples from every set in turn, with a separate random generator.

    Args:
        sets (`Mapping[str, Sequence]`): Tokenized examples, or pairs, by set name.
        samples (`int`, *optional*): Examples per draw, spread evenly over the sets. If there are more sets than
            samples, every draw takes other sets. `None`: all examples of every set.
        batch_size (`int`): Examples per batch. A batch holds examples of similar length.
        seed (`int`): Seed of the order, which differs from epoch to epoch.
        pad_token_id (`int`): Token id that pads short examples in `batches`.
        null_space (`bool`): Whether an activation subspace projects, so that smaller reference weights are enough.
        rows_digest (`str`): Digest of the rows that the examples are of, from `digest_of_rows`. Empty: unknown.

    Attributes:
        losses (`dict[str, ReferenceLoss]`): The loss of each set, which its examples name.
        cost (`float`): Mean cost of an example. A training example costs 1.
    """

    def __init__(
        self,
        sets: Mapping[str, Sequence[Any]],
        samples: int | None,
        batch_size: int,
        seed: int = 0,
        pad_token_id: int = 0,
        null_space: bool = False,
        rows_digest: str = "",
    ) -> None:
        self.sets = {name: list(examples) for name, examples in sets.items()}
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.pad_token_id = pad_token_id
        self._null_space = null_space
        self.losses = {name: loss_of(examples) for name, examples in self.sets.items()}
        self.cost = _mean_cost(self.sets)
        self._drawn = dict.fromkeys(self.sets, 0)
        self._draws = 0
        self._rows_digest = rows_digest
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
        rows_digest: str = "",
    ) -> ReferenceLoader:
        """Build a loader that draws as many examples as the projection's settings say.

        Args:
            sets (`Mapping[str, Sequence]`): See the class.
            config (`ProjectionConfig`): An `OGPSAConfig`, for its `refresh_samples` or `reference_budget`.
            step_examples (`int`): Training examples of one optimizer step.
            batch_size (`int`): See the class.
            seed (`int`): See the class.
            pad_token_id (`int`): See the class.
            rows_digest (`str`): See the class.

        Raises:
            ValueError: If a refresh would draw more than `rows` holds, or would omit a set with `rows_from="set"`.
        """
        samples = refresh_samples(config, step_examples, batch_size, len(sets), _mean_cost(sets))
        loader = cls(sets, samples, batch_size, seed, pad_token_id, config.uses_activations, rows_digest)
        check_rows(config, loader.most_drawn(config.row_of))
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
        """Build a loader for your own training loop.

        ```py
        loader = ReferenceLoader.from_sets(references, tokenizer, config, step_examples=8)
        projector = model.projector
        while projector.due:
            batches = loader.batches(model.device, everything=projector.unbuilt)
            projector.refresh(batches, reference_loss)
        ```

        Args:
            reference_sets (`Sequence[ReferenceSet]`): The abilities to preserve.
            processing_class: A transformers tokenizer, or a processor that has one as `.tokenizer`.
            config (`ProjectionConfig`): An `OGPSAConfig`, for its `refresh_samples` or `reference_budget`.
            step_examples (`int`): Training examples of one optimizer step.
            batch_size (`int`): Reference examples per forward pass.
            seed (`int`): Seed of the order.

        Raises:
            ValueError: If there is no set, two sets have the same name, a set is empty, a set has `loss="dpo"` (its
                reference policy is known to the trainer's callback), or a refresh would draw more than `rows` holds.
        """
        check_sets(reference_sets, "ReferenceLoader.from_sets")
        for own in reference_sets:
            if LOSSES[own.loss].needs_policy:
                raise ValueError(
                    f"Reference set {own.name!r} has loss={own.loss!r}, which needs the log-probabilities of a "
                    "reference policy. Use OGPSACallback with a trainer, or another loss."
                )
        sets = {own.name: own.tokenize(processing_class) for own in reference_sets}
        padding, digest = padding_of(tokenizer_of(processing_class)), digest_of_rows(reference_sets, processing_class)
        return cls.for_training(sets, config, step_examples, batch_size, seed, padding, digest)

    def prepare(
        self,
        model: nn.Module,
        device: torch.device | str,
        progress: Callable[[str, list], Iterable] = lambda name, passes: passes,
    ) -> None:
        """Let each loss compute once, before training, what its examples need.

        Args:
            model: The model in training, as the trainer calls it.
            device: The device of the tensors.
            progress: Gets the name of a set and the list of its passes, and wraps the list, for a progress bar.
        """
        for name, loss in self.losses.items():
            collate = partial(loss.collate, pad_token_id=self.pad_token_id, device=device)
            self.sets[name] = loss.prepare(self.sets[name], model, self.batch_size, collate, partial(progress, name))

    def batches(self, device: torch.device | str, everything: bool = False) -> ReferenceBatches:
        """Draw and pad the next examples. Pass them to `refresh` as `batches`, with `reference_loss` as `loss_fn`.

        Args:
            device: The device of the tensors.
            everything: Return all examples of all sets once, as token sequences, to build an activation subspace from
                them. Nothing is drawn then. `projector.unbuilt` says whether the next refresh builds it.
        """
        if everything:
            whole = {name: self._batched(self._sequences(name)) for name in self.sets}
            padded = {
                name: [padded_examples(batch, self.pad_token_id, device) for batch in own]
                for name, own in whole.items()
            }
            return ReferenceBatches(padded, everything=True)
        drawn = {name: [self._batch(name, batch, device) for batch in own] for name, own in self.draw().items()}
        return ReferenceBatches(drawn, everything=False)

    def _batch(self, name: str, examples: Sequence[Any], device: torch.device | str) -> dict[str, Any]:
        loss = self.losses[name]
        batch = loss.collate(examples, self.pad_token_id, device)
        other = loss.null_space_weight if self._null_space else None
        weight = loss.default_weight if other is None else other
        # Without an entry the weight is 1, so that batches of answers stay what `model(**batch)` accepts.
        return batch if weight == 1 else {**batch, WEIGHT: weight}

    def draw(self) -> dict[str, list[list[Any]]]:
        """Return the next examples by set, in batches. Sets without an example in this draw are left out."""
        counts = dict(zip(self.sets, self._counts(self._draws), strict=True))
        drawn = {name: self._batched(self._take(name, count)) for name, count in counts.items()}
        self._draws += 1
        return {name: batches for name, batches in drawn.items() if batches}

    def most_drawn(self, of: Literal["example", "batch", "set"]) -> int:
        """Return the largest number of examples, batches or sets in any draw."""
        each = {"example": 1, "batch": self.batch_size, "set": sys.maxsize}[of]
        return max(sum(-(-count // each) for count in self._counts(draw)) for draw in range(len(self.sets)))

    def _counts(self, draw: int) -> list[int]:
        """Return how many examples each set gives in a draw."""
        sizes = [len(examples) for examples in self.sets.values()]
        if self.samples is None:
            return sizes
        share, extra = divmod(self.samples, len(sizes))
        # At every draw, a different group of `extra` sets gives one more example each.
        return [min(size, share + ((place - draw) % len(sizes) < extra)) for place, size in enumerate(sizes)]

    def _take(self, name: str, count: int) -> Iterator[Any]:
        examples = self.sets[name]
        if self.samples is None:
            yield from examples
            return
        for _ in range(count):
            epoch, position = divmod(self._drawn[name], len(examples))
            yield examples[self._order(name, epoch)[position]]
            self._drawn[name] += 1

    def _batched(self, examples: Iterable[Any]) -> list[list[Any]]:
        return by_length(examples, self.batch_size, lambda example: len(example.ids))

    def _sequences(self, name: str) -> list[Example]:
        return [sequence for example in self.sets[name] for sequence in self.losses[name].sequences(example)]

    def _order(self, name: str, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(len(self.sets[name]), generator=generator).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's position in its sets, ready for JSON."""
        return {
            "drawn": dict(self._drawn),
            "draws": self._draws,
            "seed": self.seed,
            "sizes": self._sizes(),
            "digest": self.digest,
        }

    @property
    def digest(self) -> str:
        """Digest of all tokens of all sets and, after a hyphen, of their rows if it is known."""
        if self._digest is None:
            found = hashlib.sha256()
            for name in sorted(self.sets):  # in another order they are the same sets
                own = [[sequence.ids, sequence.answer_start] for sequence in self._sequences(name)]
                found.update(json.dumps([name, own]).encode())
            self._digest = found.hexdigest()[:16] + (self._rows_digest and f"-{self._rows_digest}")
        return self._digest

    def has_digest(self, digest: str) -> bool:
        """Return whether a digest is that of the same reference sets: of the same tokens, or of the same rows.

        The same rows have other tokens on another day if the chat template shows the date. Under another template,
        they are others.
        """
        return not set(self.digest.split("-")).isdisjoint(digest.split("-"))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where `state_dict` was taken.

        Raises:
            ValueError: If the sets have different names, sizes or examples, or if the state is damaged.
        """
        check_form(state, _FORM, "the loader's state")
        if state["sizes"] != self._sizes():
            raise ValueError(
                f"The reference sets of the checkpoint have the sizes {state['sizes']}, but the given sets have the "
                f"sizes {self._sizes()}. Resume with the same sets, or rebuild the subspace."
            )
        if not self.has_digest(state["digest"]):
            raise ValueError(
                "The given reference sets have the names and sizes of those in the checkpoint, but other examples. "
                "Resume with the same sets, or rebuild the subspace."
            )
        # The order of the sets decides which of them gives one example more in a draw.
        self.sets = {name: self.sets[name] for name in state["sizes"]}
        self._drawn, self._draws, self.seed = dict(state["drawn"]), int(state["draws"]), int(state["seed"])

    def _sizes(self) -> dict[str, int]:
        return {name: len(examples) for name, examples in self.sets.items()}


def _mean_cost(sets: Mapping[str, Sequence[Any]]) -> float:
    costs = [loss_of(own).cost for own in sets.values()]
    return sum(costs) / len(costs)
