# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""OGPSA as a callback of ms-swift.

Write a plugin file, and run `swift sft --external_plugins FILE --callbacks ogpsa ...`:

```py
from peft_ogpsa.integrations.swift import register

register({"references": {"general": "prompts:general"}})
```
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .callback import ToolCallback
from .settings import Settings


def register(options: Mapping[str, Any], name: str = "ogpsa") -> None:
    """Add OGPSA to the callbacks that `--callbacks` can name.

    Args:
        options: See `settings.Settings.read`.
        name: The name for `--callbacks`.

    Raises:
        ValueError: If an option is not allowed.
    """
    from swift import callbacks_map

    Settings.read(options)  # reports mistakes before the model is loaded

    def make(args: Any, trainer: Any) -> ToolCallback:
        # ms-swift gives every run a new folder, so that the checkpoint of an earlier run is not where this run saves.
        resumed = {"resume_from": getattr(args, "resume_from_checkpoint", None)}
        settings = Settings.read({**resumed, **options}, beta=getattr(args, "beta", None) or 0.1)
        return settings.callback(seed=args.seed)

    callbacks_map[name] = make
