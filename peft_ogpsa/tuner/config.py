# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""What the user sets: LoRA's knobs, and how reference losses are kept from rising."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from peft import LoraConfig, PeftType

from ..core.config import ProjectionConfig

SIDECAR_NAME = "ogpsa_config.json"
_FORMAT_VERSION = 1

# Initialisations after which the base without the adapter is not the model that was loaded.
_MOVING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")

logger = logging.getLogger(__name__)

AFTER_SAVING: dict[str, Callable[[str], object]] = {}
"""What else is written when a configuration is saved, by name; each is given the folder."""


@dataclass
class OGPSAConfig(ProjectionConfig, LoraConfig):
    """Configuration of OGPSA: LoRA whose training steps spare a few reference losses.

    It takes every argument of [`~peft.LoraConfig`] besides its own. It is saved as a plain LoRA
    `adapter_config.json`, with OGPSA's own settings beside it in `ogpsa_config.json`. Where this package is imported,
    PEFT's loading functions read both and give back an `OGPSAConfig`; elsewhere, or without the second file, the
    adapter is plain LoRA.

    Args:
        subspace (`str`): What updates are projected away from. `"activations"`: the leading directions of every
            layer's inputs on reference tokens, found once, before the first step. A stays in their complement, so
            that the layer's output on these inputs stays that of the base. `"gradients"`: reference gradients, which
            are computed anew during training and constrain the step to first order. `"both"`: the first takes the
            step, then the second acts inside its complement.
        subspace_rank (`int`, *optional*): Of an activation subspace: the directions of each layer's inputs; `None`
            takes as many as `subspace_energy` asks for. With `subspace="gradients"` and `constraint="orthogonal"`:
            keep only so many leading directions of the rows; `None` keeps all.
        subspace_energy (`float`): Without `subspace_rank`: the share of the energy (mean squared length) of a layer's
            inputs on reference tokens that its directions hold, above 0 and at most 1. There are at most 512
            directions, and at most half of the input's width; at 1.0, the default, as many as that. Lower shares keep
            less: in some layers a few directions hold most of the energy (docs/tax.md).
        tokens (`str`): Whose inputs count for an activation subspace: `"all"` tokens of a reference example, or those
            of the `"answer"`.
        constraint (`str`): `"cone"` takes the closest update along which no reference loss rises to first order;
            `"orthogonal"` removes the whole component in the span of the reference gradients (arXiv 2602.07892).
        projection (`str`): `"update"` projects the parameter change that the optimizer made, `"gradient"` the
            gradient before the optimizer (arXiv 2602.07892).
        scope (`str`): The parameters projected together, called a block: a slice of each LoRA matrix (`"slice"`; not
            of sharded ones), each matrix (`"tensor"`), both matrices of a layer (`"module"`), or all of them
            (`"model"`). Smaller blocks keep more, as the constraint binds in each of them.
        slices (`int`): With `scope="slice"`, into how many slices of equal size each matrix is cut, or the largest
            number below that divides its size.
        rows (`int`): Reference gradients held per block, over all reference sets. The newest replace the oldest.
        rows_from (`str`): What one row is the gradient of: an `"example"`, a `"batch"`, or the mean over a `"set"`.
        rows_dtype (`str`): `"float32"`, `"bfloat16"` for half the memory, or `"int8"` for a quarter, with one scale
            for each row of a matrix. `"int8"` goes with the cone alone: a basis of the span needs more digits. The
            directions of an activation subspace are held in the same type.
        refresh_steps (`int`): Optimizer steps from one refresh of the rows to the next. There is always another after
            the first step: LoRA starts with B = 0, where the gradient of A is zero.
        reference_budget (`float`, *optional*): Passes of reference examples for each pass of a training example,
            which is the share that references add to the cost of training. `OGPSACallback` makes it a number of
            examples at each refresh, at least one; one with `loss="kl"` counts 3/2, as the base is passed forward for
            it, too. `None` uses all of every set, as the paper does.
        refresh_samples (`int`, *optional*): So many examples at a refresh, over all sets, instead of a budget.
        reference_weight (`float`, *optional*): On steps that refreshed, add this much of the mean fresh reference
            gradient to the training gradient, with `projection="gradient"` after its projection. At 5, and 5
            `refresh_steps`, a reference gradient counts as much as a training gradient. With `loss="kl"` this pulls
            the model to its base, with other losses it replays the answers. `None` adds nothing with
            `subspace="activations"`, which then needs no reference example during training; else it takes 8 for sets
            with `loss="kl"` and 1 for other losses, which was measured to suit each (docs/tax.md). 0 adds nothing.
        missing_reference (`str`): What a first optimizer step without any reference rows does: `"error"`, `"warn"`,
            or `"ignore"`, which trains plain LoRA silently.

    Raises:
        ValueError: If a value is not allowed, or if two contradict each other.
    """

    def __post_init__(self) -> None:
        LoraConfig.__post_init__(self)
        self.peft_type = PeftType("OGPSA")
        self._check_projection()
        if self.uses_activations:
            self._check_lora()

    def _check_lora(self) -> None:
        """Refuses what an activation subspace cannot hold in place."""
        start = self.init_lora_weights
        if isinstance(start, str) and start.lower().startswith(_MOVING_STARTS):
            raise ValueError(
                f"init_lora_weights={start!r} is not allowed with subspace={self.subspace!r}: it moves part of the "
                "base's weights into the adapter, which then acts on reference inputs. Use init_lora_weights=True, or "
                "subspace='gradients'."
            )
        for name in ("use_dora", "lora_bias", "target_parameters"):
            if getattr(self, name, None):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not allowed with subspace={self.subspace!r}: it changes a "
                    "layer's output on reference inputs in other ways than through A. Leave it out, or use "
                    "subspace='gradients'."
                )

    @property
    def init_weights(self) -> Any:
        """`init_lora_weights`, by the name that PEFT's saving uses for every type but its own LORA."""
        return self.init_lora_weights

    @init_weights.setter
    def init_weights(self, value: Any) -> None:
        self.init_lora_weights = value

    @classmethod
    def paper(cls, stage: Literal["sft", "dpo"], **knobs: Any) -> OGPSAConfig:
        """The published rule and schedule (arXiv 2602.07892 and its code).

        The gradient of each tensor loses its component in the span of one mean gradient per reference set (at most
        two sets, unless `rows` is raised), recomputed from all reference examples every 30 (SFT) or 5 (DPO) optimizer
        steps. The paper trains all weights; this is its rule on LoRA's.

        Args:
            stage (`str`): `"sft"` or `"dpo"`.
            **knobs: LoRA's arguments, and any of OGPSA's, which then override the paper's.

        Raises:
            ValueError: If `stage` is neither.
        """
        return cls(**{**cls._paper_rule(stage), **knobs})

    def lora_config(self) -> LoraConfig:
        """An independent plain `LoraConfig` with the same LoRA settings."""
        # Built past __init__, which would warn a second time about questionable LoRA settings.
        plain = object.__new__(LoraConfig)
        own = _own_fields()
        plain.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k not in own}))
        plain.peft_type = PeftType.LORA
        return plain

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes a plain LoRA `adapter_config.json`, OGPSA's own settings to `ogpsa_config.json`, and the model card.

        Args:
            save_directory (`str`): The folder, made if need be.
            **kwargs: As for [`~peft.LoraConfig`].
        """
        self.lora_config().save_pretrained(save_directory, **kwargs)
        settings = json.dumps({"format_version": _FORMAT_VERSION, **self.ogpsa_dict()}, indent=2)
        with open(os.path.join(save_directory, SIDECAR_NAME), "w", encoding="utf-8") as file:
            file.write(settings + "\n")
        for name, act in AFTER_SAVING.items():
            try:
                act(save_directory)
            except Exception as error:  # whatever goes wrong here, it must not cost the adapter
                logger.warning("The %s was not renewed: %s", name, error)

    @classmethod
    def from_lora_config(cls, lora: LoraConfig, sidecar: str | os.PathLike[str]) -> OGPSAConfig:
        """Joins a plain LoRA configuration with the OGPSA settings in a saved `ogpsa_config.json`.

        Args:
            lora ([`~peft.LoraConfig`]): LoRA's settings.
            sidecar (`str` or `os.PathLike`): The file with OGPSA's.

        Raises:
            ValueError: If the file is damaged, or of a format that this version does not know.
        """
        remedy = f"Restore it, or delete it to load the adapter as plain LoRA: {os.fspath(sidecar)}"
        try:
            with open(sidecar, encoding="utf-8") as file:
                settings = json.load(file)
        except ValueError as error:
            raise ValueError(f"{SIDECAR_NAME} is damaged ({error}). {remedy}") from error
        if not isinstance(settings, dict) or "format_version" not in settings:
            raise ValueError(f"{SIDECAR_NAME} is damaged (it has no format_version). {remedy}")
        version = settings.pop("format_version")
        if version != _FORMAT_VERSION:
            raise ValueError(
                f"{SIDECAR_NAME} has format_version={version!r}, but this version of peft_ogpsa reads "
                f"{_FORMAT_VERSION} alone. Upgrade peft_ogpsa. {remedy}"
            )
        if unknown := sorted(settings.keys() - _own_fields()):
            raise ValueError(f"{SIDECAR_NAME} has unknown settings: {', '.join(unknown)}. {remedy}")
        # Files of versions before there was a choice.
        settings.setdefault("subspace", "gradients")
        try:
            return cls(**{f.name: getattr(lora, f.name) for f in fields(lora)}, **settings)
        except ValueError as error:
            raise ValueError(f"{SIDECAR_NAME} is damaged ({error}). {remedy}") from error


def _own_fields() -> list[str]:
    return [f.name for f in fields(ProjectionConfig)]
