# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""What a resumed run needs to continue exactly: both subspaces and the counters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import distributed
from .activation_subspace import PREFIX
from .building import INPUTS, Builder
from .config import ProjectionConfig
from .diagnostics import Diagnostics
from .forms import Form, check_form
from .parameters import Parameters
from .refreshing import SHAPE, Refresher
from .schedule import Schedule
from .step import Step

_MASTERS = "masters"
_FORM: Form = {
    "config": dict[str, Any],
    "steps": int,
    "moved": int,
    "steps_since_refresh": int,
    "fresh": list[int],
    "weights": dict[str, float],
    "fingerprint": dict[str, float],
    "reference_examples": int,
    "refreshes": int,
}
_FORM_OF_ROWS: Form = {"rows": int, "sets": list[str | None], "cursor": int, "order": list[str]}
_FORM_OF_INPUT: Form = {
    "place": int,
    "layers": list[str],
    "energies": list[float],
    "energy": float,
    "held_out": float | None,
}


class State:
    """Saves and restores the parts of a projector.

    Args:
        parameters (`Parameters`): The parameters in training.
        refresher (`Refresher`): Holds the gradient subspace.
        builder (`Builder`): Holds the activation subspace.
        step (`Step`): Holds the float32 copy of parameters of low precision.
        schedule (`Schedule`): The counters.
        diagnostics (`Diagnostics`): Counts the refreshes.
    """

    def __init__(
        self,
        parameters: Parameters,
        refresher: Refresher,
        builder: Builder,
        step: Step,
        schedule: Schedule,
        diagnostics: Diagnostics,
    ) -> None:
        self._parameters, self._refresher, self._builder = parameters, refresher, builder
        self._step, self._schedule, self._diagnostics = step, schedule, diagnostics

    def save(self) -> dict[str, Any]:
        """See `Projector.state_dict`."""
        tensors, rest = self._refresher.state_dict()
        if self._refresher.subspace is not None and self._step.masters is not None:
            tensors |= self._refresher.subspace.blocks.gathered(_MASTERS, self._step.masters)
        if self._builder.subspace is not None:
            directions, rest["inputs"] = self._builder.subspace.state_dict()
            tensors |= directions
        if not rest:
            raise RuntimeError("There is no subspace to save yet. Call refresh() first.")
        rest |= {
            "config": self._parameters.targets.config.ogpsa_dict(),
            **self._schedule.state_dict(),
            "fresh": self._refresher.fresh,
            "weights": self._refresher.weights,
            "fingerprint": self._parameters.fingerprint(),
            "reference_examples": self._diagnostics.reference_examples,
            "refreshes": self._diagnostics.refreshes,
        }
        return {"tensors": tensors, "rest": rest}

    def load(self, state: Mapping[str, Any]) -> None:
        """See `Projector.load_state_dict`."""
        tensors, rest = dict(state["tensors"]), state["rest"]
        config = self._parameters.targets.config
        _check_forms(rest)
        _check_settings(config, rest["config"])
        masters, directions = (
            {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
            for prefix in (f"{_MASTERS}.", PREFIX)
        )
        distributed.reshard(self._parameters.targets.model)
        self._parameters.targets.forget()
        subspace = self._refresher.restored(config, tensors, rest)
        activations = self._builder.restored(config, directions, rest.get("inputs"))
        missing = []
        if activations is None and config.uses_activations:
            missing.append("activation subspace")
        if subspace is None and config.refreshes:
            missing.append("reference gradients")
        if missing:
            now, saved = (
                ", ".join(f"{name}={own.get(name)!r}" for name in ("subspace", "reference_weight"))
                for own in (config.ogpsa_dict(), rest["config"])
            )
            raise ValueError(
                f"The saved state has no {' and no '.join(missing)}, which {now} needs. It was saved with {saved}. "
                "Use the saved settings, or rebuild the subspace from the references."
            )
        self._parameters.check_fingerprint(rest["fingerprint"])
        if masters:
            if subspace is None:
                raise ValueError("The saved state is damaged: it has parameters in float32, but no rows.")
            subspace.blocks.check(_MASTERS, masters)
        # All checks come before this line, so that a rejected state changes nothing.
        self._refresher.hold(subspace, config)
        self._refresher.fresh = list(rest["fresh"])
        self._refresher.weights = {name: float(weight) for name, weight in rest["weights"].items()}
        self._builder.drop()
        if activations is not None:
            self._builder.hold(activations, config)
        self._step.masters = None
        if masters and subspace is not None:
            self._step.masters = subspace.blocks.zeros()
            subspace.blocks.scatter(_MASTERS, masters, self._step.masters)
        self._schedule.load_state_dict(rest)
        self._diagnostics.reference_examples = int(rest["reference_examples"])
        self._diagnostics.refreshes = int(rest["refreshes"])


def _check_forms(rest: Any) -> None:
    """Check what a file said, so that a damaged one is no error from inside.

    Raises:
        ValueError: If an entry is missing, or has another type.
    """
    check_form(rest, _FORM, "The saved state")
    if "rows" in rest:
        check_form(rest, _FORM_OF_ROWS, "The saved state")
    if not all(0 <= slot < rest.get("rows", 0) for slot in rest["fresh"]):
        raise ValueError("The saved state is damaged: fresh has an entry that is no row.")
    inputs = rest.get("inputs")
    if inputs is not None and (not isinstance(inputs, list) or not inputs):
        raise ValueError("The saved state is damaged: inputs has no entries.")
    for item in inputs or ():
        check_form(item, _FORM_OF_INPUT, "The saved state")
        if not item["layers"]:
            raise ValueError("The saved state is damaged: layers is empty.")


def _check_settings(config: ProjectionConfig, saved: Mapping[str, Any]) -> None:
    differing = sorted(
        f"{field}={value!r} (saved: {saved.get(field)!r})"
        for field, value in config.ogpsa_dict().items()
        if field in ("rows_from", *SHAPE, *INPUTS) and saved.get(field) != value
    )
    if differing:
        raise ValueError(
            f"The saved subspace was made with other settings: {', '.join(differing)}. Use the saved settings, or "
            "rebuild the subspace from the references."
        )
