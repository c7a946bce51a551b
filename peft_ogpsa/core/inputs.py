# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Find the leading directions of each layer's inputs on reference tokens, in one or two passes of the base.

Layers that get the same tensor (q, k and v; gate and up) share an input. Every reference set counts equally, whatever
its size, and every token of a set counts equally within the set. In some layers of language models the inputs of a few
tokens, such as the first, are hundreds of times as long as those of all others (massive activations: Sun, Chen,
Kolter, Liu 2024, arXiv 2402.17762). They would make up all of the energy there. So inputs longer than `LONGEST` times
the median length count with that length.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import distributed
from .gradients import LossFn, batch_size, examples_of, first_tensor
from .linalg import small_dtype
from .sketch import Sketch

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a position that is not trained on, as in torch's cross-entropy."""

HELD_OUT = 8
"""One in this many examples of a set is not used to find the directions. It shows how well they fit."""

MOST_GAIN = 10.0
"""The largest gain. If almost nothing is left of an input, a larger gain would amplify noise."""

LONGEST = 10.0
"""The maximum length with which an input counts, in median lengths of an example's tokens."""

_TOKENS = 2
"""With fewer reference tokens for each direction, the directions say little about other inputs."""

_TURNS = 4
"""Wide inputs are passed twice. The first pass turns their sketches this many times, after an equal part each."""


@dataclass
class Input:
    """The input that several layers share in each forward pass, and the directions that hold most of it.

    Attributes:
        layers: Names of the layers.
        width: Size of the input's last axis.
        energies: `(k,)`, float64: energy of each direction on the reference tokens, strongest first.
        directions: `(width, k)`, float32, orthonormal columns.
        energy: The total energy: the mean squared length of the input.
        held_out: Share of the energy of held-out examples that lies in the directions; `None` without any.
    """

    layers: tuple[str, ...]
    width: int
    energies: Tensor
    directions: Tensor
    energy: float
    held_out: float | None = None

    @property
    def share(self) -> float:
        """The share of the energy that lies in the directions, from 0 to 1."""
        return min(1.0, float(self.energies.sum()) / self.energy) if self.energy else 0.0

    @property
    def gain(self) -> float:
        """The length of an input relative to its part outside the directions, at most `MOST_GAIN`."""
        return min(MOST_GAIN, (1 - self.share) ** -0.5) if self.share < 1 else MOST_GAIN

    def cut(self, rank: int | None, energy: float) -> None:
        """Keep `rank` directions, or as many as hold the share `energy` of the total."""
        if rank is None:
            reached = self.energies.cumsum(0) / self.energy if self.energy else self.energies
            rank = int((reached < energy).sum()) + 1
        self.energies, self.directions = self.energies[:rank], self.directions[:, :rank]


Batches = Mapping[str, Sequence[Any]]
"""The batches of each reference set, by name."""

Tokens = Literal["all", "answer"]


def find(
    layers: Mapping[str, nn.Module],
    forward: LossFn,
    model: nn.Module,
    batches: Batches,
    *,
    most: Callable[[int], int],
    rank: int | None = None,
    energy: float = 1.0,
    tokens: Tokens = "all",
    seed: int = 0,
    progress: Callable[[list], Iterable] = iter,
) -> list[Input]:
    """Find the leading directions of the layers' inputs.

    Run it without the adapter, under `isolation.isolated_eval(model)`. With several processes, all must call it with
    the same batches. Each passes its share of every batch.

    Args:
        layers: The layers by name. The input of a layer is the first argument of its call, `(..., width)`.
        forward: `forward(model, batch)` passes a batch through the model. Its return value is not used.
        model: Passed to `forward`.
        batches: The batches of each reference set. The `attention_mask` of a batch defines which positions are tokens;
            with `tokens="answer"` its `labels` do.
        most: Returns the maximum number of directions of an input of a given width. Used if `rank` is not given.
        rank: Number of directions; fewer if there are fewer. `None`: as many as `energy` requires.
        energy: Share of the inputs' energy that the directions hold, from 0 to 1.
        tokens: `"all"` tokens, or only those of the `"answer"`.
        seed: Seed of the range finder.
        progress: Wraps the list of full passes, for a progress bar.

    Returns:
        The inputs, in the order in which the model computes them.

    Raises:
        ValueError: If a batch does not define which positions are tokens, if an input has other positions, if a layer
            was never called, or if a layer does not always get the input that it got first.
        FloatingPointError: If an input is not finite.
    """
    used, held = _split(batches, tokens)
    watcher = _Watcher(layers)
    with watcher.watching():
        watcher.discover(forward, model, used[0].of([0]))
        sketches = {
            name: Sketch(width, rank or most(width), device, seed) for name, (width, device) in watcher.inputs.items()
        }

        def add(name: str, vectors: Tensor, weight: float) -> None:
            sketches[name].add(vectors, weight)

        if not all(own.exact for own in sketches.values()):
            _turn(sketches, used, watcher, forward, model)
        for part in progress(used):
            watcher.take(forward, model, part, add)
        _add_up(sketches.values())
        # Each sketch is freed as soon as its directions are found.
        found = [_input(watcher.shared[name], sketches.pop(name), rank, energy) for name in list(sketches)]
        _measure(found, held, watcher, forward, model)
    _warn_of_few(sum(map(_count, used)), found)
    return found


