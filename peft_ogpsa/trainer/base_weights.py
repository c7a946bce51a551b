# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Checksums of the frozen weights below an adapter, because an activation subspace belongs to them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core import distributed
from ..core.precision import bit_sum
from ..core.targets import without_wrappers
from ..text.access import base_parameters, language_model


def checksums(model: nn.Module) -> dict[str, str]:
    """Return the dtype and the sum of the bits of every frozen weight, by name.

    With shards, all processes must call this. Left out are embeddings, which users enlarge with random rows, and
    quantized weights, whose order in memory is not always the same. Of a 4-bit base, the norms remain.

    Call it before training: for vLLM, TRL merges an adapter and takes it out again, which rounds the base.
    """
    lm = model.model if isinstance(model, BaseTuner) else language_model(model)
    embeddings = [lm.get_input_embeddings(), lm.get_output_embeddings()] if isinstance(lm, PreTrainedModel) else []
    left_out = {id(own) for layer in embeddings if layer is not None for own in layer.parameters()}
    found = {
        without_wrappers(name): parameter
        for name, parameter in base_parameters(lm)
        if not (parameter.requires_grad or parameter.is_meta or id(parameter) in left_out)
        and parameter.is_floating_point()
        and type(distributed.local(parameter)) in (Tensor, nn.Parameter)  # others are quantized, as those of torchao
    }
    if not found:
        return {}
    own = [distributed.local(parameter) for parameter in found.values()]
    sums = torch.tensor([bit_sum(part) if part.numel() else 0 for part in own], dtype=torch.int64)
    if distributed.are_sharded(found.values()):
        (sums,) = distributed.summed([sums.to(own[0].device)])
    pairs = zip(found.items(), sums.tolist(), strict=True)
    return {name: f"{str(parameter.dtype).removeprefix('torch.')} {own}" for (name, parameter), own in pairs}


def check(model: nn.Module, saved: Mapping[str, str]) -> None:
    """Compare the result of `checksums` with a saved one, as far as both have a weight in the same dtype.

    Raises:
        ValueError: If they differ.
    """
    now = checksums(model)
    common = [name for name in saved if name in now and now[name].split()[0] == saved[name].split()[0]]
    other = [name for name in common if now[name] != saved[name]]
    if other:
        raise ValueError(
            f"It was built on other base weights: {len(other)} of {len(common)} differ, such as {other[0]}. Use the "
            "same base."
        )
