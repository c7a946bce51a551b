# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""What the user sets: LoRA's knobs, and how reference losses are kept from rising."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from peft import LoraConfig, PeftType

SIDECAR_NAME = "ogpsa_config.json"
_FORMAT_VERSION = 1
_CHOICES: dict[str, tuple[str, ...]] = {
    "constraint": ("cone", "orthogonal"),
    "projection": ("update", "gradient"),
    "scope": ("tensor", "module", "model"),
    "rows_from": ("example", "batch", "set"),
    "rows_dtype": ("float32", "bfloat16", "int8"),
    "missing_reference": ("error", "warn", "ignore"),
}
_COUNTS = ("rows", "refresh_steps")
_OPTIONAL_COUNTS = ("refresh_samples", "subspace_rank")
_PAPER_REFRESH_STEPS = {"sft": 30, "dpo": 5}

logger = logging.getLogger(__name__)


@dataclass
class OGPSAConfig(LoraConfig):
    """Configuration of OGPSA: LoRA whose training steps spare a few reference losses.

    It takes every argument of [`~peft.LoraConfig`] besides its own. It is saved as a plain LoRA
    `adapter_config.json`, with OGPSA's own settings beside it in `ogpsa_config.json`. Where this package is imported,
    PEFT's loading functions read both and give back an `OGPSAConfig`; elsewhere, or without the second file, the
    adapter is plain LoRA.

    Args:
        constraint (`str`): `"cone"` takes the closest update along which no reference loss rises to first order;
            `"orthogonal"` removes the whole component in the span of the reference gradients (arXiv 2602.07892).
        projection (`str`): `"update"` projects the parameter change that the optimizer made, `"gradient"` the
            gradient before the optimizer (arXiv 2602.07892).
        scope (`str`): The parameters projected together, called a block: each LoRA matrix (`"tensor"`), both matrices
            of a layer (`"module"`), or all of them (`"model"`).
        rows (`int`): Reference gradients held per block, over all reference sets. The newest replace the oldest.
        rows_from (`str`): What one row is the gradient of: an `"example"`, a `"batch"`, or the mean over a `"set"`.
        rows_dtype (`str`): `"float32"`, `"bfloat16"` for half the memory, or `"int8"` for a quarter, with one scale
            for each row of a matrix. `"int8"` goes with the cone alone: a basis of the span needs more digits.
        subspace_rank (`int`, *optional*): With `constraint="orthogonal"`, keep only so many leading directions of
            the rows. By default all.
        refresh_steps (`int`): Optimizer steps from one refresh of the rows to the next. There is always another after
            the first step: LoRA starts with B = 0, where the gradient of A is zero.
        reference_budget (`float`, *optional*): Reference examples passed forward and backward for each training
            example, which is the share that references add to the cost of training. `OGPSACallback` makes it a number
            of examples at each refresh, at least one. `None` uses all of every set, as the paper does.
        refresh_samples (`int`, *optional*): So many examples at a refresh, over all sets, instead of a budget.
        reference_weight (`float`): On steps that refreshed, add this much of the mean fresh reference gradient to the
            training gradient. This is replay, and 0 means none.
        missing_reference (`str`): What a first optimizer step without any reference rows does: `"error"`, `"warn"`,
            or `"ignore"`, which trains plain LoRA silently.

    Raises:
        ValueError: If a value is not allowed, or if two contradict each other.
    """

    constraint: Literal["cone", "orthogonal"] = field(
        default="cone",
        metadata={
            "help": "'cone': the closest update along which no reference loss rises to first order. 'orthogonal': "
            "remove the whole component in the span of the reference gradients, as in the paper."
        },
    )
    projection: Literal["update", "gradient"] = field(
        default="update",
        metadata={
            "help": "'update': project the parameter change that the optimizer made. 'gradient': project the gradient "
            "before the optimizer, as in the paper."
        },
    )
    scope: Literal["tensor", "module", "model"] = field(
        default="tensor",
        metadata={
            "help": "The parameters projected together: each LoRA matrix ('tensor'), both matrices of a layer "
            "('module'), or all of them ('model')."
        },
    )
    rows: int = field(
        default=48,
        metadata={"help": "Reference gradients held per block, over all sets. The newest replace the oldest."},
    )
    rows_from: Literal["example", "batch", "set"] = field(
        default="example",
        metadata={"help": "What one row is the gradient of: an 'example', a 'batch', or the mean over a 'set'."},
    )
    rows_dtype: Literal["float32", "bfloat16", "int8"] = field(
        default="float32",
        metadata={
            "help": "The type rows are stored in. 'bfloat16' halves their memory, 'int8' (with constraint='cone') "
            "quarters it."
        },
    )
    subspace_rank: int | None = field(
        default=None,
        metadata={"help": "With constraint='orthogonal': keep only so many leading directions. None keeps all."},
    )
    refresh_steps: int = field(
        default=5,
        metadata={
            "help": "Optimizer steps from one refresh of the rows to the next. There is always another after the "
            "first step, because with B = 0 the gradient of A is zero."
        },
    )
    reference_budget: float | None = field(
        default=0.1,
        metadata={
            "help": "Reference examples passed for each training example: the share that references add to the cost "
            "of training. None uses all of every set at each refresh."
        },
    )
    refresh_samples: int | None = field(
        default=None,
        metadata={"help": "So many reference examples at a refresh, over all sets, instead of reference_budget."},
    )
    reference_weight: float = field(
        default=0.0,
        metadata={
            "help": "How much of the mean fresh reference gradient is added to the training gradient on steps that "
            "refreshed. This is replay; 0 means none."
        },
    )
    missing_reference: Literal["error", "warn", "ignore"] = field(
        default="error",
        metadata={
            "help": "What a first optimizer step without reference rows does: 'error', 'warn', or 'ignore' (train as "
            "plain LoRA)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("OGPSA")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not allowed. Use one of: {', '.join(map(repr, allowed))}.")
        for name in _COUNTS + _OPTIONAL_COUNTS:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL_COUNTS:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                none = ", or None" if name in _OPTIONAL_COUNTS else ""
                raise ValueError(f"{name}={value!r} is not allowed. Use an integer of at least 1{none}.")
        budget = self.reference_budget
        if budget is not None and (
            not isinstance(budget, int | float) or isinstance(budget, bool) or not 0 < budget < math.inf
        ):
            raise ValueError(f"reference_budget={budget!r} is not allowed. Use a finite number above 0, or None.")
        weight = self.reference_weight
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < math.inf:
            raise ValueError(f"reference_weight={weight!r} is not allowed. Use a finite number of at least 0.")
        if self.rows_dtype == "int8" and self.constraint == "orthogonal":
            raise ValueError(
                "rows_dtype='int8' is not allowed with constraint='orthogonal', whose basis needs more digits. Use "
                "'bfloat16', or constraint='cone'."
            )
        if self.subspace_rank is not None:
            if self.constraint != "orthogonal":
                raise ValueError(
                    f"subspace_rank={self.subspace_rank} has no meaning with constraint={self.constraint!r}, which "
                    "uses every row. Set subspace_rank=None, or constraint='orthogonal'."
                )
            if self.subspace_rank > self.rows:
                raise ValueError(
                    f"subspace_rank={self.subspace_rank} is more than rows={self.rows} can span. Use at most "
                    f"{self.rows}, or more rows."
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
        if stage not in _PAPER_REFRESH_STEPS:
            raise ValueError(f"stage={stage!r} is not in the paper. Use 'sft' or 'dpo'.")
        rule: dict[str, Any] = {
            "constraint": "orthogonal",
            "projection": "gradient",
            "scope": "tensor",
            "rows": 2,
            "rows_from": "set",
            "refresh_steps": _PAPER_REFRESH_STEPS[stage],
            "reference_budget": None,
            "refresh_samples": None,
            "reference_weight": 0.0,
        }
        return cls(**{**rule, **knobs})

    def ogpsa_dict(self) -> dict[str, Any]:
        """OGPSA's own settings, without LoRA's."""
        return {name: getattr(self, name) for name in _own_fields()}

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
        from .card import save_card  # here, because it imports this module

        try:
            save_card(save_directory)
        except Exception as error:  # whatever is wrong with a card, it must not cost the adapter
            logger.warning("The model card was not renewed: %s", error)

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
        try:
            return cls(**{f.name: getattr(lora, f.name) for f in fields(lora)}, **settings)
        except ValueError as error:
            raise ValueError(f"{SIDECAR_NAME} is damaged ({error}). {remedy}") from error


def _own_fields() -> list[str]:
    inherited = {f.name for f in fields(LoraConfig)}
    return [f.name for f in fields(OGPSAConfig) if f.name not in inherited]
