# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""The grid: ways to make a model safe, by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from .baselines.placement import Layers


@dataclass(frozen=True)
class Method:
    """A way of training.

    All methods that draw reference examples draw them at the same steps and in the same number, a tenth of the
    training examples, unless their overrides or their budget say otherwise.

    Attributes:
        overrides: Settings of OGPSA. `None`: train without projection.
        paper: Whether to start from the published rule and its schedule.
        answers: Answers of the references: `"given"` (by the data) or `"own"` (by the base model).
        loss: Loss of the references: `"answer"` (cross-entropy) or `"kl"` (KL from base).
        replay: Without projection, weight of the mean gradient of the reference examples.
        merged: Whether to merge all reference sets into one.
        budget: With `replay`, number of reference examples per training example.
        every: With `replay`, number of steps from one draw of reference examples to the next.
        refusals: Refusals to train on: `"given"` (by the data) or `"own"` (by the base model, under an instruction
            that the rows do not contain).
        lookalikes: Share of benign look-alikes among the training rows. The base model answers them.
        more_lookalikes: Whether the reference set of look-alikes contains all prompts that are not used to measure.
        first_tokens: How many tokens of every training answer to train on. `None`: all.
        learning_rate: Factor of the grid's learning rate.
        optimizer: Name of the optimizer in transformers.
        whole: Whether to train all weights instead of an adapter.
        linear: With `whole`, whether to train only the weights of the blocks' linear layers.
        osf: Whether to train weights outside their leading singular directions, with PEFT's OSF.
        start: Another start for plain LoRA. `"free"` and `"frozen"`: A starts in the complement of OGPSA's subspace
            with these overrides, and is then trained or frozen. Other names: the start in this module of `baselines`,
            for `"lora_null_frozen"` with A frozen.
        gain: Whether to enlarge A's start and steps, to make up for the part of the inputs that the activation
            subspace takes away.
        held_b: Whether to hold B, too. See `held_b.HeldB`.
        layers: The layers that plain LoRA is on. See `baselines.placement`.
        scaled: Whether to measure at several scales of the finished adapter instead of at several steps. See
            `baselines.scaling`.
        anchor: Weight of KL from base on the training tokens. See `baselines.asft`.
        reweighted: Whether to multiply each training token's loss by the token's probability, as in ASFT.
        ewc: Weight of EWC's penalty. See `baselines.ewc`.
    """

    overrides: dict[str, Any] | None = None
    paper: bool = False
    answers: str = "own"
    loss: str = "answer"
    merged: bool = False
    replay: float = 0.0
    budget: float = 0.1
    every: int = 5
    refusals: Literal["given", "own"] = "given"
    lookalikes: float = 0.0
    more_lookalikes: bool = False
    first_tokens: int | None = None
    learning_rate: float = 1.0
    optimizer: str = "adamw_torch_fused"
    whole: bool = False
    linear: bool = False
    osf: bool = False
    start: Literal["free", "frozen", "corda", "lora_null", "lora_null_frozen", "mica"] | None = None
    gain: bool = True
    held_b: bool = False
    layers: Layers = "all"
    scaled: bool = False
    anchor: float = 0.0
    reweighted: bool = False
    ewc: float = 0.0

    @property
    def references(self) -> bool:
        """Whether it uses reference examples."""
        return (
            self.paper
            or self.overrides is not None
            or self.replay > 0
            or self.ewc > 0
            or self.start in _FROM_REFERENCES
        )

    @property
    def moves_base(self) -> bool:
        """Whether weights of the base change, so that it works on a copy of the base, in float32."""
        return self.whole or self.osf or self.start in _FROM_REFERENCES

    def recorded(self) -> dict[str, Any]:
        """The fields for a result file, under the names that the finished runs gave them."""
        names = {"overrides": "knobs", "lookalikes": "contrast"}
        return {names.get(name, name): value for name, value in asdict(self).items()}


_FROM_REFERENCES = ("corda", "lora_null", "lora_null_frozen")
"""Starts that come from the references. A part of each weight moves from the base into the adapter."""

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


