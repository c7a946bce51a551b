# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""An observer of the inputs of layers while a model passes reference examples."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import distributed
from .examples import Part
from .gradients import LossFn

LONGEST = 10.0
"""The maximum length with which an input counts, as a multiple of the median length."""

Take = Callable[[str, Tensor, float], None]
"""Function that receives an input's name, its `(n, width)` vectors, and the weight of each."""


class Watcher:
    """Observer of the inputs of layers.

    Args:
        layers: The layers by name.
        one_sequence: Whether all layers see the same positions. Not so in an encoder-decoder.

    Attributes:
        shared: For the first layer that gets an input, all layers that get it.
        inputs: For the same layer, the input's width and device.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, one_sequence: bool = True) -> None:
        self._layers, self._one_sequence = layers, one_sequence
        self.shared: dict[str, list[str]] = {}
        self.inputs: dict[str, tuple[int, torch.device]] = {}
        self._longest: dict[str, Tensor] = {}  # by the first layer: the maximum length that counts
        self._first: dict[str, str] = {}  # by layer: the first layer that shares its input
        # The layers that have the sequence first. The shape of a batch with as many examples as positions hides it.
        self._sequence_first: set[str] = set()
        # The inputs of a pass by identity and version, and the layer that got each one first.
        self._alive: dict[tuple[int, int], tuple[weakref.ref[Tensor], str]] = {}
        self._act: Callable[[str, Tensor], None] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep hooks on the layers while the context is open."""

        def hook(name: str) -> Callable:
            def see(layer: nn.Module, args: tuple, kwargs: dict) -> None:
                if self._act is not None:
                    self._act(name, args[0] if args else next(iter(kwargs.values())))

            return see

        handles = [
            layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _shared_with(self, name: str, vectors: Tensor) -> str:
        """The layer that got this same tensor first."""
        key = id(vectors), vectors._version
        held, first = self._alive.get(key, (None, ""))
        if held is not None and held() is vectors:
            return first
        self._alive[key] = weakref.ref(vectors), name
        return name

    def discover(self, forward: LossFn, model: nn.Module, examples: Sequence[Part]) -> None:
        """Find which layers share an input, which have the sequence first, and the maximum length of each input.

        Every process passes all of these examples, so all find the same without communication.

        Args:
            forward: `forward(model, batch)` passes a batch through the model.
            model: Passed to `forward`.
            examples: Parts of one example each, from all sets, because the inputs of one may be longer than of others.
        """
        lengths: dict[str, list[Tensor]] = {}

        def act(name: str, vectors: Tensor, part: Part) -> None:
            first = self._shared_with(name, vectors)
            if self._first.setdefault(name, first) != first:
                raise _changed(name, self._first[name], first)
            if first == name:
                self.inputs[name] = vectors.shape[-1], vectors.device
                if part.tokens is not None and _is_transposed(vectors, part.tokens):
                    self._sequence_first.add(name)
                found = self._at_tokens(part, name, vectors)
                lengths.setdefault(name, []).append(torch.linalg.vector_norm(found, dim=1))
            own = self.shared.setdefault(first, [])
            if name not in own:
                own.append(name)

        for example in examples:
            self._pass(forward, model, example, functools.partial(act, part=example))
        for name, own in lengths.items():
            self._limit(name, torch.cat(own))
        missing = [name for name in self._layers if name not in self._first]
        if missing:
            raise ValueError(
                f"{len(missing)} adapted layers are not called when the model processes reference examples. One of "
                f"them is {missing[0]}. Their inputs are not known. If a tool computes them with fused kernels "
                "(unsloth, axolotl's lora_*_kernel), turn the kernels off. If they are experts to which none of its "
                "tokens is routed, give longer examples. Otherwise leave these layers out of target_modules. Or "
                "use subspace='gradients'."
            )

    def take(self, forward: LossFn, model: nn.Module, part: Part, take: Take) -> None:
        """Pass this process's share of the examples, and give `take` the vectors at their tokens."""
        share = distributed.share(part.size)
        own = part if len(share) == part.size else part.of(share or [0])

        def act(name: str, vectors: Tensor) -> None:
            first = self._shared_with(name, vectors)
            if first != self._first[name]:
                raise _changed(name, self._first[name], first)
            if first != name or not share:
                return
            found = self._at_tokens(own, name, vectors)
            if not len(found):
                return
            lengths = torch.linalg.vector_norm(found, dim=1)
            if name not in self._longest:  # an expert that saw none of the tokens before
                self._limit(name, lengths)
            take(name, found * (self._longest[name] / lengths).clamp(max=1).unsqueeze(1), own.weight)

        self._pass(forward, model, own, act)

    def _limit(self, name: str, lengths: Tensor) -> None:
        """Set the maximum length of a layer's inputs, if there are any; infinite if the median is zero."""
        if len(lengths):
            median = lengths.median()
            self._longest[name] = LONGEST * torch.where(median > 0, median, math.inf)

    def _at_tokens(self, part: Part, name: str, vectors: Tensor) -> Tensor:
        """The inputs of a layer at the tokens that count: `(n, width)`, float32."""
        flat = vectors.detach().reshape(-1, vectors.shape[-1]).float()
        if part.tokens is None:
            return flat
        tokens = part.tokens
        square = vectors.shape[:2] == tokens.shape and name in self._sequence_first
        if _is_transposed(vectors, tokens) or (square and vectors.dim() > 2):
            tokens = tokens.T
        where = tokens.flatten().nonzero().squeeze(1)
        cut = self._one_sequence and vectors.dim() == 3 and len(flat) < tokens.numel()
        if len(where) == tokens.numel() and not cut:
            return flat
        if len(flat) != part.tokens.numel():
            if cut and name == next(iter(self.inputs)):  # the first adapted layer that is called
                raise ValueError(
                    f"The layer {name} receives {len(flat)} vectors, but the batch has {tokens.numel()} positions. "
                    "It is the first adapted layer, so loss_fn probably passes fewer positions to the model than the "
                    "batch's attention_mask (or labels) has, such as input_ids[:, :-1]. Pass all positions, and shift "
                    "the logits instead: logits[:, :-1]. If the model itself passes the layer only a part of them, "
                    "leave it out of target_modules, or use subspace='gradients'."
                )
            if cut:
                raise ValueError(
                    f"The layer {name} receives {len(flat)} vectors, but the batch has {tokens.numel()} positions: "
                    "the model passes it only a part of them. Leave such layers out of target_modules, or use "
                    "subspace='gradients'."
                )
            raise ValueError(
                f"The layer {name} receives {len(flat)} vectors, but the batch has {part.tokens.numel()} positions, "
                "so OGPSA cannot know which vectors belong to tokens. Routed experts are such layers. Pass one "
                "reference example at a time (OGPSACallback(batch_size=1)) with tokens='all', leave such layers out "
                "of target_modules, or use subspace='gradients'."
            )
        return flat.index_select(0, where.to(flat.device))

    def _pass(self, forward: LossFn, model: nn.Module, part: Part, act: Callable[[str, Tensor], None]) -> None:
        self._alive.clear()
        self._act = act
        try:
            forward(model, part.batch)
        finally:
            self._act = None
            self._alive.clear()


def _is_transposed(vectors: Tensor, tokens: Tensor) -> bool:
    """Whether the sequence comes first in a layer's input, and the examples second."""
    return vectors.dim() > 2 and vectors.shape[:2] != tokens.shape and vectors.shape[:2] == tokens.shape[::-1]


def _changed(name: str, before: str, now: str) -> ValueError:
    return ValueError(
        f"The layer {name} first received the input of {before} and then the input of {now}. A layer that is used in "
        "several places has no subspace of its own. Leave it out of target_modules, or use subspace='gradients'."
    )
