# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The activation subspace: keep a layer's output on reference inputs unchanged while its matrices train.

A LoRA layer adds `s B A x` to its output. The gradient of any loss with respect to A is a sum over tokens of
`s (B^T u) x^T`, where u is the gradient at the layer's output. The rows of this gradient lie in the span of the
layer's inputs x. The inputs of reference tokens therefore span the reference gradients of A, for every loss and at
every point of the training. U holds the leading directions of these inputs. A starts in their complement, and every
change of A is projected onto this complement. `A U = 0` then holds throughout the training, for any optimizer and any
B. The layer's output on every input in span(U) stays the same, to all orders. For full weights W, `W U` stays the same
instead. This is Gradient Projection Memory (Saha, Garg, Roy 2021, arXiv 2103.09762), applied to LoRA.

The part of an input outside span(U) is short: with 90 % of the energy in U, it has a third of the input's length. An
adapter that sees only this part learns slowly with any optimizer. A therefore starts longer, and its steps are
multiplied by the gain `1 / sqrt(1 - energy)`. The gradient of A is also projected before the optimizer. With Adam and
similar optimizers, which scale their step to the remaining part, this is as if the projected input had its original
length again. The usual learning rates then work.

The projection acts only on the input axis. FSDP2 shards the first axis and keeps the input axis whole, so a step needs
no communication.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import distributed
from .copy_check import CopyCheck
from .inputs import Input
from .kinds import Kind, kind_of
from .layout import LARGEST_GROUP
from .linalg import small_dtype
from .precision import LOW_PRECISION
from .stacks import InputMatrix, InputStack, inverse_of

MOST_DIRECTIONS = 512
"""Maximum directions of an input if the energy determines their number; also limited to half of its width."""

PREFIX = "directions."
"""Prefix of the tensors' names in a state dict."""

LEAK = 5e-3
"""An adapter whose share in the subspace is smaller than this counts as in the complement from the start.

A subspace that is rebuilt from the same references differs by rounding: 1e-3 for SmolLM2 with other batches.
"""

_BY_CHANCE = 0.1
"""A matrix A that has learned nothing counts as in the complement only if its share in the subspace is smaller than
this part of a random matrix's share. If the subspace has few directions of a wide input, chance alone is below `LEAK`.
"""

_HOLLOW = 1e-3
"""If the share of a matrix outside the subspace is smaller than this, it consists only of rounding errors."""

_MOST_LEAK = 0.25
"""An adapter whose share in the subspace is larger than this counts as trained without the subspace."""

_SAME_LENGTH = 0.01
"""A matrix A whose length has changed by a larger share since it entered a complement counts as a new one."""

_STRETCHED: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]] = WeakKeyDictionary()
"""By holder of each matrix A that has entered a complement: how many times as long it was made, and its length then.

The holder and not the matrix, because torch cannot swap tensors that have weak references, as `model.to` does under
FSDP2.

A subspace may be built again before the adapter learns anything, for example when the trainer retries with a smaller
batch. A must then not be stretched a second time.
"""


