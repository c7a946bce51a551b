# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Context managers that run a model in eval mode during training."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .. import compat


@contextlib.contextmanager
def isolated_eval(model: nn.Module, *, gradients: bool = False, seed: int | None = None) -> Iterator[None]:
    """Run in evaluation mode with a separate random stream; training can go on afterwards as if nothing happened.

    Buffers that a forward pass also changes in evaluation mode, such as counters and observers, are not restored.

    Compiled code runs eagerly inside the context, so that hooks are called. Without gradients the context uses
    `no_grad` and not `inference_mode`. The reason is that buffers first created here (rotary tables, for example) are
    used in later backward passes, and that the input hooks of gradient checkpointing set `requires_grad`. Inference
    tensors allow neither.

    Args:
        model: The model. The mode of every submodule is restored at the end.
        gradients: Whether autograd records.
        seed: Seed of torch's random stream. By default the stream starts where the global one is. The global streams
            of torch, Python and NumPy are restored at the end.
    """
    modes = [(module, module.training) for module in model.modules()]
    with (
        _random_states_of_python(),
        _random_states(),
        torch.set_grad_enabled(gradients),
        torch.compiler.set_stance("force_eager"),
    ):
        if seed is not None:
            torch.manual_seed(seed)
        switch_to_evaluation(model)
        try:
            with _checkpointing_kept(model) if gradients else contextlib.nullcontext():
                yield
        finally:
            for module, training in modes:
                if module.training != training:  # setting it is slow
                    module.training = training


@contextlib.contextmanager
def no_gradients(model: nn.Module) -> Iterator[None]:
    """Like `torch.no_grad()`, for a pass inside `isolated_eval(model, gradients=True)`.

    Checkpointed layers are in training mode there, because their checkpointing function evaluates them. Without
    gradients, transformers does not call this function, so such layers would drop out.
    """
    layers = [module for module in model.modules() if module.training and compat.checkpointing(module) is not None]
    for layer in layers:
        layer.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.training = True


@contextlib.contextmanager
def _random_states_of_python() -> Iterator[None]:
    """Restore the random states of Python and of NumPy, from which loss functions and data collators may draw."""
    numpy = sys.modules.get("numpy")  # if nothing has imported it, training does not draw from it
    python, arrays = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(arrays)


@contextlib.contextmanager
def _random_states() -> Iterator[None]:
    """Restore the random states of the CPU and of every accelerator in use. They belong to the whole process."""
    kind = torch.accelerator.current_accelerator()
    if kind is None or not torch.get_device_module(kind).is_available():
        with torch.random.fork_rng(devices=[]):
            yield
    elif kind.type == "mps":  # a single device; its functions take no index
        state = torch.mps.get_rng_state()
        with torch.random.fork_rng(devices=[]):
            try:
                yield
            finally:
                torch.mps.set_rng_state(state)
    else:
        module = torch.get_device_module(kind)
        used = not hasattr(module, "is_initialized") or module.is_initialized()
        devices = list(range(module.device_count())) if used else []
        with torch.random.fork_rng(devices=devices, device_type=kind.type):
            yield


@contextlib.contextmanager
def _checkpointing_kept(model: nn.Module) -> Iterator[None]:
    """Let checkpointed layers keep saving memory, which they otherwise do only in training mode.

    This excludes reentrant checkpointing, which `autograd.grad` does not support.
    """
    found = ((module, compat.checkpointing(module)) for module in model.modules())
    layers = [(module, checkpoint) for module, checkpoint in found if checkpoint is not None]
    usable = {checkpoint: _keeps_gradients(checkpoint) for checkpoint in {checkpoint for _, checkpoint in layers}}
    changed = [(module, checkpoint) for module, checkpoint in layers if usable[checkpoint]]
    for module, checkpoint in changed:
        module.training = True
        compat.set_checkpointing(module, _evaluating(module, checkpoint))
    try:
        yield
    finally:
        for module, checkpoint in changed:
            compat.set_checkpointing(module, checkpoint)


def _keeps_gradients(checkpoint: Callable) -> bool:
    """Whether `autograd.grad` finds the gradients of weights in what this function checkpoints.

    A function's keywords do not tell. Training tools replace the function below it, by one that is always reentrant or
    offloads to the CPU. `autograd.grad` then finds no gradient, and reports no error.
    """
    weight, inputs = (torch.full((1, 1, 1), value, requires_grad=True) for value in (2.0, 3.0))
    try:
        output = checkpoint(lambda given: given * weight, inputs)
        (gradient,) = torch.autograd.grad(output, weight, grad_outputs=torch.ones(1, 1, 1), allow_unused=True)
    except Exception:  # such as that of a function that needs a layer's own method
        return False
    return gradient is not None and bool(gradient == inputs)


def _evaluating(module: nn.Module, checkpoint: Callable) -> Callable:
    """A checkpointing function that keeps the layer itself in evaluation mode, also when the layer is recomputed.

    Many layers pass `self.training` to their dropout.
    """

    def run(function: Callable, *args: Any, **kwargs: Any) -> Any:
        def evaluated(*inner: Any, **named: Any) -> Any:
            module.training = False
            try:
                return function(*inner, **named)
            finally:
                module.training = True

        return checkpoint(evaluated, *args, **kwargs)

    return run


def switch_to_evaluation(model: nn.Module) -> None:
    """Put a model into evaluation mode, except for 4-bit layers on a CPU.

    bitsandbytes would repack such a layer, whose gradients are wrong from then on. The layer has no dropout, so its
    mode makes no other difference.
    """
    model.eval()
    for module in model.modules():
        if compat.evaluation_breaks_gradients(module):
            module.training = True
