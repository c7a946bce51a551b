# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Options of `ogpsa sft` and `ogpsa dpo` in addition to TRL's own options."""

from __future__ import annotations

import tempfile
import warnings
from argparse import Action, ArgumentParser
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_type_hints

import torch
import yaml
from peft import LoraConfig
from trl import ModelConfig, TrlParser

from ..core.full_parameter import FullParameterConfig
from ..references.sets import ReferenceSet
from ..tuner.config import OGPSAConfig

METHODS = ("ogpsa", "paper", "plain")
MethodConfig: TypeAlias = LoraConfig | FullParameterConfig | None
"""The configuration of a method. `None`: whole weights without projection."""
RENAMED = {"contrast": "lookalikes", "contrast_prompts": "lookalike_prompts"}
"""Old names of options. They still work, with a warning."""


def _projection_options() -> list[tuple[str, Any, Any]]:
    """Return OGPSAConfig's own fields as optional fields."""
    hints, own = get_type_hints(OGPSAConfig), OGPSAConfig().ogpsa_dict()
    whole = FullParameterConfig().ogpsa_dict()
    options = []
    for setting in fields(OGPSAConfig):
        if setting.name not in own or setting.name == "missing_reference":  # the command always has references
            continue
        text = setting.metadata["help"]
        if setting.name == "reference_budget":  # None means "all" there and "not given" here
            text = text.replace("None uses all", "0 uses all")
        default = f"{setting.default}"
        if whole[setting.name] != own[setting.name]:
            default += f" ({whole[setting.name]} with full_parameter)"
        text += f" If this is not set, the value is {default}. With method=paper, it is the paper's value."
        options.append((setting.name, hints[setting.name] | None, field(default=None, metadata={"help": text})))
    return options


def _check_method(self: OGPSAArguments) -> None:
    if self.method not in METHODS:  # argparse checks only flags, not values from YAML
        raise ValueError(f"method={self.method!r} is unknown. Choose from: {', '.join(METHODS)}.")


_METHOD_HELP = (
    "'ogpsa': the defaults of OGPSAConfig (or FullParameterConfig) and the options that you set. 'paper': the "
    "published rule and schedule. 'plain': no projection. The references and the other OGPSA options are then ignored."
)
if TYPE_CHECKING:

    class OGPSAArguments:
        """The method and its OGPSA options, which have the names of `OGPSAConfig`'s fields."""

        method: Literal["ogpsa", "paper", "plain"]

else:
    OGPSAArguments = make_dataclass(
        "OGPSAArguments",
        [
            ("method", Literal[METHODS], field(default="ogpsa", metadata={"help": _METHOD_HELP})),
            *_projection_options(),
        ],
        namespace={"__post_init__": _check_method, "__doc__": "The method and its OGPSA options."},
    )


