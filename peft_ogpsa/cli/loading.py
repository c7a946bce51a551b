# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Load the base model and the adapter of a command."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, PreTrainedModel
from trl import ModelConfig, get_quantization_config

from .. import compat, extras
from ..tuner.config import DAMAGED
from ..tuner.merge import load_whole_adapter
from .models import local_source
from .random_weights import RandomWeights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


def load_base(
    model: ModelConfig,
    *,
    trust_remote_code: bool = False,
    init_kwargs: dict[str, Any] | None = None,
    random: RandomWeights | None = None,
    option: str = "model_name_or_path",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
    """Load the model and its tokenizer (or processor) as TRL's scripts do, in 4 or 8 bits if requested.

    Like `load_model`, this also finds SmolLM2-135M-Instruct without the hub.

    Args:
        model: TRL's model options.
        trust_remote_code: Run code that comes with the model.
        init_kwargs: Further arguments of `from_pretrained`. They override the model options.
        random: Load only the configuration and the tokenizer, and create random weights.
        option: The command's option that names the model, for messages.

    Raises:
        ValueError: If no name is given, the model or its tokenizer cannot be loaded, or random weights are requested
            together with quantization or for a model that cannot be shrunk this way.
        ImportError: If quantization is requested and bitsandbytes is not installed, or too old.
    """
    name = model.model_name_or_path
    if not name:
        raise ValueError(f"{option} is missing. Give a folder or a name on the Hugging Face hub.")
    options: dict[str, Any] = {
        "revision": model.model_revision,
        "trust_remote_code": trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    if (quantization := get_quantization_config(model)) is not None:
        extras.check("qlora", "A quantized base")
        options["quantization_config"] = quantization
    options |= init_kwargs or {}
    if random is not None and "quantization_config" in options:
        raise ValueError(
            f"random_layers={random.layers} creates weights that cannot be quantized. Leave out load_in_4bit and "
            "load_in_8bit."
        )
    try:
        dtype = options["dtype"]
        dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), torch.bfloat16)
        source = local_source(name, dtype)
        shared = {name: options[name] for name in ("revision", "trust_remote_code")}
        # For random weights, read only the configuration.
        loaded: Any = (
            compat.create_model(source, **options) if random is None else AutoConfig.from_pretrained(source, **shared)
        )
        processing_class = AutoProcessor.from_pretrained(source, **shared)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{option}={name!r} cannot be loaded: {error} Give a folder with a model and its tokenizer, "
            "or a name on the Hugging Face hub that this machine can reach."
        ) from error
    if random is not None:
        loaded = random.build(loaded, options["dtype"], options["attn_implementation"])
    # A saved adapter must not name a folder in the cache as its base.
    loaded.config._name_or_path = loaded.name_or_path = name
    return loaded, processing_class


def read_adapter_config(adapter: str) -> LoraConfig:
    """Read the settings of a saved LoRA adapter.

    Raises:
        ValueError: If there is no adapter, or if it is an adapter of another kind.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (*DAMAGED, ValueError, OSError) as error:
        reason = "there is no such folder" if not Path(adapter).exists() and adapter.count("/") != 1 else error
        raise ValueError(
            f"adapter={adapter!r} cannot be read: {str(reason).rstrip('.')}. Give the folder of a saved adapter, for "
            "example the output_dir of `ogpsa sft`, or a name on the Hugging Face hub."
        ) from error
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"adapter={adapter!r} has the type {kind}. Give a LoRA adapter.")
    return config


def load_adapter(base: PreTrainedModel, adapter: str, config: LoraConfig, *, trainable: bool) -> PeftModel:
    """Load a saved adapter onto its base model.

    Raises:
        ValueError: If the adapter does not fit the model, or has no weights for some of the layers that it names.
    """
    try:
        return load_whole_adapter(base, adapter, is_trainable=trainable, config=config)
    except UserWarning as error:
        raise ValueError(
            f"adapter={adapter!r} does not fit the model {base.name_or_path!r}: it has no weights for some of the "
            f"layers that it adapts. {textwrap.shorten(str(error), 300)}\nIt was made for "
            f"{config.base_model_name_or_path!r}. Give that model instead, or save the adapter from the class "
            f"{type(base).__name__}."
        ) from error
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"adapter={adapter!r} does not fit the model {base.name_or_path!r}: {error}\nIt was made for "
            f"{config.base_model_name_or_path!r}. Give that model instead."
        ) from error
