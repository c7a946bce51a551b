# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""LLaMA-Factory with OGPSA.

```bash
python -m peft_ogpsa.integrations.llamafactory CONFIG.yaml [option=value ...]
```

`CONFIG.yaml` is a configuration of LLaMA-Factory with one more option, `ogpsa`, see `settings.Settings.read`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .settings import Settings

STAGES = ("sft", "dpo")
"""The stages of LLaMA-Factory that OGPSA was tried with."""

OTHER_BACKENDS = ("USE_MCA", "USE_MEGATRON_BRIDGE")
"""Environment variables that choose another backend. Megatron Bridge ignores callbacks; the other was not tried."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as `llamafactory-cli train CONFIG.yaml [option=value ...]` does, with OGPSA."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config, settings = read(arguments)
        from llamafactory.train.tuner import run_exp
    except (ValueError, OSError, ImportError, yaml.YAMLError) as error:
        raise SystemExit(f"peft_ogpsa.integrations.llamafactory: {error}") from error
    run_exp(config, callbacks=[settings.callback(seed=config.get("seed", 42))])


def read(arguments: Sequence[str]) -> tuple[dict[str, Any], Settings]:
    """Read the configuration file and the options after it.

    Args:
        arguments: The file, and `option=value` words. `ogpsa.option=value` sets an option of OGPSA.

    Returns:
        The configuration without `ogpsa`, for LLaMA-Factory, and the settings of OGPSA.

    Raises:
        ValueError: If there is no file, or no `ogpsa` in it, or if an option is not allowed.
        OSError: If the file cannot be read.
    """
    if not arguments or Path(arguments[0]).suffix not in (".yaml", ".yml", ".json"):
        raise ValueError("name the configuration file first: CONFIG.yaml [option=value ...]")
    try:
        with open(arguments[0], encoding="utf-8") as file:
            config = yaml.safe_load(file)  # JSON is YAML too
    except RecursionError as error:
        raise ValueError(f"{arguments[0]} is nested too deeply.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{arguments[0]} must be a mapping of options.")
    for word in arguments[1:]:
        _set(config, word)
    if "ogpsa" not in config:
        raise ValueError(
            f"{arguments[0]} has no `ogpsa`. Add it, for example ogpsa: {{references: {{general: 'prompts:general'}}}}"
            ", or train without OGPSA: llamafactory-cli train."
        )
    settings = Settings.read(config.pop("ogpsa"), beta=config.get("pref_beta", 0.1))
    _check(config, settings)
    return config, settings


def _set(config: dict[str, Any], word: str) -> None:
    """Set one `option=value` in the configuration."""
    name, equals, value = word.partition("=")
    if not name or not equals:
        raise ValueError(f"{word!r} is not option=value. Write for example learning_rate=1.0e-4.")
    *path, last = name.split(".")
    for step in path:
        config = config.setdefault(step, {})
        if not isinstance(config, dict):
            raise ValueError(f"{word!r}: {step} is not a mapping in the configuration file.")
    config[last] = yaml.safe_load(value)


def _check(config: dict[str, Any], settings: Settings) -> None:
    """Reject what OGPSA cannot project, before the model is loaded."""
    stage, kind = config.get("stage", "sft"), config.get("finetuning_type", "lora")
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r} does not work with OGPSA. Use one of: {', '.join(STAGES)}.")
    if kind != "lora":
        raise ValueError(
            f"finetuning_type={kind!r} makes no LoRA adapter, which OGPSA needs here. Set finetuning_type: lora."
        )
    other = [f"{name}=1" for name in OTHER_BACKENDS if os.environ.get(name, "").lower() in ("1", "true", "y")]
    other += ["use_hyper_parallel: true"] if config.get("use_hyper_parallel") else []
    if other:
        raise ValueError(
            f"{other[0]} trains with another backend of LLaMA-Factory. OGPSA was not tried with these backends, and "
            "one of them ignores callbacks, so that it would train plain LoRA. Leave it out."
        )
    if config.get("use_unsloth") and settings.config.uses_activations:
        raise ValueError(
            "use_unsloth: unsloth's fused kernels do not call the adapted layers, so OGPSA cannot see their inputs. "
            "Set use_unsloth: false, or use subspace: gradients."
        )


if __name__ == "__main__":
    main()
