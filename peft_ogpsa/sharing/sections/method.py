# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The section of the card on the method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ...references.losses.kl import KLLoss
from ...tuner.config import OGPSAConfig

_OGPSA = (
    "OGPSA (Orthogonal Gradient Projection for Safety Alignment, [arXiv 2602.07892](https://arxiv.org/abs/2602.07892))"
)
_NO_PROJECTION = (
    "LoRA with a penalty on reference sets: a KL penalty if a set has `loss=kl`, or replay of its answers. Training "
    "used no projection"
)
_RULES = {
    ("cone", "update"): "the update that the optimizer made was replaced by the closest one along which no reference "
    "loss rises, to first order",
    ("cone", "gradient"): "the gradient was replaced by the closest one whose descent raises no reference loss, to "
    "first order. The optimizer then used this gradient",
    ("orthogonal", "update"): "the component in the span of the reference gradients was removed from the update that "
    "the optimizer made, so that no reference loss changes, to first order",
    ("orthogonal", "gradient"): "the component in the span of the reference gradients was removed from the gradient "
    "before the optimizer used it",
}
_SCOPES = {
    "slice": "one of the {slices} slices of a LoRA matrix",
    "tensor": "one LoRA matrix",
    "module": "both matrices of a layer",
    "model": "all LoRA matrices",
}
_ROWS_FROM = {"example": "one example", "batch": "one batch", "set": "the mean loss over one reference set"}


def referenced(settings: Mapping[str, Any] | None, run: Mapping[str, Any]) -> bool:
    """Whether training used reference sets, as far as it is recorded. `settings` are the projector's, or None."""
    return settings is not None or run.get("method") in ("ogpsa", "paper")


def projected(settings: Mapping[str, Any] | None, run: Mapping[str, Any]) -> bool:
    """Whether training used a projection, as far as it is recorded."""
    return referenced(settings, run) and (settings or {}).get("subspace") != "none"


def method_section(settings: Mapping[str, Any] | None, run: Mapping[str, Any]) -> str:
    """Describe the method. `settings` are the projector's, or None if there are none or they are not recorded."""
    if settings is None and projected(settings, run):
        rule = " This was the paper's rule." if run["method"] == "paper" else ""
        return (
            f"## Method\n\n{_OGPSA}, applied to a plain LoRA adapter.{rule} The settings of the projection are not "
            "recorded."
        )
    if settings is None:
        if run.get("method"):
            return "## Method\n\nPlain LoRA. Training used no projection."
        return (
            "## Method\n\nPlain LoRA, as far as the files in this folder show: there is no `ogpsa_config.json`. "
            "Whether training used a projection is not recorded."
        )
    rule = f"{_OGPSA}, applied to LoRA's matrices" if projected(settings, run) else _NO_PROJECTION
    lines = [f"{rule}. The reference sets represent the abilities to preserve.", ""]
    subspace = settings["subspace"]
    if subspace in ("activations", "both"):
        lines += _of_activations(settings)
    if subspace in ("gradients", "both"):
        lines += _of_gradients(settings)
    lines += _of_references(settings, subspace)
    if settings["missing_reference"] != "error":
        lines.append(
            f"- `missing_reference={settings['missing_reference']}`: without references, the training would have been "
            "plain LoRA."
        )
    return "## Method\n\n" + "\n".join(lines)


def _of_activations(settings: Mapping[str, Any]) -> list[str]:
    rank, energy = settings["subspace_rank"], settings["subspace_energy"]
    size = "half of the layer's input width, at most 512"
    if rank:
        size = f"{rank}"
    elif energy < 1:
        size = f"as many as are needed for {energy:.0%} of the inputs' energy"
    tokens = "all tokens" if settings["tokens"] == "all" else "the answers' tokens"
    return [
        "- Activation subspace: each layer's A is orthogonal to the leading directions of the layer's inputs on the "
        "references. Along these directions, the layer's output is the same as the base's. Number of directions per "
        f"layer: {size}. The directions are computed from {tokens} of the references. This is not the paper's rule. "
        "It follows Gradient Projection Memory (Saha, Garg and Roy, 2021)."
    ]


def _of_gradients(settings: Mapping[str, Any]) -> list[str]:
    rule = _RULES[settings["constraint"], settings["projection"]]
    orthogonal = settings["constraint"] == "orthogonal"
    rank = settings["subspace_rank"] if orthogonal and settings["subspace"] == "gradients" else None
    leading = f" Only the {rank} leading directions of these gradients were used." if rank else ""
    lines = [
        f"- At every optimizer step, {rule}.",
        f"- {_paper_note(settings)}",
        f"- One block of parameters contains {_SCOPES[settings['scope']].format(**settings)} "
        f"(`scope={settings['scope']}`). It is projected against at most {settings['rows']} reference gradients. Each "
        f"one is the gradient of {_ROWS_FROM[settings['rows_from']]} and is stored in {settings['rows_dtype']}."
        f"{leading}",
    ]
    if settings["projection"] == "gradient":
        lines.append(
            "- The update that an optimizer such as AdamW makes from the projected gradient is not itself projected."
        )
    return lines


def _of_references(settings: Mapping[str, Any], subspace: str) -> list[str]:
    weight = settings["reference_weight"]
    if subspace == "activations" and weight == 0:
        return ["- No reference example was used during training, after the subspace was built."]
    samples, budget = settings["refresh_samples"], settings["reference_budget"]
    if samples is None and budget is not None:
        amount = f"The budget was {budget:g} passes of a reference example for each pass of a training example"
    else:
        amount = f"Each refresh used {samples or 'all'} reference examples"
    lines = [
        "- The reference gradients were refreshed before and after the first optimizer step, and then every "
        f"{settings['refresh_steps']} steps. {amount}."
    ]
    if weight != 0:
        null_space = subspace in ("activations", "both")
        of_kl = KLLoss.null_space_weight if null_space else KLLoss.default_weight
        value = f"{of_kl:g} for sets with `loss=kl`, 1 for other losses" if weight is None else f"{weight:g}"
        lines.append(
            f"- Reference weight: {value}. After each refresh, the mean fresh reference gradient was multiplied by "
            "this weight and added to the training gradient."
        )
    return lines


def _paper_note(settings: Mapping[str, Any]) -> str:
    free = ("rows", "rows_dtype", "refresh_steps", "missing_reference")
    stages: tuple[Literal["sft", "dpo"], ...] = ("sft", "dpo")
    for stage in stages:
        paper = OGPSAConfig.paper(stage).ogpsa_dict()
        if all(settings[name] == paper[name] for name in paper if name not in free):
            if settings["refresh_steps"] == paper["refresh_steps"]:
                return f"This is the paper's rule and its {stage.upper()} schedule, on LoRA's matrices."
            if stage == "dpo":
                return "This is the paper's rule on LoRA's matrices, with a schedule other than the paper's."
    if settings["constraint"] == "cone":
        return (
            "This is not the paper's rule, which removes the whole component in the span of the reference gradients "
            "from the gradient. The one-sided constraint follows Gradient Episodic Memory (Lopez-Paz and Ranzato, "
            "2017)."
        )
    return "This is a variant of the paper's rule."
