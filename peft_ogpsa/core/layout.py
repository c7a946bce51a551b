# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Which parameters are projected together, and their stacked form.

A *piece* is one flattened parameter tensor, as this process holds it. Under FSDP2 that is a shard, which may be empty.
Pieces of one size, dtype and device are stacked in one *group*, so that a model of any depth needs only a few kernels.
A *block* is a set of pieces that share their projection coefficients: one piece (scope `tensor`), the pieces of one
module (`module`), or all of them (`model`). The order of the blocks is the same in all processes, and for any number
of processes. Under scope `slice` a parameter is cut into equal pieces, and each is a block of its own. With as many
slices as the adapter's rank, these are the rows of A, one for each of its directions, and as many groups of B's rows.

A *stack* is a list with one tensor per group, `(pieces, numel)`, or `(pieces, rows, numel)` for rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import distributed

LARGEST_GROUP = 2**26
"""Maximum elements of a stack, unless one piece alone has more. Larger stacks save no time and cost working memory."""

Stack = list[Tensor]

_BLOCK_OF: dict[str, Callable[[str, str], str]] = {
    "slice": lambda name, owner: name,
    "tensor": lambda name, owner: name,
    "module": lambda name, owner: owner,
    "model": lambda name, owner: "",
}


@dataclass(frozen=True)
class Group:
    """Parameters of one size, dtype and device, stacked along the first axis.

    Attributes:
        names: Names of the parameters.
        slices: Number of pieces per parameter.
        numel: Number of elements of a piece.
        dtype: Dtype of the parameters.
        device: Device of the parameters.
    """

    names: tuple[str, ...]
    slices: int
    numel: int
    dtype: torch.dtype
    device: torch.device

    @property
    def pieces(self) -> int:
        """Number of pieces."""
        return len(self.names) * self.slices


