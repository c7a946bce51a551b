# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Several processes that train one model: data parallel, with full copies (DDP) or shards (FSDP2) of the parameters.

A *share* is the part of the reference examples that one process passes through the model: every `count()`-th example.
The *local* part of a parameter is what its process holds: all of it under DDP, its shard under FSDP2 (a `DTensor`'s
local tensor).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard


def count() -> int:
    """Number of training processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, starting at 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def share(examples: int) -> list[int]:
    """Indices of the examples that this process passes, out of `examples` in total."""
    return list(range(rank(), examples, count()))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, detached; a view."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def are_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether the parameters are shards.

    Raises:
        ValueError: If only some of them are shards, or if they are sharded in another way than FSDP2's over all
            processes.
    """
    parameters = list(parameters)
    shards = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    if not shards:
        return False
    if len(shards) < len(parameters):
        raise ValueError(
            f"Only {len(shards)} of the {len(parameters)} projected parameters are FSDP2 shards. Apply fully_shard "
            "to the whole model."
        )
    for shard in shards:
        if shard.device_mesh.ndim != 1 or not isinstance(shard.placements[0], Shard) or _size(shard) != count():
            raise ValueError(
                f"A projected parameter has the placements {shard.placements} on a mesh of shape "
                f"{tuple(shard.device_mesh.shape)}, in {count()} processes. OGPSA only supports FSDP2 shards over "
                "all processes. It does not support tensor parallelism or hybrid sharding. Apply fully_shard over "
                "all processes."
            )
    return True


def has_whole_rows(matrix: Tensor) -> bool:
    """Whether each process holds whole rows of a matrix, as FSDP2 shards it unless told otherwise."""
    return not isinstance(matrix, DTensor) or all(own.is_shard(0) for own in matrix.placements)


def _size(tensor: DTensor) -> int:
    return tensor.device_mesh.size()


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum each tensor over all processes in one collective, which uses the widest of their dtypes.

    Every process must call it with tensors of the same shapes. All processes get the same values to the bit.
    """
    if count() == 1:
        return list(tensors)
    dtype, device = tensors[0].dtype, tensors[0].device
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    flat = torch.cat([tensor.to(device, dtype).reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(t.shape).to(t.device, t.dtype) for part, t in zip(parts, tensors, strict=True)]


def of_first(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the first process's values, to the bit, in one collective as in `summed`."""
    return summed([tensor if rank() == 0 else torch.zeros_like(tensor) for tensor in tensors])


def agree(numbers: Sequence[int], device: torch.device) -> bool:
    """Whether all processes have the same numbers. All of them must call this.

    Args:
        numbers: The numbers to compare; any number of them.
        device: Device on which collectives run.
    """
    # A hash of 30 bits that does not need Python's randomized `hash`.
    digest = 0
    for number in (len(numbers), *numbers):
        digest = (digest * 1_000_003 + number) % (2**30 - 35)
    ends = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return int(ends[0]) == -int(ends[1])


def whole(piece: Tensor, parameter: Tensor) -> Tensor:
    """Gather the parts of all processes, `(..., *local shape)`, into `(..., *parameter shape)`.

    Args:
        piece: What this process holds for a parameter, with any leading axes.
        parameter: That parameter. The piece is sharded in the same way.
    """
    if not isinstance(parameter, DTensor):
        return piece
    leading = piece.shape[: piece.dim() - parameter.dim()]
    shape = torch.Size((*leading, *parameter.shape))
    stride = torch.empty(shape, device="meta").stride()
    own = piece.to(parameter.to_local().device).contiguous()
    placements = [Shard(_axis(parameter) + len(leading))]
    return DTensor.from_local(
        own, parameter.device_mesh, placements, run_check=False, shape=shape, stride=stride
    ).full_tensor()


def own_part(full: Tensor, parameter: Tensor) -> Tensor:
    """Cut the result of `whole` to the part that this process holds, without communication."""
    if not isinstance(parameter, DTensor):
        return full
    axis = _axis(parameter) + full.dim() - parameter.dim()
    chunks = full.chunk(_size(parameter), axis)
    own = parameter.device_mesh.get_local_rank()
    return chunks[own] if own < len(chunks) else full.narrow(axis, 0, 0)


def _axis(parameter: DTensor) -> int:
    (placement,) = parameter.placements
    assert isinstance(placement, Shard)
    return placement.dim


def reshard(model: nn.Module) -> None:
    """Return FSDP2's modules to their shards. Some stay gathered after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