@dataclass
class DataArguments:
    """Training data, evaluation data and reference sets."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Training data. Give a SPEC: a .jsonl, .json or .parquet file, a folder saved by datasets, "
            "builtin:harmful, builtin:benign, builtin:general or builtin:pairs with an optional :test, public:NAME, "
            "or a hub name with an optional :config and [split]."
        },
    )
    dataset_samples: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of training rows. A public set is shuffled first. From other data, the first rows "
            "are used."
        },
    )
    own_refusals: bool = field(
        default=False,
        metadata={
            "help": "Only for `ogpsa sft`: train on refusals that the base model writes itself, under a safety "
            "instruction that is not in the rows. The training data then needs only harmful prompts (the column "
            "prompt or messages). Its answers are ignored."
        },
    )
    lookalikes: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training rows that are benign look-alikes with the model's own answers. They lower "
            "over-refusal. 0 adds none."
        },
    )
    lookalike_prompts: str = field(
        default="lookalikes",
        metadata={
            "help": "Prompts of the look-alikes. Give the name of a built-in set of prompts, or a SPEC with prompts. "
            "The base model answers the first 200, or more if more look-alikes are needed. A public set is shuffled "
            "first."
        },
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out data for TRL's evaluation. Give a SPEC. It needs eval_strategy."}
    )
    references: list[str] = field(
        default_factory=list,
        metadata={"help": "Abilities to preserve. Give each as NAME=SPEC, for example general=builtin:general."},
    )
    reference_samples: int = field(
        default=ReferenceSet.samples or 0,
        metadata={
            "help": "Maximum number of rows used from each reference set. A public set is shuffled first. From other "
            "data, the first rows are used."
        },
    )
    reference_max_length: int = field(
        default=ReferenceSet.max_length,
        metadata={"help": "Maximum number of tokens in a reference example. Longer examples are cut off."},
    )

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ValueError("dataset is missing. Name the training data, for example --dataset builtin:harmful.")
        if self.dataset_samples is not None and self.dataset_samples < 1:
            raise ValueError(
                f"dataset_samples={self.dataset_samples} must be at least 1. Leave it out to use all rows."
            )
        if not 0 <= self.lookalikes < 1:
            raise ValueError(
                f"lookalikes={self.lookalikes} must be at least 0 and below 1. 0.2 makes every fifth row a look-alike."
            )


@dataclass
class RunArguments:
    """How the command runs."""

    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Saved LoRA adapter to train further. For example, `ogpsa dpo` can continue an adapter that "
            "`ogpsa sft` saved. The adapter keeps its own LoRA settings, and lora_* options are ignored."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Load everything, take two steps, print memory and expected time, and save nothing."},
    )
    full_parameter: bool = field(
        default=False,
        metadata={
            "help": "Train the model's own weights, as the paper does, instead of a LoRA adapter, and save a whole "
            "model. This works in several processes (accelerate launch). lora_* options are ignored."
        },
    )
    exclude: list[str] = field(
        default_factory=list,
        metadata={
            "help": "With full_parameter: modules that are trained but not projected, for example embed_tokens. Use * "
            "as a wildcard."
        },
    )
    rows_device: str = field(
        default="model",
        metadata={
            "help": "With full_parameter: where the rows are stored. 'model' stores them on the device of the "
            "parameters. 'cpu' stores them in host memory, which is slow.",
            "choices": ["model", "cpu"],
        },
    )
    random_layers: int | None = field(
        default=None,
        metadata={
            "help": "Use random weights and this number of layers, to try a run without downloading weights. Only the "
            "configuration and the tokenizer of model_name_or_path are read."
        },
    )
    random_width: int | None = field(
        default=None,
        metadata={"help": "With random_layers: the hidden size. The other widths shrink in proportion."},
    )

    def __post_init__(self) -> None:
        if self.random_width is not None and self.random_layers is None:
            raise ValueError(
                f"random_width={self.random_width} has no effect without random_layers. Set random_layers too."
            )
        if not self.full_parameter:
            for name, default in (("exclude", []), ("rows_device", "model")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} needs full_parameter. Set full_parameter, or leave out "
                        f"{name}."
                    )
        elif self.adapter:
            raise ValueError(
                f"adapter={self.adapter!r} cannot be trained with full_parameter. Merge it "
                "(peft_ogpsa.merge_adapter), and give the merged model as model_name_or_path."
            )


_OWN = {own.name for group in (DataArguments, RunArguments) for own in fields(group)}
_KINDS = {"int": (int,), "float": (int, float), "string_to_bool": (bool,)}  # by the names of the parser's converters


class ConfigParser(TrlParser):
    """TRL's parser, extended to old names of options, and to configuration files that name a file with defaults."""

    def parse_args_and_config(self, args: Iterable[str] | None = None, *rest: Any, **options: Any) -> tuple:
        """Parse as TRL's parser does, and also accept `defaults: FILE` in a configuration file.

        The options in `FILE` apply where the configuration file does not set them itself.

        Raises:
            ValueError: If one of the files is not a mapping or has a key twice, the second file names a third, or a
                flag that takes a list is given twice.
            OSError: If one of the files cannot be read.
        """
        words = [_renamed_flag(word) for word in args or ()]
        # TRL finds the file only after a space.
        words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
        refuse_repeated_lists(self, words)
        place = words.index("--config") + 1 if "--config" in words[:-1] else None
        options_of_file = None if place is None else _options_of(Path(words[place]))
        if place is None or options_of_file is None:
            return super().parse_args_and_config(words, *rest, **options)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / Path(words[place]).name
            # In ASCII, because TRL reads it in the system's encoding.
            path.write_text(yaml.safe_dump(options_of_file), encoding="ascii")
            words[place] = str(path)
            return super().parse_args_and_config(words, *rest, **options)

    def set_defaults_with_config(self, **options: Any) -> list[str]:
        """Set defaults as TRL's parser does, and check the types of YAML's values as those of the command line.

        A list option may be one text, as in YAML without the dash. An option of the command's own that has no value
        keeps its default.
        """
        actions = {action.dest: action for action in reversed(self._actions)}  # --no_NAME comes after --NAME
        given = {name: value for name, value in options.items() if value is not None or name not in _OWN}
        return super().set_defaults_with_config(
            **{name: _checkable(actions[name], value) if name in actions else value for name, value in given.items()}
        )