class Blocks:
    """The layout of the projected parameters.

    Args:
        parameters (`Mapping[str, Tensor]`): The projected parameters by name.
        owners (`Mapping[str, str]`): For each parameter, the name of the module that it belongs to. Under scope
            `module`, pieces with the same owner form one block.
        scope (`str`): `"slice"`, `"tensor"`, `"module"` or `"model"`.
        slices (`int`): Number of pieces per parameter under scope `slice`, or the largest smaller number that divides
            its size.

    Raises:
        ValueError: If `parameters` is empty, if `scope` is unknown, or if shards are to be cut into slices.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], owners: Mapping[str, str], scope: str, slices: int = 16
    ) -> None:
        if not parameters:
            raise ValueError("There is no parameter to project. Give at least one.")
        if scope not in _BLOCK_OF:
            raise ValueError(f"scope={scope!r} is unknown. Choose one of {sorted(_BLOCK_OF)}.")
        self.sharded = distributed.are_sharded(parameters.values())
        if self.sharded and scope == "slice":
            raise ValueError(
                "scope='slice' is not allowed with sharded parameters, because a process does not hold a whole "
                "number of a parameter's slices. Use scope='tensor'."
            )
        # The same in all processes, and on any devices. The order of the pieces may differ.
        self.order = names = [name for alike in _alike(parameters, Tensor.numel) for name in alike]
        keys = {name: _BLOCK_OF[scope](name, owners[name]) for name in names}
        index = {key: i for i, key in enumerate(dict.fromkeys(keys.values()))}

        self.groups = []
        for alike in _alike(parameters, lambda p: (p.numel(), p.dtype, p.device)):
            # The shards of parameters of one size may have several sizes.
            for part in _alike({name: parameters[name] for name in alike}, lambda p: distributed.local(p).numel()):
                own = distributed.local(parameters[part[0]])
                count = _divisor(own.numel(), slices) if scope == "slice" else 1
                most = max(1, LARGEST_GROUP // max(1, own.numel()))
                for i in range(0, len(part), most):
                    stacked = tuple(part[i : i + most])
                    self.groups.append(Group(stacked, count, own.numel() // count, own.dtype, own.device))
        self.parameters = [[parameters[name] for name in group.names] for group in self.groups]
        # The shapes of what this process holds.
        self._shapes = [[distributed.local(parameter).shape for parameter in own] for own in self.parameters]
        self.scope = scope

        self.pieces = sum(group.pieces for group in self.groups)
        self._keys = [keys[name] for name in self.names()]  # of each parameter, what names its block
        cut = scope == "slice"
        members = list(range(self.pieces)) if cut else [index[keys[name]] for name in self.names()]
        self.count = self.pieces if cut else len(index)
        self._aligned = members == list(range(self.count))  # every piece is a block, in the same order
        # The small problems of all blocks are solved together, on the device of the first group.
        self.device = self.groups[0].device
        self._block_of_piece = torch.tensor(members, device=self.device)
        pieces_of: list[list[int]] = [[] for _ in range(self.count)]
        for piece, block in enumerate(members):
            pieces_of[block].append(piece)
        longest = max(map(len, pieces_of))
        # (blocks, longest): the pieces of each block, then the number of all pieces, where `reduce` puts zeros.
        padded = [own + [self.pieces] * (longest - len(own)) for own in pieces_of]
        self._pieces_of_block = torch.tensor(padded, device=self.device)
        self._sizes = [group.pieces for group in self.groups]

    def are_split_by(self, places: Sequence[int]) -> bool:
        """Whether a block has some of the parameters at these places, in the list of all, and others."""
        inside = set(places)
        others = {key for place, key in enumerate(self._keys) if place not in inside}
        return not others.isdisjoint(self._keys[place] for place in places)

    def names(self) -> list[str]:
        """The parameters' names, in the order of their pieces."""
        return [name for group in self.groups for name in group.names]

    def flat_parameters(self) -> list[Tensor]:
        """The parameters themselves, in the order of their pieces."""
        return [parameter for group in self.parameters for parameter in group]

    def by_name(self) -> dict[str, Tensor]:
        """The parameters themselves by name, in the order of their pieces."""
        return dict(zip(self.names(), self.flat_parameters(), strict=True))

    def are_as_grouped(self) -> bool:
        """Whether the parameters still have the dtype and the device of their group: `model.to(...)` changes them."""
        return all(
            local.dtype == group.dtype and local.device == group.device
            for group, parameters in zip(self.groups, self.local_parameters(), strict=True)
            for local in parameters
        )

    def local_parameters(self) -> list[list[Tensor]]:
        """What this process holds of the parameters, for each group, as views in the parameters' own shapes."""
        return [[distributed.local(parameter) for parameter in parameters] for parameters in self.parameters]

    def zeros(self, rows: int | None = None, dtype: torch.dtype | None = None, on_host: bool = False) -> Stack:
        """A stack of zeros: `(pieces, numel)`, or `(pieces, rows, numel)` if `rows` is given.

        The default dtype is float32, or float64 for float64 parameters. With `on_host` the stack is in host memory,
        pinned if the parameters are on a CUDA device. torch rounds each pinned tensor up to a power of two.
        """
        return self._make(torch.zeros, rows, dtype, on_host)

    def _make(
        self,
        make: Callable[..., Tensor],
        rows: int | None = None,
        dtype: torch.dtype | None = None,
        on_host: bool = False,
    ) -> Stack:
        middle = () if rows is None else (rows,)
        return [
            make(
                group.pieces,
                *middle,
                group.numel,
                dtype=dtype or torch.promote_types(torch.float32, group.dtype),
                device="cpu" if on_host else group.device,
                pin_memory=on_host and group.device.type == "cuda",
            )
            for group in self.groups
        ]

    def views(self, stack: Stack) -> list[Tensor]:
        """A stack's part of each parameter in the parameter's shape, as views; a rows axis stays in front.

        A parameter that is cut into slices has the shape `(slices, numel)` instead.
        """
        views = []
        for stacked, group, shapes in zip(stack, self.groups, self._shapes, strict=True):
            if group.slices == 1:
                rows = stacked.shape[1:-1]
                views += [own.view(*rows, *shape) for own, shape in zip(stacked, shapes, strict=True)]
            else:
                views += [own.movedim(0, -2) for own in stacked.unflatten(0, (-1, group.slices))]
        return views

    def shaped(self, stack: Stack) -> list[list[Tensor]]:
        """The parts of a stack without rows, for each group, as views in the shapes of `local_parameters`."""
        return [
            [own.view(shape) for own, shape in zip(part.unflatten(0, (len(shapes), -1)), shapes, strict=True)]
            for part, shapes in zip(stack, self._shapes, strict=True)
        ]

    def stack(self, tensors: Sequence[Tensor | None] | None = None) -> Stack:
        """Copy `tensors` (by default the parameters) into a stack, in float32 or wider.

        Args:
            tensors (`Sequence[Tensor | None]`): One per parameter, in the order of their pieces; `None` counts as
                zeros.
        """
        source = self.flat_parameters() if tensors is None else tensors
        whole = tensors is None or all(tensor is not None for tensor in tensors)
        stack = self._make(torch.empty) if whole else self.zeros()
        slices = [group.slices for group in self.groups for _ in group.names]
        parts = zip(self.views(stack), source, slices, strict=True)
        pairs = [(view, _fitted(tensor, count)) for view, tensor, count in parts if tensor is not None]
        if pairs:
            torch._foreach_copy_([view for view, _ in pairs], [own for _, own in pairs])
        return stack

    def square_length(self, stack: Stack) -> Tensor:
        """The squared length of a stack, over all blocks together, of this process's part."""
        return torch.stack([part.flatten().dot(part.flatten()).to(self.device) for part in stack]).sum()

    def reduce(self, pieces: Sequence[Tensor]) -> Tensor:
        """Sum per-piece values into per-block values: a `(pieces, ...)` tensor per group -> `(blocks, ...)`.

        The sums cover what this process holds. If parameters are sharded, `total` completes them.
        """
        values = [value.to(self.device) for value in pieces]
        if self._aligned:
            return torch.cat(values)
        # On CUDA, index_add_ adds in any order, so the last bits of two processes could differ.
        table = self._pieces_of_block
        padded = torch.cat([*values, values[0].new_zeros(1, *values[0].shape[1:])])
        return padded.index_select(0, table.flatten()).unflatten(0, table.shape).sum(1)

    def spread(self, blocks: Tensor) -> list[Tensor]:
        """Give every piece its block's values: `(blocks, ...)` -> a `(pieces, ...)` tensor per group."""
        values = blocks if self._aligned else blocks.index_select(0, self._block_of_piece)
        return [part.to(group.device) for part, group in zip(values.split(self._sizes), self.groups, strict=True)]

    def total(self, *values: Tensor) -> list[Tensor]:
        """Sum over the shards of all processes, in one collective. Without shards, return the values themselves."""
        return distributed.summed(values) if self.sharded else list(values)

    def gathered(self, prefix: str, stack: Stack) -> dict[str, Tensor]:
        """The pieces of a stack as full tensors, `PREFIX.PARAMETER`; views if parameters are neither sharded nor cut.

        If they are sharded, all processes must call it. The first process gets the tensors, in host memory.
        """
        views = zip(self.names(), self.views(stack), self.flat_parameters(), strict=True)
        if not self.sharded:
            return {
                f"{prefix}.{name}": view.reshape(*view.shape[: stack[0].dim() - 2], *parameter.shape)
                for name, view, parameter in views
            }
        found = {name: (view, parameter) for name, view, parameter in views}
        tensors = {}
        for name in self.order:
            full = distributed.whole(*found[name])
            if distributed.rank() == 0:
                tensors[f"{prefix}.{name}"] = full.cpu()
        return tensors

    def check(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Check that `scatter` can take these tensors.

        Raises:
            ValueError: If one is missing, or has another shape or values that are not finite.
        """
        for name, parameter in self.by_name().items():
            own = tensors.get(f"{prefix}.{name}")
            if own is None or own.shape != parameter.shape or not own.isfinite().all():
                raise ValueError(f"The saved state is damaged: {prefix}.{name} is missing or does not fit.")

    def scatter(self, prefix: str, tensors: Mapping[str, Tensor], stack: Stack) -> None:
        """Put this process's parts of the result of `gathered` into a stack."""
        for name, view, parameter in zip(self.names(), self.views(stack), self.flat_parameters(), strict=True):
            view.copy_(distributed.own_part(tensors[f"{prefix}.{name}"], parameter).reshape(view.shape))


def _fitted(tensor: Tensor, slices: int) -> Tensor:
    """What this process holds of a parameter, or of a tensor like it, in the shape of `Blocks.views`."""
    own = distributed.local(tensor)
    return own if slices == 1 else own.reshape(slices, -1)


def refuse_shared_memory(parameters: Mapping[str, Tensor], remedy: str) -> None:
    """Reject two parameters in the same memory: each would be corrected for the step of both.

    Raises:
        ValueError: If there are two such parameters. The message ends with the remedy.
    """
    spans = []
    for name, parameter in parameters.items():
        own = distributed.local(parameter)
        if own.numel() and not own.is_meta:
            last = sum((size - 1) * stride for size, stride in zip(own.shape, own.stride(), strict=True))
            spans.append((own.device, own.data_ptr(), own.data_ptr() + last * own.element_size(), name))
    spans.sort(key=lambda span: (str(span[0]), *span[1:]))
    for (device, _, end, name), (other_device, start, _, other) in itertools.pairwise(spans):
        if device == other_device and start <= end:
            raise ValueError(
                f"The parameters {name!r} and {other!r} share memory, so a projected step of one would change the "
                f"other. {remedy}"
            )


def _divisor(numel: int, most: int) -> int:
    return next(count for count in range(most, 0, -1) if numel % count == 0)


def _alike(parameters: Mapping[str, Tensor], kind: Callable[[Tensor], Hashable]) -> list[list[str]]:
    """The names of parameters of one kind, ordered by the first name of each kind."""
    members: dict[Hashable, list[str]] = {}
    for name, parameter in parameters.items():
        members.setdefault(kind(parameter), []).append(name)
    return list(members.values())
