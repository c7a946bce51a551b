# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The `ogpsa:` mapping in a training tool's configuration file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cli.datasets import PromptSet, reference_sets
from ..core.forms import is_count
from ..references.sets import ReferenceSet
from ..tuner.config import OGPSAConfig
from .callback import ToolCallback

PROJECTION = tuple(OGPSAConfig().ogpsa_dict())
"""Options of the projection. They are fields of `OGPSAConfig`."""

DATA = ("references", "reference_samples", "reference_max_length")
"""Options of the reference sets. They have the names that they have in `ogpsa sft`."""

RUN = ("batch_size", "save_subspace", "resume_from", "rebuild_subspace")
"""Options of `OGPSACallback`."""

_EXAMPLE = "for example references: {general: 'prompts:general'}"


@dataclass(frozen=True)
class Settings:
    """The settings of OGPSA in a training tool.

    Attributes:
        config: The settings of the projection.
        sets: The reference sets. The base model still has to answer those that are a `PromptSet`.
        run: Arguments of `OGPSACallback`.
    """

    config: OGPSAConfig
    sets: Sequence[ReferenceSet | PromptSet]
    run: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, options: Any, *, beta: float = ReferenceSet.beta) -> Settings:
        """Check the mapping and load the reference sets that it names.

        Args:
            options: The mapping. Its keys are the projection's fields of `OGPSAConfig`; `references`, as a mapping
                `NAME: SPEC` or as a list of `NAME=SPEC` (see `ogpsa sft`), `reference_samples` and
                `reference_max_length`; and `batch_size`, `save_subspace`, `resume_from` and `rebuild_subspace` of
                `OGPSACallback`.
            beta: The tool's beta of DPO, for reference sets with `loss="dpo"`.

        Raises:
            ValueError: If it is not a mapping, an option is unknown or has a value that is not allowed, or a reference
                set cannot be loaded.
        """
        if not isinstance(options, Mapping):
            raise ValueError(f"ogpsa={options!r} must be a mapping with at least references, {_EXAMPLE}.")
        for name in options:
            if name not in PROJECTION + DATA + RUN:
                raise ValueError(f"ogpsa: {name} is not an option. {_hint(str(name))}")
        try:
            config = OGPSAConfig(**{name: options[name] for name in PROJECTION if name in options})
            sets = reference_sets(
                _entries(options.get("references")),
                _count(options, "reference_samples", ReferenceSet.samples),
                _count(options, "reference_max_length", ReferenceSet.max_length),
                beta,
            )
        except ValueError as error:
            raise ValueError(f"ogpsa: {error}") from error
        return cls(config, sets, {name: options[name] for name in RUN if name in options})

    def callback(self, *, seed: int = 0) -> ToolCallback:
        """Make the callback that the tool passes to its trainer.

        Args:
            seed: Seed of the order in which reference examples are drawn.
        """
        return ToolCallback(self.sets, config=self.config, seed=seed, **self.run)


def _entries(references: Any) -> list[str]:
    """Return the reference sets as `NAME=SPEC`."""
    if isinstance(references, Mapping):
        references = [f"{name}={spec}" for name, spec in references.items()]
    elif isinstance(references, str):  # YAML without the dash
        references = [references]
    if not references:
        raise ValueError(f"references is missing, so there is no ability to preserve. Give at least one, {_EXAMPLE}.")
    if not isinstance(references, list | tuple) or not all(isinstance(entry, str) for entry in references):
        raise ValueError(f"references={references!r} must be a mapping NAME: SPEC or a list of NAME=SPEC, {_EXAMPLE}.")
    return list(references)


def _count(options: Mapping[str, Any], name: str, default: int | None) -> int:
    value = options.get(name, default)
    if not is_count(value):
        raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
    return value


def _hint(name: str) -> str:
    """Say which options there are that have a similar name."""
    near = difflib.get_close_matches(name, PROJECTION + DATA + RUN)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    if hasattr(OGPSAConfig(), name):
        return "LoRA's settings are those of the tool: set them there."
    return f"The options are: {', '.join(PROJECTION + DATA + RUN)}."