@dataclass(frozen=True)
class _Part:
    """Examples of one reference set that are passed together.

    Attributes:
        batch: The examples.
        size: Number of examples.
        tokens: Positions whose tokens count: `(examples, tokens)`; `None` if all count.
        weight: Weight of each token.
    """

    batch: Any
    size: int
    tokens: Tensor | None
    weight: float

    def of(self, indices: Sequence[int]) -> _Part:
        """Select some of the examples."""
        tokens = None if self.tokens is None else self.tokens[list(indices)]
        return _Part(examples_of(self.batch, indices), len(indices), tokens, self.weight)


def _split(batches: Batches, tokens: Tokens) -> tuple[list[_Part], list[_Part]]:
    """Split into used and held-out examples, with weights that let every set count the same."""
    used: list[_Part] = []
    held: list[_Part] = []
    for name, own in batches.items():
        kept, out, seen = [], [], 0
        for batch in own:
            size = batch_size(batch)
            where = _tokens_of(batch, tokens, name)
            part = _Part(batch, size, where, 1.0)
            places = [i for i in range(size) if (seen + i) % HELD_OUT == HELD_OUT - 1]
            seen += size
            if not places:
                kept.append(part)
                continue
            out.append(part.of(places))
            rest = [i for i in range(size) if i not in places]
            if rest:
                kept.append(part.of(rest))
        used += _weighted(kept, name, len(batches))
        held += _weighted([part for part in out if _count(part)], name, len(batches))
    return used, held


def _weighted(parts: list[_Part], name: str, sets: int) -> list[_Part]:
    count = sum(_count(part) for part in parts)
    if parts and not count:
        raise ValueError(
            f"Reference set {name!r} has no token for the activation subspace. Give it other examples, or use "
            "tokens='all'."
        )
    return [replace(part, weight=1 / (count * sets)) for part in parts]


def _count(part: _Part) -> int:
    if part.tokens is not None:
        return int(part.tokens.sum())
    first = first_tensor(part.batch)  # ids, or vectors
    return first.shape[:-1].numel() if first.is_floating_point() else first.numel()


def _tokens_of(batch: Any, tokens: Tokens, name: str) -> Tensor | None:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if tokens == "answer":
        if labels is None:
            raise ValueError(
                "tokens='answer' needs `labels` in every batch, with -100 at other positions, but a batch of "
                f"{name!r} has no `labels`. Add them, or use tokens='all'."
            )
        return labels != IGNORED
    return None if mask is None else mask.bool()


Take = Callable[[str, Tensor, float], None]
"""Function that receives an input's name, its `(n, width)` vectors, and the weight of each."""