def most_directions(width: int) -> int:
    """Maximum directions of an input of this width if the energy determines their number."""
    return min(MOST_DIRECTIONS, width // 2)


class ActivationSubspace:
    """Leading directions of the inputs of the projected layers, and the projection away from them.

    Args:
        matrices (`Sequence[InputMatrix]`): The matrices to project.
        inputs (`Sequence[Input]`): The result of `inputs.find` for the same layers.
        dtype (`torch.dtype`): The dtype in which the directions are stored: float32 or bfloat16.

    Raises:
        ValueError: If the layers differ from those of the inputs, if a matrix has lower precision than float32 or is
            sharded along its inputs, or if the directions leave nothing of a full weight to train.
    """

    def __init__(self, matrices: Sequence[InputMatrix], inputs: Sequence[Input], dtype: torch.dtype) -> None:
        self.matrices = list(matrices)
        self.inputs = list(inputs)
        self.dtype = dtype
        self.references = ""  # digest of the reference sets, if it is known
        self._adapter = any(matrix.after is not None for matrix in matrices)
        self._stacks = self._stacked()
        self.device = self._stacks[0].basis.device
        self._before: list[Tensor] | None = None
        self._before_inner: list[Tensor] | None = None
        self._gained = False  # whether a step within the current step has had its gain
        self._copy_check = CopyCheck()  # of the first stack: an optimizer treats all alike
        # For each stack: squared lengths of the parts removed from steps, and of the steps.
        self._squares = [torch.zeros(2, dtype=torch.float32, device=stack.basis.device) for stack in self._stacks]

    def _stacked(self) -> list[InputStack]:
        own: dict[str, InputMatrix] = {matrix.layer: matrix for matrix in self.matrices}
        known = [layer for item in self.inputs for layer in item.layers]
        if sorted(known) != sorted(own) or len(own) != len(self.matrices):
            other = sorted(set(known) ^ set(own)) or sorted(own)
            raise ValueError(
                "The layers of the activation subspace are not the layers in training. One of the layers that differ "
                f"is {other[0]}. Use the same `target_modules` and base model, or rebuild the subspace from the "
                "references."
            )
        kinds: dict[tuple, list[int]] = {}
        for i, item in enumerate(self.inputs):
            for layer in item.layers:
                self._refuse_low_precision(own[layer])
                if not distributed.has_whole_rows(own[layer].parameter):
                    raise ValueError(
                        f"{own[layer].name} is sharded along the inputs of its layer, which an activation subspace "
                        "projects as a whole. Leave out shard_placement_fn in fully_shard, or use "
                        "subspace='gradients'."
                    )
            if not self._adapter and item.directions.shape[1] >= item.width:
                raise ValueError(
                    f"The activation subspace takes all {item.width} dimensions of the input of {item.layers[0]}, so "
                    "nothing of its weight could be trained. Set a smaller subspace_rank."
                )
            parameters = [distributed.local(own[layer].parameter) for layer in item.layers]
            # Compare whole sizes, too. Two shards may have the same size in one process and not in another, but all
            # processes must build the same stacks.
            whole = tuple(own[layer].parameter.shape[0] for layer in item.layers)
            rows = tuple(len(parameter) for parameter in parameters)
            key = (kind_of(item.layers), item.width, whole, rows, parameters[0].dtype, parameters[0].device)
            kinds.setdefault(key, []).append(i)
        stacks = []
        for (kind, width, _, _, _, device), places in kinds.items():
            most = max(1, max(self.inputs[i].directions.shape[1] for i in places))
            size = max(1, LARGEST_GROUP // (width * most))
            for start in range(0, len(places), size):
                part = places[start : start + size]
                k = max(1, max(self.inputs[i].directions.shape[1] for i in part))
                basis = torch.zeros(len(part), width, k, dtype=self.dtype, device=device)
                for held, i in zip(basis, part, strict=True):
                    found = self.inputs[i].directions
                    held[:, : found.shape[1]] = found.to(device, self.dtype)
                    self.inputs[i].directions = found.new_zeros(len(found), 0)  # free what the stack holds from now on
                matrices = [[own[layer] for layer in self.inputs[i].layers] for i in part]
                gains = [self.inputs[i].gain if self._adapter else 1.0 for i in part]
                gain = torch.tensor(gains, dtype=torch.float32, device=device).view(-1, 1, 1)
                stacks.append(InputStack(kind, part, matrices, basis, inverse_of(basis), gain))
        return stacks

    def _refuse_low_precision(self, matrix: InputMatrix) -> None:
        dtype = matrix.parameter.dtype
        if dtype not in LOW_PRECISION:
            return
        remedy = (
            "OGPSACallback does so when training begins, so something has changed it since then, such as "
            "use_transformers_continuous_batching of TRL's GRPOConfig. In your own loop, call "
            "model.projector.upcast() before you create the optimizer."
            if self._adapter
            else "Load the model with dtype=torch.float32."
        )
        raise ValueError(
            f"{matrix.name} has the dtype {str(dtype).removeprefix('torch.')}, in which rounding loses a projected "
            f"step. Hold it in float32. {remedy} Layers still compute in 16 bits under autocast (bf16=True)."
        )

    # The start of training

    @torch.no_grad()
    def enter(self) -> float:
        """Move the adapter into the complement of the subspace. Full weights stay as they are.

        While B is zero, as at the usual start of LoRA, A keeps its length, times the gain. It does not matter how
        often it enters: the length is that before the first time. If B is not zero, removing a part of A changes the
        model's output on reference inputs: what the adapter did to them is lost. With several processes, all of them
        must call this method.

        Returns:
            The share of the adapter's effect that lay in the subspace. See `leak`.

        Raises:
            ValueError: If this share is too large, because the adapter did not start in the complement, or if nothing
                of a matrix A is left outside of the subspace. Nothing is changed.
        """
        most = self.leak()
        entered, hollow = [], []
        for stack, place, matrix in self._each():
            if matrix.after is None:
                continue
            a, b = _whole(matrix.parameter), _whole(matrix.after).to(stack.basis.device)
            outside = a - stack.spread(stack.along(a[None], place), place)[0]
            whole, kept = torch.linalg.vector_norm(a), torch.linalg.vector_norm(outside)
            hollow.append((kept <= _HOLLOW * whole).to(self.device))
            gain = stack.gain[place, 0, 0]
            item = self.inputs[stack.inputs[place]]
            inside = torch.linalg.vector_norm(a - outside)
            left = inside <= min(LEAK, _BY_CHANCE * math.sqrt(len(item.energies) / item.width)) * whole
            before = _length_before(matrix.holder, whole, left, gain)
            stretch = torch.where((_effect(b, a) > 0) | (kept == 0), 1.0, gain * before / kept)
            entered.append((matrix, outside * stretch, before))
        for (matrix, _, _), nothing in zip(entered, torch.stack(hollow).tolist() if hollow else [], strict=True):
            if nothing:
                raise ValueError(
                    f"No part of {matrix.name} is left outside the activation subspace, so the layer could not "
                    "learn. Set a smaller subspace_rank."
                )
        if most > _MOST_LEAK:
            raise ValueError(
                f"The adapter was not trained in the null space of this activation subspace: up to {most:.0%} of its "
                "effect in a layer acts on the reference inputs. Use the reference sets that it was trained with. Or "
                "merge it into the base (merge_adapter) and add a new adapter. Or set subspace='gradients'."
            )
        for matrix, full, before in entered:
            distributed.local(matrix.parameter).copy_(distributed.own_part(full, matrix.parameter))
            length = torch.linalg.vector_norm(full)
            _STRETCHED[matrix.holder] = length / before, length
        return most

    @torch.no_grad()
    def leak(self) -> float:
        """Return the share of the adapter's effect that lies in the subspace, from 0 to 1.

        It is the length of `B A U` relative to that of `B A`, the maximum over the layers; 0 for full weights. Waits
        for the device. With several processes, all of them must call this method.
        """
        shares = [torch.zeros((), dtype=small_dtype(self.device), device=self.device)]
        for stack, place, matrix in self._each():
            if matrix.after is not None:
                a, b = _whole(matrix.parameter), _whole(matrix.after).to(stack.basis.device)
                shares.append(_share(b, stack.along(a[None], place)[0], a).to(self.device))
        return float(torch.stack(shares).max())

    def in_place(self) -> bool:
        """Whether the directions are still where the matrices are, and the model was not moved to another device."""
        first = (distributed.local(stack.matrices[0][0].parameter) for stack in self._stacks)
        return all(stack.basis.device == own.device for stack, own in zip(self._stacks, first, strict=True))

    def active(self) -> set[tuple[str, ...]]:
        """The active adapters of the projected layers. All layers usually have the same ones."""
        return {tuple(getattr(matrix.module, "active_adapters", ())) for matrix in self.matrices}

    def in_use(self) -> bool:
        """Whether the adapter has an effect yet, that is, whether some B is not zero. True for full weights."""
        afters = [matrix.after for matrix in self.matrices if matrix.after is not None]
        if not self._adapter:
            return True
        found = torch.stack([distributed.local(after).any().to(self.device) for after in afters]).any().float()
        (total,) = distributed.summed([found]) if distributed.are_sharded(afters) else (found,)
        return bool(total)

    # An optimizer step

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the matrices before a step.

        Raises:
            ValueError: If a matrix has lower precision than float32 by now, for example after `model.half()`.
        """
        for matrix in self.matrices:
            self._refuse_low_precision(matrix)
        self._before = [stack.copies(stack.parameters()) for stack in self._stacks]
        self._before_inner, self._gained = None, False

    @torch.no_grad()
    def remember_inner(self) -> None:
        """Copy the matrices before a step within the step, such as the one that Lookahead wraps."""
        self._before_inner = [stack.copies(stack.parameters()) for stack in self._stacks]

    @torch.no_grad()
    def project_inner_step(self) -> None:
        """Project the change since `remember_inner`, and apply the gain to it.

        The gain belongs to the step along the gradient. What a wrapper does with the weights around it, such as
        Lookahead's way back to the slow weights, must not be enlarged: it would not come to rest.
        """
        if self._before_inner is None:
            return
        for i, (stack, before) in enumerate(zip(self._stacks, self._before_inner, strict=True)):
            step = stack.copies(stack.parameters()) - before
            step -= self._counted(i, step)
            stack.write(before + stack.gain * step)
        self._before_inner, self._gained = None, True

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Project the matrices' gradients, so that the optimizer scales its step to the remaining part."""
        for stack in self._stacks:
            gradients = [p.grad for p in stack.parameters()]
            if all(gradient is None for gradient in gradients):
                continue
            whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in stack.parameters()]
            stacked = stack.copies(whole)
            stacked -= stack.inside(stacked)
            pairs = zip(gradients, stack.views(stacked), strict=True)
            found = [(distributed.local(gradient), view) for gradient, view in pairs if gradient is not None]
            torch._foreach_copy_([own for own, _ in found], [view for _, view in found])

    @torch.no_grad()
    def project_step(self) -> None:
        """Project the change of the matrices since `remember`."""
        assert self._before is not None
        for i, (stack, before) in enumerate(zip(self._stacks, self._before, strict=True)):
            checked = i == 0 and self._adapter and not self._gained
            now = stack.copies(stack.parameters())
            step = now - before
            if checked:
                self._copy_check.before(step)
            if self._gained:
                step -= stack.inside(step)
            else:
                step -= self._counted(i, step)
                step *= stack.gain
            if checked:
                self._copy_check.after(step)
            self._store(stack, torch.add(before, step, out=now))
        self._before = None

    def _counted(self, i: int, step: Tensor) -> Tensor:
        """Return the part of a stack's step that is removed, and count it for `removed`.

        If a step contains inner steps, only these count. They are projected already, so the outer step would add
        almost nothing to what is removed, but its whole length to the total.
        """
        inside = self._stacks[i].inside(step)
        self._squares[i] += torch.stack([inside.square().sum(), step.square().sum()])
        return inside

    @torch.no_grad()
    def return_to_complement(self) -> None:
        """Remove from every A what rounding has brought into the subspace. Full weights stay as they are."""
        for stack in self._stacks if self._adapter else ():
            self._store(stack, stack.copies(stack.parameters()))

    def _store(self, stack: InputStack, now: Tensor) -> None:
        if self._adapter:
            # A was in the complement before. Project A itself, so that rounding errors do not add up.
            now -= stack.inside(now)
        stack.write(now)

    @torch.no_grad()
    def project_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Project stored gradients of the matrices, so that their corrections stay in the complement.

        Args:
            rows: The gradients by parameter name, `(rows, *local shape)` or any view of it; changed in place.
        """
        for stack, place, matrix in self._each():
            view = rows[matrix.name]
            shape = distributed.local(matrix.parameter).shape
            own = view.reshape(-1, shape[-1]).float()
            own = own - stack.spread(stack.along(own[None], place), place)[0]
            view.copy_(own.view(view.shape))

    def removed(self) -> dict[str, float]:
        """Share of the matrices' steps that was removed since the last call, by kind of layer, from 0 to 1.

        It counts only this process's part. Waits for the device.
        """
        sums: dict[str, list[float]] = {}
        for stack, squares in zip(self._stacks, self._squares, strict=True):
            inside, total = squares.tolist()
            own = sums.setdefault(stack.kind, [0.0, 0.0])
            own[0] += inside
            own[1] += total
            squares.zero_()
        return {kind: min(1.0, math.sqrt(inside / total)) for kind, (inside, total) in sums.items() if total}

    # Figures and state

    def kinds(self) -> list[Kind]:
        """Figures by kind of layer, in the order of the model."""
        found: dict[str, list[Input]] = {}
        for stack in self._stacks:
            found.setdefault(stack.kind, []).extend(self.inputs[i] for i in stack.inputs)
        return [Kind.of(name, own) for name, own in found.items()]

    def bytes(self) -> int:
        """Memory of the directions in each process, in bytes."""
        return sum(
            stack.basis.nbytes + (0 if stack.inverse is None else stack.inverse.nbytes) for stack in self._stacks
        )

    def step_bytes(self) -> int:
        """Additional memory that a step needs, in bytes: the snapshot, and three copies of one stack.

        It includes two more copies of the first stack, which `CopyCheck` needs in an adapter's first steps. Directions
        in bfloat16 are converted to float32, one stack at a time.
        """
        sizes = [4 * sum(distributed.local(p).numel() for p in stack.parameters()) for stack in self._stacks]
        converted = [0 if stack.basis.dtype == torch.float32 else 4 * stack.basis.numel() for stack in self._stacks]
        checked = 2 * sizes[0] if self._adapter else 0
        return sum(sizes) + checked + max(3 * size + more for size, more in zip(sizes, converted, strict=True))

    def state_dict(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """The directions by name, and a JSON-ready list with one entry per input."""
        tensors, rest = {}, []
        for stack in self._stacks:
            for place, i in enumerate(stack.inputs):
                item = self.inputs[i]
                tensors[f"{PREFIX}{i}"] = stack.basis[place, :, : len(item.energies)]
                rest.append(
                    {
                        "place": i,
                        "layers": list(item.layers),
                        "energies": item.energies.tolist(),
                        "energy": item.energy,
                        "held_out": item.held_out,
                    }
                )
        return tensors, sorted(rest, key=lambda entry: entry["place"])

    @classmethod
    def restored(
        cls,
        matrices: Sequence[InputMatrix],
        tensors: Mapping[str, Tensor],
        rest: Sequence[Mapping[str, Any]],
        dtype: torch.dtype,
    ) -> ActivationSubspace:
        """Rebuild the subspace from the output of `state_dict`.

        Raises:
            ValueError: If the state does not fit the matrices.
        """
        found = []
        widths = {matrix.layer: matrix.parameter.shape[1] for matrix in matrices}
        for entry in rest:
            name = f"{PREFIX}{entry['place']}"
            if name not in tensors:
                raise ValueError(f"{name} is missing. Rebuild the subspace from the references.")
            directions = tensors[name]
            _check_directions(name, directions, len(entry["energies"]), widths.get(entry["layers"][0]))
            energies = torch.tensor(entry["energies"], dtype=torch.float64)
            found.append(
                Input(
                    tuple(entry["layers"]), len(directions), energies, directions, entry["energy"], entry["held_out"]
                )
            )
        return cls(matrices, found, dtype)

    def _each(self) -> Iterator[tuple[InputStack, int, InputMatrix]]:
        for stack in self._stacks:
            for place, own in enumerate(stack.matrices):
                for matrix in own:
                    yield stack, place, matrix


def _whole(parameter: Tensor) -> Tensor:
    """The full parameter in float32 or wider, gathered from all processes if it is sharded."""
    full = distributed.whole(distributed.local(parameter), parameter)
    return full.to(torch.promote_types(torch.float32, full.dtype))


def _length_before(holder: nn.Module, length: Tensor, left: Tensor, gain: Tensor) -> Tensor:
    """The length that a matrix A had before it first entered a complement.

    Args:
        holder: The module that has the matrix.
        length: The matrix's length.
        left: Whether the matrix is outside the subspace already.
        gain: The gain of its layer.
    """
    # A saved adapter that has learned nothing: nobody has seen it enter, but it is outside the subspace.
    before = torch.where(left, length / gain, length)
    if holder not in _STRETCHED:
        return before
    stretch, then = (value.to(length.device) for value in _STRETCHED[holder])
    return torch.where((length - then).abs() <= _SAME_LENGTH * then, length / stretch, before)


def _check_directions(name: str, directions: Tensor, count: int, width: int | None) -> None:
    if directions.dim() != 2 or directions.shape[1] != count or width not in (None, directions.shape[0]):
        raise ValueError(
            f"{name} has the shape {tuple(directions.shape)}, but the shape ({width}, {count}) is needed. Use the "
            "saved settings, or rebuild the subspace from the references."
        )
    if not directions.isfinite().all():
        raise ValueError(f"{name} has values that are not finite. Rebuild the subspace from the references.")
    exact = directions.double()
    error = (exact.T @ exact - torch.eye(count, dtype=exact.dtype, device=exact.device)).abs().max() if count else 0.0
    if error > (1e-5 if directions.dtype == torch.float32 else 0.05):
        raise ValueError(
            f"{name} is damaged: its columns are not orthonormal. Rebuild the subspace from the references."
        )


def _share(after: Tensor, along: Tensor, matrix: Tensor) -> Tensor:
    """The length of `B A U` relative to that of `B A`, in `small_dtype`; 0 if `B A` is zero.

    It is computed from small Gram matrices.
    """
    total = _effect(after, matrix)
    return torch.where(total > 0, _square(after, along) / total, 0.0).clamp(min=0).sqrt()


def _effect(after: Tensor, matrix: Tensor) -> Tensor:
    """What `_square` gives, or 0 if that is rounding: with an orthogonal start, B is not zero, and `B A` is."""
    total = _square(after, matrix)
    possible = after.square().sum() * matrix.square().sum()
    return torch.where(total > 1e-12 * possible.to(total.dtype), total, 0.0)


def _square(after: Tensor, matrix: Tensor) -> Tensor:
    """The squared length of `B A`, in `small_dtype`."""
    after, matrix = (own.to(small_dtype(matrix.device)) for own in (after, matrix))
    return ((after.T @ after) * (matrix @ matrix.T)).sum()
