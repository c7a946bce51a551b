# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Several processes that train one model: data parallel, with whole copies (DDP) or shards (FSDP2) of the parameters.

A *share* is the part of the reference examples that a process passes itself, every `count()`-th of them. A parameter
is *local* as its process holds it: all of it under DDP, its shard under FSDP2 (a `DTensor`'s local tensor).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard


def count() -> int:
    """How many processes train; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def share(examples: int) -> list[int]:
    """Which of so many examples this process passes."""
    return list(range(rank(), examples, count()))


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, detached; a view."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def are_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether the parameters are shards.

    Raises:
        ValueError: If only some of them are, or in another way than FSDP2's over all processes.
    """
    parameters = list(parameters)
    shards = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    if not shards:
        return False
    if len(shards) < len(parameters):
        raise ValueError(
            f"{len(shards)} of the {len(parameters)} projected parameters are shards and the others are not. Apply "
            "fully_shard to the whole model."
        )
    for shard in shards:
        if shard.device_mesh.ndim != 1 or not isinstance(shard.placements[0], Shard) or _size(shard) != count():
            raise ValueError(
                f"A projected parameter is placed as {shard.placements} on a mesh of shape "
                f"{tuple(shard.device_mesh.shape)} of {count()} processes. OGPSA knows FSDP2's shards over all "
                "processes alone: no tensor parallelism and no hybrid sharding."
            )
    return True


def _size(tensor: DTensor) -> int:
    return tensor.device_mesh.size()


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's sum over all processes, in one collective; in the widest of their dtypes on the way.

    Every process must call it, with tensors of the same shapes, and gets the same values to the bit.
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


def check_agreement(numbers: Sequence[int], device: torch.device, what: str) -> None:
    """Compares numbers across processes before they wait for one another in vain.

    Args:
        numbers: Any, of any length.
        device: Where collectives run.
        what: Starts the error's message.

    Raises:
        ValueError: If a process has others.
    """
    if count() == 1:
        return
    # A hash of 30 bits that needs no randomised `hash`.
    digest = 0
    for number in (len(numbers), *numbers):
        digest = (digest * 1_000_003 + number) % (2**30 - 35)
    ends = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    if int(ends[0]) != -int(ends[1]):
        raise ValueError(f"{what} differ between the processes. Give every process the same.")


def whole(piece: Tensor, parameter: Tensor) -> Tensor:
    """Gathers what all processes hold, `(..., *local shape)`, into `(..., *parameter shape)`.

    Args:
        piece: What is held here for a parameter, with any leading axes.
        parameter: That parameter, whose shards it follows.
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
    """Cuts what `whole` gives to what this process holds; without communication."""
    if not isinstance(parameter, DTensor):
        return full
    axis = _axis(parameter) + full.dim() - parameter.dim()
    # On a CPU, so that only the shard is sent to the device.
    chunks = full.chunk(_size(parameter), axis)
    own = parameter.device_mesh.get_local_rank()
    return chunks[own] if own < len(chunks) else full.narrow(axis, 0, 0)


def _axis(parameter: DTensor) -> int:
    (placement,) = parameter.placements
    assert isinstance(placement, Shard)
    return placement.dim


def reshard(model: nn.Module) -> None:
    """Puts FSDP2's modules back to their shards, which some keep gathered after a forward pass without backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
