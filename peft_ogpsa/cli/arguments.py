# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""What `ogpsa sft` and `ogpsa dpo` can be told besides TRL's own options."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal, cast, get_type_hints

import torch
from peft import LoraConfig
from trl import ModelConfig, TrlParser

from ..config import OGPSAConfig
from ..reference import ReferenceSet

METHODS = ("ogpsa", "paper", "plain")


def _knobs() -> list[tuple[str, Any, Any]]:
    """OGPSAConfig's own fields, as optional ones."""
    hints, own = get_type_hints(OGPSAConfig), OGPSAConfig().ogpsa_dict()
    knobs = []
    for knob in fields(OGPSAConfig):
        if knob.name not in own or knob.name == "missing_reference":  # the command always has references
            continue
        text = knob.metadata["help"]
        if knob.name == "reference_budget":  # None, which is all there, means "not given" here
            text = text.replace("None uses all", "0 uses all")
        text += f" Not given: {knob.default}, or what the paper does with method=paper."
        knobs.append((knob.name, hints[knob.name] | None, field(default=None, metadata={"help": text})))
    return knobs


def _check_method(self: Any) -> None:
    if self.method not in METHODS:  # argparse checks flags alone, not what comes from YAML
        raise ValueError(f"method={self.method!r} is unknown. Choose from: {', '.join(METHODS)}.")


_METHOD_HELP = (
    "'ogpsa': OGPSAConfig's defaults and what is set here. 'paper': the published rule and schedule. 'plain': LoRA "
    "without projection; references and the other OGPSA options are then ignored."
)
OGPSAArguments: Any = make_dataclass(
    "OGPSAArguments",
    [
        ("method", Literal[METHODS], field(default="ogpsa", metadata={"help": _METHOD_HELP})),
        *_knobs(),
    ],
    namespace={"__post_init__": _check_method, "__doc__": "How references are kept from rising."},
)


@dataclass
class DataArguments:
    """What is trained on, and what must not be lost."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Training data, a SPEC: a .jsonl, .json or .parquet file, a folder saved by datasets, "
            "builtin:harmful, builtin:benign, builtin:general or builtin:pairs with an optional :test, public:NAME, "
            "or a hub name with an optional :config and [split]."
        },
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out data, a SPEC, for TRL's evaluation (eval_strategy)."}
    )
    references: list[str] = field(
        default_factory=list, metadata={"help": "Abilities to keep, NAME=SPEC each, as in general=builtin:general."}
    )
    reference_samples: int = field(
        default=ReferenceSet.samples or 0, metadata={"help": "Most rows used of each reference set, from its start."}
    )
    reference_max_length: int = field(
        default=ReferenceSet.max_length, metadata={"help": "Tokens at which a reference example is cut off."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.references, str):  # YAML without the dash
            self.references = [self.references]
        if not self.dataset:
            raise ValueError("dataset is missing. Name the training data, for example --dataset builtin:harmful.")


@dataclass
class RunArguments:
    """How the command runs."""

    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Saved LoRA adapter to train further, such as that of `ogpsa sft` under `ogpsa dpo`. It brings "
            "its own LoRA settings, and lora_* options are ignored."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Load everything, take two steps, print memory and projected time, and save nothing."},
    )


def parser(stage: str, training: type) -> TrlParser:
    """The parser of a training command.

    Args:
        stage: `"sft"` or `"dpo"`.
        training: TRL's `SFTConfig` or `DPOConfig`.

    Returns:
        A parser of `OGPSAArguments`, `DataArguments`, `RunArguments`, `training` and TRL's `ModelConfig`. Where there
        is no accelerator, `use_cpu` is on unless it is given: TRL's bf16 default would stop the run there.
    """
    classes = (OGPSAArguments, DataArguments, RunArguments, training, ModelConfig)
    made = TrlParser(cast(Any, classes), prog=f"ogpsa {stage}")
    made.set_defaults_with_config(use_cpu=not torch.accelerator.is_available())
    return made


def adapter_config(ogpsa: Any, lora: LoraConfig, stage: Literal["sft", "dpo"]) -> LoraConfig:
    """The method's configuration with the LoRA settings given.

    Args:
        ogpsa: The `OGPSAArguments`.
        lora: LoRA's settings.
        stage: The schedule of the paper's method.

    Raises:
        ValueError: If `OGPSAConfig` does not allow a value.
    """
    if isinstance(lora, OGPSAConfig):
        lora = lora.lora_config()
    if ogpsa.method == "plain":
        return lora
    knobs = {name: value for name, value in vars(ogpsa).items() if name != "method" and value is not None}
    if knobs.get("reference_budget") == 0:
        knobs["reference_budget"] = None
    knobs |= {f.name: getattr(lora, f.name) for f in fields(lora)}
    return OGPSAConfig.paper(stage, **knobs) if ogpsa.method == "paper" else OGPSAConfig(**knobs)