class _Watcher:
    """Observer of the inputs of layers.

    Args:
        layers: The layers by name.

    Attributes:
        shared: For the first layer that gets an input, all layers that get it.
        inputs: For the same layer, the input's width and device.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self.shared: dict[str, list[str]] = {}
        self.inputs: dict[str, tuple[int, torch.device]] = {}
        self._longest: dict[str, Tensor] = {}  # by the first layer: the maximum length that counts
        self._first: dict[str, str] = {}  # by layer: the first layer that shares its input
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

    def discover(self, forward: LossFn, model: nn.Module, part: _Part) -> None:
        """Find which layers share an input."""

        def act(name: str, vectors: Tensor) -> None:
            first = self._shared_with(name, vectors)
            if self._first.setdefault(name, first) != first:
                raise _changed(name, self._first[name], first)
            if first == name:
                self.inputs[name] = vectors.shape[-1], vectors.device
                self._longest[name] = LONGEST * _median_length(self._at_tokens(part, name, vectors))
            own = self.shared.setdefault(first, [])
            if name not in own:
                own.append(name)

        self._pass(forward, model, part, act)
        missing = [name for name in self._layers if name not in self._first]
        if missing:
            raise ValueError(
                f"{len(missing)} adapted layers are not called when the model processes a reference example. One of "
                f"them is {missing[0]}. Their inputs are not known. If a tool computes them with fused kernels "
                "(unsloth, axolotl's lora_*_kernel), turn the kernels off. Otherwise leave these layers out of "
                "target_modules. Or use subspace='gradients'."
            )

    def take(self, forward: LossFn, model: nn.Module, part: _Part, take: Take) -> None:
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
            lengths = torch.linalg.vector_norm(found, dim=1, keepdim=True)
            take(name, found * (self._longest[name] / lengths).clamp(max=1), own.weight)

        self._pass(forward, model, own, act)

    def _at_tokens(self, part: _Part, name: str, vectors: Tensor) -> Tensor:
        """The inputs of a layer at the tokens that count: `(n, width)`, float32."""
        flat = vectors.detach().reshape(-1, vectors.shape[-1]).float()
        if part.tokens is None:
            return flat
        where = part.tokens.flatten().nonzero().squeeze(1)
        if len(where) == part.tokens.numel():
            return flat
        if len(flat) != part.tokens.numel():
            raise ValueError(
                f"The layer {name} receives {len(flat)} vectors, but the batch has {part.tokens.numel()} positions, "
                "so OGPSA cannot know which vectors belong to tokens. Routed experts are such layers. Pass one "
                "reference example at a time (OGPSACallback(batch_size=1)) with tokens='all', leave such layers out "
                "of target_modules, or use subspace='gradients'."
            )
        return flat.index_select(0, where.to(flat.device))

    def _pass(self, forward: LossFn, model: nn.Module, part: _Part, act: Callable[[str, Tensor], None]) -> None:
        self._alive.clear()
        self._act = act
        try:
            forward(model, part.batch)
        finally:
            self._act = None
            self._alive.clear()


def _median_length(vectors: Tensor) -> Tensor:
    """Median length of `(n, width)` vectors; infinite if it is zero, so that it limits nothing."""
    if not len(vectors):
        return torch.tensor(math.inf, device=vectors.device)
    median = torch.linalg.vector_norm(vectors, dim=1).median()
    return torch.where(median > 0, median, math.inf)


def _changed(name: str, before: str, now: str) -> ValueError:
    return ValueError(
        f"The layer {name} first received the input of {before} and then the input of {now}. A layer that is used in "
        "several places has no subspace of its own. Leave it out of target_modules, or use subspace='gradients'."
    )


def _not_finite(layer: str) -> FloatingPointError:
    return FloatingPointError(
        f"The input of {layer} is not finite on the reference examples. Check the model's loss on them and the dtype "
        "(float16 overflows: use bfloat16 or float32)."
    )


def _add_up(sketches: Iterable[Sketch]) -> None:
    for own in sketches:
        for tensor in own.parts():
            (total,) = distributed.summed([tensor])
            tensor.copy_(total)


def _turn(
    sketches: Mapping[str, Sketch], used: Sequence[_Part], watcher: _Watcher, forward: LossFn, model: nn.Module
) -> None:
    """Pass the examples once for the wide inputs alone, and turn their sketches after each part of them."""

    def add(name: str, vectors: Tensor, weight: float) -> None:
        if not sketches[name].exact:
            sketches[name].add(vectors, weight)

    for turn in range(_TURNS):
        seen = 0
        for part in used:
            quarter = [i for i in range(part.size) if (seen + i) % _TURNS == turn]
            seen += part.size
            if quarter:
                watcher.take(forward, model, part.of(quarter), add)
        _add_up(sketches.values())
        for own in sketches.values():
            own.turn()


def _input(layers: Sequence[str], sketch: Sketch, rank: int | None, energy: float) -> Input:
    total = float(sketch.energy)
    if not math.isfinite(total):
        raise _not_finite(layers[0])
    energies, directions = sketch.leading()
    found = Input(tuple(layers), directions.shape[0], energies, directions.float(), total)
    found.cut(rank, energy)
    return found


def _warn_of_few(tokens: int, found: Sequence[Input]) -> None:
    """Warn if the directions fit the reference tokens for the sole reason that these are few."""
    most = max(len(item.energies) for item in found)
    if tokens < _TOKENS * most:
        logger.warning(
            "The references have %d tokens for the activation subspace, which has up to %d directions. With so few it "
            "holds these tokens and little else of what they stand for, and the adapter starts up to %g times as "
            "long. Give more reference examples, or set a smaller subspace_rank.",
            tokens,
            most,
            MOST_GAIN,
        )


def _measure(
    found: Sequence[Input], held: Sequence[_Part], watcher: _Watcher, forward: LossFn, model: nn.Module
) -> None:
    """Measure how much of the energy of the held-out examples lies in the directions."""
    if not held:
        return
    own = {item.layers[0]: item for item in found}
    devices = {name: watcher.inputs[name][1] for name in own}  # a process without such examples adds its zeros
    sums = {name: torch.zeros(2, dtype=small_dtype(device), device=device) for name, device in devices.items()}

    def take(name: str, vectors: Tensor, weight: float) -> None:
        with torch.autocast(vectors.device.type, enabled=False):
            inside = vectors.float() @ own[name].directions.to(vectors.device, torch.float32)
        squares = [part.square().sum(dtype=sums[name].dtype) for part in (inside, vectors.float())]
        sums[name] += torch.stack(squares) * weight

    for part in held:
        watcher.take(forward, model, part, take)
    for name, item in own.items():
        (total,) = distributed.summed([sums[name]])
        inside, everything = total.tolist()
        if not math.isfinite(everything):
            raise _not_finite(name)
        item.held_out = inside / everything if everything else None
