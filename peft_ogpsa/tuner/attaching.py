# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Attach OGPSA to a LoRA adapter that another tool made, or to a model's own weights."""

from __future__ import annotations

import logging

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..core import attachment, full_parameter, hooks
from ..core.config import ProjectionConfig
from ..core.full_parameter import FullParameterConfig, WholeTargets
from ..core.projector import Projector
from .targets import AdapterTargets, AttachedTargets

logger = logging.getLogger(__name__)


def attach(model: nn.Module, config: ProjectionConfig) -> Projector:
    """Project the steps that optimizers make with a plain LoRA adapter, or with a model's own weights.

    ```py
    model = get_peft_model(base, LoraConfig(...))  # or the model that another tool made
    config = OGPSAConfig()  # LoRA's settings are those of the adapter
    projector = attach(model, config)
    loader = ReferenceLoader.from_sets(references, tokenizer, config, step_examples=8)
    for batch in training:
        while projector.due:
            projector.refresh(loader.batches(model.device, everything=projector.unbuilt), reference_loss)
        loss_fn(model, batch).backward()
        optimizer.step()  # projected
        optimizer.zero_grad()
    ```

    You do not pass the optimizer: its own step hooks find the projector of the parameters that it holds. PEFT saves
    and loads the adapter as before. With an activation subspace, attach before the adapter is trained, or continue an
    adapter that was trained in the complement of the same subspace. If you wrap the model in `DistributedDataParallel`
    afterwards, keep passing the inner model to `attach` and `refresh`. If you shard it with `fully_shard`, before or
    after this call, nothing changes. A second call for the same parameters replaces the first, also if it is for a
    module inside or around the first one. A copy of the model has no projector: attach again.

    Args:
        model (`nn.Module`): A model with plain LoRA adapters (a `PeftModel`, or a base with injected adapters), of
            which those in training are projected. With a `FullParameterConfig`: any model, whose trainable parameters
            are projected, except those that `config.exclude` names.
        config (`OGPSAConfig` or `FullParameterConfig`): The settings. Of an `OGPSAConfig` only the projection's
            settings count. LoRA's settings can be left out, and must not contradict the adapter.

    Returns:
        The projector. `projector_of(model)` also returns it.

    Raises:
        ValueError: If `config` is of another type; if an `OGPSAConfig` is given and the model has no LoRA adapter, an
            adapter of another type, or LoRA's settings in it contradict the adapter; if the model has an OGPSA
            adapter; if a `FullParameterConfig` names something in `exclude` that is not in the model, or leaves
            nothing to project.
    """
    _refuse_own_adapter(model)
    if isinstance(config, FullParameterConfig):
        return _alone(full_parameter.attach(model, config), model)
    if not isinstance(config, ProjectionConfig):
        raise ValueError(
            f"attach: config={config!r} must be an OGPSAConfig (for a LoRA adapter) or a FullParameterConfig (for the "
            "model's own weights)."
        )
    base = _base_with_adapters(model)
    targets = AttachedTargets(base, base.__dict__["peft_config"], config)
    targets.check_settings(config)
    projector = Projector(targets)
    attachment.attach(base, projector)
    return _alone(projector, model)


def _alone(projector: Projector, model: nn.Module) -> Projector:
    """Detach what an earlier call attached to a module of the model, or around it: it would project, too."""
    for module in model.modules():
        other = attachment.attached_to(module)
        if other is not None and other is not projector and not isinstance(other.targets, AdapterTargets):
            attachment.detach(module)
    own = _parameters_of(projector)
    for other in _projectors():
        theirs = _parameters_of(other)
        if other is projector or theirs.keys().isdisjoint(own):
            continue
        attachment.detach(other.targets.model)
        lost = [name for key, name in theirs.items() if key not in own]
        if lost:
            logger.warning(
                "attach: the projector of this %s replaces that of a %s, because they would project the same "
                "parameters. %d parameters of the latter are no longer projected, such as %s. To project them, "
                "attach to the outer model only.",
                type(model).__name__,
                type(other.targets.model).__name__,
                len(lost),
                lost[0],
            )
    return projector


def _projectors() -> list[Projector]:
    return [watcher for watcher in hooks.watchers() if isinstance(watcher, Projector)]


def _parameters_of(projector: Projector) -> dict[int, str]:
    """The names of what a projector projects, by `id`."""
    projector.targets.forget()  # an adapter may have been added since
    return {id(parameter): name for name, _, parameter in projector.targets.trained()}


def _refuse_own_adapter(model: nn.Module) -> None:
    """Reject a model with an OGPSA adapter, or a part of one: the adapter's projector would project, too."""
    inside = {id(parameter) for parameter in model.parameters()}
    for projector in _projectors():
        targets = projector.targets
        if not isinstance(targets, AdapterTargets):
            continue
        matrices = [matrix for *_, matrix in (*targets.trained(), *targets.frozen())]
        if not inside.isdisjoint(map(id, matrices)):
            raise ValueError(
                "This model has an OGPSA adapter, which has its own settings. Leave out config: the adapter's steps "
                "are projected already. Or make a plain LoRA adapter, with LoraConfig. To train the model's own "
                "weights, remove the adapter (model.unload())."
            )


def attached(model: nn.Module, config: ProjectionConfig) -> Projector:
    """Like `attach`, but keep an attached projector and its subspace, and give it the settings."""
    if isinstance(config, FullParameterConfig):
        projector = attachment.attached_to(model)
        targets = None if projector is None else projector.targets
        kept = isinstance(targets, WholeTargets) and targets.takes(config)
    else:
        projector = attachment.attached_to(_base_with_adapters(model))
        targets = None if projector is None else projector.targets
        kept = isinstance(targets, AttachedTargets) and targets.takes(config)
    return projector if projector is not None and kept else attach(model, config)


def _base_with_adapters(model: nn.Module) -> nn.Module:
    """The base model inside, which carries PEFT's dictionary of its adapters."""
    bases = [
        module
        for module in model.modules()
        if "peft_config" in module.__dict__
        and not isinstance(module, BaseTuner)
        # not so once it is unloaded: before PEFT 0.19, the dictionary stays
        and any(isinstance(layer, BaseTunerLayer) for layer in module.modules())
    ]
    if len(bases) > 1:
        raise ValueError(
            f"This {type(model).__name__} contains {len(bases)} models with adapters. Attach to each of them "
            "separately."
        )
    if bases:
        return bases[0]
    raise ValueError(
        f"This {type(model).__name__} has no LoRA adapter, which an OGPSAConfig is for. Add one with "
        "get_peft_model(model, LoraConfig(...)), or with get_peft_model(model, OGPSAConfig(...)) and without attach. "
        "To train the model's own weights, use a FullParameterConfig."
    )
