# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The grid: ways to make a model safe, by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Method:
    """A way of training.

    All that draw reference examples draw as many at the same steps: a tenth of the training examples, but for those
    whose overrides say otherwise.

    Attributes:
        overrides: OGPSA's settings; `None` trains without projection.
        paper: Start from the published rule and schedule.
        answers: Whose answers the references have: `"given"` (of the data) or `"own"` (of the base model).
        loss: Of the references: `"answer"` (cross-entropy) or `"kl"` (divergence from the base).
        replay: Without projection: weight of the mean gradient of the reference examples.
        merged: Whether the reference sets are one, of all their rows.
        budget: Of replay: reference examples for each training example.
        lookalikes: Share of benign look-alikes, with the base's own answers, among the training rows.
        first_tokens: Of every training answer, so many tokens count; `None` counts all.
        learning_rate: Times that of the others.
        optimizer: Of transformers' names.
        whole: Train all weights instead of an adapter.
        linear: Of whole weights, train those of the blocks' linear layers alone.
        osf: Train them outside their leading singular directions, with PEFT's OSF.
        start: Plain LoRA that OGPSA with these overrides has put into the complement of its subspace: A is then
            trained (`"free"`), or not (`"frozen"`).
        gain: Whether A's start and steps are enlarged by what the activation subspace leaves of the inputs.
        held_b: Whether B, too, is held: see `held_b.HeldB`.
    """

    overrides: dict[str, Any] | None = None
    paper: bool = False
    answers: str = "own"
    loss: str = "answer"
    merged: bool = False
    replay: float = 0.0
    budget: float = 0.1
    lookalikes: float = 0.0
    first_tokens: int | None = None
    learning_rate: float = 1.0
    optimizer: str = "adamw_torch_fused"
    whole: bool = False
    linear: bool = False
    osf: bool = False
    start: Literal["free", "frozen"] | None = None
    gain: bool = True
    held_b: bool = False

    @property
    def references(self) -> bool:
        """Whether it draws reference examples."""
        return self.paper or self.overrides is not None or self.replay > 0

    def recorded(self) -> dict[str, Any]:
        """The fields for a result file, under the names that the finished runs gave them."""
        names = {"overrides": "knobs", "lookalikes": "contrast"}
        return {names.get(name, name): value for name, value in asdict(self).items()}


BARE: dict[str, Any] = {
    "subspace": "gradients",
    "scope": "tensor",
    "reference_weight": 0.0,
    "rows": 24,
    "refresh_steps": 5,
    "refresh_samples": 4,
}


def cone(answers: str = "own", loss: str = "answer", lookalikes: float = 0.0, **overrides: Any) -> Method:
    """The cone on the update of each tensor, and settings of its own, whatever the defaults are."""
    return Method(BARE | overrides, answers=answers, loss=loss, lookalikes=lookalikes)


def null_space(lookalikes: float = 0.0, **overrides: Any) -> Method:
    """The activation subspace of the base's own answers; with a weight, 2 reference examples for 40 of training."""
    fixed: dict[str, Any] = {"subspace": "activations", "reference_weight": 0.0}
    return Method(fixed | overrides, loss="kl", lookalikes=lookalikes)


WHOLE: dict[str, Method] = {
    "plain": Method(whole=True),
    "paper": Method({"rows": 4, "rows_dtype": "bfloat16"}, paper=True, answers="given", whole=True),
    "paper, weight 1": Method(
        {"rows": 4, "rows_dtype": "bfloat16", "reference_weight": 1.0}, paper=True, answers="given", whole=True
    ),
    "cone": Method(BARE | {"rows": 8, "rows_dtype": "bfloat16"}, answers="given", whole=True),
    "cone, weight 1": Method(
        BARE | {"rows": 8, "rows_dtype": "bfloat16", "reference_weight": 1.0}, answers="given", whole=True
    ),
    "plain, linear layers": Method(whole=True, linear=True),
    "null space": Method({"subspace": "activations"}, whole=True, linear=True),
}
"""Of all weights, as the paper trains. A reference weight with the paper's rule is what its published code does under
ZeRO-2, where reference gradients are left over in the step that follows a refresh."""

SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 400.0}
"""Makes a first step about as long as AdamW's."""

