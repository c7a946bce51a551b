# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The LoRA matrices of an adapter, as targets of the projector. See `full_parameter` for a model's own weights."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

from peft import LoraModel, PeftConfig, PeftType
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..core import distributed
from ..core.config import ProjectionConfig
from ..core.stacks import InputMatrix
from ..core.targets import without_wrappers
from .adapters import refuse_merged, without_adapter
from .config import OGPSAConfig

logger = logging.getLogger(__name__)

_LORA_WEIGHT = re.compile(
    r"(?P<owner>.*)\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B)\.(?P<adapter>[^.]+)(?:\.weight)?"
)


class LoraTargets(ABC):
    """The LoRA matrices A and B in training, of some of a model's adapters.

    Args:
        model (`nn.Module`): The module that has the adapters inside.
    """

    kind = "LoRA"
    settings = "OGPSAConfig"
    untrained = (
        "no LoRA weight of the adapter is in training. Give is_trainable=True to PeftModel.from_pretrained, or "
        "unfreeze the LoRA weights."
    )
    untied = "Set ensure_weight_tying=False in the configuration, or adapt only one of the two modules."
    rows_on_host = False
    names_others = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: tuple[tuple[str, ...], list[tuple[str, str, nn.Parameter]]] | None = None

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The adapters whose matrices are projected if they are in training."""

    @abstractmethod
    def configs(self) -> dict[str, OGPSAConfig]:
        """The configurations of these adapters, at least of those in training."""

    @property
    def config(self) -> OGPSAConfig:
        """The configuration of the adapter in training.

        Raises:
            ValueError: If several adapters in training have different projection settings, or no adapter is left.
        """
        own = self.configs()
        training = self._in_training() if len(own) > 1 else set(own)
        configs = [config for name, config in own.items() if name in training] or list(own.values())
        if not configs:
            raise _no_adapter()
        if any(config.ogpsa_dict() != configs[0].ogpsa_dict() for config in configs):
            raise ValueError(
                f"The adapters in training, {sorted(training)}, have different OGPSA settings. Train one at a time "
                "(`set_adapter`), or give them the same settings."
            )
        return configs[0]

    def _in_training(self) -> set[str]:
        """The adapters that have a matrix in training."""
        return {owner.rpartition(".")[2] for _, owner, _ in self.trained()}

    def _weights(self) -> list[tuple[str, str, nn.Parameter]]:
        """Name, owner (`module.adapter`) and parameter of every LoRA matrix of these adapters."""
        # Walking through a large model takes milliseconds, so the list is kept until adapters are added or removed.
        adapters = self.names()
        known = self._known  # another thread may reset it in the meantime
        if known is None or known[0] != adapters:
            named = ((without_wrappers(name), parameter) for name, parameter in self.model.named_parameters())
            matches = ((_LORA_WEIGHT.fullmatch(name), parameter) for name, parameter in named)
            found = [(m[0], f"{m['owner']}.{m['adapter']}", p) for m, p in matches if m and m["adapter"] in adapters]
            self._known = known = (adapters, found)
        return known[1]

    def trained(self) -> list[tuple[str, str, nn.Parameter]]:
        """Name, owner (`module.adapter`) and parameter of the LoRA matrices in training."""
        return [item for item in self._weights() if item[2].requires_grad]

    def frozen(self) -> list[tuple[str, nn.Parameter]]:
        """Name and parameter of the LoRA matrices that are not in training."""
        return [(name, parameter) for name, _, parameter in self._weights() if not parameter.requires_grad]

    def matrices(self) -> list[InputMatrix]:
        """The matrices A in training.

        Raises:
            ValueError: If a layer's output depends on trained parameters other than A and B, or on A in another way
                than through `B A x`, or if its B is trained and its A is not.
        """
        self._warn_of_frozen_parts()
        found: list[InputMatrix] = []
        adapters: dict[str, str] = {}  # by layer
        configs = self.configs()
        names = {name for name, _, _ in self.trained()}
        for name, owner, parameter in self.trained():
            path, _, adapter = owner.rpartition(".")
            layer: Any = self.model.get_submodule(path)
            _refuse_layer(path, layer, adapter, configs[adapter])
            if ".lora_B." in name and name.replace(".lora_B.", ".lora_A.") not in names:
                raise ValueError(
                    f"{name} is trained, but the matrix A of the same layer is not. An activation subspace then "
                    "cannot preserve the layer's output on reference inputs. Train both, or use subspace='gradients'."
                )
            if ".lora_A." in name:
                if adapters.setdefault(path, adapter) != adapter:
                    raise ValueError(
                        f"The adapters {adapters[path]!r} and {adapter!r} are in training at once. An activation "
                        "subspace is for one adapter. Activate only one (model.set_adapter), freeze the parameters of "
                        "the other (requires_grad_(False)), or use subspace='gradients'."
                    )
                after = layer.lora_B[adapter].weight
                found.append(InputMatrix(name, path, layer, layer.lora_A[adapter], parameter, after))
        return found

    def _warn_of_frozen_parts(self) -> None:
        """Warn of parts of an adapter in training that are frozen and have an effect: the base is without them."""
        training = self._in_training()
        frozen = [
            name
            for name, owner, parameter in self._weights()
            if ".lora_B." in name and not parameter.requires_grad and owner.rpartition(".")[2] in training
            if distributed.local(parameter).any()
        ]
        if frozen:
            logger.warning(
                "%d matrices B of the adapter in training are frozen and not zero, for example %s. The references "
                "pass the base without them, so what these layers do to reference inputs is not preserved, unless "
                "they were trained in the null space of the same references.",
                len(frozen),
                frozen[0],
            )

    def original(self) -> AbstractContextManager:
        """A context with the base model: the adapter is off."""
        return without_adapter(self.model)

    def forget(self) -> None:
        """Forget the known parameters, because loading weights may have replaced them."""
        self._known = None

    def check(self) -> None:
        """Reject an adapter that is gone, switched off or merged: a pass gives no gradients of its matrices."""
        if not self.names():
            raise _no_adapter()
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        if not self.trained() and any(layer.disable_adapters for layer in layers):
            raise ValueError(
                "The adapter is switched off (model.disable_adapter()), so none of its weights is in training. Call "
                "refresh outside of that context."
            )
        refuse_merged(layers)


class AdapterTargets(LoraTargets):
    """The OGPSA adapters of an `OGPSAModel`.

    Args:
        model (`OGPSAModel`): The tuner.
    """

    what = "an OGPSA adapter"

    def __init__(self, model: LoraModel) -> None:
        super().__init__(model)
        self.tuner = model

    def names(self) -> tuple[str, ...]:
        """The OGPSA adapters."""
        return tuple(self.configs())

    def configs(self) -> dict[str, OGPSAConfig]:
        """The OGPSA adapters, as PEFT knows them."""
        return {name: config for name, config in self.tuner.peft_config.items() if isinstance(config, OGPSAConfig)}


class AttachedTargets(LoraTargets):
    """The plain LoRA adapters of a model that was given to `attach`, also those that are added later.

    Args:
        model (`nn.Module`): The module that has the adapters inside.
        adapters (`dict[str, PeftConfig]`): PEFT's own dictionary of the model's adapters, which PEFT keeps up to date.
        projection (`ProjectionConfig`): The settings of the projection.
    """

    what = "a LoRA adapter under OGPSA"

    def __init__(self, model: nn.Module, adapters: dict[str, PeftConfig], projection: ProjectionConfig) -> None:
        super().__init__(model)
        self._adapters = adapters
        self._first_layer = next(own for own in model.named_modules() if isinstance(own[1], BaseTunerLayer))
        self.projection = projection
        # By adapter: what its settings were made from, and these settings.
        self._combined: dict[str, tuple[PeftConfig, dict[str, Any], OGPSAConfig]] = {}

    @property
    def current(self) -> bool:
        """Whether PEFT still has these adapters. Adapters that it adds to the base after unloading them are others."""
        path, layer = self._first_layer
        try:
            found = self.model.get_submodule(path)
        except AttributeError:
            return False
        # Before PEFT 0.19, the dictionary stays when the layers are unloaded.
        return found is layer and self.model.__dict__.get("peft_config") is self._adapters

    def takes(self, projection: ProjectionConfig) -> bool:
        """Take other settings for a next stage, unless the adapters are others now. Return whether it took them.

        Raises:
            ValueError: If they do not fit an adapter. The settings are then those from before.
        """
        if not self.current:
            return False
        self.check_settings(projection)
        self.projection = projection
        return True

    def check_settings(self, projection: ProjectionConfig) -> None:
        """Check that these settings fit the adapters in training, or all adapters if none is.

        Raises:
            ValueError: If they do not fit an adapter, or an adapter is not LoRA.
        """
        for name in self._checked() or self.names():
            OGPSAConfig.for_adapter(name, self._adapters[name], projection)

    def _checked(self) -> list[str]:
        """The adapters in training. Adapters of other types count as such, because their weights are not looked at."""
        training = self._in_training()
        return [name for name in self.names() if name in training or self._adapters[name].peft_type != PeftType.LORA]

    def names(self) -> tuple[str, ...]:
        """The adapters, in training or not."""
        return tuple(self._adapters) if self.current else ()

    def configs(self) -> dict[str, OGPSAConfig]:
        """The adapters in training, with LoRA's settings of their own and the projection's settings.

        Raises:
            ValueError: If an adapter is not LoRA, or its settings do not allow this projection.
        """
        names = self._checked()
        settings = self.projection.ogpsa_dict()  # the user may change them in place
        for name in names:
            config, known = self._adapters[name], self._combined.get(name)
            if known is None or known[0] is not config or known[1] != settings:
                self._combined[name] = (config, settings, OGPSAConfig.for_adapter(name, config, self.projection))
        return {name: self._combined[name][2] for name in names}

    @property
    def config(self) -> OGPSAConfig:
        """The projection's settings, with LoRA's settings of the adapter in training."""
        return super().config if self.configs() else OGPSAConfig(**self.projection.ogpsa_dict())


def _no_adapter() -> ValueError:
    """The error for a projector whose adapters have been deleted or unloaded."""
    return ValueError(
        "The model has no adapter of this projector any more. Add one (model.add_adapter), or call get_peft_model or "
        "attach again."
    )


def _refuse_layer(path: str, layer: Any, adapter: str, config: OGPSAConfig) -> None:
    """Reject a layer whose outputs an activation subspace cannot keep unchanged."""
    kind = type(layer).__name__
    reason = None
    if not isinstance(layer, LoraLayer) or isinstance(layer, MultiheadAttention | ParamWrapper):
        reason = f"is a {kind}, and the inputs of its weights are not known"
    elif adapter not in layer.lora_A or kind.startswith("Conv"):
        reason = f"is a {kind}, not a linear layer"
    elif not isinstance(layer.lora_A[adapter], nn.Linear):
        reason = f"has a {type(layer.lora_A[adapter]).__name__} for A instead of one matrix"
    elif config.lora_bias:
        reason = "has lora_bias=True, which changes its output for every input"
    elif (variant := layer.lora_variant.get(adapter)) is not None:
        reason = (
            f"uses {type(variant).__name__} (for example because of use_dora=True), which does more than add B A x"
        )
    if reason is not None:
        raise ValueError(
            f"subspace='activations' does not work for the layer {path}. It {reason}. Change that setting, leave "
            "such layers out of target_modules, or use subspace='gradients'."
        )
