# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of the projection that LoRA and full-parameter training share."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .forms import fits, is_count

_CHOICES: dict[str, tuple[str, ...]] = {
    "subspace": ("activations", "gradients", "both", "none"),
    "tokens": ("all", "answer"),
    "constraint": ("cone", "orthogonal"),
    "projection": ("update", "gradient"),
    "scope": ("slice", "tensor", "module", "model"),
    "rows_from": ("example", "batch", "set"),
    "rows_dtype": ("float32", "bfloat16", "int8"),
    "missing_reference": ("error", "warn", "ignore"),
}
_COUNTS = ("slices", "rows", "refresh_steps")
_OPTIONAL_COUNTS = ("refresh_samples", "subspace_rank")
_OF_GRADIENTS = ("constraint", "projection", "scope", "slices", "rows", "rows_from")
_OF_REFRESHES = ("refresh_steps", "reference_budget", "refresh_samples")
_OF_ACTIVATIONS = ("subspace_energy", "tokens")
_PAPER_REFRESH_STEPS = {"sft": 30, "dpo": 5}


@dataclass
class ProjectionConfig:
    """How updates are projected away from a reference subspace: the fields of `OGPSAConfig` and `FullParameterConfig`.

    Both classes document the fields. `FullParameterConfig` changes some of the defaults.

    Raises:
        ValueError: If a value is not allowed, or if two values contradict each other.
    """

    subspace: Literal["activations", "gradients", "both", "none"] = field(
        default="activations",
        metadata={
            "help": "The directions that updates are projected away from. 'activations': the leading directions of "
            "every layer's inputs on reference tokens, computed once. 'gradients': reference gradients, recomputed "
            "every few steps. 'both': both of them. 'none': no projection. Then only reference_weight acts, as a KL "
            "penalty or as replay."
        },
    )
    subspace_rank: int | None = field(
        default=None,
        metadata={
            "help": "Number of directions of each layer's inputs. None uses as many as subspace_energy requires. With "
            "subspace='gradients' and constraint='orthogonal', this is the number of leading directions of the rows, "
            "and None keeps all of them."
        },
    )
    subspace_energy: float = field(
        default=1.0,
        metadata={
            "help": "Used if subspace_rank is None. The share of the energy of a layer's inputs on reference tokens "
            "that the directions hold, above 0 and at most 1. There are at most 512 directions, and at most half of "
            "the layer's width. 1.0 uses this maximum."
        },
    )
    tokens: Literal["all", "answer"] = field(
        default="all",
        metadata={"help": "Reference tokens whose inputs are used: 'all' tokens, or only the tokens of the 'answer'."},
    )
    constraint: Literal["cone", "orthogonal"] = field(
        default="cone",
        metadata={
            "help": "'cone': use the closest update along which no reference loss rises, to first order. "
            "'orthogonal': remove the whole component in the span of the reference gradients, as in the paper."
        },
    )
    projection: Literal["update", "gradient"] = field(
        default="update",
        metadata={
            "help": "'update': project the parameter change that the optimizer made. 'gradient': project the gradient "
            "before the optimizer uses it, as in the paper."
        },
    )
    scope: Literal["slice", "tensor", "module", "model"] = field(
        default="tensor",
        metadata={
            "help": "Parameters that are projected together: a slice of each LoRA matrix ('slice'), each matrix "
            "('tensor'), both matrices of a layer ('module'), or all of them ('model')."
        },
    )
    slices: int = field(
        default=16,
        metadata={"help": "With scope='slice': number of equal slices of each matrix."},
    )
    rows: int = field(
        default=8,
        metadata={
            "help": "Number of reference gradients stored per block, over all reference sets. The newest replace the "
            "oldest."
        },
    )
    rows_from: Literal["example", "batch", "set"] = field(
        default="example",
        metadata={
            "help": "One row is the gradient of an 'example', the gradient of a 'batch', or the mean gradient of a "
            "'set'."
        },
    )
    rows_dtype: Literal["float32", "bfloat16", "int8"] = field(
        default="float32",
        metadata={
            "help": "Data type of the stored rows and directions. 'bfloat16' uses half of the memory. 'int8' uses a "
            "quarter of it, and works only with subspace='gradients' and constraint='cone'."
        },
    )
    refresh_steps: int = field(
        default=5,
        metadata={
            "help": "Optimizer steps from one refresh of the rows to the next. There is always another refresh after "
            "the first step, because the gradient of A is zero while B is zero. reference_weight is added once per "
            "refresh, so more frequent refreshes also make its pull stronger."
        },
    )
    reference_budget: float | None = field(
        default=0.075,
        metadata={
            "help": "Passes over reference examples for each pass over a training example. This is the share that "
            "references add to the cost of training. An example with loss='kl' counts 3/2. None uses all examples of "
            "every set at each refresh."
        },
    )
    refresh_samples: int | None = field(
        default=None,
        metadata={
            "help": "Number of reference examples per refresh, over all sets. If it is set, reference_budget is not "
            "used."
        },
    )
    reference_weight: float | None = field(
        default=None,
        metadata={
            "help": "How much of the mean reference gradient is added to the training gradient. It is added only in "
            "steps with a refresh, and only new gradients count. For a reference set with loss='kl', which pulls the "
            "model to the base, None uses 2, or 8 with subspace='gradients' or 'none'. For other losses, which replay "
            "the answers, it uses 1. 0 adds nothing. With subspace='activations', 0 also leaves out the reference "
            "passes."
        },
    )
    missing_reference: Literal["error", "warn", "ignore"] = field(
        default="error",
        metadata={
            "help": "What happens at an optimizer step before there is a subspace, or with reference gradients that "
            "are older than twice refresh_steps. 'error' stops the run. 'warn' and 'ignore' go on, with or without a "
            "warning: without a subspace the step is not projected. If only the gradients of a reference_weight are "
            "missing, the activation subspace still projects."
        },
    )

    def __post_init__(self) -> None:
        self._check_projection()

    def _check_projection(self) -> None:
        self._check_values()
        self._check_effects()

    def _check_values(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not allowed. Use one of: {', '.join(map(repr, allowed))}.")
        for name in _COUNTS + _OPTIONAL_COUNTS:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL_COUNTS:
                continue
            if not is_count(value) or value > sys.maxsize:
                none = ", or None" if name in _OPTIONAL_COUNTS else ""
                raise ValueError(f"{name}={value!r} is not allowed. Use an integer of at least 1{none}.")
        budget = self.reference_budget
        if budget is not None and not (fits(budget, float) and 0 < budget <= sys.float_info.max):
            raise ValueError(f"reference_budget={budget!r} is not allowed. Use a finite number above 0, or None.")
        weight = self.reference_weight
        if weight is not None and not (fits(weight, float) and 0 <= weight <= sys.float_info.max):
            raise ValueError(
                f"reference_weight={weight!r} is not allowed. Use a finite number of at least 0, or None."
            )
        if not self.projects and weight == 0:
            raise ValueError(
                "subspace='none' with reference_weight=0 is plain training. Set a reference_weight above 0, or train "
                "without peft_ogpsa."
            )
        if self.rows_dtype == "int8" and self.constraint == "orthogonal":
            raise ValueError(
                "rows_dtype='int8' is not allowed with constraint='orthogonal', because its basis needs more digits. "
                "Use rows_dtype='bfloat16', or constraint='cone'."
            )
        energy = self.subspace_energy
        if not fits(energy, float) or not 0 < energy <= 1:
            raise ValueError(f"subspace_energy={energy!r} is not allowed. Use a number above 0 and at most 1.")
        if self.rows_dtype == "int8" and self.subspace != "gradients":
            what = "directions" if self.uses_activations else "reference gradients"
            raise ValueError(
                f"rows_dtype='int8' is not allowed with subspace={self.subspace!r}, because its {what} need more "
                "digits. Use rows_dtype='bfloat16', or subspace='gradients'."
            )
        if self.subspace_rank is not None and self.subspace == "gradients":
            if self.constraint != "orthogonal":
                raise ValueError(
                    f"subspace_rank={self.subspace_rank} has no effect with constraint={self.constraint!r}, which "
                    "uses every row. Set subspace_rank=None, or constraint='orthogonal'."
                )
            if self.subspace_rank > self.rows:
                raise ValueError(
                    f"subspace_rank={self.subspace_rank} is more than rows={self.rows} can span. Use at most "
                    f"{self.rows}, or set more rows."
                )

    def _check_effects(self) -> None:
        """Reject settings of a part that the configuration does not use: they would have no effect."""
        chosen = f"subspace={self.subspace!r}"
        if not self.constrains:
            self._refuse_set(_OF_GRADIENTS, chosen, "set subspace='gradients' or 'both'")
        if not self.projects:
            self._refuse_set(("subspace_rank",), chosen, "set another subspace")
        if not self.refreshes:
            self._refuse_set(
                _OF_REFRESHES,
                f"{chosen} and reference_weight={self.reference_weight!r}",
                "set subspace='gradients' or 'both', or a reference_weight above 0",
            )
        if not self.uses_activations:
            self._refuse_set(_OF_ACTIVATIONS, chosen, "set subspace='activations' or 'both'")
        if self.subspace_rank is not None:
            self._refuse_set(("subspace_energy",), f"subspace_rank={self.subspace_rank}", "set subspace_rank=None")
        if self.scope != "slice":
            self._refuse_set(("slices",), f"scope={self.scope!r}", "set scope='slice'")
        if self.refresh_samples is not None and self.reference_budget is not None:
            given = f"refresh_samples={self.refresh_samples}"
            self._refuse_set(("reference_budget",), given, "set refresh_samples=None")

    def _refuse_set(self, names: tuple[str, ...], chosen: str, remedy: str) -> None:
        defaults = {f.name: f.default for f in fields(self)}
        for name in names:
            value = getattr(self, name)
            if value != defaults[name]:
                raise ValueError(f"{name}={value!r} has no effect with {chosen}. Leave it out, or {remedy}.")

    @staticmethod
    def _paper_rule(stage: str) -> dict[str, Any]:
        """The published rule and schedule (arXiv 2602.07892 and its code), as fields.

        Raises:
            ValueError: If `stage` is neither `"sft"` nor `"dpo"`.
        """
        if stage not in _PAPER_REFRESH_STEPS:
            raise ValueError(f"stage={stage!r} is not a stage of the paper. Use 'sft' or 'dpo'.")
        return {
            "subspace": "gradients",
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

    @property
    def uses_activations(self) -> bool:
        """Whether there is an activation subspace."""
        return self.subspace in ("activations", "both")

    @property
    def constrains(self) -> bool:
        """Whether reference gradients constrain the step."""
        return self.subspace in ("gradients", "both")

    @property
    def projects(self) -> bool:
        """Whether there is a subspace at all. Without one, reference gradients are only added."""
        return self.subspace != "none"

    @property
    def projects_changes(self) -> bool:
        """Whether the change of the parameters is projected, and not only the gradient."""
        return self.uses_activations or (self.constrains and self.projection == "update")

    @property
    def refreshes(self) -> bool:
        """Whether reference gradients are computed during training."""
        return self.constrains or self.reference_weight != 0

    @property
    def row_of(self) -> Literal["example", "batch", "set"]:
        """What one row is the gradient of: `rows_from`, or a set if rows are only added to the training gradient."""
        return self.rows_from if self.constrains else "set"

    def ogpsa_dict(self) -> dict[str, Any]:
        """OGPSA's own settings, without LoRA's."""
        return {f.name: getattr(self, f.name) for f in fields(ProjectionConfig)}