METHODS: dict[str, Method] = {
    "plain": Method(),
    "plain, half the learning rate": Method(learning_rate=0.5),
    "paper": Method(paper=True, overrides={"rows": 4}, answers="given"),
    "paper, own answers": Method(paper=True, overrides={"rows": 4}),
    "paper, weight 1": Method(paper=True, overrides={"rows": 4, "reference_weight": 1.0}, answers="given"),
    "orthogonal": Method(BARE | {"constraint": "orthogonal"}),
    "cone, given answers": cone("given"),
    "cone": cone(),
    "cone, weight 1": cone(reference_weight=1.0),
    "cone, weight 3": cone(reference_weight=3.0),
    "cone, given answers, weight 1": cone("given", reference_weight=1.0),
    "cone, slices, given answers, weight 1": cone("given", scope="slice", reference_weight=1.0),
    "cone, slices, given answers, weight 5": cone("given", scope="slice", reference_weight=5.0),
    "replay 1, given answers": Method(answers="given", replay=1.0),
    "replay 1": Method(replay=1.0),
    "replay 3": Method(replay=3.0),
    "replay 1, twentieth": Method(replay=1.0, budget=0.05),
    "replay 1, quarter": Method(replay=1.0, budget=0.25),
    "KL 1": Method(loss="kl", replay=1.0),
    "KL 5": Method(loss="kl", replay=5.0),
    "KL 8, 2 of 40": Method(loss="kl", replay=8.0, budget=0.05),
    "cone of KL": cone(loss="kl"),
    "cone of KL, weight 1": cone(loss="kl", reference_weight=1.0),
    "cone of KL, weight 5": cone(loss="kl", reference_weight=5.0),
    "cone of KL, weight 5, every 10 steps": cone(
        loss="kl", reference_weight=5.0, refresh_steps=10, refresh_samples=8, rows=16
    ),
    "cone of KL, weight 10, every 10 steps": cone(
        loss="kl", reference_weight=10.0, refresh_steps=10, refresh_samples=8, rows=16
    ),
    "cone of KL, weight 5, 16 rows, 3 of 40": cone(loss="kl", reference_weight=5.0, rows=16, refresh_samples=3),
    "cone of KL, weight 5, 16 rows, 2 of 40": cone(loss="kl", reference_weight=5.0, rows=16, refresh_samples=2),
    "cone of KL, weight 5, 12 rows, 3 of 40": cone(loss="kl", reference_weight=5.0, rows=12, refresh_samples=3),
    "cone of KL, weight 5, 12 rows": cone(loss="kl", reference_weight=5.0, rows=12),
    "cone of KL, weight 5, 8 rows, 3 of 40": cone(loss="kl", reference_weight=5.0, rows=8, refresh_samples=3),
    "cone of KL, weight 5, 8 rows, 2 of 40": cone(loss="kl", reference_weight=5.0, rows=8, refresh_samples=2),
    "cone of KL, weight 8, 8 rows, 2 of 40": cone(loss="kl", reference_weight=8.0, rows=8, refresh_samples=2),
    "cone of KL, weight 8, 8 rows, 2 of 40, third contrast": cone(
        loss="kl", lookalikes=1 / 3, reference_weight=8.0, rows=8, refresh_samples=2
    ),
    "cone of KL on the gradient, weight 8, 8 rows, 2 of 40": cone(
        loss="kl", projection="gradient", reference_weight=8.0, rows=8, refresh_samples=2
    ),
    "cone of KL, weight 12, 8 rows, 2 of 40": cone(loss="kl", reference_weight=12.0, rows=8, refresh_samples=2),
    "cone of KL, weight 8, 8 rows, 3 of 64": cone(
        loss="kl", reference_weight=8.0, rows=8, refresh_steps=8, refresh_samples=3
    ),
    "cone of KL, weight 5, 8 rows": cone(loss="kl", reference_weight=5.0, rows=8),
    "cone of KL, slices": cone(loss="kl", scope="slice"),
    "cone of KL, 64 slices": cone(loss="kl", scope="slice", slices=64),
    "cone of KL, 64 slices, weight 5": cone(loss="kl", scope="slice", slices=64, reference_weight=5.0),
    "cone of KL, slices, weight 5": cone(loss="kl", scope="slice", reference_weight=5.0),
    "cone of KL, weight 20": cone(loss="kl", reference_weight=20.0),
    "null space, rank 32": null_space(subspace_rank=32),
    "null space, rank 64": null_space(subspace_rank=64),
    "null space, rank 128": null_space(subspace_rank=128),
    "null space, rank 192": null_space(subspace_rank=192),
    "null space, rank 256": null_space(subspace_rank=256),
    "null space, energy 0.8": null_space(subspace_energy=0.8),
    "null space, energy 0.9": null_space(subspace_energy=0.9),
    "null space, energy 0.95": null_space(subspace_energy=0.95),
    "null space, energy 0.99": null_space(subspace_energy=0.99),
    "null space": null_space(subspace_energy=1.0),
    "null space, answers": null_space(subspace_energy=1.0, tokens="answer"),
    "null space, KL 8": null_space(subspace_energy=1.0, reference_weight=8.0, refresh_samples=2),
    "null space, cone, KL 8": null_space(
        subspace="both", subspace_energy=1.0, reference_weight=8.0, refresh_samples=2
    ),
    "null space without the gain": replace(null_space(), gain=False),
    "null space without the gain, three times the learning rate": replace(null_space(), gain=False, learning_rate=3.0),
    "null space at the start alone": replace(null_space(), start="free"),
    "null space, A frozen": replace(null_space(), start="frozen"),
    "null space, B held": replace(null_space(), held_b=True),
    "null space, contrast": null_space(subspace_energy=1.0, lookalikes=0.2),
    "plain, contrast": Method(lookalikes=0.2),
    "plain, half contrast": Method(lookalikes=0.5),
    "plain, third contrast": Method(lookalikes=1 / 3),
    "plain, first 16 tokens": Method(first_tokens=16),
    "plain, third contrast, first 16 tokens": Method(lookalikes=1 / 3, first_tokens=16),
    "cone, weight 1, contrast": cone(lookalikes=0.2, reference_weight=1.0),
    "cone, weight 1, half contrast": cone(lookalikes=0.5, reference_weight=1.0),
    "replay 1, contrast": Method(replay=1.0, lookalikes=0.2),
    "KL 5, contrast": Method(loss="kl", replay=5.0, lookalikes=0.2),
    "cone of KL, weight 5, contrast": cone(loss="kl", lookalikes=0.2, reference_weight=5.0),
    "cone of KL, slices, weight 5, contrast": cone(loss="kl", lookalikes=0.2, scope="slice", reference_weight=5.0),
    "cone of KL, weight 5, third contrast": cone(loss="kl", lookalikes=1 / 3, reference_weight=5.0),
    "cone of KL, weight 5, half contrast": cone(loss="kl", lookalikes=0.5, reference_weight=5.0),
    "cone of KL, weight 20, contrast": cone(loss="kl", lookalikes=0.2, reference_weight=20.0),
    "cone, scope module": cone(scope="module"),
    "cone, scope model": cone(scope="model"),
    "cone, one row a set": cone(rows_from="set", rows=4),
    "cone, 96 rows": cone(rows=96),
    "cone on the gradient": cone(projection="gradient"),
    "A-GEM": Method(BARE | {"projection": "gradient", "scope": "model", "rows_from": "set", "rows": 1}, merged=True),
    "SGD, plain": Method(**SGD),
    "SGD, paper": Method(paper=True, overrides={"rows": 4}, answers="given", **SGD),
    "SGD, cone": Method(BARE, **SGD),
    "SGD, replay 1": Method(replay=1.0, **SGD),
    "OSF": Method(osf=True, learning_rate=0.2),
}

DEFAULT = "null space"
"""What `OGPSAConfig()` is."""

GRADIENTS = "cone of KL, weight 8, 8 rows, 2 of 40"
"""What `OGPSAConfig(subspace="gradients")` with `ReferenceSet.from_prompts` is, with batches of 8."""

DRAWN = (
    "plain",
    "paper",
    "replay 1",
    "KL 8, 2 of 40",
    GRADIENTS,
    DEFAULT,
    "null space, KL 8",
    "cone of KL, slices",
    "cone of KL, slices, weight 5",
    "cone of KL, slices, weight 5, contrast",
)
"""What plots show if not told otherwise."""
