# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Find the leading directions of each layer's inputs on reference tokens, in one or two passes of the base.

Layers that get the same tensor (q, k and v; gate and up) share an input. Every reference set counts equally, whatever
its size, and every token of a set counts equally within the set. In some layers of language models the inputs of a few
tokens, such as the first, are hundreds of times as long as those of all others (massive activations: Sun, Chen,
Kolter, Liu 2024, arXiv 2402.17762). They would make up all of the energy there. So inputs longer than
`watcher.LONGEST` times the median length count with that length. The median is over the longest example of each set.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import distributed
from .examples import Batches, Part, Tokens, split
from .gradients import LossFn, refuse_inference_mode
from .linalg import small_dtype
from .sketch import Sketch
from .watcher import Watcher

logger = logging.getLogger(__name__)

MOST_GAIN = 10.0
"""The largest gain. If almost nothing is left of an input, a larger gain would amplify noise."""

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
        tokens: Number of reference tokens that the layers see, for a subspace that has just been built.
    """

    layers: tuple[str, ...]
    width: int
    energies: Tensor
    directions: Tensor
    energy: float
    held_out: float | None = None
    tokens: int | None = None

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
        ValueError: If a batch does not define which positions are tokens, if its labels are not one per token, if the
            model is an encoder-decoder and a batch has padding, if an input has other positions, if a layer was never
            called, or if a layer does not always get the input that it got first.
        RuntimeError: Under `torch.inference_mode()`.
        FloatingPointError: If an input is not finite.
    """
    refuse_inference_mode()
    used, held = split(batches, tokens)
    _refuse_padded_pairs(model, [*used, *held])
    if tokens == "all":
        _warn_of_other_masks(batches)
    watcher = Watcher(layers, one_sequence=not _has_decoder_of_its_own(model))
    with watcher.watching():
        watcher.discover(forward, model, _longest_of_each_set(used))
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
        _agree(found)
        _measure(found, held, watcher, forward, model)
    _warn_of_few(found)
    return found


def _longest_of_each_set(parts: Sequence[Part]) -> list[Part]:
    """The example of each set with the most tokens: a single token says little about the length of the others."""
    longest: dict[str, tuple[int, Part]] = {}
    for part in parts:
        counts = part.counts()
        most = max(counts)
        if most > longest.get(part.name, (0, part))[0]:
            longest[part.name] = most, part.of([counts.index(most)])
    return [example for _, example in longest.values()]


def _refuse_padded_pairs(model: nn.Module, parts: Sequence[Part]) -> None:
    """Reject padding for an encoder-decoder: the mask is the encoder's, and the decoder has other positions."""
    if _has_decoder_of_its_own(model) and not all(part.tokens is None or bool(part.tokens.all()) for part in parts):
        raise ValueError(
            "The model is an encoder-decoder, and a reference batch has positions that do not count. Its mask belongs "
            "to the encoder or to the decoder, and nothing says which positions of the other one are tokens. Give "
            "batches without padding, for example of one example each, with tokens='all'. Or use "
            "subspace='gradients'."
        )


def _warn_of_other_masks(batches: Batches) -> None:
    """Warn of a batch whose only mask has another name, if there is padding: all of its positions count."""
    for name, own in batches.items():
        for batch in own:
            key = _other_mask(batch)
            if key is not None:
                logger.warning(
                    "A batch of reference set %r has %r, but no 'attention_mask'. Only 'attention_mask' says which "
                    "positions are tokens, so the padding counts like tokens. Give the mask under this name, or give "
                    "batches without padding.",
                    name,
                    key,
                )
                return


def _other_mask(batch: object) -> str | None:
    """The key of a mask with padding, in a batch that has no `attention_mask`."""
    if not isinstance(batch, Mapping) or batch.get("attention_mask") is not None:
        return None
    masks = ((key, value) for key, value in batch.items() if str(key).endswith("attention_mask"))
    return next((key for key, value in masks if isinstance(value, Tensor) and not value.all()), None)


def _has_decoder_of_its_own(model: nn.Module) -> bool:
    config = getattr(getattr(model, "module", model), "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))


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
    sketches: Mapping[str, Sketch], used: Sequence[Part], watcher: Watcher, forward: LossFn, model: nn.Module
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
    tokens = int(sketch.vectors)
    found = Input(tuple(layers), directions.shape[0], energies, directions.float(), total, tokens=tokens)
    found.cut(rank, energy)
    return found


def _agree(found: Sequence[Input]) -> None:
    """Take the first process's directions. Other hardware finds others, and the copies of A would differ under DDP."""
    if distributed.count() == 1:
        return
    counts = torch.tensor([len(item.energies) for item in found], device=found[0].directions.device)
    for item, k in zip(found, distributed.of_first([counts])[0].tolist(), strict=True):
        own = [item.directions, item.energies]
        if distributed.rank():
            own = [item.directions.new_zeros(item.width, k), item.energies.new_zeros(k)]
        item.directions, item.energies = distributed.of_first(own)


def _warn_of_few(found: Sequence[Input]) -> None:
    """Warn of directions that fit the reference tokens for the sole reason that these are few, or that see none."""
    few = [item for item in found if item.tokens and item.tokens < _TOKENS * len(item.energies)]
    if few:
        least = min(few, key=lambda item: (item.tokens or 0) / len(item.energies))
        logger.warning(
            "The references have few tokens for the activation subspace: %d of %d inputs have fewer than %d for each "
            "direction. %s sees %d tokens and has %d directions. With so few it holds these tokens and little else of "
            "what they stand for, and the adapter starts up to %g times as long. Give more reference examples, or set "
            "a smaller subspace_rank.",
            len(few),
            len(found),
            _TOKENS,
            least.layers[0],
            least.tokens,
            len(least.energies),
            MOST_GAIN,
        )
    none = [item.layers[0] for item in found if not item.tokens]
    if none:
        logger.warning(
            "%d of %d inputs see no token of the references, so nothing constrains their layers. One of them is %s. "
            "Routed experts are such layers. Give more reference examples, or leave these layers out of "
            "target_modules.",
            len(none),
            len(found),
            none[0],
        )


def _measure(
    found: Sequence[Input], held: Sequence[Part], watcher: Watcher, forward: LossFn, model: nn.Module
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