def _checkable(action: Action, value: Any) -> Any:
    """Return a value from YAML, as text where argparse would otherwise take it without a check.

    argparse checks and converts only texts.
    """
    kind = getattr(action.type, "__name__", None)
    if action.nargs == "+":
        entries = value if isinstance(value, list) else [value]
        # The other kind is `debug`, whose text transformers splits itself.
        return [str(entry) for entry in entries] if kind == "str" and value else value
    kinds = (str,) if action.dest in _OWN and kind == "str" else _KINDS.get(kind or "")
    return value if value is None or kinds is None or type(value) in kinds else str(value)


def refuse_repeated_lists(made: ArgumentParser, words: Sequence[str]) -> None:
    """Reject a flag with a list that is given twice: argparse would take the last values only.

    Raises:
        ValueError: If there is one.
    """
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    for action in _list_options(made):
        given = [flag for flag in flags if any(option.startswith(flag) for option in action.option_strings)]
        if len(given) > 1:
            raise ValueError(
                f"{given[0]} is given {len(given)} times, and only the last values would count. Give all values after "
                f"one flag: {given[0]} A B."
            )


def _list_options(made: ArgumentParser) -> list[Action]:
    return [action for action in made._actions if action.nargs == "+"]


def _options_of(path: Path) -> dict[str, Any] | None:
    """Return a file's options with new names, merged over its `defaults` file. Return None if it has no options."""
    given = _read_yaml(path)
    if not isinstance(given, dict):
        return None
    options = _renamed(given)
    if "defaults" not in options:
        return options
    below = path.parent / str(options.pop("defaults"))
    if not below.is_file():
        raise ValueError(f"defaults={str(below)!r} in {path} is not a file. Give a path relative to {path.name}.")
    defaults = _read_yaml(below)
    if not isinstance(defaults, dict) or "defaults" in defaults:
        raise ValueError(
            f"defaults={str(below)!r} in {path} must contain options and no `defaults` of its own. Correct that file, "
            "or give another one."
        )
    merged = {**_renamed(defaults), **options}
    if isinstance(defaults.get("env"), dict) and isinstance(options.get("env"), dict):
        merged["env"] = {**defaults["env"], **options["env"]}
    return merged


def _renamed_flag(word: str) -> str:
    """Return a word of the command line, with the new name if it is an option with an old one."""
    flag, equals, value = word.partition("=")
    name = flag.removeprefix("--").replace("-", "_")
    return f"--{_new_name(name)}{equals}{value}" if flag.startswith("--") and name in RENAMED else word


