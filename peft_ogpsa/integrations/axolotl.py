# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""OGPSA as a plugin of axolotl.

```yaml
plugins:
  - peft_ogpsa.integrations.axolotl.OGPSAPlugin
ogpsa:
  references: {general: "prompts:general"}
```
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from torch import nn

from ..references.sets import ReferenceSet
from .callback import ToolCallback
from .settings import Settings

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
"""Options that make axolotl read LoRA's weights without calling the layers. It turns them on if they are not set."""


class OGPSAArguments(BaseModel):
    """The option that the plugin adds to axolotl's configuration."""

    ogpsa: dict[str, Any] | None = None


class OGPSAPlugin(BasePlugin):
    """Projects the steps of the LoRA adapter that axolotl makes. Its options are in `ogpsa:`."""

    def get_input_args(self) -> str:
        """Return where axolotl finds the model of the plugin's options."""
        return f"{__name__}.OGPSAArguments"

    def register(self, cfg: Any) -> None:
        """Check the options before axolotl loads anything.

        Raises:
            ValueError: If `ogpsa` is missing or not allowed, if there is no LoRA adapter or ReLoRA merges it, or if
                axolotl's fused LoRA kernels are on with an activation subspace.
        """
        if cfg.get("adapter") not in ("lora", "qlora"):
            raise ValueError(
                f"adapter={cfg.get('adapter')!r} makes no LoRA adapter, which OGPSA needs here. Set adapter: lora or "
                "adapter: qlora."
            )
        if cfg.get("relora"):
            raise ValueError(
                "relora: true merges the adapter into the base again and again in training, and OGPSA keeps the model "
                "close to the base. Set relora: false."
            )
        settings = _settings(cfg)
        on = [name for name in KERNELS if cfg.get(name)]
        if on and settings.config.uses_activations:
            raise ValueError(
                f"{', '.join(on)}: axolotl's fused LoRA kernels do not call the adapted layers, so OGPSA cannot see "
                f"their inputs. Set {', '.join(f'{name}: false' for name in on)}, or use subspace: gradients."
            )
        for name in KERNELS:
            if cfg.get(name) is None:  # axolotl would turn it on
                cfg[name] = False

    def add_callbacks_pre_trainer(self, cfg: Any, model: nn.Module) -> list[ToolCallback]:
        """Return the callback of the trainer."""
        return [_settings(cfg).callback(seed=cfg.get("seed") or 0)]


def _settings(cfg: Any) -> Settings:
    options = cfg.get("ogpsa")
    if options is None:
        raise ValueError(
            "plugins names OGPSAPlugin, but there is no `ogpsa`. Add it, for example ogpsa: {references: {general: "
            "'prompts:general'}}, or remove the plugin."
        )
    # In the order in which axolotl looks for it.
    betas = (cfg.get("trl") or {}).get("beta"), cfg.get("rl_beta"), cfg.get("dpo_beta"), ReferenceSet.beta
    return Settings.read(options, beta=next(beta for beta in betas if beta is not None))