def at_rates(name: str, method: Method, *factors: float) -> dict[str, Method]:
    """The same method at other learning rates: at so many times its own."""
    return {
        name if factor == 1 else f"{name}, {_TIMES[factor]} the learning rate": replace(
            method, learning_rate=method.learning_rate * factor
        )
        for factor in factors
    }


_TIMES = {
    0.1: "tenth of",
    0.25: "quarter of",
    1 / 3: "third of",
    0.5: "half",
    3.0: "three times",
    5.0: "five times",
    10.0: "ten times",
}

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

_AROUND = (1 / 3, 1.0, 3.0)

_LEARNING_RATES: dict[str, dict[str, Method]] = {
    "plain": at_rates("plain", Method(), 1.0, 0.5, 0.25, 0.1),
    "paper": at_rates("paper", Method(paper=True, overrides={"rows": 4}, answers="given"), *_AROUND),
    "MLP": at_rates("MLP", Method(layers="mlp"), *_AROUND),
    "attention": at_rates("attention", Method(layers="attention"), *_AROUND),
    "up_proj, rank 1": at_rates("up_proj, rank 1", Method(layers="up_proj"), 1.0, 3.0, 10.0),
    "LoRA-Null": at_rates("LoRA-Null", Method(start="lora_null"), *_AROUND),
    "LoRA-Null, A frozen": at_rates("LoRA-Null, A frozen", Method(start="lora_null_frozen"), 1.0, 3.0, 5.0, 10.0),
    "CorDA": at_rates("CorDA", Method(start="corda"), *_AROUND),
    "MiCA": at_rates("MiCA", Method(start="mica"), *_AROUND),
    "OSF": {
        "OSF at 0.01": Method(osf=True, learning_rate=0.01),
        "OSF at 0.02": Method(osf=True, learning_rate=0.02),
        "OSF at 0.05": Method(osf=True, learning_rate=0.05),
        "OSF at 0.1": Method(osf=True, learning_rate=0.1),
        "OSF": Method(osf=True, learning_rate=0.2),
        "OSF at 0.4": Method(osf=True, learning_rate=0.4),
        "OSF at 1": Method(osf=True, learning_rate=1.0),
    },
}
"""Families whose main knob is the learning rate."""

