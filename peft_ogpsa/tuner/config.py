# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The configuration of OGPSA: LoRA's arguments, and how to keep reference losses from rising."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftConfig, PeftType

from .. import compat
from ..core.config import ProjectionConfig
from ..core.files import json_object, write_json

SIDECAR_NAME = "ogpsa_config.json"
_FORMAT_VERSION = 1

DAMAGED = (KeyError, TypeError, AttributeError, RecursionError)
"""What PEFT raises for a damaged `adapter_config.json`, besides `ValueError`."""

logger = logging.getLogger(__name__)

BEFORE_SAVING: dict[str, Callable[[str], object]] = {}
"""Functions that prepare a folder before a model with this configuration is saved to it, by name."""
AFTER_SAVING: dict[str, Callable[[str], object]] = {}
"""Functions that write more files when a configuration is saved, by name. Each is called with the folder."""


def moves_base(start: Any) -> bool:
    """Whether the base without the adapter is not the model that was loaded, for a value of `init_lora_weights`."""
    return isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))


@dataclass
class OGPSAConfig(ProjectionConfig, LoraConfig):
    """Configuration of OGPSA: LoRA whose updates are projected away from a reference subspace.

    It takes every argument of [`~peft.LoraConfig`] in addition to its own. It is saved as a plain LoRA
    `adapter_config.json`, with OGPSA's own settings next to it in `ogpsa_config.json`. If this package is imported,
    PEFT's loading functions read both files and return an `OGPSAConfig`. Otherwise, or without the second file, the
    adapter is plain LoRA.

    Args:
        subspace (`str`): What updates are projected away from. `"activations"`: the leading directions of every
            layer's inputs on reference tokens, computed once, before the first step. A stays in their complement, so
            the layer's output on these inputs stays that of the base. `"gradients"`: reference gradients, which are
            recomputed during training and constrain the step to first order. `"both"`: the activation subspace
            projects the step first, and the gradient subspace then acts inside its complement. `"none"`: nothing is
            projected, and only the `reference_weight` acts: a KL penalty, or replay, alone.
        subspace_rank (`int`, *optional*): For an activation subspace: the number of directions of each layer's inputs;
            `None` takes as many as `subspace_energy` requires. With `subspace="gradients"` and
            `constraint="orthogonal"`: the number of leading directions of the rows to keep; `None` keeps all.
        subspace_energy (`float`): Used without `subspace_rank`: the share of the energy (mean squared length) of a
            layer's inputs on reference tokens that its directions hold, above 0 and at most 1. There are at most 512
            directions, and at most half of the input's width. The default, 1.0, takes this maximum. Shares of 0.95 and
            less preserve less: in some layers a few directions hold most of the energy (benchmarks/results/tax.md).
        tokens (`str`): The tokens whose inputs count for an activation subspace: `"all"` tokens of a reference
            example, or those of the `"answer"`.
        constraint (`str`): `"cone"` takes the closest update along which no reference loss rises to first order;
            `"orthogonal"` removes the whole component in the span of the reference gradients (arXiv 2602.07892).
        projection (`str`): `"update"` projects the parameter change that the optimizer made; `"gradient"` projects the
            gradient before the optimizer (arXiv 2602.07892).
        scope (`str`): The parameters projected together, called a block: a slice of each LoRA matrix (`"slice"`; not
            for sharded matrices), each matrix (`"tensor"`), both matrices of a layer (`"module"`), or all of them
            (`"model"`). Smaller blocks preserve more, because the constraint binds in each of them.
        slices (`int`): With `scope="slice"`: the number of slices of equal size that each matrix is cut into, or the
            largest smaller number that divides its size.
        rows (`int`): Reference gradients stored per block, over all reference sets. The newest replace the oldest.
        rows_from (`str`): What one row is the gradient of: an `"example"`, a `"batch"`, or the mean over a `"set"`.
        rows_dtype (`str`): `"float32"`, `"bfloat16"` for half the memory, or `"int8"` for a quarter, with one scale
            for each row of a matrix. `"int8"` works only with the cone, because a basis of the span needs more digits.
            The directions of an activation subspace are stored in the same type.
        refresh_steps (`int`): Optimizer steps from one refresh of the rows to the next. There is always another
            refresh after the first step, because LoRA starts with B = 0, where the gradient of A is zero. The
            reference weight is added once per refresh, so more frequent refreshes also make its pull stronger.
        reference_budget (`float`, *optional*): Passes of reference examples for each pass of a training example. This
            is the share that references add to the cost of training. `OGPSACallback` converts it to a number of
            examples per refresh, at least one. An example with `loss="kl"` counts 3/2, because it also needs a forward
            pass of the base. `None` uses all examples of every set, as the paper does.
        refresh_samples (`int`, *optional*): Number of examples per refresh, over all sets, instead of a budget.
        reference_weight (`float`, *optional*): How much of the mean fresh reference gradient is added to the training
            gradient on steps that refreshed. With `projection="gradient"` it is added after the projection. With a
            weight of 5 and 5 `refresh_steps`, a reference gradient counts as much as a training gradient. With
            `loss="kl"` this pulls the model to its base; with other losses it replays the answers. For sets with
            `loss="kl"`, `None` takes 2 with an activation subspace and 8 without one; these values
            were measured (benchmarks/results/tax.md). For other losses it takes 1. 0 adds nothing. Then
            `subspace="activations"` needs no reference example during training, but for more than about 25 steps it
            keeps less.
        missing_reference (`str`): What an optimizer step does before there is a subspace, or with reference gradients
            that are older than twice `refresh_steps`: `"error"`, `"warn"`, or `"ignore"`. Before there is a subspace,
            the last two train plain LoRA. If only the reference gradients of a `reference_weight` are missing, the
            activation subspace still projects.

    Raises:
        ValueError: If a value is not allowed, or if two values contradict each other.
    """

    def __post_init__(self) -> None:
        LoraConfig.__post_init__(self)
        self.peft_type = compat.peft_type("OGPSA")
        self._check_projection()
        if self.uses_activations:
            self._check_lora()

    def _check_lora(self) -> None:
        """Reject LoRA settings for which an activation subspace cannot keep the outputs unchanged."""
        start = self.init_lora_weights
        if moves_base(start):
            raise ValueError(
                f"init_lora_weights={start!r} is not allowed with subspace={self.subspace!r}: it moves part of the "
                "base's weights into the adapter, and the adapter then acts on reference inputs. Use "
                "init_lora_weights=True, or subspace='gradients'."
            )
        if isinstance(start, str) and start.lower() == "mica":
            raise ValueError(
                f"init_lora_weights={start!r} is not allowed with subspace={self.subspace!r}: it has layers of its "
                "own kind, which train only A. Use init_lora_weights=True, or subspace='gradients'."
            )
        for name in ("use_dora", "lora_bias", "target_parameters"):
            if getattr(self, name, None):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not allowed with subspace={self.subspace!r}: it changes a "
                    "layer's output on reference inputs in ways other than through A. Leave it out, or use "
                    "subspace='gradients'."
                )

    @property
    def init_weights(self) -> Any:
        """`init_lora_weights`, under the name that PEFT's saving code uses for every type except its own LORA."""
        return self.init_lora_weights

    @init_weights.setter
    def init_weights(self, value: Any) -> None:
        self.init_lora_weights = value

    @classmethod
    def paper(cls, stage: Literal["sft", "dpo"], **overrides: Any) -> OGPSAConfig:
        """The published rule and schedule (arXiv 2602.07892 and its code).

        The gradient of each tensor loses its component in the span of one mean gradient per reference set (at most two
        sets, unless `rows` is raised). The mean gradients are recomputed from all reference examples every 30 (SFT) or
        5 (DPO) optimizer steps. The paper trains all weights. This configuration applies its rule to LoRA's weights.

        Args:
            stage (`str`): `"sft"` or `"dpo"`.
            **overrides: LoRA's arguments, and any of OGPSA's, which then override the paper's.

        Raises:
            ValueError: If `stage` is neither `"sft"` nor `"dpo"`.
        """
        return cls(**{**cls._paper_rule(stage), **overrides})

    def lora_config(self) -> LoraConfig:
        """An independent plain `LoraConfig` with the same LoRA settings."""
        # Built without __init__, which would warn a second time about questionable LoRA settings.
        plain = object.__new__(LoraConfig)
        own = _own_fields()
        plain.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k not in own}))
        plain.peft_type = PeftType.LORA
        return plain

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write a plain LoRA `adapter_config.json`, OGPSA's own settings to `ogpsa_config.json`, and the model card.

        Args:
            save_directory (`str`): The folder. It is created if needed.
            **kwargs: As for [`~peft.LoraConfig`].
        """
        self.lora_config().save_pretrained(save_directory, **kwargs)
        self.save_sidecar(save_directory)
        run_all(AFTER_SAVING, save_directory)

    def save_sidecar(self, save_directory: str) -> None:
        """Write OGPSA's own settings alone, to `ogpsa_config.json` in a folder, which is created if needed."""
        os.makedirs(save_directory, exist_ok=True)
        content = {"format_version": _FORMAT_VERSION, **self.ogpsa_dict()}
        write_json(Path(save_directory) / SIDECAR_NAME, content)

    @classmethod
    def from_lora_config(cls, lora: LoraConfig, sidecar: str | os.PathLike[str]) -> OGPSAConfig:
        """Combine a plain LoRA configuration with the OGPSA settings in a saved `ogpsa_config.json`.

        Args:
            lora ([`~peft.LoraConfig`]): LoRA's settings.
            sidecar (`str` or `os.PathLike`): The file with OGPSA's settings.

        Raises:
            ValueError: If the file is damaged, or has a format that this version does not know.
        """
        remedy = f"Restore it, or delete it to load the adapter as plain LoRA: {os.fspath(sidecar)}"
        try:
            settings = json_object(Path(sidecar).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{SIDECAR_NAME} is damaged ({error}). {remedy}") from error
        if "format_version" not in settings:
            raise ValueError(f"{SIDECAR_NAME} is damaged (it has no format_version). {remedy}")
        version = settings.pop("format_version")
        if version != _FORMAT_VERSION:
            raise ValueError(
                f"{SIDECAR_NAME} has format_version={version!r}, but this version of peft_ogpsa reads "
                f"only {_FORMAT_VERSION}. Upgrade peft_ogpsa. {remedy}"
            )
        if unknown := sorted(settings.keys() - _own_fields()):
            raise ValueError(f"{SIDECAR_NAME} has unknown settings: {', '.join(unknown)}. {remedy}")
        # For files of versions without this setting.
        settings.setdefault("subspace", "gradients")
        try:
            return cls(**{f.name: getattr(lora, f.name) for f in fields(lora)}, **settings)
        except ValueError as error:
            raise ValueError(f"{SIDECAR_NAME} is damaged ({error}). {remedy}") from error

    @classmethod
    def for_adapter(cls, name: str, lora: PeftConfig, projection: ProjectionConfig) -> OGPSAConfig:
        """Combine the settings of a plain LoRA adapter with those of a projection.

        Args:
            name (`str`): The adapter's name, for messages.
            lora ([`~peft.LoraConfig`]): The adapter's settings.
            projection (`ProjectionConfig`): The projection's settings. If it is an `OGPSAConfig`, its LoRA settings
                must be LoRA's defaults, or those of the adapter.

        Raises:
            ValueError: If the adapter is not plain LoRA, if two settings contradict each other, or if the projection
                does not work with the adapter's settings.
        """
        if not isinstance(lora, LoraConfig) or lora.peft_type != PeftType.LORA:
            kind = getattr(lora.peft_type, "value", lora.peft_type)
            raise ValueError(
                f"The adapter {name!r} is of the type {kind}. OGPSA can be attached to plain LoRA adapters only. Use "
                "LoraConfig."
            )
        if isinstance(projection, LoraConfig):
            _refuse_contradictions(name, lora, projection)
        # Tools derive classes from LoraConfig (ms-swift), which have fields of their own.
        try:
            return cls(**{f.name: getattr(lora, f.name) for f in fields(LoraConfig)}, **projection.ogpsa_dict())
        except ValueError as error:
            raise ValueError(f"The adapter {name!r} does not fit: {error}") from error


def run_all(acts: Mapping[str, Callable[[str], object]], save_directory: str) -> None:
    """Call the functions of `BEFORE_SAVING` or `AFTER_SAVING`. An error costs no adapter."""
    for name, act in acts.items():
        try:
            act(save_directory)
        except Exception as error:
            logger.warning("The %s was not updated: %s", name, error)


# Not settings of the adapter's mathematics, or written in another form once the adapter is made.
_NOT_COMPARED = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)


def _refuse_contradictions(name: str, lora: LoraConfig, given: LoraConfig) -> None:
    plain = LoraConfig()
    for field in fields(LoraConfig):
        value, own = getattr(given, field.name), getattr(lora, field.name)
        if field.name not in _NOT_COMPARED and value not in (own, getattr(plain, field.name)):
            raise ValueError(
                f"{field.name}={value!r} contradicts the adapter {name!r}, which has {field.name}={own!r}. Leave out "
                "LoRA's settings: they are those of the adapter."
            )


def _own_fields() -> list[str]:
    return [f.name for f in fields(ProjectionConfig)]
