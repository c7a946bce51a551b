# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The states in which a model in training is looked at from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

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
    with (
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
def _random_states() -> Iterator[None]:
    """Puts back the random states of the CPU and of every accelerator in use, which are the whole process's."""
    kind = torch.accelerator.current_accelerator()
    if kind is None or not torch.get_device_module(kind).is_available():
        with torch.random.fork_rng(devices=[]):
            yield
    elif kind.type == "mps":  # one device, whose functions take no index
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
        ValueError: If the model has no adapter, its adapter is merged into the base, or the base itself is trained.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if not layers:
        raise ValueError(
            f"This {type(model).__name__} has no adapter, and without one there is no base beside it. Add an adapter, "
            'or give references loss="answer".'
        )
    refuse_merged(layers)
    refuse_moving_base(model)
    enabled = [layer for layer in layers if not layer.disable_adapters]  # one such context may be inside another
    with same_trainable(model):
        try:
            for layer in enabled:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in enabled:
                layer.enable_adapters(True)


@contextlib.contextmanager
def _checkpointing_kept(model: nn.Module) -> Iterator[None]:
    """Lets checkpointed layers go on saving memory, which they do only in training mode.

    Not where checkpointing is reentrant, which `autograd.grad` cannot pass.
    """
    changed: list[tuple[Any, Any]] = []
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(checkpoint, "keywords", {}).get("use_reentrant") is False:
                changed.append((module, checkpoint))
    for module, checkpoint in changed:
        module.training = True
        module._gradient_checkpointing_func = _evaluating(module, checkpoint)
    try:
        yield
    finally:
        for module, checkpoint in changed:
            module._gradient_checkpointing_func = checkpoint


def refuse_merged(layers: Iterable[nn.Module]) -> None:
    """Refuses merged adapter layers: a pass without the adapter would unmerge them, one with it gives no gradients.

    Raises:
        ValueError: If an adapter is merged into one of these layers.
    """
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError(
            "The adapter is merged into the base model, so neither the adapter's gradients nor the base by itself can "
            "be computed. Call model.unmerge_adapter() first."
        )


def refuse_moving_base(model: nn.Module) -> None:
    """Refuses a base that is trained beside its adapter: without the adapter it is not the model it once was.

    Raises:
        ValueError: If the configuration trains biases, or a weight outside the adapter is in training.
    """
    configs = (getattr(module, "peft_config", None) for module in model.modules())
    for name, config in next((own for own in configs if isinstance(own, dict)), {}).items():
        bias = getattr(config, "bias", "none")
        if bias != "none":
            raise ValueError(
                f"bias={bias!r} in the configuration of adapter {name!r} trains the base model's own biases, so the "
                "model without its adapter is not the original model, which subspace='activations', loss='kl' and "
                "the KL from base need. Set bias='none', or use subspace='gradients' and reference sets with "
                "loss='answer'."
            )
    inside = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for name, parameter in module.named_parameters()
        if not name.startswith(("base_layer.", "original_module."))
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside:
            raise ValueError(
                f"{name} is trained and belongs to the base model, so the model without its adapter is not the "
                "original model, which subspace='activations', loss='kl' and the KL from base need. Freeze it "
                "(requires_grad_(False)), or use subspace='gradients' and reference sets with loss='answer'."
            )


def _evaluating(module: nn.Module, checkpoint: Callable) -> Callable:
    """A checkpointing function under which the layer itself is in evaluation mode, when it is computed again too.

    Many layers hand `self.training` to their dropout.
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
    """Puts a model into evaluation mode, but for 4-bit layers on a CPU.

    bitsandbytes repacks such a layer for good when it first runs in evaluation mode, and its gradients are wrong ever
    after (0.50, `Linear4bit.forward`). The layer has no dropout, so its mode makes no other difference.
    """
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and next(module.parameters()).device.type == "cpu":
            module.training = True