_WEIGHTS: dict[str, dict[str, Method]] = {
    "replay": {f"replay {w:g}, 2 of 40": Method(replay=w, budget=0.05) for w in (1.0, 3.0, 8.0)},
    "KL penalty": {
        f"KL {w:g}, 2 of 40": Method(loss="kl", replay=w, budget=0.05) for w in (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
    },
    "KL penalty at every step": {
        f"KL {w:g}, 2 of 8": Method(loss="kl", replay=w, budget=0.25, every=1) for w in (0.5, 2.0, 8.0)
    },
    "ASFT": {f"ASFT {w:g}": Method(anchor=w, reweighted=True) for w in (0.01, 0.05, 0.25)},
    "KL on training rows": {f"KL {w:g} on training rows": Method(anchor=w) for w in (0.05, 0.25, 1.0)},
    "EWC": {f"EWC {w:g}": Method(ewc=w) for w in (100.0, 1000.0, 10000.0, 100000.0)},
    "null space and KL penalty": {
        f"null space, KL {w:g}": null_space(subspace_energy=1.0, reference_weight=w, refresh_samples=2)
        for w in (2.0, 8.0, 32.0)
    },
    "null space and KL penalty at every step": {
        f"null space, KL {w:g}, 2 of 8": null_space(
            subspace_energy=1.0, reference_weight=w, refresh_samples=2, refresh_steps=1
        )
        for w in (0.5, 2.0)
    },
}
"""Families whose main knob is a weight."""

_SCALED: dict[str, Method] = {
    "plain, scaled": Method(scaled=True),
    "KL 8, 2 of 40, scaled": replace(_WEIGHTS["KL penalty"]["KL 8, 2 of 40"], scaled=True),
    "null space, scaled": replace(null_space(subspace_energy=1.0), scaled=True),
    "null space, KL 2, scaled": replace(_WEIGHTS["null space and KL penalty"]["null space, KL 2"], scaled=True),
}
"""Methods whose finished adapter is scaled. The knob is the scale, which every run goes through."""

METHODS: dict[str, Method] = {
    **_LEARNING_RATES["plain"],
    **_LEARNING_RATES["paper"],
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
    **_WEIGHTS["replay"],
    "replay 1, twentieth": Method(replay=1.0, budget=0.05),
    "replay 1, quarter": Method(replay=1.0, budget=0.25),
    "KL 1": Method(loss="kl", replay=1.0),
    "KL 5": Method(loss="kl", replay=5.0),
    **_WEIGHTS["KL penalty"],
    **_WEIGHTS["KL penalty at every step"],
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
    **_WEIGHTS["null space and KL penalty"],
    **_WEIGHTS["null space and KL penalty at every step"],
    "null space, cone, KL 8": null_space(
        subspace="both", subspace_energy=1.0, reference_weight=8.0, refresh_samples=2
    ),
    "null space without the gain": replace(null_space(), gain=False),
    "null space without the gain, three times the learning rate": replace(null_space(), gain=False, learning_rate=3.0),
    "null space at the start alone": replace(null_space(), start="free"),
    "null space, A frozen": replace(null_space(), start="frozen"),
    "null space, B held": replace(null_space(), held_b=True),
    "null space, given answers, weight 1": Method(
        {"subspace": "activations", "reference_weight": 1.0, "refresh_samples": 3}, answers="given"
    ),
    "null space, contrast": null_space(subspace_energy=1.0, lookalikes=0.2),
    "null space, KL 2, contrast": replace(_WEIGHTS["null space and KL penalty"]["null space, KL 2"], lookalikes=0.2),
    "null space, KL 8, contrast": replace(_WEIGHTS["null space and KL penalty"]["null space, KL 8"], lookalikes=0.2),
    "KL 8, 2 of 40, contrast": replace(_WEIGHTS["KL penalty"]["KL 8, 2 of 40"], lookalikes=0.2),
    "null space, KL 8, more look-alikes": replace(
        _WEIGHTS["null space and KL penalty"]["null space, KL 8"], more_lookalikes=True
    ),
    "plain, own refusals": Method(refusals="own"),
    "KL 8, 2 of 40, own refusals": replace(_WEIGHTS["KL penalty"]["KL 8, 2 of 40"], refusals="own"),
    "null space, own refusals": replace(null_space(subspace_energy=1.0), refusals="own"),
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
    **_SCALED,
    **_LEARNING_RATES["MLP"],
    **_LEARNING_RATES["attention"],
    **_LEARNING_RATES["up_proj, rank 1"],
    **_LEARNING_RATES["LoRA-Null"],
    **_LEARNING_RATES["LoRA-Null, A frozen"],
    **_LEARNING_RATES["CorDA"],
    **_LEARNING_RATES["MiCA"],
    **_LEARNING_RATES["OSF"],
    **_WEIGHTS["ASFT"],
    **_WEIGHTS["KL on training rows"],
    **_WEIGHTS["EWC"],
}

DEFAULT = "null space, KL 2"
"""What `OGPSAConfig()` with `ReferenceSet.from_prompts` is, with batches of 8."""

GRADIENTS = "cone of KL, weight 8, 8 rows, 2 of 40"
"""What `OGPSAConfig(subspace="gradients")` with `ReferenceSet.from_prompts` is, with batches of 8."""

SEARCH: dict[str, tuple[str, ...]] = {
    **{family: tuple(rows) for family, rows in (_LEARNING_RATES | _WEIGHTS).items()},
    **{name: (name,) for name in _SCALED},
    "cone of KL": tuple(f"cone of KL, weight {w}, 8 rows, 2 of 40" for w in (5, 8, 12)),
    "null space": (*(f"null space, energy {energy}" for energy in (0.9, 0.95, 0.99)), "null space"),
}
"""For each family of methods, the rows that differ in its main knob alone.

To choose from on a seed that no table has.
"""

DRAWN = (
    "plain",
    "paper",
    "replay 1",
    "KL 8, 2 of 40",
    GRADIENTS,
    "null space",
    DEFAULT,
    "null space, KL 8",
    "cone of KL, slices",
    "cone of KL, slices, weight 5",
    "cone of KL, slices, weight 5, contrast",
)
"""What plots show if not told otherwise."""
