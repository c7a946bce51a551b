# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Context managers for a model without its adapter, or as the reference policy of preference training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, set_adapter
from torch import nn

from .. import compat
from .config import moves_base

_MOVING = {
    "bias": ("trains the base model's own biases", "bias='none'"),
    "init_lora_weights": ("moves a part of the base model's weights into the adapter", "init_lora_weights=True"),
}
"""The settings of an adapter that can change the base itself: how, and the values with which they do not."""


@contextlib.contextmanager
def same_trainable(model: nn.Module) -> Iterator[None]:
    """Restore which parameters are in training.

    When PEFT enables or switches adapters, it turns on the gradients of every active adapter, even of a frozen one.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Run the base inside a model with an adapter of any type, wrapped or not.

    Raises:
        ValueError: If the model has no adapter, if its adapter is merged into the base, or if the base itself is
            trained or was changed when the adapter was made.
    """
    if not has_adapter(model):
        raise ValueError(
            f"This {type(model).__name__} has no adapter to disable, so its base cannot be reached. Add an adapter. "
            'Without one, give references loss="answer", and measure the base before training: '
            "Evaluator.base(base_model)."
        )
    refuse_moving_base(model)
    with _adapter_off(model):
        yield


@contextlib.contextmanager
def base_of(model: nn.Module) -> Iterator[None]:
    """Run the base: the model without its adapter, or the model itself if it has none."""
    with without_adapter(model) if has_adapter(model) else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def reference_policy(model: nn.Module) -> Iterator[None]:
    """Run the model as the reference policy of preference training.

    This is the adapter `ref` if there is one, which is TRL's copy of the adapter that preference training began with.
    Otherwise it is the model without its adapter.

    Raises:
        ValueError: If there is no `ref`, and the adapter's start has changed the model without it, or the adapter is
            merged into the base.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not any("ref" in compat.adapter_names(layer) for layer in layers):
        for name, config in _configs(model).items():
            if moving_setting(config) == "init_lora_weights":
                raise ValueError(
                    f"init_lora_weights={config.init_lora_weights!r} in the configuration of adapter {name!r} "
                    f"{_MOVING['init_lora_weights'][0]}. The model without its adapter is then not the original one, "
                    "which loss='dpo' needs as reference policy. Set init_lora_weights=True, or give the reference "
                    "sets loss='answer'."
                )
        with _adapter_off(model):
            yield
        return
    active = layers[0].active_adapters
    with same_trainable(model):
        try:
            set_adapter(model, "ref")
            yield
        finally:
            set_adapter(model, active)


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has an adapter, of layers (wrapped or not) or of virtual tokens."""
    return isinstance(model, PeftModel) or any(compat.is_adapter_layer(module) for module in model.modules())


@contextlib.contextmanager
def _adapter_off(model: nn.Module) -> Iterator[None]:
    layers: list[Any] = [module for module in model.modules() if compat.is_adapter_layer(module)]
    refuse_merged(layers)
    enabled = [layer for layer in layers if not layer.disable_adapters]  # these contexts may be nested
    virtual = model.disable_adapter() if isinstance(model, PeftModel) and not layers else contextlib.nullcontext()
    with same_trainable(model), virtual:
        try:
            for layer in enabled:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in enabled:
                layer.enable_adapters(True)


def refuse_merged(layers: Iterable[nn.Module]) -> None:
    """Reject merged adapter layers: a pass without the adapter would unmerge them, one with it gives no gradients.

    Raises:
        ValueError: If an adapter is merged into one of these layers.
    """
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError(
            "The adapter is merged into the base model, so its gradients and the outputs of the base cannot be "
            "computed. Call model.unmerge_adapter() first."
        )


def _refuse_frozen_below(model: nn.Module) -> None:
    trained: dict[str, bool] = {}
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        for path, parameter in layer.named_parameters():
            for name in set(layer.active_adapters) & set(path.split(".")):
                trained[name] = trained.get(name, False) or parameter.requires_grad
    frozen = [name for name, own in trained.items() if not own]
    if frozen and any(trained.values()):
        raise ValueError(
            f"The adapter {frozen[0]!r} is frozen and active together with the adapter in training. Without adapters, "
            "the model is then not the one that training starts from. But subspace='activations', loss='kl' and the "
            f"KL from base need that model. Merge {frozen[0]!r} into the base and add a new adapter (merge_adapter), "
            "or activate only the adapter in training (model.set_adapter), or use subspace='gradients' and reference "
            "sets with loss='answer'."
        )


def moving_setting(config: Any) -> str | None:
    """Return the name of an adapter's setting that changes the base itself, or None.

    `bias` trains the base's own biases. `init_lora_weights` moves a part of the base's weights into the adapter with
    starts such as "pissa".
    """
    if getattr(config, "bias", "none") != "none":
        return "bias"
    return "init_lora_weights" if moves_base(getattr(config, "init_lora_weights", None)) else None


def _configs(model: nn.Module) -> dict[str, Any]:
    """Return the configurations of a model's adapters, by name."""
    found = (getattr(module, "peft_config", None) for module in model.modules())
    return next((own for own in found if isinstance(own, dict)), {})


def refuse_moving_base(model: nn.Module) -> None:
    """Reject a model that is not the one before training when its adapters are off.

    Raises:
        ValueError: If the configuration trains biases or moves weights of the base into the adapter, if a weight
            outside the adapter is in training, or if a frozen adapter is active together with the one in training.
    """
    _refuse_frozen_below(model)
    for name, config in _configs(model).items():
        if (setting := moving_setting(config)) is not None:
            does, remedy = _MOVING[setting]
            raise ValueError(
                f"{setting}={getattr(config, setting)!r} in the configuration of adapter {name!r} {does}. The model "
                "without its adapter is then not the original model. But subspace='activations', loss='kl', answers "
                f"of the base and the KL from base need the original model. Set {remedy}, or use subspace='gradients' "
                "and reference sets with loss='answer'. Before the model gets its adapter, the base can answer "
                "(ReferenceSet.from_prompts) and be measured (Evaluator.base)."
            )
    inside = {
        id(parameter)
        for module in model.modules()
        if compat.is_adapter_layer(module)
        for name, parameter in module.named_parameters()
        if not name.startswith(("base_layer.", "original_module."))
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside:
            raise ValueError(
                f"{name} is trained and belongs to the base model. The model without its adapter is then not the "
                "original model. But subspace='activations', loss='kl' and the KL from base need the original model. "
                f"Freeze {name} (requires_grad_(False)), or use subspace='gradients' and reference sets with "
                "loss='answer'."
            )