def _renamed(options: dict[str, Any]) -> dict[str, Any]:
    renamed = {_new_name(name): value for name, value in options.items()}
    for old, new in RENAMED.items():
        if old in options and new in options:
            raise ValueError(f"{old}={options[old]!r} is the old name of {new}={options[new]!r}. Remove one of them.")
    return renamed


def _new_name(name: str) -> str:
    if name not in RENAMED:
        return name
    # The users of the command see a FutureWarning; Python hides a DeprecationWarning from them.
    warnings.warn(f"The option {name} is now {RENAMED[name]}, and the old name will go.", FutureWarning, stacklevel=2)
    return RENAMED[name]


class _EachKeyOnce(yaml.SafeLoader):
    """A loader that rejects a key that occurs twice: YAML's own takes the last value without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ValueError(
                    f"{key.start_mark.name} has the key {key.value!r} again in line {key.start_mark.line + 1}. "
                    "Remove one of them."
                )
            seen.add(key.value)
        return node


def _read_yaml(path: Path) -> Any:
    try:
        with open(path, encoding="utf-8") as file:  # an open file, so that YAML errors show its name
            return _EachKeyOnce(file).get_single_data()
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply.") from error


def parser(stage: str, training: type) -> ConfigParser:
    """Build the parser of a training command.

    Args:
        stage: `"sft"` or `"dpo"`.
        training: TRL's `SFTConfig` or `DPOConfig`.

    Returns:
        A parser of `OGPSAArguments`, `DataArguments`, `RunArguments`, `training` and TRL's `ModelConfig`. Without an
        accelerator, `use_cpu` is on and `bf16` is off unless they are given: TRL's bf16 default would stop the run,
        and many CPUs only emulate that type. `hub_strategy` is `end`: only the command uploads. `model_revision` is
        None unless it is given, so that an adapter can name it.
    """
    classes = (OGPSAArguments, DataArguments, RunArguments, training, ModelConfig)
    made = ConfigParser(cast(Any, classes), prog=f"ogpsa {stage}")
    made.set_defaults_with_config(hub_strategy="end", model_revision=None)
    if not torch.accelerator.is_available():
        made.set_defaults_with_config(use_cpu=True, bf16=False)
    return made


def adapter_config(ogpsa: OGPSAArguments, lora: LoraConfig, stage: Literal["sft", "dpo"]) -> LoraConfig:
    """Build the method's configuration with the given LoRA settings.

    Args:
        ogpsa: The `OGPSAArguments`.
        lora: LoRA's settings.
        stage: Selects the schedule of the paper's method.

    Raises:
        ValueError: If `OGPSAConfig` does not allow a value.
    """
    if isinstance(lora, OGPSAConfig):
        lora = lora.lora_config()
    if ogpsa.method == "plain":
        return lora
    overrides = _given(ogpsa) | {f.name: getattr(lora, f.name) for f in fields(lora)}
    return OGPSAConfig.paper(stage, **overrides) if ogpsa.method == "paper" else OGPSAConfig(**overrides)


def whole_config(ogpsa: OGPSAArguments, run: RunArguments, stage: Literal["sft", "dpo"]) -> FullParameterConfig | None:
    """Build the method's configuration for full-parameter training. Return None for `method="plain"`.

    Args:
        ogpsa: The `OGPSAArguments`.
        run: The `RunArguments`.
        stage: Selects the schedule of the paper's method.

    Raises:
        ValueError: If `FullParameterConfig` does not allow a value.
    """
    if ogpsa.method == "plain":
        return None
    overrides = _given(ogpsa) | {"exclude": run.exclude, "rows_device": run.rows_device}
    if ogpsa.method == "paper":
        return FullParameterConfig.paper(stage, **overrides)
    return FullParameterConfig(**overrides)


def _given(ogpsa: OGPSAArguments) -> dict[str, Any]:
    """Return the projection options that the user has set."""
    overrides = {name: value for name, value in vars(ogpsa).items() if name != "method" and value is not None}
    if overrides.get("reference_budget") == 0:
        overrides["reference_budget"] = None
    return overrides
