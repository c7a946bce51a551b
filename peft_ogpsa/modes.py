# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The states in which a model in training is looked at from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


@contextlib.contextmanager
def undisturbed(model: nn.Module, *, gradients: bool = False, seed: int | None = None) -> Iterator[None]:
    """Evaluation mode, on a random stream of its own; training may go on afterwards as if nothing had happened.

    Compiled code runs eagerly inside, so that hooks are seen. Without gradients it is `no_grad` and not
    `inference_mode`: buffers first created here (rotary tables, for one) enter later backward passes, and gradient
    checkpointing's input hooks set `requires_grad`; inference tensors allow neither.

    Args:
        model: Every submodule's mode is put back at the end.
        gradients: Whether autograd records.
        seed: Of the random stream; by default it starts where the global one stands, which is put back at the end.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.set_grad_enabled(gradients),
        torch.compiler.set_stance("force_eager"),
    ):
        if seed is not None:
            torch.manual_seed(seed)
        switch_to_evaluation(model)
        if gradients:
            _keep_checkpointing(model)
        try:
            yield
        finally:
            for module, training in modes:
                if module.training != training:  # setting it is slow
                    module.training = training


@contextlib.contextmanager
def same_trainable(model: nn.Module) -> Iterator[None]:
    """Puts back which parameters are in training.

    PEFT turns the gradients of every active adapter on when it enables or switches adapters, those of a frozen one
    too.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """The base, inside a model whose adapter is of layers, wrapped or not.

    Raises:
        ValueError: If the model has no adapter.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if not layers:
        raise ValueError(
            f"This {type(model).__name__} has no adapter, and without one there is no base beside it. Add an adapter, "
            'or give references loss="answer".'
        )
    with same_trainable(model):
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)


def _keep_checkpointing(model: nn.Module) -> None:
    """Lets checkpointed layers go on saving memory, which they do in training mode alone; what is in them stays.

    Not where checkpointing is reentrant, which `autograd.grad` cannot pass.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(checkpoint, "keywords", {}).get("use_reentrant") is False:
                module.training = True


def switch_to_evaluation(model: nn.Module) -> None:
    """Puts a model into evaluation mode, but for 4-bit layers on a CPU.

    bitsandbytes repacks such a layer for good when it first runs in evaluation mode, and its gradients are wrong ever
    after (0.50, `Linear4bit.forward`). The layer has no dropout, so its mode makes no other difference.
    """
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and next(module.parameters()).device.type == "cpu":
            module.training = True
